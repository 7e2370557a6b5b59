"""Text between the frames of a medium, as timestamps are: with scope "causal" it sees the frames before it, otherwise
the whole medium. Measured against the formulas."""

import pytest
import torch

from factories import random_model, tiny_config
from numerics import assert_close_to_scale
from test_modeling_crosslmm import (
    FLOAT64,
    NORM_AND_TIME,
    Sample,
    in_dtype,
    make_sample,
    model_inputs,
    reference,
)

SCOPES = ("video", "frame", "causal")
FORMS = ("kv", "features")
each_scope = pytest.mark.parametrize("scope", SCOPES)
each_form = pytest.mark.parametrize("form", FORMS)

SAMPLE = (4, ("video", 4), 3, ("image", 1), ("video", 12), 5)


def with_words_between_frames(sample: Sample, config, *, first: int = 2) -> Sample:
    """A few words before every frame but a medium's first: `first`, one more, and so on up to four, then anew."""
    pieces: list[torch.Tensor] = []
    places = {config.video_token_id, config.image_token_id}
    ids, at, length = sample.token_ids.tolist(), 0, config.tokens_per_frame
    for frames in [*(frames for _, frames in sample.media), []]:
        while at < len(ids) and ids[at] not in places:
            pieces.append(torch.tensor([ids[at]]))
            at += 1
        for frame in range(len(frames)):
            if frame:
                pieces.append(torch.arange(20, 20 + 1 + (first + frame) % 4))
            pieces.append(torch.tensor(ids[at : at + length]))
            at += length
    assert at == len(ids)
    return sample._replace(token_ids=torch.cat(pieces))


def model_and_sample(scope: str, form: str = "kv", *layout, **text):
    config = tiny_config(text_config={**NORM_AND_TIME, "v2v_scope": scope, "cross_attention_cache": form, **text})
    return random_model(config).double(), with_words_between_frames(make_sample(config, *(layout or SAMPLE)), config)


@each_scope
@torch.no_grad()
def test_a_forward_equals_the_reference(scope):
    model, sample = model_and_sample(scope)
    logits = model(**in_dtype(model_inputs(sample), torch.float64), use_cache=False).logits[0]
    assert_close_to_scale(logits, reference(model, sample).logits, relative=FLOAT64)


@each_scope
@torch.no_grad()
def test_an_image_between_the_frames_of_a_video_equals_the_reference(scope):
    model, sample = model_and_sample(scope, "kv", ("video", 3), ("image", 1))
    words, video, image = torch.arange(20, 23), torch.full((9,), 128), torch.full((9,), 127)
    sample = sample._replace(token_ids=torch.cat([words, video, words, image, words, video, words, video, words]))
    logits = model(**in_dtype(model_inputs(sample), torch.float64)).logits[0]
    assert_close_to_scale(logits, reference(model, sample).logits, relative=FLOAT64)


@each_scope
@each_form
@pytest.mark.parametrize("chunk", [1, 7, 40])
@torch.no_grad()
def test_a_prompt_in_chunks_and_the_tokens_after_it_equal_the_reference(scope, form, chunk):
    """Chunks end within frames and within the words between them; the last tokens come one by one."""
    model, sample = model_and_sample(scope, form, 3, ("video", 3), 2, ("video", 2), 4)
    inputs = in_dtype(model_inputs(sample), torch.float64)
    options = {"do_sample": False, "max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **options, prefill_chunk_size=chunk)
    whole = sample._replace(token_ids=output.sequences[0, :-1])
    expected = reference(model, whole).logits[-4:]
    assert_close_to_scale(torch.cat(output.logits), expected, relative=1e-5)


@each_scope
@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_rows_of_a_batch_equal_the_reference(scope, padding_side):
    model, sample = model_and_sample(scope)
    others = [with_words_between_frames(make_sample(model.config, *layout, seed=seed), model.config, first=seed)
              for seed, layout in enumerate([(("video", 3), 4), (9,)], 1)]  # fmt: skip
    samples = [sample, *others]
    inputs = in_dtype(model_inputs(*samples, padding_side=padding_side), torch.float64)
    logits = model(**inputs).logits
    for row, mask, one in zip(logits, inputs["attention_mask"], samples, strict=True):
        assert_close_to_scale(row[mask.bool()], reference(model, one).logits, relative=FLOAT64)


@each_scope
def test_gradients_reach_the_frames_that_words_between_them_see(scope):
    """Measured on the update of one block alone: X reaches it through K and V only."""
    model, sample = model_and_sample(scope, "kv", 2, ("video", 3), 4, cross_attention_layers=[0])
    inputs = in_dtype(model_inputs(sample), torch.float64)
    features = model.get_video_features(inputs.pop("pixel_values_videos"), inputs["video_num_frames"])
    original = features.last_hidden_state = features.last_hidden_state.detach().requires_grad_()
    features.pooler_output = tuple(tokens.detach() for tokens in features.pooler_output)
    hidden = model(**inputs, mm_encoder_outputs={"video": features}, output_hidden_states=True).hidden_states[1][0]
    is_words = (sample.token_ids >= 20) & (sample.token_ids < 24)
    words = [row for row in is_words.nonzero().flatten().tolist() if 2 <= row < len(is_words) - 4]
    frames_before = [int((sample.token_ids[:row] == model.config.video_token_id).sum()) // 9 for row in words]
    assert set(frames_before) == {1, 2}
    for row, before in zip(words, frames_before, strict=True):
        (gradient,) = torch.autograd.grad(hidden[row].sum(), original, retain_graph=True)
        seen = gradient.flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert seen == list(range(before if scope == "causal" else 3))
