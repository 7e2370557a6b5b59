"""Mistakes in the inputs: told with the right class, the values and the remedy, before any work, leaving no trace."""

import copy

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from factories import random_model, tiny_config
from test_cache_crosslmm import assert_unchanged, snapshot
from test_modeling_crosslmm import ONE_VIDEO, make_sample, model_inputs

# Each mistake takes the inputs of a batch of two rows and spoils them.
FIRST, SECOND = (4, ("video", 3), 2, ("image", 1), 5), (6, ("video", 2), 7)


def pixels_dropped(inputs):
    del inputs["pixel_values_videos"], inputs["video_num_frames"]


def image_dropped(inputs):
    del inputs["pixel_values"]


def all_pixels_dropped(inputs):
    pixels_dropped(inputs)
    image_dropped(inputs)


def a_frame_lost(inputs):
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:-1]
    inputs["video_num_frames"] = torch.tensor([3, 1])


def a_frame_too_many(inputs):
    inputs["pixel_values_videos"] = torch.cat([inputs["pixel_values_videos"], torch.zeros(1, 3, 33, 33)])
    inputs["video_num_frames"] = torch.tensor([3, 3])


def text_truncated(inputs):
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :20]


def text_within_a_frame(inputs):
    """The last of the second row's placeholders changes places with the text behind it."""
    (places,) = (inputs["input_ids"][1] == 128).nonzero(as_tuple=True)
    last = int(places[-1])
    inputs["input_ids"][1, [last, last + 1]] = inputs["input_ids"][1, [last + 1, last]]


def counts_that_do_not_add_up(inputs):
    inputs["video_num_frames"] = torch.tensor([3, 3])


def an_empty_video(inputs):
    inputs["video_num_frames"] = torch.tensor([5, 0])


def a_negative_count(inputs):
    inputs["video_num_frames"] = torch.tensor([6, -1])


def counts_as_floats(inputs):
    inputs["video_num_frames"] = torch.tensor([3.0, 2.0])


def counts_of_rank_2(inputs):
    inputs["video_num_frames"] = torch.tensor([[3, 2]])


def no_counts(inputs):
    """One video of five frames would stand in two rows."""
    del inputs["video_num_frames"]


def counts_of_the_other_rows(inputs):
    inputs["video_num_frames"] = torch.tensor([2, 3])


def five_dimensions(inputs):
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][None]


def another_size(inputs):
    inputs["pixel_values_videos"] = torch.zeros(5, 3, 30, 33)


def channels_last(inputs):
    inputs["pixel_values"] = inputs["pixel_values"].permute(0, 2, 3, 1)


def bytes_instead_of_floats(inputs):
    inputs["pixel_values"] = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)


def a_list_of_pixels(inputs):
    inputs["pixel_values"] = inputs["pixel_values"].tolist()


def no_frames_at_all(inputs):
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:0]


def not_a_number(inputs):
    inputs["pixel_values_videos"][4, 1, 7, 9] = torch.nan


def infinite(inputs):
    inputs["pixel_values"][0, 0, 0, 0] = -torch.inf


def an_unknown_id(inputs):
    inputs["input_ids"][1, -1] = 131


def a_negative_id(inputs):
    inputs["input_ids"][0, 2] = -100


def an_unknown_form(inputs):
    inputs["cross_attention_cache"] = "values"


def longer_than_the_context(inputs):
    inputs["input_ids"] = nn.functional.pad(inputs["input_ids"], (0, 80), value=7)
    inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 80), value=1)


def encoded(**changes):
    """Two videos of 3 and 2 frames, as `get_video_features` returns them but for the changes."""
    fields = {"last_hidden_state": torch.zeros(5, 25, 20), "pooler_output": (torch.zeros(27, 48), torch.zeros(18, 48))}
    return BaseModelOutputWithPooling(**fields | changes)


def given_twice(inputs):
    inputs["mm_encoder_outputs"] = {"video": encoded()}


def given_encoded(**changes):
    def spoil(inputs):
        pixels_dropped(inputs)
        inputs["mm_encoder_outputs"] = {"video": encoded(**changes)}

    spoil.__name__ = "encoded_" + "_".join(changes)
    return spoil


def a_tensor_as_encoded(inputs):
    pixels_dropped(inputs)
    inputs["mm_encoder_outputs"] = {"video": torch.zeros(5, 25, 20)}


def an_unknown_modality(inputs):
    inputs["mm_encoder_outputs"] = {"audio": encoded()}


CASES = [
    (pixels_dropped, ValueError, "holds 45 video placeholders.*fill 0.*one call"),
    (image_dropped, ValueError, "holds 9 image placeholders.*fill 0"),
    (all_pixels_dropped, ValueError, "placeholders.*fill 0"),
    (a_frame_lost, ValueError, "holds 45 video.*fill 36"),
    (a_frame_too_many, ValueError, "holds 45 video.*fill 54"),
    (text_truncated, ValueError, "without truncation"),
    (text_within_a_frame, ValueError, r"9 placeholders of a frame must be consecutive.*frame 4 of this call"),
    (counts_that_do_not_add_up, ValueError, r"add up to the 5 frames.*got \[3, 3\]"),
    (an_empty_video, ValueError, r"positive.*got \[5, 0\]"),
    (a_negative_count, ValueError, r"positive.*got \[6, -1\]"),
    (counts_as_floats, ValueError, r"integers.*got \[3.0, 2.0\]"),
    (counts_of_rank_2, ValueError, r"\(videos,\).*got \[\[3, 2\]\]"),
    (no_counts, ValueError, r"45 placeholders of one video must be in one row.*rows \[0, 1\]"),
    (counts_of_the_other_rows, ValueError, r"27 placeholders of one video.*rows \[0, 1\]"),
    (five_dimensions, ValueError, r"`pixel_values_videos` must be \(frames, 3, 33, 33\).*got \(1, 5, 3, 33, 33\)"),
    (another_size, ValueError, r"got \(5, 3, 30, 33\)"),
    (channels_last, ValueError, r"`pixel_values` must be.*got \(1, 33, 33, 3\)"),
    (bytes_instead_of_floats, ValueError, "floats; got torch.uint8: use the processor"),
    (a_list_of_pixels, TypeError, "`pixel_values` must be a tensor; got list"),
    (no_frames_at_all, ValueError, r"got \(0, 3, 33, 33\)"),
    (not_a_number, ValueError, "`pixel_values_videos` must be finite"),
    (infinite, ValueError, "`pixel_values` must be finite"),
    (an_unknown_id, ValueError, "between 0 and 130.*got 131"),
    (a_negative_id, ValueError, "between 0 and 130.*got -100"),
    (an_unknown_form, ValueError, "'kv', 'features'; got 'values'"),
    (longer_than_the_context, ValueError, "context of 100 positions; got 127.*rope scaling"),
    (given_twice, ValueError, "Pass either .* not both"),
    (a_tensor_as_encoded, TypeError, "output of `get_video_features`; got Tensor"),
    (given_encoded(pooler_output=None), TypeError, "output of `get_video_features`"),
    (given_encoded(last_hidden_state=None), ValueError, r"\(5, 25, 20\); got None"),
    (given_encoded(last_hidden_state=torch.zeros(5, 25, 24)), ValueError, r"\(5, 25, 20\); got \(5, 25, 24\)"),
    (given_encoded(last_hidden_state=torch.zeros(4, 25, 20)), ValueError, r"\(5, 25, 20\); got \(4, 25, 20\)"),
    (given_encoded(pooler_output=(torch.zeros(45, 48),)), ValueError, "45 placeholders of one video"),
    (given_encoded(pooler_output=(torch.zeros(27, 48), torch.zeros(17, 48))), ValueError, "pooled tokens"),
    (an_unknown_modality, ValueError, "'video' and 'image'; got 'audio'"),
]
each_mistake = pytest.mark.parametrize(
    ("spoil", "error", "text"), CASES, ids=[f"{i}-{case[0].__name__}" for i, case in enumerate(CASES)]
)


@pytest.fixture(scope="module")
def shared_model():
    """Nothing may change it, so all tests may have the same."""
    return random_model(tiny_config(text_config={"max_position_embeddings": 100}))


@pytest.fixture
def idle_model(shared_model, monkeypatch):
    """A model in which no weight may be used, and that must come out as it went in."""

    def too_late(self, *args, **kwargs):
        raise AssertionError(f"{type(self).__name__} ran before the inputs were checked")

    before = {name: value.clone() for name, value in shared_model.state_dict().items()}
    settings = copy.deepcopy((shared_model.config.to_dict(), shared_model.generation_config.to_dict()))
    for kind in (nn.Linear, nn.Conv2d, nn.LayerNorm):
        monkeypatch.setattr(kind, "forward", too_late)
    yield shared_model
    assert (shared_model.config.to_dict(), shared_model.generation_config.to_dict()) == settings
    assert all(torch.equal(value, before[name]) for name, value in shared_model.state_dict().items())


def good_inputs(config):
    samples = (make_sample(config, *layout, seed=seed) for seed, layout in enumerate((FIRST, SECOND)))
    return model_inputs(*samples, padding_side="left")


@each_mistake
@pytest.mark.parametrize("call", ["forward", "generate", "beams", "no-cache", "chunks", "static"])
def test_a_mistake_is_told_before_any_work(call, spoil, error, text, idle_model):
    inputs = good_inputs(idle_model.config)
    spoil(inputs)
    kwargs = {
        "forward": {},
        "generate": {"max_new_tokens": 3},
        "beams": {"max_new_tokens": 3, "num_beams": 2},
        "no-cache": {"max_new_tokens": 3, "use_cache": False},
        "chunks": {"max_new_tokens": 3, "prefill_chunk_size": 7},
        "static": {"max_new_tokens": 3, "cache_implementation": "static"},
    }[call]
    function = idle_model if call == "forward" else idle_model.generate
    with pytest.raises(error, match=f"(?s){text}"):
        function(**inputs, **kwargs)


@pytest.fixture
def conversation(shared_model):
    """A cache that has seen a video, and the token ids so far (1, 37)."""
    inputs = model_inputs(make_sample(shared_model.config, *ONE_VIDEO))
    with torch.no_grad():
        return shared_model(**inputs, use_cache=True).past_key_values, inputs["input_ids"]


TURNS = [
    ((4, ("video", 2), 3), "video_num_frames", None, "18 video placeholders|new tokens hold 18 video"),
    ((4, ("video", 2), 3), "pixel_values_videos", torch.zeros(1, 3, 33, 33), "holds 18 video.*fill 9"),
    ((4, ("video", 2), 3), "pixel_values_videos", torch.full((2, 3, 33, 33), torch.nan), "finite"),
    ((9,), "pixel_values", torch.zeros(1, 3, 33, 33), "holds 0 image.*fill 9"),
    ((64,), "video_num_frames", None, "context of 100 positions; got 101"),
    ((5,), "cross_attention_cache", "features", "'kv'.*'features'"),
]


@pytest.mark.parametrize(("layout", "name", "value", "text"), TURNS, ids=range(len(TURNS)))
def test_a_mistake_in_a_later_turn_leaves_the_cache_as_it_was(layout, name, value, text, conversation, idle_model):
    cache, first_ids = conversation
    turn = make_sample(idle_model.config, *layout, seed=5)
    ids = torch.cat([first_ids, turn.token_ids[None]], dim=1)
    given = {name: value} if value is not None else {}
    before = snapshot(cache)
    with pytest.raises(ValueError, match=f"(?s){text}"):
        idle_model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2, **given)
    assert_unchanged(cache, before)
    if value is not None or len(turn.token_ids) > 40:
        with pytest.raises(ValueError, match=f"(?s){text}"):
            idle_model(input_ids=turn.token_ids[None], past_key_values=cache, **given)
        assert_unchanged(cache, before)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_static_cache_too_small_for_prompt_and_answer_is_refused(call, idle_model):
    """38 positions: 37 of the prompt and one for the first of two tokens written."""
    inputs = model_inputs(make_sample(idle_model.config, *ONE_VIDEO))
    length, kwargs = (36, {}) if call == "forward" else (37, {"max_new_tokens": 2})
    cache = StaticCache(config=idle_model.config.text_config, max_cache_len=length)
    function = idle_model if call == "forward" else idle_model.generate
    with pytest.raises(ValueError, match=f"holds {length} tokens; got {length + 1}.*larger"):
        function(**inputs, past_key_values=cache, **kwargs)
    assert not cache.is_initialized


def test_a_static_cache_that_just_fits_is_enough(shared_model):
    inputs = model_inputs(make_sample(shared_model.config, *ONE_VIDEO))
    cache = StaticCache(config=shared_model.config.text_config, max_cache_len=38)
    expected = shared_model.generate(**inputs, max_new_tokens=2)
    assert shared_model.generate(**inputs, past_key_values=cache, max_new_tokens=2).tolist() == expected.tolist()


@pytest.mark.parametrize("given", ["embeddings", "no-cache"])
def test_chunked_prefill_says_what_it_needs(given, idle_model):
    inputs = good_inputs(idle_model.config)
    kwargs = {"use_cache": False}
    if given == "embeddings":
        kwargs = {"inputs_embeds": idle_model.get_input_embeddings()(inputs.pop("input_ids")).detach()}
    with pytest.raises(ValueError, match="Chunked prefill needs `input_ids` and a cache"):
        idle_model.generate(**inputs, **kwargs, prefill_chunk_size=7, max_new_tokens=2)


def test_packed_samples_are_refused_when_they_have_media(idle_model, shared_model):
    """The second would see the first one's video. Padding, on either side, is no packing."""
    inputs = model_inputs(make_sample(idle_model.config, *ONE_VIDEO))
    positions = torch.cat([torch.arange(34), torch.arange(3)])[None]
    with pytest.raises(ValueError, match="a row must be one sample"):
        idle_model(**inputs, position_ids=positions)


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_positions_counted_from_the_mask_are_taken(padding_side, shared_model):
    samples = [make_sample(shared_model.config, *layout) for layout in (FIRST, SECOND)]
    inputs = model_inputs(*samples, padding_side=padding_side)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(inputs["attention_mask"] == 0, 0)
    logits = shared_model(**inputs, position_ids=positions).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], shared_model(**inputs).logits[real], rtol=1e-4, atol=1e-4)


def test_a_mask_that_does_not_cover_the_call_is_refused(idle_model):
    inputs = good_inputs(idle_model.config)
    inputs["attention_mask"] = inputs["attention_mask"][:, :-2]
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"`attention_mask` must cover the {length} tokens.*got {length - 2} columns"):
        idle_model(**inputs)


@pytest.mark.parametrize("mask", [{}, {"attention_mask": torch.ones(1, 3, dtype=torch.long)}], ids=["none", "short"])
def test_new_tokens_alone_need_a_mask_of_the_whole(mask, shared_model):
    inputs = model_inputs(make_sample(shared_model.config, *FIRST))
    cache = shared_model(**inputs, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"has seen {length} tokens, and the 3 given are not new"):
        shared_model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, max_new_tokens=2, **mask)
    whole = torch.ones(1, length + 3, dtype=torch.long)
    shared_model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, attention_mask=whole, max_new_tokens=2)


def test_ids_and_embeddings_together_or_neither_are_refused(idle_model):
    inputs = good_inputs(idle_model.config)
    embeds = idle_model.get_input_embeddings()(inputs["input_ids"]).detach()
    with pytest.raises(ValueError, match="exactly one"):
        idle_model(**inputs, inputs_embeds=embeds)
    del inputs["input_ids"]
    with pytest.raises(ValueError, match="exactly one"):
        idle_model(**inputs)


@pytest.mark.parametrize("name", ["pixel_values_videos", "pixel_values"])
def test_features_of_bad_pixels_are_refused(name, idle_model):
    encode = idle_model.get_video_features if name == "pixel_values_videos" else idle_model.get_image_features
    with pytest.raises(ValueError, match=f"`{name}` must be finite"):
        encode(torch.full((2, 3, 33, 33), torch.inf))
    with pytest.raises(ValueError, match=r"got \(0, 3, 33, 33\)"):
        encode(torch.zeros(0, 3, 33, 33))
