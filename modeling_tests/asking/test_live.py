"""A live video beside the same frames given at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

import transformers_crosslmm.asking.live as live_module
from factories import random_frames, random_model, tiny_config, tiny_processor
from numerics import assert_close_to_scale
from transformers_crosslmm.asking.conversation import end_token_ids
from transformers_crosslmm.asking.live import LiveVideo

SIZE = 12
TIMES = [0.2, 0.4, 1.5, 2.2, 3.0, 3.1, 5.7, 6.0, 8.8, 9.4, 10.0, 12.3]
QUESTION = "What has changed?"


def model_and_processor(scope: str = "causal", *, add_timestamps: bool = True, **text):
    processor = tiny_processor(add_timestamps=add_timestamps, time_instruction=True)
    options = {"visual_norm": "layernorm", "visual_time": "sinusoidal", "max_position_embeddings": 2048}
    config = tiny_config(
        text_config={"vocab_size": len(processor.tokenizer), "v2v_scope": scope} | options | text,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    return random_model(config).double(), processor


@dataclass
class Said:
    """An answer, and the logits of its last token: they depend on all that was seen and said before."""

    text: str
    logits: torch.Tensor

    def __eq__(self, other: "Said") -> bool:
        assert_close_to_scale(self.logits, other.logits, relative=1e-10)
        return self.text == other.text


@contextmanager
def last_logits(model) -> Iterator[list[torch.Tensor]]:
    logits = []
    hook = model.lm_head.register_forward_hook(lambda *call: logits.append(call[2][0, -1]))
    yield logits
    hook.remove()


def at_once(model, processor, frames: np.ndarray, times: list[float], question: str = QUESTION) -> Said:
    """What is said of frames that are all there, through the processor and `generate` alone."""
    metadata = {"fps": 10, "frames_indices": [round(10 * time) for time in times], "duration": times[-1]}
    turn = {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": question}]}
    inputs = processor.apply_chat_template(
        [turn],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"video_metadata": [metadata], "do_sample_frames": False},
    )
    options = {"max_new_tokens": 12, "eos_token_id": end_token_ids(model, processor), "pad_token_id": 0}
    with last_logits(model) as logits:
        written = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return Said(processor.tokenizer.decode(written, skip_special_tokens=True).strip(), logits[-1])


def ask(live: LiveVideo, question: str = QUESTION, **options) -> Said:
    with last_logits(live.model) as logits:
        answer = live.ask(question, max_new_tokens=12, **options)
    return Said(answer.text, logits[-1])


def in_pieces(length: int, *ends: int) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *ends, length])]


@pytest.mark.parametrize(
    ("scope", "add_timestamps"), [("causal", True), ("frame", True), ("video", True), ("causal", False)]
)
def test_its_answers_are_those_to_the_same_frames_given_at_once(scope, add_timestamps):
    model, processor = model_and_processor(scope, add_timestamps=add_timestamps)
    live, frames = LiveVideo(model, processor), random_frames(SIZE)
    answers = []
    for piece in in_pieces(SIZE, 1, 2, 7):
        assert live.add(frames[piece], TIMES[piece]) == 0
        answers.append(ask(live))
        assert answers[-1] == at_once(model, processor, frames[: piece.stop], TIMES[: piece.stop])
    assert len({answer.text for answer in answers}) > 2  # not the same whatever it sees


@pytest.mark.parametrize("scope", ["causal", "frame"])
def test_a_prompt_that_runs_in_chunks_gives_the_same(scope, monkeypatch):
    monkeypatch.setattr(live_module, "PREFILL_TOKENS", 50)  # ends within frames and within timestamps
    model, processor = model_and_processor(scope)
    live, frames = LiveVideo(model, processor), random_frames(SIZE)
    for piece in in_pieces(SIZE, 5):
        live.add(frames[piece], TIMES[piece])
    assert ask(live) == at_once(model, processor, frames, TIMES)


@pytest.mark.parametrize("scope", ["causal", "frame"])
def test_with_max_frames_it_forgets_the_oldest_quarter_and_encodes_nothing_twice(scope, monkeypatch):
    model, processor = model_and_processor(scope)
    encoded = []
    encode = model.get_video_features
    monkeypatch.setattr(model, "get_video_features", lambda pixels, **_: encoded.append(len(pixels)) or encode(pixels))
    live, frames = LiveVideo(model, processor, max_frames=8), random_frames(SIZE)
    forgotten = [live.add(frames[i : i + 1], TIMES[i : i + 1]) for i in range(SIZE)]
    assert forgotten == [0] * 8 + [2, 0, 2, 0]
    assert live.times == TIMES[4:]
    assert (live.num_seen, live.num_forgotten) == (SIZE, 4)
    assert ask(live) == at_once(model, processor, frames[4:], TIMES[4:])
    assert live.add(frames[:3], [20.0, 21.0, 22.0]) == 3
    kept = np.concatenate([frames[7:], frames[:3]])
    assert ask(live) == at_once(model, processor, kept, [*TIMES[7:], 20.0, 21.0, 22.0])
    assert encoded == [1] * SIZE + [3]


@pytest.mark.parametrize(
    ("scope", "options"),
    [("causal", {}), ("frame", {}), ("video", {}), ("causal", {"visual_norm": "none", "visual_time": "none"})],
    ids=["causal", "frame", "video", "not normalised"],
)
def test_unchanged_frames_are_encoded_and_kept_once_and_answers_stay_the_same(scope, options, monkeypatch):
    model, processor = model_and_processor(scope, **options)
    encoded = []
    encode = model.get_video_features
    monkeypatch.setattr(model, "get_video_features", lambda pixels, **_: encoded.append(len(pixels)) or encode(pixels))
    processor.video_processor.skip_unchanged = True
    live = LiveVideo(model, processor, max_frames=8)
    processor.video_processor.skip_unchanged = False  # what is given at once is encoded whole
    pictures = random_frames(5)[[0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 4]]
    for piece in in_pieces(SIZE, 1, 3, 7, 8, 9):  # once nothing new, and once what is shown was forgotten in part
        live.add(pictures[piece], TIMES[piece])
        first = live.num_forgotten
        given = pictures[first : piece.stop], TIMES[first : piece.stop]
        mine, count = ask(live), len(encoded)
        whole = at_once(model, processor, *given)
        del encoded[count:]
        assert mine.text == whole.text
        assert_close_to_scale(mine.logits, whole.logits, relative=1e-6)  # runs are merged in float32
    assert encoded == [1, 1, 1, 1, 1]
    assert live._original.untyped_storage().nbytes() <= 8 * live._original[0].nbytes
    assert live._num_distinct == 5
    assert live.add(pictures[-1:], [99.0]) == 2
    assert live._num_distinct == 4
    assert encoded == [1, 1, 1, 1, 1]
    kept = np.concatenate([pictures[6:], pictures[-1:]])
    whole = at_once(model, processor, kept, [*TIMES[6:], 99.0])
    assert_close_to_scale(ask(live).logits, whole.logits, relative=1e-6)


def test_what_is_shown_and_all_forgotten_is_encoded_again():
    model, processor = model_and_processor()
    processor.video_processor.skip_unchanged = 3
    live, frames = LiveVideo(model, processor, max_frames=1), random_frames(1)
    for second in range(3):
        live.add(frames, [float(second)])
    processor.video_processor.skip_unchanged = False
    assert ask(live) == at_once(model, processor, frames, [2.0])


def test_a_frame_that_could_not_be_encoded_is_not_taken_for_a_shown_one(monkeypatch):
    model, processor = model_and_processor()
    processor.video_processor.skip_unchanged = True
    live, frames = LiveVideo(model, processor), random_frames(2)
    live.add(frames[:1], [0.0])
    with monkeypatch.context() as broken:
        broken.setattr(model, "get_video_features", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            live.add(frames[1:], [1.0])
    live.add(frames[1:], [1.0])
    processor.video_processor.skip_unchanged = False
    assert ask(live) == at_once(model, processor, frames, [0.0, 1.0])


def test_of_more_new_frames_than_it_may_have_it_looks_at_the_last():
    model, processor = model_and_processor()
    live, frames = LiveVideo(model, processor, max_frames=3), random_frames(SIZE)
    live.add(frames[:2], TIMES[:2])
    assert live.add(frames[2:], TIMES[2:]) == 2
    assert live.times == TIMES[-3:]
    assert live.num_seen == 5
    assert ask(live) == at_once(model, processor, frames[-3:], TIMES[-3:])


def test_what_it_holds_stops_growing_and_has_the_patches_once():
    model, processor = model_and_processor()
    live, frames, sizes = LiveVideo(model, processor, max_frames=4), random_frames(1), []
    for second in range(10, 22):
        live.add(frames, [float(second)])
        tensors = [live._original, live._pooled, *(layer.keys for layer in live.cache.layers)]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert max(sizes) == max(sizes[:4])
    for layer in model.config.cross_attention_layer_indices:
        states = live.cache.layers[layer].memory.states
        assert states.untyped_storage().data_ptr() == live._original.untyped_storage().data_ptr()


def test_sessions_that_share_a_model_do_not_mix():
    model, processor = model_and_processor()
    lives = [LiveVideo(model, processor, max_frames=room) for room in (None, 4, 8)]
    videos = [random_frames(6, seed=seed) for seed in range(3)]
    for i in range(6):
        for live, frames in zip(lives, videos, strict=True):
            live.add(frames[i : i + 1], TIMES[i : i + 1])
    lives[0].forget()
    lives[0].add(videos[2], TIMES[:6])
    for live, frames in zip(lives, [videos[2], videos[1], videos[2]], strict=True):
        kept = len(live.times)
        assert ask(live) == at_once(model, processor, frames[6 - kept :], TIMES[6 - kept : 6])


def test_an_interrupted_answer_leaves_no_trace():
    model, processor = model_and_processor()
    live, frames = LiveVideo(model, processor), random_frames(5)
    live.add(frames[:3], TIMES[:3])
    pieces = []

    def stop_at_the_third(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(live, on_text=stop_at_the_third)
    whole = at_once(model, processor, frames[:3], TIMES[:3])
    assert whole.text.startswith("".join(pieces).strip())
    pieces.clear()
    assert ask(live, on_text=pieces.append) == whole
    assert "".join(pieces).strip() == whole.text
    live.add(frames[3:], TIMES[3:5])
    assert ask(live) == at_once(model, processor, frames, TIMES[:5])


@pytest.mark.parametrize("scope", ["causal", "frame"])
def test_an_interrupted_prefill_is_made_up_for(scope):
    model, processor = model_and_processor(scope)
    live, frames = LiveVideo(model, processor), random_frames(5)
    live.add(frames[:3], TIMES[:3])

    def stop(*_) -> None:
        hook.remove()
        raise KeyboardInterrupt

    def add_and_ask() -> None:
        live.add(frames[3:], TIMES[3:5])
        ask(live)

    hook = model.model.language_model.layers[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        add_and_ask()
    assert ask(live) == at_once(model, processor, frames, TIMES[:5])


def test_what_cannot_be_added_or_asked_says_why_and_changes_nothing():
    model, processor = model_and_processor()
    live, frames = LiveVideo(model, processor), random_frames(3)
    with pytest.raises(ValueError, match="no frame to ask about yet"):
        ask(live)
    with pytest.raises(ValueError, match="seconds from 0 to"):
        live.add(frames, [-1.0, 0.0, 1.0])
    live.add(frames[:2], [1.0, 2.0])
    for times in ([2.0], [1.5], [float("nan")], [float("inf")], [1e7]):
        with pytest.raises(ValueError, match="each later than the one before"):
            live.add(frames[2:], times)
    with pytest.raises(ValueError, match="as many times; got 1 and 2"):
        live.add(frames[2:], [3.0, 4.0])
    with pytest.raises(ValueError, match="at least one, and as many times; got 0 and 0"):
        live.add([], [])
    with pytest.raises(ValueError, match="needs words"):
        ask(live, " ")
    with pytest.raises(ValueError, match="fit the context of 2048 positions"):
        ask(live, "?" * 2000)
    assert (live.times, live.num_seen) == ([1.0, 2.0], 2)
    assert ask(live) == at_once(model, processor, frames[:2], [1.0, 2.0])


def test_more_frames_than_the_context_holds_are_refused_before_they_are_encoded(monkeypatch):
    model, processor = model_and_processor()
    monkeypatch.setattr(model, "get_video_features", None)
    tokens = 9 + len("<9999999.9 seconds>")  # a letter is a token
    most = (2048 - 128) // tokens
    with pytest.raises(ValueError, match=f"holds {most} frames beside a question; got {most + 1}"):
        LiveVideo(model, processor, max_frames=most + 1)
    with pytest.raises(ValueError, match="`max_frames` must be at least 1; got 0"):
        LiveVideo(model, processor, max_frames=0)
    LiveVideo(model, processor, max_frames=most)
    live = LiveVideo(model, processor)
    with pytest.raises(ValueError, match=f"Give `max_frames`, at most {most}"):
        live.add(random_frames(1).repeat(most + 1, axis=0), list(range(most + 1)))


def test_a_template_that_writes_the_question_first_is_refused():
    model, processor = model_and_processor()
    processor.chat_template = "{% for m in messages %}{{ m.content[1].text }}<|video_pad|>{% endfor %}"
    live = LiveVideo(model, processor)
    live.add(random_frames(1), [0.0])
    with pytest.raises(ValueError, match="write the video before the question"):
        ask(live)
