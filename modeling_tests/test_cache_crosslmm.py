"""What generation keeps: every kind of cache, cut, copied, reordered and continued, in both forms, and compiled."""

import copy
import weakref

import pytest
import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
)

from factories import random_model, tiny_config, traced
from numerics import assert_close_to_scale
from test_modeling_crosslmm import INTERLEAVED, NORM_AND_TIME, ONE_VIDEO, make_sample, model_inputs
from transformers_crosslmm.cache_crosslmm import Medium, VisualMemory

FORMS = ["kv", "features"]
BATCH = [ONE_VIDEO, INTERLEAVED, (9,)]
BLOCKS = (0, 2, 4)
each_form = pytest.mark.parametrize("form", FORMS)


def tiny_model(form="kv", **kwargs):
    return random_model(tiny_config(text_config={"cross_attention_cache": form, **NORM_AND_TIME}), **kwargs)


def batch_of(config, layouts):
    samples = [make_sample(config, *layout, seed=seed) for seed, layout in enumerate(layouts)]
    return model_inputs(*samples, padding_side="left")


@torch.no_grad()
def prefilled(model, inputs, cache=None):
    """The cache after a forward of `inputs`."""
    return model(**inputs, past_key_values=cache, use_cache=True).past_key_values


@torch.no_grad()
def full_logits(model, inputs, more_ids: Tensor) -> Tensor:
    """(B, n, V) of the tokens `more_ids` (B, n) behind the inputs, from one forward without a cache."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more_ids)], dim=1)
    ids = torch.cat([inputs["input_ids"], more_ids], dim=1)
    logits = model(**inputs | {"input_ids": ids, "attention_mask": mask}, use_cache=False).logits
    return logits[:, -more_ids.shape[1] :]


@torch.no_grad()
def cached_logits(model, cache, more_ids: Tensor, mask: Tensor | None = None, *, step: int = 1) -> Tensor:
    """The same from a cache, `step` tokens at a time. mask: (B, length) of what the cache holds."""
    if mask is None:
        mask = torch.ones(len(more_ids), int(cache.get_seq_length()), dtype=torch.long)
    logits = []
    for ids in more_ids.split(step, dim=1):
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


def more(num_rows: int, num_tokens: int = 4, seed: int = 9) -> Tensor:
    return torch.randint(1, 120, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))


# -- kinds ------------------------------------------------------------------------------------------------------------

KINDS = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(),
    "dynamic-config": lambda config: DynamicCache(config=config.text_config),
    "dynamic-whole-config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config.text_config, max_cache_len=110),
}


@each_form
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_a_cache_equals_the_full_forward(kind, step, form):
    model = tiny_model(form)
    inputs = batch_of(model.config, BATCH)
    given = KINDS[kind](model.config)
    cache = prefilled(model, inputs, given)
    assert given is None or cache is given
    assert len(cache) == len(cache.layers) == 5
    ids = more(3)
    logits = cached_logits(model, cache, ids, inputs["attention_mask"], step=step)
    assert_close_to_scale(logits, full_logits(model, inputs, ids), relative=1e-5)


@each_form
def test_a_quantised_cache_keeps_the_patches_as_they_are(form):
    """Transformers' own fp8 layers; what the text loses to them is small beside what the video says."""
    model = tiny_model(form)
    inputs = batch_of(model.config, [ONE_VIDEO])
    try:
        cache = QuantizedCache("fp8", model.config.text_config)
    except ValueError as error:
        pytest.skip(f"this release of Transformers has no such cache: {error}")
    ids = more(1)
    logits = cached_logits(model, prefilled(model, inputs, cache), ids)
    exact = full_logits(model, inputs, ids)
    assert (logits - exact).abs().max() < 0.25 * exact.abs().max()
    plain = prefilled(model, inputs)
    if form == "kv":
        for index in BLOCKS:
            torch.testing.assert_close(
                cache.layers[index].cross_keys, plain.layers[index].cross_keys, rtol=0.3, atol=0.3
            )
            assert cache.layers[index].cross_keys.dtype == torch.float32
    else:
        assert torch.equal(cache.layers[0].memory.states, plain.layers[0].memory.states)
    ids = model.generate(**inputs, max_new_tokens=5, past_key_values=QuantizedCache("fp8", model.config.text_config))
    assert ids.shape == (1, inputs["input_ids"].shape[1] + 5)


@pytest.mark.gpu
@each_form
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "static"])
def test_offloaded_and_compiled_caches_write_the_same_on_a_gpu(kind, form):
    model = tiny_model(form).cuda()
    inputs = {name: value.cuda() for name, value in batch_of(model.config, BATCH).items()}
    options = {"do_sample": False, "max_new_tokens": 9}
    expected = model.generate(**inputs, **options)
    for _ in range(2):
        assert model.generate(**inputs, **options, cache_implementation=kind).tolist() == expected.tolist()


def encoder_decoder(config):
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def too_few_layers(config):
    return StaticCache(config=tiny_config(text_config={"num_hidden_layers": 3}).text_config, max_cache_len=90)


def too_many_layers(config):
    return DynamicCache(config=tiny_config(text_config={"num_hidden_layers": 6}).text_config)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (encoder_decoder, TypeError, "EncoderDecoderCache.*Pass a DynamicCache"),
        (lambda config: ((torch.zeros(1, 2, 3, 8),) * 2,) * 5, TypeError, "tuple.*Pass a DynamicCache"),
        (lambda config: [], TypeError, "list"),
        (too_few_layers, ValueError, "model's 5; got 3"),
        (too_many_layers, ValueError, "model's 5; got 6"),
    ],
    ids=["encoder-decoder", "tuples", "list", "too-few", "too-many"],
)
def test_caches_that_cannot_carry_a_video_are_refused_before_any_work(make, error, text, call, monkeypatch):
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO])
    monkeypatch.setattr(model.model.vision_tower, "forward", None)  # calling it would be a TypeError of another text
    function = model.generate if call == "generate" else model
    with pytest.raises(error, match=text):
        function(**inputs, past_key_values=make(model.config))


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_features_keep_nothing_per_layer():
    caches = {form: prefilled(model, batch_of(model.config, BATCH)) for form in FORMS for model in [tiny_model(form)]}
    patches = (3 + 6 + 2) * 25
    for index, layer in enumerate(caches["features"].layers):
        kept = {name for name, value in vars(layer).items() if isinstance(value, Tensor)}
        assert kept == {"keys", "values"}
        assert hasattr(layer, "memory") is (index in BLOCKS)
    memories = {id(caches["features"].layers[index].memory) for index in BLOCKS}
    assert len(memories) == 1
    memory = caches["features"].layers[0].memory
    assert memory.states.shape == (patches, 20)

    for index in BLOCKS:
        layer = caches["kv"].layers[index]
        assert layer.cross_keys.shape == layer.cross_values.shape == (patches, 2, 8)
    assert caches["kv"].layers[0].memory.states is None


def test_a_cache_without_media_stays_as_it_is():
    model = tiny_model()
    cache = prefilled(model, model_inputs(make_sample(model.config, 6)))
    assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}


@each_form
def test_a_cache_keeps_its_form_and_refuses_the_other(form):
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO])
    other = FORMS[1 - FORMS.index(form)]
    with torch.no_grad():
        cache = model(**inputs, use_cache=True, cross_attention_cache=form).past_key_values
    before = snapshot(cache)
    with pytest.raises(ValueError, match=f"'{form}'.*'{other}'"):
        model(input_ids=more(1, 1), past_key_values=cache, cross_attention_cache=other)
    assert_unchanged(cache, before)
    cached_logits(model, cache, more(1))
    with pytest.raises(ValueError, match="'kv', 'features'; got 'both'"):
        model(**inputs, cross_attention_cache="both")


@each_form
def test_a_given_cache_is_filled_even_without_use_cache(form):
    """As Transformers' attention does; text and media must not part ways there."""
    model = tiny_model(form)
    inputs = batch_of(model.config, BATCH)
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=False)
    ids = more(3)
    logits = cached_logits(model, cache, ids, inputs["attention_mask"])
    assert_close_to_scale(logits, full_logits(model, inputs, ids), relative=1e-5)


# -- rows -------------------------------------------------------------------------------------------------------------


def select(cache):
    cache.batch_select_indices(torch.tensor([2, 0]))
    return [2, 0]


def select_by_mask(cache):
    cache.batch_select_indices(torch.tensor([False, True, True]))
    return [1, 2]


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    return [1, 1, 0]


def repeat(cache):
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


def repeat_then_reorder(cache):
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 3, 5, 4]))
    return [0, 0, 1, 1, 2, 2]


@each_form
@pytest.mark.parametrize("change", [select, select_by_mask, reorder, repeat, repeat_then_reorder])
def test_rows_keep_their_media(change, form):
    model = tiny_model(form)
    inputs = batch_of(model.config, BATCH)
    ids = more(3, 5)
    cache = prefilled(model, inputs)
    mask = inputs["attention_mask"]
    cached_logits(model, cache, ids[:, :2], mask)  # what was prepared for the old rows must be forgotten
    storage = visual_storage(cache)
    rows = change(cache)
    assert visual_storage(cache) == storage
    mask = torch.cat([mask, torch.ones_like(ids[:, :2])], dim=1)[rows]
    logits = cached_logits(model, cache, ids[rows, 2:], mask)
    assert_close_to_scale(logits, full_logits(model, inputs, ids)[rows, 2:], relative=1e-5)


def visual_storage(cache) -> list[int]:
    """Where the patches, or the keys and values made of them, lie."""
    layers = [cache.layers[index] for index in BLOCKS]
    tensors = [tensor for layer in layers for tensor in (layer.cross_keys, layer.cross_values) if tensor is not None]
    if cache.layers[0].memory.states is not None:
        tensors.append(cache.layers[0].memory.states)
    assert len(tensors) in (1, 6)
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


def test_a_cache_of_other_rows_is_refused(monkeypatch):
    model = tiny_model()
    cache = prefilled(model, batch_of(model.config, BATCH))
    monkeypatch.setattr(model.model.vision_tower, "forward", None)
    with pytest.raises(ValueError, match="media of 3 rows; got 2 rows"):
        model(input_ids=more(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="media of 3 rows; got 6 rows"):
        model.generate(more(3, 1), past_key_values=cache, num_beams=2)


# -- crop and reset ---------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("keep", [41, 39, 30, 29, 11, 3])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(keep, form):
    """11 text, a video from 11 to 29, 1 text, an image from 30 to 39, 5 text. Cut where no medium is cut."""
    model = tiny_model(form)
    sample = make_sample(model.config, 11, ("video", 2), 1, ("image", 1), 5)
    cache = prefilled(model, model_inputs(sample))
    cache.crop(keep - 44)
    media = [medium for medium, start in zip(sample.media, (11, 30), strict=True) if start < keep]
    expected_inputs = model_inputs(sample._replace(token_ids=sample.token_ids[:keep], media=media))
    ids = more(1)
    logits = cached_logits(model, cache, ids)
    assert_close_to_scale(logits, full_logits(model, expected_inputs, ids), relative=1e-5)
    kept = sum(len(frames) for _, frames in media) * 25
    memory = cache.layers[0].memory
    assert memory.num_patches == kept
    if form == "kv":
        assert all(cache.layers[index].num_cross_patches == kept for index in BLOCKS)
    else:
        assert len(memory.states) == kept


@each_form
def test_a_medium_that_began_before_the_cut_stays(form):
    """11 text and a video up to 29, cut at 20: what follows has lost pooled tokens, and still sees every patch."""
    model = tiny_model(form)
    sample = make_sample(model.config, 11, ("video", 2))
    inputs = model_inputs(sample)
    cache = prefilled(model, inputs)
    cache.crop(20 - 29)
    ids = more(1)
    mask = torch.ones(1, 33, dtype=torch.long)
    mask[:, 20:29] = 0  # as if they were padding, and what follows stood right behind the cut
    positions = torch.cat([torch.arange(29), torch.arange(20, 24)])[None]
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], ids], dim=1), "attention_mask": mask}
    with torch.no_grad():
        expected = model(**whole, position_ids=positions, use_cache=False).logits[:, 29:]
    assert_close_to_scale(cached_logits(model, cache, ids), expected, relative=1e-5)


@each_form
@pytest.mark.parametrize("scope", ["video", "frame", "causal"])
def test_a_video_may_come_where_another_was_cut(scope, form):
    """11 text and a video up to 29, cut at 20; then text, where pooled tokens stood, and another video. Beside it the
    same with what was cut as padding."""
    config = tiny_config(text_config={"cross_attention_cache": form, **NORM_AND_TIME, "v2v_scope": scope})
    model = random_model(config)
    first, second = make_sample(model.config, 11, ("video", 2)), make_sample(model.config, 12, ("video", 3), 4, seed=1)
    cache = prefilled(model, model_inputs(first))
    cache.crop(20 - 29)
    assert [len(medium.positions) for medium in cache.layers[0].memory.rows[0]] == [9]
    inputs, ids = model_inputs(second), more(1)
    mask = torch.ones(1, 20 + len(second.token_ids), dtype=torch.long)
    with torch.no_grad():
        prefill = model(**inputs | {"attention_mask": mask}, past_key_values=cache).logits
    logits = torch.cat([prefill, cached_logits(model, cache, ids)], dim=1)

    tokens = torch.cat([first.token_ids, second.token_ids, ids[0]])
    whole = model_inputs(first._replace(token_ids=tokens, media=first.media + second.media))
    whole["attention_mask"][:, 20:29] = 0
    positions = torch.cat([torch.arange(29), torch.arange(20, len(tokens) - 9)])[None]
    with torch.no_grad():
        expected = model(**whole, position_ids=positions, use_cache=False).logits[:, 29:]
    assert_close_to_scale(logits, expected, relative=1e-5)


@each_form
def test_after_a_crop_a_conversation_may_bring_another_video(form):
    """The second turn is taken back and another one, with another video, put in its place."""
    model = tiny_model(form)
    first = make_sample(model.config, *ONE_VIDEO)
    wrong, right = (make_sample(model.config, 2, ("video", 2), 3, seed=seed) for seed in (5, 6))
    cache = prefilled(model, model_inputs(first))
    length = len(first.token_ids)
    for turn in (wrong, right):
        cache.crop(length - cache.get_seq_length())
        inputs = model_inputs(turn)
        mask = torch.ones(1, length + len(turn.token_ids), dtype=torch.long)
        cache = prefilled(model, inputs | {"attention_mask": mask}, cache)
    ids = more(1)
    whole = first._replace(token_ids=torch.cat([first.token_ids, right.token_ids]), media=first.media + right.media)
    expected = full_logits(model, model_inputs(whole), ids)
    assert_close_to_scale(cached_logits(model, cache, ids), expected, relative=1e-5)


@each_form
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_is_as_new(kind, form):
    """It then takes another video, text alone, and the other form."""
    model = tiny_model(form)
    cache = KINDS[kind](model.config)
    other = FORMS[1 - FORMS.index(form)]
    for layouts, asked in ((BATCH, form), ([(9,)] * 3, form), ([INTERLEAVED] * 3, other)):
        inputs = batch_of(model.config, layouts)
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True, cross_attention_cache=asked)
        ids = more(3)
        logits = cached_logits(model, cache, ids, inputs["attention_mask"])
        assert_close_to_scale(logits, full_logits(model, inputs, ids), relative=1e-5)
        cache.reset()
        assert int(cache.get_seq_length()) == 0


def test_placeholders_without_media_are_refused_by_a_static_cache_that_was_reset():
    model = tiny_model()
    inputs = batch_of(model.config, [ONE_VIDEO])
    cache = KINDS["static"](model.config)
    prefilled(model, inputs, cache)
    cache.reset()
    with pytest.raises(ValueError, match="27 video placeholders"):
        model(input_ids=inputs["input_ids"], past_key_values=cache)


# -- forks ------------------------------------------------------------------------------------------------------------

QUESTIONS = [(5,), (2, ("image", 1), 4), (3, ("video", 2), 2)]


@each_form
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prefilled_video_is_forked_per_question(kind, form, monkeypatch):
    """System prompt and video run once. Each question costs its own tokens and shares the patches in memory."""
    model = tiny_model(form)
    prefix = make_sample(model.config, *ONE_VIDEO)
    cache = prefilled(model, model_inputs(prefix), KINDS[kind](model.config))
    storage, before = visual_storage(cache), snapshot(cache)
    options = {"do_sample": False, "max_new_tokens": 6}

    questions = [make_sample(model.config, *layout, seed=20 + i) for i, layout in enumerate(QUESTIONS)]
    expected, prompts = [], []
    for question in questions:
        ids = torch.cat([prefix.token_ids, question.token_ids])
        prompts.append({"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})
        whole = prefix._replace(token_ids=ids, media=prefix.media + question.media)
        expected.append(model.generate(**model_inputs(whole), **options))

    frames, positions, projected = [], [], []
    tower, layer = model.model.vision_tower, model.model.language_model.layers[2]
    tower.register_forward_pre_hook(lambda module, args: frames.append(len(args[0])))
    layer.mlp.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[1]))
    layer.cross_attention.t2v.k_proj.register_forward_pre_hook(lambda module, args: projected.append(len(args[0])))
    for question, prompt, fresh in zip(questions, prompts, expected, strict=True):
        fork = copy.deepcopy(cache)
        assert visual_storage(fork) == storage
        media = {name: value for name, value in model_inputs(question).items() if "pixel" in name or "frames" in name}
        ids = model.generate(**prompt, **media, past_key_values=fork, **options)
        assert ids.tolist() == fresh.tolist()
        assert positions == [len(question.token_ids)] + [1] * 5
        new_frames = sum(len(medium) for _, medium in question.media)
        assert sum(frames) == new_frames
        if form == "kv":
            assert sum(projected) == new_frames * 25
        if not new_frames:
            assert visual_storage(fork) == storage
            assert form == "kv" or not projected
        for counted in (frames, positions, projected):
            counted.clear()
    assert_unchanged(cache, before)
    assert visual_storage(cache) == storage


def test_a_second_video_keeps_no_copy_of_the_first_for_another_device():
    def memory_of(frame: Tensor) -> VisualMemory:
        return VisualMemory("features", 5, 1, rows=[[Medium([0], (0, 5))]], states=frame, num_patches=5)

    memory = memory_of(torch.ones(5, 3))
    first = weakref.ref(memory.states)
    memory.states_on(torch.device("meta"))
    memory.append(memory_of(torch.zeros(5, 3)))
    assert first() is None
    assert memory.states_on(torch.device("meta")).shape == (10, 3)


@each_form
def test_one_fork_may_be_cropped_or_reset_without_the_others(form):
    model = tiny_model(form)
    inputs = batch_of(model.config, [INTERLEAVED])
    cache = prefilled(model, inputs)
    ids = more(1)
    expected = full_logits(model, inputs, ids)
    cropped, emptied, repeated = (copy.deepcopy(cache) for _ in range(3))
    cropped.crop(-60)
    emptied.reset()
    repeated.batch_repeat_interleave(2)
    assert_close_to_scale(cached_logits(model, cache, ids), expected, relative=1e-5)
    twice = cached_logits(model, repeated, ids.repeat(2, 1))
    assert_close_to_scale(twice, expected.repeat(2, 1, 1), relative=1e-5)


@each_form
def test_a_prefilled_video_can_be_kept_on_disk(form, tmp_path):
    model = tiny_model(form)
    inputs = batch_of(model.config, BATCH)
    torch.save(prefilled(model, inputs), tmp_path / "prefix.pt")
    cache = torch.load(tmp_path / "prefix.pt", weights_only=False)
    ids = more(3)
    logits = cached_logits(model, cache, ids, inputs["attention_mask"])
    assert_close_to_scale(logits, full_logits(model, inputs, ids), relative=1e-5)
    assert len({id(cache.layers[index].memory) for index in BLOCKS}) == 1


@torch.no_grad()
@each_form
@pytest.mark.parametrize("length", [40, 4200])
def test_a_model_without_cross_attention_reads_its_prompt_in_chunks(length, form):
    """A prompt of over 4,096 tokens is cut unasked."""
    config = tiny_config(
        text_config={"max_position_embeddings": 8192, "num_hidden_layers": 2, "cross_attention_layers": []}
    )
    model = random_model(config)
    inputs = model_inputs(make_sample(config, length - 33, ("video", 3), 6))
    options = {"max_new_tokens": 3, "do_sample": False, "cross_attention_cache": form}
    expected = model.generate(**inputs, **options, use_cache=False)
    chunks = {"prefill_chunk_size": 7} if length < 4096 else {}
    assert model.generate(**inputs, **options, **chunks).tolist() == expected.tolist()
    other = inputs | {"pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    assert not torch.equal(model(**inputs).logits[:, -1], model(**other).logits[:, -1])


# -- static and compiled ----------------------------------------------------------------------------------------------


def test_generation_compiles_without_graph_breaks():
    """Traced by Dynamo with fullgraph=True, and run as traced; both forms of the cache go through one test below."""
    model = shallow_model("kv")
    inputs = batch_of(model.config, [INTERLEAVED, (9,), ONE_VIDEO])
    options = {"do_sample": False, "max_new_tokens": 5}
    expected = model.generate(**inputs, **options)
    options |= traced()
    assert model.generate(**inputs, **options).tolist() == expected.tolist()
    assert hasattr(model, "_compiled_call")
    assert model.generate(**inputs, **options, prefill_chunk_size=7).tolist() == expected.tolist()


@each_form
@pytest.mark.parametrize("with_gradients", [(True, False), (False, True), (False, False)], ids=str)
def test_a_video_may_come_with_and_without_gradients(with_gradients, form):
    """Without them original tokens are normalised where they are read, with them at once; a cache keeps to one."""
    model = tiny_model(form)
    turns = [batch_of(model.config, [(4, ("video", 3), 5)]), batch_of(model.config, [(2, ("video", 2), 3)])]
    cache, logits = DynamicCache(config=model.config.text_config), []
    for inputs, enabled in zip(turns, with_gradients, strict=True):
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        with torch.set_grad_enabled(enabled):
            logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
    logits.append(cached_logits(model, cache, more(1, 2)))
    whole = {name: torch.cat([turn[name] for turn in turns], dim=1) for name in ("input_ids", "attention_mask")}
    whole["input_ids"] = torch.cat([whole["input_ids"], more(1, 2)], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    whole |= {name: torch.cat([turn[name] for turn in turns]) for name in ("pixel_values_videos", "video_num_frames")}
    with torch.no_grad():
        assert_close_to_scale(torch.cat(logits, dim=1), model(**whole, use_cache=False).logits, relative=1e-5)


def shallow_model(form, **text):
    return random_model(tiny_config(text_config={"cross_attention_cache": form, "num_hidden_layers": 3, **text}))


@pytest.mark.parametrize("text", [{}, NORM_AND_TIME], ids=["paper", "recommended"])
@each_form
def test_two_graphs_decode_videos_of_any_length(form, text):
    """A step is one graph, used for all steps; a video of another length makes it dynamic, and that is all."""
    torch.compiler.reset()
    model = shallow_model(form, **text)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model.forward, backend=counting, fullgraph=True)
    mask = torch.ones(1, 110, dtype=torch.long)
    for num_frames in (1, 2, 4, 3, 7):
        inputs = batch_of(model.config, [(4, ("video", num_frames), 6)])
        ids = more(1, 3)
        expected = full_logits(model, inputs, ids)
        cache = prefilled(model, inputs, KINDS["static"](model.config))
        for index in range(3):
            with torch.no_grad():
                logits = step(input_ids=ids[:, index : index + 1], attention_mask=mask, past_key_values=cache).logits
            assert_close_to_scale(logits[:, 0], expected[:, index], relative=1e-5)
    assert len(graphs) == 2


@pytest.mark.slow
def test_a_compiled_forward_takes_media_of_changing_sizes():
    """With graph breaks where positions become Python numbers; another batch must not be answered by the first."""
    torch.compiler.reset()
    model = random_model(tiny_config(text_config={"num_hidden_layers": 1}, vision_feature_layer=1))
    compiled = torch.compile(model.forward, backend="eager")
    for layout in (ONE_VIDEO, (2, ("video", 2), 7)):
        inputs = batch_of(model.config, [layout])
        with torch.no_grad():
            assert_close_to_scale(compiled(**inputs).logits, model(**inputs).logits, relative=1e-5)


def test_a_forward_of_text_compiles_without_graph_breaks():
    torch.compiler.reset()
    model = shallow_model("kv")
    inputs = batch_of(model.config, [(9,), (5,)])
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(compiled(**inputs).logits, expected)
        inputs["input_ids"][1, 3] = 128
        with pytest.raises(RuntimeError, match="assertion failed"):
            compiled(**inputs)


# -- after errors -----------------------------------------------------------------------------------------------------


def snapshot(cache: Cache):
    layers = []
    for layer in cache.layers:
        state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(layer).items()}
        layers.append((type(layer), state))
    memory = cache.layers[0].memory
    return layers, memory, [list(row) for row in memory.rows], memory.num_patches, memory.states


def assert_unchanged(cache: Cache, before):
    layers, memory, rows, num_patches, states = before
    assert cache.layers[0].memory is memory
    assert memory.rows == rows
    assert memory.num_patches == num_patches
    assert memory.states is states
    assert memory.pooled is None
    for layer, (kind, state) in zip(cache.layers, layers, strict=True):
        assert type(layer) is kind
        assert vars(layer).keys() == state.keys()
        for name, value in state.items():
            now = vars(layer)[name]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now is value or now == value
