"""`generate(..., output_cross_attentions=True)`: how much each frame weighed in T2V when each token was written."""

import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from factories import random_frames, random_model, tiny_config, tiny_processor
from transformers_crosslmm import CrossLMMForConditionalGeneration, cross_attention_crosslmm, frame_weights_crosslmm
from transformers_crosslmm.cross_attention_crosslmm import CrossLMMCrossAttentionBranch

NEW_TOKENS = 5
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SINGLE = (f"ab{VIDEO}cde", [4])
DOUBLE = (f"{VIDEO}x<|video_pad|>yz", [3, 2])  # two videos, text between them


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor) -> CrossLMMForConditionalGeneration:
    return build(processor)


def build(processor, **text_config) -> CrossLMMForConditionalGeneration:
    config = tiny_config(
        text_config={"vocab_size": len(processor.tokenizer), **text_config},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    return random_model(config)


def inputs_of(processor, *samples) -> dict[str, torch.Tensor]:
    videos = [random_frames(n, seed=10 * i + n) for i, (_, counts) in enumerate(samples) for n in counts]
    return processor(
        text=[text for text, _ in samples],
        videos=videos or None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )


def looked(model, inputs, **options):
    return model.generate(
        **inputs,
        **{
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "eos_token_id": None,
            "return_dict_in_generate": True,
            "output_cross_attentions": True,
        }
        | options,
    )


def eager_weights(model, inputs, sequences: torch.Tensor, monkeypatch) -> torch.Tensor:
    """(layers, heads, new tokens, patches) of one sample: the maps that the eager attention made in one forward call
    over the finished sequence, without a cache, taken where Transformers' own function returns them."""
    maps: dict[int, torch.Tensor] = {}

    def eager(module, *args, **kwargs):
        output, weights = eager_attention_forward(module, *args, **kwargs)
        if isinstance(module, CrossLMMCrossAttentionBranch) and module is layers[module.layer_idx].cross_attention.t2v:
            # The last segment: what stands behind the last video. Heads that share keys came one below the other.
            shared = module.config.num_attention_heads // module.config.num_key_value_heads
            maps[module.layer_idx] = weights[0].unflatten(1, (shared, -1)).flatten(0, 1)
        return output, weights

    layers = model.model.language_model.layers
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    written = sequences[:, :-1]
    with monkeypatch.context() as patch:
        patch.setattr(cross_attention_crosslmm, "eager_attention_forward", eager)
        patch.setattr(model.config.text_config, "_attn_implementation_internal", "eager")
        media = {name: inputs[name] for name in ("pixel_values_videos", "video_num_frames")}
        with torch.no_grad():
            model(input_ids=written, **media, use_cache=False)
    return torch.stack([weights[:, -new:] for _, weights in sorted(maps.items())])


@pytest.mark.parametrize("form", ["kv", "features"])
@pytest.mark.parametrize("sample", [SINGLE, DOUBLE], ids=["one video", "two videos"])
def test_weights_are_the_eager_maps_summed_per_frame(model, processor, monkeypatch, sample, form):
    inputs = inputs_of(processor, sample)
    output = looked(model, inputs, cross_attention_cache=form)
    (weights,) = output.cross_attentions
    maps = eager_weights(model, inputs, output.sequences, monkeypatch)
    expected = maps.unflatten(-1, (-1, 25)).sum(-1)
    assert weights.shape == (3, 6, NEW_TOKENS, sum(sample[1]))
    # Both are float32 softmaxes over at most 125 scores of size 10, whose rounding is about 1e-6.
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["kv", "features"])
def test_every_token_and_head_gives_a_whole_to_its_frames(model, processor, form):
    output = looked(model, inputs_of(processor, SINGLE, DOUBLE), cross_attention_cache=form)
    for weights, num_frames in zip(output.cross_attentions, (4, 5), strict=True):
        assert weights.shape == (3, 6, NEW_TOKENS, num_frames)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 6, NEW_TOKENS))
        assert weights.min() >= 0


@pytest.mark.parametrize("form", ["kv", "features"])
def test_a_frame_at_a_time_gives_the_same(model, processor, monkeypatch, form):
    inputs = inputs_of(processor, DOUBLE)
    at_once = looked(model, inputs, cross_attention_cache=form).cross_attentions[0]
    monkeypatch.setattr(frame_weights_crosslmm, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(
        looked(model, inputs, cross_attention_cache=form).cross_attentions[0], at_once, rtol=1e-5, atol=1e-6
    )


def test_no_map_of_all_patches_is_made(model, processor, monkeypatch):
    sizes = []
    logsumexp = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda t, *a, **k: sizes.append(t.numel()) or logsumexp(t, *a, **k))
    monkeypatch.setattr(frame_weights_crosslmm, "CHUNK_ELEMENTS", 1)
    looked(model, inputs_of(processor, SINGLE))
    assert len(sizes) == 3 * NEW_TOKENS * 4
    assert set(sizes) == {6 * 25}  # heads x patches of one frame


OTHER_WAYS = {
    "without a cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "chunks of a prefill": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("options", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_how_generation_runs_changes_nothing(model, processor, options):
    inputs = inputs_of(processor, SINGLE, DOUBLE)
    plain, other = looked(model, inputs), looked(model, inputs, **options)
    assert torch.equal(other.sequences, plain.sequences)
    for ours, expected in zip(other.cross_attentions, plain.cross_attentions, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_asking_for_weights_changes_no_token(model, processor):
    inputs = inputs_of(processor, SINGLE, DOUBLE)
    plain = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert torch.equal(looked(model, inputs).sequences, plain)


def test_beams_tell_what_the_chosen_one_saw(model, processor, monkeypatch):
    inputs = inputs_of(processor, DOUBLE)
    output = looked(model, inputs, num_beams=4, num_return_sequences=2)
    assert not torch.equal(*output.sequences), "two equal beams would not show whose weights these are"
    assert len(output.cross_attentions) == 2
    for sequence, weights in zip(output.sequences, output.cross_attentions, strict=True):
        expected = eager_weights(model, inputs, sequence[None], monkeypatch).unflatten(-1, (-1, 25)).sum(-1)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def test_several_sequences_of_a_sample_have_their_own_weights(model, processor, monkeypatch):
    inputs = inputs_of(processor, SINGLE)
    output = looked(model, inputs, do_sample=True, num_return_sequences=3, temperature=5.0)
    for sequence, weights in zip(output.sequences, output.cross_attentions, strict=True):
        expected = eager_weights(model, inputs, sequence[None], monkeypatch).unflatten(-1, (-1, 25)).sum(-1)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_later_turn_sees_the_frames_of_the_first(model, processor, monkeypatch, cache):
    inputs = inputs_of(processor, SINGLE)
    kept = DynamicCache() if cache == "dynamic" else StaticCache(model.config.text_config, max_cache_len=80)
    first = looked(model, inputs, past_key_values=kept)
    more = processor.tokenizer("why", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, more], dim=1)
    second = looked(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=kept)
    whole = {**inputs, "input_ids": ids}
    expected = eager_weights(model, whole, second.sequences, monkeypatch).unflatten(-1, (-1, 25)).sum(-1)
    torch.testing.assert_close(second.cross_attentions[0], expected, rtol=1e-4, atol=1e-5)


def test_a_sample_without_video_has_no_frames(model, processor):
    together = looked(model, inputs_of(processor, ("abc", []), SINGLE))
    assert [weights.shape[-1] for weights in together.cross_attentions] == [0, 4]
    alone = looked(model, inputs_of(processor, ("abc", [])))
    assert alone.cross_attentions[0].shape == (3, 6, NEW_TOKENS, 0)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 11}], ids=["whole", "in chunks"])
def test_a_prompt_that_ends_with_a_video_saw_nothing_for_its_first_token(model, processor, options):
    sample = ("<|video_pad|>ab<|video_pad|>", [1, 2])  # 9 of the first video, 2 of text, 18 of the second
    (weights,) = looked(model, inputs_of(processor, sample), **options).cross_attentions
    assert (weights[:, :, 0] == 0).all()
    torch.testing.assert_close(weights[:, :, 1:].sum(-1), torch.ones(3, 6, NEW_TOKENS - 1))


def test_nothing_stays_in_the_model(model, processor):
    def hooks():
        return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]

    before = hooks()
    looked(model, inputs_of(processor, SINGLE))
    assert hooks() == before
    with pytest.raises(ValueError, match="Placeholders and video features must match"):
        looked(model, inputs_of(processor, SINGLE) | {"video_num_frames": None, "pixel_values_videos": None})
    assert hooks() == before


def test_two_calls_in_two_threads_do_not_mix(model, processor):
    samples = {"single": inputs_of(processor, SINGLE), "double": inputs_of(processor, DOUBLE)}
    expected = {name: looked(model, inputs).cross_attentions[0] for name, inputs in samples.items()}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in samples}
    start = threading.Barrier(2)

    def ask(name: str) -> None:
        start.wait()
        for _ in range(4):
            outputs[name].append(looked(model, samples[name]).cross_attentions[0])

    threads = [threading.Thread(target=ask, args=(name,)) for name in samples]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, found in outputs.items():
        assert len(found) == 4
        for weights in found:
            torch.testing.assert_close(weights, expected[name])


def test_bfloat16_weights_are_those_of_float32_within_its_rounding(processor, monkeypatch):
    exact = build(processor)
    inputs = inputs_of(processor, SINGLE)
    expected = looked(exact, inputs, max_new_tokens=1).cross_attentions[0]
    weights = looked(exact.to(torch.bfloat16), inputs, max_new_tokens=1).cross_attentions[0]
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 6, 1))
    # Eight bits of q and k leave scores of size 10 uncertain by a few hundredths, more behind several layers.
    torch.testing.assert_close(weights, expected, rtol=0.3, atol=0.05)


MISTAKES = {
    "no output to hold them": ({"return_dict_in_generate": False}, "needs `return_dict_in_generate=True`"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "token by token"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_recorded_is_refused(model, processor, options, message):
    with pytest.raises(ValueError, match=message):
        looked(model, inputs_of(processor, SINGLE), **options)


def test_an_assistant_is_refused(model, processor):
    with pytest.raises(ValueError, match="token by token"):
        looked(model, inputs_of(processor, SINGLE), assistant_model=model)


def test_a_model_without_t2v_is_refused(processor):
    with pytest.raises(ValueError, match="this model has none"):
        looked(build(processor, use_t2v=False), inputs_of(processor, SINGLE))
