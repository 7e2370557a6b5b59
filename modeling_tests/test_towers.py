"""Any vision encoder: the original tokens are those of Transformers' own class, without what precedes the patches."""

import logging

import pytest
import torch
from transformers import AutoModel

from factories import random_model, tiny_config
from numerics import assert_close_to_scale
from test_families import numbers_of, without_cache
from test_modeling_crosslmm import gradients, in_dtype, labelled, make_sample, model_inputs, relative_change
from transformers_crosslmm import CrossLMMForConditionalGeneration
from transformers_crosslmm.configuration_crosslmm import VISION_TYPES

# Sizes in which no prefix is a number of patches, and a frame has 25 of these.
TOWERS = {
    "siglip_vision_model": {},
    "clip_vision_model": {"projection_dim": 12},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    # `pos_embed_rescale` moves positions at random while training.
    "dinov3_vit": {"hidden_size": 24, "num_register_tokens": 4, "pos_embed_rescale": None},
}
DEPTH = 3
SAMPLE = (3, ("video", 6), 2, ("image", 1), 5)
each_tower = pytest.mark.parametrize("tower", TOWERS)


def tower_config(tower: str, **overrides):
    return tiny_config(vision_config={"model_type": tower, **TOWERS[tower]}, **overrides)


def whole_encoder(model: CrossLMMForConditionalGeneration, seed: int = 5) -> torch.nn.Module:
    """Transformers' own class, whole, with random weights and, where the model's tower has one, its weights."""
    fields = model.config.vision_config.to_dict()
    whole = AutoModel.from_config(type(model.config.vision_config)(**fields)).eval()
    assert type(whole).__module__.startswith("transformers.models.")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    _, unexpected = whole.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert not unexpected
    return whole


def test_every_supported_encoder_has_its_tests():
    assert set(TOWERS) == set(VISION_TYPES)


@each_tower
@pytest.mark.parametrize("layer", [-4, -2, -1, 1, 3])
@torch.no_grad()
def test_original_tokens_are_the_hidden_states_of_the_whole_encoder(tower, layer):
    """The last hidden state as the last block leaves it, before the norm that follows it."""
    model = random_model(tower_config(tower, vision_feature_layer=layer))
    whole = whole_encoder(model)
    after_blocks = []
    blocks = next(module for module in whole.modules() if isinstance(module, torch.nn.ModuleList))
    blocks[-1].register_forward_hook(lambda block, inputs, output: after_blocks.append(output))
    frames = torch.randn(6, 3, 33, 33)
    expected = whole(frames[:4], output_hidden_states=True).hidden_states[layer]
    if layer in (-1, DEPTH):
        (last,) = after_blocks
        expected = last[0] if isinstance(last, tuple) else last
    expected = expected[:, -25:]
    original = model.get_video_features(frames).last_hidden_state
    assert original.shape == (6, 25, model.config.vision_config.hidden_size)
    assert torch.equal(original[:4], expected)


@each_tower
@torch.no_grad()
def test_tokens_before_the_patches_are_those_that_the_encoder_has(tower):
    model = random_model(tower_config(tower))
    hidden = whole_encoder(model)(torch.randn(1, 3, 33, 33), output_hidden_states=True).hidden_states[1]
    prefix = {
        "siglip_vision_model": 0,
        "clip_vision_model": 1,
        "dinov2": 1,
        "dinov2_with_registers": 4,
        "dinov3_vit": 5,
    }
    assert hidden.shape[1] == 25 + prefix[tower]


@each_tower
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_a_whole_encoder_is_loaded_without_a_word_about_what_is_not_built(tower, layer, tmp_path, caplog, monkeypatch):
    model = random_model(tower_config(tower, vision_feature_layer=layer))
    model.save_pretrained(tmp_path)
    whole = whole_encoder(model).state_dict()
    weights = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
    weights |= {f"model.vision_tower.{name}": value for name, value in whole.items()}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded, report = CrossLMMForConditionalGeneration.from_pretrained(
        None, config=tower_config(tower, vision_feature_layer=layer), state_dict=weights, output_loading_info=True
    )
    assert not any(report.values())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@each_tower
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(tower, tmp_path):
    model = random_model(tower_config(tower))
    model.save_pretrained(tmp_path)
    again, report = CrossLMMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(again.config.vision_config) is type(model.config.vision_config)
    assert numbers_of(again) == numbers_of(model)
    inputs = model_inputs(make_sample(model.config, *SAMPLE))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@each_tower
@torch.no_grad()
def test_both_forms_of_the_cache_write_what_whole_forwards_write(tower):
    model = random_model(tower_config(tower))
    inputs = model_inputs(make_sample(model.config, *SAMPLE))
    expected = without_cache(model, inputs, 5).tolist()
    for form in ("kv", "features"):
        found = model.generate(**inputs, do_sample=False, max_new_tokens=5, cross_attention_cache=form)
        assert found.tolist() == expected, form
    other = inputs | {"pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    assert relative_change(model(**inputs).logits, model(**other).logits) > 0.01


@each_tower
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_every_weight_of_the_encoder_learns_with_and_without_checkpointing(tower, use_reentrant):
    model = random_model(tower_config(tower)).double().train()
    inputs = in_dtype(labelled(model.config, SAMPLE), torch.float64)
    plain = gradients(model, inputs)
    parameters = {name for name, p in model.named_parameters() if "vision_tower" in name and p.requires_grad}
    # Softmax ignores a shift of the scores, so biases of keys get rounding errors alone.
    assert {name for name in parameters if name not in plain} == set()
    learns = {name for name in parameters if "k_proj.bias" not in name and "key.bias" not in name}
    assert all(plain[name].any() for name in learns)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(model, inputs)
    largest = max(gradient.abs().max() for gradient in plain.values())
    assert checkpointed.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(checkpointed[name], expected, rtol=1e-9, atol=1e-12 * largest, msg=name)


@each_tower
@torch.no_grad()
def test_half_precision_is_near_float32(tower):
    model = random_model(tower_config(tower))
    frames = torch.randn(3, 3, 33, 33)
    expected = model.get_video_features(frames).last_hidden_state
    half = model.to(torch.bfloat16).get_video_features(frames).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert_close_to_scale(half.float(), expected, relative=0.05)


@pytest.mark.parametrize("model_type", ["vit", "siglip2_vision_model", "qwen2", "no such thing"])
def test_other_encoders_are_refused_with_the_list(model_type):
    with pytest.raises(ValueError, match="'siglip_vision_model', 'clip_vision_model', 'dinov2'"):
        tiny_config(vision_config={"model_type": model_type})
