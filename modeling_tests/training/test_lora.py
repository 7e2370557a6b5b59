"""Adapters of `crosslmm_lora_config`: what they train, and that saving, reloading and merging change no answer."""

import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from factories import random_model, tiny_config
from numerics import assert_close_to_scale
from test_modeling_crosslmm import FLOAT32, make_sample, model_inputs
from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMModel, crosslmm_lora_config

peft = pytest.importorskip("peft")

SAMPLE = (4, ("video", 2), 3, ("image", 1), 6)


def load(folder, **kwargs) -> CrossLMMForConditionalGeneration:
    return CrossLMMForConditionalGeneration.from_pretrained(folder, **kwargs)


@pytest.fixture
def checkpoint(tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def inputs_of(model) -> dict[str, torch.Tensor]:
    return model_inputs(make_sample(model.config, *SAMPLE))


def train(model, *, steps: int = 3, learning_rate: float = 1e-2) -> nn.Module:
    """A few steps on one sample; every token is to be learned, so that nothing is idle."""
    inputs = inputs_of(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    model.train()
    for _ in range(steps):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**inputs_of(model)).logits


@pytest.mark.parametrize("build", [random_model, lambda config: CrossLMMModel(config)], ids=["whole", "base"])
def test_adapters_lie_on_the_language_model_and_nothing_of_the_encoder_trains(build):
    model = build(tiny_config())
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model.layers" in name
    }
    assert len(linear) == 5 * 7 + 3 * 2 * 4  # Qwen2's of five layers; two branches of three blocks
    tuned = peft.get_peft_model(model, crosslmm_lora_config(r=3))
    prefix = "base_model.model."
    adapted = {n.removeprefix(prefix) for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted == linear

    trained = {name.removeprefix(prefix) for name, p in tuned.named_parameters() if p.requires_grad}
    whole = {name for name in trained if "lora_" not in name}
    assert len([name for name in whole if ".gate." in name]) == 3 * 2
    assert len([name for name in whole if "multi_modal_projector." in name]) == 2 * 2
    assert len(whole) == 6 + 4
    assert not [name for name in trained if "vision_tower" in name]


def test_what_was_trained_survives_saving_reloading_and_merging(checkpoint, tmp_path):
    before = load(checkpoint).state_dict()
    tuned = train(peft.get_peft_model(load(checkpoint), crosslmm_lora_config(r=3, lora_alpha=6)))
    expected = logits(tuned)
    assert (expected - logits(load(checkpoint).eval())).abs().max() > 0.1
    tuned.save_pretrained(tmp_path / "adapter")

    # PEFT's way, and Transformers', which finds the base model by itself.
    again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    by_folder = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(by_folder), expected)

    merged = again.merge_and_unload()
    assert_close_to_scale(logits(merged), expected, relative=FLOAT32)
    assert merged.state_dict().keys() == before.keys()
    merged.save_pretrained(tmp_path / "merged")
    plain = load(tmp_path / "merged").eval()
    assert torch.equal(logits(plain), logits(merged))

    # Each part as it should be: the encoder, embeddings, norms and head untouched, everything else moved.
    for name, after in plain.state_dict().items():
        is_trained = name.endswith(("_proj.weight", ".gate.weight")) and "vision_tower" not in name
        is_trained |= "multi_modal_projector" in name
        assert torch.equal(after, before[name]) != is_trained, name


def test_answers_of_both_forms_of_the_cache_are_those_of_the_merged_model(checkpoint):
    tuned = train(peft.get_peft_model(load(checkpoint), crosslmm_lora_config(r=3)))
    inputs = inputs_of(tuned)
    answers = [
        tuned.generate(**inputs, max_new_tokens=5, do_sample=False, cross_attention_cache=form)
        for form in ("kv", "features")
    ]
    merged = tuned.merge_and_unload().generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(answers[0], merged)
    assert torch.equal(answers[1], merged)


def test_overrides_are_pefts_own_fields():
    config = crosslmm_lora_config(r=5, lora_dropout=0.25, modules_to_save=["t2v.gate"])
    assert (config.r, config.lora_dropout, config.modules_to_save) == (5, 0.25, ["t2v.gate"])
    tuned = peft.get_peft_model(random_model(tiny_config()), config)
    whole = [name for name, p in tuned.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(whole) == 3
    assert all("t2v.gate" in name for name in whole)


def test_a_missing_peft_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[train\]"'):
        crosslmm_lora_config()


def test_adapters_of_a_four_bit_model_train_save_reload_and_merge(tmp_path):
    """QLoRA: encoder, projector, cross-attention and head are not quantised; projector and gates are trained whole."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = tiny_config(  # bitsandbytes keeps 4-bit weights in blocks of 64
        text_config={"hidden_size": 192, "intermediate_size": 128},
        vision_config={"hidden_size": 64, "intermediate_size": 84},
    )
    random_model(config).save_pretrained(tmp_path / "blocks")

    def load_four_bits():
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = load(tmp_path / "blocks", quantization_config=quantisation, dtype=torch.bfloat16)
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    # One model for each use: for some CPUs the weights are packed for inference at the first call in eval mode, and
    # then they can neither train nor be merged.
    without = logits(load_four_bits().eval())
    tuned = train(peft.get_peft_model(load_four_bits(), crosslmm_lora_config(r=3)))
    quantised = [name for name, m in tuned.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 5 * 7
    assert all("language_model.layers" in name for name in quantised)
    expected = logits(tuned)
    assert (expected - without).abs().max() > 0.1
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_four_bits(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)

    merged = peft.PeftModel.from_pretrained(load_four_bits(), tmp_path / "adapter").merge_and_unload().eval()
    assert not [name for name in merged.state_dict() if "lora_" in name]
    # Each sum of weight and adapter is rounded to 4 bits again, so what was learned is kept only roughly.
    assert (logits(merged) - expected).abs().mean() < (without - expected).abs().mean() / 2
