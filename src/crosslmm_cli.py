"""The `crosslmm` command. It imports the package, which takes seconds, only when a command runs."""

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn


class Commands(typer.core.TyperGroup):
    """Ends every command with an exit code that says how it went."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except KeyboardInterrupt:
            typer.echo("\nInterrupted.", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # such as `head`, which has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still wants to flush
            raise typer.Exit(141) from None
        except Exception as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {_reason(error)} (`crosslmm --debug …` shows where.)", err=True)
            raise typer.Exit(1) from error


def _reason(error: Exception) -> str:
    """What an error tells a person, in one line; our own errors have more where they list names."""
    if type(error).__module__.startswith("transformers_crosslmm."):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        remedy = " Check the path; a relative one begins in the current folder." * isinstance(error, FileNotFoundError)
        return f"{error.strerror}: {error.filename!r}.{remedy}"
    kind = "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: "
    return kind + (" ".join(str(error).split()) or type(error).__name__)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Video = Annotated[str, typer.Argument(help="A video file or URL.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(help="A checkpoint folder, or its name on the Hub.", show_default="the tiny one of the package"),
]
ServedModel = Annotated[
    str | None,
    typer.Argument(help="A checkpoint folder, or its name on the Hub.", show_default="the tiny one of the package"),
]
Frames = Annotated[int | None, typer.Option(min=1, help="Look at this many frames, in equal steps.")]
Fps = Annotated[
    float | None, typer.Option(min=0.001, help="Look at this many frames per second, up to the checkpoint's limit.")
]
Start = Annotated[float | None, typer.Option(min=0, help="Look from this second on.")]
End = Annotated[float | None, typer.Option(min=0, help="Look up to this second.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="a GPU if there is one")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class Counted(MofNCompleteColumn):
    """The count of a step whose end is known; nothing for others."""

    def render(self, task: Any) -> Any:
        return super().render(task) if task.total else ""


class Steps:
    """Says on a terminal's stderr what is going on, as long as it goes on."""

    def __enter__(self) -> "Steps":
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), Counted()
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task("Starting", total=None)
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()

    def begin(self, description: str) -> None:
        self.progress.reset(self.task, description=description, total=None)

    def count(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)

    def end(self) -> None:
        if self.progress.live.is_started:
            self.progress.stop()


@app.callback()
def crosslmm(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """CrossLMM: language models that look back at long videos.

    Exit codes: 0 done; 1 failed, and stderr says why and what helps; 2 wrong usage;
    130 interrupted; 141 nobody reads the output any more.
    """


@app.command()
def ask(
    video: Video,
    question: Annotated[str, typer.Argument(help="What you want to know.", show_default=False)],
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw into this file how much each frame weighed for each token of the answer.")
    ] = None,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a video.

    Example: crosslmm ask clip.mp4 "In which frame does the red star appear?" --frames 8 --timeline looked.png
    """
    if not question.strip():
        raise typer.BadParameter("A question needs words; got none.")
    if timeline is not None:
        _check_picture(timeline)
    with Steps() as steps:
        conversation = _conversation(steps, video, model, device, frames=frames, fps=fps, start=start, end=end)
        steps.begin("Answering")
        answer = conversation.ask(
            question,
            max_new_tokens=max_new_tokens,
            on_text=None if as_json else _printer(steps),
            with_frame_weights=timeline is not None,
        )
    if not as_json:
        typer.echo()
    if timeline is not None:
        from transformers_crosslmm.asking.pictures import draw_timeline, frame_labels

        pictures = conversation.pictures()
        labels = frame_labels(len(pictures), conversation.video.times)
        draw_timeline(pictures, labels, answer.tokens, answer.frame_weights).save(timeline)
        if not as_json:
            typer.echo(f"Where it looked: {timeline}", err=True)
    if as_json:
        record = {
            "video": video,
            "question": question,
            "answer": answer.text,
            "tokens": answer.tokens,
            "frame_times": conversation.video.times,
        }
        if answer.frame_weights is not None:
            record["frame_weights"] = answer.frame_weights.tolist()
        _print_json(record)


@app.command()
def chat(
    video: Video,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
) -> None:
    """Talk about a video, which is encoded only once. A line is a question; Ctrl-D or `exit` ends.

    Example: crosslmm chat lecture.mp4 --fps 1 --start 60 --end 600
    """
    with Steps() as steps:
        conversation = _conversation(steps, video, model, device, frames=frames, fps=fps, start=start, end=end)
    is_person = sys.stdin.isatty()
    if is_person:
        with contextlib.suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401  (input() takes its line editing from it)
        hint = f"{conversation.video.num_frames} frames seen, counted from 1. Ask a question; Ctrl-D or exit ends."
        typer.echo(hint, err=True)
    while True:
        try:
            question = input("> " if is_person else "").strip()
        except EOFError:
            return
        if not question:
            continue
        if is_person and question in ("exit", "quit"):
            return
        if is_person and question == "help":
            typer.echo(hint, err=True)
            continue
        with Steps() as steps:
            steps.begin("Answering")
            try:
                conversation.ask(question, max_new_tokens=max_new_tokens, on_text=_printer(steps))
            except ValueError as error:  # nothing was said yet, and the next question may be a better one
                steps.end()
                typer.echo(f"error: {error}", err=True, nl=False)
        typer.echo()


@app.command()
def watch(
    source: Annotated[
        str, typer.Argument(help="/dev/video0, a file that is being written, or an address.", show_default=False)
    ],
    model: Model = None,
    fps: Annotated[float, typer.Option(min=0.001, help="Look at this many frames per second.")] = 1.0,
    max_frames: Annotated[
        int | None,
        typer.Option(min=1, help="Most frames in view.", show_default="the checkpoint's limit, as far as they fit"),
    ] = None,
    allow_network: Annotated[
        bool, typer.Option("--allow-network", help="Open rtsp, rtsps, http and https addresses, of any network.")
    ] = False,
    silence: Annotated[
        float, typer.Option(min=0.5, help="Seconds without a picture after which the source counts as ended.")
    ] = 10.0,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
) -> None:
    """Watch a video that goes on, and answer what you type meanwhile. A line is a question; Ctrl-D ends.

    Only the newest frames are looked at where the model is too slow for all of them, and the oldest are forgotten; the
    state says how many. Each question stands alone.

    Example: crosslmm watch rtsp://192.168.1.20/stream1 --allow-network
    """
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.asking.live import LiveVideo, most_frames
        from transformers_crosslmm.asking.live_source import LiveSource
        from transformers_crosslmm.asking.watch import watch as go_on
        from transformers_crosslmm.checkpoints.load import load_model, load_processor

        checkpoint = _checkpoint(model)
        processor = load_processor(checkpoint)
        steps.begin("Opening the source")
        options = {"fps": fps, "allow_network": allow_network, "silence_seconds": silence}
        opened = LiveSource(source, processor, **options)  # type: ignore[arg-type]
        steps.begin("Loading the model")
        loaded = load_model(checkpoint, device=device)
        most = max_frames or min(most_frames(loaded, processor), processor.video_processor.max_frames)
        live = LiveVideo(loaded, processor, most)
    try:
        go_on(live, opened, max_new_tokens=max_new_tokens)
    finally:
        opened.close()


@app.command()
def batch(
    questions: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"video": …, "question": …} and, if you like, "id".', show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="A folder for the answers, Parquet files; again to go on.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the videos.", show_default="that of the questions")
    ] = None,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    max_new_tokens: NewTokens = 256,
    engine: Annotated[
        str, typer.Option(help="ray, on the cluster of RAY_ADDRESS or here; vllm, with vLLM in its workers; or local.")
    ] = "ray",
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many with Ray.", show_default="one per GPU, or else by CPUs")
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="CPUs of each worker with Ray.")] = 1,
    device: Device = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again what has an error for an answer.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a file of questions about many videos, each of which is looked at once.

    What is answered stays answered: started again, the command goes on. A video that fails becomes a row with its
    error.

    Example: crosslmm batch questions.jsonl --out answers/ --frames 64 --workers 8
    """
    wanted = _sampling(frames=frames, fps=fps, start=start, end=end)
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.serving.corpus import answer_corpus

        steps.begin("Answering")
        with contextlib.redirect_stdout(sys.stderr):  # Ray tells of a worker that died
            report = answer_corpus(
                questions,
                out,
                root=root,
                model=_checkpoint(model),
                engine=engine,  # type: ignore[arg-type]
                workers=workers,
                cpus_per_worker=cpus_per_worker,
                device=device,
                max_new_tokens=max_new_tokens,
                retry_errors=retry_errors,
                on_progress=steps.count,
                **wanted,
            )
    if as_json:
        _print_json(vars(report))
        return
    typer.echo(
        f"{out}: {report.questions} questions about {report.videos} videos, {report.answered_before} of them answered "
        f"before; {report.failed} have an error for an answer"
    )
    if report.failed == report.questions and report.first_error:
        typer.echo(f"All of them failed. The first error: {report.first_error}", err=True)
    if report.duplicates:
        typer.echo(f"{report.duplicates} lines repeat an earlier one and were asked once.")


@app.command()
def evaluate(
    questions: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"video": …, "question": …, "answer": …}.', show_default=False),
    ],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the videos.", show_default="that of the questions")
    ] = None,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    max_new_tokens: NewTokens = 64,
    device: Device = None,
    show_wrong: Annotated[bool, typer.Option("--show-wrong", help="Print the questions with wrong answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the share of right answers to your own questions.

    An answer is right if it equals the given one, apart from upper case, space around it and a final full stop.

    Example: crosslmm evaluate test.jsonl --model runs/mine --frames 8 --show-wrong
    """
    wanted = _sampling(frames=frames, fps=fps, start=None, end=None)
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.checkpoints.load import load_model, load_processor
        from transformers_crosslmm.measuring.own_questions import answers_to, is_right, read_own_questions
        from transformers_crosslmm.measuring.quality import interval

        asked = read_own_questions(questions)
        steps.begin("Loading the model")
        checkpoint = _checkpoint(model)
        processor, network = load_processor(checkpoint), load_model(checkpoint, device=device)
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
        _print_json({"asked": len(asked), "right": right, "interval_95": [low, high], "wrong": wrong})
        return
    for case in wrong if show_wrong else ():
        typer.echo(f"{case['video']}: {case['question']}  {case['given']!r} instead of {case['answer']!r}")
    typer.echo(f"{right} of {len(asked)} right, {right / len(asked):.1%} (95 % interval {low:.1%} to {high:.1%})")


@app.command()
def look(
    video: Video,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("contact_sheet.png"),
    as_json: AsJson = False,
) -> None:
    """Draw the frames that the model would see, with their times.

    Example: crosslmm look clip.mp4 --frames 16 --out frames.png
    """
    _check_picture(out)
    _check_video(video)
    wanted = _sampling(frames=frames, fps=fps, start=start, end=end)
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.asking.conversation import read_video
        from transformers_crosslmm.asking.pictures import draw_contact_sheet, frame_labels, frame_pictures
        from transformers_crosslmm.checkpoints.load import load_processor

        processor = load_processor(_checkpoint(model))
        steps.begin(f"Reading {video}")
        seen = read_video(processor, video, **wanted)
        pictures = [picture for chunk in seen for picture in frame_pictures(chunk, processor.video_processor)]
    labels = frame_labels(len(pictures), seen.times)
    draw_contact_sheet(pictures, labels).save(out)
    if as_json:
        _print_json({"video": video, "frame_times": seen.times, "picture": str(out)})
    else:
        moments = labels if len(labels) <= 8 else [*labels[:3], "…", labels[-1]]
        typer.echo(f"{out}: {len(pictures)} frames, at {', '.join(moments)}")


@app.command()
def bench(
    models: Annotated[
        str, typer.Option(help="Their names, with commas between; a wrong one lists them.", show_default="all")
    ] = "",
    frames: Annotated[
        str, typer.Option(help="Numbers of frames, with commas between.", show_default="32 to 256, and ours to 3600")
    ] = "",
    size: Annotated[
        Literal["full", "toy"], typer.Option(help="The models' real sizes, or small ones for a CPU's patience.")
    ] = "full",
    device: Device = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds behind each median time.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(help="A JSON file for all of it, part after part.", dir_okay=False, show_default="none"),
    ] = None,
) -> None:
    """Count and time what a video costs, beside LLaVA-OneVision, Qwen2.5-VL and Qwen3-VL.

    Multiply-accumulates and bytes are counted without weights, on any machine. Times and peaks of memory are measured
    on a GPU, or with --size toy; the models run in turn, with random weights, so nothing is downloaded.

    Example: crosslmm bench --models CrossLMM-7B,LLaVA-OneVision-7B --frames 32,256 --output cost.json
    """
    import json

    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", frames):
        raise typer.BadParameter(f"--frames takes numbers from 1 on with commas between; got {frames!r}.")
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"--output must lie in a folder that exists; got {str(output)!r}.")
    with Steps() as steps:
        _import_package(steps)
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
        typer.echo("Not timed: that takes a GPU, or --size toy.", err=True)


@app.command()
def info(
    name: Annotated[
        str, typer.Argument(help="A checkpoint folder, a name on the Hub, or 2B, 7B, 7B-16.", show_default=False)
    ],
    memory: Annotated[float, typer.Option(min=0, help="Memory of the GPU, in GiB.")] = 24.0,
    context: Annotated[
        int | None, typer.Option(min=1, help="Positions of the context.", show_default="the checkpoint's")
    ] = None,
    fps: Annotated[float, typer.Option(min=0.001, help="Frames per second of the longest video.")] = 1.0,
    quantization: Annotated[
        Literal["nf4", "int8", "fp8"] | None,
        typer.Option(help="Count the language model's weights in 4 or 8 bits.", show_default="none"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count what a checkpoint is made of, what a frame costs, and how long a video may be.

    Loads no weights.

    Example: crosslmm info 7B --memory 80 --context 131072
    """
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm import CrossLMMConfig
        from transformers_crosslmm.asking.pictures import clock_time
        from transformers_crosslmm.checkpoints.inspect import count_costs, load_config
        from transformers_crosslmm.configuration_crosslmm import PRESETS

        steps.begin("Counting")
        config = CrossLMMConfig.from_preset(name) if name in PRESETS else load_config(name)
        costs = count_costs(config, quantization=quantization)
    context = context or costs.max_positions
    in_context = costs.frames_in_context(context)
    in_memory = {form: costs.frames_in_memory(form, memory * 2**30) for form in costs.cache_bytes_per_frame}
    longest = {form: min(in_context, frames) / fps for form, frames in in_memory.items()}
    dtype = str(costs.dtype).removeprefix("torch.")
    if quantization:
        dtype += f", the language model's linear layers in {quantization}"
    if as_json:
        _print_json(
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
    typer.echo(f"{'together':<24}{sum(costs.parts.values()):>16,} parameters, {_size(costs.weight_bytes)} in {dtype}")
    typer.echo(f"\nA frame takes {costs.tokens_per_frame} of {context:,} positions, and in the cache")
    for form, size in costs.cache_bytes_per_frame.items():
        typer.echo(
            f"  {form:<12}{_size(size):>9}, and {_size(costs.language_bytes_per_frame)} of the language model's"
        )
    typer.echo(f"\nLongest video at {fps:g} fps, with {costs.text_tokens(context)} positions left for text")
    for limit, count in {"context": in_context, **{f"memory, {form}": n for form, n in in_memory.items()}}.items():
        typer.echo(f"  {limit:<18}{count:>9,} frames{clock_time(count / fps):>14}")
    both = ", ".join(f"{clock_time(seconds)} with {form}" for form, seconds in longest.items())
    typer.echo(f"So at most {both}.")
    typer.echo(f"Memory: {memory:g} GiB less the weights, at the end of the prefill. Temporary memory comes on top.")


FIELDS_BY_NAME = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Lets config fields through, which the package knows and this file does not."""

Out = Annotated[Path, typer.Option(help="Folder for the new checkpoint.", show_default=False)]
Vision = Annotated[str | None, typer.Option(help="Vision encoder, a folder or a name on the Hub.", show_default=False)]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Type of the weights. float16 ends at 65,504, which some language models come near.",
        show_default="the language model's",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the checkpoint that the folder holds.")]
PushToHub = Annotated[
    str | None, typer.Option(help="Then publish it as YOU/NAME, as `crosslmm push` does.", show_default=False)
]
Private = Annotated[bool, typer.Option("--private", help="On the Hub, for you alone.")]
Untrained = Annotated[bool, typer.Option("--untrained", help="Publish what was never trained, and say so.")]


@app.command(context_settings=FIELDS_BY_NAME)
def compose(
    context: typer.Context,
    out: Out,
    preset: Annotated[
        Literal["2B", "7B", "7B-16"] | None,
        typer.Option(help="A size of the paper: its backbones and pooled grid.", show_default=False),
    ] = None,
    vision: Vision = None,
    text: Annotated[
        str | None, typer.Option(help="Language model, a folder or a name on the Hub.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Its tokenizer.", show_default="with the language model")
    ] = None,
    flavour: Annotated[
        Literal["paper", "recommended"], typer.Option(help="The paper's options, or those we recommend.")
    ] = "paper",
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Qwen2.5: 131,072 positions by YaRN instead of 32,768.")
    ] = False,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    force: Force = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    untrained: Untrained = False,
) -> None:
    """Put a CrossLMM to train together, from a vision encoder and a language model.

    A SigLIP, SigLIP2, CLIP, DINOv2 or DINOv3; and a Qwen2, Qwen3, Llama, Mistral, SmolLM3 or any decoder that the
    cross-attention fits into. The tokenizer stays what it is, and the chat template where there is one.
    Its gates are 0: until it is trained it answers as its language model does, and says nothing about the video.
    Config fields go by their names, such as --pooled-grid-size 1 or --v2v-scope frame.

    Example: crosslmm compose --preset 2B --flavour recommended --out crosslmm-2b
    """
    with Steps() as steps:
        _import_package(steps, with_bars=True)
        from transformers_crosslmm.checkpoints import commands
        from transformers_crosslmm.checkpoints.compose import compose
    fields = _config_fields(context)

    def plan() -> Any:
        return compose(
            vision,
            text,
            preset=preset,
            flavour=flavour,
            long_context=long_context,
            tokenizer=tokenizer,
            dtype=dtype,
            seed=seed,
            **fields,
        )

    for line in commands.write(plan, out, force=force, push_to_hub=push_to_hub, private=private, untrained=untrained):
        typer.echo(line)


@app.command(context_settings=FIELDS_BY_NAME)
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="The checkpoint, a folder or a name on the Hub.", show_default=False)],
    out: Out,
    name_table: Annotated[
        Path | None,
        typer.Option(help="JSON: names of the cross-attention, {theirs: ours or null}.", show_default=False),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="From ours to LLaVA-NeXT's layout, as it was before.")
    ] = False,
    vision: Vision = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Of new weights.", show_default="0")] = None,
    force: Force = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    untrained: Untrained = False,
) -> None:
    """Take over a CrossLMM trained in LLaVA-NeXT's code base, bit for bit, or begin one from a LLaVA.

    A LLaVA-OneVision or LLaVA-Video, in Transformers' form or LLaVA-NeXT's, gives its encoder, projector and language
    model to a CrossLMM to train. Config fields go by their names, such as --pooled-grid-size 3.

    Example: crosslmm convert lmms-lab/LLaVA-Video-7B-Qwen2 --pooled-grid-size 3 --out crosslmm-7b
    """
    with Steps() as steps:
        _import_package(steps, with_bars=True)
        from transformers_crosslmm.checkpoints import commands, llava, name_tables
    fields = _config_fields(context)
    if reverse and (push_to_hub or fields or vision or dtype or seed is not None):
        raise typer.BadParameter(
            "--reverse writes LLaVA-NeXT's layout as it is. Of the options only --name-table and --force go with it."
        )
    table = name_tables.read_name_table(name_table) if name_table else None
    if reverse:
        report = llava.crosslmm_to_llava_next(source, out, name_table=table, force=force)
        lines = commands.report_lines(report, out)
    else:

        def plan() -> Any:
            return commands.plan_conversion(source, name_table=table, vision=vision, dtype=dtype, seed=seed, **fields)

        lines = commands.write(plan, out, force=force, push_to_hub=push_to_hub, private=private, untrained=untrained)
    for line in lines:
        typer.echo(line)


def _config_fields(context: typer.Context) -> dict[str, Any]:
    """The config fields among a command's words; anything else there is wrong usage."""
    from transformers_crosslmm.checkpoints.commands import config_fields

    try:
        return config_fields(context.args)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder: model and processor.")],
    repo: Annotated[str, typer.Argument(help="Name of the repository on the Hub, YOU/NAME.")],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, in a repository that may exist.")] = None,
    with_code: Annotated[bool, typer.Option("--with-code", help="Loads without the package as well.")] = False,
    untrained: Untrained = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and their sizes.")] = False,
) -> None:
    """Publish a checkpoint on the Hub: everything in one commit, or nothing.

    Example: crosslmm push runs/mine YOU/NAME --private
    """
    with Steps() as steps:
        _import_package(steps, with_bars=True)
    from transformers_crosslmm.checkpoints.publish import files_to_publish
    from transformers_crosslmm.checkpoints.publish import push as push_folder

    def list_files(files: list) -> None:
        for file in files:
            typer.echo(f"{file.size:>16,} B  {file.path}", err=not dry_run)
        typer.echo(f"{sum(file.size for file in files):>16,} B  in {len(files)} files, for {repo}", err=not dry_run)

    options: dict[str, Any] = {"with_code": with_code, "untrained": untrained}
    if dry_run:
        list_files(files_to_publish(folder, repo, **options))
        typer.echo("Nothing was sent.")
        return
    typer.echo(push_folder(folder, repo, private=private, revision=revision, on_files=list_files, **options))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file of options, or stage1_pretrain, stage2_instruct, adapt.")],
) -> None:
    """Train, or go on where the same command stopped.

    A recipe is a YAML file of options; options behind it win. They are those of Transformers' TrainingArguments (such
    as --output_dir, --learning_rate, --max_steps, --report_to) and ours: --model to begin with, --train_data,
    --media_root, --streaming; --num_frames, --fps, --max_frames of a video; --unusable samples (raise or skip),
    --max_length; --trained_parts, --gate_learning_rate, --vision_learning_rate, --language_model_learning_rate,
    --global_batch_size, --attn_implementation. What each means:
    python -m transformers_crosslmm.training.trainer --help

    Example: crosslmm train adapt --model MODEL --train_data chats.jsonl --media_root videos --output_dir runs/mine
    """
    with Steps() as steps:
        _import_package(steps, with_bars=True)
        from transformers_crosslmm.training.trainer import main

    main([recipe, *context.args])


data = typer.Typer(no_args_is_help=True, help="Look at training data.")
app.add_typer(data, name="data")


@data.command()
def check(
    path: Annotated[str, typer.Argument(help="What --train_data names: .json, .jsonl, .yaml, or a dataset.")],
    media_root: Annotated[str | None, typer.Option(help="Folder that the names of media files begin in.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode all media too, as training would.")] = False,
    model: Model = None,
) -> None:
    """List the broken records, with file and line, and media files that do not exist.

    With --decode also those whose media do not decode; the frames are those that --model samples. With --model it
    warns if the model's tokenizer spells the words of the answers byte by byte.

    Example: crosslmm data check mixture.yaml --media-root videos
    """
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.training.datasets import find_broken, spelled_words
        from transformers_crosslmm.training.records import load_records

        records = load_records(path)
        if len(records) == 0:
            raise ValueError(f"{path} holds no records.")
        steps.begin(f"Checking {len(records):,} records")
        num_broken = 0
        processor = None
        if decode or model is not None:
            from transformers_crosslmm.checkpoints.load import load_processor

            processor = load_processor(_checkpoint(model))
        for line in find_broken(records, media_root, decode_with=processor if decode else None):
            typer.echo(line)
            num_broken += 1
        spelled, words = spelled_words(records, processor.tokenizer) if model is not None else (0, 0)
    if spelled > words / 4:
        typer.echo(
            f"warning: {model} spells {spelled:,} of {words:,} words of the answers byte by byte, and will hardly "
            "learn them. Compose a model with a language model that knows them (docs/fine-tune.md).",
            err=True,
        )
    typer.echo(f"{len(records):,} records, {num_broken:,} broken", err=True)
    if num_broken:
        raise typer.Exit(1)


@app.command()
def serve(
    model: ServedModel = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's are not safe.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    allowed_folder: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Requests may name videos in it by path. May be given again.",
            show_default="none",
        ),
    ] = None,
    allow_private_urls: Annotated[
        bool, typer.Option("--allow-private-urls", help="Fetch videos from this machine and private networks too.")
    ] = False,
    max_running: Annotated[int, typer.Option(min=1, help="Requests whose videos may be in memory at once.")] = 2,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; the next is told to retry.")] = 16,
    max_frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames that a request may have.", show_default="the checkpoint's limit"),
    ] = None,
    max_new_tokens: NewTokens = 1024,
    max_body_mib: Annotated[float, typer.Option(min=0.01, help="Largest request, with the videos in it.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 300,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for what is remembered of videos.")] = 4,
    cache_entries: Annotated[int, typer.Option(min=0, help="Most things remembered of videos.")] = 64,
    device: Device = None,
) -> None:
    """Answer OpenAI's chat requests about videos over HTTP.

    Example: crosslmm serve runs/mine --allowed-folder /data/videos
    """
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.serving import server
    server.serve(
        server.ServerSettings(
            _checkpoint(model),
            device=device,
            host=host,
            port=port,
            allowed_folders=tuple(allowed_folder or ()),
            allow_private_urls=allow_private_urls,
            max_running=max_running,
            max_waiting=max_waiting,
            max_frames=max_frames,
            max_new_tokens=max_new_tokens,
            max_body_bytes=int(max_body_mib * 2**20),
            request_seconds=timeout,
            cache_bytes=int(cache_gib * 2**30),
            cache_entries=cache_entries,
        )
    )


@app.command()
def demo(
    model: ServedModel = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; at others than this machine's, whoever reaches it may upload.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, show_default="a free one from 7860 on")] = None,
    device: Device = None,
) -> None:
    """Open a web page that answers questions about uploaded videos and shows where the model looked.

    Example: crosslmm demo runs/mine
    """
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.asking.web_page import build_page, serve_page

        steps.begin("Loading the model")
        page = build_page(_checkpoint(model), device=device)
    serve_page(page, host=host, port=port)


def _import_package(steps: Steps, *, with_bars: bool = False) -> None:
    """The seconds that importing takes, and what libraries would say on the way.

    with_bars: leave the libraries their progress bars, on a terminal; the command then draws none itself.
    """
    import gc
    import warnings

    steps.begin("Importing")
    gc.disable()  # a third of the time would go into looking for garbage, of which imports leave next to none
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    import transformers_crosslmm  # noqa: F401

    gc.freeze()
    gc.enable()
    if not (with_bars and steps.progress.console.is_terminal):  # not stderr itself, which a live progress replaces
        logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # it counts its retries aloud
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def _checkpoint(model: str | None) -> str:
    from transformers_crosslmm import TINY_CHECKPOINT

    if model is not None:
        return model
    if not TINY_CHECKPOINT.is_dir():
        raise FileNotFoundError(f"The package comes without its checkpoint {TINY_CHECKPOINT}; name one with --model.")
    return str(TINY_CHECKPOINT)


def _check_picture(path: Path) -> None:
    """Tells before the work what would keep a picture from being written after it."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"A picture's name ends in .png, .jpg or the like; got {str(path)!r}.")
    if not path.parent.is_dir():
        raise typer.BadParameter(
            f"There is no folder {str(path.parent)!r} to write {path.name!r} into. Make it first."
        )


def _check_video(video: str) -> None:
    """Raises OSError for a path that leads nowhere, before the import that would take seconds to say so."""
    if ":" not in video:  # no URL
        os.stat(video)


def _sampling(
    *, frames: int | None, fps: float | None, start: float | None, end: float | None
) -> dict[str, int | float]:
    """The video processor's words for our options, those that were given."""
    if frames is not None and fps is not None:
        raise typer.BadParameter("--frames and --fps exclude each other; give one.")
    named = {"num_frames": frames, "fps": fps, "start_seconds": start, "end_seconds": end}
    return {name: value for name, value in named.items() if value is not None}


def _conversation(steps: Steps, video: str, model: str | None, device: str | None, **sampling: Any) -> Any:
    """A `VideoConversation` about the video, which is checked and read before the model is loaded."""
    wanted = _sampling(**sampling)
    _check_video(video)
    _import_package(steps)
    from transformers_crosslmm.asking.conversation import VideoConversation, read_video
    from transformers_crosslmm.checkpoints.load import load_model, load_processor

    checkpoint = _checkpoint(model)
    processor = load_processor(checkpoint)
    steps.begin(f"Reading {video}")
    seen = read_video(processor, video, **wanted)
    steps.begin("Loading the model")
    loaded = load_model(checkpoint, device=device)
    steps.begin("Looking at the frames")
    return VideoConversation(loaded, processor, seen, on_progress=steps.count)


def _printer(steps: Steps) -> Any:
    """What prints the pieces of an answer as they come, once nothing else writes to the terminal."""

    def write(piece: str) -> None:
        steps.end()
        typer.echo(piece, nl=False)
        sys.stdout.flush()

    return write


def _print_json(record: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(record, ensure_ascii=False))


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


if __name__ == "__main__":
    app()
