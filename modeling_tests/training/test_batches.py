"""Samples side by side: each row of a batch is what the sample is alone, and text is plain Qwen2 bit for bit."""

import pytest
import torch
from transformers import DynamicCache

from factories import random_model, tiny_config
from numerics import assert_close_to_scale
from test_modeling_crosslmm import (
    NORM_AND_TIME,
    make_sample,
    model_inputs,
    plain_qwen2,
    relative_change,
    spliced_embeddings,
)

LAYOUTS = {
    "text": (14,),
    "one-video": (3, ("video", 4), 6),
    "three-videos": (2, ("video", 1), ("video", 3), 4, ("video", 2), 5),
    "images": (("image", 1), 1, ("image", 1), 7),
    "both": (4, ("image", 1), ("video", 2), 2, ("image", 1), 3),
    "ends-in-video": (6, ("video", 2)),
}
each_padding = pytest.mark.parametrize("padding_side", ["left", "right"])
each_kept = pytest.mark.parametrize("kept", [{"use_cache": False}, {}, {"cross_attention_cache": "features"}], ids=str)


def samples_of(config):
    return [make_sample(config, *layout, seed=seed) for seed, layout in enumerate(LAYOUTS.values())]


@torch.no_grad()
@each_padding
@each_kept
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_each_row_is_the_sample_alone(scope, kept, padding_side):
    config = tiny_config(text_config={**NORM_AND_TIME, "v2v_scope": scope})
    model = random_model(config)
    samples = samples_of(config)
    inputs = model_inputs(*samples, padding_side=padding_side)
    logits = model(**inputs, **kept).logits
    for sample, row, mask in zip(samples, logits, inputs["attention_mask"], strict=True):
        alone = model(**model_inputs(sample), use_cache=False).logits[0]
        assert_close_to_scale(row[mask.bool()], alone, relative=1e-5)


@torch.no_grad()
def test_rows_differ_by_their_media_far_beyond_the_tolerance():
    config = tiny_config()
    model = random_model(config)
    inputs = model_inputs(*samples_of(config))
    before = model(**inputs).logits
    for name in ("pixel_values", "pixel_values_videos"):
        after = model(**inputs | {name: inputs[name].roll(1, 0)}).logits
        assert relative_change(before, after) > 0.1


@pytest.mark.parametrize("form", ["kv", "features"])
def test_each_row_is_answered_as_if_it_were_alone(form):
    config = tiny_config(text_config={"cross_attention_cache": form})
    model = random_model(config)
    samples = samples_of(config)
    inputs = model_inputs(*samples, padding_side="left")
    options = {"do_sample": False, "max_new_tokens": 8}
    answers = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for sample, answer in zip(samples, answers, strict=True):
        alone = model.generate(**model_inputs(sample), **options)[0, len(sample.token_ids) :]
        assert answer.tolist() == alone.tolist()
    assert len({tuple(answer) for answer in answers.tolist()}) == len(samples)


@torch.no_grad()
@each_padding
@each_kept
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_text_is_plain_qwen2_bit_for_bit(attn_implementation, kept, padding_side):
    """The text-only row, its padding too, and every row up to its first medium."""
    config = tiny_config()
    model = random_model(config, attn_implementation=attn_implementation)
    qwen2 = plain_qwen2(model)
    qwen2.set_attn_implementation(attn_implementation)
    samples = samples_of(config)
    inputs = model_inputs(*samples, padding_side=padding_side)
    logits = model(**inputs, **kept).logits
    mask = inputs["attention_mask"]
    plain = qwen2(inputs_embeds=spliced_embeddings(model, inputs), attention_mask=mask).logits
    placeholders = (inputs["input_ids"] == config.video_token_id) | (inputs["input_ids"] == config.image_token_id)
    before_media = placeholders.cumsum(-1) == 0
    untouched = before_media & mask.bool()  # padding before a video averages over the whole row in eager attention
    untouched[0] = True
    assert torch.equal(logits[untouched], plain[untouched])
    touched = ~before_media & mask.bool()
    assert ((logits - plain).abs().amax(-1)[touched] > 0.01 * plain.abs().max()).all()


@torch.no_grad()
def test_a_text_row_is_decoded_as_plain_qwen2_decodes_it():
    config = tiny_config()
    model = random_model(config)
    qwen2 = plain_qwen2(model)
    inputs = model_inputs(*samples_of(config), padding_side="left")
    mask, embeds = inputs["attention_mask"], spliced_embeddings(model, inputs)
    ours, plain = DynamicCache(), DynamicCache()
    model(**inputs, past_key_values=ours)
    qwen2(inputs_embeds=embeds, attention_mask=mask, past_key_values=plain)
    for _ in range(3):
        ids = torch.randint(1, 120, (len(mask), 1))
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=ours).logits
        expected = qwen2(input_ids=ids, attention_mask=mask, past_key_values=plain).logits
        assert torch.equal(logits[0], expected[0])
        assert all(relative_change(expected[row], logits[row]) > 0.01 for row in range(1, len(mask)))


@torch.no_grad()
def test_rows_may_come_in_any_order():
    config = tiny_config()
    model = random_model(config)
    samples = samples_of(config)
    order = [4, 0, 5, 2, 3, 1]
    straight, mixed = (model_inputs(*(samples[row] for row in rows)) for rows in (range(6), order))
    assert_close_to_scale(model(**mixed).logits, model(**straight).logits[order], relative=1e-5)
