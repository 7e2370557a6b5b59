"""Frames of a live video that wait for the model, from a browser, a WebSocket, a camera or a stream.

Shapes: S side of the encoder's pictures.
"""

import base64
import io
import threading
from collections import deque
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..frames_crosslmm import picture_pixels
from ..processing_crosslmm import CrossLMMProcessor
from ..video_processing_crosslmm import _resize
from ..video_source import DEFAULT_LIMITS
from .live import LONGEST_SECONDS, LiveVideo

MAX_WAITING = 16
"""The most frames that wait for the model; a further one replaces the oldest."""
MAX_SIDE = 4096
"""Most pixels along a side of a client's picture: one that is a pixel wide and very long takes minutes to resize."""
FORMATS = ("JPEG", "PNG", "WEBP")


class WaitingFrames:
    """A queue of the newest frames, resized to the encoder's size. Any thread may call.

    num_received: frames added so far. num_dropped: those of them that were replaced before they were taken.
    newest_seconds: the time of the frame added last; -1 before the first.
    """

    def __init__(self, processor: CrossLMMProcessor) -> None:
        size, resample = processor.video_processor.size, processor.video_processor.resample
        self._fit = partial(_resize, size=size, resample=resample)
        self._frames: deque[tuple[torch.Tensor, float]] = deque()
        self._lock = threading.Lock()
        self.num_received = self.num_dropped = 0
        self.newest_seconds = -1.0

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: torch.Tensor, seconds: float) -> None:
        """Adds a frame. frame: (3, H, W) uint8. seconds: its time, later than the time before."""
        fitting = self._fit(frame)
        with self._lock:
            if len(self._frames) == MAX_WAITING:
                self._frames.popleft()
                self.num_dropped += 1
            self._frames.append((fitting, seconds))
            self.num_received, self.newest_seconds = self.num_received + 1, seconds

    def put_file(self, image: Any, seconds: Any) -> None:
        """Adds a frame that a client sent. image: a JPEG, PNG or WebP in base64, or a `data:` URL with one.

        Raises ValueError for any other image, and for a time that is not later than the time before.
        """
        if not isinstance(seconds, int | float) or not self.newest_seconds < seconds < LONGEST_SECONDS:
            raise ValueError(
                "`seconds` of a frame must be a number, larger than the one before and below "
                f"{LONGEST_SECONDS:g}; got {seconds!r:.40}."
            )
        self.put(_pixels(image), float(seconds))

    def take(self) -> tuple[list[torch.Tensor], list[float]]:
        """Removes and returns all waiting frames, (3, S, S) each, and their times."""
        with self._lock:
            waiting = list(self._frames)
            self._frames.clear()
        return [frame for frame, _ in waiting], [seconds for _, seconds in waiting]

    def forget(self) -> None:
        """Drops all waiting frames without counting them as dropped. Times may start from 0 again."""
        self.take()
        self.newest_seconds = -1.0

    def seconds_behind(self, live: LiveVideo) -> float:
        """How much older the last frame that the model has seen is than the newest frame."""
        [seen] = live.times[-1:] or [0.0]
        return max(self.newest_seconds - seen, 0.0)


def _pixels(image: Any) -> torch.Tensor:
    """A client's picture, (3, H, W) uint8, turned upright."""
    if not isinstance(image, str):
        raise ValueError("`image` of a frame must be a data: URL or base64.")
    try:
        data = base64.b64decode(image.rpartition(",")[2], validate=True)
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        size = picture.size
        if max(size) <= MAX_SIDE:
            return picture_pixels(picture, layout=None, do_rescale=True, limits=DEFAULT_LIMITS)
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise any class, such as TypeError for damaged EXIF
        raise ValueError(f"`image` of a frame must be a whole {', '.join(FORMATS)} in base64.") from error
    raise ValueError(f"A frame has at most {MAX_SIDE} x {MAX_SIDE} pixels; got {size[0]} x {size[1]}.")


__all__ = ["WaitingFrames"]
