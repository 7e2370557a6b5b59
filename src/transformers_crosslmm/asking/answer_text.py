"""Decodes the text of an answer while its tokens are generated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class AnswerText(BaseStreamer):
    """A streamer for `generate`: passes the answer on in pieces, each when its text is final, and ends it before the
    first stop string.

    on_text: called with each piece. stop: texts that end the answer and are not part of it.
    num_tokens: number of generated tokens. is_stopped: whether a stop string was found; later tokens are ignored.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], *, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.on_text, self.stop = tokenizer, on_text, stop
        self.num_tokens = 0
        self.is_stopped = False
        self._waits_for_prompt = True
        self._token_ids: list[int] = []
        self._begin = self._end = 0  # range of the tokens decoded last
        self._uncertain = ""

    def put(self, value: torch.Tensor) -> None:
        if self._waits_for_prompt:  # `generate` passes the prompt first
            self._waits_for_prompt = False
            return
        if self.is_stopped:  # `generate` checks stopping criteria before it passes a token on, so one more arrives
            return
        self._token_ids += value.flatten().tolist()
        self.num_tokens = len(self._token_ids)
        if not (piece := self._decoded()).endswith("\ufffd"):  # otherwise the last character is incomplete
            self._begin, self._end = self._end, self.num_tokens
            self._add(piece)

    def end(self) -> None:
        self._add(self._decoded())
        self._emit(len(self._uncertain))

    def _decoded(self) -> str:
        """The text of the tokens since the last complete character.

        Earlier tokens are decoded too, because some tokenizers decode the first token of a text differently.
        """

        def decode(token_ids: list[int]) -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=True)

        return decode(self._token_ids[self._begin :])[len(decode(self._token_ids[self._begin : self._end])) :]

    def _add(self, piece: str) -> None:
        if self.is_stopped:
            return
        self._uncertain += piece
        found = [place for stop in self.stop if (place := self._uncertain.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._emit(min(found))
            self._uncertain = ""
            return
        longest = min(max(map(len, self.stop), default=1) - 1, len(self._uncertain))
        begun = (n for n in range(longest, 0, -1) if any(s.startswith(self._uncertain[-n:]) for s in self.stop))
        self._emit(len(self._uncertain) - next(begun, 0))

    def _emit(self, length: int) -> None:
        piece, self._uncertain = self._uncertain[:length], self._uncertain[length:]
        if piece:
            self.on_text(piece)


__all__ = ["AnswerText"]
