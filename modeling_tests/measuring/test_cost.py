"""What `crosslmm bench` counts and times."""

import json
from concurrent.futures import Future
from functools import cache
from itertools import count as count_from
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import crosslmm_cli
from factories import random_model, tiny_config
from transformers_crosslmm import CrossLMMConfig, attention_crosslmm
from transformers_crosslmm.cache_crosslmm import VisualCacheLayer
from transformers_crosslmm.checkpoints.inspect import count_costs
from transformers_crosslmm.measuring import cost
from transformers_crosslmm.measuring.contenders import contenders
from transformers_crosslmm.measuring.cost import (
    FRAMES,
    PAPER,
    Clock,
    PartTimer,
    Runner,
    choose,
    count,
    multiply_accumulates,
    paper_macs,
    run,
    table,
)

BY_NAME = {contender.name: contender for contender in contenders()}
OURS = [name for name in BY_NAME if name.startswith("CrossLMM")]


# --- counted --------------------------------------------------------------------------------------------------------


@cache
def counted(name: str) -> dict:
    """At full size, two frames."""
    return count(BY_NAME[name], 2)


@pytest.mark.parametrize(
    "name",
    [
        "CrossLMM-2B video features",
        "CrossLMM-7B frame features",
        "CrossLMM-7B video kv",
        "CrossLMM-7B-16 video features",
    ],
)
def test_the_closed_form_is_what_the_counter_counts_at_full_size(name):
    row = counted(name)
    assert sum(row["closed_form"].values()) == row["macs"]["total"]


@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
@pytest.mark.parametrize("form", ["kv", "features"])
def test_the_closed_form_is_what_a_real_prefill_multiplies(scope, form):
    config = tiny_config(text_config={"v2v_scope": scope, "cross_attention_cache": form}, projector_hidden_size=36)
    model = random_model(config, attn_implementation="eager")
    frames, text_tokens = 7, 11
    ids = torch.tensor([[config.video_token_id] * 9 * frames + [5] * text_tokens])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, pixel_values_videos=torch.randn(frames, 3, 33, 33), use_cache=True, logits_to_keep=1)
    assert 2 * sum(multiply_accumulates(config, frames, text_tokens=text_tokens).values()) == counter.get_total_flops()


@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_the_closed_form_counts_pictures_that_are_shown_for_several_frames_once(scope, monkeypatch):
    monkeypatch.setattr(attention_crosslmm, "_attention_with_weight", attention_crosslmm._plain_attention)  # countable
    config = tiny_config(text_config={"v2v_scope": scope, "cross_attention_cache": "features"})
    model = random_model(config, attn_implementation="eager")
    shown = torch.arange(3).repeat_interleave(5)
    ids = torch.tensor([[config.video_token_id] * 9 * 15 + [5] * 60])
    pixels = {"pixel_values_videos": torch.randn(3, 3, 33, 33), "video_frame_index": shown}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, **pixels, use_cache=True, logits_to_keep=1)
    parts = multiply_accumulates(config, 15, distinct=3, text_tokens=60)
    assert 2 * sum(parts.values()) == counter.get_total_flops()


@pytest.mark.parametrize("preset", ["2B", "7B"])
def test_the_papers_eight_figures_come_out(preset):
    config = CrossLMMConfig.from_preset(preset)
    counted = [paper_macs(config, frames) / 1e12 for frames in FRAMES]
    assert counted == pytest.approx(PAPER[f"CrossLMM-{preset}"]["macs"], rel=0.015)


@pytest.mark.parametrize("form", ["kv", "features"])
def test_a_frame_adds_to_a_real_cache_the_bytes_that_are_counted(form):
    config = tiny_config(text_config={"cross_attention_cache": form})
    model = random_model(config).to(torch.bfloat16)

    def kept_bytes(frames: int) -> int:
        ids = torch.tensor([[config.video_token_id] * 9 * frames + [5] * 3])
        pixels = torch.randn(frames, 3, 33, 33)
        with torch.no_grad():
            cache = model(input_ids=ids, pixel_values_videos=pixels, use_cache=True).past_key_values
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        for layer in cache.layers:
            if isinstance(layer, VisualCacheLayer):
                tensors += [layer.cross_keys, layer.cross_values, layer.memory.states]
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor is not None}
        return sum(tensor.numel() * tensor.element_size() for tensor in storages.values())

    costs = count_costs(tiny_config())
    per_frame = costs.cache_bytes_per_frame[form] + costs.language_bytes_per_frame
    assert costs.dtype == "bfloat16"
    assert kept_bytes(7) - kept_bytes(2) == 5 * per_frame


def test_what_a_frame_keeps_at_full_size():
    """7 layers x 729 patches x K and V x 512 x 2 bytes, or 729 patches x 1152 x 2 bytes; and 28 layers x 9 tokens x K
    and V x 512 x 2 bytes of the language model's own."""
    own = 28 * 9 * 2 * 512 * 2
    names = {"kv": "CrossLMM-7B video kv", "features": "CrossLMM-7B frame features"}
    kept = {form: counted(name)["cache_bytes"] / 2 for form, name in names.items()}
    assert kept == {"kv": 7 * 729 * 2 * 512 * 2 + own, "features": 729 * 1152 * 2 + own}


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in OURS])
def test_what_is_counted_of_a_peer_grows_with_its_frames(name):
    few, many = (count(BY_NAME[name], frames, size="toy") for frames in (2, 6))
    assert many["macs"]["vision"] == 3 * few["macs"]["vision"] > 0
    assert many["macs"]["language model"] > 2 * few["macs"]["language model"] > 0


def test_peers_see_the_tokens_that_their_processors_would_give_them():
    peers = [peer for name, peer in BY_NAME.items() if name not in OURS]
    tokens = {peer.name: len(peer.prompt(peer.config("full"), 32)) for peer in peers}
    assert tokens == {
        "LLaVA-OneVision-0.5B": 32 * 196 + 1,
        "LLaVA-OneVision-7B": 32 * 196 + 1,
        "Qwen2.5-VL-7B": 16 * 196,
        "Qwen3-VL-8B": 16 * (144 + 8),
    }


# --- timed ----------------------------------------------------------------------------------------------------------


def test_time_is_charged_to_the_innermost_part():
    class Ticks:
        """Each look at the clock is a second later."""

        def __init__(self) -> None:
            self.ticks = count_from(0)

        def now(self) -> int:
            return next(self.ticks)

        def between(self, start: int, end: int) -> int:
            return end - start

    inner, outer = torch.nn.Linear(2, 3), torch.nn.Sequential()
    outer.add_module("inner", inner)
    model = torch.nn.Sequential()
    model.add_module("outer", outer)
    with PartTimer(model, {"all": "outer", "some": r"outer\.inner"}, Ticks()) as timer:
        model(torch.ones(2))
        model(torch.ones(2))
    # enter | outer begins | inner begins | inner ends | outer ends | …
    assert timer.seconds() == {"all": 4, "some": 2, "rest": 3}


def test_a_second_gpu_is_asked_for_its_own_time_and_memory(monkeypatch):
    """The current GPU is another."""
    asked = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: torch.device) -> None:
            asked.append(stream)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 1500.0

    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: asked.append(device) or len(asked))
    assert Clock(second).seconds(lambda: None) == 1.5
    runner = Runner.__new__(Runner)
    runner.model, runner.answer = SimpleNamespace(device=second), lambda new_tokens: None
    assert runner.peak_bytes() == 1
    assert asked == [second] * 5


class ThisProcess:
    """Stands for an executor whose processes would each import everything again."""

    def __init__(self, *_, **__) -> None:
        pass

    def __enter__(self) -> "ThisProcess":
        return self

    def __exit__(self, *_) -> None:
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_a_run_at_toy_size_has_everything_that_one_on_a_gpu_has(monkeypatch):
    monkeypatch.setattr(cost, "ProcessPoolExecutor", ThisProcess)
    started = []
    monkeypatch.setattr(cost, "time_cold_start", lambda contender, *_, **__: started.append(contender.name))
    names = ["CrossLMM-7B video features", "Qwen3-VL-8B"]
    results = run(names, [2, 4], size="toy", device="cpu", repeats=1)
    ours, peer = names
    assert [(row["model"], row["frames"]) for row in results["timed"]] == [(ours, 2), (peer, 2), (ours, 4), (peer, 4)]
    for row in results["timed"]:
        assert min(row["seconds"][what] for what in ("prefill", "first_token", "second_question", "decode_step")) > 0
        assert row["seconds"]["part: vision"] > 0
        assert row["seconds"]["part: language model"] > 0
        assert 0 < row["share_of_matrix_rate"] < 2
    assert results["timed"][0]["seconds"]["part: V2V"] > 0
    assert results["timed"][0]["seconds"]["part: T2V"] > 0
    assert [row["model"] for row in results["memory"]] == names
    assert all(list(row["peak_bytes"]) == [2, 4] for row in results["memory"])
    assert [row["frames"] for row in results["file"]] == [2, 4]
    assert [row["frames"] for row in results["long_video"]] == [16]
    assert results["training_step"]["seconds"] > 0
    assert started == [ours]
    heading, *rows = table(results)
    assert [row[0] for row in rows] == [ours, ours, peer, peer]
    assert {len(row) for row in rows} == {len(heading)}


def test_what_does_not_fit_is_said_and_the_rest_is_kept(monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def times(runner):
        if runner.contender.name != fits and len(runner.inputs["input_ids"][0]) > 100:
            out_of_memory()
        return {"prefill": 0.5, "second_question": 0.25, "decode_step": 0.125}

    fits, too_large = names = ["CrossLMM-7B video features", "LLaVA-OneVision-7B"]
    monkeypatch.setattr(Runner, "times", times)
    monkeypatch.setattr(cost, "ProcessPoolExecutor", ThisProcess)
    for measure in ("_peaks", "time_long_video", "time_training_step", "time_cold_start"):
        monkeypatch.setattr(cost, measure, out_of_memory)
    results = run(names, [1], size="toy", device="cpu", repeats=2)
    mine, its = results["timed"]
    assert mine["seconds"]["prefill"] == 0.5
    assert its["model"] == too_large
    rows = [its, *results["memory"], *results["long_video"], results["training_step"], results["cold_start"]]
    assert len(rows) == 6
    assert all("Tried to allocate" in row["out_of_memory"] for row in rows)
    assert [row[-1] for row in table(results)[1:]] == ["0.125", ""]


@pytest.mark.slow
def test_a_checkpoint_in_shards_answers_from_a_cold_start(tmp_path):
    contender = BY_NAME["CrossLMM-7B video features"]
    row = cost.time_cold_start(contender, tmp_path, size="toy", device=torch.device("cpu"))
    assert row["shards"] > 1
    assert min(row["AutoModel"]["import"], row["AutoModel"]["load"]) > 0
    assert min(row["pipeline"]["load"], row["pipeline"]["first_answer"]) > 0


def test_a_model_that_is_not_compared_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"no model 'GPT' to compare; there are CrossLMM-2B; .*Qwen3-VL-8B"):
        choose(["GPT"])


MISTAKES = {
    "frames": (["--frames", "32;64"], "positive numbers"),
    "no frames": (["--frames", "0"], "positive numbers"),
    "folder": (["--output", "nowhere/cost.json"], "a folder that exists"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_the_command_refuses_mistakes_before_it_begins(monkeypatch, arguments, words):
    monkeypatch.setattr(cost, "run", lambda *_, **__: pytest.fail("it began"))
    result = CliRunner().invoke(crosslmm_cli.app, ["bench", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_the_command_prints_a_table_and_writes_all_of_it(tmp_path):
    path = tmp_path / "cost.json"
    result = CliRunner().invoke(
        crosslmm_cli.app,
        [
            "bench",
            "--models",
            "CrossLMM-2B frame features",
            "--frames",
            "2,3",
            "--device",
            "cpu",
            "--output",
            str(path),
        ],
    )
    assert result.exit_code == 0, result.output
    kept = json.loads(path.read_text())
    assert [row["frames"] for row in kept["counted"]] == [2, 3]
    assert {"command", "commit", "device", "threads", "versions"} == set(kept["about"])
    for row in kept["counted"]:
        assert f"{row['macs']['total'] / 1e12:,.2f}" in result.stdout
