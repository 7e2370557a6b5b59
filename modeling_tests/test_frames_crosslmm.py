"""Videos and pictures in the forms that people, Transformers, qwen-vl-utils and vLLM give them."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from factories import mp4_of, random_frames, tiny_processor
from transformers_crosslmm import CrossLMMProcessor, CrossLMMVideoProcessor, VideoError, VideoLimits

FPS = 4
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


@pytest.fixture(scope="module")
def processor() -> CrossLMMProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def video_processor(processor) -> CrossLMMVideoProcessor:
    return processor.video_processor


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return mp4_of(random_frames(10), fps=FPS)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """The frames of `random_frames(3)` as picture files."""
    folder = tmp_path_factory.mktemp("some frames")
    paths = [folder / f"{number} of 3.png" for number in range(3)]
    for path, frame in zip(paths, random_frames(3), strict=True):
        Image.fromarray(frame).save(path)
    return paths


def image_of(processor, picture, **options) -> torch.Tensor:
    return processor(text=IMAGE, images=[picture], return_tensors="pt", **options)["pixel_values"]


def video_of(video_processor, video, **options) -> torch.Tensor:
    return video_processor(video, **options)["pixel_values_videos"]


def data_uri(data: bytes, media_type: str = "video/mp4") -> str:
    return f"data:{media_type};base64," + base64.b64encode(data).decode()


# -- frames as files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda paths: [str(path) for path in paths],
        lambda paths: [[str(path) for path in paths]],
        lambda paths: [paths],
        lambda paths: [[[str(path) for path in paths]]],
        lambda paths: [[path.as_uri() for path in paths]],
        lambda paths: [[data_uri(path.read_bytes(), "image/png") for path in paths]],
        lambda paths: {"video": paths},
        lambda paths: [{"video": [str(path) for path in paths]}],
        lambda paths: (paths, {"fps": 1.0}),
    ],
    ids=["flat", "in a list", "paths", "per sample", "file URIs", "data URIs", "mapping", "mappings", "pair"],
)
def test_a_list_of_picture_files_is_one_video(video_processor, form, files):
    got = video_processor(form(files))
    assert got["video_num_frames"].tolist() == [3]
    assert torch.equal(got["pixel_values_videos"], video_of(video_processor, random_frames(3)))


def test_a_list_of_video_files_is_a_sample_with_several_videos(video_processor, mp4, tmp_path):
    names = [str(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    for name in names:
        Path(name).write_bytes(mp4)
    assert video_processor([names], num_frames=2)["video_num_frames"].tolist() == [2, 2]


def test_two_pictures_given_as_videos_of_a_chat_stay_two(processor, files):
    chat = [{"role": "user", "content": [{"type": "video", "path": str(path)} for path in files[:2]]}]
    with pytest.raises(VideoError):  # each is opened as a video, which a PNG is not
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_turned_upright_however_it_is_given(processor, video_processor, tmp_path):
    upright = Image.fromarray(random_frames(1, height=40, width=30)[0])
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    expected = image_of(processor, upright)
    for picture in (Image.open(path), str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert torch.equal(image_of(processor, picture), expected)
    frames = video_of(video_processor, [[Image.open(path), str(path)]])
    assert torch.equal(frames, video_of(video_processor, [[upright, upright]]))


GREY = random_frames(1)[0, :, :, 0]
RGB_GREY = np.stack([GREY] * 3, axis=-1)
# Of 16 bits, and not what the lowest eight of them would be.
GREY_16 = np.where(GREY > 0, GREY.astype(np.int32) * 257 - 100, 0)
RGB_GREY_16 = np.stack([GREY_16] * 3, axis=-1).astype(np.uint16)
DEEP = {
    "I;16": Image.fromarray(GREY_16.astype(np.uint16)),
    "mode I": Image.fromarray(GREY_16.astype(np.int32)),
    "mode I of 8 bits": Image.fromarray(GREY.astype(np.int32)),
    "mode F to 1": Image.fromarray((GREY / 255).astype(np.float32)),
    "mode F to 255": Image.fromarray(GREY.astype(np.float32)),
    "mode L": Image.fromarray(GREY),
    "floats to 1": RGB_GREY / 255,
    "tensor of floats to 1": torch.from_numpy(RGB_GREY) / 255,
    "floats to 255": RGB_GREY.astype(np.float64),
    "uint16": RGB_GREY_16,
    "uint16, big-endian": RGB_GREY_16.astype(">u2"),
    "uint16 of 8 bits": RGB_GREY.astype(np.uint16),
    "torch.uint16": torch.from_numpy(RGB_GREY_16),
    "channels first": RGB_GREY.transpose(2, 0, 1),
}


@pytest.mark.parametrize("picture", DEEP.values(), ids=DEEP)
def test_a_picture_of_any_depth_looks_the_same_as_image_and_as_frame(processor, video_processor, picture):
    expected = image_of(processor, Image.fromarray(RGB_GREY))
    torch.testing.assert_close(image_of(processor, picture), expected, rtol=0, atol=1e-6)
    frames = video_of(video_processor, [[picture, picture]])
    torch.testing.assert_close(frames, video_of(video_processor, np.stack([RGB_GREY] * 2)), rtol=0, atol=1e-6)


def test_a_picture_file_of_16_bits_is_not_white(processor, tmp_path):
    DEEP["I;16"].save(tmp_path / "deep.png")
    expected = image_of(processor, Image.fromarray(RGB_GREY))
    assert torch.equal(image_of(processor, str(tmp_path / "deep.png")), expected)


def test_an_image_can_be_left_as_it_is(processor):
    unit = RGB_GREY.transpose(2, 0, 1)[None] / 255
    pixels = image_of(processor, unit[0], do_rescale=False, do_normalize=False, do_resize=False)
    torch.testing.assert_close(pixels, torch.from_numpy(unit).float())


def with_damaged_exif() -> bytes:
    """A JPEG whose EXIF gives its description a wrong type: PIL raises TypeError when it turns the picture."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a word"
    Image.fromarray(RGB_GREY).save(file, "JPEG", exif=exif)
    data = bytearray(file.getvalue())
    data[data.index(b"Exif") + 17] = 26
    return bytes(data)


def postscript() -> bytes:
    """A program, which PIL would have Ghostscript run."""
    file = io.BytesIO()
    Image.fromarray(RGB_GREY).save(file, "EPS")
    return file.getvalue()


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (GREY, ValueError, r"\(H, W, 3\) or \(3, H, W\); got an array of shape \(48, 64\)"),
        (RGB_GREY - 300.0, ValueError, r"0\.\.255, or floats in 0\.\.1; got -300"),
        (RGB_GREY.astype(np.int32) * 257, ValueError, "Frames hold values in 0..255"),
        (b"no picture", VideoError, "The data cannot be read as a picture"),
        (with_damaged_exif(), VideoError, "The data cannot be read as a picture"),
        (b"P6\n2 x\n255\n", VideoError, "The data cannot be read as a picture"),
        (postscript(), VideoError, "must not be PostScript"),
        ("file://[", VideoError, "is not a URI"),
        ("A" * 60_000, VideoError, "cannot be read as a picture"),
        ("data:image/png;base64," + "A" * 60_000, VideoError, "cannot be read as a picture"),
        ("missing.png", VideoError, "Cannot open 'missing.png'"),
        ({"image": "a.png", "path": "b.png"}, ValueError, "holds one image; got image, path"),
        ({"image": "a.png", "max_pixels": 3}, ValueError, "an image has no options; got max_pixels"),
        ("http://127.0.0.1:1/a.png", VideoError, "not a public address"),
    ],
    ids=str,
)
def test_a_picture_that_cannot_be_read_is_named_without_its_data(processor, picture, error, message):
    with pytest.raises(error, match=message) as raised:
        image_of(processor, picture)
    assert len(str(raised.value)) < 400


def test_a_picture_of_pil_that_cannot_be_read_or_has_no_pixels_is_refused(processor):
    with pytest.raises(VideoError, match="The data cannot be read as a picture"):
        image_of(processor, Image.open(io.BytesIO(with_damaged_exif())))
    with pytest.raises(VideoError, match="needs pixels; got 0 x 5"):
        image_of(processor, Image.new("RGB", (0, 5)))


def test_limits_hold_for_pictures_too(processor, files):
    with pytest.raises(VideoError, match="more than max_pixels=100"):
        image_of(processor, str(files[0]), limits=VideoLimits(max_pixels=100))


# -- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda data: {"type": "video", "base64": base64.b64encode(data).decode()},
        lambda data: {"type": "video", "video": {"bytes": data, "path": None}},
        lambda data: {"type": "video", "bytes": data},
        lambda data: {
            "type": "video_url",
            "video_url": {"url": data_uri(data)},
        },
    ],
    ids=["base64", "datasets", "bytes", "video_url"],
)
def test_a_chat_takes_the_data_of_a_video(processor, form, mp4):
    chat = [{"role": "user", "content": [form(mp4)]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], video_of(processor.video_processor, mp4))


@pytest.mark.parametrize(
    "form",
    [
        lambda frames: {"array": frames},
        lambda frames: torch.from_numpy(frames.astype(np.uint16) * 257),
        lambda frames: (frames, {"fps": 1.0, "total_num_frames": 5}),
        lambda frames: [(torch.from_numpy(frames), VideoMetadata(total_num_frames=5, fps=1.0))],
        lambda frames: [[(list(frames), {"fps": 1.0})], []],
    ],
    ids=["array", "torch.uint16", "pair", "tensor and metadata", "nested pair"],
)
def test_videos_in_memory_come_with_what_is_known_of_them(video_processor, form):
    frames = random_frames(5)
    got = video_processor(form(frames))
    assert got["video_num_frames"].tolist() == [5]
    assert torch.equal(got["pixel_values_videos"], video_of(video_processor, frames))


def test_metadata_may_say_that_frames_are_sampled_already(video_processor):
    about = {"fps": 8.0, "frames_indices": [0, 8, 10, 11], "total_num_frames": 16}
    metadata = video_processor((random_frames(4), about), return_metadata=True)["video_metadata"][0]
    assert metadata.frame_times == [0.0, 1.0]
    kept = video_processor((random_frames(4), about | {"do_sample_frames": False}), return_metadata=True)
    assert kept["video_metadata"][0].frame_times == [0.0, 1.0, 1.25, 1.375]


def test_metadata_beside_a_file_is_refused(video_processor):
    with pytest.raises(ValueError, match="a file has its own"):
        video_processor(("clip.mp4", {"fps": 2.0}))


# -- options of one video ---------------------------------------------------------------------------------------------

OPTIONS = {
    "fps": ({"fps": 2}, [0, 2, 4, 6, 8]),
    "num_frames": ({"num_frames": 2}, [2, 7]),
    "nframes": ({"nframes": 2}, [2, 7]),
    "max_frames": ({"fps": 4, "max_frames": 2}, [2, 7]),
    "video_start and video_end": ({"fps": 2, "video_start": 1.0, "video_end": 2.0}, [4, 6]),
    "start_seconds and end_seconds": ({"fps": 2, "start_seconds": 1.0, "end_seconds": 2.0}, [4, 6]),
    "times": ({"times": [0.3, 2.4]}, [1, 9]),
}


@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("call", [{}, {"num_frames": 7}, {"fps": 3.0}], ids=str)
def test_options_of_a_part_act_on_it_alone_and_win(processor, options, expected, call, mp4):
    parts = [{"type": "video", "video": mp4} | options, {"type": "video", "video": mp4}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        processor_kwargs=call | {"return_metadata": True},
    )
    alone = processor.video_processor(mp4, return_metadata=True, **call)["video_metadata"][0]
    assert [list(video.frames_indices) for video in inputs["video_metadata"]] == [expected, alone.frames_indices]


def test_sample_fps_is_the_clock_of_frames_that_are_all_kept(video_processor, files):
    video = {"video": [str(path) for path in files], "sample_fps": 2.0}
    metadata = video_processor(video, return_metadata=True)["video_metadata"][0]
    assert metadata.frame_times == [0.0, 0.5, 1.0]
    metadata = video_processor(video | {"fps": 1.0}, return_metadata=True)["video_metadata"][0]
    assert metadata.frame_times == [0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_frames": 4}, "got min_frames. Leave that out.*is set by `num_frames`"),
        ({"max_pixels": 99, "resized_height": 3}, "got max_pixels, resized_height"),
        ({"fsp": 2}, "takes num_frames, fps, .*; got fsp"),
        ({"sample_fps": 2}, "rate at which a list of frames was sampled. For a file pass `fps`"),
        ({"nframes": 2, "num_frames": 3}, "`num_frames` of a video is given twice"),
        ({"nframes": 2, "fps": 3}, "exclude each other"),
        ({"fps": "A" * 60_000}, "`fps` of a video takes numbers; got 'AAA"),
        ({"path": "b.mp4"}, "holds one video; got video, path"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_that_cannot_act_is_refused(processor, options, message):
    chat = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"} | options]}]
    with pytest.raises(ValueError, match=message) as raised:
        processor.apply_chat_template(chat, tokenize=True)
    assert len(str(raised.value)) < 400
