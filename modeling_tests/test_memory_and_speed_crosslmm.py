"""What a step reads and what stays in memory, counted: bytes that operations read, tensors that autograd saves."""

import functools
import math
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from factories import random_model, tiny_config
from test_modeling_crosslmm import gradients, labelled, make_sample, model_inputs
from transformers_crosslmm import attention_crosslmm, cross_attention_crosslmm, vision_crosslmm
from transformers_crosslmm.cache_crosslmm import memory_in

BLOCKS = (0, 2, 4)  # layers that look back
WIDTH, PATCHES = 20, 25
NORMALISED = {"visual_norm": "layernorm", "visual_time": "sinusoidal"}

# -- a decode step ----------------------------------------------------------------------------------------------------


class BytesRead(TorchDispatchMode):
    """Bytes that operations read of some tensors, whole or in part; views read nothing. Also the largest result, and
    the shapes of all."""

    def __init__(self, *watched):
        super().__init__()
        self.read = {tensor.untyped_storage()._cdata: 0 for tensor in watched}
        self.largest = 0
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self.read:
                    self.read[tensor.untyped_storage()._cdata] += tensor.nbytes
            made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.largest = max([self.largest, *(tensor.nbytes for tensor in made)])
            self.shapes |= {tensor.shape for tensor in made}
        return result


def decoding(form, dtype, *layouts, **text):
    """A model that has seen these rows, and its cache."""
    model = random_model(tiny_config(text_config=text or None), attn_implementation="sdpa").to(dtype)
    inputs = model_inputs(*(make_sample(model.config, *layout, seed=seed) for seed, layout in enumerate(layouts)))
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return model, model(**inputs, use_cache=True, cross_attention_cache=form).past_key_values


LAYOUTS = {
    "one-row": [(3, ("video", 40), 4)],
    "two-videos": [(3, ("video", 30), 2, ("video", 11), 4)],
    "two-rows": [(3, ("video", 30), 4), (4, ("video", 21), 5)],
}


@torch.no_grad()
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_reads_keys_and_values_once(dtype, layouts):
    model, cache = decoding("kv", dtype, *layouts)
    kept = [getattr(cache.layers[index], name) for index in BLOCKS for name in ("cross_keys", "cross_values")]
    with BytesRead(*kept) as bytes_read:
        model(input_ids=torch.full((len(layouts), 1), 5), past_key_values=cache, use_cache=True)
    assert list(bytes_read.read.values()) == [tensor.nbytes for tensor in kept]
    assert bytes_read.largest < kept[0].nbytes / 2


@torch.no_grad()
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", [{}, NORMALISED], ids=["paper", "recommended"])
def test_a_step_reads_features_twice_per_layer(text, dtype, layouts):
    model, cache = decoding("features", dtype, *layouts, **text)
    memory = memory_in(cache)
    states = memory.states
    # Kernels for bfloat16 copy what lies otherwise, layer by layer and step by step.
    assert all(tensor.is_contiguous() for folding in memory.folding.values() for tensor in folding.tensors())
    with BytesRead(states) as bytes_read:
        model(input_ids=torch.full((len(layouts), 1), 5), past_key_values=cache, use_cache=True)
    assert list(bytes_read.read.values()) == [2 * len(BLOCKS) * states.nbytes]
    # Scores, of six heads in float32, or what self-attention has cached are largest; a copy of the features is larger.
    # On a CPU, a product of halves that is summed in float32 copies the tokens of one piece.
    longest = max(sum(part[1] for part in layout if isinstance(part, tuple)) for layout in layouts) * PATCHES
    largest = max(longest * 6 * 4, cache.layers[0].keys.nbytes)
    if dtype == torch.float32:
        assert bytes_read.largest <= largest < states.nbytes
    else:
        assert bytes_read.largest <= max(largest, longest * WIDTH * 4)


@torch.no_grad()
def test_neither_prefill_nor_decoding_asks_every_module_whether_it_is_sharded(monkeypatch):
    model = random_model(tiny_config())
    walks = []
    walk = nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: walks.append(self) or walk(self))
    inputs = model_inputs(make_sample(model.config, 3, ("video", 2), 4))
    cache = model(**inputs, use_cache=True).past_key_values
    model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert model.model not in walks


@torch.no_grad()
def test_the_check_of_pixels_makes_nothing_of_their_size():
    model = random_model(tiny_config())
    inputs = model_inputs(make_sample(model.config, 3, ("video", 40), 4))
    with BytesRead(inputs["pixel_values_videos"]) as bytes_read:
        model.get_video_features(inputs["pixel_values_videos"])
    assert bytes_read.largest < inputs["pixel_values_videos"].nbytes / 2


# -- what generation holds --------------------------------------------------------------------------------------------


class Probe:
    """A streamer that notes, token by token, whether something still exists."""

    def __init__(self):
        self.reference, self.alive = lambda: None, []

    def put(self, _):
        self.alive.append(self.reference() is not None)

    def end(self):
        pass


@pytest.mark.parametrize("prefill_chunk_size", [None, 8], ids=["whole", "chunks"])
def test_original_tokens_that_decoding_does_not_read_are_gone_after_prefill(prefill_chunk_size, monkeypatch):
    model = random_model(tiny_config())
    remember, probe = model.model.remember, Probe()

    @functools.wraps(remember)
    def watched(*args, **kwargs):
        memory = remember(*args, **kwargs)
        probe.reference = weakref.ref(memory.states)
        return memory

    monkeypatch.setattr(model.model, "remember", watched)
    inputs = model_inputs(make_sample(model.config, 3, ("video", 3), 4))
    model.generate(
        **inputs,
        cross_attention_cache="kv",
        prefill_chunk_size=prefill_chunk_size,
        min_new_tokens=3,
        max_new_tokens=3,
        streamer=probe,
        pad_token_id=0,
    )
    assert probe.alive == [True, False, False, False]  # the prompt comes first, before the prefill


@torch.no_grad()
@pytest.mark.parametrize("layout", [(3, ("video", 21), 4), (3, ("video", 19), 1, ("image", 1), 4)], ids=str)
def test_no_normalised_copy_of_the_original_tokens_is_made(layout, monkeypatch):
    """With room for the keys of two frames, neither prefill nor a step makes anything of the size of all patches."""
    for module in (attention_crosslmm, cross_attention_crosslmm):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 25 * (2 * 16 + WIDTH) * 4)
    monkeypatch.setattr(vision_crosslmm, "FRAMES_AT_ONCE", 2)
    model = random_model(tiny_config(text_config=NORMALISED, vision_chunk_size=2), attn_implementation="sdpa")
    inputs = model_inputs(make_sample(model.config, *layout))
    media = {"video": model.get_video_features(inputs.pop("pixel_values_videos"), inputs.pop("video_num_frames"))}
    if "pixel_values" in inputs:
        media["image"] = model.get_image_features(inputs.pop("pixel_values"))
    with BytesRead() as made:
        cache = model(**inputs, mm_encoder_outputs=media, cross_attention_cache="features", use_cache=True)
        cache = cache.past_key_values
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    patches = sum(len(output.last_hidden_state) for output in media.values()) * PATCHES
    whole = {shape for shape in made.shapes if shape[-1:] == (WIDTH,) and shape.numel() >= patches * WIDTH}
    joined = {torch.Size([patches // PATCHES, PATCHES, WIDTH])} if len(media) > 1 else set()
    assert whole == joined  # media of two kinds are laid one after the other, once
    memory = memory_in(cache)
    assert torch.equal(memory.states, torch.cat([media[name].last_hidden_state for name in media]).flatten(0, 1))


def test_a_prefill_in_chunks_makes_no_copy_of_all_pooled_tokens():
    model = random_model(tiny_config())
    inputs = model_inputs(make_sample(model.config, 3, ("video", 9), 4))
    encoded = model.get_video_features(inputs.pop("pixel_values_videos"), inputs.pop("video_num_frames"))
    (pooled,) = encoded.pooler_output
    with BytesRead() as made:
        options = {"prefill_chunk_size": 5, "max_new_tokens": 2, "pad_token_id": 0}
        model.generate(**inputs, mm_encoder_outputs={"video": encoded}, **options)
    assert (5, pooled.shape[1]) in made.shapes
    assert pooled.shape not in made.shapes


# -- what training keeps ----------------------------------------------------------------------------------------------


class SavedBytes(saved_tensors_hooks):
    """Bytes of the storages that autograd saves; each once, those of `known` tensors not at all."""

    def __init__(self, known):
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def total(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def saved_per_frame(checkpointing, text):
    """Bfloat16 numbers that one more frame keeps for the backward pass; the head's and the loss's are not counted."""
    totals = []
    for frames in (8, 24):
        model = random_model(tiny_config(text_config=text, vision_config={"num_hidden_layers": 7}))
        model = model.to(torch.bfloat16).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = model_inputs(make_sample(model.config, 3, ("video", frames), 4))
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
        saved = SavedBytes(model.parameters())
        with saved:
            model.model(**inputs)
        totals.append(saved.total)
    return (totals[1] - totals[0]) / 16 / 2


@pytest.mark.parametrize("text", [{}, NORMALISED], ids=["paper", "recommended"])
def test_checkpointed_training_keeps_pixels_patches_and_one_state_per_layer(text):
    """Keys, values and activations of the encoder are made again. Of a frame stay its pixels, its patches (again if
    normalised), and its pooled tokens as inputs of each layer and around projector and last norm."""
    pixels, patches, layers = 3 * 33 * 33, PATCHES * WIDTH, 9 * 5 * 48
    dates = 2 * WIDTH if text else 0  # of each frame, in float32
    must = pixels + patches * (2 if text else 1) + layers + dates
    # The projector's three inputs; the last norm's input in float32 and its output; a few numbers per token.
    around = 9 * (WIDTH + 2 * 48) + 9 * (2 * 48 + 48 + 8)
    kept = saved_per_frame(True, text)
    assert must <= kept <= must + around
    assert kept < saved_per_frame(False, text) / 10


def test_mixed_precision_keeps_one_copy_of_the_original_tokens():
    """Not one for each of the twelve projections to keys and values, in addition to that in float32."""
    model = random_model(tiny_config()).train()
    model.model.vision_tower.requires_grad_(False)
    inputs = model_inputs(make_sample(model.config, 3, ("video", 9), 4))
    saved = {}

    def note(tensor):
        if tensor.shape == (9 * PATCHES, WIDTH):
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(note, lambda tensor: tensor):
        model(**inputs)
    assert [tensor.dtype for tensor in saved.values()] == [torch.bfloat16]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("text", [{}, NORMALISED], ids=["paper", "recommended"])
def test_checkpointed_gradients_over_several_chunks_are_the_plain_ones(text, use_reentrant):
    model = random_model(tiny_config(text_config=text)).double().train()
    inputs = labelled(model.config, (6, ("video", 9), 5), (4, ("image", 1), 3))
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(model, inputs)
    largest = max(gradient.abs().max() for gradient in plain.values())
    assert checkpointed.keys() == plain.keys()
    assert math.isfinite(largest)
    for name, expected in plain.items():
        torch.testing.assert_close(checkpointed[name], expected, rtol=1e-10, atol=1e-13 * largest, msg=name)
