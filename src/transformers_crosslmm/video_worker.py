"""Decodes in a separate process with limited memory and time (`isolated=True`).

The caller's side is `read_video_in_worker`, the worker's side is `main`. The worker imports the standard library, PyAV
and the files in this folder, but not torch or Transformers, so it starts quickly and needs little memory.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import BinaryIO

import av

from .video_file import Picture
from .video_packets import Info, Request, read_video
from .video_source import (
    RAISE_LIMITS,
    WAIT_SECONDS,
    Clock,
    NoVideoStreamError,
    OnWait,
    VideoDecodeError,
    VideoError,
    VideoLimitError,
    VideoLimits,
    VideoOpenError,
    VideoTimeoutError,
)

_ERRORS = {
    kind.__name__: kind
    for kind in (VideoError, VideoOpenError, NoVideoStreamError, VideoLimitError, VideoTimeoutError, VideoDecodeError)
} | {"ValueError": ValueError}

_START = """
import importlib, sys, types
decoder = sys.modules["decoder"] = types.ModuleType("decoder")
decoder.__path__ = [sys.argv[1]]
sys.path.append(sys.argv[2])
importlib.import_module("decoder.video_worker").main(int(sys.argv[3]))
"""
"""Imports the worker as part of an empty package whose path is this folder, so that the package's own `__init__` does
not run. `python -I` ignores the current folder, PYTHONPATH and the user's settings."""


def read_video_in_worker(
    opened: BinaryIO, request: Request, limits: VideoLimits, num_threads: int, on_wait: OnWait | None = None
):
    """Runs `read_video` in a process that is killed if it exceeds `max_memory_bytes` or `max_decode_seconds`.

    The process gets only the open file. It returns pictures as bytes, each after a line of JSON.
    on_wait: called every `WAIT_SECONDS` while the call waits for the process; an exception from it ends both.
    """
    if sys.platform == "win32":
        raise NotImplementedError("`isolated=True` needs the resource limits of POSIX, which Windows lacks.")
    task = {"request": asdict(request), "limits": asdict(limits), "num_threads": num_threads}
    decoder, pyav = os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(av.__file__))
    with _as_real_file(opened) as file, tempfile.TemporaryFile("w+") as told:
        json.dump(task, told)
        told.seek(0)
        worker = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, decoder, pyav, str(file.fileno())],
            stdin=told,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[file.fileno()],
            env={},
        )
    clock = Clock(limits, on_wait)
    pipe = _Pipe(worker, clock)
    try:
        while "end" not in (header := json.loads(pipe.line())):
            if "error" in header:
                raise _ERRORS[header["error"]](header["message"])
            if "fps" in header:
                yield Info(**header)
                continue
            size = header.pop("size")
            height, line_size = header["height"], header["line_size"]
            if size and not 0 < 3 * header["width"] * height <= size == abs(line_size) * height:
                raise VideoDecodeError("The decoder process sent a picture of the wrong size.")
            header["orientation"] = tuple(header["orientation"])
            picture = Picture(pixels=memoryview(pipe.take(size)) if size else None, **header)
            with clock.paused():
                yield picture
        yield header["end"]
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


@contextmanager
def _as_real_file(opened: BinaryIO):
    """Yields a file that another process can read from its start; copies it if necessary."""
    opened.seek(0, os.SEEK_END)
    try:
        # A file that unpacks while it reads, such as gzip's, has the descriptor of the packed file.
        is_real = os.fstat(opened.fileno()).st_size == opened.tell()
    except (OSError, AttributeError):
        is_real = False
    opened.seek(0)
    if is_real:
        yield opened
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(opened, copy)
        copy.seek(0)
        yield copy


class _Pipe:
    """Reads the worker's output and checks the clock and the worker's end while it waits."""

    def __init__(self, worker: subprocess.Popen, clock: Clock):
        self._worker, self._clock = worker, clock
        self._poll = select.poll()  # `select.select` fails beyond 1,024 open files
        self._poll.register(worker.stdout, select.POLLIN)
        self._buffer = bytearray()

    def _more(self) -> None:
        while not self._poll.poll(1000 * min(self._clock.check(), WAIT_SECONDS)):
            pass
        piece = os.read(self._worker.stdout.fileno(), 1024**2)
        if not piece:
            status = self._worker.wait()
            if status == -signal.SIGXCPU:
                raise VideoTimeoutError(f"Decoding took longer than max_decode_seconds. {RAISE_LIMITS}")
            raise VideoDecodeError(f"The decoder process died on this video (status {status}).")
        self._buffer += piece

    def line(self) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > 2**16:
                raise VideoDecodeError("The decoder process sent no header.")
            self._more()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def take(self, size: int) -> bytearray:
        while len(self._buffer) < size:
            self._more()
        taken = self._buffer[:size]
        del self._buffer[:size]
        return taken


def main(descriptor: int) -> None:
    """The worker's side of `read_video_in_worker`: the file is open as `descriptor`, stdin has the task as JSON."""
    import resource

    task = json.load(sys.stdin)
    limits, request = VideoLimits(**task["limits"]), Request(**task["request"])
    resource.setrlimit(resource.RLIMIT_AS, (limits.max_memory_bytes, limits.max_memory_bytes))
    seconds = math.ceil(limits.max_decode_seconds * max(1, task["num_threads"])) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = sys.stdout.buffer

    def send(**header) -> None:
        out.write(json.dumps(header).encode() + b"\n")

    file = os.fdopen(descriptor, "rb", buffering=0)
    try:
        for item in read_video(file, request, limits, task["num_threads"]):
            if isinstance(item, Info):
                send(**asdict(item))
            elif isinstance(item, str):
                send(end=item)
            else:
                pixels = item.pixels or b""
                header = {field.name: getattr(item, field.name) for field in fields(item) if field.name != "pixels"}
                send(size=len(pixels), **header)
                out.write(pixels)
            out.flush()
    except ValueError as error:
        kind = type(error).__name__
        send(error=kind if kind in _ERRORS else "ValueError", message=str(error))
    except MemoryError:
        message = f"Decoding needs more than max_memory_bytes={limits.max_memory_bytes}. {RAISE_LIMITS}"
        send(error="VideoLimitError", message=message)
    out.flush()
