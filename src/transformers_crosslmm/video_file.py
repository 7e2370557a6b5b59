"""One video stream of one file: its packets, its decoder, its clock, and the way back and forth in it."""

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

# Containers that hold pictures and sound themselves. What reads further files by name (playlists, concat, SDP, image
# sequences) is not among them.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,mpegvideo,avi,gif,flv,asf,ogg,h264,hevc,m4v,ivf,obu"

# Containers that can be entered in the middle. All others are decoded from their first to their last packet.
_SEEKABLE = ("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf")
# Pictures of these build on each other without end, whatever the container says.
_ENDLESS_CODECS = ("gif", "apng")
# Decoders that leave out pictures on which no other depends, and nothing else, when asked to: what was sampled so
# from every codec that PyAV can encode equals a full decode. The others ignore the setting or are not proven.
_LEAVES_OUT = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
# A moment this little before a picture still counts as its own, or the rounding of k / fps would decide.
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
        self.announced_end: int | None = None
        self._orientations: dict[int, tuple[bool, bool, bool]] = {}
        # FFmpeg decodes pictures to learn about a stream; how large and how long they are it knows without.
        self.open(probe=False)
        self.format_name = self._container.format.name.split(",")[0]
        # Whether the container counts pictures as they are decoded and says nothing of when they are shown.
        self.in_decoding_order = self.format_name == "avi"
        self.seekable = self.format_name in _SEEKABLE and self._stream.codec_context.name not in _ENDLESS_CODECS
        count, first, end = self._measured()
        if end is None and not count:
            raise VideoDecodeError(
                "The file announces a video stream and holds no picture of it: it is an initialisation segment, or "
                "cut off before the first picture. Join it with the segments that belong to it."
            )
        self.open()
        stream = self._stream
        self.codec, self.width, self.height = self._context.name, self._context.width, self._context.height
        # Where pictures are only counted, the average is FFmpeg's default and the guess the stream's own word; AVI's
        # average counts pictures that are not there.
        averaged = stream.start_time is not None and not self.in_decoding_order
        rate = (averaged and stream.average_rate) or stream.guessed_rate or stream.base_rate
        self.fps = float(rate) if rate and 0 < rate < 1000 else 25.0
        self.has_clock = stream.start_time is not None
        # In AVI the first picture comes as late as the decoder gives it.
        self.start = None if self.in_decoding_order else stream.start_time
        self.duration_seconds = self._duration(count, first, end)
        counted = count or (stream.frames if self.format_name == "mov" else 0)
        self.total_num_frames = counted or max(1, round(self.duration_seconds * self.fps))

    @property
    def holds_back(self) -> bool:
        """Whether the decoder may give pictures in another order than it gets packets."""
        return bool(self._context.has_b_frames)

    def shows(self, packet) -> bool:
        """Whether a packet holds a picture to be shown, as VP8 and VP9 say in its first bits."""
        if self.codec not in ("vp8", "vp9"):
            return True
        first, last = memoryview(packet)[0], memoryview(packet)[-1]
        if self.codec == "vp8":
            return bool(first & 0b10000)
        # Several pictures in one packet end in their index. Else: show an older picture (4), or this one (1).
        return last >> 5 == 0b110 or bool((first if first >> 4 == 0b1011 else first >> 1) & 0b101)

    def open(self, *, strict: bool = True, probe: bool = True) -> None:
        """Open the file, or begin again at its first packet; `probe=False`: only to read packets.

        A strict decoder reports errors that FFmpeg would otherwise paint over with what was there before.
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
                # Not `options`: PyAV 15 writes past their end where streams show up late, as in flv and mpegts.
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

    def _measured(self) -> tuple[int, int | None, int | None]:
        """How many packets there are (0: not counted), the first time, and the end of the last picture, in ticks.

        A table of all samples knows the end (`announced_end`) if its last entry is there. Otherwise the last packets
        do: the end of a container is that of its longest stream, and may count from zero or from the beginning.
        """
        container, stream, start = self._container, self._stream, self._stream.start_time
        told = None if start is None or not stream.duration else start + stream.duration
        if told is not None and stream.frames and self.format_name in ("mov", "avi"):
            entries = getattr(stream, "index_entries", None)  # PyAV < 17 does not show them
            if entries:  # the last entry is decoded a few pictures before the end
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
        self.trouble = None  # what is asked for may come before it
        return count, first, end

    def _duration(self, count: int, first: int | None, end: int | None) -> float:
        start = first if self.start is None else self.start
        if start is not None and end is not None and end > start:
            seconds = float((end - start) * self.tick)
        else:  # no times, or those of one picture
            seconds = max(1, count) / self.fps
        if seconds > self._limits.max_duration_seconds:
            raise VideoLimitError(
                f"The video lasts {seconds:.0f} s, more than max_duration_seconds="
                f"{self._limits.max_duration_seconds}. {RAISE_LIMITS}"
            )
        return seconds

    def read(self):
        """The stream's next packet, or None at the end of what can be read."""
        self.clock.check()
        try:
            for packet in self._packets:
                if packet.size:
                    if self.in_decoding_order:
                        packet.pts = packet.dts
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
        if self.format_name != "mov" or not entries or entries[-1].timestamp < high:
            return None
        found = entries.search_timestamp(high, backward=True)
        return found >= 0 and entries[found].timestamp > low

    def decode(self, packet, *, skip: bool = False, lenient: bool = False) -> list[av.VideoFrame]:
        """Pictures that come out when `packet` goes in, or those still inside where it is None; `skip` leaves out a
        picture on which no other depends."""
        self.clock.check()
        # PyAV < 17 does not tell; the end, None, has none either.
        if hasattr(packet, "has_sidedata") and packet.has_sidedata("encryption_info"):
            raise VideoDecodeError("The pictures of this video are encrypted. Decrypt the file first.")
        context = self._lenient[0] if lenient else self._context
        context.skip_frame = "NONREF" if skip and self.codec in _LEAVES_OUT else "DEFAULT"
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

    def picture(self, seconds: float, frame, *, valid: bool) -> Picture:
        with _translated_errors("FFmpeg cannot convert the picture to RGB.", VideoDecodeError):
            try:
                rgb = frame.reformat(format="rgb24", **_ONE_THREAD)
            except av.error.FFmpegError:
                frame.colorspace = 2  # unspecified, in place of one that FFmpeg cannot convert from
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
            valid=valid,
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
    except VideoError:
        raise
    except (av.error.FFmpegError, ValueError, LookupError, OverflowError, NotImplementedError) as error:
        raise kind(f"{message} ({getattr(error, 'strerror', None) or error})") from error


def _preference(stream) -> tuple[bool, bool, int]:
    """Of several streams: the default one, one that moves, the largest (the first of those that are alike)."""
    default = bool(stream.disposition & av.stream.Disposition.default)
    return default, stream.frames != 1, stream.codec_context.width * stream.codec_context.height


def _display_matrix(frame) -> bytes | None:
    """PyAV fails at side data that it has no name for, such as EXIF, when it has read what comes before: a matrix,
    also the one that FFmpeg makes of EXIF, does."""
    found = SideDataContainer.__new__(SideDataContainer)
    with suppress(ValueError):
        found.__init__(frame)
    with suppress(ValueError):
        return next((bytes(entry) for entry in found if entry.type.name == "DISPLAYMATRIX"), None)
    return None


def _orientation(frame) -> tuple[bool, bool, bool]:
    """(transpose, mirror, upside down) that turn the stored picture upright, for quarter turns and mirrorings.

    FFmpeg's display matrix (a b u, c d v, x y w) sends the point (p, q) to (a p + c q, b p + d q).
    """
    matrix = _display_matrix(frame)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if a == d == 0 and b and c:
        return True, c < 0, b < 0
    return False, a < 0, d < 0
