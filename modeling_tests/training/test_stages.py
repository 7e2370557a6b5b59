"""Stages: which parameters learn and at which rate, recipes, and which checkpoints are resumed from."""

import json
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import crosslmm_cli
from factories import random_model, save_checkpoint, save_training_data, tiny_config
from transformers_crosslmm import (
    CrossLMMConfig,
    CrossLMMForConditionalGeneration,
    CrossLMMProcessor,
    crosslmm_lora_config,
)
from transformers_crosslmm.dialect_crosslmm import CHECKPOINTING
from transformers_crosslmm.tiny.procedural_videos import write_videos
from transformers_crosslmm.training.samples import CrossLMMDataCollator
from transformers_crosslmm.training.trainer import (
    COMPLETE,
    PARTS,
    RECIPES,
    CrossLMMTrainer,
    CrossLMMTrainingArguments,
    count_parts,
    last_complete_checkpoint,
    mark_complete,
    parameter_groups,
    parse_recipe,
    refuse_random_branches,
    train,
    train_only,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """`model`, `media` and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "model", untrained=True)
    save_training_data(folder)
    return folder


def arguments_of(run_folder, out, **options):
    recipe = {
        "model": f"{run_folder}/model",
        "train_data": f"{run_folder}/data.jsonl",
        "media_root": f"{run_folder}/media",
        "output_dir": str(out),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_total_limit": 3,
    }
    path = run_folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | options))
    return parse_recipe([str(path)])


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- what learns ----------------------------------------------------------------------------------------------------


def test_stage_1_of_the_2b_trains_41_million_parameters():
    """By hand: 1152·1536 + 1536·1536 + biases, and 7 times V2V's q, k, v and o, a norm and a gate."""
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration(CrossLMMConfig())
    train_only(model, ["projector", "v2v"])
    projector = 1152 * 1536 + 1536 + 1536 * 1536 + 1536
    v2v = 7 * (2 * 1536 * 1536 + 2 * 1152 * 256 + 1536 + 1)
    counts = count_parts(model)
    assert counts["projector"] == (projector, projector)
    assert counts["v2v"] == (v2v, v2v)
    assert {part for part, (learning, _) in counts.items() if learning} == {"projector", "v2v"}
    assert round((projector + v2v) / 1e6, 1) == 41.3


@pytest.mark.parametrize("parts", [["projector", "v2v"], ["projector", "v2v", "t2v"], list(PARTS)])
def test_the_optimiser_gets_all_that_learns_once_and_nothing_frozen(parts):
    model = random_model(tiny_config())
    train_only(model, parts)
    groups = parameter_groups(
        model, learning_rate=1.0, gate_learning_rate=2.0, vision_learning_rate=3.0, weight_decay=4
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(rates)
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in rates.items():
        assert rate == (2.0 if "gate.weight" in name else 3.0 if "vision_tower" in name else 1.0), name
        if "gate.weight" in name:
            assert decay == 0, name


def test_the_language_model_may_have_a_rate_of_its_own():
    model = random_model(tiny_config())
    groups = parameter_groups(model, learning_rate=1.0, gate_learning_rate=2.0, language_model_learning_rate=3.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        is_language = ("language_model." in name or "lm_head" in name) and "cross_attention." not in name
        assert rate == (2.0 if name.endswith("gate.weight") else 3.0 if is_language else 1.0), name


@pytest.mark.parametrize(("parts", "reason"), [([], "got nothing"), (["head"], "got head"), (["t2v"], "no t2v")])
def test_a_stage_that_trains_nothing_is_refused(parts, reason):
    with pytest.raises(ValueError, match=reason):
        train_only(random_model(tiny_config(text_config={"use_t2v": False})), parts)


def test_a_frozen_branch_of_random_weights_must_be_closed():
    """Stage 1 of a model that begins with open gates."""
    open_gates = CrossLMMForConditionalGeneration(tiny_config(text_config={"gate_init": 0.7}))
    train_only(open_gates, ["projector", "v2v"])
    with pytest.raises(ValueError, match=r"T2V is frozen .* `gate_init` 0\.7\. Start with gates of 0"):
        refuse_random_branches(open_gates)
    train_only(open_gates, ["projector", "v2v", "t2v"])
    refuse_random_branches(open_gates)

    trained = random_model(tiny_config(text_config={"gate_init": 0.7}))  # its gates have moved
    closed = CrossLMMForConditionalGeneration(tiny_config())
    without = CrossLMMForConditionalGeneration(tiny_config(text_config={"gate_init": 0.7, "use_t2v": False}))
    for model in (trained, closed, without):
        train_only(model, ["projector", "v2v"])
        refuse_random_branches(model)


def test_recipes_hold_the_papers_numbers():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")}
    first, second = recipes["stage1_pretrain"], recipes["stage2_instruct"]
    assert (first["trained_parts"], float(first["learning_rate"])) == (["projector", "v2v"], 1e-3)
    assert (first["global_batch_size"], first["num_frames"], first["num_train_epochs"]) == (512, 32, 1)
    assert sorted(second["trained_parts"]) == sorted(PARTS)
    assert (float(second["learning_rate"]), float(second["vision_learning_rate"])) == (1e-5, 2e-6)
    assert (second["global_batch_size"], second["max_frames"], second["num_train_epochs"]) == (128, 512, 1)
    assert sorted(recipes["adapt"]["trained_parts"]) == ["projector", "t2v", "v2v"]


def test_after_200_steps_a_composed_model_needs_the_t2v_that_was_closed(tmp_path, monkeypatch):
    """At the rate that all recipes give the gates."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = runpy.run_path(str(BENCHMARKS / "gate_learning_rate.py"))
    rates = {float(yaml.safe_load(path.read_text())["gate_learning_rate"]) for path in RECIPES.glob("*.yaml")}
    assert rates == {CrossLMMTrainingArguments.gate_learning_rate}
    checkpoint = benchmark["write_composition"](tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    gates = [value for name, value in weights.items() if name.endswith("gate.weight")]
    assert gates
    assert not any(gates)
    result = benchmark["train"](checkpoint, learning_rate=1e-3, gate_learning_rate=rates.pop(), seed=0)
    assert result["loss_without_t2v"] > result["loss"] + 0.5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("stage", ["adapt", "stage2_instruct"])
def test_the_counted_cost_of_a_training_step_is_what_pytorch_counts(stage, checkpointing, monkeypatch):
    """`benchmarks/adapt_cost.py`, whose closed form leaves out the gradients of the first layers' inputs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = runpy.run_path(str(BENCHMARKS / "adapt_cost.py"))
    text_config = {"hidden_size": 192, "intermediate_size": 448}
    config = tiny_config(text_config=text_config, vision_config={"hidden_size": 64, "intermediate_size": 144})
    frames, text_tokens, parts = 7, 11, benchmark["parts_of"](stage)
    model = random_model(config, attn_implementation="eager").train()
    train_only(model, parts)
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")()
    ids = torch.tensor([[config.video_token_id] * frames * config.tokens_per_frame + [3] * text_tokens])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, pixel_values_videos=torch.rand(frames, 3, 33, 33)).loss.backward()
    shape = {"frames": frames, "text_tokens": text_tokens}
    expected = benchmark["training_macs"](config, parts, **shape, checkpointing=checkpointing)
    if checkpointing:  # a layer is run again up to its last product, a chunk of frames up to its last block
        expected -= config.text_config.num_hidden_layers * ids.shape[1] * 192 * 448
        if "vision_tower" in parts:
            patches, blocks, product = frames * config.patch_grid_size**2, config.num_vision_blocks, 64 * 144
            expected -= patches * (blocks * product + 4 * 64 * 64 + 2 * product)
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=0.01)


# --- recipes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown": ("lerning_rate: 1e-4", 2, "no option --lerning_rate; did you mean --learning_rate?"),
    "unlike any": ("xyz: 1", 2, "no option --xyz; `python -m transformers_crosslmm.training.trainer --help` lists"),
    "cut short": ("gate_learning: 1", 2, "no option --gate_learning; did you mean --gate_learning_rate?"),
    "type": ("learning_rate: fast", 2, "--learning_rate/--learning-rate: invalid float value: 'fast'"),
    "choice": ("unusable: drop", 2, "invalid choice: 'drop'"),
    "nothing to train": ("max_steps: 3", 2, "give --model and --train_data, in the recipe or after it"),
    "not YAML": ("fps: 1\ntrained_parts: [v2v", 1, "recipe.yaml:2: not YAML: expected ',' or ']'"),
    "no options": ("- fps", 1, "must hold options and their values; got list"),
}


@pytest.mark.parametrize(("recipe", "exit_code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_recipe_is_one_readable_line(recipe, exit_code, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = CliRunner().invoke(crosslmm_cli.app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == exit_code
    assert message in result.stderr.splitlines()[-1]
    assert len(result.stderr.splitlines()) <= 2  # argparse's usage is the other


def test_a_recipe_that_does_not_exist_is_told_from_those_that_do():
    result = CliRunner().invoke(crosslmm_cli.app, ["train", "stage3"])
    assert result.exit_code == 1
    assert "There is no recipe 'stage3'" in result.stderr
    assert "adapt, stage1_pretrain, stage2_instruct" in result.stderr


@pytest.mark.parametrize(
    ("recipe", "behind", "fps", "num_frames"),
    [
        ("stage1_pretrain", ["--fps", "2"], 2.0, None),
        ("stage2_instruct", ["--num-frames=5"], None, 5),
        ("stage2_instruct", ["--fps", "0.5"], 0.5, None),
    ],
)
def test_frames_named_behind_a_recipe_win_over_those_in_it(recipe, behind, fps, num_frames):
    needed = ["--model", "m", "--train_data", "d.json", "--bf16", "False", "--use_cpu", "--report_to", "none"]
    arguments = parse_recipe([recipe, *needed, *behind])
    assert (arguments.fps, arguments.num_frames) == (fps, num_frames)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_shipped_recipe_runs_as_it_is_on_a_cpu(recipe, run_folder, tmp_path, monkeypatch):
    """The test itself must see no GPU, wherever it runs."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    needed = {"model": run_folder / "model", "train_data": run_folder / "data.jsonl", "output_dir": tmp_path}
    needed |= {"media_root": run_folder / "media", "global_batch_size": 8, "dataloader_num_workers": 0}
    words = [word for name, value in needed.items() for word in (f"--{name}", str(value))]
    arguments = parse_recipe([recipe, *words, "--report_to", "none", "--num_train_epochs", "1"])
    assert arguments.use_cpu
    assert not arguments.bf16
    assert losses(train(arguments)) == []  # one step, and ten are logged
    assert (tmp_path / "model.safetensors").is_file()
    words += ["--report_to", "none"]
    assert parse_recipe([recipe, *words, "--bf16", "True"]).bf16, "who asks for it has it"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert parse_recipe([recipe, *words]).bf16, "with AMX it is faster"


def test_a_run_of_a_few_steps_says_what_to_change(run_folder, tmp_path, caplog):
    options = {"max_steps": -1, "num_train_epochs": 2, "global_batch_size": 4, "save_strategy": "no"}
    train(arguments_of(run_folder, tmp_path, **options))
    assert "8 records, 2 epochs, 4 samples a step: the run makes 4 steps" in caplog.text
    assert "Lower `global_batch_size`, or raise `num_train_epochs`" in caplog.text


def test_procedural_videos_are_trained_on_as_they_are_written(run_folder, tmp_path):
    write_videos(tmp_path / "videos", num_videos=2, seed=0, split="train", size=32, fps=2)
    data = {"train_data": str(tmp_path / "videos" / "questions.jsonl"), "media_root": str(tmp_path / "videos")}
    trainer = train(arguments_of(run_folder, tmp_path / "out", max_steps=1, save_strategy="no", **data))
    sample = trainer.train_dataset[0]
    assert sample["video_num_frames"].tolist() == [8]
    written = json.loads((tmp_path / "videos" / "questions.jsonl").read_text().splitlines()[0])
    learned = trainer.processing_class.tokenizer.decode(sample["labels"][sample["labels"] != -100])
    assert learned == written["answer"] + "<|im_end|>"


def test_the_help_of_the_command_names_every_option_that_is_ours():
    own = {field.name for field in fields(CrossLMMTrainingArguments)}
    own -= {field.name for field in fields(TrainingArguments)}
    said = CliRunner().invoke(crosslmm_cli.app, ["train", "--help"]).output
    assert len(own) > 10
    assert not [name for name in own if f"--{name}" not in said]


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_changes_what_learns_only_and_saves_a_model_for_use(run_folder, tmp_path):
    parts = ["projector", "v2v", "t2v"]
    frames = {"fps": 2, "max_frames": 3, "add_timestamps": True}
    arguments = arguments_of(run_folder, tmp_path, trained_parts=parts, weight_decay=0.5, **frames)
    trainer = train(arguments)
    assert "<0.0 seconds>" in trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    before = CrossLMMForConditionalGeneration.from_pretrained(run_folder / "model").state_dict()
    model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("cross_attention" in name or "projector" in name for name in changed)
    assert {name for name in changed if name.endswith("gate.weight")}
    assert not model.config.untrained
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.get("use_cache", True)
    assert saved["text_config"]["use_cache"]
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert (saved["video_processor"]["max_frames"], saved["add_timestamps"]) == (3, True)


def test_a_stopped_run_goes_on_with_the_same_losses_and_passes_over_what_was_cut_off(run_folder, tmp_path):
    whole = losses(train(arguments_of(run_folder, tmp_path)))
    assert len(whole) == 4
    newest = tmp_path / "checkpoint-4"
    (newest / COMPLETE).unlink()  # as after a kill while it was saved
    (newest / "optimizer.pt").write_bytes(b"")
    again = train(arguments_of(run_folder, tmp_path))
    assert losses(again) == whole
    assert last_complete_checkpoint(tmp_path) == str(newest)


def test_a_stopped_run_does_not_go_on_with_other_rates_or_with_the_moments_of_other_parameters(run_folder, tmp_path):
    """As V2V has T2V's shapes, an optimiser would take the one's moments for the other's."""
    options = {"trained_parts": ["projector", "v2v"], "learning_rate": 1e-3}
    train(arguments_of(run_folder, tmp_path, **options))
    for change in ({"trained_parts": ["projector", "t2v"]}, {"learning_rate": 1e-4}):
        with pytest.raises(ValueError, match=r"same rates as in .*checkpoint-4[^$]*as `model`"):
            train(arguments_of(run_folder, tmp_path, **(options | change)))
    begun_anew = {"model": str(tmp_path / "checkpoint-4"), "trained_parts": ["projector", "t2v"]}
    assert len(losses(train(arguments_of(run_folder, tmp_path / "new", **begun_anew)))) == 4


def test_only_checkpoints_with_all_that_was_saved_are_complete(tmp_path):
    for step in (5, 20, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(step))
        (folder / "optimizer.pt").write_bytes(bytes(step))
        mark_complete(folder)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-100" / "model.safetensors").write_bytes(bytes(99))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(bytes([*bytes(13), 4, *bytes(6)]))  # one bit flipped
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(bytes(20))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20" / COMPLETE).unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "model.safetensors").unlink()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_run_writes_its_losses_for_tensorboard_and_shows_how_far_it_is(run_folder, tmp_path, capsys):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="the extra `train`")
    options = {"max_steps": 2, "save_strategy": "no", "report_to": "tensorboard", "disable_tqdm": False}
    whole = losses(train(arguments_of(run_folder, tmp_path, **options)))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = reading.EventAccumulator(str(events.parent)).Reload().Scalars("train/loss")
    assert [event.step for event in written] == [1, 2]
    assert [event.value for event in written] == pytest.approx(whole)
    assert "2/2" in capsys.readouterr().err


def test_broken_data_ends_a_run_before_it_begins(run_folder, tmp_path):
    (tmp_path / "data.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="broken records"):
        train(arguments_of(run_folder, tmp_path / "out", train_data=str(tmp_path / "data.jsonl")))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("kind", [CrossLMMTrainer, Trainer])
@pytest.mark.parametrize("with_adapters", [False, True], ids=["whole", "lora"])
def test_label_smoothing_is_pytorchs_on_the_labels_of_the_next_token(kind, with_adapters, run_folder, tmp_path):
    processor = CrossLMMProcessor.from_pretrained(run_folder / "model")
    records = [json.loads(line) for line in (run_folder / "data.jsonl").read_text().splitlines()]
    collator = CrossLMMDataCollator(processor, media_root=run_folder / "media")
    batch = collator(records)
    found = {}
    for factor in (0.0, 1e-7, 0.3):
        model = CrossLMMForConditionalGeneration.from_pretrained(run_folder / "model").eval()
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=factor).item()
        if with_adapters:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, crosslmm_lora_config(r=2))
        arguments = arguments_of(run_folder, tmp_path, label_smoothing_factor=factor, max_steps=1, save_strategy="no")
        arguments.per_device_train_batch_size = len(records)
        trainer = kind(model=model, args=arguments, train_dataset=records, data_collator=collator)
        trainer.train()
        found[factor] = losses(trainer)[0]
        assert found[factor] == pytest.approx(expected, rel=1e-5)
    assert abs(found[0.3] - found[0.0]) > 0.01
