"""The evaluation counts what `generate` says about real files; the shipped checkpoint answers its sample video."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.measuring.quality import (
    VideoQuestion,
    closed_gates,
    evaluate,
    interval,
    is_within_a_frame,
    move_timestamps,
    read_questions,
)
from transformers_crosslmm.tiny.procedural_videos import write_timed_videos, write_videos
from transformers_crosslmm.tiny.train import build_tokenizer, tiny_config

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, num_videos=2, seed=3, split="heldout", size=64, fps=2)
    return folder


def untrained(*, add_timestamps=False, **options):
    tokenizer = build_tokenizer()
    config = tiny_config(tokenizer, **options)
    model = CrossLMMForConditionalGeneration(config).eval()
    return model, CrossLMMProcessor.from_config(config, tokenizer, add_timestamps=add_timestamps)


@pytest.mark.parametrize(
    ("right", "asked", "expected"),
    # Wilson's interval by hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.
    [(8, 10, (0.4902, 0.9433)), (0, 20, (0.0, 0.1611)), (50, 50, (0.9287, 1.0))],
    ids=str,
)
def test_the_interval_is_wilsons(right, asked, expected):
    assert interval(right, asked) == pytest.approx(expected, abs=1e-4)


def test_nothing_asked_says_nothing():
    assert interval(0, 0) == (0.0, 1.0)


def test_an_answer_counts_when_it_is_the_truth_to_the_letter(videos, monkeypatch):
    model, processor = untrained(cross_attention=False)
    questions = read_questions(videos)
    truths = iter([question.answer for question in questions])
    wrong = iter([i % 3 == 0 for i in range(len(questions))])

    def told(_model, inputs, _processor):
        return [next(truths) + "!" * next(wrong) for _ in inputs["input_ids"]]

    monkeypatch.setattr("transformers_crosslmm.measuring.quality.answer_questions", told)
    scores = evaluate(model, processor, questions)["as_trained"]
    total = scores["fine_detail"]["right"] + scores["order_and_count"]["right"]
    assert total == len(questions) - len(range(0, len(questions), 3))
    assert scores["colour"]["chance"] == 1 / 8


def test_closed_gates_open_again_and_change_the_logits_meanwhile(videos):
    model, processor = untrained()
    question = read_questions(videos)[0]
    inputs = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "video", "path": str(question.video)}, {"type": "text", "text": "What?"}],
            }
        ],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_frames": 4, "return_tensors": "pt"},
    )
    with torch.no_grad():
        before = model(**inputs).logits
        with closed_gates(model):
            inside = model(**inputs).logits
        after = model(**inputs).logits
    assert not torch.allclose(before, inside, atol=1e-3)
    assert torch.equal(before, after)


def test_a_checkpoint_is_scored_with_and_without_cross_attention(videos):
    scores = evaluate(*untrained(), read_questions(videos))
    assert set(scores) == {"as_trained", "gates_0"}
    asked = sum(scores["gates_0"][name]["asked"] for name in ("fine_detail", "order_and_count"))
    assert asked == len(read_questions(videos))


def prompts(processor, chats, **options):
    return processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt", **options},
    )


def test_moved_timestamps_are_those_of_the_frames_half_the_video_further_on(tmp_path):
    write_timed_videos(tmp_path, num_videos=1, seed=3, split="heldout", size=64, fps=8)
    _, processor = untrained(add_timestamps=True)
    path = str(tmp_path / "00000.mp4")
    chats = [
        [{"role": "user", "content": [{"type": "video", "path": path}, {"type": "text", "text": text}]}]
        for text in ("When?", "Is 1 < 2? <3.4 seconds>")
    ]
    times = [1.0, 2.0, 3.5, 10.0, 11.5]  # two lengths of numbers
    inputs = prompts(processor, chats, times=times)
    moved = move_timestamps(inputs, processor)
    before, after = (processor.batch_decode(each["input_ids"]) for each in (inputs, moved))
    order = [3.5, 10.0, 11.5, 1.0, 2.0]
    for old, new in zip(before, after, strict=True):
        old_video, new_video = ("".join(f"<{t:.1f} seconds><|video_pad|>" for t in each) for each in (times, order))
        assert old.count(old_video) == 1
        assert new == old.replace(old_video, new_video)
    assert moved["pixel_values_videos"] is inputs["pixel_values_videos"]


@pytest.mark.parametrize(
    ("answer", "is_near"),
    [("7.1", True), ("2.5", True), ("30.0", True), ("1.0", False), ("31.5", False), ("7.0", False), ("seven", False)],
)
def test_a_time_is_near_when_it_is_that_of_the_next_frame_however_far_that_is(answer, is_near):
    question = VideoQuestion(Path("clip.mp4"), "when", "When?", "7.1 seconds", [1.0, 2.5, 7.125, 30.0, 31.5])
    assert is_within_a_frame(f"{answer} seconds", question) == is_near


def test_frames_are_those_at_the_times_of_the_record_and_moved_timestamps_are_scored(tmp_path, monkeypatch):
    write_timed_videos(tmp_path, num_videos=2, seed=3, split="heldout", size=64, fps=8)
    model, processor = untrained(add_timestamps=True)
    questions = read_questions(tmp_path)
    seen = []

    def told(_model, inputs, processor):
        seen.append(processor.batch_decode(inputs["input_ids"][:1])[0])
        return [""] * len(inputs["input_ids"])

    monkeypatch.setattr("transformers_crosslmm.measuring.quality.answer_questions", told)
    scores = evaluate(model, processor, questions)
    assert set(scores) == {"as_trained", "gates_0", "timestamps_moved"}
    assert scores["timestamps_moved"]["times"]["asked"] == sum(q.kind in ("frame_time", "when") for q in questions) > 2
    assert "".join(f"<{t:.1f} seconds><|video_pad|>" for t in questions[0].times) in seen[0]
    assert seen[0] == seen[1] != seen[2]


def test_the_shipped_checkpoint_answers_the_questions_about_the_sample_video():
    sample = json.loads((SAMPLES / "questions.json").read_text())
    assert len(sample["questions"]) == 6
    model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(TINY_CHECKPOINT)
    for question in sample["questions"]:
        inputs = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "path": str(SAMPLES / sample["video"])},
                        {"type": "text", "text": question["question"]},
                    ],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={
                "num_frames": sample["num_frames"],
                "add_timestamps": question.get("add_timestamps"),
                "return_tensors": "pt",
            },
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert answer.strip() == question["answer"], question


def test_the_shipped_weights_are_small():
    assert (TINY_CHECKPOINT / "model.safetensors").stat().st_size <= 7.5e6
