"""Transformers' common tests of video processors."""

import unittest
from typing import Any

from transformers.models.auto.video_processing_auto import AutoVideoProcessor

import transformers_crosslmm
from checkout import differing, suite

common = suite("test_video_processing_common")


class CrossLMMVideoProcessor(transformers_crosslmm.CrossLMMVideoProcessor):
    """Shows pixels as the suite counts them, videos first: (videos, T, 3, S, S)."""

    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        output = super().preprocess(*args, **kwargs)
        pixels = output["pixel_values_videos"]
        output["pixel_values_videos"] = pixels.reshape(len(output["video_num_frames"]), -1, *pixels.shape[1:])
        return output


class VideoProcessorTester:
    """What the suite asks of a tester: settings, and videos."""

    batch_size, num_frames, num_channels = 5, 8, 3
    min_resolution, max_resolution = 30, 80
    size = {"height": 20, "width": 24}

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, self.size["height"], self.size["width"]

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return common.prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


common.AutoVideoProcessor = AutoVideoProcessor  # where torchvision is absent, Transformers exports a stand-in


@differing(
    {
        "test_call_numpy_4_channels": "the suite passes PIL frames with alpha, which are converted to RGB",
        "test_call_sample_frames": "more frames than a video has give each frame once instead of an error",
        "test_video_processor_from_dict_with_kwargs": "`size` names a height and a width",
    }
)
class CrossLMMVideoProcessorSuite(common.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = CrossLMMVideoProcessor
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()

    @property
    def video_processor_dict(self):
        return {"size": self.video_processor_tester.size}
