"""Many questions and many people: batch, serve."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

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
    app,
    chosen_checkpoint,
    import_package,
    only_one_model,
    print_json,
    sampling_options,
)


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
    add_timestamps: Timestamps = None,
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
    wanted = sampling_options(frames=frames, fps=fps, start=start, end=end)
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.serving.corpus import answer_corpus

        steps.begin("Answering")
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints the deaths of workers
            report = answer_corpus(
                questions,
                out,
                root=root,
                model=chosen_checkpoint(model),
                engine=engine,  # type: ignore[arg-type]
                workers=workers,
                cpus_per_worker=cpus_per_worker,
                device=device,
                add_timestamps=add_timestamps,
                max_new_tokens=max_new_tokens,
                retry_errors=retry_errors,
                on_progress=steps.count,
                **wanted,
            )
    if as_json:
        print_json(vars(report))
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
    add_timestamps: Timestamps = None,
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
    model = only_one_model(model, name)
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.serving import server
    server.serve(
        server.ServerSettings(
            chosen_checkpoint(model),
            device=device,
            host=host,
            port=port,
            allowed_folders=tuple(allowed_folder or ()),
            allow_private_urls=allow_private_urls,
            max_running=max_running,
            max_waiting=max_waiting,
            max_frames=max_frames,
            add_timestamps=add_timestamps,
            max_new_tokens=max_new_tokens,
            max_body_bytes=int(max_body_mib * 2**20),
            request_seconds=timeout,
            cache_bytes=int(cache_gib * 2**30),
            cache_entries=cache_entries,
        )
    )
