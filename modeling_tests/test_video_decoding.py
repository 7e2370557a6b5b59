"""The video decoder returns exactly the frames that a plain sequential decode gives, and says so when it cannot."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import video_files
from transformers_crosslmm import video_decoding, video_file, video_source
from transformers_crosslmm.video_decoding import (
    VideoDecodeError,
    VideoDecodeWarning,
    VideoLimitError,
    VideoLimits,
    VideoOpenError,
    VideoTimeoutError,
    decode_video,
    iter_video,
    sample_times,
)
from video_files import CLEAN, FPS, NUM_FRAMES, all_frames, encode, make, number_of, with_matrix

REQUESTS = {
    "sparse": {"num_frames": 5},
    "uniform": {"num_frames": 16},
    "dense": {"num_frames": 64},
    "more_than_there_are": {"num_frames": 1000},
    "fps": {"fps": 7.3},
    "fps_capped": {"fps": 9.0, "max_frames": 11},
    "times": {"times": [0, 0.001, 0.5, 0.7001, 0.71, 1.9, 1e6]},
    "every_frame": {},
    "part": {"start_seconds": 0.01, "end_seconds": 0.9},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session")
def clip(folder) -> Path:
    return make("h264_mp4", folder)


def pixels(decoded) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).numpy() for frame in decoded.frames]


def truth(name: str, data: bytes, fps: float) -> tuple[list[float], list[np.ndarray]]:
    """Seconds and pixels of every picture. Where packets have no times (or, in AVI, those of another order), picture k
    is due at k / fps."""
    pictures = list(all_frames(data))
    counted = pictures[0][0] is None or name == "h264_avi"
    seconds = [
        k / fps if counted else float((pts - pictures[0][0]) * frame.time_base)
        for k, (pts, frame) in enumerate(pictures)
    ]
    return seconds, [frame.to_ndarray(format="rgb24") for _, frame in pictures]


def last_due(seconds: list[float], moments: list[float]) -> list[int]:
    """Numbers of the last pictures due at the moments, each once."""
    found = [max((k for k in range(len(seconds)) if seconds[k] <= t + 1e-7), default=0) for t in moments]
    return list(dict.fromkeys(found))


# Sampling


def test_uniform_sampling_takes_the_middles_of_equal_shares():
    assert sample_times(10.0, num_frames=4) == [1.25, 3.75, 6.25, 8.75]
    assert sample_times(10.0, num_frames=2, start_seconds=2.0, end_seconds=6.0) == [3.0, 5.0]


def test_fps_sampling_starts_at_the_start_and_turns_uniform_beyond_max_frames():
    assert sample_times(3.0, fps=1) == [0.0, 1.0, 2.0]
    assert sample_times(3.2, fps=2, start_seconds=1.0) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert sample_times(100.0, fps=1, max_frames=4) == sample_times(100.0, num_frames=4)
    assert sample_times(5.0, fps=29.97)[-1] < 5.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"num_frames": 2, "fps": 1.0}, "exactly one of"),
        ({"num_frames": 0}, "at least 1"),
        ({"fps": 0.0}, "positive"),
        ({"fps": 1.0, "max_frames": 0}, "at least 1"),
        ({"fps": 1.0, "start_seconds": 11.0}, "must be within the video"),
        ({"fps": 1.0, "start_seconds": 5.0, "end_seconds": 5.0}, "before `end_seconds`"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_times(10.0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 2, "fps": 1.0}, "at most one of"),
        ({"times": []}, "ascending"),
        ({"times": [2.0, 1.0]}, "ascending"),
        ({"times": [float("nan")]}, "ascending"),
        ({"num_frames": 0}, "at least 1"),
        ({"start_seconds": 100.0}, "must be within the video"),
        ({"num_frames": 3, "start_seconds": 100.0}, "must be within the video"),
    ],
)
def test_requests_that_make_no_sense_are_refused(clip, arguments, message):
    with pytest.raises(ValueError, match=message):
        decode_video(clip, **arguments)


# Exactness


@pytest.mark.parametrize("name", CLEAN)
def test_frames_are_those_of_a_sequential_decode(folder, name):
    data = make(name, folder).read_bytes()
    expected = None
    for label, request in REQUESTS.items():
        part = request.get("start_seconds")
        if part and name in ("one_frame", "two_frames_webm"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error", VideoDecodeWarning)
            decoded = decode_video(data, num_threads=2 if label == "uniform" else 1, **request)
        seconds, pictures = expected = expected or truth(name, data, decoded.fps)
        if "times" in request:
            wanted = last_due(seconds, request["times"])
        elif "num_frames" in request or "fps" in request:
            wanted = last_due(seconds, sample_times(decoded.duration_seconds, **request))
        else:
            wanted = [k for k, t in enumerate(seconds) if (part or 0) <= t < request.get("end_seconds", 1e9)]
        assert decoded.times == pytest.approx([seconds[k] for k in wanted]), label
        assert decoded.valid.all(), label
        turn = (lambda picture: np.rot90(picture, -1)) if name == "rotated" else (lambda picture: picture)
        for got, k in zip(pixels(decoded), wanted, strict=True):
            assert np.array_equal(got, turn(pictures[k])), f"{label}: picture {k} shows {number_of(got)}"


def test_what_is_known_of_the_video_is_reported(clip):
    decoded = decode_video(clip, num_frames=3)
    assert (decoded.width, decoded.height, decoded.codec) == (video_files.WIDTH, video_files.HEIGHT, "h264")
    assert (decoded.fps, decoded.duration_seconds, decoded.total_num_frames) == (FPS, NUM_FRAMES / FPS, NUM_FRAMES)
    assert decoded.frames.dtype == torch.uint8
    assert decoded.frame_indices == [25, 75, 125]
    assert [number_of(picture) for picture in pixels(decoded)] == decoded.frame_indices


@pytest.mark.parametrize("name", ["h264_raw", "hevc_raw"])
def test_pictures_without_times_are_counted(folder, name):
    decoded = decode_video(make(name, folder), num_frames=1000)
    assert [number_of(picture) for picture in pixels(decoded)] == list(range(NUM_FRAMES))
    assert decoded.total_num_frames == NUM_FRAMES


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
def test_pictures_are_turned_upright(folder, quarter_turns, mirrored):
    plain = make("h264_mp4", folder).read_bytes()
    # Clockwise turns send (x, y) to (-y, x); mirroring comes first.
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][quarter_turns]
    turned = with_matrix(plain, -a if mirrored else a, -b if mirrored else b, c, d)
    upright, got = decode_video(plain, num_frames=3), decode_video(turned, num_frames=3)
    for want, have in zip(pixels(upright), pixels(got), strict=True):
        assert np.array_equal(have, np.rot90(want[:, ::-1] if mirrored else want, -quarter_turns))
    assert (got.width, got.height) == got.frames.shape[:1:-1]


def test_frames_of_ten_bits_and_of_odd_size_come_as_rgb_bytes(folder):
    for name in ("hevc_pq_10_bit", "vp9_odd_webm", "h264_444_odd"):
        decoded = decode_video(make(name, folder), num_frames=4)
        assert decoded.frames.shape == (4, 3, decoded.height, decoded.width)
        assert [number_of(picture) for picture in pixels(decoded)] == decoded.frame_indices


def test_a_clock_slower_than_a_second_is_read_by(folder):
    data = bytearray(make("mpeg4_avi", folder).read_bytes())
    at = data.index(b"strh") + 8 + 20
    data[at : at + 8] = struct.pack("<II", 300, 1)  # a picture every five minutes
    decoded = decode_video(bytes(data), num_frames=5, limits=VideoLimits(max_decode_seconds=20))
    assert decoded.times == [number * 300 for number in (15, 45, 75, 105, 135)]
    assert [number_of(picture) for picture in pixels(decoded)] == [15, 45, 75, 105, 135]


# Work and memory


def test_sparse_frames_cost_a_part_of_the_pictures(folder, monkeypatch):
    decoded, skipped = [], []
    plain = video_file.VideoFile.decode

    def counting(self, packet, *, skip=False, lenient=False):
        if packet is not None:
            (skipped if skip else decoded).append(packet.pts)
        return plain(self, packet, skip=skip, lenient=lenient)

    monkeypatch.setattr(video_file.VideoFile, "decode", counting)
    decode_video(make("h264_mp4", folder), num_frames=3)
    # At 25, 75 and 125 of groups of 24 that begin at 24, 72 and 120: two, four and six pictures to go.
    assert len(decoded) + len(skipped) <= 25
    assert skipped, "no picture on which nothing depends was left out"


def test_sparse_frames_cost_a_part_of_the_bytes():
    data = encode(codec_options={"preset": "ultrafast", "x264-params": "bitrate=8000"}, num_frames=600, b_frames=0)

    class Counting(io.BytesIO):
        total = 0

        def read(self, size=-1):
            piece = super().read(size)
            self.total += len(piece)
            return piece

    file = Counting(data)
    decode_video(file, times=[1.0, 18.0])
    assert file.total < len(data) / 2


def test_the_transform_sees_one_frame_at_a_time_and_decides_what_is_kept(clip):
    seen = []

    def transform(frame):
        seen.append(tuple(frame.shape))
        return frame[:, ::4, ::8].float() / 255

    decoded = decode_video(clip, num_frames=7, frame_transform=transform)
    plain = decode_video(clip, num_frames=7)
    assert seen == [(3, video_files.HEIGHT, video_files.WIDTH)] * 7
    assert torch.equal(decoded.frames, plain.frames[:, :, ::4, ::8].float() / 255)


@pytest.mark.parametrize("request_", [{"num_frames": 11}, {"fps": 2.0}, {}], ids=["uniform", "fps", "every_frame"])
def test_chunks_together_are_the_whole(clip, request_):
    whole, chunks = decode_video(clip, **request_), list(iter_video(clip, chunk_size=4, **request_))
    assert [len(chunk.times) for chunk in chunks[:-1]] == [4] * (len(chunks) - 1)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), whole.frames)
    assert [moment for chunk in chunks for moment in chunk.times] == whole.times
    assert [number for chunk in chunks for number in chunk.frame_indices] == whole.frame_indices
    assert torch.equal(torch.cat([chunk.valid for chunk in chunks]), whole.valid)


def test_a_chunk_is_decoded_when_it_is_asked_for(clip):
    seen = []
    chunks = iter_video(clip, chunk_size=3, frame_transform=lambda frame: seen.append(1) or frame)
    assert not seen
    next(chunks)
    assert len(seen) == 3
    next(chunks)
    assert len(seen) == 6
    chunks.close()


def test_time_between_chunks_does_not_count(clip, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(video_source.time, "monotonic", lambda: now[0])
    for _ in iter_video(clip, chunk_size=40, limits=VideoLimits(max_decode_seconds=1.0)):
        now[0] += 100.0


# Sources


@pytest.mark.parametrize(
    "kind",
    ["str", "path", "bytes", "bytearray", "memoryview", "bytesio", "file", "raw", "pipe", "file_uri", "data_uri"],
)
def test_every_kind_of_source_gives_the_same_frames(clip, kind):
    data = clip.read_bytes()

    class Pipe:
        """Gives no more than a few bytes at a time, and cannot go back."""

        def __init__(self):
            self.inner = io.BytesIO(data)

        def read(self, size=-1):
            return self.inner.read(min(size, 1000))

    import base64

    source = {
        "str": lambda: str(clip),
        "path": lambda: clip,
        "bytes": lambda: data,
        "bytearray": lambda: bytearray(data),
        "memoryview": lambda: memoryview(data),
        "bytesio": lambda: io.BytesIO(data),
        "file": lambda: open(clip, "rb"),  # noqa: SIM115
        "raw": lambda: open(clip, "rb", buffering=0),  # noqa: SIM115
        "pipe": Pipe,
        "file_uri": clip.as_uri,
        "data_uri": lambda: "data:video/mp4;base64," + base64.b64encode(data).decode(),
    }[kind]()
    decoded = decode_video(source, num_frames=6)
    assert torch.equal(decoded.frames, decode_video(clip, num_frames=6).frames)
    if kind in ("bytesio", "file", "raw"):
        assert not source.closed
        source.seek(7)
        assert torch.equal(decode_video(source, num_frames=6).frames, decoded.frames), "not read from its start"
        source.close()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, TypeError, "A video source is"),
        (7, TypeError, "A video source is"),
        (b"", VideoOpenError, "empty"),
        (b"neither audio nor video" * 100, VideoOpenError, "cannot open this as a video"),
        ("no/such.mp4", VideoOpenError, r"Cannot open 'no/such\.mp4': No such file or directory\. Check the path"),
        ("/tmp", VideoOpenError, "'/tmp' is a folder. Name a file in it"),
        ("/dev/zero", VideoOpenError, "not a regular file"),
        ("data:video/mp4;base64,!!!", VideoOpenError, "not valid base64"),
        ("data:video/mp4;base64", VideoOpenError, "no comma"),
        ("file://elsewhere/clip.mp4", VideoOpenError, "must name this machine"),
        ("rtsp://camera/1", VideoOpenError, "not accepted"),
        (io.StringIO("text"), VideoOpenError, "binary mode"),
    ],
)
def test_what_is_not_a_video_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        decode_video(source, num_frames=2)


def test_a_file_without_pictures_is_refused():
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(video_decoding.NoVideoStreamError, match="no video stream"):
        decode_video(sound.getvalue(), num_frames=2)


# Damage


def damaged(data: bytes) -> bytes:
    """The file with noise over a fiftieth of it, in its middle."""
    begin, end = int(0.45 * len(data)), int(0.47 * len(data))
    return data[:begin] + np.random.default_rng(0).bytes(end - begin) + data[end:]


@pytest.mark.parametrize("name", ["h264_mp4", "hevc_mp4", "mpeg2_ts", "mpeg4_mp4"])
def test_damage_is_reported_and_what_is_called_valid_is_right(folder, name):
    data = make(name, folder).read_bytes()
    with pytest.warns(VideoDecodeWarning, match="damaged"):
        decoded = decode_video(damaged(data), num_frames=30)
    assert 10 <= int(decoded.valid.sum()) < len(decoded.times) <= 30
    assert len(set(decoded.times)) == len(decoded.times)
    clean = decode_video(data, times=decoded.times)
    for k in range(len(decoded.times)):
        if decoded.valid[k]:
            assert torch.equal(decoded.frames[k], clean.frames[k]), f"the frame at {decoded.times[k]:.2f} s is wrong"
    with pytest.raises(VideoDecodeError, match="strict"):
        decode_video(damaged(data), num_frames=30, strict=True)


def test_frames_after_the_end_of_a_cut_mp4_are_missing_and_not_repeated(tmp_path):
    # With the index in front, a cut file opens and knows how long it should be.
    options = {"movflags": "faststart"}
    data = encode(path=tmp_path / "whole.mp4", codec_options=video_files.X264, container_options=options)
    cut = data[: int(len(data) * 0.6)]
    with pytest.warns(VideoDecodeWarning, match=r"\d+ of 20 frames"):
        decoded = decode_video(cut, num_frames=20)
    assert len(decoded.times) == 20
    good = int(decoded.valid.sum())
    assert 8 <= good <= 13
    assert not decoded.valid[good + 2 :].any()
    assert not decoded.frames[-5:].any(), "what is missing is black"
    shown = [number_of(picture) for picture, valid in zip(pixels(decoded), decoded.valid, strict=True) if valid]
    assert shown == [number for number, valid in zip(decoded.frame_indices, decoded.valid, strict=True) if valid]


@pytest.mark.parametrize("name", ["h264_mkv", "h264_ts"])
def test_a_cut_stream_gives_each_frame_it_holds_once(folder, name):
    data = make(name, folder).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoDecodeWarning)
        decoded = decode_video(data[: int(len(data) * 0.6)], num_frames=40)
    shown = [number_of(picture) for picture, valid in zip(pixels(decoded), decoded.valid, strict=True) if valid]
    assert shown == sorted(set(shown))
    assert len(shown) >= 20 or len(decoded.times) >= 20


def test_frames_that_change_size_are_refused_without_a_transform():
    parts = [
        encode(container="h264", num_frames=20, b_frames=0, width=w, height=h) for w, h in ((160, 96), (320, 192))
    ]
    with pytest.raises(VideoDecodeError, match="change shape"):
        decode_video(b"".join(parts))
    resized = decode_video(b"".join(parts), frame_transform=lambda frame: frame[:, :90, :90])
    assert resized.frames.shape == (40, 3, 90, 90)


# Limits


@pytest.mark.parametrize(
    ("limits", "request_", "error", "message"),
    [
        ({"max_bytes": 1000}, {"num_frames": 2}, VideoLimitError, "max_bytes=1000"),
        ({"max_pixels": 160 * 96 - 1}, {"num_frames": 2}, VideoLimitError, "160x96"),
        ({"max_frames": 9}, {"num_frames": 10}, VideoLimitError, "max_frames=9"),
        ({"max_frames": 9}, {}, VideoLimitError, "max_frames=9"),
        ({"max_duration_seconds": 4.9}, {"num_frames": 2}, VideoLimitError, "max_duration_seconds=4.9"),
        ({"max_output_bytes": 160 * 96 * 3 * 5}, {"num_frames": 6}, VideoLimitError, "max_output_bytes"),
        ({"max_decode_seconds": 0.0}, {"num_frames": 2}, VideoTimeoutError, "max_decode_seconds"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_passes_a_limit_is_refused(clip, limits, request_, error, message):
    with pytest.raises(error, match=message):
        decode_video(clip, limits=VideoLimits(**limits), **request_)


def test_a_stream_that_does_not_end_is_refused():
    class Endless:
        def read(self, size=-1):
            return bytes(size)

    with pytest.raises(VideoLimitError, match="max_bytes"):
        decode_video(Endless(), limits=VideoLimits(max_bytes=10**6))


def test_all_errors_are_value_errors_of_one_family():
    for name in ("Open", "NoVideoStream", "Limit", "Timeout", "Decode"):
        name = f"{name}Error" if name == "NoVideoStream" else f"Video{name}Error"
        assert issubclass(getattr(video_decoding, name), video_decoding.VideoError)
    assert issubclass(video_decoding.VideoError, ValueError)
