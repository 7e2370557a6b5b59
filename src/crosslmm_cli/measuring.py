"""Quality and cost: evaluate, bench, info."""

import json
import re
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Annotated, Any, Literal

import typer

from .base import (
    AsJson,
    Device,
    Fps,
    Frames,
    Model,
    NewTokens,
    Steps,
    Timestamps,
    app,
    chosen_checkpoint,
    import_package,
    only_one_model,
    print_json,
    sampling_options,
)


@app.command()
def evaluate(
    questions: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"video": …, "question": …, "answer": …}.', show_default=False),
    ],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the videos.", show_default="the questions' folder")
    ] = None,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    add_timestamps: Timestamps = None,
    max_new_tokens: NewTokens = 64,
    device: Device = None,
    show_wrong: Annotated[bool, typer.Option("--show-wrong", help="Print the questions with wrong answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model's accuracy on your own questions and answers.

    An answer is right if it equals the given one, ignoring case, surrounding space and a final full stop.

    Example: crosslmm evaluate test.jsonl --model runs/mine --frames 8 --show-wrong
    """
    wanted = sampling_options(frames=frames, fps=fps, start=None, end=None)
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.checkpoints.load import load_model, load_processor
        from transformers_crosslmm.measuring.own_questions import answers_to, is_right, read_own_questions
        from transformers_crosslmm.measuring.quality import interval

        asked = read_own_questions(questions)
        steps.begin("Loading the model")
        checkpoint = chosen_checkpoint(model)
        processor = load_processor(checkpoint, add_timestamps=add_timestamps)
        network = load_model(checkpoint, device=device)
        steps.begin("Answering")
        wrong = []
        folder: Any = root or questions.parent
        given = answers_to(network, processor, asked, root=folder, max_new_tokens=max_new_tokens, **wanted)
        for done, (question, answer) in enumerate(given, start=1):
            if not is_right(answer, question.answer):
                wrong.append({**vars(question), "given": answer})
            steps.count(done, len(asked))
    right = len(asked) - len(wrong)
    low, high = interval(right, len(asked))
    if as_json:
        print_json({"asked": len(asked), "right": right, "interval_95": [low, high], "wrong": wrong})
        return
    for case in wrong if show_wrong else ():
        typer.echo(f"{case['video']}: {case['question']}  {case['given']!r} instead of {case['answer']!r}")
    typer.echo(f"{right} of {len(asked)} right, {right / len(asked):.1%} (95 % interval {low:.1%} to {high:.1%})")


@app.command()
def bench(
    models: Annotated[
        str, typer.Option(help="Names, with commas between; a wrong one lists the known ones.", show_default="all")
    ] = "",
    frames: Annotated[
        str, typer.Option(help="Frame counts, with commas between.", show_default="32 to 256, for CrossLMM to 3600")
    ] = "",
    size: Annotated[
        Literal["full", "toy"], typer.Option(help="The models' real sizes, or small ones that a CPU can run.")
    ] = "full",
    device: Device = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each time is their median.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file for all results, written after each part.", dir_okay=False, show_default="none"),
    ] = None,
) -> None:
    """Count and time the cost of a video, compared with LLaVA-OneVision, Qwen2.5-VL and Qwen3-VL.

    Multiply-accumulates and bytes are counted from the network, on any machine. Times and peak memory are measured
    on a GPU, or with --size toy. All models run in turns, with random weights, so nothing is downloaded.

    Example: crosslmm bench --models CrossLMM-7B,LLaVA-OneVision-7B --frames 32,256 --output cost.json
    """
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", frames):
        raise typer.BadParameter(f"--frames takes positive numbers, separated by commas; got {frames!r}.")
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"--output must be in a folder that exists; got {str(output)!r}.")
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.measuring import cost

        def save(results: dict) -> None:
            if output is not None:
                output.write_text(json.dumps(results, indent=1) + "\n")

        results = cost.run(
            [name for name in models.split(",") if name],
            [int(number) for number in frames.split(",") if number],
            size=size,
            device=device,
            repeats=repeats,
            on_step=steps.begin,
            on_results=save,
        )
    rows = cost.table(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        typer.echo("  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]))
    if "timed" not in results:
        typer.echo("Times need a GPU, or --size toy.", err=True)


@app.command()
def info(
    name: Annotated[
        str | None,
        typer.Argument(metavar="MODEL|VIDEO", help="Short for --model; or a video file.", show_default=False),
    ] = None,
    model: Model = None,
    memory: Annotated[float, typer.Option(min=0, help="Memory of the GPU, in GiB.")] = 24.0,
    context: Annotated[
        int | None, typer.Option(min=1, help="Length of the context, in tokens.", show_default="the checkpoint's")
    ] = None,
    fps: Annotated[float, typer.Option(min=0.001, help="Frames sampled per second of video.")] = 1.0,
    quantization: Annotated[
        Literal["nf4", "int8", "fp8"] | None,
        typer.Option(help="Count the language model's linear layers in 4 or 8 bits.", show_default="none"),
    ] = None,
    add_timestamps: Timestamps = None,
    as_json: AsJson = False,
) -> None:
    """Count a checkpoint's parameters, its memory per frame, and the longest video that fits.

    Nothing is loaded but the config. MODEL may also be a size of the paper: 2B, 7B or 7B-16. Of a VIDEO, count the
    frames, how many of them differ, and the positions and memory that they take in --model.

    Example: crosslmm info 7B --memory 80 --context 131072
    """
    if name is not None and Path(name).is_file():
        print_video_info(name, model, fps=fps, add_timestamps=add_timestamps, as_json=as_json)
        return
    model = only_one_model(model, name)
    costs = kept_costs(model, quantization)
    if costs is None:
        with Steps() as steps:
            import_package(steps)
            from transformers_crosslmm.checkpoints.inspect import count_costs, load_config

            steps.begin("Counting")
            config = load_config(chosen_checkpoint(model))
            last_frame = (context or config.max_sequence_length) / fps
            stamp = timestamp_tokens(model, [last_frame], add_timestamps=add_timestamps)
            costs = count_costs(config, quantization=quantization, timestamp_tokens=stamp)
    else:
        refuse_timestamps_of_a_size(model, add_timestamps)
    context = context or costs.max_positions
    in_context = costs.frames_in_context(context)
    in_memory = {form: costs.frames_in_memory(form, memory * 2**30) for form in costs.cache_bytes_per_frame}
    longest = {form: min(in_context, frames) / fps for form, frames in in_memory.items()}
    dtype = costs.dtype
    if quantization:
        dtype += f", the language model's linear layers in {quantization}"
    if as_json:
        print_json(
            {
                "parameters": costs.parts,
                "dtype": dtype,
                "weight_bytes": costs.weight_bytes,
                "tokens_per_frame": costs.tokens_per_frame,
                "cache_bytes_per_frame": costs.cache_bytes_per_frame,
                "language_bytes_per_frame": costs.language_bytes_per_frame,
                "prefill_bytes_per_frame": costs.prefill_bytes_per_frame,
                "frames_in_context": in_context,
                "frames_in_memory": in_memory,
                "longest_video_seconds": longest,
            }
        )
        return
    for part, count in costs.parts.items():
        typer.echo(f"{part:<24}{count:>16,} parameters" if count else f"{part:<24}{'tied':>16}")
    typer.echo(
        f"{'together':<24}{sum(costs.parts.values()):>16,} parameters, {size_of(costs.weight_bytes)} in {dtype}"
    )
    typer.echo(f"\nA frame takes {costs.tokens_per_frame} of {context:,} positions, and in the caches")
    for form, size in costs.cache_bytes_per_frame.items():
        own = size_of(costs.language_bytes_per_frame)
        typer.echo(f"  {form:<12}{size_of(size):>9}, and {own} in the language model's own")
    typer.echo(f"\nLongest video at {fps:g} fps, with {costs.text_tokens(context)} positions left for text")
    for limit, count in {"context": in_context, **{f"memory, {form}": n for form, n in in_memory.items()}}.items():
        typer.echo(f"  {limit:<18}{count:>9,} frames{length(count / fps):>14}")
    both = ", ".join(f"{length(seconds)} with {form}" for form, seconds in longest.items())
    typer.echo(f"So at most {both}.")
    typer.echo(f"Memory: {memory:g} GiB less the weights, at the end of the prefill. Activations are not counted.")


def kept_costs(model: str | None, quantization: str | None) -> Any:
    """The counts of a size of the paper as the package keeps them, or None for another model.

    Importing the package would take seconds, so the file of `CheckpointCosts`, which imports nothing, is run alone.
    """
    package: Any = find_spec("transformers_crosslmm")
    folder = Path(package.origin).parent / "checkpoints"
    kept = json.loads((folder / "preset_costs.json").read_text(encoding="utf-8"))
    if model not in kept:
        return None
    return run_path(str(folder / "costs.py"))["CheckpointCosts"](**kept[model][quantization or "bfloat16"])


def length(seconds: float) -> str:
    """A video's length as hours, minutes and seconds: 0:59:44."""
    return str(timedelta(seconds=round(seconds)))


def refuse_timestamps_of_a_size(model: str | None, add_timestamps: bool | None) -> None:
    if add_timestamps:
        raise typer.BadParameter(f"{model} is a size without a tokenizer; count timestamps of a checkpoint.")


def timestamp_tokens(model: str | None, times: Sequence[float], *, add_timestamps: bool | None) -> int:
    """Tokens of these times before frames: 0 where `add_timestamps` or the checkpoint's processor leaves them out.

    A checkpoint may be a config alone: its processor is loaded only if it writes times.
    """
    from transformers_crosslmm import CrossLMMProcessor
    from transformers_crosslmm.checkpoints.load import load_processor
    from transformers_crosslmm.configuration_crosslmm import PRESETS
    from transformers_crosslmm.processing_crosslmm import timestamp

    if model in PRESETS:
        refuse_timestamps_of_a_size(model, add_timestamps)
        return 0
    checkpoint = chosen_checkpoint(model)
    if add_timestamps is None:
        saved, _ = CrossLMMProcessor.get_processor_dict(checkpoint)
        add_timestamps = saved.get("add_timestamps", False)
    if not add_timestamps:
        return 0
    tokenizer = load_processor(checkpoint).tokenizer
    return sum(map(len, tokenizer([timestamp(seconds) for seconds in times])["input_ids"]))


def print_video_info(video: str, model: str | None, *, fps: float, add_timestamps: bool | None, as_json: bool) -> None:
    """Frames, distinct frames, and what they take with and without `skip_unchanged`."""
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm import CrossLMMConfig, CrossLMMVideoProcessor
        from transformers_crosslmm.asking.pictures import clock_time
        from transformers_crosslmm.checkpoints.inspect import count_costs, load_config
        from transformers_crosslmm.checkpoints.load import load_processor
        from transformers_crosslmm.configuration_crosslmm import PRESETS

        if model in PRESETS:
            config, processor = CrossLMMConfig.from_preset(model), CrossLMMVideoProcessor()
        else:
            config = load_config(chosen_checkpoint(model))
            processor = load_processor(chosen_checkpoint(model)).video_processor
        costs = count_costs(config)
        steps.begin(f"Reading {video}")
        [seen] = processor.stream([video], fps=fps, skip_unchanged=True)
        distinct = sum(map(len, seen))
    frames = seen.num_frames
    stamps = timestamp_tokens(model, seen.times or [], add_timestamps=add_timestamps)
    positions = frames * costs.tokens_per_frame + stamps
    own_bytes = positions * costs.language_bytes_per_frame // costs.tokens_per_frame
    if as_json:
        print_json(
            {
                "frames": frames,
                "frame_times": seen.times,
                "distinct_frames": distinct,
                "positions": positions,
                "language_bytes": own_bytes,
                "cache_bytes": {form: frames * size for form, size in costs.cache_bytes_per_frame.items()},
                "cache_bytes_skipping": {form: distinct * size for form, size in costs.cache_bytes_per_frame.items()},
            }
        )
        return
    last = clock_time(seen.times[-1]) if seen.times else "an unknown time"
    typer.echo(f"{video}: {frames} frames at {fps:g} fps, the last at {last}")
    typer.echo(f"distinct: {distinct}")
    typer.echo(f"positions: {positions:,} of {costs.max_positions:,}")
    typer.echo(f"language model's cache: {size_of(own_bytes)}")
    for form, size in costs.cache_bytes_per_frame.items():
        typer.echo(f"visual cache, {form}: {size_of(frames * size)}; with skip_unchanged {size_of(distinct * size)}")


def size_of(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
