"""Small video files of every kind that the decoder promises to read exactly, made with PyAV.

Every picture shows its number: sixteen bars at the top, black or white, are the bits of it. Below them a texture
moves, so that pictures differ everywhere and a codec has something to predict.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

NUM_BITS = 16
WIDTH, HEIGHT, FPS, NUM_FRAMES, GOP = 160, 96, 30, 150, 24


def draw(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) uint8 picture of `number`."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 128 + 60 * np.sin((x + 3 * number) / 9.0) + 50 * np.cos((y - 2 * number) / 7.0 + x / 31.0)
    noise = np.random.default_rng(number).integers(-12, 13, (height, width))
    picture = np.stack([wave + noise, 255 - wave, wave.T.mean() + 0 * wave + (number * 5) % 90], axis=-1)
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    for bit in range(NUM_BITS):
        left, right = bit * width // NUM_BITS, (bit + 1) * width // NUM_BITS
        picture[: height // 4, left:right] = 255 * (number >> bit & 1)
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that an (H, W, 3) picture shows."""
    height, width = picture.shape[:2]
    bits = 0
    for bit in range(NUM_BITS):
        left, right = bit * width // NUM_BITS, (bit + 1) * width // NUM_BITS
        middle = (left + right) // 2
        bits |= int(picture[height // 16 : height // 5, middle - 1 : middle + 2].mean() > 127) << bit
    return bits


def encode(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    path: Path | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
    num_frames: int = NUM_FRAMES,
    gop: int = GOP,
    b_frames: int = 3,
    pix_fmt: str = "yuv420p",
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: Callable[[int], int] = lambda number: number,
    time_base: Fraction = Fraction(1, FPS),
    sound_seconds: float = 0.0,
    interlaced: bool = False,
) -> bytes:
    """A file of `num_frames` pictures, also written to `path`; picture k is due at pts(k) * time_base."""
    file = io.BytesIO() if path is None else str(path)
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=FPS, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.gop_size, context.time_base = gop, time_base
        if codec in ("libx264", "mpeg2video", "mpeg4"):
            context.max_b_frames = b_frames
        if interlaced:
            context.flags |= 0x00040000 | 0x20000000  # interlaced DCT and motion estimation
        context.thread_count = 1
        if sound_seconds:
            sound = output.add_stream("aac", rate=16000)
            sound.layout = "mono"
            for block in range(int(sound_seconds * 16000) // 1024):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 16000, block * 1024
                output.mux(sound.encode(samples))
            output.mux(sound.encode())
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number, width, height), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = pts(number), time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue() if path is None else path.read_bytes()


def remux(data: bytes, container: str, *, shift_seconds: float = 0.0, options: dict[str, str] | None = None) -> bytes:
    """The same packets in another container, `shift_seconds` later."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, options=options or {}) as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        shift = round(shift_seconds / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                output.mux(packet)
    return file.getvalue()


def with_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The mp4 with the display matrix (a b, c d) in its track header."""
    at = mp4.index(b"tkhd") + 4 + 4 + 5 * 4 + 2 * 4 + 4 * 2
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return mp4[:at] + matrix + mp4[at + 36 :]


X264 = {"preset": "veryfast", "x264-params": "scenecut=0:bframes=3:b-adapt=0:b-pyramid=normal"}
X264_OPEN = {"preset": "veryfast", "x264-params": "scenecut=0:bframes=3:b-adapt=0:open-gop=1"}
X264_REFRESH = {"preset": "veryfast", "x264-params": "intra-refresh=1:keyint=24:bframes=0"}
X265 = {
    "preset": "ultrafast",
    "x265-params": "log-level=none:pools=none:frame-threads=1:open-gop=0:bframes=3:keyint=24",
}
X265_OPEN = {
    "preset": "fast",
    "x265-params": "log-level=none:pools=none:frame-threads=1:open-gop=1:bframes=3:keyint=24",
}
X265_LAYERS = {
    "preset": "fast",
    "x265-params": "log-level=none:pools=none:frame-threads=1:bframes=3:keyint=24:temporal-layers=3:b-adapt=0",
}
X265_PQ = {
    "preset": "ultrafast",
    "x265-params": "log-level=none:pools=none:frame-threads=1:colorprim=bt2020:transfer=smpte2084",
}
VP9 = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "12"}
AV1 = {"preset": "12", "svtav1-params": "keyint=24:lp=1"}
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def uneven(number: int) -> int:
    """Presentation times in ms that stand still, hurry and pause."""
    return 33 * number + (17 if number % 3 else 0) + 700 * (number // 40)


CLEAN: dict[str, Callable[[], bytes]] = {
    "h264_mp4": partial(encode, codec_options=X264),
    "h264_mkv": partial(encode, container="matroska", codec_options=X264),
    "h264_ts": partial(encode, container="mpegts", codec_options=X264),
    "h264_flv": partial(encode, container="flv", codec_options=X264),
    "h264_fragmented": partial(encode, codec_options=X264, container_options=FRAGMENTED),
    "h264_no_b_frames": partial(encode, codec_options={"preset": "ultrafast"}, b_frames=0),
    "h264_open_gop_mp4": partial(encode, codec_options=X264_OPEN),
    "h264_open_gop_ts": partial(encode, container="mpegts", codec_options=X264_OPEN),
    "h264_intra_refresh": partial(encode, codec_options=X264_REFRESH, b_frames=0),
    "h264_single_gop": partial(encode, codec_options=X264, gop=10_000),
    "h264_intra_only": partial(encode, codec_options={"preset": "ultrafast"}, gop=1, b_frames=0),
    "h264_interlaced": partial(
        encode, codec_options={"preset": "veryfast", "x264-params": "interlaced=1"}, interlaced=True
    ),
    "h264_444_odd": partial(encode, width=161, height=97, pix_fmt="yuv444p", codec_options=X264),
    "h264_sound_longer_mkv": partial(encode, container="matroska", codec_options=X264, sound_seconds=9.0),
    "h264_sound_mp4": partial(encode, codec_options=X264, sound_seconds=5.0),
    "h264_raw": partial(encode, container="h264", codec_options=X264),
    "h264_late_ts": lambda: remux(encode(codec_options=X264), "mpegts", shift_seconds=5000.0),
    "h264_late_mkv": lambda: remux(encode(codec_options=X264), "matroska", shift_seconds=7.0),
    "h264_late_mp4": lambda: remux(encode(codec_options=X264), "mp4", shift_seconds=7.0),
    "h264_edit_list": lambda: remux(
        encode(codec_options=X264), "mp4", shift_seconds=-1.1, options={"avoid_negative_ts": "disabled"}
    ),
    "h264_vfr_mp4": partial(encode, codec_options=X264, pts=uneven, time_base=Fraction(1, 1000)),
    "h264_vfr_mkv": partial(encode, container="matroska", codec_options=X264, pts=uneven, time_base=Fraction(1, 1000)),
    "h264_avi": partial(encode, container="avi", codec_options=X264, b_frames=0),
    "hevc_mp4": partial(encode, "libx265", codec_options=X265),
    "hevc_mkv": partial(encode, "libx265", "matroska", codec_options=X265),
    "hevc_open_gop_mp4": partial(encode, "libx265", codec_options=X265_OPEN),
    "hevc_open_gop_ts": partial(encode, "libx265", "mpegts", codec_options=X265_OPEN),
    "hevc_temporal_layers": partial(encode, "libx265", codec_options=X265_LAYERS),
    "hevc_pq_10_bit": partial(encode, "libx265", pix_fmt="yuv420p10le", codec_options=X265_PQ),
    "hevc_raw": partial(encode, "libx265", "hevc", codec_options=X265),
    "vp8_webm": partial(encode, "libvpx", "webm", codec_options=VP9),
    "vp9_webm": partial(encode, "libvpx-vp9", "webm", codec_options=VP9),
    "vp9_odd_webm": partial(encode, "libvpx-vp9", "webm", width=157, height=93, codec_options=VP9),
    "av1_mp4": partial(encode, "libsvtav1", codec_options=AV1),
    "av1_webm": partial(encode, "libsvtav1", "webm", codec_options=AV1),
    "mpeg2_ps": partial(encode, "mpeg2video", "mpeg", codec_options={"b": "2M"}),
    "mpeg2_ts": partial(encode, "mpeg2video", "mpegts", codec_options={"b": "2M"}),
    "mpeg2_interlaced": partial(encode, "mpeg2video", "mpeg", codec_options={"b": "2M"}, interlaced=True),
    "mpeg4_avi": partial(encode, "mpeg4", "avi", codec_options={"b": "1M"}),
    "mpeg4_mp4": partial(encode, "mpeg4", "mp4", codec_options={"b": "1M"}),
    "mjpeg_avi": partial(encode, "mjpeg", "avi", pix_fmt="yuvj420p", num_frames=60),
    "gif": partial(encode, "gif", "gif", pix_fmt="rgb8", num_frames=40, time_base=Fraction(1, 25)),
    "one_frame": partial(encode, num_frames=1, codec_options=X264),
    "two_frames_webm": partial(encode, "libvpx-vp9", "webm", num_frames=2, codec_options=VP9),
    "rotated": lambda: with_matrix(encode(codec_options=X264), 0, 1, -1, 0),
}


def make(name: str, folder: Path) -> Path:
    """The file `name` of CLEAN, made once per folder."""
    path = folder / name
    if not path.exists():
        path.write_bytes(CLEAN[name]())
    return path


def all_frames(data: bytes) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """(pts, frame) of every picture in order: plain sequential decoding, the truth of every comparison."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            yield frame.pts, frame
