"""Checkpoints of strangers: what is loaded is ours, or nothing is."""

import json
import shutil

import pytest

from factories import save_checkpoint
from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.checkpoints import load
from transformers_crosslmm.checkpoints.folder import checkpoint_digest, stored_tensors
from transformers_crosslmm.checkpoints.inspect import load_config
from transformers_crosslmm.checkpoints.load import caution, load_model, load_processor


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["LlavaProcessor", "CLIPProcessor", "EvilProcessor"])
def test_the_processor_is_ours_whatever_the_folder_says(checkpoint, name):
    for file in ("processor_config.json", "tokenizer_config.json"):
        change(checkpoint / file, processor_class=name)
    assert type(load_processor(checkpoint)) is CrossLMMProcessor


def test_the_model_is_ours_and_no_code_of_the_folder_runs(checkpoint, tmp_path):
    for file in ("evil.py", "modeling_crosslmm.py"):
        (checkpoint / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model", "AutoProcessor": "evil.P"}
    change(checkpoint / "config.json", auto_map=auto_map, architectures=["EvilForConditionalGeneration"])
    for file in ("processor_config.json", "tokenizer_config.json"):
        change(checkpoint / file, auto_map=auto_map | {"AutoTokenizer": ["evil.T", "evil.T"]})
    assert type(load_model(checkpoint, device="cpu")) is CrossLMMForConditionalGeneration
    assert type(load_processor(checkpoint)) is CrossLMMProcessor
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_another_models_folder_is_refused(checkpoint, load):
    change(checkpoint / "config.json", model_type="llava")
    with pytest.raises(ValueError, match="must be a CrossLMM checkpoint"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("file", "part", "values"),
    [
        ("config.json", None, {"dtype": "none of torch's"}),
        ("config.json", None, {"vision_config": []}),
        ("config.json", "vision_config", {"patch_size": 0}),
        ("config.json", "text_config", {"num_attention_heads": 0}),
        ("config.json", "text_config", {"model_type": []}),
        ("processor_config.json", None, {"patch_size": 0}),
        ("processor_config.json", None, {"pooled_grid_size": "three"}),
        ("processor_config.json", "video_processor", {"size": []}),
    ],
)
def test_a_value_of_a_wrong_kind_is_a_broken_checkpoint(checkpoint, file, part, values):
    written = json.loads((checkpoint / file).read_text())
    change(checkpoint / file, **(values if part is None else {part: written[part] | values}))
    with pytest.raises(ValueError, match=r"must be a CrossLMM checkpoint.*(missing or|files are) broken: \S"):
        load_processor(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": "/etc/secret.safetensors"}},
        {"weight_map": {"a": 3}},
        {"weight_map": ["model.safetensors"]},
        {},
        [],
    ],
    ids=str,
)
def test_an_index_names_files_of_its_folder_only(checkpoint, content):
    """Whoever wrote it must not have other weights of this machine put into what is converted and published."""
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "secret.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names of files in its folder"):
        stored_tensors(checkpoint)


def test_a_tensor_of_a_type_that_torch_lacks_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(ValueError, match=r"a must be of a type among F64, .*; got U16"):
        stored_tensors(tmp_path)


def test_a_digest_changes_with_what_decides_an_answer_and_with_nothing_else(checkpoint, tmp_path):
    before = checkpoint_digest(checkpoint)
    (checkpoint / "README.md").write_text("words")
    (checkpoint / "optimizer.pt").write_text("numbers")
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert checkpoint_digest(moved) == before
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        content = (moved / name).read_bytes()
        (moved / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert checkpoint_digest(moved) != before, name
        (moved / name).write_bytes(content)


def test_the_toy_and_what_was_never_trained_say_so(checkpoint, monkeypatch):
    said = []
    monkeypatch.setattr(load.logger, "warning_once", said.append)
    load_model(TINY_CHECKPOINT, device="cpu")
    load_model(checkpoint, device="cpu")
    assert said == [caution(TINY_CHECKPOINT, load_config(TINY_CHECKPOINT))]
    assert "is a toy" in caution(TINY_CHECKPOINT, load_config(TINY_CHECKPOINT))
    assert caution(checkpoint, load_config(checkpoint)) is None
    change(checkpoint / "config.json", untrained=True)
    assert "was never trained" in caution(checkpoint, load_config(checkpoint))
