"""The `crosslmm` command. Each command imports the package, which takes seconds, only when it runs."""

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
    """Turns the errors of every command into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except KeyboardInterrupt:
            typer.echo("\nInterrupted.", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of stdout has ended, such as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it exits
            raise typer.Exit(141) from None
        except Exception as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {_reason(error)} (`crosslmm --debug …` shows the traceback.)", err=True)
            raise typer.Exit(1) from error


def _reason(error: Exception) -> str:
    """The message of an error in one line. Messages of the package's own errors keep their line breaks."""
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
    typer.Option(help="A checkpoint folder, or its name on the Hub.", show_default="the package's tiny checkpoint"),
]
ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help="Short for --model.", show_default=False)]
Frames = Annotated[int | None, typer.Option(min=1, help="Use this many frames, at equal intervals.")]
Fps = Annotated[
    float | None, typer.Option(min=0.001, help="Use this many frames per second, up to the checkpoint's limit.")
]
Start = Annotated[float | None, typer.Option(min=0, help="Begin at this second of the video.")]
End = Annotated[float | None, typer.Option(min=0, help="End at this second of the video.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="a GPU if there is one")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class Counted(MofNCompleteColumn):
    """Shows the count of a step whose total is known, and nothing for other steps."""

    def render(self, task: Any) -> Any:
        return super().render(task) if task.total else ""


class Steps:
    """Shows the step that is running, if stderr is a terminal."""

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
    """CrossLMM: ask questions about long videos.

    Exit codes: 0 done; 1 failed, with the reason and a remedy on stderr; 2 wrong usage;
    130 interrupted; 141 the reader of the output has ended.
    """


@app.command()
def ask(
    video: Video,
    question: Annotated[str, typer.Argument(help="A question about it; frames count from 1.", show_default=False)],
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw each frame's attention weight for each answer token into this picture.")
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
            typer.echo(f"Attention weights by frame: {timeline}", err=True)
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
    """Ask several questions about a video, which is encoded once. Each line is a question; Ctrl-D or `exit` ends.

    Example: crosslmm chat lecture.mp4 --fps 1 --start 60 --end 600
    """
    with Steps() as steps:
        conversation = _conversation(steps, video, model, device, frames=frames, fps=fps, start=start, end=end)
    is_person = sys.stdin.isatty()
    if is_person:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (gives input() line editing)
        hint = f"{conversation.video.num_frames} frames encoded, counted from 1. Ask a question; Ctrl-D or exit ends."
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
            except ValueError as error:  # raised before any text; the conversation can continue
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
        typer.Argument(help='JSON lines: {"video": …, "question": …}, optionally with "id".', show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the answers (Parquet files); give it again to resume.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the videos.", show_default="the questions' folder")
    ] = None,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    max_new_tokens: NewTokens = 256,
    engine: Annotated[
        str, typer.Option(help="ray (cluster of RAY_ADDRESS, or this machine), vllm (Ray with vLLM) or local.")
    ] = "ray",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers.", show_default="one per GPU, or else by CPUs")
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="CPUs of each Ray worker.")] = 1,
    device: Device = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask questions again that have an error instead of an answer.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a file of questions about many videos. Each video is decoded and encoded once.

    The same command resumes a stopped run and keeps its answers. A video that fails gives rows with its error.

    Example: crosslmm batch questions.jsonl --out answers/ --frames 64 --workers 8
    """
    wanted = _sampling(frames=frames, fps=fps, start=start, end=end)
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.serving.corpus import answer_corpus

        steps.begin("Answering")
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints the deaths of workers
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
        f"before; {report.failed} have an error instead of an answer"
    )
    if report.failed == report.questions and report.first_error:
        typer.echo(f"All of them failed. The first error: {report.first_error}", err=True)
    if report.duplicates:
        typer.echo(f"{report.duplicates} lines repeat an earlier question, which was asked once.")


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
    max_new_tokens: NewTokens = 64,
    device: Device = None,
    show_wrong: Annotated[bool, typer.Option("--show-wrong", help="Print the questions with wrong answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model's accuracy on your own questions and answers.

    An answer is right if it equals the given one, ignoring case, surrounding space and a final full stop.

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
    """Draw the frames that the model would get, with their times.

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
    import json

    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", frames):
        raise typer.BadParameter(f"--frames takes positive numbers, separated by commas; got {frames!r}.")
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"--output must be in a folder that exists; got {str(output)!r}.")
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
        typer.echo("Times need a GPU, or --size toy.", err=True)


@app.command()
def info(
    name: ModelArgument = None,
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
    as_json: AsJson = False,
) -> None:
    """Count a checkpoint's parameters, its memory per frame, and the longest video that fits.

    Nothing is loaded but the config. MODEL may also be a size of the paper: 2B, 7B or 7B-16.

    Example: crosslmm info 7B --memory 80 --context 131072
    """
    model = _only(model, name)
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm import CrossLMMConfig
        from transformers_crosslmm.asking.pictures import clock_time
        from transformers_crosslmm.checkpoints.inspect import count_costs, load_config
        from transformers_crosslmm.configuration_crosslmm import PRESETS

        steps.begin("Counting")
        config = CrossLMMConfig.from_preset(model) if model in PRESETS else load_config(_checkpoint(model))
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
    typer.echo(f"\nA frame takes {costs.tokens_per_frame} of {context:,} positions, and in the caches")
    for form, size in costs.cache_bytes_per_frame.items():
        typer.echo(
            f"  {form:<12}{_size(size):>9}, and {_size(costs.language_bytes_per_frame)} in the language model's own"
        )
    typer.echo(f"\nLongest video at {fps:g} fps, with {costs.text_tokens(context)} positions left for text")
    for limit, count in {"context": in_context, **{f"memory, {form}": n for form, n in in_memory.items()}}.items():
        typer.echo(f"  {limit:<18}{count:>9,} frames{clock_time(count / fps):>14}")
    both = ", ".join(f"{clock_time(seconds)} with {form}" for form, seconds in longest.items())
    typer.echo(f"So at most {both}.")
    typer.echo(f"Memory: {memory:g} GiB less the weights, at the end of the prefill. Activations are not counted.")


FIELDS_BY_NAME = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Lets config fields through; `_config_fields` checks them, so that --help need not import the package."""

Out = Annotated[Path, typer.Option(help="Folder for the new checkpoint.", show_default=False)]
Vision = Annotated[str | None, typer.Option(help="Vision encoder: a folder or a name on the Hub.", show_default=False)]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Type of the weights. Activations of some language models come near float16's largest number, 65,504.",
        show_default="the language model's",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the checkpoint in the folder.")]
PushToHub = Annotated[
    str | None, typer.Option(help="Then publish it as YOU/NAME, as `crosslmm push` does.", show_default=False)
]
Private = Annotated[bool, typer.Option("--private", help="Make a private repository.")]
Untrained = Annotated[bool, typer.Option("--untrained", help="Publish untrained weights; the card says so.")]


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
        str | None, typer.Option(help="Language model: a folder or a name on the Hub.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or a name on the Hub.", show_default="the language model's")
    ] = None,
    flavour: Annotated[
        Literal["paper", "recommended"], typer.Option(help="The paper's options, or those we recommend.")
    ] = "paper",
    long_context: Annotated[
        bool, typer.Option("--long-context", help="For Qwen2.5: 131,072 positions by YaRN instead of 32,768.")
    ] = False,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    force: Force = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    untrained: Untrained = False,
) -> None:
    """Compose a CrossLMM from a vision encoder and a language model, to be trained.

    The encoder is a SigLIP, SigLIP2, CLIP, DINOv2 or DINOv3; the language model a Qwen2, Qwen3, Llama, Mistral,
    SmolLM3 or another decoder that the cross-attention fits into. The tokenizer and its chat template are kept.
    All gates are 0: before training, the answers are the language model's own and say nothing about the video.
    Config fields are options too, such as --pooled-grid-size 1 or --v2v-scope frame.

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
    source: Annotated[str, typer.Argument(help="The checkpoint: a folder or a name on the Hub.", show_default=False)],
    out: Out,
    name_table: Annotated[
        Path | None,
        typer.Option(help="JSON of the tensors' names, {theirs: ours, or null to leave out}.", show_default=False),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Write a CrossLMM checkpoint in LLaVA-NeXT's layout.")
    ] = False,
    vision: Vision = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the new weights.", show_default="0")] = None,
    force: Force = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    untrained: Untrained = False,
) -> None:
    """Convert a CrossLMM trained in LLaVA-NeXT's code base, bit for bit, or start a CrossLMM from a LLaVA.

    A LLaVA-OneVision or LLaVA-Video, in Transformers' format or LLaVA-NeXT's, gives its encoder, projector and
    language model to a CrossLMM to be trained. Config fields are options too, such as --pooled-grid-size 3.

    Example: crosslmm convert lmms-lab/LLaVA-Video-7B-Qwen2 --pooled-grid-size 3 --out crosslmm-7b
    """
    with Steps() as steps:
        _import_package(steps, with_bars=True)
        from transformers_crosslmm.checkpoints import commands, llava, name_tables
    fields = _config_fields(context)
    if reverse and (push_to_hub or fields or vision or dtype or seed is not None):
        raise typer.BadParameter(
            "--reverse changes nothing but the layout: only --name-table and --force can be given with it."
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
    """The config fields among a command's unparsed arguments. Anything else there is wrong usage."""
    from transformers_crosslmm.checkpoints.commands import config_fields

    try:
        return config_fields(context.args)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder, with model and processor.")],
    repo: Annotated[str, typer.Argument(help="Name of the repository on the Hub, YOU/NAME.")],
    private: Private = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, such as main. Needed if the repository exists.")
    ] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the model's code, for loading without the package.")
    ] = False,
    untrained: Untrained = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and their sizes.")] = False,
) -> None:
    """Publish a checkpoint on the Hub, in one commit or not at all.

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
    """Train a model, or resume where the same command stopped.

    A recipe is a YAML file of options; options after the recipe override it. They are those of Transformers'
    TrainingArguments (such as --output_dir, --learning_rate, --max_steps, --report_to) and these: --model (the first
    checkpoint), --train_data, --media_root, --streaming; --num_frames, --fps and --max_frames of each video;
    --unusable (raise or skip), --max_length; --trained_parts, --gate_learning_rate, --vision_learning_rate,
    --language_model_learning_rate, --global_batch_size, --attn_implementation. To have them explained:
    python -m transformers_crosslmm.training.trainer --help

    Example: crosslmm train adapt --model MODEL --train_data chats.jsonl --media_root videos --output_dir runs/mine
    """
    with Steps() as steps:
        _import_package(steps, with_bars=True)
        from transformers_crosslmm.training.trainer import main

    main([recipe, *context.args])


data = typer.Typer(no_args_is_help=True, help="Check training data.")
app.add_typer(data, name="data")


@data.command()
def check(
    path: Annotated[str, typer.Argument(help="The value of --train_data: a .json, .jsonl or .yaml, or a dataset.")],
    media_root: Annotated[str | None, typer.Option(help="Folder that media file names are relative to.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode all media too, as training would.")] = False,
    model: Model = None,
) -> None:
    """List broken records with file and line, and media files that do not exist.

    With --decode, also list records whose media do not decode; frames are sampled by the processor of --model. With
    --model, warn if the tokenizer splits the answers' words into single bytes.

    Example: crosslmm data check mixture.yaml --media-root videos
    """
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.training.datasets import find_broken, spelled_words
        from transformers_crosslmm.training.records import load_records

        records = load_records(path)
        if len(records) == 0:
            raise ValueError(f"{path} has no records.")
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
    name: ModelArgument = None,
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Any but 127.0.0.1 lets other machines in, without a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    allowed_folder: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder whose videos requests may name by path. Can be given several times.",
            show_default="none",
        ),
    ] = None,
    allow_private_urls: Annotated[
        bool, typer.Option("--allow-private-urls", help="Fetch videos from this machine and private networks too.")
    ] = False,
    max_running: Annotated[int, typer.Option(min=1, help="Requests whose videos may be in memory at once.")] = 2,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones get a 429.")] = 16,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Most frames of a request.", show_default="the checkpoint's limit")
    ] = None,
    max_new_tokens: NewTokens = 1024,
    max_body_mib: Annotated[float, typer.Option(min=0.01, help="Largest request in MiB, videos included.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 300,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for encoded and prefilled videos, in GiB.")] = 4,
    cache_entries: Annotated[int, typer.Option(min=0, help="Most cached videos and prefills.")] = 64,
    device: Device = None,
) -> None:
    """Answer chat requests about videos over HTTP, in the form of OpenAI's API.

    Example: crosslmm serve --model runs/mine --allowed-folder /data/videos
    """
    model = _only(model, name)
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
    name: ModelArgument = None,
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. At all but 127.0.0.1, other machines may upload videos.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen at.", show_default="a free one from 7860 on")
    ] = None,
    device: Device = None,
) -> None:
    """Open a web page for questions about uploaded videos, with the attention weights of their frames.

    Example: crosslmm demo --model runs/mine
    """
    model = _only(model, name)
    with Steps() as steps:
        _import_package(steps)
        from transformers_crosslmm.asking.web_page import build_page, serve_page

        steps.begin("Loading the model")
        page = build_page(_checkpoint(model), device=device)
    serve_page(page, host=host, port=port)


def _import_package(steps: Steps, *, with_bars: bool = False) -> None:
    """Imports the package, shown as a step, and silences libraries.

    with_bars: keep the libraries' progress bars, on a terminal; the command must draw none itself.
    """
    import gc
    import warnings

    steps.begin("Importing")
    gc.disable()  # imports leave almost no garbage, and looking for it takes a third of the time
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    import transformers_crosslmm  # noqa: F401

    gc.freeze()
    gc.enable()
    if not (with_bars and steps.progress.console.is_terminal):  # a live progress replaces sys.stderr: ask the console
        logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # it logs every retry
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def _only(model: str | None, name: str | None) -> str | None:
    """The model of `--model MODEL` or of the argument `MODEL`, which exclude each other."""
    if model is not None and name is not None:
        raise typer.BadParameter(f"Name one model; got {name!r} and --model {model!r}.")
    return model if name is None else name


def _checkpoint(model: str | None) -> str:
    """The model named, or the package's tiny checkpoint."""
    from transformers_crosslmm import TINY_CHECKPOINT

    if model is not None:
        return model
    if not TINY_CHECKPOINT.is_dir():
        raise FileNotFoundError(f"This install lacks the checkpoint {TINY_CHECKPOINT}; name another with --model.")
    return str(TINY_CHECKPOINT)


def _check_picture(path: Path) -> None:
    """Raises before the work if a picture could not be written to this path."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"A picture's name ends in .png, .jpg or the like; got {str(path)!r}.")
    if not path.parent.is_dir():
        raise typer.BadParameter(
            f"There is no folder {str(path.parent)!r} to write {path.name!r} into. Make it first."
        )


def _check_video(video: str) -> None:
    """Raises OSError for a path that does not exist, before the import, which takes seconds."""
    if ":" not in video:  # not a URL
        os.stat(video)


def _sampling(
    *, frames: int | None, fps: float | None, start: float | None, end: float | None
) -> dict[str, int | float]:
    """The options that were given, under the video processor's names."""
    if frames is not None and fps is not None:
        raise typer.BadParameter("--frames and --fps exclude each other; give one.")
    named = {"num_frames": frames, "fps": fps, "start_seconds": start, "end_seconds": end}
    return {name: value for name, value in named.items() if value is not None}


def _conversation(steps: Steps, video: str, model: str | None, device: str | None, **sampling: Any) -> Any:
    """A `VideoConversation` about the video. The video is opened before the model is loaded."""
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
    steps.begin("Encoding frames")
    return VideoConversation(loaded, processor, seen, on_progress=steps.count)


def _printer(steps: Steps) -> Any:
    """A function that ends `steps` and prints a piece of an answer at once."""

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
