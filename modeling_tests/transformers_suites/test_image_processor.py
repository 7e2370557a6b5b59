"""Transformers' common tests of image processors, for the one that the package registers."""

import unittest

from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from checkout import differing, suite

common = suite("test_image_processing_common")


class ImageProcessorTester:
    """What the suite asks of a tester: settings, and images."""

    batch_size, num_channels = 5, 3
    min_resolution, max_resolution = 30, 80
    size = {"height": 20, "width": 24}

    def expected_output_image_shape(self, images):
        return self.num_channels, self.size["height"], self.size["width"]

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        return common.prepare_image_inputs(
            batch_size=self.batch_size,
            num_channels=self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            equal_resolution=equal_resolution,
            numpify=numpify,
            torchify=torchify,
        )


@differing(
    {
        "test_call_numpy_4_channels": "Transformers' own processor refuses four channels for three means",
        "test_new_models_require_torchvision_backend": "the package runs where torchvision is absent",
    }
)
class CrossLMMImageProcessorSuite(common.ImageProcessingTestMixin, unittest.TestCase):
    def setUp(self):
        self.image_processing_classes = {"pil": SiglipImageProcessorPil}
        self.image_processor_tester = ImageProcessorTester()

    @property
    def image_processor_dict(self):
        return {"size": self.image_processor_tester.size}
