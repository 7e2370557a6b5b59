"""Datasets that read, decode and encode records lazily, and skip or raise on unusable ones.

dataset = CrossLMMDataset(load_records("mixture.yaml"), processor, media_root="videos", unusable="skip")
Trainer(..., train_dataset=dataset, data_collator=CrossLMMDataCollator(processor))
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..processing_crosslmm import CrossLMMProcessor
from .records import UnusableSample, chat_of, with_media_below
from .samples import encode_chat

logger = logging.get_logger(__name__)


class _Encoder:
    """Encodes records as samples; counts or raises on unusable ones.

    num_skipped: samples skipped so far, in all worker processes.
    """

    def __init__(
        self,
        processor: CrossLMMProcessor,
        media_root: str | os.PathLike | None,
        max_length: int | None,
        unusable: Literal["raise", "skip"],
    ) -> None:
        if unusable not in ("raise", "skip"):
            raise ValueError(f'`unusable` must be "raise" or "skip"; got {unusable!r}.')
        self.processor, self.media_root, self.max_length = processor, media_root, max_length
        self.skips = unusable == "skip"
        self._num_skipped = torch.zeros(1, dtype=torch.long).share_memory_()

    @property
    def num_skipped(self) -> int:
        return int(self._num_skipped)

    def encode(self, read: Callable[[], Any], where: Callable[[], str]) -> dict[str, torch.Tensor] | None:
        """The sample of the record that `read` returns, or None if it was skipped."""
        record = None
        try:
            record = read()
            return encode_chat(self.processor, record, media_root=self.media_root, max_length=self.max_length)
        except UnusableSample as error:
            place = _identified(where(), record)
            if not self.skips:
                raise UnusableSample(f"{place}: {error}") from error
            self._num_skipped += 1
            logger.warning(f"Skipped {place}: {error} ({self.num_skipped} skipped so far)")
            return None


TRIES = 100
"""After this many unusable samples in a row, the dataset itself is taken to be wrong."""


class CrossLMMDataset(Dataset):
    """Samples for `CrossLMMDataCollator`. Records are read, decoded and encoded when they are indexed.

    records: from `load_records`, or any sequence of records (see `chat_of`), such as a `datasets.Dataset`, whose
        `Image` and `Video` columns are decoded by this package.
    media_root, max_length: see `encode_chat`.
    unusable: for a sample that is broken, too long or does not decode: "raise", or "skip" to put the next usable one
        in its place. Skipped samples are counted in `num_skipped` and logged.

    Raises ValueError if there are no records, or if `TRIES` samples in a row are unusable.
    """

    def __init__(
        self,
        records: Any,
        processor: CrossLMMProcessor,
        *,
        media_root: str | os.PathLike | None = None,
        max_length: int | None = None,
        unusable: Literal["raise", "skip"] = "raise",
    ) -> None:
        if len(records) == 0:
            raise ValueError("The dataset has no records; training needs at least one.")
        self.records = undecoded(records)
        self._encoder = _Encoder(processor, media_root, max_length, unusable)

    @property
    def num_skipped(self) -> int:
        """Samples skipped so far, in all workers of this process."""
        return self._encoder.num_skipped

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for number in range(index, index + min(TRIES, len(self))):
            number %= len(self)
            sample = self._encoder.encode(partial(_row, self.records, number), partial(where, self.records, number))
            if sample is not None:
                return sample
        raise ValueError(
            f"None of {min(TRIES, len(self))} samples from {where(self.records, index)} on can be used; the log says "
            "why. Check the data with `crosslmm data check`."
        )


def _row(records: Any, index: int) -> Any:
    try:
        return records[index]
    except UnusableSample:
        raise
    except Exception as error:  # `datasets` decodes media in nested columns when a row is read
        raise UnusableSample(f"{type(error).__name__}: {error}") from error


def where(records: Any, index: int) -> str:
    """A record's place for messages: its file and line if it has them, else its row."""
    return records.where(index) if hasattr(records, "where") else f"row {index}"


def undecoded(rows: Any) -> Any:
    """Makes `datasets` leave `Image` and `Video` columns as bytes and paths, for this package's decoder.

    Media in nested columns of a map-style dataset are still decoded by `datasets`: a change would copy all data.
    """
    features = getattr(rows, "features", None)
    if not features:
        return rows
    if hasattr(rows, "decode"):  # a stream
        return rows.decode(False)
    for name, feature in features.items():
        if type(feature).__name__ in ("Image", "Video"):
            rows = rows.cast_column(name, replace(feature, decode=False))
    return rows


def stream_samples(
    rows: Any,
    processor: CrossLMMProcessor,
    *,
    media_root: str | os.PathLike | None = None,
    max_length: int | None = None,
    unusable: Literal["raise", "skip"] = "raise",
) -> Any:
    """Maps a `datasets.IterableDataset` of records to one of samples; the streaming form of `CrossLMMDataset`.

    `datasets` distributes the shards over processes and workers. Skipped samples are left out.
    """
    encoder = _Encoder(processor, media_root, max_length, unusable)
    rows = undecoded(rows)
    failed_in_a_row = 0

    def encode(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        nonlocal failed_in_a_row
        record = {name: values[0] for name, values in columns.items()}
        sample = encoder.encode(lambda: record, lambda: f"row {numbers[0]}")
        failed_in_a_row = 0 if sample is not None else failed_in_a_row + 1
        if failed_in_a_row == TRIES:
            raise ValueError(f"None of {TRIES} samples in a row can be used; the log says why.")
        return {"input_ids": []} if sample is None else {name: [value] for name, value in sample.items()}

    names = rows.column_names or list(next(iter(rows)))
    return rows.map(encode, with_indices=True, batched=True, batch_size=1, remove_columns=names)


def find_broken(
    records: Any, media_root: str | os.PathLike | None, *, decode_with: CrossLMMProcessor | None = None
) -> Iterator[str]:
    """Yields a line for each record that cannot be used, with its place and the reason.

    decode_with: a processor, to decode the media as training would; None to check only that the files exist.
    """
    records = undecoded(records)
    for index in range(len(records)):
        record = None
        try:
            record = _row(records, index)
            if decode_with is None:
                with_media_below(chat_of(record), media_root)
            else:
                encode_chat(decode_with, record, media_root=media_root)
        except UnusableSample as error:
            yield f"{_identified(where(records, index), record)}: {error}"


def spelled_words(records: Any, tokenizer: Any, *, most: int = 1000) -> tuple[int, int]:
    """Counts the words of the first `most` records' answers that the tokenizer spells byte by byte, and all words.

    A small model does not learn such words in a short training. Unusable records are left out.
    """
    words: Counter[str] = Counter()
    for index in range(min(most, len(records))):
        try:
            chat = chat_of(_row(records, index))
        except UnusableSample:
            continue
        texts = [part.get("text", "") for turn in chat if turn["role"] == "assistant" for part in turn["content"]]
        words.update(re.findall(r"\w{3,}", " ".join(texts)))
    spelled = {
        word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) >= len(word)
    }
    return sum(words[word] for word in spelled), words.total()


def _identified(place: str, record: Any) -> str:
    name = record.get("id") if isinstance(record, Mapping) else None
    return place if name is None else f"{place} (id {name})"
