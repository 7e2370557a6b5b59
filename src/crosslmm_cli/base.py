"""What every command uses: exit codes, shared options, progress, the late import of the package."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

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
VideoIfAny = Annotated[
    str | None,
    typer.Argument(help="A video file or URL; without it the language model answers alone.", show_default=False),
]
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
Timestamps = Annotated[
    bool | None,
    typer.Option(
        "--add-timestamps/--no-add-timestamps",
        help="Write each frame's time before it, for models that were trained so.",
        show_default="the checkpoint's setting",
    ),
]
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


def import_package(steps: Steps, *, with_bars: bool = False) -> None:
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


def only_one_model(model: str | None, name: str | None) -> str | None:
    """The model of `--model MODEL` or of the argument `MODEL`, which exclude each other."""
    if model is not None and name is not None:
        raise typer.BadParameter(f"Name one model; got {name!r} and --model {model!r}.")
    return model if name is None else name


def chosen_checkpoint(model: str | None) -> str:
    """The model named, or the package's tiny checkpoint."""
    from transformers_crosslmm import TINY_CHECKPOINT

    if model is not None:
        return model
    if not TINY_CHECKPOINT.is_dir():
        raise FileNotFoundError(f"This install lacks the checkpoint {TINY_CHECKPOINT}; name another with --model.")
    return str(TINY_CHECKPOINT)


def check_picture(path: Path) -> None:
    """Raises before the work if a picture could not be written to this path."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"A picture's name ends in .png, .jpg or the like; got {str(path)!r}.")
    if not path.parent.is_dir():
        raise typer.BadParameter(
            f"There is no folder {str(path.parent)!r} to write {path.name!r} into. Make it first."
        )


def check_video(video: str) -> None:
    """Raises OSError for a path that does not exist, before the import, which takes seconds."""
    if ":" not in video:  # not a URL
        os.stat(video)


def sampling_options(
    *, frames: int | None, fps: float | None, start: float | None, end: float | None
) -> dict[str, int | float]:
    """The options that were given, under the video processor's names."""
    if frames is not None and fps is not None:
        raise typer.BadParameter("--frames and --fps exclude each other; give one.")
    named = {"num_frames": frames, "fps": fps, "start_seconds": start, "end_seconds": end}
    return {name: value for name, value in named.items() if value is not None}


def print_json(record: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(record, ensure_ascii=False))
