"""Frames that show the same picture are encoded and kept once, and the answer is that of the full computation."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import StaticCache

from factories import random_model, tiny_config
from numerics import assert_close_to_scale
from test_modeling_crosslmm import FLOAT64, NORM_AND_TIME, Sample, in_dtype, make_sample, model_inputs, reference
from transformers_crosslmm import attention_crosslmm, cache_crosslmm, load_encoded_media, save_encoded_media
from transformers_crosslmm.cache_crosslmm import memory_in
from transformers_crosslmm.dialect_crosslmm import cache_of

OPTIONS = [
    pytest.param({"v2v_scope": scope, **options}, id=f"{scope}-{'recommended' if options else 'paper'}")
    for scope in ("video", "frame", "causal")
    for options in ({}, NORM_AND_TIME)
]
SHOWN = [0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3]
"""Twelve frames of two videos, seven and five, of which four are distinct: 0 0 0 0 1 1 2 | 3 3 3 3 3."""


def sample_and_reduced(config, *, with_image: bool = True) -> tuple[Sample, dict]:
    """A sample with every frame, and its inputs without the frames that repeat the one before."""
    image = (("image", 1), 2) if with_image else ()
    sample = make_sample(config, 3, ("video", 7), 2, *image, ("video", 5), 4)
    videos = [frames for kind, frames in sample.media if kind == "video"]
    distinct = torch.cat(videos)[:4]
    full = iter(distinct[SHOWN].split([7, 5]))
    media = [(kind, next(full) if kind == "video" else frames) for kind, frames in sample.media]
    sample = sample._replace(media=media)
    return sample, model_inputs(sample) | {"pixel_values_videos": distinct, "video_frame_index": torch.tensor(SHOWN)}


def both(config, *, with_image: bool = True) -> tuple[dict, dict]:
    """Inputs with every frame, and the same without the frames that repeat the one before."""
    sample, reduced = sample_and_reduced(config, with_image=with_image)
    return model_inputs(sample), reduced


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_logits_are_those_of_the_full_computation(options, use_cache):
    model = random_model(tiny_config(text_config=options)).double()
    sample, reduced = sample_and_reduced(model.config)
    expected, reduced = reference(model, sample).logits, in_dtype(reduced, torch.float64)
    assert_close_to_scale(model(**reduced, use_cache=use_cache).logits[0], expected, relative=FLOAT64)
    reduced["video_frame_index"] = reduced["video_frame_index"].flip(0)
    assert not torch.allclose(model(**reduced).logits[0], expected, atol=1e-2)  # the index matters


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "shown", [[0, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 3], [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]], ids=str
)
def test_a_run_may_be_any_length_come_back_and_go_on_in_the_next_video(options, shown, monkeypatch):
    monkeypatch.setattr(cache_crosslmm, "LEAST_RUN", 2)
    model = random_model(tiny_config(text_config=options))
    everything, reduced = both(model.config, with_image=False)
    reduced["video_frame_index"] = torch.tensor(shown)
    everything["pixel_values_videos"] = reduced["pixel_values_videos"][shown]
    assert_close_to_scale(model(**reduced).logits, model(**everything).logits, relative=1e-5)


@torch.no_grad()
def test_a_prefill_attends_to_a_run_of_frames_once(monkeypatch):
    """Besides, to one date for each of its frames."""
    model = random_model(tiny_config(text_config={"cross_attention_cache": "features", "use_t2v": False}))
    sample = make_sample(model.config, 3, ("video", 12), 4)
    frames = sample.media[0][1]
    inputs = model_inputs(sample) | {"pixel_values_videos": frames[:4], "video_frame_index": torch.tensor(SHOWN)}
    keys, attend = [], attention_crosslmm._attention_with_weight

    def counted(query, key, *others):
        keys.append(key.shape[0] * key.shape[2])
        return attend(query, key, *others)

    monkeypatch.setattr(attention_crosslmm, "_attention_with_weight", counted)
    model(**inputs)
    layers = len(model.config.cross_attention_layer_indices)
    assert sum(keys) == layers * (25 + 4 + 3 * 25 + 25 + 5)  # 0 0 0 0, then 1 1 2, then 3 3 3 3 3


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, NORM_AND_TIME], ids=["paper", "recommended"])
@pytest.mark.parametrize("frames_at_once", [1, 3, 100])
def test_a_step_from_features_reads_each_distinct_frame_once(options, frames_at_once, monkeypatch):
    model = random_model(tiny_config(text_config={"cross_attention_cache": "features", **options}))
    everything, reduced = both(model.config)
    steps, read, attend = [], [], attention_crosslmm._attention_over_tokens

    def counted(query, tokens, *others):
        read.append(len(tokens) // 25)
        return attend(query, tokens, *others)

    for inputs in (everything, reduced):
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(attention_crosslmm, "_attention_over_tokens", counted)
            patch.setattr(attention_crosslmm, "CHUNK_BYTES", frames_at_once * 4 * 4 * 25)
            steps.append(model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits)
    assert_close_to_scale(steps[1], steps[0], relative=1e-5)
    layers = len(model.config.cross_attention_layer_indices)
    assert sum(read) == layers * (12 + 1 + 4 + 1)  # all frames and the image, then the distinct ones


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["kv", "features"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_decoding_is_that_of_the_full_computation(options, form, static):
    model = random_model(tiny_config(text_config={**options, "cross_attention_cache": form})).double()
    sample, reduced = sample_and_reduced(model.config)
    more, text_config = torch.tensor([5, 9, 11]), model.config.text_config
    cache = StaticCache(text_config, max_cache_len=200) if static else DynamicCache(config=text_config)
    model(**in_dtype(reduced, torch.float64), past_key_values=cache)
    logits = torch.cat([model(input_ids=token.view(1, 1), past_key_values=cache).logits[0] for token in more])
    whole = sample._replace(token_ids=torch.cat([sample.token_ids, more]))
    assert_close_to_scale(logits, reference(model, whole).logits[-3:], relative=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("form", ["kv", "features"])
def test_generate_writes_the_same_and_does_not_keep_a_frame_twice(kwargs, form):
    model = random_model(tiny_config(text_config=NORM_AND_TIME))
    everything, reduced = both(model.config)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cross_attention_cache": form, **kwargs}
    output = model.generate(**reduced, **options, return_dict_in_generate=True)
    assert output.sequences.tolist() == model.generate(**everything, **options).tolist()
    if form == "features" and kwargs.get("use_cache", True):  # of two videos four frames, and an image
        assert memory_in(cache_of(output)).states.untyped_storage().nbytes() == (4 + 1) * 25 * 20 * 4


@torch.no_grad()
def test_each_distinct_frame_is_encoded_projected_and_kept_once():
    model = random_model(tiny_config(text_config={"cross_attention_cache": "features"}))
    _, reduced = both(model.config, with_image=False)
    encoded, projected = [], []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: projected.append(len(args[0])))
    cache = DynamicCache(config=model.config.text_config)
    model(**reduced, past_key_values=cache)
    assert (sum(encoded), sum(projected)) == (4, 4)
    memory = memory_in(cache)
    assert memory.states.untyped_storage().nbytes() == 4 * 25 * 20 * 4  # distinct frames x patches x width x float32
    assert memory.num_patches == 12 * 25


@torch.no_grad()
@pytest.mark.parametrize("form", ["kv", "features"])
def test_a_second_video_and_a_crop_keep_track_of_which_frames_are_shown(form):
    model = random_model(tiny_config(text_config={**NORM_AND_TIME, "cross_attention_cache": form}))
    first = make_sample(model.config, 2, ("video", 3), 3)
    second = make_sample(model.config, 2, ("video", 4), 3, seed=5)
    logits = []
    for index in (None, torch.tensor([0, 1, 1])):
        cache = DynamicCache(config=model.config.text_config)
        frames = first.media[0][1][[0, 1, 1]]
        inputs = model_inputs(first._replace(media=[("video", frames)]))
        if index is not None:
            inputs |= {"pixel_values_videos": frames[:2], "video_frame_index": index}
        model(**inputs, past_key_values=cache)
        turn = {name: value for name, value in model_inputs(second).items() if name != "attention_mask"}
        for _ in range(2):  # forgotten, and given again
            logits.append(model(**turn, past_key_values=cache).logits)
            cache.crop(-len(second.token_ids))
        logits.append(model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache).logits)
    for full, reduced in zip(logits[:3], logits[3:], strict=True):
        assert_close_to_scale(reduced, full, relative=1e-5)


@pytest.mark.parametrize("options", [{}, NORM_AND_TIME], ids=["paper", "recommended"])
def test_gradients_are_those_of_the_full_computation(options):
    gradients = []
    for which in (0, 1):
        model = random_model(tiny_config(text_config=options)).double()
        inputs = both(model.config)[which]
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        model(**inputs).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    largest = max(gradient.abs().max() for gradient in gradients[0])
    for full, reduced in zip(*gradients, strict=True):
        torch.testing.assert_close(reduced, full, rtol=1e-5, atol=1e-8 * largest.item())


@torch.no_grad()
def test_encoded_media_say_which_frames_they_show_and_are_kept_with_it(tmp_path):
    model = random_model(tiny_config())
    everything, reduced = both(model.config, with_image=False)
    pixels = {name: reduced[name] for name in ("pixel_values_videos", "video_num_frames", "video_frame_index")}
    encoded = model.get_video_features(**pixels)
    assert len(encoded.last_hidden_state) == 4
    assert [len(tokens) for tokens in encoded.pooler_output] == [7 * 9, 5 * 9]
    save_encoded_media({"video": encoded}, tmp_path / "media.safetensors")
    media = load_encoded_media(tmp_path / "media.safetensors")
    text = {name: everything[name] for name in ("input_ids", "attention_mask")}
    expected = model(**everything).logits
    for given in ({"video": encoded}, media):
        assert_close_to_scale(model(**text, mm_encoder_outputs=given).logits, expected, relative=1e-5)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (SHOWN[:-1], "add up to the 11 frames of `video_frame_index`"),
        ([*SHOWN[:-1], 4], "in the 4 frames .* use each of them"),
        ([*SHOWN[:-5], *[2] * 5], "use each of them"),
        ([-1, *SHOWN[1:]], "use each of them"),
        ([SHOWN], r"of shape \(1, 12\)"),
        ([0.0, *SHOWN[1:]], "torch.float32"),
    ],
    ids=["short", "beyond", "frame-unused", "negative", "rank", "float"],
)
def test_an_index_that_does_not_fit_is_refused_before_any_work(index, text):
    model = random_model(tiny_config())
    model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    _, reduced = both(model.config)
    with pytest.raises(ValueError, match=text):
        model(**reduced | {"video_frame_index": torch.tensor(index)})


@torch.no_grad()
def test_a_video_without_unchanged_frames_is_kept_as_any_other():
    model = random_model(tiny_config(text_config={"cross_attention_cache": "features"}))
    sample = make_sample(model.config, 3, ("video", 4), 4)
    cache = DynamicCache(config=model.config.text_config)
    model(**model_inputs(sample), video_frame_index=torch.arange(4), past_key_values=cache)
    assert memory_in(cache).frame_index is None
