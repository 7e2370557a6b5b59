"""Which frames of a video are taken and what pixels come out of them, for every form a video comes in."""

import base64
import io
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.video_utils import VideoMetadata

from factories import mp4_of, random_frames
from loopback import Handler, served_by
from transformers_crosslmm import (
    CrossLMMVideoProcessor,
    VideoError,
    VideoLimits,
    decode_video,
)

SIZE = {"height": 33, "width": 33}
FPS, NUM_FRAMES = 4, 10  # 2.5 seconds
GREY_LEVEL = 2 / 255  # of pixels normalised to -1..1


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return mp4_of(random_frames(NUM_FRAMES), fps=FPS)


def processor(**overrides) -> CrossLMMVideoProcessor:
    return CrossLMMVideoProcessor(size=SIZE, **overrides)


def taken(output) -> list[int]:
    """Numbers of the frames that were sampled from the one video."""
    return list(output["video_metadata"][0].frames_indices)


# -- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(41, 53), (480, 271), (20, 17), (33, 33)], ids=str)
def test_pixels_are_those_of_transformers_siglip_within_one_grey_level(height, width):
    frames = np.random.default_rng(1).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    pixels = processor()(frames)["pixel_values_videos"]
    expected = SiglipImageProcessorPil(size=SIZE)(list(frames), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 33, 33)
    assert pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() <= GREY_LEVEL * 1.001


@pytest.mark.parametrize(
    "form",
    [
        lambda frames: torch.from_numpy(frames),
        lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
        lambda frames: frames.transpose(0, 3, 1, 2),
        lambda frames: frames.astype(np.int64),
        lambda frames: frames.astype(np.float32),
        lambda frames: frames / 255,
        lambda frames: torch.from_numpy(frames).half() / 255,
        lambda frames: [Image.fromarray(frame) for frame in frames],
        lambda frames: [Image.fromarray(frame).convert("RGBA") for frame in frames],
        lambda frames: list(frames),
        lambda frames: [torch.from_numpy(frame) for frame in frames],
        lambda frames: np.broadcast_to(frames[None], (1, *frames.shape)),
    ],
    ids=[
        "tensor",
        "tensor channels first",
        "array channels first",
        "int64",
        "floats to 255",
        "floats to 1",
        "half floats to 1",
        "PIL",
        "PIL with alpha",
        "list of arrays",
        "list of tensors",
        "batch of one, read-only",
    ],
)
def test_a_video_in_memory_gives_the_same_pixels_in_every_form(form):
    frames = random_frames(5, height=41, width=53)
    expected = processor()(frames)["pixel_values_videos"]
    torch.testing.assert_close(processor()(form(frames))["pixel_values_videos"], expected, rtol=0, atol=1e-6)


def test_frames_of_different_sizes_and_image_files_make_one_video(tmp_path):
    frames = [Image.fromarray(random_frames(1, height=height)[0]) for height in (20, 41, 60)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    expected = processor()(frames)["pixel_values_videos"]
    assert torch.equal(processor()([[files]])["pixel_values_videos"], expected)


def test_a_dark_frame_of_a_float_video_is_not_taken_for_one_in_0_to_1():
    frames = np.zeros((2, 8, 8, 3), np.float32)
    frames[1] = 200.0
    frames[0] = 1.0
    pixels = processor()(frames, do_normalize=False)["pixel_values_videos"]
    assert pixels[0].max().item() == pytest.approx(1 / 255)


def test_steps_can_be_switched_off():
    frames = random_frames(2, height=33, width=33)
    pixels = processor()(frames, do_rescale=False, do_normalize=False)["pixel_values_videos"]
    assert torch.equal(pixels, torch.from_numpy(frames).permute(0, 3, 1, 2).float())
    full = processor()(random_frames(2), do_resize=False)["pixel_values_videos"]
    assert full.shape == (2, 3, 48, 64)
    unit = processor()(frames / 255, do_rescale=False, do_normalize=False)["pixel_values_videos"]
    assert unit.max() <= 1


def test_videos_of_different_lengths_and_sizes_follow_each_other():
    first, second = random_frames(2, seed=1), random_frames(5, height=30, seed=2)
    output = processor()([first, second], return_tensors="pt")
    assert output["video_num_frames"].tolist() == [2, 5]
    assert output["video_num_frames"].dtype == torch.int64
    alone = processor()(second)["pixel_values_videos"]
    assert torch.equal(output["pixel_values_videos"][2:], alone)
    as_numpy = processor()([first, second], return_tensors="np")
    assert isinstance(as_numpy["pixel_values_videos"], np.ndarray)


@pytest.mark.parametrize(
    ("shape_of", "lengths"),
    [
        (lambda a, b: a, [2]),
        (lambda a, b: [a, b], [2, 3]),
        (lambda a, b: [[a], [b]], [2, 3]),
        (lambda a, b: [[a, b], []], [2, 3]),
        (lambda a, b: [[list(a)], None, [list(b)]], [2, 3]),
        (lambda a, b: [list(a), list(b)], [2, 3]),
        (lambda a, b: list(a), [2]),
        (lambda a, b: np.stack([a, b[:2]]), [2, 2]),
    ],
    ids=["one", "flat", "per sample", "both in one sample", "lists per sample", "flat lists", "one list", "5-D"],
)
def test_videos_come_flat_or_in_a_list_per_sample(shape_of, lengths):
    videos = shape_of(random_frames(2), random_frames(3))
    assert processor()(videos)["video_num_frames"].tolist() == lengths


# -- which frames -----------------------------------------------------------------------------------------------------

SAMPLINGS = {
    "default, one a second": ({}, [0, 4, 8]),
    "num_frames, middles of shares": ({"num_frames": 3}, [1, 5, 8]),
    "fps": ({"fps": 2}, [0, 2, 4, 6, 8]),
    "fps with room": ({"fps": 2, "max_frames": 5}, [0, 2, 4, 6, 8]),
    "fps beyond max_frames": ({"fps": 2, "max_frames": 3}, [1, 5, 8]),
    "num_frames beyond max_frames": ({"num_frames": 4, "max_frames": 2}, [2, 7]),
    "times": ({"times": [0.3, 2.4]}, [1, 9]),
    "times out of order": ({"times": [2.4, 0.3]}, [1, 9]),
    "a moment between frames": ({"times": [1.249]}, [4]),
    "a moment at a frame": ({"times": [1.25]}, [5]),
    "a part": ({"fps": 2, "start_seconds": 1.0, "end_seconds": 2.0}, [4, 6]),
    "shares of a part": ({"num_frames": 2, "start_seconds": 1.0, "end_seconds": 2.0}, [5, 7]),
    "num_frames beyond the clip": ({"num_frames": 25}, list(range(10))),
    "fps beyond the clip": ({"fps": 60}, list(range(10))),
    "everything": ({"do_sample_frames": False}, list(range(10))),
}


@pytest.mark.parametrize("source", ["memory", "file", "decoder"])
@pytest.mark.parametrize(("options", "expected"), SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_frames_are_those_shown_at_the_moments_asked_for(options, expected, source, mp4):
    frames = random_frames(NUM_FRAMES)
    if source == "memory":
        options = options | {"video_metadata": {"fps": FPS}}
    video = {"memory": frames, "file": mp4, "decoder": FakeDecoder(frames)}[source]
    output = processor()(video, return_metadata=True, **options)
    assert taken(output) == expected
    assert output["video_metadata"][0].timestamps == pytest.approx([number / FPS for number in expected])
    exact = processor()(frames[expected])["pixel_values_videos"]
    lossy = 0.1 if source == "file" else 0.0  # the codec's own loss; another frame is off by 0.5 and more
    assert output["pixel_values_videos"].shape == exact.shape
    assert (output["pixel_values_videos"] - exact).abs().mean(dim=(1, 2, 3)).max() <= lossy


def test_at_most_256_frames_by_default():
    frames = np.zeros((300, 2, 2, 3), np.uint8)
    one_a_second = {"video_metadata": {"fps": 1.0}}
    assert processor()(frames, **one_a_second)["video_num_frames"].tolist() == [256]
    assert processor()(frames)["video_num_frames"].tolist() == [256]
    assert processor()(frames, num_frames=280, **one_a_second)["video_num_frames"].tolist() == [280]


def test_frames_without_a_clock_are_picked_uniformly_or_kept():
    frames = random_frames(7)
    assert taken(processor()(frames, num_frames=3, return_metadata=True)) == [1, 3, 5]
    assert taken(processor()(frames, return_metadata=True)) == list(range(7))
    assert taken(processor()(frames, max_frames=3, return_metadata=True)) == [1, 3, 5]
    assert processor()(frames, return_metadata=True)["video_metadata"][0].frame_times is None


@pytest.mark.parametrize("options", [{"fps": 2}, {"times": [1.0]}, {"start_seconds": 1.0}], ids=str)
def test_seconds_asked_of_frames_without_a_clock_are_refused(options):
    with pytest.raises(ValueError, match="`video_metadata` with `fps`"):
        processor()(random_frames(7), **options)


def test_metadata_that_numbers_the_frames_places_them_in_their_clip():
    metadata = VideoMetadata(total_num_frames=40, fps=10.0, frames_indices=np.array([0, 10, 25, 39]))
    output = processor()(random_frames(4), video_metadata=metadata, times=[0.5, 2.6], return_metadata=True)
    assert taken(output) == [0, 25]
    assert output["video_metadata"][0].timestamps == [0.0, 2.5]
    assert output["video_metadata"][0].total_num_frames == 40


def test_an_explicit_rate_clears_the_default_of_the_other(mp4):
    assert taken(processor(num_frames=3)(mp4, return_metadata=True)) == [1, 5, 8]
    assert taken(processor(num_frames=3)(mp4, fps=1, return_metadata=True)) == [0, 4, 8]
    assert taken(processor(fps=2)(mp4, num_frames=3, return_metadata=True)) == [1, 5, 8]


@pytest.mark.parametrize(
    "options", [{"num_frames": 3, "fps": 2}, {"num_frames": 3, "times": [1]}, {"fps": 3, "times": [1]}], ids=str
)
def test_two_explicit_rates_are_refused(options, mp4):
    with pytest.raises(ValueError, match="exclude each other; got"):
        processor()(mp4, **options)


def test_a_processor_with_two_rates_is_refused():
    with pytest.raises(ValueError, match="exclude each other"):
        processor(num_frames=3, fps=2)


# -- unchanged frames -------------------------------------------------------------------------------------------------


def slideshow() -> np.ndarray:
    """Seven frames (T, 33, 33, 3), of which 1, 2, 4 and 6 show what the frame before shows, 4 within two levels."""
    slides = random_frames(3, height=33, width=33).clip(10, 240)
    frames = slides[[0, 0, 0, 1, 1, 2, 2]]
    frames[4] += 2
    return frames


@pytest.mark.parametrize(
    ("level", "distinct", "index"),
    [
        (True, [0, 3, 4, 5], [0, 0, 0, 1, 2, 3, 3]),
        (0, [0, 3, 4, 5], [0, 0, 0, 1, 2, 3, 3]),
        (1, [0, 3, 4, 5], [0, 0, 0, 1, 2, 3, 3]),
        (2, [0, 3, 5], [0, 0, 0, 1, 1, 2, 2]),
    ],
    ids=str,
)
def test_unchanged_frames_are_left_out_and_counted(level, distinct, index):
    frames = slideshow()
    full = processor()(frames, return_metadata=True)
    output = processor()(frames, skip_unchanged=level, return_metadata=True)
    assert torch.equal(output["pixel_values_videos"], full["pixel_values_videos"][distinct])
    assert output["video_frame_index"].tolist() == index
    assert output["video_frame_index"].dtype == torch.int64
    assert output["video_num_frames"].tolist() == [7]
    assert output["video_metadata"] == full["video_metadata"]
    saved = processor(skip_unchanged=level)(frames)
    assert torch.equal(saved["video_frame_index"], output["video_frame_index"])


def test_every_frame_is_found_by_its_index_in_a_batch_of_long_and_short_videos():
    videos = [np.repeat(random_frames(9, seed=1), 5, axis=0), random_frames(3, seed=2), slideshow()]
    full = processor()(videos)["pixel_values_videos"]
    output = processor()(videos, skip_unchanged=True)
    assert len(output["pixel_values_videos"]) == 9 + 3 + 4
    assert output["video_num_frames"].tolist() == [45, 3, 7]
    assert torch.equal(output["pixel_values_videos"][output["video_frame_index"]], full)


def test_slow_changes_do_not_add_up():
    """Each frame is compared with the frame shown instead, not with the one before."""
    frames = np.stack([np.full((33, 33, 3), 100 + number, np.uint8) for number in range(9)])
    output = processor()(frames, skip_unchanged=2)
    assert output["video_frame_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    falling = processor()(frames[::-1].copy(), skip_unchanged=2)
    assert falling["video_frame_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_frames_are_compared_after_resizing():
    frames = np.zeros((2, 330, 330, 3), np.uint8)
    frames[1, 0, 0] = 3  # one pixel of a hundred that become one
    assert processor()(frames, skip_unchanged=True)["video_frame_index"].tolist() == [0, 0]
    assert processor()(frames, skip_unchanged=True, do_resize=False)["video_frame_index"].tolist() == [0, 1]


@pytest.mark.parametrize("chunk_size", [1, 3, 16])
def test_a_stream_leaves_out_the_same_frames(chunk_size):
    video = np.repeat(slideshow(), 4, axis=0)
    output = processor()(video, skip_unchanged=True, return_metadata=True)
    [stream] = processor().stream(video, chunk_size=chunk_size, skip_unchanged=True)
    chunks = list(stream)
    assert all(0 < len(chunk) <= chunk_size for chunk in chunks)
    assert torch.equal(torch.cat(chunks), output["pixel_values_videos"])
    assert stream.frame_index == output["video_frame_index"].tolist()
    assert (stream.num_frames, stream.metadata) == (28, output["video_metadata"][0])
    assert torch.equal(stream.pixels, output["pixel_values_videos"])  # a second time


def test_frames_that_are_left_out_are_not_held():
    decoder = FakeDecoder(np.repeat(slideshow(), 20, axis=0))
    processor()(decoder, do_sample_frames=False, skip_unchanged=True)
    assert decoder.most_alive <= 17


def test_without_skipping_nothing_speaks_of_it():
    assert set(processor()(slideshow())) == {"pixel_values_videos", "video_num_frames"}
    assert processor().model_input_names == ["pixel_values_videos", "video_num_frames"]
    assert processor(skip_unchanged=2).model_input_names[-1] == "video_frame_index"
    assert set(processor(skip_unchanged=2)(slideshow(), skip_unchanged=False)) == set(processor()(slideshow()))


@pytest.mark.parametrize("level", [-1, 256, float("nan")])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(ValueError, match="number of grey levels between 0 and 255; got"):
        processor()(slideshow(), skip_unchanged=level)


# -- sources ----------------------------------------------------------------------------------------------------------


class FakeDecoder:
    """The part of torchcodec's `VideoDecoder` that is used, over frames in memory; starts at 3.1 seconds."""

    begin = 3.1

    def __init__(self, frames: np.ndarray) -> None:
        self.frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        self.alive: list[weakref.ref] = []
        self.most_alive = 0
        duration = len(frames) / FPS
        self.metadata = SimpleNamespace(
            num_frames=len(frames),
            average_fps=float(FPS),
            duration_seconds=duration,
            begin_stream_seconds=self.begin,
            end_stream_seconds=self.begin + duration,
            height=frames.shape[1],
            width=frames.shape[2],
        )

    def __len__(self) -> int:
        return len(self.frames)

    def get_frame_at(self, index: int) -> SimpleNamespace:
        data = self.frames[index].clone()
        self.alive = [frame for frame in self.alive if frame() is not None] + [weakref.ref(data)]
        self.most_alive = max(self.most_alive, len(self.alive))
        return SimpleNamespace(data=data, pts_seconds=self.begin + index / FPS, duration_seconds=1 / FPS)

    def get_frame_played_at(self, seconds: float) -> SimpleNamespace:
        if not self.begin <= seconds < self.metadata.end_stream_seconds:
            raise IndexError(f"no frame is played at {seconds}")
        return self.get_frame_at(int((seconds - self.begin) * FPS))


@pytest.mark.parametrize(
    "form",
    [
        lambda path: str(path),
        lambda path: path,
        lambda path: path.as_uri(),
        lambda path: "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda path: path.read_bytes(),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: {"path": str(path), "bytes": None},
        lambda path: {"path": None, "bytes": path.read_bytes()},
    ],
    ids=["str", "Path", "file URI", "data URI", "bytes", "file object", "datasets path", "datasets bytes"],
)
def test_a_file_is_read_from_every_kind_of_source(form, mp4, tmp_path):
    path = tmp_path / "a clip.mp4"
    path.write_bytes(mp4)
    expected = processor()(mp4, num_frames=3)["pixel_values_videos"]
    assert torch.equal(processor()(form(path), num_frames=3)["pixel_values_videos"], expected)


@pytest.fixture(scope="module")
def decoded(mp4) -> np.ndarray:
    """The frames of the file as somebody else has decoded them, (T, H, W, 3)."""
    return decode_video(mp4).frames.permute(0, 2, 3, 1).contiguous().numpy()


@pytest.mark.parametrize(
    "form",
    [
        lambda frames: frames,
        lambda frames: frames.transpose(0, 3, 1, 2),
        lambda frames: torch.from_numpy(frames),
        lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
        lambda frames: [Image.fromarray(frame) for frame in frames],
        lambda frames: list(frames),
        lambda frames: FakeDecoder(frames),
    ],
    ids=["array", "array, channels first", "tensor", "tensor, channels first", "PIL", "list of arrays", "decoder"],
)
@pytest.mark.parametrize("options", [{"fps": 2}, {"num_frames": 3}, {"times": [0.3, 2.4]}], ids=str)
def test_decoded_frames_give_the_pixels_of_their_file(form, options, mp4, decoded):
    video = form(decoded)
    clock = {} if isinstance(video, FakeDecoder) else {"video_metadata": {"fps": FPS}}
    expected = processor()(mp4, **options)["pixel_values_videos"]
    assert torch.equal(processor()(video, **clock, **options)["pixel_values_videos"], expected)


def test_image_files_give_the_pixels_of_their_video(mp4, decoded, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(len(decoded))]
    for file, frame in zip(files, decoded, strict=True):
        Image.fromarray(frame).save(file)
    expected = processor()(mp4, fps=2)["pixel_values_videos"]
    for names in (files, [str(file) for file in files]):
        got = processor()([[names]], fps=2, video_metadata={"fps": FPS})["pixel_values_videos"]
        assert torch.equal(got, expected)


@pytest.fixture
def url(mp4) -> Iterator[str]:
    class Giving(Handler):
        def do_GET(self):
            self.answer(mp4)

    with served_by(Giving) as server:
        yield f"{server}/clip.mp4"


def test_a_url_gives_the_pixels_of_its_file_where_limits_allow_it(url, mp4):
    with pytest.raises(VideoError, match="not a public address"):
        processor()(url, fps=2)
    expected = processor()(mp4, fps=2)["pixel_values_videos"]
    here = VideoLimits(allow_private_addresses=True)
    assert torch.equal(processor()(url, fps=2, limits=here)["pixel_values_videos"], expected)
    assert torch.equal(processor(limits=here)(url, fps=2)["pixel_values_videos"], expected)
    assert "limits" not in processor(limits=here).to_dict()


def test_a_torchcodec_decoder_gives_the_pixels_of_its_file(mp4):
    decoders = pytest.importorskip("torchcodec.decoders")
    expected = processor()(mp4, fps=2, return_metadata=True)
    got = processor()(decoders.VideoDecoder(mp4), fps=2, return_metadata=True)
    assert taken(got) == taken(expected)
    # Its conversion to RGB may round otherwise.
    assert (got["pixel_values_videos"] - expected["pixel_values_videos"]).abs().max() <= 2 * GREY_LEVEL


def test_full_size_frames_do_not_pile_up():
    decoder = FakeDecoder(random_frames(40))
    processor()(decoder, fps=4)
    assert decoder.most_alive <= 2


def test_metadata_tells_where_frames_come_from(mp4):
    metadata = processor()(mp4, num_frames=2, return_metadata=True)["video_metadata"][0]
    assert isinstance(metadata, VideoMetadata)
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (10, 4.0, 2.5)
    assert (metadata.height, metadata.width, metadata.video_backend) == (48, 64, "pyav")
    assert metadata.frame_times == [0.5, 1.75]
    assert "video_metadata" not in processor()(mp4)


# -- mistakes ---------------------------------------------------------------------------------------------------------

FRAME = np.zeros((8, 9, 3), np.uint8)
MISTAKES = {
    "no video": ([], {}, ValueError, "at least one video; got none"),
    "no frames": (np.zeros((0, 8, 9, 3), np.uint8), {}, ValueError, "at least one frame; got none"),
    "an empty list of frames": ([[[]]], {}, ValueError, "at least one frame; got none"),
    "one frame, not a video": (FRAME, {}, ValueError, r"list of frames; got an array of shape \(8, 9, 3\)"),
    "grey": (np.zeros((4, 8, 9), np.uint8), {}, ValueError, r"shape \(4, 8, 9\)"),
    "two channels": (np.zeros((4, 8, 9, 2), np.uint8), {}, ValueError, r"RGB.*shape \(8, 9, 2\)"),
    "empty frames": (np.zeros((4, 0, 9, 3), np.uint8), {}, ValueError, r"shape \(0, 9, 3\)"),
    "wrong layout": (FRAME[None], {"input_data_format": "channels_first"}, ValueError, "channels_first"),
    "mixed layouts": ([FRAME, FRAME.transpose(2, 0, 1)], {}, ValueError, "same layout"),
    "a list of pictures of rank 2": ([FRAME[0], FRAME[0]], {}, ValueError, r"got an array of shape \(9, 3\)"),
    "normalised floats": (FRAME[None] - 1.0, {}, ValueError, r"0\.\.255, or floats in 0\.\.1; got -1\.\.-1"),
    "too bright": (FRAME[None] + 256.0, {}, ValueError, r"got 256\.\.256"),
    "too bright integers": (FRAME[None].astype(np.int32) + 300, {}, ValueError, r"got 300\.\.300"),
    "not a number": (np.full((1, 8, 9, 3), np.nan), {}, ValueError, "got nan"),
    "booleans": (FRAME[None] > 0, {}, TypeError, "integers or floats; got bool"),
    "unknown type": (3.5, {}, TypeError, "A video is .* got float"),
    "not a frame": ([[[FRAME, 3]]], {}, ValueError, "A frame is .* got int"),
    "not a file": ("no such file.mp4", {}, VideoError, "no such file"),
    "metadata for another number": (
        [FRAME[None]] * 2,
        {"video_metadata": [{"fps": 1}]},
        ValueError,
        "1 entries for 2",
    ),
    "metadata of another video": (
        FRAME[None],
        {"video_metadata": {"fps": 1, "total_num_frames": 9}},
        ValueError,
        "9 frames, the video has 1",
    ),
    "numbers of other frames": (
        FRAME[None],
        {"video_metadata": {"fps": 1, "frames_indices": [1, 2]}},
        ValueError,
        "got 2 for 1 frames",
    ),
    "numbers that go back": (
        FRAME[None].repeat(3, 0),
        {"video_metadata": {"fps": 1, "frames_indices": [0, 5, 2]}},
        ValueError,
        "whole numbers in ascending order",
    ),
    "a number before the first": (
        FRAME[None],
        {"video_metadata": {"fps": 1, "frames_indices": [-1]}},
        ValueError,
        "whole numbers in ascending order",
    ),
    "half a number": (
        FRAME[None],
        {"video_metadata": {"fps": 1, "frames_indices": [0.5]}},
        ValueError,
        "whole numbers in ascending order",
    ),
    "a number behind the last": (
        FRAME[None],
        {"video_metadata": {"fps": 1, "frames_indices": [7], "total_num_frames": 7}},
        ValueError,
        "below its `total_num_frames`, 7",
    ),
    "no time between frames": (FRAME[None], {"video_metadata": {"fps": 0}}, ValueError, "positive number; got 0"),
    "time that goes back": (FRAME[None], {"video_metadata": {"fps": -2.0}}, ValueError, "positive number; got -2"),
    "time that is none": (
        FRAME[None],
        {"video_metadata": {"fps": float("nan")}, "do_sample_frames": False},
        ValueError,
        "positive number; got nan",
    ),
    "a rate in words": (FRAME[None], {"video_metadata": {"fps": "2"}}, ValueError, "positive number; got '2'"),
    "a length before the start": (
        FRAME[None],
        {"video_metadata": {"fps": 2, "duration": -1}},
        ValueError,
        "`duration` of `video_metadata` must be a positive number",
    ),
    "times of a part": (FRAME[None], {"times": [1.0], "end_seconds": 2.0}, ValueError, "`times` names every moment"),
    "no most frames": (FRAME[None], {"max_frames": 0}, ValueError, "must be at least 1; got 0"),
    "no most frames of many": (
        FRAME[None],
        {"max_frames": 0, "num_frames": 3},
        ValueError,
        "must be at least 1; got 0",
    ),
    "no times": (FRAME[None], {"times": []}, ValueError, "at least one moment"),
    "crop": (
        FRAME[None],
        {"do_center_crop": True, "crop_size": 8},
        ValueError,
        "must be off; got do_center_crop=True",
    ),
    "no fixed size": (FRAME[None], {"size": {"shortest_edge": 8}}, ValueError, '"height" and a "width"'),
    "unknown filter": (FRAME[None], {"resample": Image.LANCZOS}, ValueError, "NEAREST, BILINEAR, BICUBIC"),
    "sizes that differ": ([FRAME, FRAME[:4]], {"do_resize": False}, ValueError, "same size"),
    "sizes that differ between videos": (
        [FRAME[None], FRAME[None, :4]],
        {"do_resize": False},
        ValueError,
        "same frame size",
    ),
}


@pytest.mark.parametrize(("videos", "options", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(videos, options, error, message):
    with pytest.raises(error, match=message):
        processor()(videos, **options)


@pytest.mark.parametrize("saved", [{"fps": 0}, {"max_frames": 0}, {"num_frames": 0}], ids=str)
def test_zero_is_no_default(saved):
    with pytest.raises(ValueError, match=r"must be (at least 1|a positive number); got 0"):
        processor(**saved)(np.stack([FRAME] * 4), video_metadata={"fps": 2, "total_num_frames": 4})


def test_a_mistake_in_the_last_video_is_found_before_the_first_is_read():
    decoder = FakeDecoder(random_frames(3))
    with pytest.raises(ValueError, match="at least one frame"):
        processor()([decoder, np.zeros((0, 8, 9, 3), np.uint8)])
    assert decoder.most_alive == 0


# -- saving -----------------------------------------------------------------------------------------------------------


def test_every_attribute_survives_saving(tmp_path):
    original = processor(num_frames=7, max_frames=99, resample=Image.BILINEAR, image_mean=[0.1, 0.2, 0.3])
    original.save_pretrained(tmp_path)
    saved = json.loads(Path(tmp_path, "video_preprocessor_config.json").read_text())
    assert saved["video_processor_type"] == "CrossLMMVideoProcessor"
    for load in (CrossLMMVideoProcessor.from_pretrained, AutoVideoProcessor.from_pretrained):
        loaded = load(tmp_path)
        assert isinstance(loaded, CrossLMMVideoProcessor)
        assert loaded.to_dict() == original.to_dict()
        assert (loaded.num_frames, loaded.fps, loaded.max_frames) == (7, None, 99)
        frames = random_frames(9)
        expected = original(frames)["pixel_values_videos"]
        assert torch.equal(loaded(frames)["pixel_values_videos"], expected)


def test_an_override_while_loading_clears_the_saved_rate(tmp_path):
    processor(num_frames=7).save_pretrained(tmp_path)
    loaded = CrossLMMVideoProcessor.from_pretrained(tmp_path, fps=2.0)
    assert (loaded.num_frames, loaded.fps) == (None, 2.0)
    again = CrossLMMVideoProcessor.from_pretrained(tmp_path, num_frames=5)
    assert (again.num_frames, again.fps) == (5, None)
