"""What a GPU would run: no tensor meets one of another device, and nothing waits that need not.

Without a GPU on pretended ones (`pretend_gpu.py`); the tests marked `gpu` run the same on a real one.
"""

import contextlib
from functools import partial

import pytest
import torch
from accelerate.utils import send_to_device
from transformers import DynamicCache, StaticCache

import flash_attn_stand_in
import pretend_gpu
from factories import random_model, tiny_config
from numerics import assert_close_to_scale, assert_no_worse_than
from pretend_gpu import pretend_gpus
from test_generation_crosslmm import lengths_run
from test_modeling_crosslmm import (
    BLOCKS,
    FLOAT32,
    INTERLEAVED,
    NORM_AND_TIME,
    in_dtype,
    make_sample,
    model_inputs,
    reference,
)
from transformers_crosslmm import attention_crosslmm, cross_attention_crosslmm, encode_video, generation_crosslmm
from transformers_crosslmm.attention_crosslmm import Segments
from transformers_crosslmm.cache_crosslmm import VisualMemory, memory_in
from transformers_crosslmm.dialect_crosslmm import CHECKPOINTING

FORMS = ("kv", "features")
MEDIA = ("pixel_values", "pixel_values_videos", "video_num_frames")
LAYERS = "model.language_model.layers"


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request):
    """A block in which there are GPUs."""
    return pretend_gpus if request.param == "pretended" else contextlib.nullcontext


def two_rows(config):
    samples = (make_sample(config, *INTERLEAVED), make_sample(config, 7, ("video", 4), 3, seed=2))
    return model_inputs(*samples, padding_side="left")


def moved(inputs, device="cuda", *, without=()):
    return {name: value if name in without else value.to(device) for name, value in inputs.items()}


# -- a pretended GPU refuses what a real one refuses ------------------------------------------------------------------


@torch.no_grad()
def test_tensors_of_two_devices_do_not_meet():
    with pretend_gpus() as traffic:
        here, there = torch.randn(5, 3), torch.randn(5, 3, device="cuda")
        rows = torch.tensor([4, 0])
        for refused in (
            lambda: here + there,
            lambda: there + there.to("cuda:1"),
            lambda: there.index_add(0, rows, there[:2]),
            lambda: torch.nn.functional.embedding(rows, there),
            lambda: there.masked_scatter(torch.ones(5, 1, dtype=torch.bool), there),
        ):
            with pytest.raises(RuntimeError, match="must be on one device"):
                refused()
        assert traffic.waits == traffic.uploads == []
        assert there[rows].device == torch.device("cuda", 0)  # indices may come from the CPU, and stop the GPU
        assert (there > 0).nonzero().tolist() == (there.cpu() > 0).nonzero().tolist()
        assert [note.split()[0] for note in traffic.uploads] == ["index"]
        assert [note.split()[0] for note in traffic.waits] == ["nonzero", "copy", "copy"]


def test_rows_left_on_the_cpu_are_found(monkeypatch):
    """A mistake planted in the package."""
    monkeypatch.setattr(Segments, "build", lambda groups, device, build=Segments.build: build(groups, "cpu"))
    monkeypatch.setattr(Segments, "to", lambda self, device: self)
    model = random_model(tiny_config())
    inputs = two_rows(model.config)
    with pretend_gpus(), pytest.raises(RuntimeError, match=r"index_add.*must be on one device"):
        model.to("cuda")(**moved(inputs))


# -- the same numbers -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stays", [(), MEDIA], ids=["", "pixels on the CPU"])
@pytest.mark.parametrize(
    ("attn_implementation", "scope"), [("eager", "video"), ("sdpa", "video"), ("sdpa", "frame"), ("sdpa", "causal")]
)
def test_a_forward_gives_what_it_gives_on_the_cpu(attn_implementation, scope, stays, gpu):
    config = tiny_config(text_config={"v2v_scope": scope, **NORM_AND_TIME})
    model = random_model(config, attn_implementation=attn_implementation)
    inputs = two_rows(config)
    expected = model(**inputs).logits
    with gpu():
        logits = model.to("cuda")(**moved(inputs, without=stays)).logits
        assert logits.is_cuda
        assert_close_to_scale(logits.cpu(), expected, relative=FLOAT32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_with_gates_in_float32_is_no_worse_than_the_formulas(form, dtype, gpu):
    model = random_model(tiny_config(text_config=NORM_AND_TIME)).to(dtype)
    for index in (0, 2, 4):
        for branch in model.get_submodule(f"{LAYERS}.{index}.cross_attention").children():
            if hasattr(branch, "gate"):
                branch.gate.float()
    sample = make_sample(model.config, *INTERLEAVED)
    inputs = in_dtype(model_inputs(sample), dtype)
    rounded = type(sample)(sample.token_ids, [(kind, frames.to(dtype)) for kind, frames in sample.media])
    exact, baseline = reference(model, rounded).logits, reference(model, rounded, dtype=dtype).logits
    with gpu():
        model, inputs = model.to("cuda"), moved(inputs)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        past = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], **inputs, cross_attention_cache=form)
        step = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=past.past_key_values)
        logits = torch.cat([past.logits, step.logits], dim=1)[0].cpu()
    assert_no_worse_than(logits, baseline, exact, factor=3.0)


def test_a_medium_on_the_cpu_is_asked_again_on_the_gpu(gpu):
    """Encoded in pieces as a file would be, kept in memory of the CPU, as on disk."""
    model = random_model(tiny_config())
    inputs = model_inputs(make_sample(model.config, 3, ("video", 9), 4))
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **options).tolist()
    with gpu():
        model = model.to("cuda")
        encoded = encode_video(model, inputs["pixel_values_videos"])
        assert encoded.last_hidden_state.is_cuda
        encoded.last_hidden_state = encoded.last_hidden_state.cpu()
        encoded.pooler_output = tuple(tokens.cpu() for tokens in encoded.pooler_output)
        ids = inputs["input_ids"].to("cuda")
        for form in FORMS:
            media = {"video": encoded}
            tokens = model.generate(ids, mm_encoder_outputs=media, cross_attention_cache=form, **options)
            assert tokens.tolist() == expected


@pytest.mark.parametrize(("attn_implementation", "is_cut"), [("sdpa", False), ("eager", True)])
def test_a_long_prompt_stays_whole_where_chunks_would_lose_the_fast_kernel(
    attn_implementation, is_cut, gpu, monkeypatch
):
    model = random_model(tiny_config(), attn_implementation=attn_implementation)
    inputs = model_inputs(make_sample(model.config, 3, ("video", 4), 4))
    options = {"max_new_tokens": 2, "do_sample": False}
    expected = model.generate(**inputs, **options).tolist()
    monkeypatch.setattr(generation_crosslmm, "PREFILL_TOKENS", 17)
    lengths = lengths_run(monkeypatch, model)
    with gpu():
        assert model.to("cuda").generate(**moved(inputs), **options).tolist() == expected
    assert lengths[0] == (17 if is_cut else inputs["input_ids"].shape[1])


WAYS = {
    "": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded_static": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 41},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_generation_writes_what_it_writes_on_the_cpu(way, form, gpu):
    model = random_model(tiny_config(text_config=NORM_AND_TIME))
    inputs = two_rows(model.config)
    options = {"max_new_tokens": 3, "do_sample": False, "cross_attention_cache": form}
    on_cpu = {name: value for name, value in WAYS[way].items() if name != "cache_implementation"}
    expected = model.generate(**inputs, **options, **on_cpu).tolist()
    with gpu():
        tokens = model.to("cuda").generate(**moved(inputs), **options, **WAYS[way])
        assert tokens.is_cuda
        assert tokens.tolist() == expected


@pytest.mark.parametrize("setting", ["plain", "checkpointed", "without media"])
def test_training_gives_the_gradients_of_the_cpu(setting, gpu):
    model = random_model(tiny_config(text_config=NORM_AND_TIME)).train()
    if setting == "checkpointed":
        getattr(model, f"{CHECKPOINTING}_enable")()
    inputs = model_inputs(make_sample(model.config, 11)) if setting == "without media" else two_rows(model.config)

    def gradients(inputs):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}

    expected = gradients(inputs)
    largest = max(gradient.abs().max() for gradient in expected.values())
    with gpu():
        model.to("cuda")
        for name, gradient in gradients(moved(inputs)).items():
            torch.testing.assert_close(gradient, expected[name], rtol=FLOAT32, atol=FLOAT32 * largest, msg=name)


@pytest.mark.gpu
def test_a_step_under_autocast_has_gradients_near_those_of_float32():
    """As training runs: float32 weights, bfloat16 products."""
    model = random_model(tiny_config(text_config=NORM_AND_TIME)).train().cuda()
    inputs = moved(two_rows(model.config))
    gradients = {}
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradients[enabled] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    largest = max(gradient.norm() for gradient in gradients[False].values())
    for name, exact in gradients[False].items():
        assert gradients[True][name].dtype == torch.float32
        assert (gradients[True][name] - exact).norm() <= 0.1 * exact.norm() + 1e-3 * largest, name


# -- kernels ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("has_flash_kernel", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_long_videos_use_the_flash_kernel_where_the_gpu_has_one(dtype, has_flash_kernel, monkeypatch):
    """Keys of two frames at a time. GPUs before Ampere have none for halves; nobody has one for float32."""
    for module in (attention_crosslmm, cross_attention_crosslmm):
        monkeypatch.setattr(module, "CHUNK_BYTES", (2 * 25 * 16 * 2 + 1) * dtype.itemsize)
    calls = []
    kernel, plain = pretend_gpu.flash_attention, attention_crosslmm._plain_attention
    operation = torch.ops.aten._scaled_dot_product_flash_attention.default
    monkeypatch.setitem(
        pretend_gpu.STAND_INS, operation, lambda *args, **kwargs: calls.append("flash") or kernel(*args, **kwargs)
    )
    monkeypatch.setattr(attention_crosslmm, "_plain_attention", lambda *args: calls.append("plain") or plain(*args))
    model = random_model(tiny_config()).to(dtype)
    sample = make_sample(model.config, *INTERLEAVED)
    inputs = in_dtype(model_inputs(sample), dtype)
    rounded = type(sample)(sample.token_ids, [(kind, frames.to(dtype)) for kind, frames in sample.media])
    exact, baseline = reference(model, rounded).logits, reference(model, rounded, dtype=dtype).logits
    with pretend_gpus(has_flash_kernel=has_flash_kernel):
        logits = model.to("cuda")(**moved(inputs)).logits[0].cpu()
    assert set(calls) == {"flash" if has_flash_kernel and dtype != torch.float32 else "plain"}
    assert_no_worse_than(logits, baseline, exact, factor=3.0)


@pytest.mark.parametrize("form", FORMS)
def test_flash_attention_2_gets_everything_on_the_gpu(form, monkeypatch):
    flash_attn_stand_in.install(monkeypatch, 2)
    dtype = torch.bfloat16
    model = random_model(tiny_config(), attn_implementation="flash_attention_2").to(dtype)
    inputs = in_dtype(two_rows(model.config), dtype)
    options = {"max_new_tokens": 2, "do_sample": False, "cross_attention_cache": form}
    expected = model.generate(**inputs, **options).tolist()
    with pretend_gpus():
        model, inputs = model.to("cuda"), moved(inputs)
        assert model.generate(**inputs, **options).tolist() == expected
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()


# -- two GPUs ---------------------------------------------------------------------------------------------------------


def spread(model) -> None:
    """Over two GPUs, as accelerate spreads a model: each part gets what it is called with on its own device, but for
    what the model asks to leave in its place."""
    places = {
        "model.vision_tower": "cuda:1",
        "model.multi_modal_projector": "cuda:0",
        "model.language_model.embed_tokens": "cuda:0",
        "model.language_model.rotary_emb": "cuda:0",
        "model.language_model.norm": "cuda:1",
        "lm_head": "cuda:1",
        **{f"{LAYERS}.{layer}": f"cuda:{int(layer > 1)}" for layer in range(5)},
    }

    def fetch(module, args, kwargs, place):
        return send_to_device((args, kwargs), place, skip_keys=model._skip_keys_device_placement)

    for name, place in places.items():
        part = model.get_submodule(name).to(place)
        part.register_forward_pre_hook(partial(fetch, place=place), with_kwargs=True)
    model.register_forward_pre_hook(partial(fetch, place="cuda:0"), with_kwargs=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_model_on_two_gpus_writes_what_it_writes_on_the_cpu(kind, form):
    model = random_model(tiny_config(text_config=NORM_AND_TIME))
    inputs = two_rows(model.config)
    options = {"max_new_tokens": 3, "do_sample": False, "cross_attention_cache": form, "disable_compile": True}
    expected = model.generate(**inputs, **options).tolist()
    with pretend_gpus():
        spread(model)
        tokens = model.generate(**moved(inputs, "cuda:0"), **options, cache_implementation=kind)
        assert tokens.tolist() == expected


@torch.no_grad()
def test_pixels_are_cast_pinned_and_uploaded_chunk_by_chunk(monkeypatch):
    model = random_model(tiny_config()).to(torch.bfloat16)
    frames = torch.randn(6, 3, 33, 33)
    expected = model.get_video_features(frames).last_hidden_state
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda chunk: pinned.append(chunk) or chunk)
    with pretend_gpus():
        model = model.to("cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = model.get_video_features(frames).last_hidden_state
        monkeypatch.undo()
        assert_close_to_scale(found.cpu().float(), expected.float(), relative=0.05)
    assert [(len(chunk), chunk.dtype, str(chunk.device)) for chunk in pinned] == [
        (4, torch.bfloat16, "cpu"),
        (2, torch.bfloat16, "cpu"),
    ]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_each_of_two_gpus_gets_one_copy_of_the_original_tokens(form, monkeypatch):
    """In the prefill, and with "features" for all steps together: not one per layer and step."""
    model = random_model(tiny_config(text_config=NORM_AND_TIME))
    seen: list[list[torch.Tensor]] = []
    for layer in BLOCKS:
        block = model.model.language_model.layers[layer].cross_attention
        block.register_forward_pre_hook(lambda block, inputs: seen[-1].append(inputs[1]))
    norms, norm_on = [], VisualMemory.norm_on
    monkeypatch.setattr(VisualMemory, "norm_on", lambda *args: norms.append(norm_on(*args)) or norms[-1])
    inputs = two_rows(model.config)
    with pretend_gpus():
        spread(model)
        inputs = moved(inputs, "cuda:0")
        cache = DynamicCache(config=model.config.text_config)
        seen.append([])
        model(**inputs, past_key_values=cache, cross_attention_cache=form)
        mask = inputs["attention_mask"]
        for _ in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            seen.append([])
            model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
        for states in seen if form == "features" else seen[:1]:
            assert [str(one.device) for one in states] == ["cuda:0", "cuda:1", "cuda:1"]
        everything = [one for states in seen for one in states if one is not None]
        assert len({id(one) for one in everything}) == 2
        assert len({id(norm) for norm in norms if norm is not None}) == 2


@torch.no_grad()
def test_segments_lie_on_the_gpu_of_the_layer_that_reads_them(monkeypatch):
    """Flash attention gets their ends from there; what the layers of one GPU share is not handed to the other."""
    places, attention = [], cross_attention_crosslmm.packed_attention

    def noted(function, module, query, key, value, segments):
        places.append((str(query.device), str(segments.ends([1]).device)))
        return attention(function, module, query, key, value, segments)

    monkeypatch.setattr(cross_attention_crosslmm, "packed_attention", noted)
    model = random_model(tiny_config())
    inputs = two_rows(model.config)
    with pretend_gpus():
        spread(model)
        model(**moved(inputs, "cuda:0"))
    assert set(places) == {("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")}


def test_a_model_on_two_gpus_trains():
    model = random_model(tiny_config()).train()
    inputs = two_rows(model.config)
    with pretend_gpus():
        spread(model)
        inputs = moved(inputs, "cuda:0")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for parameter in model.parameters():
            assert parameter.grad.device == parameter.device


# -- decoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_step_neither_waits_for_the_gpu_nor_uploads_to_it(kind, form):
    model = random_model(tiny_config(text_config=NORM_AND_TIME))
    inputs = two_rows(model.config)
    size = {"max_cache_len": 150} if kind is StaticCache else {}
    with pretend_gpus() as traffic:
        model, inputs = model.to("cuda"), moved(inputs)
        cache = kind(config=model.config.text_config, **size)
        model(**inputs, past_key_values=cache, cross_attention_cache=form)
        token, mask = inputs["input_ids"][:, :1], torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        traffic.clear()
        model(input_ids=token, attention_mask=mask, past_key_values=cache)
        # Transformers looks whether the mask masks anything, unless the cache's size says that it must.
        assert [note for note in traffic.waits if "masking_utils.py" not in note] == []
        assert traffic.uploads == []


@torch.no_grad()
def test_a_second_step_of_flash_attention_uploads_nothing(monkeypatch):
    """Where packed segments end is the same in every layer and step."""
    flash_attn_stand_in.install(monkeypatch, 2)
    dtype = torch.bfloat16
    model = random_model(tiny_config(), attn_implementation="flash_attention_2").to(dtype)
    inputs = in_dtype(two_rows(model.config), dtype)
    with pretend_gpus() as traffic:
        model, inputs = model.to("cuda"), moved(inputs)
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache, cross_attention_cache="kv")
        uploads = []
        for step in (1, 2):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1)
            traffic.clear()
            model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
            uploads.append(len(traffic.uploads))
    assert uploads == [2, 0]  # queries and keys


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_a_static_cache_makes_no_real_gpu_wait(form):
    model = random_model(tiny_config(text_config=NORM_AND_TIME)).cuda()
    inputs = moved(two_rows(model.config))
    cache = StaticCache(config=model.config.text_config, max_cache_len=150)
    model(**inputs, past_key_values=cache, cross_attention_cache=form)
    token, mask = inputs["input_ids"][:, :1], torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=token, attention_mask=mask, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("text", [{}, NORM_AND_TIME], ids=["paper", "recommended"])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_compiled_step_reads_of_videos_stays_in_place(form, text):
    """A CUDA graph would copy anything else in every step: with "features", all original tokens."""
    model = random_model(tiny_config(text_config={"num_hidden_layers": 1, **text}))
    inputs = model_inputs(make_sample(model.config, 3, ("video", 2), 4))
    cache = StaticCache(config=model.config.text_config, max_cache_len=150)
    model(**inputs, past_key_values=cache, cross_attention_cache=form)
    moving = []

    def look(graph, examples):
        for node in graph.graph.find_nodes(op="placeholder"):
            is_static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", ())
            if not is_static and isinstance(tensor := node.meta.get("example_value"), torch.Tensor):
                moving.append(tensor.shape)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model.forward, backend=look)(input_ids=torch.tensor([[5]]), past_key_values=cache)
    # Token and count; what decoding needs of a video is larger than either.
    assert [shape for shape in moving if shape.numel() > 1] == []


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_new_video_is_seen_by_layers_that_were_fetched_before_it_came(form, gpu):
    """An offloaded layer is on its way back while the one before it runs."""
    model = random_model(tiny_config())
    first = model_inputs(make_sample(model.config, 4, ("video", 3), 6))
    second = model_inputs(make_sample(model.config, 2, ("video", 2), 5, seed=3))
    step = {"input_ids": torch.tensor([[5]])}

    def conversation(device, *, offloading):
        model.to(device)
        cache = DynamicCache(config=model.config.text_config, offloading=offloading)
        calls = [moved(call, device) for call in (first, step, second, step)]
        for call in calls:
            call.pop("attention_mask", None)
        logits = [model(**call, past_key_values=cache, cross_attention_cache=form).logits for call in calls]
        assert memory_in(cache).num_patches == 5 * 25
        return [one.cpu() for one in logits]

    expected = conversation("cpu", offloading=False)
    with gpu():
        for logits, its in zip(conversation("cuda", offloading=True), expected, strict=True):
            assert_close_to_scale(logits, its, relative=FLOAT32)
