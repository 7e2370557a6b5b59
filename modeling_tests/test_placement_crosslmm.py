"""Where weights live and in what form: offloaded, split over processes, adapted, quantised. The answer stays.

Quantised models run on the CPU where torchao or bitsandbytes is installed.
"""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, TorchAoConfig
from transformers.distributed import DistributedConfig

from factories import random_model, tiny_config
from numerics import assert_close_to_scale
from test_families import FAMILIES, family_config
from test_modeling_crosslmm import FLOAT32, make_sample, model_inputs
from transformers_crosslmm import CrossLMMForConditionalGeneration
from transformers_crosslmm.checkpoints.inspect import count_costs
from two_processes import run_on_two_ranks

SAMPLE = (4, ("video", 2), 3, ("image", 1), 6)
FORMS = ("kv", "features")


def load(folder, **kwargs) -> CrossLMMForConditionalGeneration:
    return CrossLMMForConditionalGeneration.from_pretrained(folder, **kwargs)


def sample_of(config) -> dict[str, Tensor]:
    return model_inputs(make_sample(config, *SAMPLE))


@torch.no_grad()
def last_three_logits(model, inputs: dict[str, Tensor], *, form: str | None = None) -> Tensor:
    """Of the last three tokens: in one forward of all, or, with a form of the cache, one token after the other."""
    if form is None:
        return model(**inputs).logits[:, -3:]
    inputs = dict(inputs)
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    past = model(input_ids=ids[:, :-3], **inputs, use_cache=True, cross_attention_cache=form).past_key_values
    steps = [model(input_ids=token, past_key_values=past).logits for token in ids[:, -3:].split(1, dim=1)]
    return torch.cat(steps, dim=1)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    random_model(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# -- device maps ------------------------------------------------------------------------------------------------------

LAYERS = "model.language_model.layers"
MAPS = {
    "encoder-on-disk": {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "cpu",
        "lm_head": "cpu",
    },
    "every-part-somewhere": {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "disk",
        "model.language_model.embed_tokens": "disk",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.norm": "disk",
        "lm_head": "disk",
        **{f"{LAYERS}.{layer}": "disk" if layer % 2 == 0 else "cpu" for layer in range(5)},
    },
    "auto": "auto",
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_weights_on_disk_give_the_same_answer(device_map, checkpoint, tmp_path):
    plain = load(checkpoint)
    kwargs = {"max_memory": {"cpu": plain.get_memory_footprint() // 2}} if device_map == "auto" else {}
    model = load(checkpoint, device_map=device_map, offload_folder=tmp_path / "offloaded", **kwargs)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    inputs = sample_of(plain.config)
    expected = last_three_logits(plain, inputs)
    for form in (None, *FORMS):
        assert_close_to_scale(last_three_logits(model, inputs, form=form), expected, relative=FLOAT32)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, cross_attention_cache=form)
        assert torch.equal(tokens, plain.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_layers_with_their_cross_attention_are_never_split(checkpoint):
    from accelerate import infer_auto_device_map

    model = load(checkpoint)
    layer_size = sum(p.numel() * 4 for p in model.model.language_model.layers[0].parameters())
    for budget in range(0, 12):
        memory = {"cpu": 1 + budget * layer_size // 2, "disk": 10**9}
        places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
        assert not [name for name in places if re.search(r"layers\.\d+\.", name) or ".embeddings." in name], places


@pytest.mark.gpu
def test_weights_on_the_cpu_give_the_same_answer_on_a_gpu(checkpoint):
    plain = load(checkpoint)
    memory = {0: plain.get_memory_footprint() // 2, "cpu": 10**9}
    model = load(checkpoint, device_map="auto", max_memory=memory)
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    inputs = sample_of(plain.config)
    expected = last_three_logits(plain, inputs)
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    for form in (None, *FORMS):
        assert_close_to_scale(last_three_logits(model, on_gpu, form=form).cpu(), expected, relative=FLOAT32)


# -- tensor parallel --------------------------------------------------------------------------------------------------


def test_every_rule_of_the_plan_names_a_module_and_every_projection_has_a_rule():
    model = random_model(tiny_config())
    general = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= general
    projections = {
        re.sub(r"\.\d+\.", ".*.", name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name
    }
    assert projections <= set(model.tp_plan)
    branches = {name: style for name, style in model.tp_plan.items() if "cross_attention" in name}
    assert {name.rpartition(".")[2]: style for name, style in branches.items()} == {
        "q_proj": "colwise",
        "k_proj": "colwise",
        "v_proj": "colwise",
        "o_proj": "rowwise",
    }


def compare_with_one_process(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    model = load(folder, distributed_config=DistributedConfig(tp_size=2))
    alone = load(folder)
    for branch in ("v2v", "t2v"):
        name = f"model.language_model.layers.2.cross_attention.{branch}.k_proj.weight"
        shared, whole = (each.get_parameter(name) for each in (model, alone))
        assert shared.to_local().shape[0] * 2 == whole.shape[0]  # one of two key heads
    inputs = sample_of(alone.config)
    expected = last_three_logits(alone, inputs)
    for form in (None, *FORMS):
        assert_close_to_scale(last_three_logits(model, inputs, form=form), expected, relative=FLOAT32)

    for each in (model, alone):
        each.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    largest = max(grad.norm() for grad in expected.values())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert (grad - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-5 * largest, name


@pytest.mark.parametrize(
    "family", [family if family == "qwen2" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_two_processes_that_share_the_heads_equal_one(tmp_path, family):
    """With an even vocabulary: before 5.20 Transformers divides the head's rows without a remainder."""
    config = family_config(family)
    config.text_config.vocab_size = 134
    random_model(config).save_pretrained(tmp_path / "checkpoint")
    run_on_two_ranks(compare_with_one_process, tmp_path, str(tmp_path / "checkpoint"))


# -- sharded training -------------------------------------------------------------------------------------------------


def test_sharding_in_bfloat16_gives_each_gate_a_group_of_its_own(checkpoint):
    """FSDP2 wants one dtype per group; where Transformers makes the groups, what stays in float32 is apart."""
    model = load(checkpoint, dtype=torch.bfloat16)
    if not hasattr(model, "_resolve_parallel_plans"):
        pytest.skip("this release of Transformers makes the groups elsewhere")
    plan = {"model.language_model.layers.*": "free_full_weight"}
    _, _, groups = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2, fsdp_plan=plan))
    gates = {name for name, module in model.named_modules() if name.endswith(".gate")}
    assert len(gates) == 6
    assert gates <= set(groups)
    assert {f"{LAYERS}.{layer}" for layer in range(5)} <= set(groups)


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapted(model, target: str = r".*(cross_attention|self_attn).*[qkvo]_proj"):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=target, init_lora_weights=False))


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_the_cache_look_through_adapters(form, checkpoint):
    plain = load(checkpoint)
    inputs = sample_of(plain.config)
    without = last_three_logits(plain, inputs)
    model = adapted(plain, r".*cross_attention.t2v.(k|v)_proj").eval()
    expected = last_three_logits(model, inputs)
    assert (expected - without).abs().max() > 0.1
    assert_close_to_scale(last_three_logits(model, inputs, form=form), expected, relative=FLOAT32)
    merged = model.merge_and_unload()
    assert_close_to_scale(last_three_logits(merged, inputs, form=form), expected, relative=FLOAT32)


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_the_cache_look_through_adapters_with_biases(form, checkpoint):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_bias": True, "init_lora_weights": False}
    target = r".*cross_attention.t2v.(k|v)_proj"
    model = peft.get_peft_model(load(checkpoint), peft.LoraConfig(target_modules=target, **options)).eval()
    inputs = sample_of(model.config)
    without = last_three_logits(model, inputs)
    biases = [value for name, value in model.named_parameters() if "lora_B" in name and name.endswith(".bias")]
    assert len(biases) == 6
    for bias in biases:
        bias.data.normal_()
    expected = last_three_logits(model, inputs)
    assert (expected - without).abs().max() > 0.1
    assert_close_to_scale(last_three_logits(model, inputs, form=form), expected, relative=FLOAT32)


OWN_LAYERS = r".*language_model.*self_attn.*[qkvo]_proj"
OTHERS = {
    "encoder": r".*vision_tower.*q_proj",
    "projector": r".*multi_modal_projector.linear_1",
    "cross-attention": r".*t2v.k_proj",
}


@torch.no_grad()
def test_each_row_has_an_adapter_of_its_own_in_the_layers_of_the_language_model(checkpoint):
    peft = pytest.importorskip("peft")
    model = adapted(load(checkpoint), OWN_LAYERS)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=OWN_LAYERS, init_lora_weights=False))
    model.eval()
    samples = [make_sample(model.config, *SAMPLE, seed=seed) for seed in (0, 1)]
    names = ["default", "second"]
    options = {"max_new_tokens": 4, "do_sample": False}
    logits = model(**model_inputs(*samples), adapter_names=names).logits
    tokens = model.generate(**model_inputs(*samples), adapter_names=names, **options)
    for row, (name, sample) in enumerate(zip(names, samples, strict=True)):
        model.set_adapter(name)
        assert_close_to_scale(logits[row], model(**model_inputs(sample)).logits[0], relative=FLOAT32)
        assert tokens[row].tolist() == model.generate(**model_inputs(sample), **options)[0].tolist()


@torch.no_grad()
def test_an_adapter_may_begin_within_a_row_in_the_layers_of_the_language_model(checkpoint):
    """aLoRA: before its invocation the base model, from there on the adapter."""
    peft = pytest.importorskip("peft")
    options = {"r": 3, "init_lora_weights": False, "task_type": "CAUSAL_LM", "target_modules": OWN_LAYERS}
    config = peft.LoraConfig(alora_invocation_tokens=[5, 6], **options)
    plain = load(checkpoint)
    sample = make_sample(plain.config, *SAMPLE)
    before = len(sample.token_ids)
    sample = sample._replace(token_ids=torch.cat([sample.token_ids, torch.tensor([5, 6, 9])]))
    expected = plain(**model_inputs(sample)).logits
    found = peft.get_peft_model(plain, config).eval()(**model_inputs(sample)).logits
    assert_close_to_scale(found[:, :before], expected[:, :before], relative=FLOAT32)
    assert (found[:, before:] - expected[:, before:]).abs().max() > 0.1


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("where", OTHERS)
def test_adapters_per_row_where_there_are_no_rows_are_refused_by_name(where, call, checkpoint):
    peft = pytest.importorskip("peft")
    model = adapted(load(checkpoint), OTHERS[where])
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=OTHERS[where]))
    model.eval()
    inputs = model_inputs(*(make_sample(model.config, *SAMPLE, seed=seed) for seed in (0, 1)))
    run = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=r"`adapter_names`.*Leave these out of `target_modules`"):
        run(**inputs, adapter_names=["default", "second"])
    options = {"r": 3, "task_type": "CAUSAL_LM", "target_modules": OTHERS[where]}
    model = peft.get_peft_model(load(checkpoint), peft.LoraConfig(alora_invocation_tokens=[5, 6], **options))
    with pytest.raises(ValueError, match=r"aLoRA.*Leave these out of `target_modules`"):
        (model if call == "forward" else model.generate)(**inputs)
    text = model_inputs(*(make_sample(model.config, 9, seed=seed) for seed in (0, 1)))
    assert model(**text).logits.isfinite().all()


def test_gates_can_be_trained_and_saved_beside_adapters(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, target_modules=r".*language_model.*(q|v)_proj", modules_to_save=["gate"], init_lora_weights=False
    )
    model = peft.get_peft_model(load(checkpoint), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                assert parameter.requires_grad
                parameter.fill_(0.3)
    inputs = sample_of(model.config)
    expected = last_three_logits(model.eval(), inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter").eval()
    gates = [parameter for name, parameter in again.named_parameters() if "gate.modules_to_save" in name]
    assert [gate.item() for gate in gates] == [pytest.approx(0.3)] * 6
    assert_close_to_scale(last_three_logits(again, inputs), expected, relative=FLOAT32)


# -- quantised --------------------------------------------------------------------------------------------------------


def quantisation(name: str, **kwargs):
    """A config that says no more than how: 8 bits by torchao or bitsandbytes, or 4 bits."""
    from transformers import BitsAndBytesConfig

    if name == "torchao-int8":
        config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        return TorchAoConfig(config, **kwargs)
    pytest.importorskip("bitsandbytes")
    if name == "bitsandbytes-int8":
        return BitsAndBytesConfig(load_in_8bit=True, **kwargs)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)


# How far rounding weights (and, by bitsandbytes' int8, inputs) may move the largest logit of five random layers.
PRECISION = {"torchao-int8": 0.05, "bitsandbytes-int8": 0.08, "bitsandbytes-nf4": 0.5}


def config_of_whole_blocks():
    """bitsandbytes keeps 4-bit weights in blocks of 64."""
    return tiny_config(
        text_config={"hidden_size": 192, "intermediate_size": 128},
        vision_config={"hidden_size": 64, "intermediate_size": 84},
    )


def is_quantised(module) -> bool:
    names = type(module).__name__, type(module.weight).__name__
    return names[0] in ("Linear8bitLt", "Linear4bit") or names[1] == "Int8Tensor"


@pytest.fixture
def blocks(tmp_path) -> Path:
    random_model(config_of_whole_blocks()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRECISION)
def test_a_quantised_model_answers_alike_with_both_forms_of_the_cache(name, dtype, blocks, tmp_path):
    plain = load(blocks)
    inputs = sample_of(plain.config)
    expected = last_three_logits(plain, inputs)
    model = load(blocks, quantization_config=quantisation(name), dtype=dtype)
    model.save_pretrained(tmp_path / "quantised")  # before the first forward: on CPUs bitsandbytes packs weights there
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    whole = last_three_logits(model, inputs).float()
    assert_close_to_scale(whole, expected, relative=PRECISION[name])
    assert not torch.equal(whole, expected)
    for form in FORMS:
        assert_close_to_scale(last_three_logits(model, inputs, form=form).float(), whole, relative=0.05)

    quantised = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    left = {name for name in quantised if not is_quantised(model.get_submodule(name))}
    projector = {f"model.multi_modal_projector.linear_{number}" for number in (1, 2)}
    by_pixels = {name for name in quantised if "vision_tower" in name or "cross_attention" in name}
    assert left == {"lm_head"} | projector | by_pixels
    for parameter_name, parameter in model.named_parameters():
        if "gate.weight" in parameter_name and ".gate." in parameter_name:
            assert parameter.dtype == torch.float32, parameter_name
        elif "norm" in parameter_name or "vision_tower" in parameter_name:
            assert parameter.dtype == dtype, parameter_name

    again = load(tmp_path / "quantised", dtype=dtype)
    assert_close_to_scale(last_three_logits(again, inputs).float(), whole, relative=0.05)
    assert not is_quantised(again.lm_head)
    assert not is_quantised(again.model.vision_tower.encoder.layers[0].mlp.fc1)


@pytest.mark.parametrize("base", [True, False], ids=["base", "whole"])
def test_a_quantisation_that_names_modules_to_skip_is_obeyed(base, blocks):
    model_class = CrossLMMForConditionalGeneration
    if base:
        from transformers_crosslmm import CrossLMMModel as model_class
    given = quantisation("torchao-int8", modules_to_not_convert=[r".*language_model", "lm_head"])
    model = model_class.from_pretrained(blocks, quantization_config=given)
    tower, text = (getattr(getattr(model, "model", model), part) for part in ("vision_tower", "language_model"))
    assert is_quantised(tower.encoder.layers[0].mlp.fc1)
    assert not is_quantised(text.layers[0].mlp.up_proj)
    assert given.modules_to_not_convert == [r".*language_model", "lm_head"]


def test_the_encoder_of_a_base_model_is_left_alone_too(blocks):
    from transformers_crosslmm import CrossLMMModel

    given = quantisation("torchao-int8")
    model = CrossLMMModel.from_pretrained(blocks, quantization_config=given)
    assert not is_quantised(model.vision_tower.encoder.layers[0].mlp.fc1)
    assert not is_quantised(model.language_model.layers[0].cross_attention.t2v.k_proj)
    assert is_quantised(model.language_model.layers[0].self_attn.k_proj)
    assert given.modules_to_not_convert is None, "the caller's own config was changed"


@pytest.mark.parametrize("load_with", [CrossLMMForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize("name", PRECISION)
def test_a_quantisation_given_as_a_dict_leaves_alone_what_the_object_does(name, load_with, blocks):
    given = quantisation(name).to_dict()
    before = copy.deepcopy(given)
    model = load_with.from_pretrained(blocks, quantization_config=given, dtype=torch.bfloat16)
    expected = load(blocks, quantization_config=quantisation(name), dtype=torch.bfloat16)
    for parameter_name, module in expected.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert is_quantised(module) == is_quantised(model.get_submodule(parameter_name)), parameter_name
    inputs = sample_of(model.config)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    assert torch.equal(last_three_logits(model.eval(), inputs), last_three_logits(expected, inputs))
    assert given == before, "the caller's own dict was changed"


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_the_counted_bytes_of_a_quantised_model_are_those_of_the_real_one(name, blocks):
    if name == "nf4":
        given = quantisation("bitsandbytes-nf4")
    else:
        torchao = pytest.importorskip("torchao.quantization")
        kinds = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}
        given = TorchAoConfig(kinds[name]())
    model = load(blocks, quantization_config=given, dtype=torch.bfloat16)
    real = 0
    for tensor in model.state_dict().values():
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        real += sum(getattr(tensor, part).nbytes for part in parts) if parts else tensor.nbytes
    counted = count_costs(model.config, quantization=name).weight_bytes
    assert counted == pytest.approx(real, rel=0.01)
    assert counted < 0.9 * count_costs(model.config).weight_bytes


def test_adapters_train_on_a_four_bit_model(blocks):
    """As QLoRA does it: everything that is not quantised in float32, the products in bfloat16."""
    config = quantisation("bitsandbytes-nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = load(blocks, quantization_config=config, dtype=torch.bfloat16)
    peft = pytest.importorskip("peft")
    tuned = adapted(peft.prepare_model_for_kbit_training(model)).train()
    inputs = sample_of(model.config)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())
    assert all(grad.any() for name, grad in grads.items() if ".t2v." in name)
    whole = last_three_logits(tuned.eval(), inputs)
    for form in FORMS:
        assert_close_to_scale(last_three_logits(tuned, inputs, form=form), whole, relative=0.05)
