"""From chats to training samples: which tokens are learned, and how samples of different lengths become a batch.

Shapes: B rows, L tokens, F frames of all videos of the batch, S pixels along a side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned."""


def chat_sample(
    tokenizer: PreTrainedTokenizerBase,
    chat: list[dict[str, Any]],
    *,
    chat_template: str,
    placeholder_id: int,
    placeholders: Sequence[int],
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a chat whose media are prepared elsewhere.

    placeholders: tokens of each medium, in order; the template writes one placeholder per medium, and it is repeated
    that often. Only what the template marks as the assistant's is learned: the answers and the mark that ends them.
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


@dataclass(frozen=True)
class VideoChatCollator:
    """Samples to a batch: texts padded on the right, videos one after the other.

    A sample holds `input_ids`, `labels` and `frames`: (T, S, S, 3) uint8, one video. Pixels become what SigLIP's
    processor makes of them, -1 … 1.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples)

        def padded(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (length - len(values))]

        frames = torch.cat([torch.as_tensor(sample["frames"]) for sample in samples])
        return {
            "input_ids": torch.tensor([padded(s["input_ids"], self.pad_token_id) for s in samples]),
            "attention_mask": torch.tensor([padded([1] * len(s["input_ids"]), 0) for s in samples]),
            "labels": torch.tensor([padded(s["labels"], IGNORED) for s in samples]),
            "pixel_values_videos": frames.permute(0, 3, 1, 2).float().div(127.5).sub(1.0),
            "video_num_frames": torch.tensor([len(sample["frames"]) for sample in samples]),
        }
