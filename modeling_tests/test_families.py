"""Any language model: what holds for Qwen2 holds for each family, measured against Transformers' own class of it.

Each family differs from the others in something that the cross-attention must leave alone: norms of queries and keys,
heads of a width of their own, a sliding window, layers without positions, experts.
"""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from factories import random_model, tiny_config, traced
from numerics import assert_close_to_scale, assert_no_worse_than
from test_modeling_crosslmm import (
    FLOAT32,
    gradients,
    in_dtype,
    labelled,
    make_sample,
    model_inputs,
    reference,
    relative_change,
    set_gates,
    spliced_embeddings,
)
from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration
from transformers_crosslmm.checkpoints.export import export_with_code
from transformers_crosslmm.checkpoints.inspect import count_costs
from transformers_crosslmm.checkpoints.publish import is_untrained
from transformers_crosslmm.dialect_crosslmm import CACHE

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "llama": {},
    "mistral": {"head_dim": 10, "sliding_window": 7},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0]},
    "qwen3_moe": {"head_dim": 14, **EXPERTS},
}
FORMS = ("kv", "features")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_form = pytest.mark.parametrize("form", FORMS)

# Longer than Mistral's window, with text before, between and behind.
LAYOUT = (4, ("video", 2), 3, ("image", 1), 9)
BATCH = [LAYOUT, (3, ("video", 1), 12), (8,)]


def family_config(family: str, **overrides: Any) -> CrossLMMConfig:
    marks = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return tiny_config(text_config={"model_type": family, **marks, **FAMILIES.get(family, {})}, **overrides)


def family_model(family: str, **overrides: Any) -> CrossLMMForConditionalGeneration:
    return random_model(family_config(family, **overrides))


def plain_model(model: CrossLMMForConditionalGeneration) -> PreTrainedModel:
    """Transformers' own class with the language model's weights, and nothing of ours."""
    fields = model.config.text_config.to_dict()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    kernel = model.config.text_config._attn_implementation
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
    prefix = "model.language_model."
    weights = {name.replace(prefix, "model."): value for name, value in model.state_dict().items()}
    missing, _ = plain.load_state_dict(weights, strict=False)
    assert not missing
    assert type(plain).__module__.startswith("transformers.models.")
    return plain


def batch_of(config: CrossLMMConfig, *, padding_side: str = "left") -> dict[str, Tensor]:
    samples = [make_sample(config, *layout, seed=seed) for seed, layout in enumerate(BATCH)]
    return model_inputs(*samples, padding_side=padding_side)


# -- the language model stays what it is ------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_closed_gates_leave_the_language_model_bit_for_bit(family, padding_side):
    model = family_model(family)
    set_gates(model, 0.0)
    inputs = batch_of(model.config, padding_side=padding_side)
    embeds = spliced_embeddings(model, inputs)
    expected = plain_model(model)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(model(**inputs).logits, expected)


@each_family
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_text_alone_is_the_language_model_bit_for_bit(family, attn_implementation):
    model = random_model(family_config(family), attn_implementation=attn_implementation)
    inputs = model_inputs(make_sample(model.config, 7), make_sample(model.config, 21, seed=1), padding_side="left")
    plain = plain_model(model)
    assert plain.config._attn_implementation == attn_implementation
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("asked_by", ["the call", "the config"])
@torch.no_grad()
def test_experts_are_balanced_by_the_loss_of_their_own_model(asked_by):
    config = family_config("qwen3_moe")
    config.text_config.output_router_logits = asked_by == "the config"
    model = random_model(config)
    set_gates(model, 0.0)
    inputs = batch_of(model.config)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    embeds = spliced_embeddings(model, inputs)
    asking = {"output_router_logits": True} if asked_by == "the call" else {}
    mask = {"attention_mask": inputs["attention_mask"]}
    expected = plain_model(model)(inputs_embeds=embeds, labels=labels, **mask, **asking)
    found = model(**inputs, labels=labels, **asking)
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert torch.equal(found.loss, expected.loss)
    assert len(found.router_logits) == model.config.text_config.num_hidden_layers


# -- open gates -------------------------------------------------------------------------------------------------------


@each_family
@torch.no_grad()
def test_logits_equal_the_reference(family):
    model = family_model(family)
    sample = make_sample(model.config, *LAYOUT)
    exact = reference(model, sample).logits
    logits = model(**model_inputs(sample)).logits[0]
    assert_close_to_scale(logits, exact, relative=FLOAT32)
    assert_no_worse_than(logits, reference(model, sample, dtype=torch.float32).logits, exact, factor=4)
    set_gates(model, 0.0)
    assert relative_change(exact, model(**model_inputs(sample)).logits[0]) > 0.1


@each_family
@each_form
@torch.no_grad()
def test_decoding_from_a_cache_equals_the_full_forward(family, form):
    model = family_model(family)
    inputs = batch_of(model.config)
    expected = model(**inputs, use_cache=False).logits
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    start = ids.shape[1] - 6
    prefill = {"input_ids": ids[:, :start], "attention_mask": mask[:, :start], **inputs}
    cache = DynamicCache(config=model.config.text_config)
    logits = [model(**prefill, past_key_values=cache, cross_attention_cache=form).logits]
    for end in range(start + 1, ids.shape[1] + 1):
        step = {"input_ids": ids[:, end - 1 : end], "attention_mask": mask[:, :end], "past_key_values": cache}
        logits.append(model(**step).logits)
    is_token = mask.bool()
    assert_close_to_scale(torch.cat(logits, dim=1)[is_token], expected[is_token], relative=1e-5)


def without_cache(model: CrossLMMForConditionalGeneration, inputs: dict[str, Tensor], num_tokens: int) -> Tensor:
    """Greedy search by one whole forward per token."""
    inputs = dict(inputs)
    for _ in range(num_tokens):
        logits = model(**inputs, use_cache=False).logits[:, -1]
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], dim=1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return inputs["input_ids"]


@each_family
@each_form
@torch.no_grad()
def test_every_way_to_generate_writes_what_whole_forwards_write(family, form):
    model = family_model(family)
    options = {"do_sample": False, "max_new_tokens": 7, "cross_attention_cache": form}
    inputs = batch_of(model.config)
    expected = without_cache(model, inputs, 7).tolist()
    assert model.generate(**inputs, **options).tolist() == expected
    static = {"cache_implementation": "static", "disable_compile": True}
    assert model.generate(**inputs, **options, **static).tolist() == expected
    assert model.generate(**inputs, **options, prefill_chunk_size=8).tolist() == expected
    beams = {"num_beams": 3, "num_return_sequences": 2}  # two, of which one is not what greedy decoding writes
    found = model.generate(**inputs, **options, **beams).tolist()
    assert found == model.generate(**inputs, **options, **beams, use_cache=False).tolist()
    assert len({tuple(row) for row in found}) == 2 * len(expected)

    one = model_inputs(make_sample(model.config, *LAYOUT))
    expected = without_cache(model, one, 7).tolist()
    assert model.generate(**one, **options, assistant_model=plain_model(model)).tolist() == expected
    assert model.generate(**one, **options, prompt_lookup_num_tokens=3).tolist() == expected


@each_family
@each_form
@torch.no_grad()
def test_right_padded_rows_write_from_a_static_cache_what_they_write_from_a_dynamic_one(family, form):
    """The first token is chosen behind padding, which sees nothing in either."""
    model = family_model(family)
    inputs = batch_of(model.config, padding_side="right")
    assert not inputs["attention_mask"][:, -1].all()
    options = {"do_sample": False, "max_new_tokens": 4, "cross_attention_cache": form, "disable_compile": True}
    expected = model.generate(**inputs, **options, use_cache=False).tolist()
    for kind in ("dynamic", "static"):
        for chunk in (None, 6, 11):
            found = model.generate(**inputs, **options, cache_implementation=kind, prefill_chunk_size=chunk)
            assert found.tolist() == expected, (kind, chunk)


@each_family
def test_a_compiled_step_writes_the_same(family):
    model = family_model(family)
    inputs = batch_of(model.config)
    options = {"do_sample": False, "max_new_tokens": 4}
    expected = model.generate(**inputs, **options)
    options |= traced()
    assert model.generate(**inputs, **options).tolist() == expected.tolist()
    assert hasattr(model, "_compiled_call")


# -- training ---------------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointed_gradients_are_the_plain_ones(family, use_reentrant):
    # Experts have no float64.
    dtype, relative = (torch.float32, 1e-5) if "moe" in family else (torch.float64, 1e-12)
    model = family_model(family).to(dtype).train()
    inputs = in_dtype(labelled(model.config, LAYOUT, (3, ("video", 5), 6)), dtype)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.model.is_checkpointed
    found = gradients(model, inputs)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e3 * relative, atol=relative * largest, msg=name)


@each_family
def test_lora_trains_on_every_projection_and_merges(family):
    peft = pytest.importorskip("peft")
    model = family_model(family)
    target = r".*language_model.*[qkvo]_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=target, init_lora_weights=False)).train()
    inputs = labelled(model.config, LAYOUT)
    adapted(**inputs).loss.backward()
    # Nothing reads pooled tokens after the last layer.
    silent = [name for name, p in adapted.named_parameters() if p.requires_grad and not p.grad.any()]
    assert all(".layers.4.cross_attention.v2v." in name for name in silent)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**inputs).logits
        for form in FORMS:
            assert_close_to_scale(adapted(**inputs, cross_attention_cache=form).logits, expected, relative=1e-5)
        assert_close_to_scale(adapted.merge_and_unload()(**inputs).logits, expected, relative=1e-5)


@each_family
def test_every_rule_of_the_tensor_parallel_plan_matches_a_parameter(family):
    model = family_model(family)
    modules = dict(model.named_modules())
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules}
    own = {
        f"model.language_model.{rule.removeprefix('model.')}"
        for rule in plain_model(model)._tp_plan
        if rule != "lm_head"
    }
    assert set(model.tp_plan) - own <= names  # an own rule may be for layers that this one does not have
    assert own <= set(model.tp_plan)
    for branch in ("v2v", "t2v"):
        assert model.tp_plan[f"model.language_model.layers.*.cross_attention.{branch}.o_proj"] == "rowwise"


@each_family
def test_layers_are_never_split_over_devices(family):
    model = family_model(family)
    (layer_class,) = {type(layer).__name__ for layer in model.model.language_model.layers}
    assert layer_class.startswith("CrossLMM")
    assert layer_class in model._no_split_modules


# -- on disk and in copies --------------------------------------------------------------------------------------------


def numbers_of(model: CrossLMMForConditionalGeneration) -> dict[str, Any]:
    """The config without where it came from and the dtype that was loaded."""

    def cleaned(fields: dict[str, Any]) -> dict[str, Any]:
        fields = {name: value for name, value in fields.items() if name not in ("_name_or_path", "dtype")}
        return {name: cleaned(value) if isinstance(value, dict) else value for name, value in fields.items()}

    return cleaned(model.config.to_dict())


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(family, tied, dtype, tmp_path):
    config = family_config(family)
    config.tie_word_embeddings = tied
    model = random_model(config)
    for name, parameter in model.named_parameters():
        if not name.endswith("2v.gate.weight"):
            parameter.data = parameter.to(dtype)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(again.config.text_config) is type(config.text_config)
    assert numbers_of(again) == numbers_of(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(again.state_dict()[name], value), name
    inputs = in_dtype(batch_of(config), dtype)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@each_family
def test_only_the_gates_of_the_branches_count_as_gates(family, tmp_path):
    # The router of experts is called `gate`, too.
    config = family_config(family, untrained=True, dtype="bfloat16")
    model = random_model(config)
    set_gates(model, 0.0)
    model.save_pretrained(tmp_path)
    assert is_untrained(tmp_path, config)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert count_costs(config).weight_bytes == sum(p.numel() * p.element_size() for p in loaded.parameters())


@each_family
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@torch.no_grad()
def test_a_copy_answers_the_same(family, copied):
    model = family_model(family)
    inputs = batch_of(model.config)
    twin = copied(model)
    layers = model.model.language_model.layers, twin.model.language_model.layers
    assert all(one is not other and type(one) is type(other) for one, other in zip(*layers, strict=True))
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


REMOTE = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
sys.modules["transformers_crosslmm"] = None
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        found[folder] = [type(model).__module__.partition(".")[0], model(**inputs).logits[0, -1].tolist()]
print(json.dumps(found))
"""


def test_checkpoints_with_their_code_need_no_package(tmp_path):
    expected = {}
    for family in FAMILIES:
        model = family_model(family)
        model.save_pretrained(tmp_path / f"{family}-plain")
        folder = export_with_code(tmp_path / f"{family}-plain", tmp_path / family)
        inputs = model_inputs(make_sample(model.config, *LAYOUT))
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            expected[str(folder)] = model(**inputs).logits[0, -1].tolist()
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, *expected],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        folder: ["transformers_modules", logits] for folder, logits in expected.items()
    }


# -- what does not fit ------------------------------------------------------------------------------------------------

REFUSED = {
    "bert": "decoder with `layers`",
    "gpt2": "decoder with `layers`",
    "gpt_neox": "no self_attn",
    "olmo2": "no input_layernorm",
    "cohere": "no post_attention_layernorm",
    "phi": "no post_attention_layernorm",
    "granitemoe": "no mlp",
    "qwen3_next": "no self_attn",
    "gemma2": "has pre_feedforward_layernorm, post_feedforward_layernorm too",
    "gemma3_text": "has pre_feedforward_layernorm, post_feedforward_layernorm too",
    "glm4": "has post_self_attn_layernorm, post_mlp_layernorm too",
    "phi3": "has resid_attn_dropout, resid_mlp_dropout too",
    "stablelm": "has dropout too",
    "granite": "computes something else",
    "nanochat": "whose head is one matrix; that of NanoChatForCausalLM turns 100 into 15",
    "phimoe": "whose head is one matrix; that of PhimoeForCausalLM adds a bias",
}
EXTRA = {
    "granite": {"residual_multiplier": 0.22},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phimoe": {"num_local_experts": 2, "lm_head_bias": True},
    "qwen3_next": {"head_dim": 8},
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_the_block_does_not_fit_into_are_refused_by_what_is_missing(model_type):
    config = tiny_config(text_config={"model_type": model_type, "pad_token_id": 0, **EXTRA.get(model_type, {})})
    with torch.device("meta"), pytest.raises(ValueError, match=re.escape(REFUSED[model_type])) as refused:
        CrossLMMForConditionalGeneration(config)
    assert "Use a model such as" in str(refused.value)


@pytest.mark.parametrize("name", ["visual_context", CACHE])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_takes_keyword_arguments_and_drops_them_is_refused(name, device, monkeypatch):
    """Moshi does, in Transformers 5.19; it would answer without having seen the video."""
    forward = Qwen2DecoderLayer.__call__

    def without_it(layer, hidden_states, **kwargs):
        return forward(layer, hidden_states, **{key: value for key, value in kwargs.items() if key != name})

    monkeypatch.setattr(Qwen2DecoderLayer, "__call__", without_it)
    with torch.device(device), pytest.raises(ValueError, match=f"those of a Qwen2Model do not get {name}. Use"):
        CrossLMMForConditionalGeneration(family_config("qwen2"))
