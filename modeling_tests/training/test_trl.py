"""TRL's `SFTTrainer`, the real one: images and videos are learned from, and a run that would drop the pixels fails."""

import pytest
import torch
from PIL import Image
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from factories import mp4_of, random_frames, save_checkpoint
from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor, crosslmm_lora_config
from transformers_crosslmm.training.datasets import CrossLMMDataset
from transformers_crosslmm.training.samples import CrossLMMDataCollator

trl = pytest.importorskip("trl", reason="needs TRL: the extra `trl`")
datasets = pytest.importorskip("datasets")

MISMATCH = "Placeholders and video features must match"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its processor, and the clips that the chats below name."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    for seconds in (2, 5):
        (folder / f"{seconds}.mp4").write_bytes(mp4_of(random_frames(seconds, seed=seconds), fps=1))
    return folder


def turns(*parts: dict, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def videos(folder) -> list[dict]:
    clips = {seconds: {"type": "video", "path": str(folder / f"{seconds}.mp4")} for seconds in (2, 5)}
    return [{"messages": turns(clip, answer=f"{seconds} seconds.")} for seconds, clip in clips.items()]


def images() -> list[dict]:
    """As TRL wants them: pictures in a column of their own, put before the text of the first turn."""
    pictures = [Image.fromarray(frame) for frame in random_frames(2)]
    return [{"messages": written(answer="A" * (3 + i)), "images": [picture]} for i, picture in enumerate(pictures)]


def written(answer: str) -> list[dict]:
    return [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]


def ours(records: list[dict]) -> list[dict]:
    """The same with the pictures where our chats have them."""
    return [
        {
            "messages": turns(
                *({"type": "image", "image": picture} for picture in record["images"]),
                answer=record["messages"][1]["content"],
            )
        }
        for record in records
    ]


def config_of(output, **kwargs) -> "trl.SFTConfig":
    defaults = {
        "max_length": None,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "assistant_only_loss": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return trl.SFTConfig(output_dir=str(output), **(defaults | kwargs))


def trainer_of(model, rows: list[dict], output, *, collator=None, formatting_func=None, peft_config=None, **kwargs):
    return trl.SFTTrainer(
        model=model,
        args=config_of(output, **kwargs),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=collator,
        formatting_func=formatting_func,
        peft_config=peft_config,
    )


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def collator_of(folder) -> CrossLMMDataCollator:
    return CrossLMMDataCollator(CrossLMMProcessor.from_pretrained(folder), media_root=folder)


@torch.no_grad()
def loss_by_hand(folder, records: list[dict]) -> float:
    batch = collator_of(folder)(records)
    return CrossLMMForConditionalGeneration.from_pretrained(folder)(**batch).loss.item()


def assert_all_parts_moved(trainer, folder, *, branch: str) -> None:
    before = CrossLMMForConditionalGeneration.from_pretrained(folder).state_dict()
    after = trainer.model.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    gate = f"layers.0.cross_attention.{branch}.gate"
    for part in ("vision_tower.encoder.layers.0", "projector.linear_1", gate, "lm_head"):
        assert any(part in name for name in moved), part


WITH_OUR_COLLATOR = {
    "assistant_only_loss": False,  # the collator labels the assistant's tokens, and TRL is not to prepare anything
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


# -- what is learned from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "object"])
def test_images_are_learned_with_trls_own_collator(by, folder, tmp_path):
    model = str(folder) if by == "path" else CrossLMMForConditionalGeneration.from_pretrained(folder)
    trainer = trainer_of(model, images(), tmp_path)
    first, second = losses(trainer)
    assert first == pytest.approx(loss_by_hand(folder, ours(images())), rel=1e-4)
    assert second < first
    assert_all_parts_moved(trainer, folder, branch="t2v")


@pytest.mark.parametrize("by", ["path", "object"])
def test_videos_are_learned_with_our_collator(by, folder, tmp_path):
    model = str(folder) if by == "path" else CrossLMMForConditionalGeneration.from_pretrained(folder)
    collator = collator_of(folder)
    trainer = trainer_of(model, videos(folder), tmp_path, collator=collator, **WITH_OUR_COLLATOR)
    first, second = losses(trainer)
    assert first == pytest.approx(loss_by_hand(folder, videos(folder)), rel=1e-4)
    assert second < first
    assert_all_parts_moved(trainer, folder, branch="v2v")


def test_text_beside_images_is_learned(folder, tmp_path):
    rows = [*images(), {"messages": written(answer="Nothing to see."), "images": []}]
    trainer = trainer_of(str(folder), rows, tmp_path, per_device_train_batch_size=3)
    assert losses(trainer)[0] == pytest.approx(loss_by_hand(folder, ours(rows)), rel=1e-4)


def test_adapters_are_trained_by_trl(folder, tmp_path):
    pytest.importorskip("peft", reason="adapters need the extra `train`")
    trainer = trainer_of(str(folder), images(), tmp_path, peft_config=crosslmm_lora_config(r=3))
    first, second = losses(trainer)
    assert second < first
    merged = trainer.model.merge_and_unload()
    before = CrossLMMForConditionalGeneration.from_pretrained(folder).state_dict()
    names = {name for name, after in merged.state_dict().items() if not torch.equal(after, before[name])}
    assert any("t2v.gate" in name for name in names)
    assert any("projector" in name for name in names)
    assert not [name for name in names if "vision_tower" in name]


# -- what would drop the pixels ---------------------------------------------------------------------------------------


def split(record: dict) -> dict:
    return {"prompt": record["messages"][:1], "completion": record["messages"][1:]}


DROPPED = {
    "no collator for videos": {},
    "every token": {"assistant_only_loss": False},
    "packing": {"packing": True, "max_length": 96, "assistant_only_loss": False},
    "padding free": {"padding_free": True, "assistant_only_loss": False},
    "cut": {"max_length": 20, "assistant_only_loss": False},
    "written by a function": {
        "formatting_func": lambda record: "<|video_pad|>What is it? Five seconds.",
        "assistant_only_loss": False,
    },
}


@pytest.mark.parametrize("kwargs", DROPPED.values(), ids=DROPPED)
def test_videos_that_trl_would_drop_stop_the_run(kwargs, folder, tmp_path):
    """TRL has no column for videos: it writes the placeholders of a chat and leaves out the pixels."""
    with pytest.raises(ValueError, match=MISMATCH):
        trainer_of(str(folder), videos(folder), tmp_path, **kwargs).train()


def test_videos_of_prompts_and_completions_that_trl_would_drop_stop_the_run(folder, tmp_path):
    rows = [split(record) for record in videos(folder)]
    kwargs = {"assistant_only_loss": False, "completion_only_loss": True}
    with pytest.raises(ValueError, match=MISMATCH):
        trainer_of(str(folder), rows, tmp_path, **kwargs).train()


def test_columns_of_pixels_that_trl_would_drop_stop_the_run(folder, tmp_path):
    """Encoded samples: without `remove_unused_columns=False` TRL keeps ids and labels alone."""
    encoded = CrossLMMDataset(videos(folder), CrossLMMProcessor.from_pretrained(folder), media_root=folder)
    rows = [{name: value.tolist() for name, value in encoded[i].items() if value is not None} for i in range(2)]
    assert "pixel_values_videos" in rows[0]
    with pytest.raises(ValueError, match=MISMATCH):
        trainer_of(str(folder), rows, tmp_path, assistant_only_loss=False).train()


def test_a_text_collator_that_would_drop_the_pixels_stops_the_run(folder, tmp_path):
    """Transformers' own `Trainer`, a dataset of encoded samples, and a collator that knows of text only."""
    processor = CrossLMMProcessor.from_pretrained(folder)
    encoded = CrossLMMDataset(videos(folder), processor, media_root=folder)

    def text_alone(samples):
        collate = DataCollatorForSeq2Seq(processor.tokenizer)
        return collate([{name: sample[name].tolist() for name in ("input_ids", "labels")} for sample in samples])

    trainer = Trainer(
        CrossLMMForConditionalGeneration.from_pretrained(folder),
        TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=encoded,
        data_collator=text_alone,
    )
    with pytest.raises(ValueError, match=MISMATCH):
        trainer.train()


def test_trl_does_not_take_the_chats_from_our_collator_unnoticed(folder, tmp_path):
    """`remove_unused_columns` left at its default."""
    kwargs = WITH_OUR_COLLATOR | {"remove_unused_columns": True}
    trainer = trainer_of(str(folder), videos(folder), tmp_path, collator=collator_of(folder), **kwargs)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        trainer.train()


@pytest.mark.parametrize("cut", [{}, {"max_length": 5, "truncation_mode": "keep_end"}], ids=["whole", "cut"])
def test_trl_does_not_make_tokens_before_our_collator_unnoticed(cut, folder, tmp_path):
    """`dataset_kwargs` left at its default. The cut leaves no placeholder that the model could miss the frames of."""
    kwargs = WITH_OUR_COLLATOR | {"dataset_kwargs": None} | cut
    with pytest.raises(ValueError, match=r"`input_ids` and no pixels.*skip_prepare_dataset"):
        trainer_of(str(folder), videos(folder), tmp_path, collator=collator_of(folder), **kwargs).train()


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_only_a_cut_that_takes_every_placeholder_drops_a_video_unnoticed(mode, folder, tmp_path):
    """What is left is text that nothing tells from other text: the one way that docs/fine-tune.md warns of."""
    record = videos(folder)[0]
    processor = CrossLMMProcessor.from_pretrained(folder)
    (ids,) = processor.apply_chat_template(record["messages"], tokenize=True, return_dict=True)["input_ids"]
    rest = [token == processor.video_token_id for token in (ids if mode == "keep_start" else ids[::-1])].index(True)
    kwargs = {"truncation_mode": mode, "assistant_only_loss": False, "per_device_train_batch_size": 1, "max_steps": 1}
    for length in (1, rest):
        trainer_of(str(folder), [record], tmp_path, max_length=length, **kwargs).train()
    for length in (rest + 1, rest + 9, len(ids)):
        with pytest.raises(ValueError, match=MISMATCH):
            trainer_of(str(folder), [record], tmp_path, max_length=length, **kwargs).train()


def test_one_video_left_whole_stops_a_run_that_cuts_the_others(folder, tmp_path):
    long, short = videos(folder)
    long["messages"][1]["content"][0]["text"] *= 9
    kwargs = {"truncation_mode": "keep_end", "max_length": 90, "assistant_only_loss": False}
    trainer_of(str(folder), [long], tmp_path, **kwargs).train()
    with pytest.raises(ValueError, match=MISMATCH):
        trainer_of(str(folder), [long, short], tmp_path, **kwargs).train()


def test_trainer_does_not_take_the_chats_from_our_collator_unnoticed(folder, tmp_path):
    trainer = Trainer(
        CrossLMMForConditionalGeneration.from_pretrained(folder),
        TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=datasets.Dataset.from_list(videos(folder)),
        data_collator=collator_of(folder),
    )
    with pytest.raises(ValueError, match="remove_unused_columns"):
        trainer.train()


def test_a_length_that_cuts_images_stops_the_run(folder, tmp_path):
    with pytest.raises(ValueError, match="truncation"):
        trainer_of(str(folder), images(), tmp_path, max_length=8).train()
