"""`generate` in every mode: equal to what full forwards without any cache say, and sparing with the encoder."""

import copy
import re
from threading import Thread

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer

from factories import random_model, tiny_config, tiny_tokenizer
from numerics import assert_close_to_scale
from test_modeling_crosslmm import INTERLEAVED, NORM_AND_TIME, ONE_VIDEO, make_sample, model_inputs, plain_qwen2
from transformers_crosslmm import generation_crosslmm, load_encoded_media, save_encoded_media

FORMS = ["kv", "features"]
SCOPES = ["video", "frame", "causal"]
ENDS_IN_VIDEO = (5, ("video", 2))
BATCH = [ONE_VIDEO, INTERLEAVED, (9,), (("image", 1), 3)]
PLACEHOLDERS = [127, 128]


def tiny_model(**text_config):
    return random_model(tiny_config(text_config=text_config or None))


def batch_of(config, layouts, **kwargs):
    samples = [make_sample(config, *layout, seed=seed) for seed, layout in enumerate(layouts)]
    return model_inputs(*samples, padding_side="left", **kwargs)


def written(model, inputs, **kwargs) -> Tensor:
    """The new tokens (B, n) alone."""
    ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 7} | kwargs)
    return ids[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else ids


@torch.no_grad()
def next_token_logits(model, inputs, written_ids: Tensor) -> Tensor:
    """(B, n, V): what a full forward without a cache says before each of the tokens `written_ids` (B, n)."""
    sequence = torch.cat([inputs["input_ids"], written_ids[:, :-1]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(written_ids[:, :-1])], dim=1)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    logits = model(input_ids=sequence, attention_mask=mask, use_cache=False, **rest).logits
    return logits[:, -written_ids.shape[1] :]


def assert_greedy(model, inputs, ids: Tensor) -> None:
    """Every token is the best one that is no placeholder."""
    logits = next_token_logits(model, inputs, ids)
    logits[..., PLACEHOLDERS] = -torch.inf
    assert ids.tolist() == logits.argmax(-1).tolist()


def count_calls(monkeypatch, module) -> list[Tensor]:
    """First argument of every call of a module from now on."""
    calls, forward = [], module.forward

    def counted(*args, **kwargs):
        calls.append(args[0] if args else kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return calls


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_are_the_best_of_full_forwards(form, scope):
    model = tiny_model(**NORM_AND_TIME, v2v_scope=scope)
    inputs = batch_of(model.config, BATCH)
    assert_greedy(model, inputs, written(model, inputs, cross_attention_cache=form))


@pytest.mark.parametrize("kwargs", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_ways_to_remember_write_the_same(kwargs):
    model = tiny_model()
    inputs = batch_of(model.config, BATCH)
    assert_greedy(model, inputs, written(model, inputs, **kwargs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [ENDS_IN_VIDEO, (("video", 1),), (("image", 1), 1), (4,)], ids=str)
def test_prompts_without_text_behind_or_before_the_media(layout, form):
    """Nobody but later tokens looks at a medium that ends the prompt by T2V."""
    model = tiny_model()
    inputs = batch_of(model.config, [layout])
    assert_greedy(model, inputs, written(model, inputs, cross_attention_cache=form))


def test_what_is_written_depends_on_the_media():
    """Otherwise the comparisons of this file would prove little."""
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO])
    first = written(model, inputs)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    assert first.tolist() != written(model, inputs).tolist()
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if name.endswith("t2v.gate.weight"):
                gate.zero_()
    assert first.tolist() != written(model, inputs).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_sampling_draws_from_the_distribution_of_full_forwards(form):
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO, INTERLEAVED])
    torch.manual_seed(3)
    ids = written(model, inputs, do_sample=True, top_k=0, num_return_sequences=3, cross_attention_cache=form)
    assert ids.shape == (6, 7)
    assert len({tuple(row) for row in ids.tolist()}) == 6

    samples = [make_sample(model.config, *layout, seed=i) for i, layout in enumerate([ONE_VIDEO, INTERLEAVED])]
    repeated = model_inputs(*(sample for sample in samples for _ in range(3)), padding_side="left")
    logits = next_token_logits(model, repeated, ids)
    logits[..., PLACEHOLDERS] = -torch.inf
    torch.manual_seed(3)
    for step in range(7):
        drawn = torch.multinomial(logits[:, step].softmax(-1), num_samples=1)[:, 0]
        assert drawn.tolist() == ids[:, step].tolist()


@pytest.mark.parametrize("form", [*FORMS, None], ids=str)
@pytest.mark.parametrize("do_sample", [False, True], ids=["beam-search", "beam-sample"])
def test_beams_are_scored_as_full_forwards_score_them(do_sample, form):
    """Of each row the two best of three beams; the rows have no, one and several media."""
    model = tiny_model()
    inputs = batch_of(model.config, BATCH)
    kept = {"use_cache": False} if form is None else {"cross_attention_cache": form}
    beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 1.0, "do_sample": do_sample, "top_k": 0}
    outputs = model.generate(
        **inputs, **beams, **kept, max_new_tokens=7, return_dict_in_generate=True, output_scores=True
    )
    ids = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(len(BATCH)):
        sample = make_sample(model.config, *BATCH[row], seed=row)
        alone = model_inputs(sample)
        for beam in (2 * row, 2 * row + 1):
            log_probabilities = next_token_logits(model, alone, ids[beam : beam + 1]).log_softmax(-1)
            expected = log_probabilities.gather(-1, ids[beam][None, :, None]).mean()
            torch.testing.assert_close(outputs.sequences_scores[beam], expected, rtol=1e-4, atol=1e-4)
        assert ids[2 * row].tolist() != ids[2 * row + 1].tolist()
    if not do_sample:
        assert ids[::2].tolist() != written(model, inputs).tolist()


def speaking_model():
    """A model that writes lower-case letters, and the tokenizer that reads them."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(
        text_config={"vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    model = random_model(config)
    letters = set(tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - letters)
    return model, tokenizer


def test_stop_strings_end_the_answer():
    model, tokenizer = speaking_model()
    inputs = model_inputs(make_sample(model.config, *ONE_VIDEO))
    answer = written(model, inputs, max_new_tokens=12)
    text = tokenizer.decode(answer[0])
    assert len(text) == 12
    end = text.index(text[4:6]) + 2
    stopped = written(model, inputs, max_new_tokens=12, stop_strings=[text[4:6]], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0]) == text[:end]


def test_a_text_streamer_gets_the_answer_piece_by_piece():
    model, tokenizer = speaking_model()
    inputs = model_inputs(make_sample(model.config, *ONE_VIDEO))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=written, args=(model, inputs), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(written(model, inputs)[0])
    assert len(pieces) > 1


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_everything_asked_for_is_returned(attn_implementation):
    """Attentions are those of self-attention; a map of a token over all patches exists nowhere."""
    config = tiny_config()
    model = random_model(config, attn_implementation=attn_implementation)
    inputs = batch_of(config, [ONE_VIDEO, INTERLEAVED])
    length = inputs["input_ids"].shape[1]
    outputs = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=attn_implementation == "eager",
        output_hidden_states=True,
    )
    ids = outputs.sequences[:, length:]
    expected = next_token_logits(model, inputs, ids)
    assert_close_to_scale(torch.stack(outputs.logits, dim=1), expected, relative=1e-5)
    for scores, logits in zip(outputs.scores, outputs.logits, strict=True):
        assert scores[:, PLACEHOLDERS].isneginf().all()
        ordinary = [token for token in range(131) if token not in PLACEHOLDERS]
        assert torch.equal(scores[:, ordinary], logits[:, ordinary])
    assert isinstance(outputs.past_key_values, DynamicCache)
    assert outputs.past_key_values.get_seq_length() == length + 3

    with torch.no_grad():
        whole = model(
            input_ids=outputs.sequences[:, :-1],
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1),
            **{name: inputs[name] for name in ("pixel_values", "pixel_values_videos", "video_num_frames")},
            output_hidden_states=True,
            output_attentions=attn_implementation == "eager",
        )
    real = inputs["attention_mask"].bool()
    assert len(outputs.hidden_states) == 4
    for step, layers in enumerate(outputs.hidden_states):
        assert len(layers) == 6
        for states, full in zip(layers, whole.hidden_states, strict=True):
            if step == 0:
                assert_close_to_scale(states[real], full[:, :length][real], relative=1e-5)
            else:
                assert_close_to_scale(states, full[:, length + step - 1 : length + step], relative=1e-5)
    if attn_implementation == "sdpa":
        assert outputs.attentions is None
        return
    assert [len(layers) for layers in outputs.attentions] == [5] * 4
    for step, layers in enumerate(outputs.attentions):
        for weights in layers:
            assert weights.shape == (2, 6, length if step == 0 else 1, length + step)
            torch.testing.assert_close(weights[:, :, -1].sum(-1), torch.ones(2, 6))
    assert len(whole.attentions) == 5
    assert "cross_attentions" not in outputs


def test_the_model_does_not_write_placeholders(tmp_path):
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO])
    model.lm_head.weight.data[PLACEHOLDERS] = 50 * model.lm_head.weight.data[written(model, inputs)[0, 0]]
    assert not set(written(model, inputs).flatten().tolist()) & set(PLACEHOLDERS)
    assert written(model, inputs, suppress_tokens=None)[0, 0] in PLACEHOLDERS
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == PLACEHOLDERS


# -- written placeholders are text ------------------------------------------------------------------------------------


def stubborn_model(form="kv"):
    """A model that writes the video placeholder whenever it may, and knows a token 5 of the same embedding.

    So a sequence with 5 for every placeholder written is what it must look like when these are text.
    """
    model = tiny_model(cross_attention_cache=form)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[5] = embeddings[128]
        model.lm_head.weight.zero_()
        model.lm_head.weight[128] = 1.0
        model.lm_head.weight[9] = -1.0  # 128 where the sum of the last hidden state is positive, 9 elsewhere
    return model


ASSISTED = {"prompt_lookup_num_tokens": 3}
WAYS = {"kv": {}, "features": {}, "no-cache": {"use_cache": False}, "prompt-lookup": ASSISTED}


@pytest.mark.parametrize("way", WAYS)
def test_placeholders_written_by_the_model_are_text(way):
    model = stubborn_model("features" if way == "features" else "kv")
    found = 0
    for seed in range(4):
        inputs = model_inputs(make_sample(model.config, *ONE_VIDEO, seed=seed))
        ids = written(model, inputs, suppress_tokens=None, **WAYS[way])
        logits = next_token_logits(model, inputs, ids.masked_fill(ids == 128, 5))
        assert ids.tolist() == logits[..., [9, 128]].argmax(-1).mul(119).add(9).tolist()
        found += int((ids == 128).sum())
    assert 0 < found < 4 * 7


@pytest.mark.parametrize("form", FORMS)
def test_placeholders_among_the_first_candidates_are_text(form, monkeypatch):
    """The prompt ends in the two tokens that stood before its video, so prompt lookup proposes placeholders."""
    model = stubborn_model(form)
    sample = make_sample(model.config, 4, ("video", 2), 6)
    sample.token_ids[-2:] = sample.token_ids[2:4]
    inputs = model_inputs(sample)
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
    ids = written(model, inputs, suppress_tokens=None, **ASSISTED)
    assert calls[0][0, -3:].tolist() == [128] * 3
    assert calls[0].shape[1] == len(sample.token_ids) + 3
    logits = next_token_logits(model, inputs, ids.masked_fill(ids == 128, 5))
    assert ids.tolist() == logits[..., [9, 128]].argmax(-1).mul(119).add(9).tolist()


# -- assisted decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [ONE_VIDEO, INTERLEAVED], ids=["one", "interleaved"])
def test_prompt_lookup_writes_the_same(layout, form):
    model = tiny_model(cross_attention_cache=form)
    sample = make_sample(model.config, *layout)
    sample.token_ids[-3:] = sample.token_ids[:3].clone()
    inputs = model_inputs(sample)
    ids = written(model, inputs, prompt_lookup_num_tokens=4, max_new_tokens=15)
    assert_greedy(model, inputs, ids)


def test_assisted_decoding_goes_on_from_a_conversation():
    """Prompt lookup and a plain draft need no media; what they propose is checked against what the cache has seen."""
    model = tiny_model()
    inputs = model_inputs(make_sample(model.config, *ONE_VIDEO))
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, inputs["input_ids"][:, :3]], dim=1)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for kwargs in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": plain_qwen2(model)}):
        cache = copy.deepcopy(first.past_key_values)
        assert_greedy(model, whole, written(model, {"input_ids": ids}, past_key_values=cache, **kwargs))


def draft_model(model, *, width=32, seed=1):
    """A CrossLMM of another width that sees with the same eyes."""
    text_config = {"hidden_size": width, "num_attention_heads": 4, "num_hidden_layers": 3}
    draft = random_model(tiny_config(text_config=text_config), seed=seed)
    draft.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


@pytest.mark.parametrize("kwargs", [{}, {"cross_attention_cache": "features"}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("draft", ["qwen2", "narrow", "same-width", "itself"])
def test_assisted_decoding_writes_the_same(draft, kwargs):
    model = tiny_model()
    assistant = {
        "qwen2": lambda: plain_qwen2(model),
        "narrow": lambda: draft_model(model),
        "same-width": lambda: random_model(tiny_config(), seed=1),
        "itself": lambda: copy.deepcopy(model),
    }[draft]()
    inputs = model_inputs(make_sample(model.config, *INTERLEAVED))
    assert_greedy(model, inputs, written(model, inputs, assistant_model=assistant, max_new_tokens=14, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"prefill_chunk_size": 5}], ids=["whole", "chunks"])
@pytest.mark.parametrize("width", [32, 48])
def test_a_crosslmm_draft_sees_the_video_with_pooled_tokens_of_its_own(width, kwargs, monkeypatch):
    """What it proposes first is what it would write alone, from the pixels; also when the widths happen to agree."""
    model = tiny_model()
    draft = draft_model(model, width=width)
    inputs = model_inputs(make_sample(model.config, *INTERLEAVED))
    alone = written(draft, inputs, max_new_tokens=4)
    encoded, proposed = count_calls(monkeypatch, draft.model.vision_tower), []
    hook = lambda module, args, kwargs: proposed.append(kwargs["input_ids"])  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    written(model, inputs, assistant_model=draft, max_new_tokens=14, **kwargs)
    assert proposed[0][:, inputs["input_ids"].shape[1] :].tolist() == alone.tolist()
    assert not encoded
    inputs["pixel_values_videos"] = -3 * inputs["pixel_values_videos"]
    assert written(draft, inputs, max_new_tokens=4).tolist() != alone.tolist()


def test_a_draft_that_is_the_model_itself_is_always_right():
    """Its cache is cropped and continued between rounds; one wrong step and a proposal would be refused."""
    model = tiny_model()
    draft = copy.deepcopy(model)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    inputs = model_inputs(make_sample(model.config, *INTERLEAVED))
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    written(model, inputs, assistant_model=draft, max_new_tokens=15)
    assert len(calls) == 3  # each confirms four and adds one


def test_assisted_sampling_runs():
    model = tiny_model()
    inputs = model_inputs(make_sample(model.config, *INTERLEAVED))
    ids = written(model, inputs, assistant_model=draft_model(model), do_sample=True, max_new_tokens=9)
    assert ids.shape == (1, 9)


def test_drafts_that_cannot_see_are_refused():
    model = tiny_model()
    inputs = model_inputs(make_sample(model.config, *ONE_VIDEO))
    blind = random_model(tiny_config(vision_config={"hidden_size": 24}))
    with pytest.raises(ValueError, match=r"vision width.*20.*24"):
        written(model, inputs, assistant_model=blind)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    turn = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match="has not seen the media"):
        model.generate(**turn, assistant_model=draft_model(model), max_new_tokens=3)


# -- embeddings, turns, chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"cross_attention_cache": "features"}], ids=str)
@pytest.mark.parametrize("given", ["pixels", "features"])
def test_embeddings_of_the_ids_write_the_same(given, mode):
    model = tiny_model()
    inputs = batch_of(model.config, BATCH)
    expected = written(model, inputs, **mode)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    if given == "features":
        inputs = with_features(model, inputs)
    assert written(model, inputs, **mode).tolist() == expected.tolist()


def with_features(model, inputs):
    """The same inputs with their media encoded."""
    inputs, media = dict(inputs), {}
    with torch.no_grad():
        if "pixel_values_videos" in inputs:
            pixels, frames = inputs.pop("pixel_values_videos"), inputs.pop("video_num_frames")
            media["video"] = model.get_video_features(pixels, frames)
        if "pixel_values" in inputs:
            media["image"] = model.get_image_features(inputs.pop("pixel_values"))
    return inputs | {"mm_encoder_outputs": media}


def second_turn(config, first_ids, layouts):
    """A later turn of every row: the whole ids so far, the new ones, and the new media alone."""
    new = [make_sample(config, *layout, seed=50 + row) for row, layout in enumerate(layouts)]
    inputs = model_inputs(*new)
    assert inputs["attention_mask"].all()
    ids = torch.cat([first_ids, inputs.pop("input_ids")], dim=1)
    return inputs | {"input_ids": ids}, [sample.media for sample in new]


@pytest.mark.parametrize("start", ["ids", "embeds", "chunks"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_later_turn_may_bring_new_videos(scope, form, start):
    """Two conversations at once; the second turn gives the whole ids and only the new pixels."""
    model = tiny_model(**NORM_AND_TIME, v2v_scope=scope)
    layouts, later = [ONE_VIDEO, INTERLEAVED], [(3, ("video", 2), 3), (2, ("video", 1), 1, ("image", 1), 3)]
    samples = [make_sample(model.config, *layout, seed=seed) for seed, layout in enumerate(layouts)]
    inputs = model_inputs(*samples, padding_side="left")
    kwargs = {"prefill_chunk_size": 7} if start == "chunks" else {}
    first = model.generate(
        **inputs, max_new_tokens=3, return_dict_in_generate=True, cross_attention_cache=form, **kwargs
    )
    turn, new_media = second_turn(model.config, first.sequences, later)
    turn["attention_mask"] = torch.cat(
        [inputs["attention_mask"], torch.ones_like(turn["input_ids"])[:, inputs["input_ids"].shape[1] :]], dim=1
    )
    fresh = turn | model_inputs(
        *(sample._replace(media=sample.media + media) for sample, media in zip(samples, new_media, strict=True)),
    )
    fresh |= {name: turn[name] for name in ("input_ids", "attention_mask")}
    if start == "embeds":
        turn["inputs_embeds"] = model.get_input_embeddings()(turn.pop("input_ids")).detach()
    ids = written(model, turn, past_key_values=first.past_key_values, **kwargs)
    assert_greedy(model, fresh, ids)


@pytest.mark.parametrize("form", FORMS)
def test_a_later_turn_may_be_given_alone(form):
    """Without the tokens that the cache has, but with the mask of the whole."""
    model = tiny_model()
    inputs = model_inputs(make_sample(model.config, *ONE_VIDEO))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True, cross_attention_cache=form).past_key_values
    turn, _ = second_turn(model.config, inputs["input_ids"], [(4, ("video", 2), 30)])
    whole = model_inputs(make_sample(model.config, *ONE_VIDEO)._replace(token_ids=turn["input_ids"][0]))
    whole["pixel_values_videos"] = torch.cat([inputs["pixel_values_videos"], turn["pixel_values_videos"]])
    whole["video_num_frames"] = torch.tensor([3, 2])
    length = inputs["input_ids"].shape[1]
    turn["input_ids"] = turn["input_ids"][:, length:]
    turn["attention_mask"] = whole["attention_mask"]
    assert turn["input_ids"].shape[1] > length
    assert_greedy(model, whole, written(model, turn, past_key_values=cache))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("new_video", [True, False], ids=["new-video", "text"])
def test_beams_go_on_from_a_cache_that_was_repeated_for_them(new_video, form):
    model = tiny_model(cross_attention_cache=form)
    inputs = model_inputs(make_sample(model.config, *ONE_VIDEO))
    layout = (3, ("video", 2), 4) if new_video else (5,)
    turn, _ = second_turn(model.config, inputs["input_ids"], [layout])
    whole = inputs | {"input_ids": turn["input_ids"], "attention_mask": torch.ones_like(turn["input_ids"])}
    if new_video:
        whole["pixel_values_videos"] = torch.cat([inputs["pixel_values_videos"], turn["pixel_values_videos"]])
        whole["video_num_frames"] = torch.tensor([3, 2])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    turn.pop("attention_mask")
    ids = written(model, turn, past_key_values=cache, num_beams=3)
    assert ids.tolist() == written(model, whole, num_beams=3).tolist()


CHUNKS = [  # every size with both forms and every scope with four sizes; 100 is one chunk
    *((chunk, form, SCOPES[(i + j) % 3]) for i, chunk in enumerate([4, 9, 13, 31]) for j, form in enumerate(FORMS)),
    (1, "kv", "causal"),
    (1, "features", "frame"),
    (7, "kv", "frame"),
    (20, "features", "causal"),
    (100, "kv", "video"),
]


# Rows of 4 + 27 + 6 and, interleaved, 3 + 18 + 27 + 2 + 9 + 4 + 9 + 9 + 5 tokens, left-padded: the chunks cut within
# media, between them, and in the text before and behind.
@pytest.mark.parametrize(("chunk", "form", "scope"), CHUNKS)
def test_chunked_prefill_equals_the_whole(chunk, form, scope):
    model = tiny_model(**NORM_AND_TIME, v2v_scope=scope)
    inputs = batch_of(model.config, BATCH)
    if chunk % 2:
        inputs = with_features(model, inputs)
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "cross_attention_cache": form,
    }
    whole = model.generate(**inputs, **options)
    chunks = model.generate(**inputs, **options, prefill_chunk_size=chunk)
    assert chunks.sequences.tolist() == whole.sequences.tolist()
    assert_close_to_scale(torch.stack(chunks.logits), torch.stack(whole.logits), relative=1e-5)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_chunked_prefill_in_other_modes(form, kwargs):
    model = tiny_model(cross_attention_cache=form)
    inputs = batch_of(model.config, BATCH)
    expected = written(model, inputs, **kwargs)
    assert written(model, inputs, **kwargs, prefill_chunk_size=11).tolist() == expected.tolist()


def lengths_run(monkeypatch, model) -> list[int]:
    """Tokens of every call of the language model from now on."""
    language_model, lengths = model.model.language_model, []
    run = language_model.forward

    def counted(*args, **kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])
        return run(*args, **kwargs)

    monkeypatch.setattr(language_model, "forward", counted)
    return lengths


LONG = {
    "ids": ({}, True),
    "beams": ({"num_beams": 3}, True),
    "one piece asked for": ({"prefill_chunk_size": 10**6}, False),
    "no cache": ({"use_cache": False}, False),
    "all hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, False),
    "embeddings": ({}, False),
}


@pytest.mark.parametrize(("kwargs", "is_cut"), LONG.values(), ids=LONG)
def test_a_long_prompt_with_media_is_prefilled_in_chunks_where_it_can_be(kwargs, is_cut, request, monkeypatch):
    model = tiny_model()
    inputs = batch_of(model.config, BATCH)
    if "embeddings" in request.node.name:
        inputs = inputs | {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")).detach()}
    options = kwargs | {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    lengths = lengths_run(monkeypatch, model)
    monkeypatch.setattr(generation_crosslmm, "PREFILL_TOKENS", 11)
    actual = model.generate(**inputs, **options)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert (lengths[0] == 11) is is_cut
    if kwargs.get("output_hidden_states"):
        length = inputs["input_ids"].shape[1]
        assert [states.shape[1] for states in actual.hidden_states[0]] == [length] * (
            model.config.text_config.num_hidden_layers + 1
        )
    # Without media the language model is Qwen2, as it is.
    lengths.clear()
    model.generate(torch.arange(10, 36)[None], max_new_tokens=2)
    assert lengths == [26, 1]


# -- encode once ------------------------------------------------------------------------------------------------------


def snapshot(media):
    return {
        modality: (id(output), output.last_hidden_state.clone(), [(id(p), p.clone()) for p in output.pooler_output])
        for modality, output in media.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_encoded_media_serve_any_number_of_calls_and_stay_untouched(form, monkeypatch):
    model = tiny_model(cross_attention_cache=form)
    inputs = batch_of(model.config, BATCH)
    modes = [
        {"num_beams": 3},
        {},
        {"prefill_chunk_size": 7},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"use_cache": False, "num_beams": 2},
        {"cache_implementation": "static"},
        {},
    ]

    def write(given, mode):
        torch.manual_seed(0)
        return written(model, given, **mode).tolist()

    expected = [write(inputs, mode) for mode in modes]
    encoded = with_features(model, inputs)
    media = encoded["mm_encoder_outputs"]
    before = snapshot(media)
    calls = count_calls(monkeypatch, model.model.vision_tower)
    assert [write(encoded, mode) for mode in modes] == expected
    assert not calls

    assert list(media) == ["video", "image"]
    for modality, (identity, original, pooled) in before.items():
        output = media[modality]
        assert id(output) == identity
        assert set(output.keys()) == {"last_hidden_state", "pooler_output"}
        assert torch.equal(output.last_hidden_state, original)
        assert isinstance(output.pooler_output, tuple)
        for tokens, (tokens_identity, values) in zip(output.pooler_output, pooled, strict=True):
            assert id(tokens) == tokens_identity
            assert torch.equal(tokens, values)


def test_one_modality_may_come_encoded_and_the_other_as_pixels():
    model = tiny_model()
    inputs = batch_of(model.config, BATCH)
    encoded = with_features(model, inputs)
    media = {"video": encoded["mm_encoder_outputs"]["video"]}
    given = encoded | {"mm_encoder_outputs": media, "pixel_values": inputs["pixel_values"]}
    for mode in ({"num_beams": 2}, {}):
        assert written(model, given, **mode).tolist() == written(model, inputs, **mode).tolist()
    assert list(media) == ["video"]


def test_assisted_decoding_takes_encoded_media():
    model = tiny_model()
    inputs = model_inputs(make_sample(model.config, *INTERLEAVED))
    encoded = with_features(model, inputs)
    before = snapshot(encoded["mm_encoder_outputs"])
    for kwargs in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft_model(model)}):
        assert_greedy(model, inputs, written(model, encoded, **kwargs))
    after = snapshot(encoded["mm_encoder_outputs"])
    assert [value[0] for value in after.values()] == [value[0] for value in before.values()]


def test_features_on_disk_answer_as_the_pixels_do(tmp_path):
    model = tiny_model()
    inputs = batch_of(model.config, BATCH)
    encoded = with_features(model, inputs)
    save_encoded_media(encoded["mm_encoder_outputs"], tmp_path / "media.safetensors")
    encoded["mm_encoder_outputs"] = load_encoded_media(tmp_path / "media.safetensors")
    for mode in ({}, {"num_beams": 3}, {"prefill_chunk_size": 7}):
        assert written(model, encoded, **mode).tolist() == written(model, inputs, **mode).tolist()
    outputs = [model(**given).logits for given in (inputs, encoded)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prefill_chunk_size": 8}, {"use_cache": False}], ids=str)
def test_the_encoder_runs_once_per_frame(kwargs, monkeypatch):
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO, INTERLEAVED])
    calls = count_calls(monkeypatch, model.model.vision_tower)
    written(model, inputs, **kwargs)
    assert sum(len(frames) for frames in calls) == 3 + 6 + 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prefill_chunk_size": 8}], ids=str)
def test_patches_are_projected_once_per_video(kwargs, form, monkeypatch):
    """For T2V: 11 frames of 25 patches. In form "features" the basis of width 20, and 0, are projected too."""
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO, INTERLEAVED])
    layer = model.model.language_model.layers[2].cross_attention.t2v
    calls = [count_calls(monkeypatch, projection) for projection in (layer.k_proj, layer.v_proj)]
    written(model, inputs, cross_attention_cache=form, max_new_tokens=1, **kwargs)
    in_prefill = [[len(states) for states in projected] for projected in calls]
    written(model, inputs, cross_attention_cache=form, max_new_tokens=9, **kwargs)
    for projected, before in zip(calls, in_prefill, strict=True):
        assert [len(states) for states in projected] == 2 * before
        if form == "kv":
            assert before == [275]
        elif "prefill_chunk_size" not in kwargs:
            assert sorted(before) == [21, 275]


# -- where the context ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_stops_where_the_context_ends(kwargs, caplog):
    """37 tokens of 42 positions leave six new ones: the last needs no position. Candidates of prompt lookup do."""
    model = tiny_model(max_position_embeddings=42)
    inputs = model_inputs(make_sample(model.config, *ONE_VIDEO))
    ids = written(model, inputs, max_new_tokens=30, **kwargs)
    assert re.search(r"stops after \d new tokens.*context of 42 positions.*30 were requested", caplog.text)
    assert ids.shape[1] == (3 if "prompt_lookup_num_tokens" in kwargs else 6)
    assert_greedy(model, inputs, ids)
    assert written(model, inputs, max_new_tokens=None, max_length=100, **kwargs).tolist() == ids.tolist()
