"""Transformers' common tests of processors."""

import functools
import unittest
from typing import Any

import pytest
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import transformers_crosslmm
from checkout import differing, suite
from factories import mp4_of, random_frames, tiny_tokenizer
from transformers_crosslmm import CrossLMMConfig, CrossLMMVideoProcessor

common = suite("test_processing_common")
SIZE = {"height": 42, "width": 42}  # three patches of the default 14 pixels, as many as tokens


@pytest.fixture(scope="module", autouse=True)
def media_on_disk(tmp_path_factory):
    """The suite's media lie on the Hub; ours are made here and stand in for them."""
    folder = tmp_path_factory.mktemp("media")
    files = {suffix: [folder / f"{number}.{suffix}" for number in range(2)] for suffix in ("png", "mp4")}
    for number in range(2):
        Image.fromarray(random_frames(1, seed=number)[0]).save(files["png"][number])
        files["mp4"][number].write_bytes(mp4_of(random_frames(11, seed=number), fps=30))
    common.MODALITY_INPUT_DATA["images"] = [str(file) for file in files["png"]]
    common.MODALITY_INPUT_DATA["videos"] = [str(file) for file in files["mp4"]]
    common.url_to_local_path = lambda url, *_: str(files["mp4" if url.endswith("mp4") else "png"][0])


class CrossLMMProcessor(transformers_crosslmm.CrossLMMProcessor):
    """Shows pixels as the suite counts them, videos first: (videos, T, 3, S, S)."""

    @functools.wraps(transformers_crosslmm.CrossLMMProcessor.__call__)  # the suite reads the signature
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().__call__(*args, **kwargs)
        if "pixel_values_videos" in inputs:
            pixels, videos = inputs["pixel_values_videos"], len(inputs["video_num_frames"])
            if hasattr(pixels, "reshape"):
                inputs["pixel_values_videos"] = pixels.reshape(videos, -1, *pixels.shape[1:])
            else:
                each = len(pixels) // videos
                inputs["pixel_values_videos"] = [pixels[i * each : (i + 1) * each] for i in range(videos)]
        return inputs


@differing(
    {
        "test_video_processor_defaults": "compares shapes with those of the video processor alone, which are flat",
        "test_apply_chat_template_video_frame_sampling": "fps=10 looks at 0, 0.1, 0.2 and 0.3 s of 11 frames at 30 "
        "fps; without options 1 fps; frame files are sampled by `num_frames` instead of refused",
    }
)
class CrossLMMProcessorSuite(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = CrossLMMProcessor

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        CrossLMMConfig().save_pretrained(cls.tmpdirname)  # by which the Auto classes know what the folder holds

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return SiglipImageProcessorPil(size=SIZE)

    @classmethod
    def _setup_video_processor(cls):
        return CrossLMMVideoProcessor(size=SIZE)
