"""One video stream of one file: its packets, its decoder, its clock, and the way back and forth in it."""

from __future__ import annotations

import math
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import av
import av.error

from .video_source import (
    RAISE_LIMITS,
    Bytes,
    Clock,
    NoVideoStreamError,
    VideoDecodeError,
    VideoError,
    VideoLimitError,
    VideoLimits,
    VideoOpenError,
)

# Containers that hold pictures and sound themselves. What reads further files by name (playlists, concat, SDP, image
# sequences) is not among them.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,mpegvideo,avi,gif,flv,asf,ogg,h264,hevc,m4v,ivf,obu"

# Containers whose packets carry presentation times and which can be entered in the middle. All others, and pictures
# that build on each other without end (gif), are decoded from their first to their last packet.
_SEEKABLE = ("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf")
LATE = 1e-7


@dataclass(frozen=True)
class Picture:
    """One frame asked for, as rows of packed RGB; `pixels=None` where nothing could be decoded."""

    seconds: float
    pixels: memoryview | None
    width: int
    height: int
    line_size: int
    orientation: tuple[bool, bool, bool]  # transpose, then mirror left-right, then upside-down
    valid: bool


def _refuse_to_open(*args, **kwargs):
    raise VideoOpenError("A video file must not refer to other files.")


# Threads of a colour conversion do not survive a fork: a data loader's worker that frees one made by its parent waits
# for them for ever. Older PyAV has no such setting.
_ONE_THREAD = {"threads": 1} if "threads" in (av.VideoFrame.reformat.__doc__ or "") else {}


class VideoFile:
    """One video stream of one file: packets, a decoder, and the way back and forth."""

    def __init__(self, file: BinaryIO, *, limits: VideoLimits, num_threads: int):
        self._file, self._limits, self._num_threads = file, limits, num_threads
        self.clock = Clock(limits)
        self.trouble: str | None = None
        self._orientations: dict[int, tuple[bool, bool, bool]] = {}
        # FFmpeg decodes pictures to learn about a stream; how large they are it knows without.
        self._opened_stream(probe=False)
        self.open()
        stream = self._stream
        self.tick = stream.time_base
        self.format_name, self.codec = self._container.format.name, self._context.name
        self.width, self.height = self._context.width, self._context.height
        # Where pictures are only counted, the average is FFmpeg's default and the guess the stream's own word.
        rate = stream.average_rate if stream.start_time is not None else stream.guessed_rate
        rate = rate or stream.guessed_rate or stream.base_rate
        self.fps = float(rate) if rate and 0 < rate < 1000 else 25.0
        self.start = None if self.format_name == "avi" else stream.start_time
        # AVI counts pictures in the order of decoding: FFmpeg's times are late, or wrong where it cannot tell in which
        # order they are shown.
        self.reordered = self.format_name == "avi" and self.codec in ("h264", "hevc")
        self.seekable = (
            self.format_name.split(",")[0] in _SEEKABLE and self.codec not in ("gif", "apng") and not self.reordered
        )
        # Other containers announce the end of their longest stream only.
        ends = stream.start_time is not None and stream.duration and self.format_name.split(",")[0] in ("mov", "avi")
        self.announced_end = stream.start_time + stream.duration if ends else None
        self._count: int | None = None
        self.duration_seconds = self._duration()
        self.total_num_frames = self._count or stream.frames or max(1, round(self.duration_seconds * self.fps))

    def open(self, *, strict: bool = True) -> None:
        """Open the file, or begin again at its first packet.

        A strict decoder reports errors that FFmpeg would otherwise paint over with what was there before.
        """
        self._container, self._stream = self._opened_stream()
        for stream in self._container.streams:
            if stream is not self._stream and hasattr(stream, "discard"):  # PyAV < 17.1 reads and drops the others
                stream.discard = av.stream.Discard.all
        self._context = self._opened_context(self._stream, strict=strict)
        self._packets = self._container.demux(self._stream)

    def _opened_stream(self, *, probe: bool = True):
        self._file.seek(0)
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        if not probe:
            options["codec_whitelist"] = "none"
        message = f"FFmpeg cannot open this as a video: it is cut off, or none of {_FORMATS.replace(',', ', ')}."
        with _translated_errors(message, VideoOpenError):
            container = av.open(
                Bytes(self._file, self.clock),
                mode="r",
                # Not `options`: PyAV 15 writes past their end where streams show up late, as in flv and mpegts.
                container_options=options,
                metadata_errors="replace",
                buffer_size=65536,
                io_open=_refuse_to_open,
            )
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None:
                break
        else:
            raise NoVideoStreamError("The file has no video stream that FFmpeg can decode.")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > self._limits.max_pixels:
            raise VideoLimitError(
                f"Pictures of {width}x{height} have more than max_pixels={self._limits.max_pixels}. {RAISE_LIMITS}"
            )
        if not stream.time_base:
            raise VideoOpenError("The video stream does not say in which unit its times are.")
        return container, stream

    def _opened_context(self, stream, *, strict: bool):
        context = stream.codec_context
        context.thread_count = self._num_threads
        # FFmpeg's VP8 and VP9 decoders crash on some damaged files when they decode several frames at a time.
        context.thread_type = "SLICE" if context.name in ("vp8", "vp9") else "AUTO"
        context.options = {"max_pixels": str(self._limits.max_pixels)} | ({"err_detect": "explode"} if strict else {})
        # Some decoders (dav1d) keep the `skip_frame` that they are opened with.
        with _translated_errors(f"FFmpeg cannot decode {context.name}.", VideoDecodeError):
            context.open()
        return context

    @cached_property
    def _lenient(self):
        """A decoder that does what players do with damage, and the container that holds it."""
        position = self._file.tell()
        container, stream = self._opened_stream()
        self._file.seek(position)
        return self._opened_context(stream, strict=False), container

    @property
    def reports_at_once(self) -> bool:
        """Whether an error belongs to the packet that went in last: with threads it comes later."""
        return self._context.thread_count == 1

    def _duration(self) -> float:
        start_seconds = float((self.start or 0) * self.tick)
        if self._stream.duration and self._stream.start_time is not None:
            seconds = float(self._stream.duration * self.tick)
        elif self._container.duration and self.seekable:
            # Such containers announce when they end, whenever the stream begins.
            seconds = self._container.duration / 1e6
            seconds -= start_seconds if start_seconds < seconds else 0
        else:
            seconds = self._scan()
        if not seconds > 0:  # unknown, as of one picture
            seconds = 1 / self.fps
        if seconds > self._limits.max_duration_seconds:
            raise VideoLimitError(
                f"The video lasts {seconds:.0f} s, more than max_duration_seconds="
                f"{self._limits.max_duration_seconds}. {RAISE_LIMITS}"
            )
        return seconds

    def _scan(self) -> float:
        """Seconds, by reading every packet."""
        count, first, last = 0, None, None
        while (packet := self.read()) is not None:
            count += 1
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = max(packet.pts if last is None else last, packet.pts + (packet.duration or 0))
        self.open()
        self._count = count
        return count / self.fps if last is None or last == first else float((last - first) * self.tick)

    def read(self):
        """The stream's next packet, or None at the end of what can be read."""
        self.clock.check()
        try:
            for packet in self._packets:
                if packet.size:
                    return packet
        except (av.error.FFmpegError, IndexError) as error:  # PyAV stumbles over streams that show up late
            self.trouble = self.trouble or str(error)
        return None

    def seek(self, pts: int) -> bool:
        try:
            self._container.seek(pts, stream=self._stream)
        except (av.error.FFmpegError, OverflowError):
            return False
        self._packets = self._container.demux(self._stream)
        return True

    def keyframe_between(self, low: int, high: int) -> bool | None:
        """Whether the container's index has a keyframe in (low, high]; None where it does not tell."""
        entries = getattr(self._stream, "index_entries", None)  # PyAV < 17 does not show them
        if not self.format_name.startswith("mov") or not entries or entries[-1].timestamp < high:
            return None
        found = entries.search_timestamp(high, backward=True)
        return found >= 0 and entries[found].timestamp > low

    def decode(self, packet, *, skip: bool = False, lenient: bool = False) -> list[av.VideoFrame]:
        """Pictures that come out when `packet` goes in, None for those still inside; `skip` leaves out a picture on
        which no other depends."""
        self.clock.check()
        context = self._lenient[0] if lenient else self._context
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        try:
            return context.decode(packet)
        except EOFError:
            return []
        except av.error.MemoryError as error:
            raise VideoLimitError(f"Decoding asks for more memory than there is. {RAISE_LIMITS}") from error

    def flush(self) -> None:
        """Forget what the decoders hold."""
        self._context.flush_buffers()
        if "_lenient" in self.__dict__:
            self._lenient[0].flush_buffers()

    def ticks(self, seconds: float) -> int:
        """The last moment of the stream's clock that is not after `seconds`."""
        return (self.start or 0) + math.floor(min((seconds + LATE) / self.tick, 2.0**62))

    def seconds(self, pts: int) -> float:
        return float((pts - (self.start or 0)) * self.tick)

    def picture(self, seconds: float, frame) -> Picture:
        with _translated_errors("FFmpeg cannot convert the picture to RGB.", VideoDecodeError):
            rgb = frame.reformat(format="rgb24", **_ONE_THREAD)
        plane = rgb.planes[0]
        # One frame per angle is asked for its matrix: asking ties a frame to its side data in a cycle, and it would
        # stay in memory until the garbage collector comes by.
        if frame.rotation not in self._orientations:
            self._orientations[frame.rotation] = _orientation(frame)
        return Picture(
            seconds=seconds,
            pixels=memoryview(plane),
            width=rgb.width,
            height=rgb.height,
            line_size=plane.line_size,
            orientation=self._orientations[frame.rotation],
            valid=not frame.is_corrupt,
        )

    def no_picture(self, seconds: float) -> Picture:
        return Picture(seconds, None, self.width, self.height, 0, (False, False, False), False)


@contextmanager
def _translated_errors(message: str, kind: type[VideoError]):
    """FFmpeg's errors as ours: `av.error` classes depend on its version and say nothing about the remedy."""
    try:
        yield
    except av.error.MemoryError as error:
        raise VideoLimitError(f"{message} ({error}: it asks for more memory than there is)") from error
    except (av.error.FFmpegError, UnicodeError, OverflowError) as error:
        raise kind(f"{message} ({getattr(error, 'strerror', None) or error})") from error


def _orientation(frame) -> tuple[bool, bool, bool]:
    """(transpose, mirror, upside down) that turn the stored picture upright, for quarter turns and mirrorings.

    FFmpeg's display matrix (a b u, c d v, x y w) sends the point (p, q) to (a p + c q, b p + d q).
    """
    matrix = next((entry for entry in frame.side_data if entry.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if a == d == 0 and b and c:
        return True, c < 0, b < 0
    return False, a < 0, d < 0
