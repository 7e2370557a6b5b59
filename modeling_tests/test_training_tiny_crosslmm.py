"""The tiny run's parts: its tokenizer, its samples and its labels, each against what a user's call gives."""

import numpy as np
import pytest
import torch

from transformers_crosslmm import CrossLMMProcessor
from transformers_crosslmm.data_crosslmm import IGNORED, VideoChatCollator, chat_sample
from transformers_crosslmm.procedural_videos import (
    COLOURS,
    NAMES,
    PLACES,
    Question,
    random_generator,
    random_video,
    render_frame,
)
from transformers_crosslmm.processing_crosslmm import CHAT_TEMPLATE
from transformers_crosslmm.training_tiny_crosslmm import (
    PatchLabelFrames,
    TinyArguments,
    VideoChats,
    build_tokenizer,
    degrade,
    repaint,
    tiny_config,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def chats(tokenizer):
    arguments = TinyArguments(output_dir="", steps=10, batch_size=2, questions_per_video=3)
    return VideoChats(arguments=arguments, tokenizer=tokenizer, config=tiny_config(tokenizer))


def test_every_answer_is_one_token(tokenizer):
    for word in [*COLOURS, *NAMES, *PLACES, "yes", "no", *map(str, range(1, 9))]:
        assert len(tokenizer.tokenize(word)) == 1, word
        assert len(tokenizer.tokenize(f" {word}")) == 1, word


@pytest.mark.parametrize("text", ["Über 2 Äpfel?", "naïve\n\n\tcafé", "視頻", "<|im_start|x", "top-left-ish 123"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_training_sample_is_what_the_processor_makes_of_the_same_chat(chats, tokenizer):
    video = random_video(random_generator(seed=1, split="train", index=0), num_seconds=5)
    size = chats.config.vision_config.image_size
    frames = np.stack([render_frame(video, k + 0.5, size=size) for k in range(5)])
    questions = [
        Question("colour", "What colour is the seven in frame 2?", "red"),
        Question("order", "Which comes first, the red star or the blue two?", "blue two"),
    ]
    sample = chats.sample(questions, frames)
    batch = VideoChatCollator(tokenizer.pad_token_id)([sample])

    processor = CrossLMMProcessor.from_config(chats.config, tokenizer)
    chat = [
        {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": questions[0].text}]},
        {"role": "assistant", "content": [{"type": "text", "text": questions[0].answer}]},
        {"role": "user", "content": [{"type": "text", "text": questions[1].text}]},
        {"role": "assistant", "content": [{"type": "text", "text": questions[1].answer}]},
    ]
    inputs = processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"do_sample_frames": False, "return_tensors": "pt"},
    )
    assert torch.equal(batch["input_ids"], inputs["input_ids"])
    assert torch.equal(batch["video_num_frames"], inputs["video_num_frames"])
    torch.testing.assert_close(batch["pixel_values_videos"], inputs["pixel_values_videos"])


def test_only_the_answers_and_their_end_are_learned(chats, tokenizer):
    questions = [Question("shape", "Name the red thing in frame 1.", "star"), Question("exists", "A star?", "yes")]
    sample = chats.sample(questions, np.zeros((1, 60, 60, 3), np.uint8))
    learned = [token for token in sample["labels"] if token != IGNORED]
    assert tokenizer.convert_ids_to_tokens(learned) == ["star", "<|im_end|>", "yes", "<|im_end|>"]
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (IGNORED, token)


def test_a_placeholder_is_repeated_for_every_token_of_its_medium(tokenizer):
    placeholder = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "video"}]}]
    sample = chat_sample(tokenizer, chat, chat_template=CHAT_TEMPLATE, placeholder_id=placeholder, placeholders=[3, 5])
    marks = "".join("v" if token == placeholder else "." for token in sample["input_ids"])
    assert [len(run) for run in marks.strip(".").split(".") if run] == [3, 5]


def test_a_batch_pads_text_and_joins_videos(tokenizer):
    samples = [
        {"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6], "frames": np.full((2, 7, 7, 3), 255, np.uint8)},
        {"input_ids": [9], "labels": [9], "frames": np.zeros((3, 7, 7, 3), np.uint8)},
    ]
    batch = VideoChatCollator(pad_token_id=1)(samples)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [9, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 6], [9, IGNORED, IGNORED]]
    assert batch["video_num_frames"].tolist() == [2, 3]
    assert batch["pixel_values_videos"].shape == (5, 3, 7, 7)
    assert batch["pixel_values_videos"][:2].eq(1).all()
    assert batch["pixel_values_videos"][2:].eq(-1).all()


def test_the_same_seed_gives_the_same_samples(chats):
    first, again = iter(chats), iter(chats)
    for _ in range(3):
        one, other = next(first), next(again)
        assert one["input_ids"] == other["input_ids"]
        assert np.array_equal(one["frames"], other["frames"])


def test_videos_grow_to_eight_scenes(chats):
    rng = np.random.default_rng(0)
    begin = {chats.num_seconds(rng, 0.0) for _ in range(100)}
    end = [chats.num_seconds(rng, 1.0) for _ in range(400)]
    assert max(begin) <= 3
    assert max(end) == 8
    assert end.count(8) > 200


def test_vision_never_learns_which_colour_goes_with_which_name():
    samples = iter(PatchLabelFrames(seed=0, size=60, grid=5, videos_per_round=3))
    things = 0
    for _ in range(24):
        sample = next(samples)
        thing = sample["names"] != len(NAMES)
        things += thing.sum()
        # Of what covers a patch either the colour is asked or the name.
        assert ((sample["colours"] == IGNORED)[thing] ^ (sample["names"] == IGNORED)[thing]).all()
        assert (sample["colours"][~thing] == len(COLOURS)).all()
    assert things > 100


def test_repainted_things_are_far_from_every_colour_of_the_palette():
    rng = random_generator(seed=2, split="train", index=0)
    plain = random_video(rng)
    painted = repaint(rng, plain, share=1.0)
    for before, after in zip(plain.scenes, painted.scenes, strict=True):
        for a, b in zip(before, after, strict=True):
            assert (a.thing, a.place, a.start, a.end) == (b.thing, b.place, b.start, b.end)
            assert min(sum(abs(x - y) for x, y in zip(b.rgb, rgb, strict=True)) for rgb in COLOURS.values()) > 90


def test_degraded_frames_stay_recognisable():
    rng = np.random.default_rng(4)
    frames = np.stack([np.full((60, 60, 3), level, np.uint8) for level in (60, 128, 190)])
    for _ in range(20):
        changed = degrade(rng, frames)
        assert changed.dtype == np.uint8
        # Contrast within 10 %, brightness and tint within 15 levels, noise within 8.
        assert np.abs(changed.astype(float) - frames).max() <= 0.1 * 68 + 15 + 8 + 1
