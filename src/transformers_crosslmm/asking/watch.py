"""`crosslmm watch`: shows the state of a live source in one line and answers typed questions meanwhile."""

import os
import queue
import shutil
import sys
import threading
import time

import torch

from ..video_source import VideoOpenError
from .live import LiveVideo
from .live_source import LiveSource
from .waiting_frames import WaitingFrames

STATE_SECONDS = 10.0
"""Time between two lines with the state, where stderr is not a terminal."""


def state(live: LiveVideo, source: LiveSource) -> str:
    """The line that says how many frames were seen, kept and dropped, and how the source is."""
    parts = [counts(live, source.waiting)]
    if source.num_damaged:
        parts.append(f"{source.num_damaged} packets damaged")
    if source.ending is not None:
        parts.append(f"ended{': ' * bool(source.ending)}{source.ending}")
    elif source.silent_seconds > 2:
        parts.append(f"silent for {source.silent_seconds:.0f} s")
    return ", ".join(parts)


def counts(live: LiveVideo, waiting: WaitingFrames, num_missed: int = 0) -> str:
    """num_missed: frames that were dropped before they could wait."""
    dropped, behind = waiting.num_dropped + num_missed, waiting.seconds_behind(live)
    return f"{live.num_seen} frames seen, {len(live.times)} kept, {dropped} dropped, {behind:.1f} s behind"


def watch(live: LiveVideo, source: LiveSource, *, max_new_tokens: int) -> None:
    """Feeds the source to the model and answers the lines of stdin until stdin ends.

    Ctrl-C ends the answer that is being written; between answers it ends the command.
    Raises VideoOpenError if the source ends before its first picture.
    """
    questions, screen = typed_lines(), Screen()
    while True:
        frames, times = source.waiting.take()
        if frames:
            live.add(torch.stack(frames), times)
        screen.show(state(live, source))
        if not live.num_seen:
            if source.ending is not None and not source.waiting.num_received:
                raise VideoOpenError(
                    "A live source must be playable from its beginning, as MPEG-TS, Matroska and fragmented MP4 are; "
                    f"this one ended before its first picture: {source.ending or 'nothing more came'}. "
                    "For a file that is finished use `crosslmm chat`."
                )
            time.sleep(0.05)
            continue  # a question waits for the first frame
        try:
            question = questions.get(timeout=0.0 if frames else 0.1)
        except queue.Empty:
            continue
        if question is None:
            screen.end(state(live, source))
            return
        if question.strip():
            answer(live, question, max_new_tokens=max_new_tokens)
            screen.begin(state(live, source))


def answer(live: LiveVideo, question: str, *, max_new_tokens: int) -> None:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        live.ask(question, max_new_tokens=max_new_tokens, on_text=write)
    except KeyboardInterrupt:
        write(" (interrupted)")
    except ValueError as error:  # nothing was written yet, and the next question may succeed
        print(f"error: {error}", file=sys.stderr, flush=True)
    write("\n")


def typed_lines() -> "queue.SimpleQueue[str | None]":
    """The lines of stdin as they are typed, and None at the end."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        rest = b""
        while piece := os.read(0, 4096):  # not `sys.stdin`, whose lock would keep the program from ending
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                lines.put(line.decode(errors="replace"))
        if rest:
            lines.put(rest.decode(errors="replace"))
        lines.put(None)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    return lines


class Screen:
    """Shows the state above the line that is typed on; if stderr is not a terminal, as a line now and then."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty() and sys.stdin.isatty()
        self._told = -STATE_SECONDS
        if self.is_terminal:
            self._write("\n> ")

    def show(self, line: str) -> None:
        if self.is_terminal:
            fitting = line[: shutil.get_terminal_size().columns - 1]
            self._write(f"\x1b7\x1b[A\r\x1b[2K{fitting}\x1b8")  # up, and back to where the cursor was
        elif time.monotonic() - self._told >= STATE_SECONDS:
            self._told = time.monotonic()
            self._write(line + "\n")

    def begin(self, line: str) -> None:
        """Shows the state again below an answer."""
        self._write(f"{line}\n> " if self.is_terminal else f"{line}\n")

    def end(self, line: str) -> None:
        self.show(line)
        self._write("\n" if self.is_terminal else f"{line}\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


__all__ = ["counts", "state", "watch"]
