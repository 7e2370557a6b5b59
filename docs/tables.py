"""The tables of docs/ and of the tiny checkpoint's card, made of the results that benchmarks/ keeps.

python docs/tables.py      # writes them anew where they differ; a test compares

It also writes the counts of the paper's sizes, which `crosslmm info` reads.
"""

import json
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "docs" / name
    for name in (
        "benchmarks.md",
        "getting-started.md",
        "convert-and-publish.md",
        "cost.md",
        "gpu.md",
        "ablation.md",
        "laptop.md",
        "memory-and-speed.md",
        "video-decoding.md",
        "serving.md",
        "vllm.md",
    )
] + [ROOT / "README.md", ROOT / "src" / "transformers_crosslmm" / "tiny" / "crosslmm-tiny" / "README.md"]
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

KINDS = {
    "colour": "colour of a thing in frame k",
    "shape": "shape or digit in frame k",
    "place": "place in frame k",
    "which_frame": "in which frame",
    "exists": "does it appear at all",
    "order": "which of two comes first",
    "count": "how many frames show it",
    "fine_detail": "**the first five together**",
    "order_and_count": "**order and count together**",
}


def kept(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def paper_cost() -> str:
    script = runpy.run_path(str(ROOT / "benchmarks" / "paper_cost.py"))
    rows = []
    for column, frames in enumerate(script["FRAMES"]):
        row = [str(frames)]
        for size in ("2B", "7B"):
            counted, paper = script["prefill_macs"](size, frames) / 1e12, script["PAPER"][size][column]
            row += [f"{counted:.2f}", f"{paper:.2f}", f"{counted / paper - 1:+.1%}"]
        rows.append(row)
    return markdown(
        ["frames", "2B, counted", "2B, the paper's", "difference", "7B, counted", "7B, the paper's", "difference"],
        rows,
    )


def versions() -> str:
    rows = []
    for row in kept("versions.json"):
        counts = f"{row['passed']:,} passed, {row['failed']} failed, {row['skipped']} skipped"
        what = "every test" if row["tests"] == "all" else "the fast subset"
        demo = "answers" if row["demo"] else "fails"
        rows.append([row["transformers"], row["torch"], demo, what, counts, row["commit"]])
    table = markdown(["Transformers", "torch", "`make demo`", "tests", "result", "commit"], rows)
    return (
        f"{table}\n`make test-versions`, for another torch with `TORCH=2.15.0`; a 2-core CPU shared with other work.\n"
    )


def counted_costs() -> str:
    from transformers_crosslmm import CrossLMMConfig
    from transformers_crosslmm.checkpoints.inspect import count_costs

    rows = []
    for preset in ("2B", "7B", "7B-16"):
        costs = count_costs(CrossLMMConfig.from_preset(preset))
        rows.append(
            [
                preset,
                f"{sum(costs.parts.values()) / 1e6:,.1f} M",
                f"{costs.weight_bytes / 1e9:.1f} GB",
                str(costs.tokens_per_frame),
                f"{costs.language_bytes_per_frame / 1e6:.2f} MB",
                f"{costs.cache_bytes_per_frame['features'] / 1e6:.2f} MB",
                f"{costs.cache_bytes_per_frame['kv'] / 1e6:.2f} MB",
            ]
        )
    head = ["", "parameters", "weights, bf16", "tokens per frame", "LLM's own cache", '"features"', '"kv"']
    return markdown(head, rows)


def gpu_sizes() -> str:
    from transformers_crosslmm import CrossLMMConfig
    from transformers_crosslmm.checkpoints.inspect import count_costs

    rows = []
    for preset, quantization in (("2B", None), ("7B", "nf4"), ("7B", "int8"), ("7B", None), ("7B-16", None)):
        costs = count_costs(CrossLMMConfig.from_preset(preset), quantization=quantization)
        context = costs.frames_in_context(costs.max_positions)
        cells = []
        for gibibytes in (16, 24, 48, 80):
            minutes = [
                min(context, costs.frames_in_memory(form, gibibytes * 2**30)) // 60 for form in ("kv", "features")
            ]
            cells.append("–" if not any(minutes) else f"{minutes[0]} / {minutes[1]} min")
        rows.append([preset, quantization or "bfloat16", f"{costs.weight_bytes / 1e9:.1f} GB", *cells])
    head = ["model", "weights in", "weights", *(f"{gibibytes} GiB: kv / features" for gibibytes in (16, 24, 48, 80))]
    return markdown(head, rows)


def backbones() -> str:
    results = kept("backbones.json")
    rows = [
        [
            name,
            f"{figures['parameters'] / 1e9:.2f} G",
            f"{figures['new_parameters'] / 1e6:.0f} M",
            f"{figures['weight_bytes'] / 1e9:.1f} GB",
            f"{figures['context']:,}",
            f"{figures['frames_in_context']:,}",
            *(f"{figures[f'{kind}_bytes_per_frame'] / 1e6:.2f} MB" for kind in ("language", "features", "kv")),
            f"{figures['macs_per_frame'] / 1e9:.0f} G",
        ]
        for name, figures in results["backbones"].items()
    ]
    head = [
        "",
        "parameters",
        "new parameters",
        "weights, bf16",
        "context",
        "frames in the context",
        "LLM",
        '"features"',
        '"kv"',
        "cost",
    ]
    return (
        markdown(head, rows)
        + f'\nFrom "LLM" on, the figures are per frame. `{results["command"]}`, commit {results["commit"]}.\n'
    )


def paper_measured() -> str:
    from transformers_crosslmm.checkpoints.model_card import PAPER_COSTS

    rows = [
        [str(small[0]), *(f"{value:,}" for value in (*small[1:], *large[1:]))]
        for small, large in zip(PAPER_COSTS["2B"], PAPER_COSTS["7B"], strict=True)
    ]
    return markdown(["frames", "2B, memory MB", "2B, prefill ms", "7B, memory MB", "7B, prefill ms"], rows)


def paper_scores() -> str:
    from transformers_crosslmm.checkpoints.model_card import BENCHMARKS, PAPER_SCORES

    rows = [[size, str(tokens), *map(str, scores)] for (size, tokens), scores in PAPER_SCORES.items()]
    return markdown(["", "tokens per frame", *BENCHMARKS], rows)


def between(score: dict[str, Any]) -> str:
    low, high = score["interval_95"]
    return f"{share(low)} – {share(high)}"


def tiny_checkpoint() -> str:
    from transformers_crosslmm import TINY_CHECKPOINT
    from transformers_crosslmm.checkpoints.inspect import count_costs, load_config

    results, baseline = kept("tiny_checkpoint.json"), kept("tiny_average_pooling_baseline.json")
    costs = count_costs(load_config(TINY_CHECKPOINT))
    rows = []
    for kind, words in KINDS.items():
        ours, without = (results["scores"][name][kind] for name in ("as_trained", "gates_0"))
        chance = share(ours["chance"]) if "chance" in ours else ""
        rows.append(
            [
                words,
                str(ours["asked"]),
                share(ours["accuracy"]),
                between(ours),
                chance,
                share(without["accuracy"]),
                share(baseline["scores"]["as_trained"][kind]["accuracy"]),
            ]
        )
    head = ["question", "asked", "right", "95 % interval", "chance", "gates shut", "average pooling"]
    table = markdown(head, rows)
    size = f"{sum(costs.parts.values()) / 1e6:.1f} million parameters, tokens per frame: {costs.tokens_per_frame}"
    return (
        f"{table}\n{size}; {results['num_frames']} frames. `{results['command']}`, commit {results['commit']}, "
        f"{results['machine']}.\n"
    )


def tiny_checkpoint_times() -> str:
    results = kept("tiny_checkpoint_times.json")
    words = {
        "frame_time": "at which second is frame k shown",
        "when": "at which second does it appear",
        "when_within_a_frame": "the same, or the time of the next frame or the one before",
    }
    rows = []
    for kind, question in words.items():
        right, shut, moved = (results["scores"][name][kind] for name in ("as_trained", "gates_0", "timestamps_moved"))
        others = share(shut["accuracy"]), share(moved["accuracy"])
        rows.append([question, str(right["asked"]), share(right["accuracy"]), between(right), *others])
    head = ["question", "asked", "right", "95 % interval", "gates shut", "timestamps moved"]
    return f"{markdown(head, rows)}\n`{results['command']}`, commit {results['commit']}, {results['machine']}.\n"


def where_it_looked() -> str:
    results = kept("where_it_looked.json")
    rows = []
    for kind, numbers in results["results"].items():
        most, right = numbers["most_weight"], numbers["most_weight_if_right"]
        rows.append(
            [
                "**all**" if kind == "all" else KINDS[kind],
                str(most["asked"]),
                f"{share(most['share'])} ({between(most)})",
                share(right["share"]),
                share(numbers["mean_weight"]),
            ]
        )
    head = [
        "question",
        "asked",
        "its frame has the most weight",
        "the same, if the answer is right",
        "mean weight of its frame",
    ]
    return (
        f"{markdown(head, rows)}\nChance is {share(results['chance'])}. `python benchmarks/where_it_looked.py`, "
        f"commit {results['commit']}, {results['machine']}; weights {results['weights_sha256']}.\n"
    )


def laptop() -> str:
    results = kept("laptop.json")
    runs = results["runs"].values()
    return (
        f"{laptop_answers(results)}\n{sum(run['steps'] for run in runs)} steps of 8 chats in "
        f"{sum(run['seconds'] for run in runs) / 60:.0f} minutes, one thread of an {results['machine']} CPU with AMX "
        f"that had other work. Commit {results['commit']}, torch {results['versions']['torch']}.\n"
    )


def laptop_halves() -> str:
    return laptop_answers(kept("laptop_halves.json"), one_of_two=True)


def laptop_answers(results: dict[str, Any], *, one_of_two: bool = False) -> str:
    """one_of_two: whether who sees everything and picks a thing blindly is right half of the time."""
    rows = []
    for kind, trained in results["as_trained"].items():
        row = [KINDS[kind].replace("frame", "second"), str(trained["asked"])]
        row += [f"**{share(trained['accuracy'])}** ({between(trained)})"]
        row += [share(results["gates_0"][kind]["accuracy"]), share(trained["chance"])]
        rows.append([*row, "50 %"] if one_of_two else row)
    head = ["question", "asked", "right", "gates shut", "chance"]
    return markdown([*head, "one of the two, blindly"] if one_of_two else head, rows)


def laptop_branches() -> str:
    results = kept("laptop_branches.json")
    seeds = sorted({run["seed"] for run in results["runs"]})
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in results["runs"]):
        runs = [run["losses"] for run in results["runs"] if run["arm"] == arm]
        row = [arm]
        for first, last in ((1, 30), (31, 60), (61, 90), (91, 120)):
            losses = [[loss for step, loss in run if first <= step <= last] for run in runs]
            means = [sum(values) / len(values) for values in losses]
            row.append(" / ".join(f"{mean:.2f}" for mean in means))
        rows.append(row)
    head = ["what learns beside the projector", *(f"steps {span}" for span in ("1-30", "31-60", "61-90", "91-120"))]
    seeds_said = f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{markdown(head, rows)}\n{seeds_said}, `{results['command']}`, commit {results['commit']}.\n"


def video_decoding() -> str:
    results = kept("video_decoding.json")
    measured: dict[tuple[str, str, int], dict[str, Any]] = {}
    for result in results["results"]:
        case = measured.setdefault((result["codec"], result["length"], result["num_frames"]), {})
        case[result["reader"]] = result
    readers = list(dict.fromkeys(result["reader"] for result in results["results"] if result["reader"] != "ours"))

    def ratio(case: dict[str, Any], reader: str) -> str:
        if reader not in case:
            return "–"
        if "cpu_seconds" not in case[reader]:
            return "failed"
        time, memory = (case[reader][key] / case["ours"][key] for key in ("cpu_seconds", "extra_memory_mb"))
        return f"{time:.1f} / {memory:.1f}"

    rows = [
        [f"{codec}, {length}, {num_frames} frames", *(ratio(case, reader) for reader in readers)]
        for (codec, length, num_frames), case in measured.items()
        if "cpu_seconds" in case.get("ours", {})
    ]
    about = results["about"]
    head = ["CPU time / memory, ours = 1", *(reader.replace("_", ", ", 1) for reader in readers)]
    return (
        f"{markdown(head, rows)}\n`python benchmarks/video_decoding.py run FOLDER --rounds 3`, commit "
        f"{about['commit'][:7]}, {about['cpu']}, one core; PyAV {about['versions']['av']}; "
        f"{about['pictures']}.\n"
    )


def video_fuzz() -> str:
    results = kept("video_fuzz.json")
    mutants = results["mutants"]
    words = {"right": "decoded, no frame marked as damaged", "marked": "decoded, some frames marked as damaged"}
    rows = [
        [words.get(outcome, f"refused with `{outcome}`"), f"{number:,}", share(number / mutants)]
        for outcome, number in results["outcomes"].items()
    ]
    return (
        f"{markdown(['damaged file', 'files', 'share'], rows)}\n{mutants:,} damaged files of {len(results['files'])} "
        f"kinds; slowest {results['slowest_seconds']:.2f} s, most memory {results['peak_memory_mb']:.0f} MB; "
        f"processes that died: {results['processes_that_died']}. `{results['command']}`, commit "
        f"{results['commit'][:7]}, {results['machine']}; PyAV {results['pyav']}, FFmpeg {results['ffmpeg']}.\n"
    )


def video_conformance() -> str:
    about = kept("video_conformance.json")["about"]
    words = {
        "agrees": "the same frames, times and pixels",
        "differs": "a difference; the kept results name the reason",
        "only ffmpeg": "only ffmpeg shows pictures (of encrypted files, noise)",
        "only here": "only this decoder shows pictures",
        "neither": "neither finds a video",
    }
    rows = [[words[outcome], f"{number:,}"] for outcome, number in about["outcomes"].items()]
    return (
        f"{markdown(['public file', 'files'], rows)}\n{about['files']:,} different files; differences without a "
        f"reason: {about['differ_without_a_reason']}. `{about['command']}`, commit {about['commit'][:7]}; "
        f"{about['ffmpeg']}; PyAV {about['pyav']}, FFmpeg {about['its_ffmpeg']}.\n"
    )


def video_decoding_threads() -> str:
    results = kept("video_decoding_threads.json")
    rows = []
    for result in results["results"]:
        seconds = result["cpu_seconds_by_threads"]
        case = f"{result['codec']}, {result['length']}, {result['num_frames']} frames"
        rows.append([case, *(f"{seconds[count] / seconds['1']:.2f}" for count in ("2", "4"))])
    about = results["about"]
    return (
        f"{markdown(['CPU time, one thread = 1', '2 threads', '4 threads'], rows)}\n"
        f"`python benchmarks/video_decoding.py threads FOLDER --rounds 3`, commit {about['commit'][:7]}, "
        f"{about['cpu']}, one core; PyAV {about['versions']['av']}; {about['pictures']}.\n"
    )


def streaming_memory() -> str:
    results = kept("streaming_memory.json")
    peaks, growth, about = results["peak_mb"], results["growth_mb_per_frame"], results["about"]
    lengths = [name.removeprefix("pixels, ") for name in peaks if name.startswith("pixels")]
    rows = [[length, *(f"{peaks[f'{way}, {length}']:,.0f} MB" for way in ("pixels", "stream"))] for length in lengths]
    rows.append(["**each further frame**", *(f"**{growth[way]:.2f} MB**" for way in ("pixels", "stream"))])
    return (
        f"{markdown(['', 'all pixels, then the encoder', 'encoded while decoded'], rows)}\n"
        f"`{about['command']}`, commit {about['commit'][:7]}, {about['machine']}. Features are kept: "
        f"{about['features_mb_per_frame']:.3f} MB per frame, with an encoder of width 16.\n"
    )


def serving_load() -> str:
    results = kept("serving_load.json")
    about = results["about"]
    rows = [
        [
            str(number),
            f"{one['good_answered_as_expected']} of {one['good_sent']}",
            str(one["told_to_come_back"]),
            str(len(one["wrong"])),
            f"{one['memory_before_mb']:.1f} → {one['memory_after_mb']:.1f} MB",
        ]
        for number, one in enumerate(results["rounds"], start=1)
    ]
    sent = about["requests"]
    head = ["round", "good requests answered as expected", "told to retry, then answered", "wrong answers", "memory"]
    return (
        f"{markdown(head, rows)}\nA round: {sent['good']} good requests, {sent['bad']} mistaken and {sent['hostile']} "
        f"hostile ones, {about['at_once']} at once. `{about['command']}`, commit {about['commit'][:7]}, "
        f"{about['machine']}, cores: {about['cores']}.\n"
    )


def vllm_memory() -> str:
    results = kept("vllm_memory.json")
    rows = []
    for name, model in results["models"].items():
        slot = model.get("slot", {"original_tokens": 0, "language_model": model["text_token"]})
        row = [name, f"{model['frame'] / 1e6:.2f} MB", f"{slot['language_model'] / 1e3:.1f} kB"]
        row += [f"{slot['original_tokens'] / 1e3:.1f} kB", f"{model['text_token'] / 1e3:.1f} kB"]
        rows.append(row + [f"{count:,}" for count in model["frames"].values()])
    head = ["", "a frame", "keys and values of a token", "its share of patches", "a token of text"]
    return markdown([*head, *(f"frames in {size} GB" for size in model["frames"])], rows)


def vllm_requests() -> str:
    results = kept("vllm_memory.json")
    own, other = (results["models"][name] for name in ("CrossLMM-7B", "Qwen2.5-VL-7B"))
    rows = [
        [
            f"{frames:,} frames, {tokens:,} tokens of text",
            f"{bytes_ / 1e6:,.0f} MB",
            share(lost),
            f"{theirs / 1e6:,.0f} MB",
        ]
        for (frames, tokens), bytes_, lost, theirs in zip(
            results["requests"], own["requests"], own["text_for_nothing"], other["requests"], strict=True
        )
    ]
    about = results["about"]
    return (
        f"{markdown(['', 'CrossLMM-7B', 'of it, patches of text', 'Qwen2.5-VL-7B'], rows)}\n`{about['command']}`, "
        f"commit {about['commit']}, {about['machine']}; vLLM {about['vllm']}.\n"
    )


def vllm_throughput() -> str:
    rows, about = [], []
    for name, model in kept("vllm_throughput.json").items():
        for at_once, ways in model["times_as_fast"].items():
            counts = [f"{ways[way][which]:.2f}" for which in (1, 0) for way in ("crosslmm serve", "vLLM")]
            rows.append([f"{name}, {model['parameters'] / 1e6:.1f} M parameters", at_once, *counts])
        about.append(
            f"{name}: {model['frames']} frames, rounds of {model['batch']} questions: {len(model['rounds'])}, answers "
            f"unlike those of `generate`: {model['different_answers']}, commit {model['commit']}, {model['machine']}. "
        )
    versions = ", ".join(f"{package} {version}" for package, version in model["versions"].items())
    head = ["model", "requests at once", "CPU time, `crosslmm serve`", "vLLM", "time, `crosslmm serve`", "vLLM"]
    return f"{markdown(head, rows)}\n`python benchmarks/vllm_throughput.py`. {''.join(about)}{versions}.\n"


def conversion_memory() -> str:
    results = kept("conversion_memory.json")
    rows = [[f"read, {part}", f"{size / 1e9:.2f} GB"] for part, size in results["bytes_read"].items()] + [
        ["written", f"{results['bytes_written'] / 1e9:.2f} GB"],
        ["largest shard", f"{results['largest_shard_bytes'] / 1e9:.2f} GB"],
        ["**most memory held**", f"**{results['peak_resident_bytes'] / 1e9:.2f} GB**"],
        ["of it, the libraries", f"{results['peak_resident_bytes_of_imports_alone'] / 1e9:.2f} GB"],
    ]
    return (
        f"{markdown(['composing a 2B', ''], rows)}\n`{results['command']}`, commit {results['commit']}, "
        f"{results['machine']}.\n"
    )


def ablation_arms() -> str:
    statistics = runpy.run_path(str(ROOT / "docs" / "draw_ablation.py"))
    arms = runpy.run_path(str(ROOT / "benchmarks" / "ablation.py"))["ARMS"]
    runs, about = statistics["load_runs"]()
    rows = []
    for name in (name for name in arms if any(run["arm"] == name for run in runs)):
        (means, lows, highs), seeds = statistics["accuracy"](runs, name)
        ours = [share(mean) for mean in means]
        rows.append([arms[name].about, *ours, f"{share(lows[-1])} – {share(highs[-1])}", str(seeds)])
    kinds = [KINDS[kind] for kind in runs[0]["right"]]
    minutes = sum(run["cpu_seconds"] for run in runs) / 60
    return (
        f"{markdown(['arm', *kinds, 'together', '95 % interval', 'seeds'], rows)}\n`{about['command']}`, commit "
        f"{about['commit']}, {about['machine']}; {about['steps']} steps of {about['batch_size']} questions; "
        f"{len(runs)} runs, {minutes:.0f} minutes of CPU time.\n"
    )


def ablation_effects() -> str:
    statistics = runpy.run_path(str(ROOT / "docs" / "draw_ablation.py"))
    runs, _ = statistics["load_runs"]()

    def points(mean: float, low: float, high: float) -> str:
        return f"{100 * mean:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"

    rows = []
    for heading, pairs in statistics["EFFECTS"].items():
        for words, arm, against in pairs:
            if (found := statistics["effect"](runs, arm, against)) is not None:
                values, seeds = found
                rows.append([heading, words, *(points(*column) for column in values.T), str(seeds)])
    return markdown(["", "", *runs[0]["right"], "together", "seeds"], rows)


def ablation_longer() -> str:
    statistics = runpy.run_path(str(ROOT / "docs" / "draw_ablation.py"))
    every = kept("ablation.json")["runs"]
    rows = []
    for steps in sorted({run["steps"] for run in every}):
        for name, words in (
            ("both", "the base"),
            ("no_time", "the base without `visual_time`"),
            ("paper", "the paper's defaults"),
        ):
            if runs := [run for run in every if (run["arm"], run["steps"]) == (name, steps)]:
                (means, lows, highs), seeds = statistics["accuracy"](runs, name)
                bounds = f"{share(lows[-1])} – {share(highs[-1])}"
                rows.append([words, str(steps), *(share(mean) for mean in means), bounds, str(seeds)])
    return markdown(["", "steps", *every[0]["right"], "together", "95 % interval", "seeds"], rows)


def cost_counted() -> str:
    results = kept("cost_counted.json")
    columns = (32, 64, 128, 256, 3600)
    by_model: dict[str, dict[int, Any]] = {}
    for row in results["counted"]:
        by_model.setdefault(row["model"], {})[row["frames"]] = row
    rows = []
    for model, counts in by_model.items():
        most = counts[max(counts)]
        rows.append(
            [
                model,
                f"{most['video_tokens'] / most['frames']:.0f}",
                f"{most['weight_bytes'] / 1e9:.1f} GB",
                f"{most['cache_bytes'] / most['frames'] / 1e6:.2f} MB",
                *(f"{counts[n]['macs']['total'] / 1e12:,.1f}" if n in counts else "" for n in columns),
            ]
        )
    head = [
        "T multiply-accumulates",
        "tokens per frame",
        "weights",
        "kept per frame",
        *(f"{n:,} frames" for n in columns),
    ]
    return f"{markdown(head, rows)}\n{origin(results)}\n"


def cost_closed_form() -> str:
    formulas = {
        "vision": "T · (N · 3p² · D + b · (N · (4D² + 2D · m) + 2N² · D))",
        "projector": "V · h · (D + C)",
        "language model": "L · n · C · (2Q + 2K + 3M)",
        "self-attention scores": "2n · L² · Q",
        "keys and values": "4x · T · N · D · K",
        "queries and outputs": "2x · L · C · Q",
        "T2V scores": "2x · text · T · N · Q",
        "folding": '2x · D² · K, with `"features"`',
        "V2V scores": '2x · V · N · Q · T (`"video"`), · 1 (`"frame"`), · (T + 1) / 2 (`"causal"`)',
        "head": "C · Z",
    }
    [row] = [
        row
        for row in kept("cost_counted.json")["counted"]
        if (row["model"], row["frames"]) == ("CrossLMM-7B video features", 256)
    ]
    rows = [[part, formulas[part], f"{macs / 1e12:.3f}"] for part, macs in row["closed_form"].items()]
    rows.append(["**together**", "", f"**{sum(row['closed_form'].values()) / 1e12:.3f}**"])
    rows.append(["the counter", "", f"{row['macs']['total'] / 1e12:.3f}"])
    return markdown(["part", "multiply-accumulates", "7B, 256 frames, in T"], rows)


def cost_hour() -> str:
    from transformers_crosslmm import CrossLMMConfig
    from transformers_crosslmm.checkpoints.inspect import count_costs
    from transformers_crosslmm.measuring.cost import multiply_accumulates

    rows = []
    for scope in ("video", "frame"):
        config = CrossLMMConfig.from_preset("7B", long_context=True)
        config.v2v_scope, config.cross_attention_cache = scope, "features"
        costs = count_costs(config)
        for what, distinct in (("film", None), ("slides", 60)):
            parts = {part: macs / 1e12 for part, macs in multiply_accumulates(config, 3600, distinct=distinct).items()}
            kept_bytes = (distinct or 3600) * costs.cache_bytes_per_frame["features"]
            kept_bytes += 3600 * costs.language_bytes_per_frame
            names = ("vision", "V2V scores", "language model", "self-attention scores")
            row = [f"an hour of {what}, {scope}", *(f"{parts[name]:,.0f}" for name in names)]
            rows.append([*row, f"{sum(parts.values()):,.0f}", f"{kept_bytes / 1e9:.1f} GB"])
    head = ["7B features, T", "vision", "V2V scores", "language model", "its scores", "together", "kept"]
    return markdown(head, rows)


def unchanged_frames() -> str:
    results = kept("unchanged_frames.json")
    about, levels = results["about"], ("0", "2", "8", "24")
    rows = []
    for name, video in results["videos"].items():
        ratio = video.get("ratio", {})
        rows.append(
            [
                name,
                *(str(video["distinct"][level]) for level in levels),
                *(f"{ratio[part]:.2f}" if ratio else "" for part in ("read", "seconds", "step", "bytes")),
                f"{video['comparing']:.2%}" if ratio else "",
                {True: "yes", False: "no"}.get(video.get("same_tokens"), ""),
            ]
        )
    head = [
        "60 frames",
        *(f"distinct at {level}" for level in levels),
        "reading",
        "file to prefill",
        "step",
        "kept",
        "comparing",
        "same tokens",
    ]
    return (
        f"{markdown(head, rows)}\n`{about['command']}`, commit {about['commit']}, {about['machine']}; torch "
        f"{about['torch']}, PyAV {about['av']}.\n"
    )


def cache_forms() -> str:
    results = kept("cache_forms.json")
    own, rows = results["seconds"]["own"], []
    for frames, seconds in results["seconds"].items():
        if frames == "own":
            continue
        row = [f"{frames} frames"]
        for length in ("1", "32"):
            kv, features = (28 * own[length] + 7 * seconds[f"{form}, {length}"] for form in ("kv", "features"))
            row += [f"{kv:.1f} s", f"{features:.1f} s", f"{features / kv:.2f}"]
        rows.append(row)
    head = ["CPU time", "step, kv", "features", "ratio", "second question, kv", "features", "ratio"]
    counted = [
        [
            f"{int(frames):,} frames",
            *(f"{form[part]:,.1f}" for part in ("gb", "visual_g_macs") for form in both.values()),
            f"{both['features']['gb'] / both['kv']['gb']:.2f}",
        ]
        for frames, both in results["counted"].items()
    ]
    reads = ["a step, counted", "GB read, kv", "features", "G MAC of T2V, kv", "features", "GB, ratio"]
    return (
        f"{markdown(head, rows)}\n{markdown(reads, counted)}\n`{results['command']}`, commit {results['commit']}, "
        f"{results['machine']}; torch {results['torch']}.\n"
    )


def frame_bounds() -> str:
    results = kept("frame_bounds.json")
    epsilons = ("0.001", "0.01", "0.1")
    rows = [
        [name, bound, *(f"{share(found[bound][e]['head'])} / {share(found[bound][e]['layer'])}" for e in epsilons)]
        for name, found in results.items()
        if isinstance(found, dict)
        for bound in ("oracle", "box", "ball")
    ]
    return (
        f"{markdown(['dropped, head / layer', 'bound', *(f'ε = {e}' for e in epsilons)], rows)}\n"
        f"`{results['command']}`, commit {results['commit']}; torch {results['torch']}.\n"
    )


def models_people_use() -> str:
    counted, measured = kept("cost_counted.json"), kept("full_size_cpu.json")
    frames = 128
    counts = {row["model"]: row for row in counted["counted"] if row["frames"] == frames}
    times = {row["model"]: row["prefill"] for row in measured["rows"]}
    ours = "CrossLMM-7B video features"
    names = {
        "CrossLMM-7B video kv": 'CrossLMM-7B, `cross_attention_cache="kv"` (default)',
        ours: 'CrossLMM-7B, `cross_attention_cache="features"`',
        "Qwen2.5-VL-7B": "Qwen2.5-VL-7B",
        "Qwen3-VL-8B": "Qwen3-VL-8B",
        "LLaVA-OneVision-7B": "LLaVA-OneVision-7B",
    }
    rows = [
        [
            name,
            f"{counts[model]['video_tokens'] / frames:.0f}",
            f"{counts[model]['cache_bytes'] / frames / 1e6:.1f} MB",
            f"{counts[model]['macs']['total'] / counts[ours]['macs']['total']:.1f}",
            f"{times[model] / times[ours]:.1f}" if model in times else "not run",
        ]
        for model, name in names.items()
    ]
    head = [
        "",
        "tokens per frame",
        "kept per frame, bf16",
        f"work of a prefill, {frames} frames, counted",
        f"time of a prefill, {measured['about']['frames']} frames, one CPU core",
    ]
    about = measured["about"]
    return (
        f"{markdown(head, rows)}\nThe last two columns are ratios to CrossLMM-7B. Work: "
        f"`{counted['about']['command']}`, commit {counted['about']['commit']}. Time: full size, random weights, "
        f"bfloat16, one run of all: `{about['command']}`, commit {about['commit']}, {about['machine']}. "
        "No GPU has run this yet.\n"
    )


def cost_cpu() -> str:
    results = kept("cost_cpu.json")
    frames = max(row["frames"] for row in results["timed"])
    macs = {row["model"]: row["macs"]["total"] for row in results["counted"] if row["frames"] == frames}
    timed = {row["model"]: row["seconds"] for row in results["timed"] if row["frames"] == frames}
    ours = "CrossLMM-7B video features"
    whats = {
        "prefill": "prefill",
        "first token": "first_token",
        "second question": "second_question",
        "each further token": "decode_step",
    }
    rows = [
        [
            model,
            f"{macs[model] / macs[ours]:.2f}",
            *(f"{seconds[what] / timed[ours][what]:.2f}" for what in whats.values()),
        ]
        for model, seconds in timed.items()
    ]
    head = [f"{frames} frames, toy size", "multiply-accumulates", *whats]
    parts = {name: value for name, value in timed[ours].items() if name.startswith("part: ")}
    shares = ", ".join(
        f"{name.removeprefix('part: ')} {share(value / sum(parts.values()))}" for name, value in parts.items()
    )
    again = timed[ours]["second_question"] / timed[ours]["first_token"]
    return (
        f"{markdown(head, rows)}\nOf our prefill: {shares}. Our second question takes {share(again)} of the time to "
        f"the first token of the first. {origin(results)}\n"
    )


def cost_full_size_cpu() -> str:
    results = kept("full_size_cpu.json")
    about, rows = results["about"], results["rows"]
    [ours] = [row for row in rows if row["model"] == "CrossLMM-7B video features"]
    whats = {"prefill": "prefill", "second question": "second_question", "each further token": "decode_step"}
    head = [f"{about['frames']} frames, full size", "multiply-accumulates", *whats, "peak, without weights and pixels"]
    cells = [
        [
            row["model"],
            *(f"{row[what] / ours[what]:.2f}" for what in ("macs", *whats.values())),
            f"{row['peak_mb']:,.0f} MB",
        ]
        for row in rows
    ]
    return (
        f"{markdown(head, cells)}\nA prefill of CrossLMM-7B takes {ours['prefill']:.0f} seconds of CPU time, a second "
        f"question {share(ours['second_question'] / ours['prefill'])} of that. `{about['command']}`, commit "
        f"{about['commit']}, {about['machine']}; torch {about['torch']}, bfloat16; {about['rounds']} rounds.\n"
    )


def cpu_speed() -> str:
    """Time of ours over LLaVA-OneVision's; for a prefill also of its kernels, and of everything outside them."""
    results = kept("cpu_speed.json")
    before, now = results["before"], results["now"]
    forms = {"CrossLMM, kv": '"kv"', "CrossLMM, features": '"features"'}
    words = {
        "prefill, kernels": "prefill, kernels only",
        "prefill, beside": "prefill, outside kernels",
        "decode": "step",
    }
    rows = []
    for size in ("mid", "tiny"):
        for model, form in forms.items():
            measured = now[size]["time_against_llava_onevision"][model]
            earlier = before[size]["time_against_llava_onevision"][model]
            for part in ("prefill", "prefill, kernels", "prefill, beside", "decode"):
                was = f"{earlier[part]['measured']:.2f}" if part in earlier else ""
                predicted = f"{measured[part]['predicted']:.2f}" if "predicted" in measured[part] else ""
                rows.append(
                    [f"{size}, {form}, {words.get(part, part)}", was, f"{measured[part]['measured']:.2f}", predicted]
                )
    return (
        f"{markdown(['', 'before', 'now', 'predicted'], rows)}\n`{now['command']}`, commits {before['commit'][:7]} "
        f"(before) and {now['commit'][:7]} (now), {now['machine']}; torch {now['torch']}.\n"
    )


def memory_curve() -> str:
    curves = kept("memory_curve.json")
    rows = [
        [
            name,
            f"{curve['growth_mb_per_frame']:.2f}",
            f"{curve['language_models_own_mb_per_frame']:.2f}",
            f"{curve['growth_without_it']:.2f}",
        ]
        for name, curve in curves.items()
    ]
    *_, last = curves.values()
    frames, about = ", ".join(f"{int(count):,}" for count in last["peak_mb"]), last["about"]
    return (
        f"{markdown(['MB per frame', 'growth', 'kept by the language model', 'the rest'], rows)}\n"
        f"`{about['command']}`, commit {about['commit'][:7]}, {about['machine']}; torch {about['torch']}; {frames} "
        "frames.\n"
    )


def training_memory() -> str:
    results = kept("training_memory.json")
    words = {
        "plain": "without checkpointing",
        "checkpointing": "`activation_checkpointing: true`",
        "checkpointing, visual_norm and visual_time": "the same, with `visual_norm` and `visual_time`",
        "checkpointing, mixed": "`activation_checkpointing: true`, mixed",
        "checkpointing, mixed, adapt": "the same, mixed, only what `adapt` trains",
    }
    sizes = results["sizes"].values()
    rows = [[word, *(f"{ways[way]['megabytes_per_frame']:.1f}" for ways in sizes)] for way, word in words.items()]
    head = [f"{ways['checkpointing']['head_and_loss_megabytes_per_frame']:.1f}" for ways in sizes]
    rows.append(["added in each case: logits in float32, for the loss", *head])
    about = results["about"]
    return (
        f"{markdown(['MB per frame', *results['sizes']], rows)}\n`{about['command']}`, commit {about['commit'][:7]}; "
        f"torch {about['torch']}.\n"
    )


def training_memory_measured() -> str:
    measured = kept("training_memory.json")["measured"]
    rows = []
    for name, way in measured.items():
        growth = way["megabytes_per_frame"]
        peaks = [f"{growth[part]:.1f}" if part in growth else "" for part in ("language model", "encoder")]
        rows.append([name, f"{way['counted_megabytes_per_frame']:.2f}", f"{growth['kept']:.2f}", *peaks])
    *_, last = measured.values()
    frames, about = ", ".join(last["megabytes"]), last["about"]
    columns = ["MB per frame", "counted", "kept", "peak, language model", "peak, encoder"]
    return (
        f"{markdown(columns, rows)}\n`{about['command']}`, commit {about['commit'][:7]}, {about['machine']}; torch "
        f"{about['torch']}; {frames} frames and 64 tokens of text.\n"
    )


def origin(results: dict[str, Any]) -> str:
    about = results["about"]
    return (
        f"`{about['command']}`, commit {about['commit']}, {about['device']}, threads: {about['threads']}; torch "
        f"{about['versions']['torch']}, transformers {about['versions']['transformers']}."
    )


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        models_people_use,
        paper_cost,
        versions,
        backbones,
        counted_costs,
        gpu_sizes,
        paper_measured,
        paper_scores,
        tiny_checkpoint,
        tiny_checkpoint_times,
        where_it_looked,
        laptop,
        laptop_halves,
        laptop_branches,
        video_decoding,
        video_decoding_threads,
        video_fuzz,
        video_conformance,
        streaming_memory,
        serving_load,
        vllm_memory,
        vllm_requests,
        vllm_throughput,
        conversion_memory,
        cost_counted,
        cost_closed_form,
        cost_hour,
        unchanged_frames,
        cache_forms,
        frame_bounds,
        cost_cpu,
        cost_full_size_cpu,
        cpu_speed,
        memory_curve,
        training_memory,
        training_memory_measured,
        ablation_arms,
        ablation_effects,
        ablation_longer,
    )
}


def with_tables(page: str) -> str:
    """The page with every table as the kept results have it now."""
    return TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", page)


def preset_costs() -> dict[str, Any]:
    """What `crosslmm info` keeps of the paper's sizes: their counts by size and number format of the weights."""
    from transformers_crosslmm import CrossLMMConfig
    from transformers_crosslmm.checkpoints.inspect import QUANTIZATIONS, count_costs
    from transformers_crosslmm.configuration_crosslmm import PRESETS

    return {
        preset: {
            quantization or "bfloat16": asdict(
                count_costs(CrossLMMConfig.from_preset(preset), quantization=quantization)
            )
            for quantization in (None, *QUANTIZATIONS)
        }
        for preset in PRESETS
    }


PRESET_COSTS = ROOT / "src" / "transformers_crosslmm" / "checkpoints" / "preset_costs.json"

if __name__ == "__main__":
    PRESET_COSTS.write_text(json.dumps(preset_costs(), indent=1) + "\n", encoding="utf-8")
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (new := with_tables(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: written anew")
