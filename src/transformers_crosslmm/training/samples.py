"""Encodes chats as token ids and labels, of which only the assistant's are learned, and collates them to batches.

Shapes: B rows, L tokens, F frames of all videos of the batch, S pixels along a side.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..media_crosslmm import join_pixels
from ..processing_crosslmm import CrossLMMProcessor
from ..video_decoding import VideoDecodeWarning
from .records import UnusableSample, chat_of, with_media_below

IGNORED = -100
"""Label of tokens without a loss."""


def chat_sample(
    tokenizer: PreTrainedTokenizerBase,
    chat: list[dict[str, Any]],
    *,
    chat_template: str,
    placeholder_id: int,
    placeholders: Sequence[int],
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a chat whose media are already processed.

    placeholders: tokens of each medium, in order; the template writes one placeholder per medium, which is repeated
    that often. Only tokens that the template marks as the assistant's are learned: answers and their end marks.
    """
    encoded: Any = tokenizer.apply_chat_template(
        cast(Any, chat), chat_template=chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    counts = iter(placeholders)
    sample: dict[str, list[int]] = {"input_ids": [], "labels": []}
    for token_id, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        times = next(counts) if token_id == placeholder_id else 1
        sample["input_ids"] += [token_id] * times
        sample["labels"] += [token_id if is_answer else IGNORED] * times
    return sample


def encode_chat(
    processor: CrossLMMProcessor,
    record: Mapping[str, Any],
    *,
    media_root: str | os.PathLike | None = None,
    max_length: int | None = None,
) -> dict[str, torch.Tensor]:
    """Encodes a record (see `chat_of`) as model inputs without a batch dimension, and `labels`.

    Only the assistant's answers and their end marks are learned, in every turn. Frames are sampled by the processor's
    own settings. max_length: most tokens, those of frames included.

    Raises UnusableSample for a record that is broken or too long, or whose media cannot be decoded completely.
    """
    chat = with_media_below(chat_of(record), media_root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", VideoDecodeWarning)  # frames that stayed black
            encoded = processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
    except Exception as error:  # decoders raise any class: a PNG with a damaged chunk is a SyntaxError
        media = ", ".join(_named(part) for message in chat for part in message["content"] if part["type"] != "text")
        raise UnusableSample(f"{media or 'text'}: {error}") from error
    (input_ids,), (is_answer,) = encoded.pop("input_ids"), encoded.pop("assistant_masks")
    encoded.pop("attention_mask")
    if max_length is not None and len(input_ids) > max_length:
        raise UnusableSample(f"{len(input_ids)} tokens are more than `max_length` {max_length}.")
    ids = torch.tensor(input_ids)
    labels = ids.masked_fill(~torch.tensor(is_answer, dtype=torch.bool), IGNORED)
    if not (labels != IGNORED).any():
        raise UnusableSample(
            "no tokens of the assistant: the chat template must mark its turns with {% generation %} … "
            "{% endgeneration %}."
        )
    return {"input_ids": ids, "labels": labels, **encoded}


def _named(part: Mapping[str, Any]) -> str:
    source = next(value for name, value in part.items() if name != "type")
    return str(source) if isinstance(source, Path) else f"{part['type']} in memory"


@dataclass(frozen=True)
class CrossLMMDataCollator:
    """Collates samples to a batch: texts padded on the right, videos and images concatenated.

    Samples are results of `encode_chat`, or records for it (such as a `datasets` row with `messages`).
    processor: the model's. media_root, max_length: see `encode_chat`; for records only.

    Returns `input_ids`, `attention_mask` and `labels` (B, L) and, if the batch has media, `pixel_values_videos`
    (F, 3, S, S) with `video_num_frames` (videos,) and, if unchanged frames were skipped, `video_frame_index`, and
    `pixel_values` (images, 3, S, S). Raises UnusableSample for records that cannot be used, ValueError for a batch
    without any token to learn and for samples without `labels`.
    """

    processor: CrossLMMProcessor
    media_root: str | os.PathLike | None = None
    max_length: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        encoded = [self._encoded(sample) for sample in samples]
        ids = [torch.as_tensor(sample["input_ids"]) for sample in encoded]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(
                [torch.as_tensor(sample["labels"]) for sample in encoded], batch_first=True, padding_value=IGNORED
            ),
        }
        if not (batch["labels"][:, 1:] != IGNORED).any():
            raise ValueError("Nothing to learn: no sample of this batch has a token of the assistant.")
        return batch | join_pixels(encoded)

    def _encoded(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        if "input_ids" not in sample:
            return encode_chat(self.processor, sample, media_root=self.media_root, max_length=self.max_length)
        missing = "`labels`" if "labels" not in sample else "pixels" if _lost_its_media(sample) else None
        if missing:
            raise ValueError(
                f"A sample has `input_ids` and no {missing}: its chat was tokenized before the collator, without the "
                'media. With TRL pass `dataset_kwargs={"skip_prepare_dataset": True}`.'
            )
        return sample

    @property
    def _padding(self) -> int:
        tokenizer: Any = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _lost_its_media(sample: Mapping[str, Any]) -> bool:
    """Whether a tokenized sample still has its chat with media, but no pixels."""
    if any(sample.get(name) is not None for name in ("pixel_values_videos", "pixel_values")):
        return False
    if any(sample.get(name) for name in ("image", "images", "video", "videos")):
        return True
    contents = [turn.get("content") for turn in sample.get("messages") or () if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in ("image", "video") for part in parts)
