"""Where the frames of a live video come from: a camera, a stream from the network, or a file that is being written.

A thread of its own reads and decodes all of it, so that a sender never waits, and keeps the newest sampled frames.
"""

import math
import os
import stat
import threading
import time
from collections.abc import Callable
from typing import Any

import av
import av.error

from ..processing_crosslmm import CrossLMMProcessor
from ..video_decoding import _tensor
from ..video_file import _FORMATS, _ONE_THREAD, LATE, Picture, _orientation, _refuse_to_open, _translated_errors
from ..video_source import DEFAULT_LIMITS, VideoLimitError, VideoOpenError, VideoTimeoutError, shown
from .waiting_frames import WaitingFrames

STREAMS = {
    "rtsp": {
        "rtsp_transport": "tcp",
        "format_whitelist": f"rtsp,{_FORMATS}",
        "protocol_whitelist": "rtsp,rtp,tcp,tls",
    },
    "http": {"format_whitelist": f"mpjpeg,{_FORMATS}", "protocol_whitelist": "http,tcp"},
}
STREAMS |= {
    "rtsps": STREAMS["rtsp"] | {"protocol_whitelist": "rtsps,rtsp,rtp,tcp,tls"},
    "https": STREAMS["http"] | {"protocol_whitelist": "http,https,tcp,tls"},
}
"""By scheme: how FFmpeg opens it. What leads on to further addresses (HLS, DASH, SDP) is not among the formats."""
JUMP_SECONDS = 60.0
"""A clock that leaps by more, or back, was set anew; time then goes on as it passed here."""


class LiveSource:
    """Frames of a live video, sampled.

    waiting: those that wait for the model. num_damaged: packets that could not be decoded.
    ending: why no more will come: None while more may, "" where the source has simply ended.
    Seconds count from the first picture, by the source's own clock.
    """

    def __init__(
        self,
        source: str,
        processor: CrossLMMProcessor,
        *,
        fps: float = 1.0,
        allow_network: bool = False,
        silence_seconds: float = 10.0,
    ) -> None:
        """source: `/dev/video0`, a path, or, only with `allow_network`, an RTSP or HTTP address, on whatever network.
        fps: frames sampled per second. silence_seconds: without a picture for so long the source counts as dead.

        Raises VideoError where it cannot be opened as a video, within `silence_seconds`.
        """
        self.fps, self.silence_seconds = fps, silence_seconds
        self.waiting, self.num_damaged = WaitingFrames(processor), 0
        self.ending: str | None = None
        self._stop, self._is_file = threading.Event(), False
        self._offset = self._last = self._due = 0.0  # from its clock to ours; of the last picture; of the next
        self._heard = time.monotonic()
        self._container, self._stream = self._opened(source, allow_network=allow_network)
        self._heard = time.monotonic()  # opening may have taken long
        self._thread = threading.Thread(target=self._read_to_the_end, name="live source", daemon=True)
        self._thread.start()

    @property
    def silent_seconds(self) -> float:
        """How long no picture has come."""
        return time.monotonic() - self._heard

    def close(self) -> None:
        """Lets go of the source; what waits can still be taken."""
        self._stop.set()
        self._thread.join(self.silence_seconds)

    def _opened(self, source: str, *, allow_network: bool) -> tuple[Any, Any]:
        scheme = source.partition("://")[0].lower() if "://" in source else ""
        what: Any = source
        options: dict[str, Any] = {"timeout": (self.silence_seconds, self.silence_seconds)}
        if scheme in STREAMS:
            if not allow_network:
                raise VideoOpenError(
                    f"{scheme}:// sources are opened only when asked for: FFmpeg then connects to whatever address "
                    "they name, in private networks too. Add --allow-network."
                )
            options["container_options"] = STREAMS[scheme]
        elif scheme:
            raise VideoOpenError(
                f"A live source is a camera, a file, or one of {', '.join(STREAMS)}; got {scheme[:20]}://."
            )
        elif source.startswith("/dev/video"):
            options |= {"format": "v4l2", "container_options": {"protocol_whitelist": "file"}}
        else:
            self._is_file = True
            what = GrowingFile(source, lambda: self._stop.is_set() or self.silent_seconds > self.silence_seconds)
            options["io_open"] = _refuse_to_open
            options["container_options"] = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        with _translated_errors("This is no live video that FFmpeg can open.", VideoOpenError):
            container = av.open(what, mode="r", metadata_errors="replace", **options)
            if not container.streams.video:
                raise VideoOpenError("The source has no video stream.")
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(DEFAULT_LIMITS.max_pixels)}
            stream.codec_context.thread_count = 1  # more hold back as many pictures
        if stream.codec_context.width * stream.codec_context.height > DEFAULT_LIMITS.max_pixels:
            raise VideoLimitError(f"Pictures may have at most {DEFAULT_LIMITS.max_pixels} pixels; these have more.")
        return container, stream

    def _read_to_the_end(self) -> None:
        ending = ""
        try:
            with self._container:
                for packet in self._container.demux(self._stream):
                    if self._stop.is_set():
                        break
                    self._decode(packet)
        except av.error.ExitError:  # how FFmpeg says that a read took too long
            ending = f"nothing came for {self.silence_seconds:g} s"
        except Exception as error:  # whatever it is, the frames that came can still be asked about
            ending = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self.ending = ending

    def _decode(self, packet: Any) -> None:
        pictures = []
        try:
            pictures = packet.decode()
        except av.error.FFmpegError:
            self.num_damaged += 1
        for picture in pictures:
            self._offer(picture)
            self._heard = time.monotonic()
        # A file ends by itself then, and the decoder still holds its last pictures.
        if not self._is_file and self.silent_seconds > self.silence_seconds:
            raise VideoTimeoutError(f"no picture could be decoded for {self.silence_seconds:g} s")

    def _offer(self, picture: av.VideoFrame) -> None:
        """Keeps the picture if its moment is one to look at."""
        now = self._last + self.silent_seconds if self.waiting.num_received else 0.0
        clock = now - self._offset if picture.time is None else picture.time
        if not self.waiting.num_received or not -1 < clock + self._offset - self._last <= JUMP_SECONDS:
            self._offset = now - clock
        seconds = clock + self._offset
        if self.waiting.num_received and seconds <= self._last:
            return
        self._last = seconds
        if seconds < self._due - LATE:
            return
        self._due = (math.floor((seconds + LATE) * self.fps) + 1) / self.fps
        rgb = picture.reformat(format="rgb24", **_ONE_THREAD)
        rows = memoryview(rgb.planes[0])
        upright = Picture(seconds, rows, rgb.width, rgb.height, rgb.planes[0].line_size, _orientation(picture), True)
        self.waiting.put(_tensor(upright), seconds)


class GrowingFile:
    """A regular file that somebody writes to, as FFmpeg reads it: from its beginning, without a name or a way back.

    has_ended: whether to wait no more for what may be added.
    """

    name = "video"

    def __init__(self, path: str, has_ended: Callable[[], bool]) -> None:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise VideoOpenError(f"{shown(path)} is neither a file nor a camera such as /dev/video0.")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (read for as long as the process watches)
        self._has_ended = has_ended

    def read(self, size: int) -> bytes:
        while not self._has_ended():
            if piece := self._file.read(size):
                return piece
            time.sleep(0.05)
        return b""


__all__ = ["LiveSource"]
