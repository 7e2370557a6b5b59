"""`swift sft` of the real ms-swift with our plugin, in an environment of its own: `make swift-environment`."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import pytest
import torch

import transformers_crosslmm.training
from factories import save_checkpoint, save_training_data
from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.training.datasets import CrossLMMDataset
from transformers_crosslmm.training.records import load_records
from transformers_crosslmm.training.samples import CrossLMMDataCollator, encode_chat
from transformers_crosslmm.training.trainer import CrossLMMTrainer, CrossLMMTrainingArguments, choose_frames

try:
    version("ms-swift")  # not imported here: it changes Transformers' `Trainer`
except PackageNotFoundError:
    pytest.skip("needs ms-swift: `make swift-environment`", allow_module_level=True)

PLUGIN = Path(transformers_crosslmm.training.__file__).parent / "ms_swift_plugin.py"

SHARED = {
    "max_steps": 20,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "use_cpu": True,
}
OURS = {"train_sampling_strategy": "sequential", "fps": 1, "gate_learning_rate": 5e-3, "save_strategy": "no"}
THEIRS = {
    "external_plugins": PLUGIN,
    "optimizer": "crosslmm",
    "model_kwargs": json.dumps({"fps": 1, "gate_learning_rate": 5e-3}),
    "gradient_accumulation_steps": 1,
    "dataset_shuffle": "false",
    "train_dataloader_shuffle": "false",
    "torch_dtype": "float32",
    "bf16": "false",
    "strict": "true",
    "save_steps": 20,
}
WHOLE = {"tuner_type": "full", "freeze_vit": "false", "freeze_aligner": "false"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and the records and media of `save_training_data`."""
    folder = tmp_path_factory.mktemp("swift")
    save_checkpoint(folder / "checkpoint")
    save_training_data(folder)
    return folder


def swift_sft(folder, output, **options) -> Path:
    """Runs the command on the records, in their order; returns its last checkpoint."""
    given = {
        "model": folder / "checkpoint",
        "dataset": folder / "data.jsonl",
        "output_dir": output,
        "report_to": "none",
    }
    given |= SHARED | THEIRS | options
    words = ((f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in given.items())
    subprocess.run(
        [sys.executable, "-m", "swift.cli.sft", *map(str, chain.from_iterable(words))],
        env=os.environ | {"ROOT_IMAGE_DIR": str(folder / "media"), "MODELSCOPE_CACHE": str(folder / "cache")},
        check=True,
    )
    (checkpoint,) = output.glob("*/checkpoint-*")
    return checkpoint


def losses(log: list[dict]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def losses_of(checkpoint: Path) -> list[float]:
    return losses(json.loads((checkpoint / "trainer_state.json").read_text())["log_history"])


def crosslmm_trainer(folder, output) -> CrossLMMTrainer:
    """Our trainer after the same steps."""
    arguments = CrossLMMTrainingArguments(str(output), report_to=[], disable_tqdm=True, **SHARED, **OURS)
    processor = CrossLMMProcessor.from_pretrained(folder / "checkpoint")
    choose_frames(processor, arguments)
    trainer = CrossLMMTrainer(
        CrossLMMForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=torch.float32),
        arguments,
        train_dataset=CrossLMMDataset(load_records(folder / "data.jsonl"), processor, media_root=folder / "media"),
        data_collator=CrossLMMDataCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    return trainer


def test_twenty_steps_lose_what_our_trainer_loses(folder, tmp_path):
    trainer = crosslmm_trainer(folder, tmp_path / "ours")
    checkpoint = swift_sft(folder, tmp_path / "theirs", **WHOLE)
    own, theirs = losses(trainer.state.log_history), losses_of(checkpoint)
    assert len(own) == 20
    assert sum(own[-4:]) < sum(own[:4]) / 2, own  # four batches are an epoch
    assert theirs == pytest.approx(own, rel=1e-5)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    saved = CrossLMMForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        ends = [model.eval()(**batch).loss.item() for model in (trainer.model, saved)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    assert CrossLMMProcessor.from_pretrained(checkpoint).video_processor.fps == 1


def test_adapters_gates_and_projector_are_trained_and_load(folder, tmp_path):
    peft = pytest.importorskip("peft")
    checkpoint = swift_sft(
        folder,
        tmp_path,
        tuner_type="lora",
        target_modules="all-linear",
        modules_to_save=["v2v.gate", "t2v.gate", "multi_modal_projector"],
    )
    own = losses_of(checkpoint)
    assert sum(own[-4:]) < sum(own[:4])
    base = CrossLMMForConditionalGeneration.from_pretrained(folder / "checkpoint")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, checkpoint).merge_and_unload()
    moved = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
    layers = "model.language_model.layers.0"
    for name in ("self_attn.q_proj.weight", "cross_attention.t2v.v_proj.weight", "cross_attention.v2v.gate.weight"):
        assert f"{layers}.{name}" in moved
    assert "model.multi_modal_projector.linear_1.weight" in moved
    assert not [name for name in moved if "vision_tower" in name]


# -- the template -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugin():
    from swift.utils import import_external_file

    import_external_file(str(PLUGIN))
    assert str(PLUGIN.parent) not in sys.path  # where our `datasets.py` would be imported for the library


@pytest.fixture
def template_of(folder, plugin, monkeypatch):
    """Makes a template as `swift sft` does, with these options."""
    from swift.model import get_processor
    from swift.template import get_template

    monkeypatch.setenv("ROOT_IMAGE_DIR", str(folder / "media"))

    def template_of(**options):
        template = get_template(get_processor(str(folder / "checkpoint")), **options)
        template.set_mode("train")
        return template

    return template_of


def record_of(**columns) -> dict:
    question = {"role": "user", "content": "<video>What?"}
    return {"messages": [question, {"role": "assistant", "content": "This."}], "videos": ["0.mp4"]} | columns


def test_a_batch_is_our_collators_batch(folder, template_of):
    template = template_of()
    part = {"type": "video", "video": "2.mp4", "nframes": 2}
    question = [part, {"type": "text", "text": "How many?"}]
    with_options = [{"role": "user", "content": question}, {"role": "assistant", "content": "Two frames."}]
    text = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody that I know."}]
    records = [record_of(), {"messages": with_options, "videos": []}, {"messages": text}]
    batch = template.data_collator([template.encode(record, return_length=True) for record in records])
    expected = CrossLMMDataCollator(template.processor, media_root=folder / "media")(records)
    assert expected["video_num_frames"].tolist()[1] == 2
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name


def test_a_system_prompt_option_is_put_before_the_chat(folder, template_of):
    encoded = template_of(default_system="Be brief.").encode(record_of())
    system = {"role": "system", "content": "Be brief."}
    record = record_of(messages=[system, *record_of()["messages"]])
    expected = encode_chat(
        CrossLMMProcessor.from_pretrained(folder / "checkpoint"), record, media_root=folder / "media"
    )
    assert encoded["input_ids"] == expected["input_ids"].tolist()


@pytest.mark.parametrize(
    "option",
    [{"loss_scale": "last_round"}, {"max_pixels": 1000}, {"padding_free": True}, {"truncation_strategy": "left"}],
    ids=lambda option: next(iter(option)),
)
def test_an_option_that_would_be_ignored_is_refused(option, template_of):
    with pytest.raises(ValueError, match=next(iter(option))):
        template_of(**option)


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [{"name": "look"}]},
        {"audios": ["a.wav"]},
        {"messages": [turn | {"loss": False} for turn in record_of()["messages"]]},
    ],
    ids=["tools", "audios", "loss"],
)
def test_a_column_that_would_be_ignored_is_refused(columns, template_of):
    with pytest.raises(ValueError, match=r"take out|`loss` of a turn"):
        template_of().encode(record_of(**columns))


@pytest.mark.parametrize("name", ["../data.jsonl", "https://example.org/a.mp4", "/etc/hostname"])
def test_media_are_read_below_their_folder_only(name, template_of):
    template, picture = template_of(), {"type": "image", "image": name}
    about_it = [{"role": "user", "content": [picture]}, record_of()["messages"][1]]
    for columns in ({"videos": [name]}, {"videos": [], "messages": about_it}):
        with pytest.raises(ValueError, match=r"outside of the media folder|there is no file"):
            template.encode(record_of(**columns))


def test_a_missing_media_folder_is_named(template_of, monkeypatch):
    monkeypatch.delenv("ROOT_IMAGE_DIR")
    with pytest.raises(ValueError, match="ROOT_IMAGE_DIR"):
        template_of().encode(record_of())


def test_another_use_than_sft_is_refused(template_of):
    template = template_of()
    template.set_mode("transformers")
    with pytest.raises(NotImplementedError, match="swift sft"):
        template.encode(record_of())
