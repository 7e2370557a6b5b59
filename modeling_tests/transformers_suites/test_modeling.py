"""Transformers' common tests of configs, models, generation and pipelines: images, videos, one-frame videos."""

import unittest

import torch
from transformers import SiglipVisionConfig
from transformers.models.auto import modeling_auto

from checkout import differing, suite
from factories import tiny_config
from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration, CrossLMMModel

common = suite("test_modeling_common")
vlm = suite("vlm_tester")
# By these names the suite knows which model has a loss.
modeling_auto.MODEL_MAPPING_NAMES["crosslmm"] = "CrossLMMModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["crosslmm"] = "CrossLMMForConditionalGeneration"


class ImageTester(vlm.VLMModelTester):
    """One image per row, at its start."""

    base_model_class = CrossLMMModel
    config_class = CrossLMMConfig
    text_config_class = type(tiny_config().text_config)
    vision_config_class = SiglipVisionConfig
    conditional_generation_class = CrossLMMForConditionalGeneration
    placeholder = "image_token_id"
    num_frames = 1

    def __init__(self, parent):
        config = self.get_config()
        text = config.text_config
        super().__init__(
            parent,
            batch_size=7,  # where a suite wants seven rows it would fill up with random ids, placeholders among them
            image_token_id=config.image_token_id,
            num_image_tokens=self.num_frames * config.tokens_per_frame,
            image_size=config.vision_config.image_size,
            patch_size=config.vision_config.patch_size,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            max_position_embeddings=text.max_position_embeddings,
        )

    def get_config(self):
        """Every vision block built, gates open, so that every parameter matters."""
        return tiny_config(
            vision_feature_layer=-1,
            image_token_id=3,  # the suite cuts the vocabulary from above
            video_token_id=4,
            text_config={"num_hidden_layers": 2, "cross_attention_interval": 1, "gate_init": 1.0, "pad_token_id": 0},
            vision_config={"num_hidden_layers": 2},
        )

    @property
    def _special_token_ids(self):
        config = self.get_config()
        return super()._special_token_ids | {config.image_token_id, config.video_token_id}

    def create_attention_mask(self, input_ids):
        return torch.ones_like(input_ids)

    def frames(self, config):
        size = config.vision_config.image_size
        return common.floats_tensor([self.batch_size * self.num_frames, 3, size, size], scale=1.0)

    def _prepare_modality_inputs(self, input_ids, config):
        input_ids = input_ids.clone()
        input_ids[:, : self.num_image_tokens] = getattr(config, self.placeholder)
        return input_ids, {"pixel_values": self.frames(config)}


class VideoTester(ImageTester):
    """One video of three frames per row."""

    placeholder = "video_token_id"
    num_frames = 3

    def _prepare_modality_inputs(self, input_ids, config):
        input_ids, inputs = super()._prepare_modality_inputs(input_ids, config)
        lengths = torch.full((self.batch_size,), self.num_frames, device=input_ids.device)
        return input_ids, {"pixel_values_videos": inputs["pixel_values"], "video_num_frames": lengths}


class OneFrameTester(VideoTester):
    """One video of one frame per row: whatever counts rows counts frames and videos alike."""

    num_frames = 1


EVERYWHERE = {
    "test_model_rope_scaling_from_config": "text with random ids and without media, placeholders among them, beyond "
    "the context",
    "test_generate_from_random_inputs_embeds": "placeholders without pixels or features are refused",
}


VIDEOS = EVERYWHERE | {
    "test_generate_compile_model_forward_fullgraph": "the suite cuts `video_num_frames` as if it had columns",
    "test_mismatching_num_image_tokens": "the suite takes images away; the inputs here have none",
}


class Suite(vlm.VLMModelTest):
    """What the suites ask beyond their tester, for any of ours."""

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        """The suite cuts every tensor to as many rows; of pixels these are frames."""
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        if "pixel_values_videos" in inputs:
            num_frames = batch_size * self.model_tester.num_frames
            inputs["pixel_values_videos"] = self.model_tester.frames(config)[:num_frames]
        return config, inputs

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = ImageTester(self).prepare_config_and_inputs_for_common()
        return config, {"pixel_values": inputs["pixel_values"]}

    def _video_features_prepare_config_and_inputs(self):
        config, inputs = VideoTester(self).prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in ("pixel_values_videos", "video_num_frames")}


@differing(EVERYWHERE)
class CrossLMMImageSuite(Suite, unittest.TestCase):
    model_tester_class = ImageTester
    additional_model_inputs = ["pixel_values"]


@differing(VIDEOS | {"test_eager_matches_sdpa_inference": "the suite cuts frames as if they were rows"})
class CrossLMMVideoSuite(Suite, unittest.TestCase):
    model_tester_class = VideoTester
    additional_model_inputs = ["pixel_values_videos", "video_num_frames"]


@differing(VIDEOS)
class CrossLMMOneFrameSuite(Suite, unittest.TestCase):
    model_tester_class = OneFrameTester
    additional_model_inputs = ["pixel_values_videos", "video_num_frames"]
