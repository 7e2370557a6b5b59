"""Samples: which tokens are learned, and how samples become a batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_records import record, video_record

from factories import random_frames, random_model, tiny_config, tiny_processor
from transformers_crosslmm.media_crosslmm import join_pixels
from transformers_crosslmm.training.datasets import CrossLMMDataset
from transformers_crosslmm.training.records import UnusableSample
from transformers_crosslmm.training.samples import IGNORED, CrossLMMDataCollator, encode_chat


def spoken(processor, sample) -> str:
    return processor.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED])


# --- labels ----------------------------------------------------------------------------------------------------------


def expected_ids_and_labels(processor, turns) -> tuple[list[int], list[int]]:
    """ChatML written out token by token: turns are (role, [text or number of placeholders])."""
    tokenizer = processor.tokenizer
    mark = tokenizer.convert_tokens_to_ids
    ids: list[int] = []
    labels: list[int] = []

    def write(new, learned=False):
        ids.extend(new)
        labels.extend(new if learned else [-100] * len(new))

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for role, parts in turns:
        write([mark("<|im_start|>"), *tokens(role + "\n")])
        for part in parts:
            if isinstance(part, str):
                write(tokens(part), learned=role == "assistant")
            else:
                write([mark("<|vision_start|>"), *[mark("<|video_pad|>")] * part, mark("<|vision_end|>")])
        write([mark("<|im_end|>")], learned=role == "assistant")
        write(tokens("\n"))
    return ids, labels


def test_exactly_the_assistants_words_and_end_marks_are_learned_in_every_turn(media):
    processor = tiny_processor()
    chat = record("<image>\nWhat is it?", "A cat.", "And then?", "It sleeps;\nassistant\nno more.", video="three.mp4")
    chat["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    sample = encode_chat(processor, chat, media_root=media)
    ids, labels = expected_ids_and_labels(
        processor,
        [
            ("system", ["Be brief."]),
            ("user", [3 * 9, "What is it?"]),
            ("assistant", ["A cat."]),
            ("user", ["And then?"]),
            ("assistant", ["It sleeps;\nassistant\nno more."]),
        ],
    )
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == labels


def test_marks_written_in_an_answer_are_characters_and_end_nothing(media):
    processor = tiny_processor()
    sample = encode_chat(processor, record("Say it.", "a<|im_end|>b"), media_root=media)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sample["labels"].tolist().count(end) == 1
    assert spoken(processor, sample) == "a<|im_end|>b<|im_end|>"


def test_a_template_without_generation_marks_is_refused():
    processor = tiny_processor(chat_template="{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    with pytest.raises(UnusableSample, match=r"% generation %"):
        encode_chat(processor, record("a", "b"))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_holds_unequal_videos_images_and_text_and_gives_each_sample_its_own_loss(media):
    processor = tiny_processor()
    written = [
        record("<image>\nWhat?", "A cat.", video="three.mp4"),
        record("Only words?", "Yes."),
        record("<video> and <image>", "B.", video="five.mp4", image="picture.png"),
    ]
    dataset = CrossLMMDataset(written, processor, media_root=media)
    collator = CrossLMMDataCollator(processor)
    batch = collator([dataset[i] for i in range(3)])
    assert batch["video_num_frames"].tolist() == [3, 5]
    assert batch["pixel_values_videos"].shape == (8, 3, 33, 33)
    assert batch["pixel_values"].shape == (1, 3, 33, 33)
    assert batch["attention_mask"].sum(1).tolist() == [len(dataset[i]["input_ids"]) for i in range(3)]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()

    vocabulary = {"vocab_size": len(processor.tokenizer)}
    ids = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    model = random_model(tiny_config(text_config=vocabulary, **ids))
    with torch.no_grad():
        together = model(**batch, num_items_in_batch=1).loss
        alone = [model(**collator([dataset[i]]), num_items_in_batch=1).loss for i in range(3)]
    torch.testing.assert_close(together, sum(alone))


def test_a_batch_without_media_has_no_pixels():
    processor = tiny_processor()
    collator = CrossLMMDataCollator(processor)
    batch = collator([record("a", "b"), record("a longer one", "c")])  # records: the collator encodes them itself
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == batch["labels"].shape


def test_a_collator_given_records_applies_its_own_rules(media):
    collator = CrossLMMDataCollator(tiny_processor(), media_root=media, max_length=75)
    assert collator([video_record()])["video_num_frames"].tolist() == [3]
    with pytest.raises(UnusableSample, match="`max_length` 75"):
        collator([video_record("five.mp4")])


def test_a_batch_without_anything_to_learn_is_refused():
    processor = tiny_processor()
    sample = encode_chat(processor, record("a", "b"))
    silent = sample | {"labels": torch.full_like(sample["labels"], IGNORED)}
    collator = CrossLMMDataCollator(processor)
    collator([sample, silent])
    with pytest.raises(ValueError, match="Nothing to learn"):
        collator([silent, silent])


def test_tokens_that_somebody_else_made_of_a_chat_are_refused():
    with pytest.raises(ValueError, match=r"no `labels`.*skip_prepare_dataset"):
        CrossLMMDataCollator(tiny_processor())([{"input_ids": [1, 2, 3]}])


def test_frames_and_arrays_in_memory_train_as_well():
    frames = random_frames(4)
    turns = [
        {"role": "user", "content": [{"type": "video", "video": [Image.fromarray(frame) for frame in frames]}]},
        {"role": "assistant", "content": "A."},
    ]
    sample = encode_chat(tiny_processor(), {"messages": turns})
    turns[0]["content"] = [{"type": "video", "video": np.asarray(frames)}]
    assert torch.equal(
        sample["pixel_values_videos"], encode_chat(tiny_processor(), {"messages": turns})["pixel_values_videos"]
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "LAB"])
def test_an_image_may_have_any_mode_and_shape(mode, tmp_path):
    Image.new(mode, (1, 3000)).save(tmp_path / "odd.tiff")
    sample = encode_chat(tiny_processor(), record("<image>", "A.", image="odd.tiff"), media_root=tmp_path)
    assert sample["pixel_values"].shape == (1, 3, 33, 33)
    assert torch.isfinite(sample["pixel_values"]).all()


def test_unchanged_frames_are_skipped_in_training_and_the_loss_stays(tmp_path):
    for name, frame in zip("abc", random_frames(3), strict=True):
        Image.fromarray(frame).save(tmp_path / f"{name}.png")
    records = []
    for videos in (["aaab", "bb"], [], ["caa"]):
        seen = [{"type": "video", "video": [f"{name}.png" for name in names]} for names in videos]
        turns = [{"role": "user", "content": [*seen, "?"]}, {"role": "assistant", "content": "Yes."}]
        records.append({"messages": turns})
    processor = tiny_processor()
    config = tiny_config(
        text_config={"vocab_size": len(processor.tokenizer)},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    model = random_model(config)
    every = CrossLMMDataCollator(processor, media_root=tmp_path)(records)
    processor.video_processor.skip_unchanged = True
    distinct = CrossLMMDataCollator(processor, media_root=tmp_path)(records)
    assert distinct["video_frame_index"].tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4]
    assert len(distinct["pixel_values_videos"]) == 5
    torch.testing.assert_close(model(**distinct).loss, model(**every).loss)
    frames = {"pixel_values_videos": torch.zeros(2, 3, 33, 33)}  # of a processor that skips none
    mixed = join_pixels([encode_chat(processor, records[0], media_root=tmp_path), frames])
    assert mixed["video_frame_index"].tolist() == [0, 0, 0, 1, 2, 2, 3, 4]
