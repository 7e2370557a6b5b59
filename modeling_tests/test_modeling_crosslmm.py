"""The network: equal to the paper's maths written out, and what must hold whatever the weights are.

Sizes are those of `tiny_config`: D 20, H 48, 25 patches and 9 pooled tokens a frame, blocks at layers 0, 2 and 4.
"""

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from factories import random_model, tiny_config
from numerics import assert_close_to_scale, assert_no_worse_than
from reference_crosslmm import Trace, crosslmm
from transformers_crosslmm import CrossLMMForConditionalGeneration

# What float32 rounding alone leaves between two ways to write the same sum is about 1e-6 of the largest logit.
FLOAT32 = 1e-4
# In float64 what remains is Qwen2's norms, rotations and (eager) softmax, which Transformers computes in float32.
FLOAT64 = 1e-6

BLOCKS = (0, 2, 4)
CROSS_ATTENTION = "model.language_model.layers.{}.cross_attention.{}"


class Sample(NamedTuple):
    """One sequence: token ids (L,) and its media in prompt order, as the reference takes them."""

    token_ids: Tensor
    media: list[tuple[str, Tensor]]


def make_sample(config, *layout: int | tuple[str, int], seed: int = 0) -> Sample:
    """layout: a number of text tokens, or (kind, frames) of a medium, in prompt order."""
    generator = torch.Generator().manual_seed(seed)
    side = config.vision_config.image_size
    lowest_special = min(config.image_token_id, config.video_token_id)
    pieces, media = [], []
    for part in layout:
        if isinstance(part, int):
            pieces.append(torch.randint(1, lowest_special, (part,), generator=generator))
        else:
            kind, num_frames = part
            token_id = config.video_token_id if kind == "video" else config.image_token_id
            pieces.append(torch.full((num_frames * config.tokens_per_frame,), token_id))
            media.append((kind, torch.randn(num_frames, 3, side, side, generator=generator)))
    return Sample(torch.cat(pieces), media)


def model_inputs(*samples: Sample, padding_side: str = "right") -> dict[str, Tensor]:
    """The samples as one padded batch, in the form the processor returns."""
    longest = max(len(sample.token_ids) for sample in samples)
    ids, mask = [], []
    for sample in samples:
        missing = longest - len(sample.token_ids)
        padding = (missing, 0) if padding_side == "left" else (0, missing)
        ids.append(torch.nn.functional.pad(sample.token_ids, padding))
        mask.append(torch.nn.functional.pad(torch.ones_like(sample.token_ids), padding))
    inputs = {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}
    media = [medium for sample in samples for medium in sample.media]
    videos = [frames for kind, frames in media if kind == "video"]
    images = [frames for kind, frames in media if kind == "image"]
    if videos:
        inputs["pixel_values_videos"] = torch.cat(videos)
        inputs["video_num_frames"] = torch.tensor([len(frames) for frames in videos])
    if images:
        inputs["pixel_values"] = torch.cat(images)
    return inputs


def labelled(config, *layouts, first_seed: int = 0) -> dict[str, Tensor]:
    """Inputs with the text as labels, but for the token behind each medium: a pooled token would predict it."""
    inputs = model_inputs(
        *(make_sample(config, *layout, seed=seed) for seed, layout in enumerate(layouts, first_seed))
    )
    ids = inputs["input_ids"]
    is_visual = (ids == config.image_token_id) | (ids == config.video_token_id)
    is_behind = torch.nn.functional.pad(is_visual[:, :-1], (1, 0))
    return {**inputs, "labels": ids.masked_fill(is_visual | is_behind | (inputs["attention_mask"] == 0), -100)}


def gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def reference(model: CrossLMMForConditionalGeneration, sample: Sample, *, dtype: torch.dtype = torch.float64) -> Trace:
    """The reference with the model's weights, computed in `dtype`."""
    weights = {name: value.detach().to(dtype) for name, value in model.state_dict().items()}
    media = [(kind, frames.to(dtype)) for kind, frames in sample.media]
    return crosslmm(weights, model.config.to_dict(), sample.token_ids, media)


def relative_change(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


# -- equal to the reference -------------------------------------------------------------------------------------------

ONE_VIDEO = (4, ("video", 3), 6)
INTERLEAVED = (3, ("video", 2), ("video", 3), 2, ("image", 1), 4, ("image", 1), ("video", 1), 5)


def case(name, layout=ONE_VIDEO, *, text_config=None, vision_config=None, **overrides):
    config = {"text_config": text_config, "vision_config": vision_config, **overrides}
    return pytest.param(config, layout, id=name)


GRID_27 = {"image_size": 55, "patch_size": 2, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
GRID_24 = {"image_size": 72, "patch_size": 3, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
NORM = {"visual_norm": "layernorm"}
NORM_AND_TIME = {"visual_norm": "layernorm", "visual_time": "sinusoidal"}

CASES = [
    case("s1", pooled_grid_size=1),
    case("s3"),
    case("s4", pooled_grid_size=4),
    case("average-s1", pooled_grid_size=1, pooling_mode="average"),
    case("average-s3", pooling_mode="average"),
    case("average-s4", pooled_grid_size=4, pooling_mode="average"),
    case("scope-frame", INTERLEAVED, text_config={"v2v_scope": "frame"}),
    case("scope-causal", INTERLEAVED, text_config={"v2v_scope": "causal"}),
    case("scope-video", INTERLEAVED, text_config={"v2v_scope": "video"}),
    case("norm", text_config=NORM),
    case("norm-and-time", INTERLEAVED, text_config=NORM_AND_TIME),
    case("norm-and-time-frame", text_config={**NORM_AND_TIME, "v2v_scope": "frame"}),
    case("norm-and-time-causal", text_config={**NORM_AND_TIME, "v2v_scope": "causal"}),
    case("tied", text_config={"tie_word_embeddings": True}),
    case("no-v2v", INTERLEAVED, text_config={"use_v2v": False}),
    case("no-t2v", INTERLEAVED, text_config={"use_t2v": False}),
    case("neither-branch", INTERLEAVED, text_config={"use_v2v": False, "use_t2v": False}),
    case("text-only", (11,)),
    case("video-first-and-last", (("video", 2), 3, ("video", 1))),
    case("one-image", (2, ("image", 1), 3)),
    case("chosen-layers", text_config={"cross_attention_interval": None, "cross_attention_layers": [1, 3]}),
    case("every-layer", text_config={"cross_attention_interval": 1}),
    case("last-vision-block", vision_feature_layer=-1),
    case("first-vision-block", vision_feature_layer=1),
    case("projector-width", projector_hidden_size=36),
    case("more-frames-than-a-chunk", (2, ("video", 9), 3), vision_chunk_size=4),
    case("grid-27-s3", vision_config=GRID_27),
    case(
        "grid-27-s4-average", (2, ("video", 2), 3), vision_config=GRID_27, pooled_grid_size=4, pooling_mode="average"
    ),
    case("grid-24-s4", vision_config=GRID_24, pooled_grid_size=4),
    case("grid-24-s3", (2, ("video", 2), 3), vision_config=GRID_24),
]
each_case = pytest.mark.parametrize(("overrides", "layout"), CASES)


@each_case
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_float32_logits_equal_the_reference(overrides, layout, attn_implementation):
    config = tiny_config(**overrides)
    model = random_model(config, attn_implementation=attn_implementation)
    sample = make_sample(config, *layout)

    with torch.no_grad():
        logits = model(**model_inputs(sample)).logits[0]
    exact = reference(model, sample).logits

    assert_close_to_scale(logits, exact, relative=FLOAT32)
    # 4 rather than 2: both are sums of the same few roundings in different orders, and the largest of them varies.
    assert_no_worse_than(logits, reference(model, sample, dtype=torch.float32).logits, exact, factor=4)


@each_case
def test_float64_logits_equal_the_reference(overrides, layout):
    config = tiny_config(**overrides)
    model = random_model(config, attn_implementation="sdpa").double()
    sample = make_sample(config, *layout)
    with torch.no_grad():
        logits = model(**in_dtype(model_inputs(sample), torch.float64)).logits[0]
    assert_close_to_scale(logits, reference(model, sample).logits, relative=FLOAT64)


@each_case
def test_every_layer_equals_the_reference(overrides, layout):
    config = tiny_config(**overrides)
    model = random_model(config).double()
    sample = make_sample(config, *layout)
    with torch.no_grad():
        outputs = model(**in_dtype(model_inputs(sample), torch.float64), output_hidden_states=True)
    expected = reference(model, sample).hidden_states
    assert len(outputs.hidden_states) == len(expected) == config.text_config.num_hidden_layers + 1
    # The last entry of Transformers' list has the final norm applied; logits cover it.
    for actual, exact in zip(outputs.hidden_states[:-1], expected, strict=False):
        assert_close_to_scale(actual[0], exact, relative=FLOAT64)


@torch.no_grad()
def test_small_original_tokens_are_normalised_as_in_the_reference():
    """At a variance near 1e-6 the epsilon of the norm decides as much as the variance does."""
    config = tiny_config(text_config=NORM)
    model = random_model(config).double()
    for name, parameter in model.model.vision_tower.named_parameters():
        if re.search(r"embeddings|out_proj|fc2", name):
            parameter.mul_(1e-3)
    sample = make_sample(config, *ONE_VIDEO)
    expected = reference(model, sample)
    assert 1e-7 < expected.original[0].var(dim=-1).mean() < 1e-5
    logits = model(**in_dtype(model_inputs(sample), torch.float64)).logits[0]
    assert_close_to_scale(logits, expected.logits, relative=FLOAT64)


@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_gradients_equal_the_reference(scope):
    config = tiny_config(text_config={**NORM_AND_TIME, "v2v_scope": scope})
    model = random_model(config).double()
    sample = make_sample(config, 3, ("video", 2), 2, ("image", 1), ("video", 3), 4)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    media = [(kind, frames.double()) for kind, frames in sample.media]

    exact = crosslmm(weights, config.to_dict(), sample.token_ids, media).logits
    direction = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (exact * direction).sum().backward()
    (model(**in_dtype(model_inputs(sample), torch.float64)).logits[0] * direction).sum().backward()

    # A gradient that is 0 in real arithmetic (SigLIP's key biases: softmax ignores a shift) has no scale of its own.
    noise = 1e-6 * max(weight.grad.abs().max().item() for weight in weights.values() if weight.grad is not None)
    for name, parameter in model.named_parameters():
        if name.startswith(CROSS_ATTENTION.format(4, "v2v.")):
            continue  # a test of its own
        scale = max(weights[name].grad.abs().max().item(), noise)
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=0, atol=10 * FLOAT64 * scale, msg=name)


def test_bfloat16_is_no_worse_than_the_formulas_in_bfloat16():
    config = tiny_config(text_config=NORM_AND_TIME)
    model = random_model(config).to(torch.bfloat16)
    sample = make_sample(config, *INTERLEAVED)
    with torch.no_grad():
        logits = model(**in_dtype(model_inputs(sample), torch.bfloat16)).logits[0]
    exact = reference(model, sample).logits
    assert_no_worse_than(logits, reference(model, sample, dtype=torch.bfloat16).logits, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_is_no_worse_than_the_formulas(dtype):
    config = tiny_config(text_config=NORM_AND_TIME)
    model = random_model(config).to(dtype)
    sample = make_sample(config, *INTERLEAVED)
    exact, baseline = reference(model, sample).logits, reference(model, sample, dtype=dtype).logits
    inputs = {name: value.cuda() for name, value in in_dtype(model_inputs(sample), dtype).items()}
    with torch.no_grad():
        logits = model.cuda()(**inputs).logits[0].cpu()
    assert_no_worse_than(logits, baseline, exact)


@pytest.mark.parametrize(
    "change",
    [
        {"pooling_mode": "average"},
        {"v2v_scope": "frame"},
        {"v2v_scope": "causal"},
        {"visual_norm": "layernorm"},
        {"visual_time": "sinusoidal"},
        {"use_v2v": False},
        {"use_t2v": False},
        {"cross_attention_interval": 4},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_each_choice_changes_the_reference_far_beyond_the_tolerance(change):
    """Otherwise the comparisons above would accept a package that ignores the choice."""
    config = tiny_config(text_config=NORM if "visual_time" in change else None)
    model = random_model(config)
    sample = make_sample(config, *INTERLEAVED)
    numbers = config.to_dict()
    weights = {name: value.double() for name, value in model.state_dict().items()}
    media = [(kind, frames.double()) for kind, frames in sample.media]
    before = crosslmm(weights, numbers, sample.token_ids, media).logits

    assert numbers.keys() >= change.keys()
    numbers.update(change)
    after = crosslmm(weights, numbers, sample.token_ids, media).logits
    assert relative_change(before, after) > 100 * FLOAT32


def test_features_equal_the_reference():
    config = tiny_config()
    model = random_model(config).double()
    sample = make_sample(config, *INTERLEAVED)
    inputs = in_dtype(model_inputs(sample), torch.float64)
    expected = reference(model, sample)
    with torch.no_grad():
        videos = model.get_video_features(inputs["pixel_values_videos"], inputs["video_num_frames"])
        images = model.get_image_features(inputs["pixel_values"])

    for kind, features in {"video": videos, "image": images}.items():
        of_kind = [index for index, (medium, _) in enumerate(sample.media) if medium == kind]
        original = torch.cat([expected.original[index] for index in of_kind])  # (frames of all media, N, D)
        assert_close_to_scale(features.last_hidden_state, original, relative=FLOAT64)
        assert isinstance(features.pooler_output, tuple)
        assert len(features.pooler_output) == len(of_kind)
        for actual, index in zip(features.pooler_output, of_kind, strict=True):
            assert_close_to_scale(actual, expected.pooled[index], relative=FLOAT64)


# -- the backbones are Transformers' ----------------------------------------------------------------------------------


def plain_qwen2(model: CrossLMMForConditionalGeneration) -> Qwen2ForCausalLM:
    """Transformers' Qwen2 with the language model's weights, and nothing else of ours."""
    fields = model.config.text_config.to_dict()
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**{name: fields[name] for name in Qwen2Config().to_dict() if name in fields}))
    prefix = "model.language_model."
    weights = {name.replace(prefix, "model."): value for name, value in model.state_dict().items()}
    missing, _ = qwen2.load_state_dict(weights, strict=False)
    assert not missing
    return qwen2.eval()


def spliced_embeddings(model: CrossLMMForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """(B, L, H): the token embeddings with the pooled tokens at the placeholders."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    if "pixel_values_videos" in inputs:
        features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_num_frames"])
        embeds[inputs["input_ids"] == model.config.video_token_id] = torch.cat(features.pooler_output)
    if "pixel_values" in inputs:
        features = model.get_image_features(inputs["pixel_values"])
        embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(features.pooler_output)
    return embeds


def set_gates(model: CrossLMMForConditionalGeneration, value: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("2v.gate.weight"):
                parameter.fill_(value)


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_zero_gates_leave_qwen2_bit_for_bit(padding_side):
    config = tiny_config()
    model = random_model(config)
    set_gates(model, 0.0)
    samples = make_sample(config, *INTERLEAVED), make_sample(config, 5, seed=1)
    inputs = model_inputs(*samples, padding_side=padding_side)
    embeds = spliced_embeddings(model, inputs)
    expected = plain_qwen2(model)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_a_new_model_is_its_language_model():
    """`gate_init` is 0 unless asked for otherwise."""
    config = tiny_config()
    model = CrossLMMForConditionalGeneration(config).eval()
    inputs = model_inputs(make_sample(config, *ONE_VIDEO))
    expected = plain_qwen2(model)(inputs_embeds=spliced_embeddings(model, inputs)).logits
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_text_only_is_qwen2_bit_for_bit(padding_side, attn_implementation):
    config = tiny_config()
    model = random_model(config, attn_implementation=attn_implementation)
    qwen2 = plain_qwen2(model)
    qwen2.set_attn_implementation(attn_implementation)
    inputs = model_inputs(make_sample(config, 7), make_sample(config, 12, seed=1), padding_side=padding_side)
    assert torch.equal(model(**inputs).logits, qwen2(**inputs).logits)


@torch.no_grad()
def test_a_text_sample_beside_a_video_is_qwen2_bit_for_bit():
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, *ONE_VIDEO), make_sample(config, 8, seed=1))
    expected = plain_qwen2(model)(
        inputs_embeds=spliced_embeddings(model, inputs), attention_mask=inputs["attention_mask"]
    ).logits
    assert torch.equal(model(**inputs).logits[1, :8], expected[1, :8])
    assert relative_change(model(**inputs).logits[0], expected[0]) > 0.1


@torch.no_grad()
def test_text_before_the_first_medium_is_qwen2_bit_for_bit():
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, 6, *INTERLEAVED))
    logits = model(**inputs).logits
    expected = plain_qwen2(model)(inputs_embeds=spliced_embeddings(model, inputs)).logits
    first = int((inputs["input_ids"][0] == config.video_token_id).nonzero()[0])
    assert first == 9
    assert torch.equal(logits[:, :first], expected[:, :first])
    assert relative_change(logits[:, first], expected[:, first]) > 0.01


@torch.no_grad()
@pytest.mark.parametrize(("layer", "blocks"), [(-2, 2), (1, 1), (3, 3)])
def test_original_tokens_are_hidden_states_of_the_whole_siglip(layer, blocks):
    """And what `vision_feature_layer` does not need, post-layernorm and head among it, is not built."""
    model = random_model(tiny_config(vision_feature_layer=layer))
    numbers = {**model.config.vision_config.to_dict(), "vision_use_head": True}
    whole = SiglipVisionModel(SiglipVisionConfig(**numbers)).eval()
    missing, unexpected = whole.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    unneeded = tuple(f"encoder.layers.{block}." for block in range(blocks, 3))
    assert not unexpected
    assert missing == [name for name in whole.state_dict() if name.startswith(("post_layernorm", "head", *unneeded))]

    frames = torch.randn(7, 3, 33, 33)  # chunks of 4 and 3
    original = model.get_video_features(frames).last_hidden_state
    assert original.shape == (7, 25, 20)
    assert_close_to_scale(original, whole(frames, output_hidden_states=True).hidden_states[layer], relative=1e-6)


# -- who sees what ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_the_order_of_patches_does_not_matter_to_cross_attention(scope):
    """Original tokens carry their place in themselves; keys have no position of their own. Pooling comes before."""
    config = tiny_config(text_config={**NORM_AND_TIME, "v2v_scope": scope})
    model = random_model(config).double()
    inputs = in_dtype(model_inputs(make_sample(config, *ONE_VIDEO)), torch.float64)
    features = model.get_video_features(inputs.pop("pixel_values_videos"), inputs["video_num_frames"])
    before = model(**inputs, mm_encoder_outputs={"video": features}).logits

    shuffled = torch.stack([frame[torch.randperm(25)] for frame in features.last_hidden_state])
    features.last_hidden_state = shuffled
    assert_close_to_scale(model(**inputs, mm_encoder_outputs={"video": features}).logits, before, relative=FLOAT64)
    features.last_hidden_state = shuffled.flip(-1)
    assert relative_change(before, model(**inputs, mm_encoder_outputs={"video": features}).logits) > 0.01


@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_each_sample_sees_only_its_own_media(padding_side, scope):
    config = tiny_config(text_config={"v2v_scope": scope})
    model = random_model(config)
    samples = [make_sample(config, *layout, seed=seed) for seed, layout in enumerate([ONE_VIDEO, INTERLEAVED, (9,)])]
    inputs = model_inputs(*samples, padding_side=padding_side)
    inputs["pixel_values_videos"].requires_grad_()
    inputs["pixel_values"].requires_grad_()
    logits = model(**inputs).logits

    own_frames = {0: slice(0, 3), 1: slice(3, 9), 2: slice(0, 0)}  # ONE_VIDEO has 3, INTERLEAVED 2 + 3 + 1
    for row, own in own_frames.items():
        real = inputs["attention_mask"][row].bool()
        videos, images = torch.autograd.grad(
            logits[row][real].sum(),
            [inputs["pixel_values_videos"], inputs["pixel_values"]],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        seen = videos.flatten(1).abs().amax(dim=1) > 0
        assert seen.nonzero().flatten().tolist() == list(range(9))[own]
        assert bool(images.any()) is (row == 1)


def test_text_does_not_see_a_medium_that_begins_after_it():
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, ("video", 2), 3, ("video", 1), 4))
    inputs["pixel_values_videos"].requires_grad_()
    logits = model(**inputs).logits[0]
    between, after = slice(18, 21), slice(30, 34)  # 2 frames of 9 tokens, 3 of text, 9, 4 of text
    for where, last_seen in ((between, False), (after, True)):
        (gradient,) = torch.autograd.grad(logits[where].sum(), inputs["pixel_values_videos"], retain_graph=True)
        assert gradient[:2].any()
        assert bool(gradient[2].any()) is last_seen


@pytest.mark.parametrize(("scope", "seen"), [("video", [0, 1, 2]), ("causal", [0, 1]), ("frame", [1])])
def test_a_pooled_token_sees_the_frames_of_its_scope(scope, seen):
    """Measured on the update of one block alone: X reaches it through K and V only."""
    config = tiny_config(
        text_config={"v2v_scope": scope, "cross_attention_interval": None, "cross_attention_layers": [0]}
    )
    model = random_model(config)
    inputs = model_inputs(make_sample(config, 2, ("video", 3), 2, ("video", 1)))
    with torch.no_grad():
        features = model.get_video_features(inputs.pop("pixel_values_videos"), inputs["video_num_frames"])
    original = features.last_hidden_state = features.last_hidden_state.detach().requires_grad_()
    hidden = model(**inputs, mm_encoder_outputs={"video": features}, output_hidden_states=True).hidden_states[1]
    second_frame = slice(2 + 9, 2 + 18)
    (gradient,) = torch.autograd.grad(hidden[0, second_frame].sum(), original)
    assert gradient.flatten(1).any(dim=1).nonzero().flatten().tolist() == seen


# -- batches, padding, kernels ----------------------------------------------------------------------------------------

BATCH = [ONE_VIDEO, INTERLEAVED, (9,), (("image", 1), 3)]


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_each_row_of_a_padded_batch_equals_the_reference(attn_implementation, scope, padding_side):
    """So a row equals the sample alone, and left padding equals right padding."""
    config = tiny_config(text_config={**NORM_AND_TIME, "v2v_scope": scope})
    model = random_model(config, attn_implementation=attn_implementation)
    samples = [make_sample(config, *layout, seed=seed) for seed, layout in enumerate(BATCH)]
    inputs = model_inputs(*samples, padding_side=padding_side)
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    for sample, row, mask in zip(samples, logits, inputs["attention_mask"], strict=True):
        assert_close_to_scale(row[mask.bool()], reference(model, sample).logits, relative=FLOAT32)


@torch.no_grad()
def test_rows_of_a_batch_equal_the_samples_alone():
    config = tiny_config()
    model = random_model(config)
    samples = [make_sample(config, *layout, seed=seed) for seed, layout in enumerate(BATCH)]
    for side in ("left", "right"):
        inputs = model_inputs(*samples, padding_side=side)
        logits = model(**inputs).logits
        for sample, row, mask in zip(samples, logits, inputs["attention_mask"], strict=True):
            assert_close_to_scale(row[mask.bool()], model(**model_inputs(sample)).logits[0], relative=1e-5)


KEPT = {
    "nothing": {"use_cache": False},
    "keys-and-values": {"cross_attention_cache": "kv"},
    "features": {"cross_attention_cache": "features"},
}


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("layout", [ONE_VIDEO, INTERLEAVED, (("image", 1), 1)], ids=["one", "interleaved", "folded"])
def test_what_generation_keeps_does_not_change_the_logits(layout, kept):
    """One text token behind an image is cheaper by folding W_k into the query than by projecting the patches."""
    config = tiny_config(text_config=NORM_AND_TIME)
    model = random_model(config).double()
    sample = make_sample(config, *layout)
    logits = model(**in_dtype(model_inputs(sample), torch.float64), **kept).logits[0]
    assert_close_to_scale(logits, reference(model, sample).logits, relative=FLOAT64)


@torch.no_grad()
@pytest.mark.parametrize("form", ["kv", "features"])
@pytest.mark.parametrize("layouts", [[INTERLEAVED], BATCH], ids=["one", "left-padded"])
def test_decoding_token_by_token_equals_the_reference(layouts, form):
    config = tiny_config(text_config=NORM_AND_TIME)
    model = random_model(config).double()
    samples = [make_sample(config, *layout, 4, seed=seed) for seed, layout in enumerate(layouts)]
    inputs = in_dtype(model_inputs(*samples, padding_side="left"), torch.float64)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    start = ids.shape[1] - 4
    prefill = model(
        input_ids=ids[:, :start], attention_mask=mask[:, :start], **inputs, use_cache=True, cross_attention_cache=form
    )
    steps = [prefill.logits]
    for end in range(start + 1, ids.shape[1] + 1):
        outputs = model(
            input_ids=ids[:, end - 1 : end],
            attention_mask=mask[:, :end],
            past_key_values=prefill.past_key_values,
            use_cache=True,
        )
        steps.append(outputs.logits)
    logits = torch.cat(steps, dim=1)
    for sample, row, real in zip(samples, logits, mask, strict=True):
        assert_close_to_scale(row[real.bool()], reference(model, sample).logits, relative=FLOAT64)


@torch.no_grad()
def test_kernels_agree():
    """Each model has a config of its own: building one writes the kernel's name into it."""
    samples = [make_sample(tiny_config(), *layout, seed=seed) for seed, layout in enumerate(BATCH)]
    inputs = model_inputs(*samples)
    models = {kernel: random_model(tiny_config(), attn_implementation=kernel) for kernel in ("eager", "sdpa")}
    for kernel, model in models.items():
        assert model.model.language_model.config._attn_implementation == kernel
    real = inputs["attention_mask"].bool()
    eager, sdpa = (model(**inputs).logits[real] for model in models.values())
    assert not torch.equal(eager, sdpa)
    assert_close_to_scale(eager, sdpa, relative=1e-5)


@torch.no_grad()
def test_padding_behind_a_video_looks_at_nothing():
    """Shown by the first layer alone: later ones see, through self-attention, what the others got."""
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, 40), make_sample(config, *ONE_VIDEO, seed=1))
    hidden = model(**inputs, output_hidden_states=True).hidden_states[1][1]
    plain = plain_qwen2(model)(
        inputs_embeds=spliced_embeddings(model, inputs),
        attention_mask=inputs["attention_mask"],
        output_hidden_states=True,
    ).hidden_states[1][1]
    assert torch.equal(hidden[37:], plain[37:])  # ONE_VIDEO is 37 tokens long, its last 6 text
    assert (hidden[31:37] != plain[31:37]).any(dim=-1).all()


def test_padding_gets_finite_gradients_in_every_kernel():
    for kernel in ("eager", "sdpa"):
        config = tiny_config()
        model = random_model(config, attn_implementation=kernel)
        samples = [make_sample(config, *layout, seed=seed) for seed, layout in enumerate(BATCH)]
        model(**model_inputs(*samples, padding_side="left")).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


# -- parameters -------------------------------------------------------------------------------------------------------


def test_a_fresh_gate_learns_first_and_opens_the_way():
    """At gate 0 the projections behind it get exactly no gradient: the update is multiplied by tanh(0)."""
    config = tiny_config()
    model = CrossLMMForConditionalGeneration(config)
    model(**model_inputs(make_sample(config, *ONE_VIDEO))).logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for layer in BLOCKS:
        for branch in ("v2v", "t2v"):
            if (layer, branch) == (4, "v2v"):
                continue
            assert gradients[CROSS_ATTENTION.format(layer, f"{branch}.gate.weight")].abs() > 0
            for projection in "qkvo":
                weight = gradients[CROSS_ATTENTION.format(layer, f"{branch}.{projection}_proj.weight")]
                assert weight is None or not weight.any()


def test_gate_init_sets_every_new_gate():
    model = CrossLMMForConditionalGeneration(tiny_config(text_config={"gate_init": 0.75}))
    gates = {name: value for name, value in model.named_parameters() if name.endswith("gate.weight")}
    assert len(gates) == 2 * len(BLOCKS)
    assert all(gate.shape == (1,) and gate.item() == 0.75 for gate in gates.values())


def test_every_parameter_learns_but_the_last_v2v():
    """Nothing reads visual rows after the last layer, so what its V2V adds to them changes no text logit."""
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, *INTERLEAVED))
    text = (inputs["input_ids"] != config.video_token_id) & (inputs["input_ids"] != config.image_token_id)
    model(**inputs).logits[text].square().sum().backward()
    idle = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    last = CROSS_ATTENTION.format(4, "v2v.")
    assert idle == {f"{last}{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate")}


def expected_names(config) -> set[str]:
    """The state-dict names that loaders and converters rely on, for three blocks and an untied head."""
    tower = "model.vision_tower."
    names = {
        f"{tower}embeddings.patch_embedding.weight",
        f"{tower}embeddings.patch_embedding.bias",
        f"{tower}embeddings.position_embedding.weight",
        *(f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
    }
    for layer in range(2):  # of three: `vision_feature_layer` is -2
        parts = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
        parts += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        names |= {f"{tower}encoder.layers.{layer}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    for layer in range(5):
        prefix = f"model.language_model.layers.{layer}."
        parts = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        parts += [f"self_attn.{name}_proj" for name in "qkvo"]
        names |= {f"{prefix}{part}.weight" for part in parts}
        names |= {f"{prefix}self_attn.{name}_proj.bias" for name in "qkv"}
    branches = [name for name in ("v2v", "t2v") if getattr(config, f"use_{name}")]
    for layer in BLOCKS if branches else ():
        names.add(CROSS_ATTENTION.format(layer, "input_layernorm.weight"))
        parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate"]
        names |= {CROSS_ATTENTION.format(layer, f"{branch}.{part}.weight") for branch in branches for part in parts}
    return names


@pytest.mark.parametrize("branches", [{}, {"use_v2v": False}, {"use_t2v": False}], ids=str)
def test_state_dict_names_are_the_contract(branches):
    config = tiny_config(text_config=branches)
    assert set(CrossLMMForConditionalGeneration(config).state_dict()) == expected_names(config)


def test_without_branches_there_is_no_cross_attention_weight_to_look_with():
    config = tiny_config(text_config={"use_v2v": False, "use_t2v": False})
    names = CrossLMMForConditionalGeneration(config).state_dict()
    assert not [name for name in names if re.search(r"v2v|t2v", name)]


def test_cross_attention_shapes_follow_both_widths():
    shapes = {name: tuple(value.shape) for name, value in random_model(tiny_config()).state_dict().items()}
    for branch in ("v2v", "t2v"):
        block = CROSS_ATTENTION.format(2, branch)
        assert shapes[f"{block}.q_proj.weight"] == (48, 48)  # 6 heads of 8
        assert shapes[f"{block}.k_proj.weight"] == shapes[f"{block}.v_proj.weight"] == (16, 20)  # 2 of 8, from D
        assert shapes[f"{block}.o_proj.weight"] == (48, 48)
        assert shapes[f"{block}.gate.weight"] == (1,)
    assert shapes["model.multi_modal_projector.linear_1.weight"] == (48, 20)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_comes_back_the_same(tmp_path, tied):
    config = tiny_config(text_config={"tie_word_embeddings": tied})
    model = random_model(config)
    model.save_pretrained(tmp_path)
    loaded = CrossLMMForConditionalGeneration.from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    inputs = model_inputs(make_sample(config, *INTERLEAVED))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_gates_stay_float32_when_a_model_is_loaded_in_bfloat16(tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path)
    loaded = CrossLMMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in loaded.named_parameters():
        wanted = torch.float32 if name.endswith("gate.weight") else torch.bfloat16
        assert value.dtype == wanted, name


# -- the border -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_labelled_next_tokens():
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, *ONE_VIDEO))
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    outputs = model(**inputs, labels=labels)
    log_probabilities = outputs.logits[0].log_softmax(dim=-1)
    of_next = [log_probabilities[-5 + step, labels[0, -4 + step]] for step in range(4)]
    torch.testing.assert_close(outputs.loss, -torch.stack(of_next).mean())
    in_steps_of_seven = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(in_steps_of_seven, -torch.stack(of_next).sum() / 7)


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones():
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, *ONE_VIDEO))
    whole = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])


@torch.no_grad()
def test_one_video_needs_no_frame_counts():
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, *ONE_VIDEO))
    expected = model(**inputs).logits
    del inputs["video_num_frames"]
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_adjacent_videos_are_told_apart_by_their_frame_counts():
    config = tiny_config()
    model = random_model(config)
    sample = make_sample(config, 2, ("video", 2), ("video", 2), 3)
    inputs = model_inputs(sample)
    two = model(**inputs).logits
    inputs["video_num_frames"] = torch.tensor([4])
    assert relative_change(two, model(**inputs).logits) > 0.01


def without_pixels(inputs):
    del inputs["pixel_values_videos"], inputs["video_num_frames"]


def one_frame_less(inputs):
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:-1]
    inputs["video_num_frames"] = inputs["video_num_frames"] - torch.tensor([1])


def counts_that_do_not_add_up(inputs):
    inputs["video_num_frames"] = torch.tensor([5])


def a_video_without_frames(inputs):
    inputs["video_num_frames"] = torch.tensor([3, 0])


def pixels_without_placeholders(inputs):
    inputs["input_ids"] = inputs["input_ids"].clamp(max=100)


def an_image_too_many(inputs):
    inputs["pixel_values"] = torch.zeros(1, 3, 33, 33)


@pytest.mark.parametrize(
    ("spoil", "counts"),
    [
        (without_pixels, r"\b27\b"),
        (one_frame_less, r"\b27\b.*\b18\b|\b18\b.*\b27\b|\b3\b.*\b2\b"),
        (counts_that_do_not_add_up, r"\b5\b.*\b3\b|\b3\b.*\b5\b"),
        (a_video_without_frames, r"\b0\b"),
        (pixels_without_placeholders, r"\b27\b.*\b0\b|\b0\b.*\b27\b"),
        (an_image_too_many, r"\b9\b.*\b0\b|\b0\b.*\b9\b"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_media_and_placeholders_that_do_not_match_are_refused_before_any_work(spoil, counts, monkeypatch):
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(make_sample(config, *ONE_VIDEO))
    spoil(inputs)

    def too_late(*args, **kwargs):
        raise AssertionError("the vision encoder ran before the inputs were checked")

    monkeypatch.setattr(model.model.vision_tower, "forward", too_late)
    with pytest.raises(ValueError, match=f"(?s){counts}"):
        model(**inputs)


def test_a_sequence_longer_than_the_context_is_refused_with_the_numbers():
    config = tiny_config(text_config={"max_position_embeddings": 32})
    model = random_model(config)
    with pytest.raises(ValueError, match=r"(?s)37.*32|32.*37"):
        model(**model_inputs(make_sample(config, *ONE_VIDEO)))
