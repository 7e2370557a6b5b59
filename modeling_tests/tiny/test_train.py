"""The tiny run's parts: its tokenizer, its samples and its labels, each against what a user's call gives."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from transformers_crosslmm import CrossLMMProcessor
from transformers_crosslmm.processing_crosslmm import CHAT_TEMPLATE
from transformers_crosslmm.tiny.procedural_videos import (
    COLOURS,
    KINDS,
    NAMES,
    PLACES,
    Question,
    random_generator,
    random_video,
    render_frame,
)
from transformers_crosslmm.tiny.train import (
    Curriculum,
    PatchLabelFrames,
    TinyArguments,
    VideoChats,
    build_tokenizer,
    degrade,
    repaint,
    tiny_config,
)
from transformers_crosslmm.training.samples import IGNORED, CrossLMMDataCollator, chat_sample


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
        Question("colour", "What colour is the seven in frame 2?", "red", ()),
        Question("order", "Which comes first, the red star or the blue two?", "blue two", ()),
    ]
    sample = chats.sample(questions, frames)
    processor = CrossLMMProcessor.from_config(chats.config, tokenizer)
    batch = CrossLMMDataCollator(processor)([sample])
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
    questions = [
        Question("shape", "Name the red thing in frame 1.", "star", ()),
        Question("exists", "A star?", "yes", ()),
    ]
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


def test_a_batch_pads_text_and_joins_videos(chats, tokenizer):
    frames = [np.full((2, 7, 7, 3), 255, np.uint8), np.zeros((3, 7, 7, 3), np.uint8)]
    samples = [
        chats.sample([], frames[0]) | {"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]},
        chats.sample([], frames[1]) | {"input_ids": [9], "labels": [9]},
    ]
    batch = CrossLMMDataCollator(CrossLMMProcessor.from_config(chats.config, tokenizer))(samples)
    padding = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[4, 5, 6], [9, padding, padding]]
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
        assert torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])


def scenes_with_things(video) -> int:
    return sum(map(bool, video.scenes))


def test_clips_show_more_from_level_to_level(chats):
    rng = np.random.default_rng(0)
    chats.level = 2
    clips = [chats.clip(rng) for _ in range(100)]
    # Things in three scenes at most, or a last stay of four that begins in the second.
    assert max(map(scenes_with_things, clips)) <= 6
    chats.level = 12
    clips = [chats.clip(rng) for _ in range(100)]
    assert {clip.num_seconds for clip in clips} >= {2, 5, 8}
    assert max(map(scenes_with_things, clips)) == 8
    assert Counter(clip.num_seconds for clip in clips)[8] > 60


def test_the_first_level_shows_stills_alone_and_of_two_things(chats):
    rng = np.random.default_rng(3)
    videos = [chats.video(rng) for _ in range(40)]
    assert {tuple(map(len, video.scenes)) for video in videos} == {(2,)}
    chats.level = 2
    lengths = Counter(chats.video(rng).num_seconds == 1 for _ in range(300))
    assert 70 < lengths[True] < 130  # a third of 300, give or take 3.7 standard deviations


def test_questions_about_time_come_one_level_after_the_other(chats):
    video = random_video(np.random.default_rng(2))
    kinds = []
    for chats.level in range(1, 6):
        kinds.append(set(chats.kinds_of(video)))
    assert [sorted(after - before) for before, after in pairwise(kinds)] == [
        ["which_frame"], ["count"], ["order"], []
    ]  # fmt: skip
    assert kinds[-1] == set(KINDS)


def test_stills_hold_several_things_and_are_not_asked_about_time(chats):
    rng = np.random.default_rng(1)
    chats.level = 9
    stills = [chats.still(rng) for _ in range(60)]
    assert {len(still.scenes) for still in stills} == {1}
    assert {len(still.scenes[0]) for still in stills} == {2, 3, 4}
    assert {question.kind for still in stills for question in chats.questions(rng, still)} == {
        "colour", "shape", "place", "exists"
    }  # fmt: skip


class Parrot(torch.nn.Module):
    """Says what it was told to: the labels, or nothing but the first token."""

    def __init__(self, vocab_size: int, *, is_right: bool):
        super().__init__()
        self.vocab_size, self.is_right = vocab_size, is_right

    def forward(self, input_ids, **inputs):
        said = input_ids.roll(-1, dims=1) if self.is_right else torch.zeros_like(input_ids)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, self.vocab_size).float())


def steps_at_each_level(chats, tokenizer, *, is_right: bool, steps: int) -> Counter:
    collator = CrossLMMDataCollator(CrossLMMProcessor.from_config(chats.config, tokenizer))
    curriculum = Curriculum(chats, collator, every=5, num_videos=6)
    model = Parrot(len(tokenizer), is_right=is_right)
    levels = Counter()
    for step in range(1, steps + 1):
        levels[chats.level] += 1
        curriculum.on_step_end(None, SimpleNamespace(global_step=step), None, model=model)
    return levels


def test_the_level_goes_up_when_the_answers_are_right(chats, tokenizer):
    assert steps_at_each_level(chats, tokenizer, is_right=True, steps=20) == {1: 5, 2: 5, 3: 5, 4: 5}


def test_the_level_goes_up_after_a_fifteenth_of_the_steps_where_they_are_wrong(chats, tokenizer):
    chats.arguments.steps = 150
    assert steps_at_each_level(chats, tokenizer, is_right=False, steps=30) == {1: 10, 2: 10, 3: 10}


def test_kinds_that_are_mistaken_are_asked_more(chats):
    rng = np.random.default_rng(5)
    videos = [random_video(rng) for _ in range(60)]
    chats.level = 9
    chats.mistakes = dict.fromkeys(KINDS, 0.1) | {"place": 0.9}
    kinds = Counter(question.kind for video in videos for question in chats.questions(rng, video))
    assert kinds["place"] == max(kinds.values())
    assert set(kinds) == set(KINDS)


def test_no_thing_and_no_kind_comes_up_in_two_questions_of_a_chat(chats):
    rng = np.random.default_rng(6)
    chats.level = 9
    for _ in range(40):
        questions = chats.questions(rng, random_video(rng))
        things = [thing for question in questions for thing in question.things]
        assert things
        assert len(set(things)) == len(things)
        assert len({question.kind for question in questions}) == len(questions)


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
