"""A checkpoint that brings its code: used in a virtual environment without this package, and beside the package."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline as make_pipeline

import transformers_crosslmm
from factories import mp4_of, random_frames, save_checkpoint
from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.checkpoints.export import code_files, export_with_code, main

QUESTION = "what?"
SETTINGS = {"max_new_tokens": 5, "generate_kwargs": {"do_sample": False}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Weights and processor as `save_pretrained` writes them, and a folder within that is none of theirs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    (folder / "checkpoint-3").mkdir()
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    return export_with_code(checkpoint, tmp_path_factory.mktemp("exported") / "crosslmm")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    path.write_bytes(mp4_of(random_frames(), fps=5))
    return path


@pytest.fixture(scope="module")
def python_without_the_package(tmp_path_factory) -> Path:
    """A new virtual environment that has every installed distribution but this one."""
    folder = tmp_path_factory.mktemp("environment")
    others = folder / "others"
    others.mkdir()
    seen: set[str] = set()
    for packages in map(Path, sys.path):  # several where one environment stands before another
        if packages.name != "site-packages":
            continue
        entries = [entry for entry in packages.iterdir() if "crosslmm" not in entry.name and entry.suffix != ".pth"]
        new = [entry for entry in entries if entry.name.split("-")[0] not in seen]
        for entry in new:
            (others / entry.name).symlink_to(entry)
        seen |= {entry.name.split("-")[0] for entry in new}
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "venv" / "lib" / version / "site-packages" / "others.pth").write_text(f"{others}\n")
    return folder / "venv" / "bin" / "python"


def run(python: Path, script: str, *arguments: object, cache: Path) -> dict:
    """What the script prints last, as JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)],
        env=inherited | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=cache,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


WITHOUT_THE_PACKAGE = """
import importlib.util, json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import AutoTokenizer, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

folder, clip, again, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
report = {"has_package": importlib.util.find_spec("transformers_crosslmm") is not None}

def refusal(load):
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

models = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
autos = (AutoConfig, *models, AutoProcessor, AutoVideoProcessor)
report["refused"] = {auto.__name__: refusal(lambda: auto.from_pretrained(folder)) for auto in autos}
report["refused"]["pipeline"] = refusal(lambda: pipeline("video-text-to-text", model=folder))

loaded = {auto.__name__: auto.from_pretrained(folder, trust_remote_code=True) for auto in autos}
report["loaded"] = {name: type(part).__name__ for name, part in loaded.items()}
pipe = pipeline("video-text-to-text", model=folder, trust_remote_code=True)
question = settings.pop("question")
report["answer"] = pipe(videos=clip, text=question, **settings)
report["modules"] = sorted({type(part).__module__.split(".")[0] for part in (pipe, pipe.model, pipe.processor)})

model, processor = loaded["AutoModelForImageTextToText"], loaded["AutoProcessor"]
report["labels_are_shifted"] = model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
chat = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "what?"}]}]
as_tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, **as_tensors)
with torch.no_grad():
    report["logits"] = model(**inputs).logits[0, -1].tolist()

model.save_pretrained(again)
processor.save_pretrained(again)
resaved = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
AutoProcessor.from_pretrained(again, trust_remote_code=True)
pipe = pipeline("video-text-to-text", model=again, trust_remote_code=True)
report["answer_again"] = pipe(videos=clip, text=question, **settings)
with torch.no_grad():
    report["logits_again"] = resaved(**inputs).logits[0, -1].tolist()
print()  # ends the line of the question whether to trust
print(json.dumps(report))
"""


def test_a_fresh_environment_without_this_package_runs_the_code_of_the_folder(
    python_without_the_package, exported, clip, tmp_path
):
    settings = json.dumps({"question": QUESTION, **SETTINGS})
    report = run(
        python_without_the_package, WITHOUT_THE_PACKAGE, exported, clip, tmp_path / "again", settings, cache=tmp_path
    )
    assert not report["has_package"]
    assert report["modules"] == ["transformers_modules"]
    for name, refusal in report["refused"].items():
        assert refusal is not None, name
        assert "trust_remote_code=True" in refusal, f"{name}: {refusal}"
    assert report["loaded"] == {
        "AutoConfig": "CrossLMMConfig",
        "AutoModel": "CrossLMMModel",
        "AutoModelForImageTextToText": "CrossLMMForConditionalGeneration",
        "AutoModelForMultimodalLM": "CrossLMMForConditionalGeneration",
        "AutoProcessor": "CrossLMMProcessor",
        "AutoVideoProcessor": "CrossLMMVideoProcessor",
    }
    here = make_pipeline("video-text-to-text", model=str(exported))
    assert report["answer"] == here(videos=str(clip), text=QUESTION, **SETTINGS)
    chat = [{"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": QUESTION}]}]
    inputs = here.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = here.model(**inputs).logits[0, -1]
    torch.testing.assert_close(torch.tensor(report["logits"]), expected, rtol=1e-5, atol=1e-5)
    assert report["logits_again"] == report["logits"]
    assert report["answer_again"] == report["answer"]
    assert report["labels_are_shifted"]  # by a `Trainer` that smooths labels


def test_the_installed_package_needs_no_trust(exported, clip, monkeypatch):
    def nobody(*_, **__):
        raise AssertionError("the folder's own code was asked for")

    for module in ("auto_factory", "configuration_auto", "processing_auto"):
        monkeypatch.setattr(f"transformers.models.auto.{module}.get_class_from_dynamic_module", nobody)
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(exported, **trust)) is CrossLMMConfig
        assert type(AutoProcessor.from_pretrained(exported, **trust)) is CrossLMMProcessor
        for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            assert type(auto.from_pretrained(exported, **trust)) is CrossLMMForConditionalGeneration
        assert type(AutoModel.from_pretrained(exported, **trust)) is transformers_crosslmm.CrossLMMModel
        pipe = make_pipeline("video-text-to-text", model=str(exported), **trust)
        assert type(pipe) is transformers_crosslmm.VideoTextToTextPipeline
        assert pipe(videos=str(clip), text=QUESTION, **SETTINGS)[0]["generated_text"]


def test_what_the_installed_package_saves_does_not_ask_for_code_that_is_not_there(exported, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(exported)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(exported).save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = (tmp_path / name).read_text()
        assert "custom_pipelines" not in content, name
        assert "auto_map" not in content, name


def test_a_config_names_its_classes_for_trainers_that_look_them_up(checkpoint):
    """Trainers take the class that a config's `auto_map` names when Transformers itself has none."""
    config = AutoConfig.from_pretrained(checkpoint)
    for auto, reference in config.auto_map.items():
        module, _, name = reference.partition(".")
        assert getattr(sys.modules[f"transformers_crosslmm.{module}"], name).__name__ == name, auto
    assert "auto_map" not in config.to_dict()
    assert "auto_map" not in json.loads((checkpoint / "config.json").read_text())


def test_the_folder_holds_the_checkpoint_and_flat_modules_that_find_each_other(checkpoint, exported):
    files = {path.name for path in exported.iterdir()}
    modules = {path.name for path in code_files()}
    assert files == {path.name for path in checkpoint.iterdir() if path.is_file()} | modules
    weights = "model.safetensors"
    assert (exported / weights).read_bytes() == (checkpoint / weights).read_bytes()
    assert not (modules & {"__init__.py", "export.py", "cli.py"})
    for path in code_files():
        assert "transformers_crosslmm" not in [
            line.split()[1].partition(".")[0]
            for line in path.read_text().splitlines()
            if line.strip().startswith(("import ", "from "))
        ], path.name


def test_the_command_says_what_it_made(checkpoint, tmp_path, capsys):
    main([str(checkpoint), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert str(tmp_path / "out") in said
    assert "  model.safetensors\n" in said
    assert (tmp_path / "out" / "modeling_crosslmm.py").is_file()


def test_weights_without_a_processor_can_be_exported(checkpoint, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoint / name, folder / name)
    out = export_with_code(folder, tmp_path / "out")
    assert not (out / "processor_config.json").exists()
    assert "auto_map" in json.loads((out / "config.json").read_text())


def test_a_folder_that_is_not_ours_is_refused_before_anything_is_written(checkpoint, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        export_with_code(tmp_path / "nowhere", out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama'"):
        export_with_code(foreign, out)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="new or empty"):
        export_with_code(checkpoint, foreign)
