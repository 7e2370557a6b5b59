"""Videos whose container is wrong about its pictures, or says less than one would think: the decoder knows better.

Every picture shows its number, so that a picture at a wrong time is seen as such.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import video_files
from transformers_crosslmm import video_file
from transformers_crosslmm.video_decoding import VideoDecodeError, VideoDecodeWarning, decode_video
from video_files import FPS, FRAGMENTED, NUM_FRAMES, X264, all_frames, draw, encode, number_of


@pytest.fixture(autouse=True)
def nothing_is_called_damaged():
    with warnings.catch_warnings():
        warnings.simplefilter("error", VideoDecodeWarning)
        yield


def numbers(decoded) -> list[int]:
    assert decoded.valid.all()
    return [number_of(frame.permute(1, 2, 0).numpy()) for frame in decoded.frames]


def packets_of(data: bytes) -> Iterator[av.Packet]:
    with av.open(io.BytesIO(data)) as source:
        for packet in source.demux(video=0):
            if packet.dts is not None:
                yield packet


def rewritten(data: bytes, container: str, times, *, options=None, time_base=None) -> bytes:
    """The packets of `data` in another container; `times` gives (pts, dts) of packet k, or None to leave it out."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, options=options or {}) as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        if time_base is not None:
            copy.time_base = time_base
        for number, packet in enumerate(source.demux(stream)):
            if packet.dts is not None and (moments := times(number, packet)) is not None:
                packet.stream = copy
                packet.pts, packet.dts = moments
                packet.time_base = time_base or stream.time_base
                output.mux(packet)
    return file.getvalue()


# 1. What may be left out


CODECS = (
    *("libx264", "libx264rgb", "libx265", "libsvtav1", "libvpx", "libvpx-vp9", "mpeg1video", "mpeg2video", "mpeg4"),
    *("h261", "h263", "h263p", "flv", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2", "snow", "svq1", "cinepak", "msvideo1"),
    *("qtrle", "rpza", "roqvideo", "flashsv", "flashsv2", "ffv1", "gif", "vc2", "mjpeg", "prores", "huffyuv", "png"),
    *("asv1", "asv2", "cfhd", "dvvideo", "dxv", "jpeg2000", "magicyuv", "zlib", "rawvideo"),
)
"""Of the codecs that PyAV can encode, those that predict pictures from others, and some of those that do not."""


OPTIONS = {
    "libsvtav1": {"preset": "12", "svtav1-params": "keyint=24:lp=1"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:keyint=24:bframes=3"},
    "libx264": X264,
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def encoded_anyhow(codec: str) -> bytes:
    """A video of `codec` in the first container and size that takes it."""
    formats = [form.name for form in av.Codec(codec, "w").video_formats or ()] or ["yuv420p"]
    pix_fmt = next((name for name in ("yuv420p", "yuvj420p", "rgb24") if name in formats), formats[0])
    for container in ("matroska", "mov", "avi"):
        for width, height in ((176, 144), (720, 576)):
            try:
                return encode(
                    codec,
                    container,
                    width=width,
                    height=height,
                    num_frames=40,
                    pix_fmt=pix_fmt,
                    codec_options=OPTIONS.get(codec),
                    b_frames=3,
                )
            except (av.error.FFmpegError, ValueError, OSError):
                continue
    pytest.skip("no container here takes it")


@pytest.mark.parametrize("codec", CODECS)
def test_sampled_frames_of_every_codec_are_those_of_a_full_decode(codec):
    data = encoded_anyhow(codec)
    try:
        frames = [(pts * frame.time_base, frame) for pts, frame in all_frames(data)]
        expected = {due: frame.to_ndarray(format="rgb24") for due, frame in frames}
        start = min(expected)
    except (av.error.FFmpegError, IndexError, TypeError, ValueError):
        pytest.skip("FFmpeg does not read back what it wrote")
    decoded = decode_video(data, num_frames=5)
    middles = [(number + 0.5) * decoded.duration_seconds / 5 for number in range(5)]
    assert decoded.times == pytest.approx(middles, abs=1 / FPS + 0.001)  # Matroska rounds to milliseconds
    for moment, frame in zip(decoded.times, decoded.frames, strict=True):
        due = min(expected, key=lambda time: abs(float(time - start) - moment))
        assert abs(float(due - start) - moment) < 1e-6
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected[due]), f"{codec} at {moment:.2f} s"


def test_the_codecs_that_leave_pictures_out_are_among_those_tried():
    tried = {"libx264": "h264", "libx265": "hevc"}
    assert set(video_file._LEAVES_OUT) <= {tried.get(name, name) for name in CODECS}


# 2. Times that are not those of the decoder's output


def test_presentation_times_that_are_those_of_decoding_are_not_believed():
    data = rewritten(encode(codec_options=X264), "mp4", lambda number, packet: (packet.dts, packet.dts))
    everything = decode_video(data)
    shown = numbers(everything)
    assert shown == sorted(set(shown)), "pictures change places"
    assert len(shown) >= NUM_FRAMES - 3, "a picture is lost for each that the edit list hides"
    assert everything.times == sorted(everything.times)
    for count in (5, 16):
        sampled = decode_video(data, num_frames=count)
        due = dict(zip(everything.times, shown, strict=True))
        assert numbers(sampled) == [due[moment] for moment in sampled.times]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_counts_in_the_order_of_decoding(codec):
    data = encode(codec, "avi", codec_options=X264 if codec == "libx264" else {"b": "1M"})
    decoded = decode_video(data)
    assert numbers(decoded) == list(range(NUM_FRAMES))
    assert decoded.times == pytest.approx([number / FPS for number in range(NUM_FRAMES)])
    sampled = decode_video(data, num_frames=7)
    assert numbers(sampled) == sampled.frame_indices


# 3. Pictures that are never shown


@pytest.mark.parametrize("codec_tells", [True, False], ids=["told", "not_told"])
def test_pictures_that_are_never_shown_are_neither_given_nor_called_damaged(codec_tells, monkeypatch):
    data = bytearray(encode("libvpx", "webm", codec_options=OPTIONS["libvpx"], num_frames=100, gop=60))
    hidden = [7, 8, 23, 50, 51, 99]
    for number, packet in enumerate(list(packets_of(bytes(data)))):
        if number in hidden:
            data[bytes(data).index(bytes(packet))] &= ~0b10000  # VP8's bit for pictures that are shown
    if not codec_tells:  # as of any codec but VP8 and VP9
        monkeypatch.setattr(video_file.VideoFile, "shows", lambda self, packet: True)
    data = bytes(data)
    assert numbers(decode_video(data)) == [number for number in range(100) if number not in hidden]
    decoded = decode_video(data, times=[(number + 0.5) / FPS for number in hidden])
    assert numbers(decoded) == [6, 22, 49, 98], "the picture before a hidden one is due"
    wanted = [int((i + 0.5) * 100 / 23) for i in range(23)]
    due = [max(number for number in range(100) if number <= k and number not in hidden) for k in wanted]
    assert numbers(decode_video(data, num_frames=23)) == list(dict.fromkeys(due))


@pytest.mark.parametrize(
    ("first_byte", "shown"),
    [
        *((0b10000010, True), (0b10000110, True), (0b10000100, False), (0b10001000, True)),
        *((0b10110011, True), (0b10110010, False), (0b10110100, True)),
    ],
)
def test_the_header_of_a_vp9_picture_says_whether_it_is_shown(first_byte, shown):
    """Marker, profile, (reserved in profile 3,) shows an older picture, no keyframe, is shown."""
    told = video_file.VideoFile.shows
    assert told(SimpleNamespace(codec="vp9"), av.Packet(bytes([first_byte, 0, 0]))) == shown
    assert told(SimpleNamespace(codec="vp9"), av.Packet(bytes([first_byte, 0, 0b11000000]))), "several pictures"


# 4. Side data without a name


def exif(orientation: int) -> bytes:
    entries = struct.pack(">HHI4s", 0x010F, 2, 4, b"Cam\0") + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    body = b"Exif\0\0" + b"MM\0*" + struct.pack(">IH", 8, 2) + entries + struct.pack(">I", 0)
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_with_exif_are_turned_upright(orientation):
    plain = encode("mjpeg", "avi", pix_fmt="yuvj420p", num_frames=6)
    file = io.BytesIO()
    with av.open(io.BytesIO(plain)) as source, av.open(file, "w", format="avi") as output:
        copy = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                jpeg = bytes(packet)
                turned = av.Packet(jpeg[:2] + exif(orientation) + jpeg[2:])
                turned.pts, turned.dts, turned.time_base = packet.pts, packet.dts, packet.time_base
                turned.stream, turned.is_keyframe = copy, True
                output.mux(turned)
    upright, got = decode_video(plain), decode_video(file.getvalue())
    picture = upright.frames
    if orientation >= 5:
        picture = picture.transpose(2, 3)
    flips = {2: [3], 3: [2, 3], 4: [2], 6: [3], 7: [2, 3], 8: [2]}.get(orientation, [])
    assert torch.equal(got.frames, picture.flip(flips))


# 5. H.264 in AVI, copied from elsewhere


@pytest.mark.parametrize("sample", [{}, {"num_frames": 8}], ids=["all", "sampled"])
def test_avi_with_a_rate_twice_that_of_its_pictures(sample):
    data = encode(container="mpegts", codec_options={"preset": "ultrafast"}, b_frames=0, num_frames=120)
    doubled = rewritten(data, "avi", lambda number, packet: (2 * number, 2 * number), time_base=Fraction(1, 2 * FPS))
    decoded = decode_video(doubled, **sample)
    assert numbers(decoded) == decoded.frame_indices
    assert decoded.fps == FPS
    assert decoded.duration_seconds == pytest.approx(4.0, abs=0.05)
    if not sample:
        assert decoded.times == pytest.approx([number / FPS for number in range(120)])
        assert decoded.total_num_frames == 120


def test_avi_with_dropped_pictures_keeps_its_times():
    data = encode(container="mpegts", codec_options={"preset": "ultrafast"}, b_frames=0, num_frames=90, gop=10)
    kept = [number for number in range(90) if not 30 <= number < 70]
    dropped = rewritten(
        data, "avi", lambda number, packet: (number, number) if number in kept else None, time_base=Fraction(1, FPS)
    )
    decoded = decode_video(dropped)
    assert numbers(decoded) == kept
    assert decoded.times == pytest.approx([number / FPS for number in kept])
    assert numbers(decode_video(dropped, times=[1.5, 2.5])) == [29, 75]


# 6 and 7. Where the pictures begin and end


def late_segment(container_options=None) -> bytes:
    """A fragmented mp4 whose first fragment begins at 4 s."""
    data = encode(codec_options=X264, num_frames=60)
    shift = round(4 * FPS)
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof+frag_discont"}
    return rewritten(
        data, "mp4", lambda number, packet: (packet.pts + shift * 512, packet.dts + shift * 512), options=options
    )


def test_a_segment_that_begins_late_lasts_as_long_as_its_pictures():
    data = late_segment()
    decoded = decode_video(data, num_frames=8)
    assert decoded.duration_seconds == pytest.approx(2.0, abs=0.04)
    assert len(decoded.times) == 8
    assert numbers(decoded) == decoded.frame_indices
    assert numbers(decode_video(data)) == list(range(60))


@pytest.mark.parametrize(
    ("container", "codec", "sound"),
    [
        ("matroska", "libx264", "aac"),
        ("webm", "libvpx", "libopus"),
        ("flv", "libx264", "aac"),
        ("asf", "mpeg4", "aac"),
        ("mpeg", "mpeg2video", "mp2"),
        ("mpegts", "libx264", "aac"),
        ("mp4", "libx264", "aac"),
        ("avi", "mpeg4", "mp2"),
    ],
)
def test_the_pictures_own_end_decides_where_the_sound_is_longer(container, codec, sound):
    data = with_long_sound(container, codec, sound)
    decoded = decode_video(data, num_frames=8)
    assert decoded.duration_seconds == pytest.approx(2.0, abs=0.15)
    assert len(decoded.times) == 8


def with_long_sound(container: str, codec: str, sound: str, num_frames: int = 60, seconds: int = 20) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        video = output.add_stream(codec, rate=FPS, options=OPTIONS.get(codec, {"b": "1M"}))
        video.width, video.height, video.pix_fmt = video_files.WIDTH, video_files.HEIGHT, "yuv420p"
        audio = output.add_stream(sound, rate=48000)
        audio.layout = "mono"
        audio.codec_context.open()
        size = audio.codec_context.frame_size or 1024
        packets = []
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            packets += video.encode(frame)
        packets += video.encode()
        kind = audio.codec_context.format.name
        for block in range(seconds * 48000 // size):
            samples = av.AudioFrame(format=kind, layout="mono", samples=size)
            for plane in samples.planes:
                plane.update(bytes(plane.buffer_size))
            samples.sample_rate, samples.pts, samples.time_base = 48000, block * size, Fraction(1, 48000)
            packets += audio.encode(samples)
        packets += audio.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            output.mux(packet)
    return file.getvalue()


# 8. Which stream, which pictures


def test_an_animated_avif_gives_all_its_pictures():
    data = encode("libsvtav1", "avif", codec_options={"preset": "12"}, num_frames=4)
    assert numbers(decode_video(data)) == [0, 1, 2, 3]


def test_the_default_stream_is_taken():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        streams = []
        for width, height in ((64, 48), (320, 240)):
            stream = output.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            streams.append(stream)
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default.value
        for stream in streams:
            for number in range(20):
                frame = av.VideoFrame.from_ndarray(draw(number, stream.width, stream.height), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                output.mux(stream.encode(frame.reformat(format="yuv420p")))
            output.mux(stream.encode())
    decoded = decode_video(file.getvalue(), num_frames=5)
    assert (decoded.width, decoded.height) == (320, 240)


def test_pictures_that_share_a_time_are_all_given():
    data = encode(codec_options={"preset": "ultrafast"}, b_frames=0, num_frames=20)
    twins = rewritten(data, "mp4", lambda number, packet: (number // 2 * 256 + 128, number * 128))
    assert numbers(decode_video(twins)) == list(range(20))


def test_encrypted_pictures_are_named_as_such():
    key = "00112233445566778899aabbccddeeff"
    options = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": key, "encryption_kid": key}
    data = encode(codec_options=X264, num_frames=20, container_options=options)
    if not hasattr(av.Packet, "has_sidedata"):
        pytest.skip("this PyAV does not tell")
    with pytest.raises(VideoDecodeError, match="encrypted"):
        decode_video(data, num_frames=2)


def test_an_initialisation_segment_is_named_as_such():
    data = encode(codec_options=X264, num_frames=20, container_options=FRAGMENTED)
    with pytest.raises(VideoDecodeError, match="initialisation segment"):
        decode_video(data[: data.index(b"moof") - 4], num_frames=2)


def test_what_follows_a_damaged_keyframe_is_not_called_valid():
    """Noise in every keyframe: nothing that was decoded from it is right, whatever the decoder marks."""
    data = bytearray(encode(codec_options=X264))
    for packet in packets_of(bytes(data)):
        if packet.is_keyframe:
            at = bytes(data).index(bytes(packet)) + packet.size // 2
            data[at : at + 60] = np.random.default_rng(packet.pts).bytes(60)
    clean = {pts: frame.to_ndarray(format="rgb24") for pts, frame in all_frames(encode(codec_options=X264))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoDecodeWarning)
        for request in ({"num_frames": 8}, {"num_frames": 40}, {}):
            decoded = decode_video(bytes(data), **request)
            assert len(decoded.times) >= min(request.get("num_frames", NUM_FRAMES), NUM_FRAMES) - 8
            for number, frame, valid in zip(decoded.frame_indices, decoded.frames, decoded.valid, strict=True):
                if valid:
                    assert np.array_equal(frame.permute(1, 2, 0).numpy(), clean[512 * number]), number


@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska"])
def test_a_picture_of_an_open_group_is_not_called_damaged(container):
    """The decoder is told there to forget pictures that it never saw if decoding began at the group's keyframe."""
    options = {"x264-params": "open-gop=1:scenecut=0"}
    video = encode(container=container, num_frames=60, gop=12, codec_options=options)
    every = decode_video(video)
    for moment, picture in zip(every.times, every.frames, strict=True):
        sampled = decode_video(video, times=[moment + 0.001], strict=True)
        assert torch.equal(sampled.frames[0], picture)


def test_every_picture_of_an_open_group_is_found_however_many_are_wanted():
    """At some distances decoding begins twice at the same keyframe, and so meets the same missing pictures twice."""
    options = {"x264-params": "open-gop=1:scenecut=0"}
    video = encode(num_frames=900, gop=50, codec_options=options)
    every = decode_video(video, fps=1000, max_frames=900)
    for number in (13, 32, 51, 64, 90):
        sampled = decode_video(video, num_frames=number, strict=True)
        assert sampled.times == [every.times[index] for index in sampled.frame_indices]
        assert torch.equal(sampled.frames, every.frames[list(sampled.frame_indices)])


@pytest.mark.parametrize("moments", [[0.1], [0.1, 0.3], [0.1, 3.5], [0.1, 0.2, 3.5]], ids=str)
def test_moments_before_the_first_picture_that_can_be_decoded_give_it(tmp_path, moments):
    """A recording that begins between two keyframes."""
    with av.open(io.BytesIO(encode(container="mpegts", gop=20))) as whole, av.open(tmp_path / "cut.ts", "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in list(whole.demux(whole.streams.video[0]))[5:-1]:
            packet.stream = stream
            cut.mux(packet)
    every = decode_video(tmp_path / "cut.ts")
    assert every.times[0] > 0.35
    sampled = decode_video(tmp_path / "cut.ts", times=moments)
    assert sampled.times[0] == every.times[0]
    assert torch.equal(sampled.frames[0], every.frames[0])
    assert len(sampled.times) == (1 if moments[-1] < 1 else 2)
