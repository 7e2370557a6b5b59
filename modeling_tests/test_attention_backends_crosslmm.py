"""The attention implementations: the same numbers from each, chosen part by part, and never a dense mask.

The flash path runs without a GPU on a stand-in for the `flash_attn` packages (`flash_attn_stand_in.py`); tests marked
`gpu` run the real ones.
"""

import importlib.util
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.siglip.modeling_siglip import SiglipAttention

import flash_attn_stand_in
from factories import random_model, tiny_config
from numerics import assert_close_to_scale, assert_no_worse_than, distance
from test_modeling_crosslmm import (
    FLOAT32,
    INTERLEAVED,
    NORM_AND_TIME,
    in_dtype,
    make_sample,
    model_inputs,
    reference,
)
from transformers_crosslmm import CrossLMMForConditionalGeneration, attention_crosslmm, cross_attention_crosslmm
from transformers_crosslmm.attention_crosslmm import Folding
from transformers_crosslmm.cross_attention_crosslmm import CrossLMMCrossAttentionBranch
from transformers_crosslmm.vision_crosslmm import TokenNorm, frame_codes

MORE = (7, ("video", 4), 3)


def two_rows(config, *, padding_side: str = "left"):
    samples = [make_sample(config, *INTERLEAVED), make_sample(config, *MORE, seed=2)]
    return samples, model_inputs(*samples, padding_side=padding_side)


def rows_without_padding(logits, inputs):
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


# -- the same numbers -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
def test_every_implementation_equals_the_reference(attn_implementation, scope):
    model = random_model(tiny_config(text_config={"v2v_scope": scope}), attn_implementation=attn_implementation)
    samples, inputs = two_rows(model.config)
    # Flex attention's formulas as they are: compiling them for each shape takes minutes (test below, marked slow).
    with torch.compiler.set_stance("force_eager"):
        logits = model(**inputs).logits
    for sample, row in zip(samples, rows_without_padding(logits, inputs), strict=True):
        assert_close_to_scale(row, reference(model, sample).logits, relative=FLOAT32)


@torch.no_grad()
@pytest.mark.slow
def test_compiled_flex_attention_equals_the_reference():
    model = random_model(tiny_config(), attn_implementation="flex_attention")
    samples, inputs = two_rows(model.config)
    for sample, row in zip(samples, rows_without_padding(model(**inputs).logits, inputs), strict=True):
        assert_close_to_scale(row, reference(model, sample).logits, relative=FLOAT32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flash_attention_2"])
def test_half_precision_is_no_worse_than_the_formulas(attn_implementation, dtype, monkeypatch):
    if attn_implementation == "flash_attention_2":
        flash_attn_stand_in.install(monkeypatch, 2)
    model = random_model(tiny_config(), attn_implementation=attn_implementation).to(dtype)
    samples, inputs = two_rows(model.config)
    logits = model(**in_dtype(inputs, dtype)).logits
    for sample, row in zip(samples, rows_without_padding(logits, inputs), strict=True):
        rounded = type(sample)(sample.token_ids, [(kind, frames.to(dtype)) for kind, frames in sample.media])
        exact = reference(model, rounded).logits
        assert_no_worse_than(row, reference(model, rounded, dtype=dtype).logits, exact)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("attn_implementation", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_real_flash_attention_is_no_worse_than_the_formulas(attn_implementation):
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

    if not FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(attn_implementation[-1])]["general_availability_check"]():
        pytest.skip(f"{attn_implementation} is not installed")
    dtype = torch.bfloat16
    model = random_model(tiny_config(), attn_implementation=attn_implementation).to("cuda", dtype)
    samples, inputs = two_rows(model.config)
    inputs = {name: value.cuda() for name, value in in_dtype(inputs, dtype).items()}
    logits = model(**inputs).logits
    model, inputs = model.cpu(), {name: value.cpu() for name, value in inputs.items()}
    for sample, row in zip(samples, rows_without_padding(logits.cpu(), inputs), strict=True):
        rounded = type(sample)(sample.token_ids, [(kind, frames.to(dtype)) for kind, frames in sample.media])
        assert_no_worse_than(
            row, reference(model, rounded, dtype=dtype).logits, reference(model, rounded).logits, factor=3.0
        )


# -- the flash path, without a GPU ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_flash_attention_gets_packed_segments(scope, version, monkeypatch):
    """The stand-in checks each call; here: who calls with what."""
    calls = flash_attn_stand_in.install(monkeypatch, version)
    config = tiny_config(text_config={"v2v_scope": scope})
    model = random_model(config, attn_implementation=f"flash_attention_{version}").to(torch.bfloat16)
    sample = make_sample(model.config, 5, ("video", 3), 4, ("image", 1), 6)
    inputs = in_dtype(model_inputs(sample), torch.bfloat16)
    logits = model(**inputs, use_cache=False).logits

    text, pooled, patches = 6, 9, 25  # tokens of the text behind each, pooled tokens and patches of a frame
    by_frame = ([pooled] * 4, [patches] * 4)
    v2v = {
        "video": [([3 * pooled, pooled], [3 * patches, patches])],
        "frame": [by_frame],
        "causal": [([pooled], [count * patches]) for count in (1, 2)],
    }[scope]
    if scope == "causal":  # the third frame and the image stand side by side
        v2v += [([pooled] * 2, [3 * patches, patches])]
    t2v = [([4], [3 * patches]), ([text], [4 * patches])]
    crossing = [(c.query_lengths, c.key_lengths) for c in calls if c.heads != c.key_heads and not c.causal]
    assert sorted(crossing) == sorted((v2v + t2v) * 3)

    assert {(c.heads, c.key_heads) for c in calls} == {(2, 2), (6, 2)}  # the encoder's heads, the language model's
    assert [c.causal for c in calls if c.heads == 2] == [False] * 2 * 2  # two blocks, a call for images and videos
    assert sum(c.causal for c in calls) == config.text_config.num_hidden_layers
    assert {c.scale for c in calls if c.heads == 6} == {8**-0.5}

    eager = random_model(tiny_config(text_config={"v2v_scope": scope}), attn_implementation="eager")
    plain = eager.to(torch.bfloat16)(**inputs).logits
    assert_close_to_scale(logits, plain, relative=2.0**-5)  # three bits less than bfloat16 has


@torch.no_grad()
@pytest.mark.parametrize("form", ["kv", "features"])
def test_flash_decoding_continues_what_a_whole_forward_gives(form, monkeypatch):
    calls = flash_attn_stand_in.install(monkeypatch, 2)
    dtype = torch.bfloat16
    model = random_model(tiny_config(), attn_implementation="flash_attention_2").to(dtype)
    samples, inputs = two_rows(model.config)
    inputs = in_dtype(inputs, dtype)
    whole = model(**inputs).logits
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    past = model(
        input_ids=ids[:, :-2], attention_mask=mask[:, :-2], **inputs, use_cache=True, cross_attention_cache=form
    ).past_key_values
    calls.clear()
    steps = []
    for end in (-1, ids.shape[1]):
        token = ids[:, end - 1 : end] if end > 0 else ids[:, -2:-1]
        seen = mask if end > 0 else mask[:, :-1]
        steps.append(model(input_ids=token, attention_mask=seen, past_key_values=past, use_cache=True).logits)
    decoded = torch.cat(steps, dim=1)
    for row, (sample, ours) in enumerate(zip(samples, decoded, strict=True)):
        rounded = type(sample)(sample.token_ids, [(kind, frames.to(dtype)) for kind, frames in sample.media])
        exact = reference(model, rounded).logits[-2:]
        error = distance(ours, exact)
        assert error <= 2 * distance(whole[row, -2:], exact) + 2.0**-7 * exact.abs().max().item()
    crossing = [c for c in calls if c.heads != c.key_heads and len(c.query_lengths) == 2 and c.key_lengths[0] > 100]
    if form == "kv":  # 3 blocks x 2 steps, both rows in one call
        assert [(c.query_lengths, c.key_lengths) for c in crossing] == [([1, 1], [8 * 25, 4 * 25])] * 6
    else:  # folded scores run over the features, without keys
        assert not crossing


def test_flash_attention_trains(monkeypatch):
    flash_attn_stand_in.install(monkeypatch, 2)
    gradients = {}
    for name in ("eager", "flash_attention_2"):
        model = random_model(tiny_config(), attn_implementation=name).to(torch.bfloat16).train()
        sample = make_sample(model.config, *MORE)
        inputs = in_dtype(model_inputs(sample), torch.bfloat16)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients[name] = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    largest = max(eager.norm() for eager in gradients["eager"].values())
    for name, eager in gradients["eager"].items():
        # What is exactly 0 in theory (the bias of the encoder's keys) is rounding, of the size of other gradients.
        change = gradients["flash_attention_2"][name] - eager
        assert change.norm() <= 0.05 * eager.norm() + 1e-4 * largest, name


# -- chosen part by part ----------------------------------------------------------------------------------------------


@pytest.fixture
def spies():
    """Two implementations that compute as sdpa does and count which modules call them."""
    counts = {"spy_vision": Counter(), "spy_text": Counter()}

    def register(name):
        def attention(module, *args, **kwargs):
            counts[name][type(module)] += 1
            return sdpa_attention_forward(module, *args, **kwargs)

        AttentionInterface.register(name, attention)

    for name in counts:
        register(name)
    yield counts
    for name in counts:
        del AttentionInterface._global_mapping[name]


@torch.no_grad()
@pytest.mark.parametrize("when", ["from_pretrained", "set_attn_implementation", "_from_config"])
def test_each_part_runs_the_implementation_asked_for(when, spies, tmp_path):
    choice = {"vision_config": "spy_vision", "text_config": "spy_text"}
    if when == "_from_config":
        model = CrossLMMForConditionalGeneration._from_config(tiny_config(), attn_implementation=choice)
    else:
        model = random_model(tiny_config())
        if when == "from_pretrained":
            model.save_pretrained(tmp_path)
            model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=choice)
        else:
            model.set_attn_implementation(choice)
    model(**model_inputs(make_sample(model.config, *MORE)))
    blocks, layers = 2, 5
    assert spies["spy_vision"] == {SiglipAttention: blocks}
    assert spies["spy_text"] == {Qwen2Attention: layers, CrossLMMCrossAttentionBranch: 2 * 3}
    assert model.model.vision_tower.config is model.config.vision_config
    assert model.model.language_model.config is model.config.text_config


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_flash_attention_that_is_not_installed_is_refused_by_name(part, version, tmp_path):
    name = f"flash_attention_{version}"
    if importlib.util.find_spec("flash_attn_interface" if version == 3 else "flash_attn") is not None:
        pytest.skip(f"{name} may be installed")
    random_model(tiny_config()).save_pretrained(tmp_path)
    choice = name if part is None else {part: name}
    with pytest.raises(ImportError, match=rf"FlashAttention{version} doesn't seem to be installed"):
        CrossLMMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=choice)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="flesh_attention"):
        CrossLMMForConditionalGeneration._from_config(tiny_config(), attn_implementation="flesh_attention")


# -- never dense ------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Watches every result of every operation for the largest number of elements, and who made it."""

    def __init__(self):
        super().__init__()
        self.numel, self.shape, self.made_by = 0, None, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.numel:
                self.numel, self.shape, self.made_by = tensor.numel(), tuple(tensor.shape), func
        return result


FRAMES, TEXT = 64, 40


@torch.no_grad()
@pytest.mark.parametrize("form", ["kv", "features"])
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_no_tensor_is_as_large_as_a_mask_of_tokens_by_patches(scope, form):
    config = tiny_config(text_config={"v2v_scope": scope, "max_position_embeddings": 1024})
    model = random_model(config, attn_implementation="sdpa")
    inputs = model_inputs(make_sample(config, 3, ("video", FRAMES), TEXT))
    features = {"video": model.get_video_features(inputs.pop("pixel_values_videos"))}
    del inputs["video_num_frames"]
    tokens, patches = FRAMES * 9 + TEXT + 3, FRAMES * 25
    with LargestTensor() as largest:
        outputs = model(**inputs, mm_encoder_outputs=features, cross_attention_cache=form, use_cache=True)
        model(input_ids=torch.tensor([[5]]), past_key_values=outputs.past_key_values, use_cache=True)
    dense = tokens * patches
    assert largest.numel < dense / 3, f"{largest.made_by} made {largest.shape}"
    assert largest.numel <= max(tokens * tokens, 2 * patches * 48), f"{largest.made_by} made {largest.shape}"


@torch.no_grad()
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_flash_keys_are_used_in_place(scope, monkeypatch):
    """A causal scope over 64 frames, gathered, would hold each key up to 64 times."""
    flash_attn_stand_in.install(monkeypatch, 2)
    monkeypatch.setattr(flash_attn_stand_in, "attend", lambda q, *_: q.clone())
    text = {"v2v_scope": scope, "max_position_embeddings": 1024}
    model = random_model(tiny_config(text_config=text), attn_implementation="flash_attention_2").to(torch.bfloat16)
    inputs = in_dtype(model_inputs(make_sample(model.config, 3, ("video", FRAMES), TEXT)), torch.bfloat16)
    features = {"video": model.get_video_features(inputs.pop("pixel_values_videos"))}
    del inputs["video_num_frames"]
    tokens, patches = FRAMES * 9 + TEXT + 3, FRAMES * 25
    with LargestTensor() as largest:
        model(**inputs, mm_encoder_outputs=features, use_cache=False)
    assert largest.numel <= max(tokens * 131, patches * 20), f"{largest.made_by} made {largest.shape}"


# -- piece by piece ---------------------------------------------------------------------------------------------------

SMALL = 2 * 25 * 16 * 8 * 2 + 1  # bytes: two frames' keys and values in float64, and a bit


@torch.no_grad()
@pytest.mark.parametrize("form", ["kv", "features"])
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
@pytest.mark.parametrize("text", [{}, NORM_AND_TIME], ids=["paper", "recommended"])
def test_keys_made_piece_by_piece_give_the_same_answer(text, scope, form, monkeypatch):
    """Two frames at a time, over rows with several media, in float64: equal to rounding, prefill and decoding."""
    model = random_model(tiny_config(text_config={"v2v_scope": scope, **text})).double()
    samples, inputs = two_rows(model.config)
    inputs = in_dtype(inputs, torch.float64)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)

    def prefilled_and_decoded():
        outputs = model(**inputs, use_cache=True, cross_attention_cache=form)
        past = outputs.past_key_values
        step = model(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=past, use_cache=True)
        return outputs.logits, step.logits

    expected = prefilled_and_decoded()
    pieces = []
    kernel = attention_crosslmm._attention_with_weight
    monkeypatch.setattr(
        attention_crosslmm,
        "_attention_with_weight",
        lambda q, k, v, scaling: pieces.append(k.shape) or kernel(q, k, v, scaling),
    )
    for module in (attention_crosslmm, cross_attention_crosslmm):
        monkeypatch.setattr(module, "CHUNK_BYTES", SMALL)
    actual = prefilled_and_decoded()
    assert pieces
    assert {shape[0] * shape[2] for shape in pieces} <= {25, 50}
    for ours, whole in zip(actual, expected, strict=True):
        assert_close_to_scale(ours, whole, relative=1e-13)
    for sample, logits in zip(samples, rows_without_padding(actual[0], inputs), strict=True):
        assert_close_to_scale(logits, reference(model, sample).logits, relative=FLOAT32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_kernel_with_its_weight_equals_the_fast_one(dtype, monkeypatch):
    """What other devices run; rows of queries split so that their scores stay within the limit."""
    query, key, value = (torch.randn(3, 2, rows, 8, dtype=dtype) for rows in (14, 11, 11))
    fast = attention_crosslmm._attention_with_weight(query, key, value, 0.3)
    monkeypatch.setattr(attention_crosslmm, "CHUNK_BYTES", 4 * 3 * 2 * 11 * 4)
    plain = attention_crosslmm._attention_with_weight(*(t.to("meta") for t in (query, key, value)), 0.3)
    assert [t.shape for t in plain] == [t.shape for t in fast]
    plain = attention_crosslmm._plain_attention(query, key, value, 0.3)
    exact = torch.softmax(query.double() @ key.double().mT * 0.3, dim=-1) @ value.double()
    for output, weight in (fast, plain):
        assert_close_to_scale(output, exact, relative=torch.finfo(dtype).eps * 4)
        assert_close_to_scale(
            weight[..., 0], (query.double() @ key.double().mT * 0.3).logsumexp(-1), relative=torch.finfo(dtype).eps * 4
        )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at_once", [1, 3, 50], ids=lambda frames: f"{frames}-frames-at-once")
def test_folding_a_norm_into_queries_and_scores_is_no_worse_than_normalising(at_once, dtype, monkeypatch):
    """Tokens as encoders make them: a mean that is not zero, a few channels far larger than the rest, frames of very
    different scale. The baseline normalises first, in plain formulas of the dtype under test."""
    width, heads, groups, head_dim, frames, patches, rows = 40, 6, 2, 8, 7, 25, 3
    spread = torch.ones(width).index_fill(0, torch.tensor([4, 17]), 40.0)
    scales = torch.logspace(-1, 1, frames)[:, None, None]
    tokens = ((torch.randn(frames, patches, width) * spread + 0.7) * scales).to(dtype)
    query = torch.randn(rows, heads, head_dim, dtype=dtype)
    key_weight, value_weight = ((torch.randn(width, groups, head_dim) / width**0.5).to(dtype) for _ in range(2))
    dates = frame_codes(torch.arange(frames), width, visual_time="sinusoidal")
    spans = (((0, 4 * patches),), ((0, 2 * patches), (5 * patches, frames * patches)))
    segments = attention_crosslmm.Segments(torch.arange(rows), (2, 1), spans)
    scaling = head_dim**-0.5

    def formulas(precision):
        x = torch.nn.functional.layer_norm(tokens.double(), (width,), eps=1e-6) + dates[:, None]
        x = x.to(precision).flatten(0, 1)
        repeats = heads // groups
        key, value = (
            torch.einsum("pd,dge->gpe", x, w.to(precision)).repeat_interleave(repeats, 0)
            for w in (key_weight, value_weight)
        )
        outputs = []
        for row, span in zip(range(rows), (spans[0], spans[0], spans[1]), strict=True):
            seen = torch.cat([torch.arange(start, end) for start, end in span])
            scores = torch.einsum("he,hpe->hp", query[row].to(precision), key[:, seen]) * scaling
            outputs.append(torch.einsum("hp,hpe->he", scores.softmax(-1), value[:, seen]))
        return torch.stack(outputs)

    monkeypatch.setattr(attention_crosslmm, "CHUNK_BYTES", 4 * 2 * heads * patches * at_once)
    norm = TokenNorm.of(tokens, dates.float())
    folded = attention_crosslmm.folded_attention(
        query,
        lambda span, at_once: (
            (tokens.flatten(0, 1)[start:end], norm.clip_to_tokens(start, end), None)
            for start, end in attention_crosslmm.cut_span(span, at_once)
        ),
        Folding(key_weight.permute(1, 2, 0), value_weight.permute(1, 0, 2), value_weight.new_zeros(groups, head_dim)),
        scaling,
        segments,
        patches_per_frame=tokens.shape[1],
    )
    assert_no_worse_than(folded, formulas(dtype), formulas(torch.float64))


def test_training_makes_all_keys_at_once_and_its_gradients_do_not_change(monkeypatch):
    gradients = []
    for limit in (2**26, SMALL):
        for module in (attention_crosslmm, cross_attention_crosslmm):
            monkeypatch.setattr(module, "CHUNK_BYTES", limit)
        model = random_model(tiny_config()).train()
        inputs = model_inputs(make_sample(model.config, *MORE))
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@torch.no_grad()
def test_the_encoder_keeps_patch_behind_patch():
    """A norm over channels that lie apart copies its input, in every block; a copy of X per decode step is worse."""
    model = random_model(tiny_config())
    frames = torch.randn(3, 3, 33, 33)
    assert model.model.vision_tower.embeddings(frames).is_contiguous()
    assert model.get_video_features(frames).last_hidden_state.is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_no_key_is_repeated_for_the_heads_that_share_it(attn_implementation):
    """Three query heads share a key head here; decoding over 64 frames must not hold keys three times."""
    config = tiny_config(pooled_grid_size=1)
    model = random_model(config, attn_implementation=attn_implementation)
    inputs = model_inputs(make_sample(config, 3, ("video", FRAMES), 4))
    cache = model(**inputs, use_cache=True).past_key_values
    with LargestTensor() as largest:
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    keys = FRAMES * 25 * 2 * 8
    assert largest.numel <= keys, f"{largest.made_by} made {largest.shape}"


# -- kernels of a GPU -------------------------------------------------------------------------------------------------

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@torch.no_grad()
@each_device
@pytest.mark.parametrize("width", [8, 64, 128, 256, 12, 264])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_attention_with_its_weight_is_no_worse_than_the_formulas(dtype, width, device):
    """On a GPU the flash kernel for halves of a width that it takes, and plain operations for the rest."""
    query, key, value = (torch.randn(2, 3, rows, width, dtype=dtype) for rows in (77, 131, 131))  # they fill no tile
    scaling = width**-0.5
    output, weight = (
        t.cpu()
        for t in attention_crosslmm._attention_with_weight(*(t.to(device) for t in (query, key, value)), scaling)
    )
    scores = query.double() @ key.double().mT * scaling
    exact = torch.softmax(scores, dim=-1) @ value.double()
    shares = torch.softmax((query @ key.mT).float() * scaling, dim=-1)
    assert_no_worse_than(output.to(dtype), (shares.to(dtype) @ value), exact)
    assert weight.shape == (2, 3, 77, 1)
    # Scores in float32 from halves: the error of a sum of `width` products, and of an exponential.
    assert_close_to_scale(weight[..., 0], scores.logsumexp(-1), relative=4 * torch.finfo(dtype).eps)


@torch.no_grad()
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["kv", "features"])
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_prefill_in_pieces_and_decoding_are_no_worse_than_the_formulas(scope, form, dtype, device, monkeypatch):
    """Keys of two frames at a time, merged; then a step over the whole cache."""
    for module in (attention_crosslmm, cross_attention_crosslmm):
        monkeypatch.setattr(module, "CHUNK_BYTES", SMALL * dtype.itemsize // 8)
    model = random_model(tiny_config(text_config={"v2v_scope": scope})).to(device, dtype)
    sample = make_sample(model.config, *INTERLEAVED)
    inputs = {name: value.to(device) for name, value in in_dtype(model_inputs(sample), dtype).items()}
    ids = inputs.pop("input_ids")
    mask = inputs.pop("attention_mask")
    outputs = model(
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], **inputs, use_cache=True, cross_attention_cache=form
    )
    step = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=outputs.past_key_values, use_cache=True)
    logits = torch.cat([outputs.logits, step.logits], dim=1)[0].cpu()
    model = model.cpu()
    rounded = type(sample)(sample.token_ids, [(kind, frames.to(dtype)) for kind, frames in sample.media])
    exact, baseline = reference(model, rounded).logits, reference(model, rounded, dtype=dtype).logits
    assert_no_worse_than(logits, baseline, exact, factor=3.0)


@pytest.mark.gpu
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_gradients_on_cuda_are_those_on_the_cpu(attn_implementation):
    gradients = {}
    for device in ("cpu", "cuda"):
        model = random_model(tiny_config(), attn_implementation=attn_implementation).double().to(device).train()
        inputs = in_dtype(model_inputs(make_sample(model.config, *MORE)), torch.float64)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients[device] = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients["cpu"].values())
    for name, expected in gradients["cpu"].items():
        torch.testing.assert_close(gradients["cuda"][name], expected, rtol=1e-9, atol=1e-12 * largest, msg=name)
