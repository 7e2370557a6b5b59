"""One video stream of one file: packets, decoder, clock and seeking."""

from __future__ import annotations

import math
import struct
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import av
import av.error
from av.sidedata.sidedata import SideDataContainer

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

# Containers that contain pictures and sound themselves. Formats that read further files by name (playlists, concat,
# SDP, image sequences) are not listed.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,mpegvideo,avi,gif,flv,asf,ogg,h264,hevc,m4v,ivf,obu"

# Containers in which decoding can start in the middle. All others are decoded from the first packet to the last.
_SEEKABLE = ("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf")
# In these codecs each picture depends on all earlier ones, even if the container says otherwise.
_ENDLESS_CODECS = ("gif", "apng")
# Decoders whose `skip_frame` skips only pictures on which no other depends: for every codec that PyAV can encode, such
# samples equal a full decode. Other decoders ignore the setting or are not tested.
_LEAVES_OUT = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
# A moment at most this long before a picture counts as the picture's own, because k / fps is rounded.
LATE = 1e-7


@dataclass(frozen=True)
class Picture:
    """One requested frame, as rows of packed RGB; `pixels=None` if nothing could be decoded."""

    seconds: float
    pixels: memoryview | None
    width: int
    height: int
    line_size: int
    orientation: tuple[bool, bool, bool]  # transpose, then mirror left-right, then upside-down
    valid: bool


def _refuse_to_open(*args, **kwargs):
    raise VideoOpenError("A video file must not refer to other files.")


# Threads of a colour converter do not survive a fork: a data loader's worker that frees its parent's converter would
# wait for them forever. Older PyAV has no such setting.
_ONE_THREAD = {"threads": 1} if "threads" in (av.VideoFrame.reformat.__doc__ or "") else {}


class VideoFile:
    """One video stream of one file, with its decoder and seeking."""

    def __init__(self, file: BinaryIO, *, limits: VideoLimits, num_threads: int):
        self._file, self._limits, self._num_threads = file, limits, num_threads
        self.clock = Clock(limits)
        self.trouble: str | None = None
        self.announced_end: int | None = None
        self._orientations: dict[int, tuple[bool, bool, bool]] = {}
        # To probe a stream FFmpeg decodes pictures, but size and length are known without it.
        self.open(probe=False)
        self.format_name = self._container.format.name.split(",")[0]
        # Whether the container numbers pictures in decoding order and has no presentation times.
        self.in_decoding_order = self.format_name == "avi"
        self.seekable = self.format_name in _SEEKABLE and self._stream.codec_context.name not in _ENDLESS_CODECS
        count, first, end = self._measured()
        if end is None and not count:
            raise VideoDecodeError(
                "The file announces a video stream and contains no picture of it: it is an initialisation segment, or "
                "cut off before the first picture. Join it with its other segments."
            )
        self.open()
        stream = self._stream
        self.codec, self.width, self.height = self._context.name, self._context.width, self._context.height
        # Without times, the average rate is FFmpeg's default and the guessed rate is the stream's own; AVI's average
        # includes pictures that do not exist.
        averaged = stream.start_time is not None and not self.in_decoding_order
        rate = (averaged and stream.average_rate) or stream.guessed_rate or stream.base_rate
        self.fps = float(rate) if rate and 0 < rate < 1000 else 25.0
        self.has_clock = stream.start_time is not None
        # In AVI the first picture is as late as the decoder outputs it.
        self.start = None if self.in_decoding_order else stream.start_time
        self.duration_seconds = self._duration(count, first, end)
        counted = count or (stream.frames if self.format_name == "mov" else 0)
        self.total_num_frames = counted or max(1, round(self.duration_seconds * self.fps))

    @property
    def holds_back(self) -> bool:
        """Whether the decoder may output pictures in another order than that of the packets."""
        return bool(self._context.has_b_frames)

    def shows(self, packet) -> bool:
        """Whether a packet contains a picture to be shown; VP8 and VP9 say so in its first bits."""
        if self.codec not in ("vp8", "vp9"):
            return True
        first, last = memoryview(packet)[0], memoryview(packet)[-1]
        if self.codec == "vp8":
            return bool(first & 0b10000)
        # Packets of several pictures end with an index. Otherwise the bits show an older picture (4) or this one (1).
        return last >> 5 == 0b110 or bool((first if first >> 4 == 0b1011 else first >> 1) & 0b101)

    def open(self, *, strict: bool = True, probe: bool = True) -> None:
        """Opens the file, or reopens it at the first packet; with `probe=False` only to read packets.

        A strict decoder reports errors that FFmpeg would otherwise conceal with pixels of earlier pictures.
        """
        self._container, self._stream = self._opened_stream(probe=probe)
        self.tick = self._stream.time_base
        for stream in self._container.streams:
            if stream is not self._stream and hasattr(stream, "discard"):  # PyAV < 17.1 reads and drops the others
                stream.discard = av.stream.Discard.all
        if probe:
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
                # Not `options`: PyAV 15 writes past their end if streams appear late, as in flv and mpegts.
                container_options=options,
                metadata_errors="replace",
                buffer_size=65536,
                io_open=_refuse_to_open,
            )
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None
        ]
        if not streams:
            raise NoVideoStreamError("The file has no video stream that FFmpeg can decode.")
        stream = max(streams, key=_preference)
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > self._limits.max_pixels:
            raise VideoLimitError(
                f"Pictures of {width}x{height} have more than max_pixels={self._limits.max_pixels}. {RAISE_LIMITS}"
            )
        if not stream.time_base:
            raise VideoOpenError("The video stream has no time base (the unit of its times).")
        return container, stream

    def _opened_context(self, stream, *, strict: bool):
        context = stream.codec_context
        context.thread_count = self._num_threads
        # FFmpeg's VP8 and VP9 decoders crash on some damaged files if they decode several frames at a time.
        context.thread_type = "SLICE" if context.name in ("vp8", "vp9") else "AUTO"
        context.options = {"max_pixels": str(self._limits.max_pixels)} | ({"err_detect": "explode"} if strict else {})
        # Some decoders (dav1d) keep the `skip_frame` set at opening.
        with _translated_errors(f"FFmpeg cannot decode {context.name}.", VideoDecodeError):
            context.open()
        return context

    @cached_property
    def _lenient(self):
        """A decoder that conceals damage as players do, and the container that owns it."""
        position = self._file.tell()
        container, stream = self._opened_stream()
        self._file.seek(position)
        return self._opened_context(stream, strict=False), container

    @property
    def reports_at_once(self) -> bool:
        """Whether an error belongs to the last packet; with threads it is reported later."""
        return self._context.thread_count == 1

    def _measured(self) -> tuple[int, int | None, int | None]:
        """The number of packets (0: not counted), the first time, and the end of the last picture, in ticks.

        A table of all samples gives the end (`announced_end`) if it is complete. Otherwise the last packets give it: a
        container's end is that of its longest stream, counted from zero or from the first time.
        """
        container, stream, start = self._container, self._stream, self._stream.start_time
        told = None if start is None or not stream.duration else start + stream.duration
        if told is not None and stream.frames and self.format_name in ("mov", "avi"):
            entries = getattr(stream, "index_entries", None)  # PyAV < 17 does not show them
            if entries:  # in decoding order, the last entry can be a few pictures before the end
                whole = (told - entries[-1].timestamp) * stream.frames <= 4 * stream.duration
            else:
                whole = entries is None and self.format_name == "mov"
            self.announced_end = told if whole else None
        if self.announced_end or (told is not None and not self.seekable):
            return 0, start, told
        if self.seekable and container.duration:
            seconds = ((container.start_time or 0) + container.duration) / 1e6
            if self.seek(round(seconds / self.tick)) and (end := self._read_to_the_end()[2]) is not None:
                return 0, start, end
            self.open(probe=False)
        return self._read_to_the_end()

    def _read_to_the_end(self) -> tuple[int, int | None, int | None]:
        count, first, end = 0, None, None
        while (packet := self.read()) is not None:
            count += 1
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                over = packet.pts + (packet.duration or 0)
                end = over if end is None else max(end, over)
        self.trouble = None  # the requested frames may be before the error
        return count, first, end

    def _duration(self, count: int, first: int | None, end: int | None) -> float:
        start = first if self.start is None else self.start
        if start is not None and end is not None and end > start:
            seconds = float((end - start) * self.tick)
        else:  # no times, or only one picture
            seconds = max(1, count) / self.fps
        if seconds > self._limits.max_duration_seconds:
            raise VideoLimitError(
                f"The video lasts {seconds:.0f} s, more than max_duration_seconds="
                f"{self._limits.max_duration_seconds}. {RAISE_LIMITS}"
            )
        return seconds

    def read(self):
        """Reads the stream's next packet; None at the end of the readable data."""
        self.clock.check()
        try:
            for packet in self._packets:
                if packet.size:
                    if self.in_decoding_order:
                        packet.pts = packet.dts
                    return packet
        except (av.error.FFmpegError, IndexError) as error:  # PyAV raises IndexError if streams appear late
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
        """Whether the container's index has a keyframe in (low, high]; None if the index does not tell."""
        entries = getattr(self._stream, "index_entries", None)  # PyAV < 17 does not show them
        if self.format_name != "mov" or not entries or entries[-1].timestamp < high:
            return None
        found = entries.search_timestamp(high, backward=True)
        return found >= 0 and entries[found].timestamp > low

    def decode(self, packet, *, skip: bool = False, lenient: bool = False) -> list[av.VideoFrame]:
        """Decodes a packet and returns the decoder's output, or with None its remaining output; `skip` skips the
        packet's picture if no other depends on it."""
        self.clock.check()
        # PyAV < 17 and None have no `has_sidedata`.
        if hasattr(packet, "has_sidedata") and packet.has_sidedata("encryption_info"):
            raise VideoDecodeError("The pictures of this video are encrypted. Decrypt the file first.")
        context = self._lenient[0] if lenient else self._context
        context.skip_frame = "NONREF" if skip and self.codec in _LEAVES_OUT else "DEFAULT"
        try:
            return context.decode(packet)
        except EOFError:
            return []
        except av.error.MemoryError as error:
            raise VideoLimitError(f"Decoding needs more memory than is available. {RAISE_LIMITS}") from error

    def flush(self) -> None:
        """Clears the decoders' buffers."""
        self._context.flush_buffers()
        if "_lenient" in self.__dict__:
            self._lenient[0].flush_buffers()

    def ticks(self, seconds: float) -> int:
        """Converts seconds to ticks of the stream's clock, rounded down."""
        return (self.start or 0) + math.floor(min((seconds + LATE) / self.tick, 2.0**62))

    def seconds(self, pts: int) -> float:
        return float((pts - (self.start or 0)) * self.tick)

    def picture(self, seconds: float, frame, *, valid: bool) -> Picture:
        with _translated_errors("FFmpeg cannot convert the picture to RGB.", VideoDecodeError):
            try:
                rgb = frame.reformat(format="rgb24", **_ONE_THREAD)
            except av.error.FFmpegError:
                frame.colorspace = 2  # unspecified, because FFmpeg cannot convert from the given one
                rgb = frame.reformat(format="rgb24", **_ONE_THREAD)
        plane = rgb.planes[0]
        # The matrix is read from one frame per angle only: reading it makes a reference cycle, and the frame would
        # stay in memory until garbage collection.
        if frame.rotation not in self._orientations:
            self._orientations[frame.rotation] = _orientation(frame)
        return Picture(
            seconds=seconds,
            pixels=memoryview(plane),
            width=rgb.width,
            height=rgb.height,
            line_size=plane.line_size,
            orientation=self._orientations[frame.rotation],
            valid=valid,
        )

    def no_picture(self, seconds: float) -> Picture:
        return Picture(seconds, None, self.width, self.height, 0, (False, False, False), False)


@contextmanager
def _translated_errors(message: str, kind: type[VideoError]):
    """Translates FFmpeg's errors to ours: `av.error` classes depend on its version and name no remedy."""
    try:
        yield
    except av.error.MemoryError as error:
        raise VideoLimitError(f"{message} ({error}: it needs more memory than is available)") from error
    except VideoError:
        raise
    except (av.error.FFmpegError, ValueError, LookupError, OverflowError, NotImplementedError) as error:
        raise kind(f"{message} ({getattr(error, 'strerror', None) or error})") from error


def _preference(stream) -> tuple[bool, bool, int]:
    """Sort key of streams: the default one, one with several pictures, the largest (the first of equal ones)."""
    default = bool(stream.disposition & av.stream.Disposition.default)
    return default, stream.frames != 1, stream.codec_context.width * stream.codec_context.height


def _display_matrix(frame) -> bytes | None:
    """Reads a frame's display matrix. PyAV fails at side data that it cannot name, such as EXIF, but has then read the
    earlier side data, to which the matrix (also the one that FFmpeg creates from EXIF) belongs."""
    found = SideDataContainer.__new__(SideDataContainer)
    with suppress(ValueError):
        found.__init__(frame)
    with suppress(ValueError):
        return next((bytes(entry) for entry in found if entry.type.name == "DISPLAYMATRIX"), None)
    return None


def _orientation(frame) -> tuple[bool, bool, bool]:
    """Reads (transpose, mirror, upside down) that turn the stored picture upright, for quarter turns and mirrorings.

    FFmpeg's display matrix (a b u, c d v, x y w) maps the point (p, q) to (a p + c q, b p + d q).
    """
    matrix = _display_matrix(frame)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if a == d == 0 and b and c:
        return True, c < 0, b < 0
    return False, a < 0, d < 0
