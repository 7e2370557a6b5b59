"""Checkpoints: what is written, what is read, what is said about the difference, and how the rest is initialised."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, Qwen2Model, SiglipVisionModel

from factories import random_model, tiny_config
from test_modeling_crosslmm import make_sample, model_inputs
from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration, CrossLMMModel

SAMPLE = (4, ("video", 2), 3, ("image", 1), 5)


def logits(model, inputs=None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or model_inputs(make_sample(model.config, *SAMPLE)))).logits


def load(folder, **kwargs):
    return CrossLMMForConditionalGeneration.from_pretrained(folder, **kwargs)


def rewrite(folder, change) -> None:
    """Applies `change` to the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_checkpoint_is_safetensors_alone_and_gives_the_same_logits(tied, max_shard_size, tmp_path):
    model = random_model(tiny_config(text_config={"tie_word_embeddings": tied}))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    others = {path.name for path in tmp_path.iterdir()} - {path.name for path in shards}
    index = {"model.safetensors.index.json"} if len(shards) > 1 else set()
    assert (len(shards) > 3) == (max_shard_size == "40KB")
    assert others == {"config.json", "generation_config.json"} | index

    saved = {name for shard in shards for name in load_file(shard)}
    assert saved == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())

    loaded, info = load(tmp_path, output_loading_info=True)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    assert torch.equal(logits(loaded), logits(model))
    is_shared = loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert is_shared == tied


def test_a_checkpoint_names_the_classes_that_read_it(tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["CrossLMMForConditionalGeneration"]
    assert config["model_type"] == "crosslmm"
    assert "auto_map" not in config
    assert "custom_pipelines" not in config


@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"], ids=["whole", "sharded"])
def test_the_base_model_reads_the_checkpoint_of_the_whole_and_the_other_way_round(max_shard_size, tmp_path):
    model = random_model(tiny_config(text_config={"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path / "whole", max_shard_size=max_shard_size)
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert isinstance(base, CrossLMMModel)
    base.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
    assert torch.equal(logits(load(tmp_path / "base")), logits(model))


def test_a_state_dict_in_memory_needs_no_folder():
    model = random_model(tiny_config())
    loaded = load(None, config=tiny_config(), state_dict=model.state_dict())
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_is_read_in_the_dtype_asked_for_with_gates_in_float32(dtype, tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    gates = {name for name, _ in loaded.named_parameters() if name.endswith("gate.weight")}
    assert len(gates) == 6
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if name in gates else dtype), name
    loaded.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again", dtype="auto").dtype == dtype


# -- keys that do not fit ---------------------------------------------------------------------------------------------


def test_missing_unexpected_and_mismatched_keys_are_reported_by_name(tmp_path, caplog, monkeypatch):
    random_model(tiny_config()).save_pretrained(tmp_path)
    missing = "model.language_model.layers.2.cross_attention.t2v.gate.weight"
    unexpected = "model.language_model.layers.1.cross_attention.t2v.gate.weight"
    mismatched = "model.multi_modal_projector.linear_1.weight"

    def change(tensors):
        tensors[unexpected] = tensors.pop(missing)
        tensors[mismatched] = torch.zeros(48, 21)

    rewrite(tmp_path, change)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)
    assert all(key in caplog.text for key in (missing, unexpected, mismatched))
    _, info = load(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert set(info["missing_keys"]) == {missing}
    assert set(info["unexpected_keys"]) == {unexpected}
    assert {key for key, *_ in info["mismatched_keys"]} == {mismatched}


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_a_whole_encoder_may_be_loaded_without_a_word_about_what_is_not_built(layer, tmp_path):
    config = tiny_config(vision_feature_layer=layer)
    model = random_model(config)
    model.save_pretrained(tmp_path)
    whole = SiglipVisionModel(tiny_config(vision_config={"num_hidden_layers": 12}).vision_config).state_dict()
    spare = {f"model.vision_tower.{name}": value for name, value in whole.items() if name.startswith("post_layernorm")}
    spare["model.vision_tower.head.probe"] = torch.zeros(1, 1, 20)
    built = config.num_vision_blocks
    blocks = {f"model.vision_tower.{name}": value for name, value in whole.items() if name.startswith("encoder.")}
    spare |= {name: value for name, value in blocks.items() if built <= int(name.split(".")[4]) < 3}
    rewrite(tmp_path, lambda tensors: tensors.update(spare))
    _, info = load(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]

    foreign = "model.vision_tower.encoder.layers.11.layer_norm1.weight"  # the config knows of 3 blocks
    rewrite(tmp_path, lambda tensors: tensors.update({foreign: blocks[foreign]}))
    _, info = load(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {foreign}


def test_branches_that_are_turned_off_are_reported_when_a_checkpoint_has_them(tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path)
    _, info = load(tmp_path, config=tiny_config(text_config={"use_v2v": False}), output_loading_info=True)
    assert len(info["unexpected_keys"]) == 3 * 5
    assert all(".v2v." in name for name in info["unexpected_keys"])


# -- initialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_tensor_is_left_as_memory_was_when_the_checkpoint_lacks_it(tied, tmp_path, monkeypatch):
    config = tiny_config(text_config={"tie_word_embeddings": tied, "gate_init": 0.75})
    like = torch.empty_like

    def poisoned(tensor, **kwargs):
        value = like(tensor, **kwargs)
        return value.fill_(float("nan") if value.is_floating_point() else -(10**9))

    monkeypatch.setattr(torch, "empty_like", poisoned)
    model, info = load(None, config=config, state_dict={"lm_head.spare": torch.zeros(1)}, output_loading_info=True)
    monkeypatch.undo()
    expected = model.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    assert expected <= set(info["missing_keys"])

    fresh = CrossLMMForConditionalGeneration(config)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = {name: tensor.shape for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]}
    assert {name: tensor.shape for name, tensor in tensors} == shapes
    for name, tensor in tensors:
        assert tensor.device.type == "cpu"
        assert not tensor.isnan().any(), name
        if name.endswith("gate.weight"):
            assert tensor.tolist() == [0.75]
        elif not tensor.is_floating_point():
            assert torch.equal(tensor, fresh.get_buffer(name)), name
        elif "norm" in name:
            assert set(tensor.unique().tolist()) == {1.0 if name.endswith("weight") else 0.0}, name
        elif "language_model" in name and tensor.ndim == 2:
            assert tensor.std().item() == pytest.approx(config.text_config.initializer_range, rel=0.2), name
        elif tensor.ndim > 1:
            assert tensor.std() > 0, name
    assert torch.isfinite(logits(model)).all()


def test_a_model_can_be_built_without_memory():
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration(tiny_config())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    outputs = model(input_ids=torch.ones(1, 7, dtype=torch.long, device="meta"))
    assert outputs.logits.shape == (1, 7, 131)
    # The paper's own size, to be counted.
    with torch.device("meta"):
        large = CrossLMMForConditionalGeneration(CrossLMMConfig.from_preset("7B"))
    assert 8.40e9 < sum(parameter.numel() for parameter in large.parameters()) < 8.41e9


def test_the_text_model_alone_can_be_saved_and_loaded(tmp_path):
    text = random_model(tiny_config()).model.language_model
    text.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is Qwen2Model
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).last_hidden_state, text(input_ids=ids).last_hidden_state)


# -- the vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary_reaches_head_config_and_checkpoint(tied, tmp_path):
    model = random_model(tiny_config(text_config={"tie_word_embeddings": tied}))
    inputs = model_inputs(make_sample(model.config, *SAMPLE))
    before = logits(model, inputs)
    model.resize_token_embeddings(140, mean_resizing=False)
    after = logits(model, inputs)
    assert after.shape[-1] == 140
    assert torch.equal(after[..., :131], before)
    assert model.config.text_config.vocab_size == model.vocab_size == 140
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    inputs["input_ids"][0, 0] = 139
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), inputs), logits(model, inputs))


# -- one tensor or two ------------------------------------------------------------------------------------------------


def untie_at_the_top(folder):
    return load(folder, tie_word_embeddings=False)


def untie_in_the_text_config(folder):
    return load(folder, text_config={"tie_word_embeddings": False})


def untie_by_a_config(folder):
    config = CrossLMMConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    return load(folder, config=config)


def untie_after_loading(folder):
    model = load(folder)
    model.config.tie_word_embeddings = False
    return model


def untie_the_text_config_after_loading(folder):
    model = load(folder)
    model.config.text_config.tie_word_embeddings = False
    return model


def tie_after_loading(folder):
    model = load(folder)
    model.config.tie_word_embeddings = True
    return model


def then_resize(change):
    def changed(folder):
        model = change(folder)
        model.resize_token_embeddings(140, mean_resizing=False)
        return model

    changed.__name__ = f"{change.__name__} and resize"
    return changed


def give_the_head_a_tensor_of_its_own(folder):
    """Without a word to the config."""
    model = load(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    return model


def with_ends_trained_by_peft(*modules):
    def change(folder):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=r".*self_attn.q_proj", modules_to_save=list(modules))
        model = peft.get_peft_model(load(folder), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter))
        expected = logits(model.eval())
        model = model.merge_and_unload()
        torch.testing.assert_close(logits(model), expected)
        return model

    change.__name__ = f"train {' and '.join(modules)} by PEFT"
    return change


CHANGES = [
    untie_at_the_top,
    untie_in_the_text_config,
    untie_by_a_config,
    untie_after_loading,
    untie_the_text_config_after_loading,
    then_resize(untie_after_loading),
    tie_after_loading,
    then_resize(tie_after_loading),
    give_the_head_a_tensor_of_its_own,
    with_ends_trained_by_peft("lm_head"),
    with_ends_trained_by_peft("embed_tokens"),
    with_ends_trained_by_peft("embed_tokens", "lm_head"),
]


@pytest.mark.parametrize("whole", [True, False], ids=["own", "given"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_whatever_was_saved_loads_with_its_weights_and_its_config(tied, change, whole, tmp_path):
    """With the model's own state dict, and with one that is given, as a Trainer does."""
    random_model(tiny_config(text_config={"tie_word_embeddings": tied})).save_pretrained(tmp_path / "before")
    model = change(tmp_path / "before").eval()
    model.save_pretrained(tmp_path / "after", state_dict=None if whole else model.state_dict())
    again, report = load(tmp_path / "after", output_loading_info=True)
    assert not any(report.values())
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert again.config.text_config.to_diff_dict() == model.config.text_config.to_diff_dict()
    weights = again.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value), name
    assert torch.equal(logits(again), logits(model))


def without_a_branch(model):
    model.config.use_v2v = False


def another_vocabulary(model):
    model.config.text_config.vocab_size = 200


def larger_embeddings(model):
    model.set_input_embeddings(torch.nn.Embedding(140, 48))


def fewer_layers(model):
    del model.model.language_model.layers[3:]


def unmerged_adapters(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*self_attn.q_proj"))


SPOILT = {
    without_a_branch: "0 differ and 15 are too many: .*v2v",
    another_vocabulary: r"2 differ .*lm_head.weight: \(131, 48\) instead of \(200, 48\)",
    larger_embeddings: r"1 differ .*embed_tokens.weight: \(140, 48\) instead of \(131, 48\)",
    fewer_layers: "None instead of",
    unmerged_adapters: "merge_and_unload",
}


@pytest.mark.parametrize(("spoil", "text"), SPOILT.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_save_that_could_not_be_loaded_is_refused_before_anything_is_written(spoil, text, tmp_path):
    model = random_model(tiny_config())
    spoil(model)
    with pytest.raises(ValueError, match=text):
        model.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
