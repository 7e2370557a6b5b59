"""Chooses the packets of a video to decode for the requested frames, and decodes them."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import BinaryIO

import av
import av.error
from av.video.frame import PictureType

from .video_file import LATE, Picture, VideoFile
from .video_source import RAISE_LIMITS, VideoDecodeError, VideoLimitError, VideoLimits

_QUEUE_BYTES = 64 * 1024**2
_EARLY_PICTURES = 32
# Packets to read after the requested moment: some containers do not store decoding times, and FFmpeg's guess can be
# wrong by the number of pictures that the decoder delays.
_MARGIN = 8


def sample_times(
    duration_seconds: float,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
) -> list[float]:
    """Moments at which to sample a video, in seconds from its start.

    `num_frames=n`: the middles of n equal shares, start + (i + 1/2) * duration / n.
    `fps=f`: start + k / f before the end; if those are more than `max_frames`, `num_frames=max_frames` instead.
    The sampled part is [start_seconds, end_seconds); `end_seconds=None` is the end of the video.

    Example: 10 s, num_frames=4 -> [1.25, 3.75, 6.25, 8.75]; 3 s, fps=1 -> [0, 1, 2].
    """
    _check_sampling(num_frames, fps, max_frames)
    duration = _check_part(duration_seconds, start_seconds, end_seconds) - start_seconds
    # The tolerance excludes k / fps == duration when the product is rounded up.
    count = num_frames if fps is None else max(1, math.ceil(duration * fps - 1e-6))
    wanted = count if max_frames is None else min(count, max_frames)
    if fps is not None and wanted == count:
        return [start_seconds + k / fps for k in range(count)]
    return [start_seconds + (i + 0.5) * duration / wanted for i in range(wanted)]


def _check_sampling(num_frames: int | None, fps: float | None, max_frames: int | None) -> None:
    if (num_frames is None) == (fps is None):
        raise ValueError(f"Pass exactly one of `num_frames` and `fps`; got num_frames={num_frames}, fps={fps}.")
    for name, count in (("num_frames", num_frames), ("max_frames", max_frames)):
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1; got {count}.")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"`fps` must be a positive number; got {fps}.")


def _check_part(duration_seconds: float, start_seconds: float, end_seconds: float | None) -> float:
    """Checks the sampled part of a video and returns its end. duration_seconds: infinity if not known."""
    end = duration_seconds if end_seconds is None else min(end_seconds, duration_seconds)
    if not 0 <= start_seconds < end:
        length = "" if duration_seconds == math.inf else f" and a video of {duration_seconds:.3f} s"
        raise ValueError(
            f"`start_seconds` must be within the video and before `end_seconds`; got start_seconds={start_seconds}, "
            f"end_seconds={end_seconds}{length}."
        )
    return end


@dataclass(frozen=True)
class Request:
    """The caller's choice of frames, checked."""

    num_frames: int | None
    fps: float | None
    times: list[float] | None
    max_frames: int | None
    start_seconds: float
    end_seconds: float | None

    @classmethod
    def check(cls, num_frames, fps, times, max_frames, start_seconds, end_seconds) -> Request:
        given = {"num_frames": num_frames, "fps": fps, "times": times}
        if sum(value is not None for value in given.values()) > 1:
            raise ValueError(f"Pass at most one of `num_frames`, `fps` and `times`; got {given}.")
        if times is not None:
            times = [float(moment) for moment in times]
            if not times or not all(math.isfinite(moment) for moment in times) or times != sorted(times):
                raise ValueError(f"`times` must be seconds in ascending order, at least one; got {times[:8]}.")
        elif num_frames is not None or fps is not None:
            _check_sampling(num_frames, fps, max_frames)
            _check_part(math.inf, start_seconds, end_seconds)
        return cls(num_frames, fps, times, max_frames, start_seconds, end_seconds)

    def moments(self, duration_seconds: float) -> list[float] | None:
        """Seconds from the start of the stream, or None for every frame."""
        if self.times is not None:
            return self.times
        if self.num_frames is None and self.fps is None:
            _check_part(duration_seconds, self.start_seconds, self.end_seconds)
            return None
        return sample_times(
            duration_seconds,
            num_frames=self.num_frames,
            fps=self.fps,
            max_frames=self.max_frames,
            start_seconds=self.start_seconds,
            end_seconds=self.end_seconds,
        )


@dataclass(frozen=True)
class Info:
    fps: float
    duration_seconds: float
    total_num_frames: int
    width: int
    height: int
    codec: str
    num_wanted: int | None  # None: every frame


class _Untrusted(Exception):
    """The container's data about packets (times, keyframes) is missing or contradicts the decoder's output."""


def read_video(opened: BinaryIO, request: Request, limits: VideoLimits, num_threads: int):
    """Yields an `Info`, then the pictures, then a description of any error (a sentence or "")."""
    file = VideoFile(opened, limits=limits, num_threads=num_threads)
    moments = request.moments(file.duration_seconds)
    if moments is not None and len(moments) > limits.max_frames:
        raise VideoLimitError(f"{len(moments)} frames are more than max_frames={limits.max_frames}. {RAISE_LIMITS}")
    yield Info(
        fps=file.fps,
        duration_seconds=file.duration_seconds,
        total_num_frames=file.total_num_frames,
        width=file.width,
        height=file.height,
        codec=file.codec,
        num_wanted=None if moments is None else len(moments),
    )
    yield from _pictures(file, request, moments)
    yield f"Reading ended early: {file.trouble}." if file.trouble else ""


def _pictures(file: VideoFile, request: Request, moments: list[float] | None) -> Iterator[Picture]:
    """Yields the requested pictures in order; for a missing one, an empty picture of the same shape."""
    held: list[Picture] = []
    like: Picture | None = None
    for picture in _decoded(file, request, moments):
        if picture.pixels is not None:
            like = picture
        held.append(picture)
        if like is None:
            continue
        for picture in held:
            if picture.pixels is None:
                picture = replace(picture, width=like.width, height=like.height, orientation=like.orientation)
            with file.clock.paused():
                yield picture
        held.clear()
    if like is None and not held and not file.trouble:
        raise VideoDecodeError("No frame is due in the requested part of the video.")
    if like is None:
        raise VideoDecodeError(f"No frame of the video can be decoded. ({file.trouble or 'FFmpeg gives no reason'})")


def _decoded(file: VideoFile, request: Request, moments: list[float] | None) -> Iterator[Picture]:
    after = -math.inf
    if file.seekable:
        with suppress(_Untrusted):
            for picture in _LookAhead(file).pictures(request, moments):
                after = picture.seconds
                yield picture
            return
    yield from _in_sequence(file, request, moments, after=after)


def _in_sequence(file: VideoFile, request: Request, moments, *, after: float) -> Iterator[Picture]:
    """Decodes all packets from the first on and trusts the decoder's order."""
    file.open(strict=False)
    if file.in_decoding_order:
        file.start = None  # set from the first decoded picture
    targets = deque(moments or ())
    end = math.inf if request.end_seconds is None or moments is not None else request.end_seconds
    for shown, following in pairwise(chain(_in_order_of_output(file), [(math.inf, None, True)])):
        seconds, frame, valid = shown
        wanted = moments is None and request.start_seconds - LATE <= seconds < end - LATE
        while targets and targets[0] + LATE < following[0]:
            targets.popleft()
            wanted = True
        if wanted and seconds > after:
            yield file.picture(seconds, frame, valid=valid)
        if seconds >= end or (moments is not None and not targets):
            return


def _in_order_of_output(file: VideoFile) -> Iterator[tuple[float, av.VideoFrame, bool]]:
    """Yields every picture with its time in seconds and its validity: after an error, pictures are invalid until a
    keyframe. Without any clock, picture k is due at k / fps.
    """
    clock, last, valid, packet = _OutputClock(), None, True, ...
    while packet is not None:
        packet = file.read()
        try:
            frames = file.decode(packet)
        except av.error.FFmpegError as error:
            file.trouble = file.trouble or str(error)
            frames, valid = [], False
        for frame in frames:
            pts = frame.pts
            if file.has_clock:
                pts = clock.ticks(None if file.in_decoding_order else pts, frame.dts)
            if pts is not None:
                file.start = pts if file.start is None else file.start
                last = file.seconds(pts) if last is None else max(file.seconds(pts), last)
            else:
                last = 0.0 if last is None else last + 1 / file.fps
            valid = not frame.is_corrupt and (valid or frame.key_frame)
            yield last, frame, valid


class _OutputClock:
    """Chooses the times of decoded pictures: their pts, unless these have gone backwards more often than the dts of
    the packets after which the pictures were output. FFmpeg's own programs use the same rule."""

    def __init__(self):
        self.last, self.faults = [-math.inf, -math.inf], [0, 0]

    def ticks(self, pts: int | None, dts: int | None) -> int | None:
        for kind, (stamp, other) in enumerate(((pts, dts), (dts, pts))):
            if stamp is not None:
                self.faults[kind] += stamp <= self.last[kind]
                self.last[kind] = stamp
            elif other is not None:
                self.last[kind] = other
        return dts if pts is None or (dts is not None and self.faults[0] > self.faults[1]) else pts


class _Damaged(Exception):
    """A picture in `_LookAhead.pending` was not decoded correctly."""


class _LookAhead:
    """Finds pictures by presentation time and decodes as few packets as possible.

    Packets are read ahead of the decoder until their decoding time is after the target (dts > target): no later packet
    can be due by then, so the wanted one is known. Decoding starts at the last keyframe due by the target, ends at the
    wanted packet, and skips pictures that no other depends on.

    The container is trusted until the decoder's output contradicts it; then `_Untrusted` is raised.

    A group of pictures with a fault (an error, a picture missing or marked corrupt) is decoded again, first from the
    keyframe before its own: in open groups the decoder misses pictures that it is told to forget, which is an error
    and no damage. With the same fault again it is damaged: the lenient decoder decodes it without skipping
    (`careful`). Pictures that are still wrong, and those decoded after the packet with the error, are returned as
    invalid.
    """

    def __init__(self, file: VideoFile):
        self.file = file
        self.queue: deque[av.Packet] = deque()  # read and not yet decoded
        self.queue_bytes = 0
        self.due: list[int] = []  # ascending pts of packets read, later than `last`
        self.recent: deque[float] = deque(maxlen=_MARGIN)  # dts of the packets read last
        self.every = False  # whether every picture is requested
        self.ended = False
        self.end: int | None = None  # end of the last picture read
        self.early: dict[int, av.VideoFrame] = {}  # decoded pictures that a later target may want
        self.pending: deque[int] = deque()  # pts wanted, given to the decoder and not yet decoded
        self.last: float = -math.inf  # pts last wanted
        self.keyframe: float = -math.inf  # pts at which decoding began, or from which on its faults count
        self.led_in: float = -math.inf  # `keyframe`, if decoding began at the keyframe before it
        self.damaged: set[float] = set()  # keyframes whose group has a fault with that too
        self.awaited: int | None = None  # the keyframe, until the decoder's output shows that it is one
        self.careful = False
        self.careful_until: float = -math.inf
        self.again: set[int] = set()  # pts that were pending in a damaged group
        self.fed: int | None = None  # pts of the last packet given to the decoder, None before the first
        self.leading = False  # whether pictures due before the keyframe were given: they may need earlier packets
        self.broken: set[int] = set()  # pts of packets at which decoding errors begin
        self.doubtful: set[int] = set()  # pts of pictures decoded after those errors
        self.failed = False  # whether there was an error since decoding began
        self.broken_groups = 0
        self.good = False  # whether the strict decoder has output a valid picture
        self.out = -math.inf  # pts of the last decoder output
        self.handed_out: float = -math.inf  # pts of the last picture yielded
        self.owed = False  # whether the first picture is still to be yielded, for moments before it
        self.shown: av.VideoFrame | None = None  # in a complete decode: the last output that was not yielded
        self.patience_seconds = 4.0  # distances up to this are read instead of skipped by a seek

    def pictures(self, request: Request, moments: list[float] | None) -> Iterator[Picture]:
        file, self.every = self.file, moments is None
        self._check_order()
        todo = deque(max(file.ticks(moment), file.start) for moment in moments or ())
        first, end, every = -math.inf, math.inf, self.every
        if every and request.start_seconds > 0:
            first = file.ticks(request.start_seconds - 2 * LATE) + 1
            self._start_at(first)
        if every and request.end_seconds is not None:
            end = file.ticks(request.end_seconds - 2 * LATE) + 1
        while True:
            try:
                if todo:
                    yield from self._serve(todo[0])
                    todo.popleft()
                elif every:
                    every = yield from self._serve_next(first, end)
                else:
                    yield from self._drain()
                    yield from self._pay()
                    break
            except _Damaged:
                todo.extendleft(reversed(self.pending))
                self._begin_again()
        if moments is None and file.announced_end is not None and self._after_the_data(file.announced_end - 1):
            file.trouble = file.trouble or f"the data ends after {file.seconds(self.end):.3f} s"

    def _serve(self, target: int):
        """Yields the last picture due at `target`, unless it has been yielded already."""
        if target > self.careful_until and self._worth_seeking(target):
            yield from self._drain()
            yield from self._pay()
            self._trust()
            self._start_at(target)
        pts = yield from self._find(target)
        lost = target in self.again and pts != target
        self.again.discard(target)
        if lost or self._after_the_data(target):
            yield from self._drain()
            yield self.file.no_picture(self.file.seconds(target))
        elif pts is not None:
            yield from self._show(pts)

    def _serve_next(self, first: float, end: float):
        """Yields the next picture due in [first, end); returns False if there is none."""
        while (pts := (yield from self._find(None))) is not None and pts < first:
            self._advance(pts)
        if pts is None or pts >= end:
            return False
        yield from self._show(pts)
        return True

    def _show(self, pts: int):
        if pts > self.careful_until:
            yield from self._jump(pts)
        self._advance(pts)
        self.pending.append(pts)
        if self.broken and not self.careful:
            raise _Damaged
        if pts in self.early:
            yield from self._hand_out(pts, self.early.pop(pts))
        else:
            yield from self._feed(pts)

    def _advance(self, pts: int) -> None:
        self.last = pts
        del self.due[: bisect.bisect_right(self.due, pts)]
        self.early = {early: frame for early, frame in self.early.items() if early >= pts}

    # Reading

    def _read(self) -> None:
        packet = self.file.read()
        if packet is None:
            self.ended = True
            return
        if packet.pts is None:
            raise _Untrusted
        self.recent.append(-math.inf if packet.dts is None else packet.dts)
        self.queue.append(packet)
        self.queue_bytes += packet.size
        # Pictures before an edit list's start are decoded but not shown.
        if not packet.is_discard and self.file.shows(packet):
            over = packet.pts + (packet.duration or 0)
            self.end = over if self.end is None else max(self.end, over)
            if self.every and packet.pts in self.due:  # pictures that share a time
                raise _Untrusted
            if packet.pts > self.last:
                bisect.insort(self.due, packet.pts)

    def _read_past(self, pts: float) -> bool:
        return self.ended or (len(self.recent) == _MARGIN and min(self.recent) > pts)

    def _find(self, target: int | None):
        """Returns the pts of the last picture due at `target` (None: of the next one), or None if it is not new."""
        while True:
            position = bisect.bisect_right(self.due, target) if target is not None else 0
            if position == 0 and self.due and (target is None or self.last == -math.inf):
                position = 1  # a moment before the first picture gives the first one
            wanted = self.due[position - 1] if position else None
            limit = max((moment for moment in (target, wanted) if moment is not None), default=math.inf)
            if self._read_past(limit):
                return wanted
            self._read()
            # A long part without keyframes is decoded early; pictures before the best one so far are skipped.
            while self.queue_bytes > _QUEUE_BYTES:
                yield from self._feed_one(skip=wanted is not None and self.queue[0].pts < wanted)

    def _check_order(self) -> None:
        """Reads the first packets. If all have pts = dts although the decoder reorders pictures, decodes them and
        raises `_Untrusted` if the pictures are output in another order."""
        while len(self.queue) < 4 * _MARGIN and not self.ended:
            self._read()
        if self.file.start is None:
            self.file.start = self.due[0] if self.due else 0
        if self.file.holds_back and all(packet.pts == packet.dts for packet in self.queue):
            with suppress(av.error.FFmpegError):
                frames = [frame.pts for packet in (*self.queue, None) for frame in self.file.decode(packet)]
                if frames != sorted(frames):
                    raise _Untrusted
            self._flush()

    def _after_the_data(self, target: int) -> bool:
        """Whether the header announces a picture for `target`, but the file ends before it."""
        if not self.ended or self.end is None or self.file.announced_end is None:
            return False
        return self.end + 1.5 / (self.file.fps * self.file.tick) <= target < self.file.announced_end

    # Jumping

    def _worth_seeking(self, target: int) -> bool:
        position = self.recent[-1] if self.recent else self.file.start
        if self.ended or position == -math.inf or target <= position:
            return False
        between = self.file.keyframe_between(position, target)
        if between is not None:
            return between
        return (target - position) * self.file.tick > self.patience_seconds

    def _start_at(self, pts: int) -> None:
        """Seeks to a keyframe due by `pts`, or to the first packet."""
        self._flush()
        behind, step, at = self.recent[-1] if self.recent else -math.inf, max(1, round(1 / self.file.tick)), pts
        while True:
            rewound = at <= self.file.start or not self.file.seek(at)
            if rewound:
                self.file.open()
            self.queue.clear()
            self.recent.clear()
            self.due.clear()
            self.queue_bytes, self.ended = 0, False
            while not self.ended and not self.queue and not self._read_past(pts):
                self._read()
                if not rewound and self.queue and not self.queue[0].is_keyframe:
                    self._drop_first()
            if rewound or (self.queue and self.queue[0].pts <= pts):
                break
            at, step = at - step, 2 * step
        self._begin_group()
        if rewound:
            self.awaited = None
        if self.recent and self.recent[-1] <= behind:
            self.patience_seconds *= 2

    def _begin_group(self) -> None:
        first = self.queue[0].pts if self.queue else None
        self.keyframe = -math.inf if first is None else first
        self.awaited = None if self.queue and self.queue[0].is_discard else first
        self.leading = self.failed = False
        self.led_in = -math.inf

    def _drop_first(self) -> None:
        packet = self.queue.popleft()
        self.queue_bytes -= packet.size
        place = bisect.bisect_left(self.due, packet.pts)
        if self.due[place : place + 1] == [packet.pts]:
            del self.due[place]

    def _jump(self, pts: int):
        """Drops the packets before the last keyframe in the queue from which `pts` can be decoded."""
        ahead = list(islice(self.queue, self._packets_up_to(pts)))
        found = max(
            (place for place, packet in enumerate(ahead) if packet.is_keyframe and packet.pts <= pts), default=-1
        )
        if found < 0 or (found == 0 and (self.fed is None or not self.careful)):
            return
        yield from self._drain()
        if self.owed:
            return
        for _ in range(found):
            self._drop_first()
        self._trust()
        self._begin_group()

    def _trust(self) -> None:
        """Switches back to the strict decoder."""
        self.careful = False
        self.broken.clear()
        self.doubtful.clear()

    def _begin_again(self) -> None:
        """Decodes the group with the pending pictures again: from the keyframe before its own or, if that was done
        already, completely, with the lenient decoder."""
        first, keyframe = self.pending[0], self.keyframe
        leads_in = keyframe > self.file.start and keyframe not in (self.led_in, *self.damaged)
        self.broken_groups += not leads_in and keyframe in self.broken
        if not self.good and self.broken_groups > 1:
            raise _Untrusted  # decoding cannot start at the container's keyframes
        self.again.update(self.pending)
        self.careful_until = max(self.careful_until, self.pending[-1])
        self.pending.clear()
        self.last = first - 1
        if leads_in:
            self._trust()
            self._start_at(int(keyframe) - 1)
            self.led_in = self.keyframe = self.awaited = int(keyframe)
            return
        self.damaged.add(keyframe)
        self.careful = True
        self.doubtful.clear()
        self._start_at(first)

    def _packets_up_to(self, pts: int) -> int:
        """Counts the packets of the queue up to the one with `pts`; 0 if it is not there."""
        return next((place + 1 for place, packet in enumerate(self.queue) if packet.pts == pts), 0)

    # Decoding

    def _feed(self, pts: int):
        """Decodes up to the packet with `pts`."""
        for _ in range(self._packets_up_to(pts)):
            yield from self._feed_one(skip=self.queue[0].pts < pts)

    def _feed_one(self, *, skip: bool):
        packet = self.queue.popleft()
        self.queue_bytes -= packet.size
        self.fed = packet.pts
        self.leading |= packet.pts < self.keyframe
        if packet.is_corrupt:  # a transport stream numbers its packets, so losses are known
            self._record_failure()
        if self.doubtful or packet.pts in self.broken:
            self.doubtful.add(packet.pts)
        skip = skip and not self.careful and not packet.is_keyframe and packet.pts not in self.pending
        yield from self._decode(packet, skip=skip)

    def _drain(self):
        if self.fed is not None:
            yield from self._decode(None)
        yield from self._resolve_missing(math.inf)
        self._flush()

    def _decode(self, packet, *, skip: bool = False):
        try:
            frames = self.file.decode(packet, skip=skip, lenient=self.careful)
        except av.error.FFmpegError:
            frames = []
            self._record_failure()
        for frame in frames:
            pts = frame.pts
            if pts is None or (pts < self.out and not self.broken):
                raise _Untrusted
            self.out = pts
            if self.awaited is not None and pts >= self.awaited:
                # A marked keyframe may not be one, or may only begin a gradual refresh.
                started = pts == self.awaited and (frame.key_frame or frame.pict_type == PictureType.I)
                self.awaited = None
                if not started and not self.failed:
                    raise _Untrusted
            if frame.is_corrupt and pts not in self.broken and pts >= self.keyframe:
                self._damage(pts)
                self.doubtful.update(self.pending)
            yield from self._hand_out(pts, frame)

    def _pay(self):
        """Decodes on to the first picture, if it is owed to moments before it."""
        while self.owed and (self.queue or not self.ended):
            if self.queue:
                yield from self._feed_one(skip=False)
            else:
                self._read()
        if self.owed:
            yield from self._drain()

    def _flush(self) -> None:
        self.file.flush()
        self.fed = None
        self.early.clear()
        self.out = -math.inf

    def _record_failure(self) -> None:
        """Records where decoding failed: at the last packet, or, with threads, anywhere since the keyframe."""
        self.failed = True
        if self.file.reports_at_once:
            if self.fed >= self.keyframe:
                self._damage(self.fed)
        elif self.keyframe > -math.inf and not self.leading:
            self._damage(self.keyframe)

    def _damage(self, pts: float) -> None:
        self.broken.add(pts)
        if self.pending and not self.careful:
            raise _Damaged from None

    def _hand_out(self, pts: int, frame: av.VideoFrame):
        yield from self._resolve_missing(pts)
        wanted = bool(self.pending) and self.pending[0] == pts
        if wanted and frame.is_corrupt and not self.careful:
            raise _Damaged
        if wanted or self.owed:
            if wanted:
                self.pending.popleft()
            yield self._picture(frame)
        elif pts > self.last:
            self.early[pts] = frame
            if len(self.early) > _EARLY_PICTURES:
                del self.early[next(iter(self.early))]
        elif self.careful:
            self.shown = frame

    def _picture(self, frame: av.VideoFrame) -> Picture:
        self.shown, self.owed = None, False
        self.handed_out = frame.pts or 0
        valid = not frame.is_corrupt and frame.pts not in self.doubtful
        self.good |= valid and not self.careful
        return self.file.picture(self.file.seconds(frame.pts), frame, valid=valid)

    def _resolve_missing(self, pts: float):
        """Handles pictures pending before `pts`: output is in order, so they are missing. If a complete decode has no
        error, they are not meant to be shown, and the picture before them is due instead."""
        while self.pending and self.pending[0] < pts:
            if not self.careful:
                raise _Damaged
            missing = self.pending.popleft()
            if self.broken:
                yield self.file.no_picture(self.file.seconds(missing))
            elif self.shown is not None and self.shown.pts > self.handed_out:
                yield self._picture(self.shown)
            else:
                self.owed = self.handed_out == -math.inf and not self.every
