"""One person and one video: ask, chat, watch, look, demo."""

import contextlib
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from .base import (
    AsJson,
    Device,
    End,
    Fps,
    Frames,
    Model,
    ModelArgument,
    NewTokens,
    Start,
    Steps,
    Timestamps,
    Video,
    VideoIfAny,
    app,
    check_picture,
    check_video,
    chosen_checkpoint,
    import_package,
    only_one_model,
    print_json,
    sampling_options,
)

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".ogv", ".vob", ".webm", ".wmv"),
)


@app.command()
def ask(
    video: VideoIfAny = None,
    question: Annotated[
        str | None, typer.Argument(help="A question; a video's frames count from 1.", show_default=False)
    ] = None,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    add_timestamps: Timestamps = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw each frame's attention weight for each answer token into this picture.")
    ] = None,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a video, or a question alone.

    Example: crosslmm ask clip.mp4 "In which frame does the red star appear?" --frames 8 --timeline looked.png
    """
    if question is None:
        video, question = None, video or ""  # one word of the command line is the question
    if not question.strip():
        raise typer.BadParameter("A question needs words; got none.")
    if video is None and names_a_video(question):
        raise typer.BadParameter(f"A video needs a question after it; got {question!r} alone.")
    if timeline is not None:
        check_picture(timeline)
    sampling = sampling_options(frames=frames, fps=fps, start=start, end=end)
    with Steps() as steps:
        needs_video = {"--timeline": timeline}
        conversation = begin_conversation(steps, video, model, device, add_timestamps, sampling, needs_video)
        steps.begin("Answering")
        answer = conversation.ask(
            question,
            max_new_tokens=max_new_tokens,
            on_text=None if as_json else printer(steps),
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
            "frame_times": conversation.video and conversation.video.times,
        }
        if answer.frame_weights is not None:
            record["frame_weights"] = answer.frame_weights.tolist()
        print_json(record)


@app.command()
def chat(
    video: VideoIfAny = None,
    model: Model = None,
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    add_timestamps: Timestamps = None,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
) -> None:
    """Ask several questions about a video, which is encoded once. Each line is a question; Ctrl-D ends, and on a
    terminal `exit`.

    Example: crosslmm chat lecture.mp4 --fps 1 --start 60 --end 600
    """
    sampling = sampling_options(frames=frames, fps=fps, start=start, end=end)
    with Steps() as steps:
        conversation = begin_conversation(steps, video, model, device, add_timestamps, sampling)
    is_person = sys.stdin.isatty()
    if is_person:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (gives input() line editing)
        hint = "Ask a question; Ctrl-D or exit ends."
        if conversation.video is not None:
            hint = f"{conversation.video.num_frames} frames encoded, counted from 1. {hint}"
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
                conversation.ask(question, max_new_tokens=max_new_tokens, on_text=printer(steps))
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
    add_timestamps: Timestamps = None,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
) -> None:
    """Watch a video that goes on, and answer what you type meanwhile. A line is a question; Ctrl-D ends.

    Only the newest frames are looked at where the model is too slow for all of them, and the oldest are forgotten; the
    state says how many. Each question stands alone.

    Example: crosslmm watch rtsp://192.168.1.20/stream1 --allow-network
    """
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.asking.live import LiveVideo, most_frames
        from transformers_crosslmm.asking.live_source import LiveSource
        from transformers_crosslmm.asking.watch import watch as go_on
        from transformers_crosslmm.checkpoints.load import load_model, load_processor

        checkpoint = chosen_checkpoint(model)
        processor = load_processor(checkpoint, add_timestamps=add_timestamps)
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
    """Draw the frames that the model would get, with their times, and count how many differ from the one before.

    Example: crosslmm look clip.mp4 --frames 16 --out frames.png
    """
    check_picture(out)
    check_video(video)
    wanted = sampling_options(frames=frames, fps=fps, start=start, end=end)
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.asking.conversation import read_video
        from transformers_crosslmm.asking.pictures import draw_contact_sheet, frame_labels, stream_pictures
        from transformers_crosslmm.checkpoints.load import load_processor

        processor = load_processor(chosen_checkpoint(model))
        steps.begin(f"Reading {video}")
        seen = read_video(processor, video, **wanted)
        pictures = stream_pictures(seen, processor.video_processor)
    labels = frame_labels(len(pictures), seen.times)
    draw_contact_sheet(pictures, labels).save(out)
    distinct = sum(1 for _ in groupby(picture.tobytes() for picture in pictures))
    if as_json:
        print_json({"video": video, "frame_times": seen.times, "distinct_frames": distinct, "picture": str(out)})
    else:
        moments = labels if len(labels) <= 8 else [*labels[:3], "…", labels[-1]]
        typer.echo(f"{out}: {len(pictures)} frames, {distinct} of them distinct, at {', '.join(moments)}")


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
    add_timestamps: Timestamps = None,
    device: Device = None,
) -> None:
    """Open a web page for questions about uploaded videos, with the attention weights of their frames.

    Example: crosslmm demo --model runs/mine
    """
    model = only_one_model(model, name)
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.asking.web_page import build_page, serve_page

        steps.begin("Loading the model")
        page = build_page(chosen_checkpoint(model), device=device, add_timestamps=add_timestamps)
    serve_page(page, host=host, port=port)


def names_a_video(words: str) -> bool:
    """Whether this is the name of a file, an address alone, or ends as videos' names do."""
    is_address = "://" in words and len(words.split()) == 1
    return is_address or words.lower().endswith(VIDEO_SUFFIXES) or os.path.exists(words)


def begin_conversation(
    steps: Steps,
    video: str | None,
    model: str | None,
    device: str | None,
    add_timestamps: bool | None,
    sampling: dict[str, Any],
    needs_video: dict[str, Any] | None = None,
) -> Any:
    """A `VideoConversation` about the video, which is opened before the model is loaded, or without one.

    needs_video: further options that are refused without a video, by name.
    """
    if video is not None:
        check_video(video)
    else:
        named = {"--frames": "num_frames", "--fps": "fps", "--start": "start_seconds", "--end": "end_seconds"}
        given = {option: sampling.get(name) for option, name in named.items()}
        given |= {"--add-timestamps": add_timestamps} | (needs_video or {})
        if refused := [option for option, value in given.items() if value is not None]:
            raise typer.BadParameter(f"{', '.join(refused)}: only with a video; there is none before the question.")
    import_package(steps)
    from transformers_crosslmm.asking.conversation import VideoConversation, read_video
    from transformers_crosslmm.checkpoints.load import load_model, load_processor

    checkpoint = chosen_checkpoint(model)
    processor = load_processor(checkpoint, add_timestamps=add_timestamps)
    seen = None
    if video is not None:
        steps.begin(f"Reading {video}")
        seen = read_video(processor, video, **sampling)
    steps.begin("Loading the model")
    loaded = load_model(checkpoint, device=device)
    if video is not None:
        steps.begin("Encoding frames")
    return VideoConversation(loaded, processor, seen, on_progress=steps.count)


def printer(steps: Steps) -> Any:
    """A function that ends `steps` and prints a piece of an answer at once."""

    def write(piece: str) -> None:
        steps.end()
        typer.echo(piece, nl=False)
        sys.stdout.flush()

    return write
