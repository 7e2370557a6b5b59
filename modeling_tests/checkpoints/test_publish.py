"""Publishing, end to end against a Hub of our own on the loopback interface, and what can go wrong on the way."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http, close_session
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)
from typer.testing import CliRunner

import crosslmm_cli
from factories import random_model, tiny_config, tiny_tokenizer
from hub_server import TOKEN, Fault, HubServer
from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.checkpoints import publish
from transformers_crosslmm.checkpoints.export import export_with_code
from transformers_crosslmm.checkpoints.publish import PublishingError, files_to_publish, push

REPO = "me/crosslmm-test"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub, and this process logged in to it."""
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # also our own pauses: it is one module
    close_session()
    yield server
    close_session()
    server.close()


def save_checkpoint(folder, **config):
    tokenizer = tiny_tokenizer()
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    model = random_model(tiny_config(text_config={"vocab_size": 271}, **ids, **config))
    model.save_pretrained(folder)
    CrossLMMProcessor.from_config(model.config, tokenizer).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A trained checkpoint, with what a trainer leaves beside it."""
    folder = tmp_path_factory.mktemp("trained")
    save_checkpoint(folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"0")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def untrained_checkpoint(tmp_path):
    folder = tmp_path / "composed"
    model = save_checkpoint(folder, untrained=True)
    set_gates(model, 0.0)
    model.save_pretrained(folder)
    return folder


def set_gates(model, value):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.fill_(value)


def crosslmm(*arguments):
    result = CliRunner().invoke(crosslmm_cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def published(hub, branch="main"):
    return hub.repositories[REPO].branches[branch]


# What works


def test_a_pushed_checkpoint_loads_by_name(hub, checkpoint):
    result = crosslmm("push", checkpoint, REPO)
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/{REPO}/commit/" in result.output
    files = published(hub)
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} < files.keys()
    assert not {"trainer_state.json", "optimizer.pt", "conversion_report.json"} & files.keys()
    assert sum(line.startswith("POST /api/models") and "/commit/" in line for line in hub.requests) == 1

    model = AutoModelForImageTextToText.from_pretrained(REPO)
    local = CrossLMMForConditionalGeneration.from_pretrained(checkpoint)
    for name, tensor in local.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    processor = AutoProcessor.from_pretrained(REPO)
    assert type(processor) is CrossLMMProcessor
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "video-text-to-text"
    assert f'from_pretrained("{REPO}"' in card.text


def test_only_what_a_checkpoint_is_made_of_leaves_the_house(hub, checkpoint, tmp_path):
    """By whole names, and listed before it is sent; a file of a stranger, of an editor or of a trainer stays."""
    folder = tmp_path / "folder"
    shutil.copytree(checkpoint, folder)
    left = (
        ".env",
        "id_rsa",
        "token",
        "optimizer.pt",
        "evil.py",
        "tokenizer_evil.py",
        "notes.txt",
        "secrets.json",
        "x",
    )
    left += ("model.safetensors.bak", "model-1-of-2.safetensors", "a-model.safetensors", "unused_weights.safetensors")
    for name in left:
        (folder / name).write_text("secret")
    (folder / "LICENSE").write_text("Do as you like.")
    result = crosslmm("push", folder, REPO)
    assert result.exit_code == 0, result.output
    assert published(hub).keys() & set(left) == set()
    assert published(hub)["LICENSE"] == b"Do as you like."
    listed = [line.split(" B  ")[1].strip() for line in result.output.splitlines() if " B  " in line]
    assert set(listed[:-1]) | {".gitattributes"} == published(hub).keys() | {".gitattributes"}
    out = export_with_code(folder, tmp_path / "out")
    assert {path.name for path in out.iterdir()} & set(left) == set()
    assert (out / "LICENSE").is_file()


@pytest.mark.parametrize("name", ["README.md", "merges.txt", "config.json"])
def test_a_link_out_of_the_folder_does_not_leave_the_house(hub, checkpoint, tmp_path, name):
    folder = tmp_path / "folder"
    shutil.copytree(checkpoint, folder)
    secret = tmp_path / "secret"
    secret.write_bytes((checkpoint / name).read_bytes() if (checkpoint / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=r"must be in its folder; .* is a link to"):
        export_with_code(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = crosslmm("push", folder, REPO)
    assert result.exit_code == 1
    assert "is a link to" in result.output
    assert hub.repositories == {}


WITHOUT_PACKAGE = """
import sys
sys.modules["transformers_crosslmm"] = None  # importing it is an error
from transformers import AutoModelForImageTextToText, AutoProcessor
import numpy, torch
model = AutoModelForImageTextToText.from_pretrained("me/crosslmm-test", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/crosslmm-test", trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "video", "video": numpy.full((2, 40, 40, 3), 99, dtype="uint8")}]}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt",
                                       processor_kwargs={"num_frames": 2})
print(type(model).__module__, model(**inputs).logits.double().sum().item())
"""


def test_a_push_with_code_loads_with_and_without_the_package(hub, checkpoint, tmp_path):
    push(checkpoint, REPO, with_code=True)
    assert {"modeling_crosslmm.py", "processing_crosslmm.py", "configuration_crosslmm.py"} < published(hub).keys()
    assert "trust_remote_code=True" in published(hub)["README.md"].decode()

    model = AutoModelForImageTextToText.from_pretrained(REPO)  # the package is here: no trust is asked for
    assert type(model) is CrossLMMForConditionalGeneration
    processor = AutoProcessor.from_pretrained(REPO)
    video = torch.full((2, 40, 40, 3), 99, dtype=torch.uint8).numpy()
    chat = [{"role": "user", "content": [{"type": "video", "video": video}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"num_frames": 2}
    )
    expected = model.eval()(**inputs).logits.double().sum().item()

    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, total = done.stdout.split()
    assert module.startswith("transformers_modules.")
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(hub, checkpoint):
    result = crosslmm("push", checkpoint, REPO, "--dry-run", "--with-code")
    assert result.exit_code == 0, result.output
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"{size:,} B  model.safetensors" in result.output
    assert "modeling_crosslmm.py" in result.output
    assert "Nothing was sent" in result.output
    assert hub.requests == []


def test_a_private_repository_is_private(hub, checkpoint):
    push(checkpoint, REPO, private=True)
    assert hub.repositories[REPO].private


def test_a_revision_is_a_branch_of_a_repository_that_may_exist(hub, checkpoint):
    push(checkpoint, REPO)
    before = dict(published(hub))
    push(checkpoint, REPO, revision="second", with_code=True)
    assert "modeling_crosslmm.py" in published(hub, "second")
    assert published(hub) == before
    push(checkpoint, REPO, revision="main", with_code=True)
    assert published(hub).keys() == published(hub, "second").keys()


def test_a_card_of_the_folders_own_is_kept(hub, checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    own = "---\nlicense: mit\n---\n\n# Mine\n"
    (tmp_path / "README.md").write_text(own)
    push(tmp_path, REPO)
    assert published(hub)["README.md"].decode() == own


# Weights that were never trained


def test_a_composition_is_refused_until_one_says_untrained(hub, untrained_checkpoint):
    result = crosslmm("push", untrained_checkpoint, REPO)
    assert result.exit_code == 1
    assert "never trained" in result.output
    assert "--untrained" in result.output
    assert hub.requests == []

    assert crosslmm("push", untrained_checkpoint, REPO, "--untrained").exit_code == 0
    card = ModelCard(published(hub)["README.md"].decode())
    assert card.text.strip().startswith("**Untrained.**")
    assert json.loads(published(hub)["config.json"])["untrained"] is True


def test_untrained_weights_are_called_so_in_a_card_of_the_folders_own(hub, untrained_checkpoint):
    (untrained_checkpoint / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    push(untrained_checkpoint, REPO, untrained=True)
    card = ModelCard(published(hub)["README.md"].decode())
    assert card.data.license == "mit"
    assert card.text.strip().startswith("**Untrained.**")
    assert card.text.strip().endswith("# Mine")


def test_a_composition_whose_gates_have_moved_is_trained(hub, untrained_checkpoint):
    model = CrossLMMForConditionalGeneration.from_pretrained(untrained_checkpoint)
    model.model.language_model.layers[2].cross_attention.v2v.gate.weight.data.add_(1e-6)
    model.save_pretrained(untrained_checkpoint)
    assert json.loads((untrained_checkpoint / "config.json").read_text())["untrained"] is True
    push(untrained_checkpoint, REPO)
    assert json.loads(published(hub)["config.json"])["untrained"] is False


def test_a_conversion_can_publish_what_it_wrote(hub, tmp_path):
    SiglipVisionModel(tiny_config().vision_config).save_pretrained(tmp_path / "vision")
    text = tiny_config(text_config={"vocab_size": 271}).text_config
    fields = {name: getattr(text, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 56}
    Qwen2ForCausalLM(Qwen2Config(**fields, **heads)).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    parts = ["--vision", str(tmp_path / "vision"), "--text", str(tmp_path / "text")]
    arguments = ["compose", *parts, "--out", str(tmp_path / "out"), "--push-to-hub", REPO]
    refused = CliRunner().invoke(crosslmm_cli.app, arguments)
    assert refused.exit_code == 1
    assert "never trained as a CrossLMM" in refused.stderr
    assert "--untrained" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert hub.requests == []

    done = CliRunner().invoke(crosslmm_cli.app, [*arguments, "--untrained", "--private"])
    assert f"{hub.url}/{REPO}/commit/" in done.stdout
    assert hub.repositories[REPO].private
    card = published(hub)["README.md"].decode()
    assert "| vision | a local checkpoint |" in card
    assert str(tmp_path) not in card + published(hub)["config.json"].decode()


# What goes wrong


def test_a_connection_that_breaks_once_is_survived(hub, checkpoint):
    hub.faults = [Fault("PUT /lfs"), Fault("POST .*/commit/"), Fault("POST .*/preupload", status=503)]
    push(checkpoint, REPO)
    assert "model.safetensors" in published(hub)
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.parametrize("request_", ["PUT /lfs", "POST .*/commit/", "POST .*/preupload/"])
def test_a_connection_that_stays_broken_publishes_nothing(hub, checkpoint, request_):
    hub.faults = [Fault(request_, times=1000)]
    with pytest.raises(
        PublishingError, match=r"The connection to the Hub broke .* Nothing was published; .* as it was"
    ):
        push(checkpoint, REPO)
    assert hub.repositories == {}


def test_a_failure_takes_back_the_branch_it_made_and_nothing_else(hub, checkpoint):
    push(checkpoint, REPO)
    before = dict(published(hub))
    hub.faults = [Fault("POST .*/commit/", status=500, message="oops", times=1000)]
    with pytest.raises(PublishingError, match=r"The Hub answered 500: .*oops"):
        push(checkpoint, REPO, revision="second", with_code=True)
    assert hub.repositories[REPO].branches == {"main": before}


def test_what_cannot_be_taken_back_is_named(hub, checkpoint):
    hub.faults = [Fault("POST .*/commit/", times=1000), Fault("DELETE ", times=1000)]
    with pytest.raises(PublishingError, match=f"an empty repository or branch remains at {hub.url}/{REPO}: remove it"):
        push(checkpoint, REPO)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST /api/repos/create", status=403), r"has no write access there \(403\)"),
        (Fault("POST .*/commit/", status=403), r"has no write access there \(403\)"),
        (
            Fault("POST .*objects/batch", status=507, message="quota"),
            r"The Hub has no storage left for it \(507: quota\)",
        ),
    ],
    ids=["create", "commit", "full"],
)
def test_a_refusal_says_why_and_publishes_nothing(hub, checkpoint, fault, message):
    hub.faults = [fault]
    with pytest.raises(PublishingError, match=message):
        push(checkpoint, REPO)
    assert hub.repositories == {}


def test_a_wrong_token_is_told(hub, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = crosslmm("push", checkpoint, REPO)
    assert result.exit_code == 1
    assert "does not accept the token (401). Log in with `hf auth login`" in result.output
    assert hub.repositories == {}


def test_an_existing_repository_is_not_touched(hub, checkpoint):
    push(checkpoint, REPO)
    before = dict(published(hub))
    hub.requests.clear()
    with pytest.raises(PublishingError, match=f"{REPO} exists and is not changed.*--revision"):
        push(checkpoint, REPO, with_code=True)
    assert published(hub) == before
    assert hub.requests == ["POST /api/repos/create"]


def test_a_card_that_the_hub_would_refuse_publishes_nothing(hub, checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n")
    with pytest.raises(PublishingError, match=r"Invalid metadata in README\.md"):
        push(tmp_path, REPO)
    assert hub.repositories == {}


def test_a_full_disk_is_told_before_anything_is_sent(hub, checkpoint, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", tempfile.gettempdir())

    monkeypatch.setattr(publish, "export_with_code", full)
    result = crosslmm("push", checkpoint, REPO, "--with-code")
    assert result.exit_code == 1
    assert "Nothing was sent: " in result.output
    assert "No space left on device" in result.output
    assert hub.requests == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "must have config.json"),
        (lambda folder: (folder / "processor_config.json").unlink(), "must have its processor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither"),
        (lambda folder: change(folder, "vision_feature_layer", -1), "the checkpoint does not:"),
    ],
    ids=["config", "processor", "weights", "other weights"],
)
def test_an_incomplete_checkpoint_is_told_before_anything_is_sent(hub, tmp_path, spoil, message):
    save_checkpoint(tmp_path / "folder")
    spoil(tmp_path / "folder")
    with pytest.raises((ValueError, OSError), match=message):
        files_to_publish(tmp_path / "folder", REPO)
    result = crosslmm("push", tmp_path / "folder", REPO)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert hub.requests == []


def change(folder: Path, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))


def test_help_does_not_import_the_package():
    code = (
        "import sys, crosslmm_cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(crosslmm_cli.app, ['push', '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'transformers_crosslmm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
