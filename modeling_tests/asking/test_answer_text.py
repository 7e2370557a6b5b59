"""The pieces in which an answer is handed out, put together and compared with the tokens decoded at once."""

import itertools
import random

import pytest
import torch

from factories import tiny_tokenizer
from transformers_crosslmm.asking.answer_text import AnswerText


def written(token_ids: list[int], stop: list[str] = []) -> tuple[AnswerText, list[str]]:  # noqa: B006
    """What `generate` does with a streamer that may end the answer."""
    pieces: list[str] = []
    text = AnswerText(tiny_tokenizer(), pieces.append, stop=stop)
    text.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token_id in token_ids:
        text.put(torch.tensor([token_id]))
        if text.is_stopped:
            break
    text.end()
    return text, pieces


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["A red circle.", "Grüße, 世界 🎈🎈!", "\n\n  indented", "<|im_end|>"])
def test_the_pieces_are_the_text_and_cut_no_character(text):
    token_ids = ids_of(text)
    answer, pieces = written(token_ids)
    assert "".join(pieces) == tiny_tokenizer().decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)
    assert answer.num_tokens == len(token_ids)


def test_bytes_that_are_no_text_come_out_as_they_do_at_once():
    draw = random.Random(0)
    for _ in range(50):
        token_ids = [draw.randrange(256) for _ in range(30)]
        _, pieces = written(token_ids)
        assert "".join(pieces) == tiny_tokenizer().decode(token_ids)


@pytest.mark.parametrize(
    "stop", [["red"], ["r"], ["e"], ["ed c"], ["d c", "red"], ["cl", "circles"], ["xyz"], ["d circle."]]
)
def test_the_answer_ends_before_its_first_stop_string(stop):
    text = "a red circle, a red square"
    found = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    answer, pieces = written(ids_of(text), stop)
    # The one that is complete first ends the answer, and at once.
    assert "".join(pieces) == text[: min(found)[1] if found else len(text)]
    assert answer.is_stopped == bool(found)
    assert answer.num_tokens <= (min(found)[0] if found else len(text))


def test_what_may_begin_a_stop_string_waits_and_nothing_else_does():
    pieces: list[str] = []
    text = AnswerText(tiny_tokenizer(), pieces.append, stop=["abc"])
    text.put(torch.tensor([[1]]))
    seen = []
    for token_id in ids_of("xabxab"):
        text.put(torch.tensor([token_id]))
        seen.append("".join(pieces))
    assert seen == ["x", "x", "x", "xabx", "xabx", "xabx"]
    text.end()
    assert "".join(pieces) == "xabxab"


def test_stop_strings_over_all_places_equal_a_search_in_the_whole():
    for letters in itertools.product("ab", repeat=7):
        text = "".join(letters)
        _, pieces = written(ids_of(text), ["aab", "ba"])
        # The one that is complete first ends the answer.
        found = [(text.find(word) + len(word), text.find(word)) for word in ("aab", "ba") if word in text]
        assert "".join(pieces) == text[: min(found)[1] if found else len(text)]
