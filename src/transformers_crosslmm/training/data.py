"""From chats to training samples: records of several forms, which tokens are learned, and how samples become a batch.

    records = load_records("mixture.yaml")
    dataset = CrossLMMDataset(records, processor, media_root="videos", max_length=8192, unusable="skip")
    Trainer(..., train_dataset=dataset, data_collator=CrossLMMDataCollator(processor))

Shapes: B rows, L tokens, F frames of all videos of the batch, S pixels along a side.
"""

import codecs
import json
import math
import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import yaml
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..processing_crosslmm import CrossLMMProcessor, _prepared_part
from ..video_decoding import VideoDecodeWarning

logger = logging.get_logger(__name__)

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


# --- records: where chats come from ---------------------------------------------------------------------------------


class RecordFile(Sequence):
    """The records of a JSON array or a JSONL file, read one at a time: only where each begins is kept in memory.

    path: the file. lines: the line each record begins on, from 1. Raises ValueError, with the line, for an array that
    is not JSON; a broken line of JSONL is an error only when its record is read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            first = next((line for line in file if _words(line)), b"")
        places = self._array() if _words(first)[:1] == b"[" else self._lines()
        table = np.fromiter(places, dtype=np.dtype((np.int64, 3)))
        self.spans, self.lines = table[:, :2], table[:, 2]

    def _array(self) -> Iterator[tuple[int, int, int]]:
        """Begin, end and line of each record."""
        # Latin-1: a character per byte, and whatever JSON is made of is the same bytes in UTF-8.
        text = self.path.read_bytes().decode("latin-1")
        read = json.JSONDecoder().raw_decode
        blank = re.compile(r"[ \t\r\n]*")

        def skip(position: int) -> int:
            return cast(re.Match, blank.match(text, position)).end()

        position = skip(text.index("[") + 1)
        line, counted_to = 1, 0
        try:
            while text[position : position + 1] != "]" or counted_to:
                end = read(text, position)[1]
                line += text.count("\n", counted_to, position)
                counted_to = position
                yield position, end, line
                position = skip(end)
                if text[position : position + 1] == "]":
                    break
                if text[position : position + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
                position = skip(position + 1)
            after = skip(position + 1)
            if after < len(text):
                raise json.JSONDecodeError("Extra data", text, after)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}:{error.lineno}: not JSON: {error.msg}.") from error
        except RecursionError as error:
            raise ValueError(f"{self.path}: brackets too deep to be read.") from error

    def _lines(self) -> Iterator[tuple[int, int, int]]:
        begin = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if _words(line):
                    yield begin, begin + len(line), number
                begin += len(line)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        start, end = self.spans[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            written = file.read(end - start)
        try:
            return json.loads(written)
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, or [[[[…
            raise UnusableSample(f"not JSON: {error}.") from error

    def where(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.path}:{self.lines[index]}"


def _words(line: bytes) -> bytes:
    """A line without the mark that a UTF-8 file may begin with, and without blanks around it."""
    return line.removeprefix(codecs.BOM_UTF8).strip()


class RecordMixture(Sequence):
    """Records of several files, or of parts of them, one after the other.

    parts: each file with the numbers of its records that are taken.
    """

    def __init__(self, parts: Sequence[tuple[RecordFile, Sequence[int]]]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(numbers) for _, numbers in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} records; got index {index}.")
        part = bisect_right(self.ends, index)
        file, numbers = self.parts[part]
        return file, int(numbers[index - (self.ends[part - 1] if part else 0)])

    def __getitem__(self, index: Any) -> Any:
        file, number = self._locate(index)
        return file[number]

    def where(self, index: int) -> str:
        """File and line of a record."""
        file, number = self._locate(index)
        return file.where(number)


def load_records(path: str | os.PathLike, *, streaming: bool = False, seed: int = 0) -> Any:
    """What chats are trained on, opened and not yet read.

    path: a LLaVA file (`.json`, `.jsonl`), a mixture (`.yaml`: `datasets`, a list of `json_path` and
        `sampling_strategy`, "all", "first:1000", "end:10%", "random:10%"; paths from the YAML file's folder), or what
        `datasets` knows: a folder written by `save_to_disk`, a folder or a repository of data files (split "train").
    streaming: read a dataset from its beginning to its end without loading it. seed: of "random".

    Raises ValueError where nothing is found or a mixture is not one.
    """
    suffix = Path(path).suffix
    if suffix in (".json", ".jsonl", ".yaml", ".yml"):
        if streaming:
            raise ValueError(f"`streaming` is for `datasets`; {os.fspath(path)} is read lazily anyway. Leave it out.")
        if suffix in (".yaml", ".yml"):
            return _mixture(Path(path), seed)
        file = RecordFile(path)
        return RecordMixture([(file, range(len(file)))])
    datasets = _require_datasets()
    if (Path(path) / "state.json").is_file():  # written by `save_to_disk`
        rows = datasets.load_from_disk(os.fspath(path))
        return rows.to_iterable_dataset() if streaming else rows
    return datasets.load_dataset(os.fspath(path), split="train", streaming=streaming)


def _require_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Data other than JSON and YAML is read by `datasets`: pip install "transformers_crosslmm[train]".'
        ) from error
    return datasets


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ValueError, with the line, for what is not YAML."""
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path if mark is None else f"{path}:{mark.line + 1}"
        raise ValueError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}.") from error


def _mixture(path: Path, seed: int) -> RecordMixture:
    content = read_yaml(path)
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: a mixture has a list `datasets`, at least one entry long.")
    parts = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"json_path"} <= entry.keys() <= {"json_path", "sampling_strategy"}:
            raise ValueError(f"{path}: an entry has `json_path` and perhaps `sampling_strategy`; got {entry}.")
        if not isinstance(entry["json_path"], str):
            raise ValueError(f"{path}: `json_path` is a file's name; got {entry['json_path']!r}.")
        file = RecordFile(path.parent / entry["json_path"])
        parts.append((file, _drawn(len(file), entry.get("sampling_strategy", "all"), seed, where=str(path))))
    return RecordMixture(parts)


def _drawn(count: int, strategy: str, seed: int, *, where: str) -> Sequence[int]:
    """Numbers of the records that a sampling strategy takes of `count`; a percentage is rounded up."""
    match = re.fullmatch(r"all|(first|end|random):(?:(\d+)|(\d+(?:\.\d+)?)%)", str(strategy))
    if match is None:
        raise ValueError(
            f"{where}: `sampling_strategy` is all, or first, end or random with a number or a percentage, such as "
            f"first:1000 or random:10%; got {strategy!r}."
        )
    kind, number, percentage = match.groups()
    if kind is None:
        return range(count)
    wanted = int(number) if number else math.ceil(count * Fraction(percentage) / 100)
    if not 0 < wanted <= count:
        raise ValueError(f"{where}: {strategy!r} takes {wanted} of {count} records. Take at least 1 and at most all.")
    if kind == "random":
        return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())
    return range(wanted) if kind == "first" else range(count - wanted, count)


# --- records to chats -----------------------------------------------------------------------------------------------


class UnusableSample(ValueError):
    """A sample that cannot be learned from, and why; `where` it came from is added by who knows."""


def chat_of(record: Any) -> list[dict[str, Any]]:
    """The chat of a record: messages whose content is a list of parts, media with their sources.

    record: LLaVA's `conversations` (`from` human or gpt, `value`) or a chat's `messages` (`role`, `content`). Media
        stand in the parts themselves, or in `image`, `images`, `video` and `videos`, one or a list: these go in order
        to parts without a source, or else to the marks `<image>` and `<video>` in the user's words. (LLaVA writes
        `<image>` for videos too. The line break beside a mark is dropped: our templates have none there.)
    Raises UnusableSample for anything else, and where media and places for them do not match in number.
    """
    if not isinstance(record, Mapping):
        raise UnusableSample(f"a record is an object with `conversations` or `messages`; got {type(record).__name__}.")
    turns = record.get("conversations") or record.get("messages")
    if not isinstance(turns, list | tuple) or not turns:
        raise UnusableSample("a record needs `conversations` or `messages`, a list of at least one turn.")
    waiting = {kind: _listed(record, kind) for kind in ("image", "video")}
    given = {kind: len(media) for kind, media in waiting.items()}
    chat = [_message(turn) for turn in turns]
    places = _places(chat)
    if not places and (any(given.values()) or record.get("conversations")):
        for message in chat:
            if message["role"] == "user":
                message["content"] = _split_at_marks(message["content"])
        places = _places(chat)
    if given["video"] and not given["image"]:
        for part in places:
            part["type"] = "video"
    needed = {kind: sum(part["type"] == kind for part in places) for kind in waiting}
    if needed != given:
        raise UnusableSample(
            f"{given['image']} images and {given['video']} videos for {needed['image']} places of images and "
            f"{needed['video']} of videos; each medium needs one mark, <image> or <video>, in the user's words."
        )
    sources = {kind: iter(media) for kind, media in waiting.items()}
    for part in places:
        part[part["type"]] = next(sources[part["type"]])
    if not any(message["role"] == "assistant" and _says_something(message) for message in chat):
        raise UnusableSample("nothing to learn: no turn of the assistant has words.")
    return chat


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = re.compile(r"\n?<(image|video)>\n?")


def _listed(record: Mapping, kind: str) -> list[Any]:
    media = [record[name] for name in (kind, kind + "s") if record.get(name) is not None]
    if len(media) > 1:
        raise UnusableSample(f"media stand in `{kind}` or in `{kind}s`; got both.")
    listed = media[0] if media and isinstance(media[0], list | tuple) else media
    return [medium for medium in listed if medium is not None]


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UnusableSample(f"a turn is an object; got {type(turn).__name__}.")
    role, content = (
        turn[ours] if turn.get(ours) is not None else turn.get(llavas)  # `datasets` fills in what a turn lacks
        for ours, llavas in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableSample(f"a turn is said by one of {', '.join(ROLES)}; got {role!r}.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise UnusableSample(f"a turn's content is a string or a list of parts; got {type(content).__name__}.")
    try:
        parts = [_prepared_part(part) for part in content]
        for part in parts:
            part.get("text", "").encode()  # raises for half a character, which no tokenizer takes
    except ValueError as error:
        raise UnusableSample(str(error)) from error
    return {"role": ROLES[role], "content": parts}


def _places(chat: Sequence[Mapping]) -> list[dict[str, Any]]:
    """The parts that are media without a source."""
    return [part for message in chat for part in message["content"] if part["type"] != "text" and len(part) == 1]


def _says_something(message: Mapping) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in message["content"])


def _split_at_marks(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    split: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            split.append(part)
            continue
        pieces = MARK.split(part["text"])  # words, kind, words, kind, words
        for words, kind in zip_longest(pieces[::2], pieces[1::2]):
            split += [{"type": "text", "text": words}] if words else []
            split += [{"type": kind}] if kind else []
    return split


def with_media_below(chat: list[dict[str, Any]], media_root: str | os.PathLike | None) -> list[dict[str, Any]]:
    """The chat with every name of a media file made a path below `media_root`; media in memory stay what they are.

    Data may come from anywhere, so a name is never a URL, and never leads out of the folder, links followed. Raises
    UnusableSample for one that does or does not exist, ValueError for names without a `media_root`, NotADirectoryError
    where that is no folder.
    """
    chat = [{**message, "content": [dict(part) for part in message["content"]]} for message in chat]
    for part in (part for message in chat for part in message["content"]):
        for name in part.keys() - {"type", "text", "base64"}:
            part[part["type"]] = _below(part.pop(name), media_root)
    return chat


def _below(source: Any, root: str | os.PathLike | None) -> Any:
    if isinstance(source, Mapping):  # `datasets` with decode=False
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if source is None:
            raise UnusableSample("a medium has neither `bytes` nor a `path`.")
    if isinstance(source, list | tuple):  # frames
        return [_below(frame, root) for frame in source]
    if not isinstance(source, str | os.PathLike):
        return source
    if root is None:
        raise ValueError(f"{os.fspath(source)!r} names a media file: pass the folder it lies in as `media_root`.")
    folder = Path(root).resolve()
    try:
        path = (folder / source).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        raise UnusableSample(f"{str(source)[:200]!r} is no name of a file: {error}.") from error
    if not path.is_relative_to(folder):
        raise UnusableSample(f"{os.fspath(source)!r} lies outside of the media folder {folder}.")
    if not is_file:
        if not folder.is_dir():
            raise NotADirectoryError(f"There is no folder {folder}; `media_root` is the one that the media lie in.")
        raise UnusableSample(f"there is no file {path}.")
    return path


# --- chats to samples -----------------------------------------------------------------------------------------------


def encode_chat(
    processor: CrossLMMProcessor,
    record: Mapping[str, Any],
    *,
    media_root: str | os.PathLike | None = None,
    max_length: int | None = None,
) -> dict[str, torch.Tensor]:
    """A record (see `chat_of`) as the model's inputs without a batch dimension, and `labels`.

    Only the assistant's words and the mark that ends them are learned, in every turn. Frames are chosen by the
    processor's own settings. max_length: tokens, those of frames counted.

    Raises UnusableSample for a record that is broken, longer than that, or whose media cannot be decoded as a whole.
    """
    chat = with_media_below(chat_of(record), media_root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", VideoDecodeWarning)  # frames that stayed black
            encoded = processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
    except (ValueError, TypeError, OSError, VideoDecodeWarning, Image.DecompressionBombError) as error:
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
            "no tokens of the assistant; the chat template must mark its turns with {% generation %} … "
            "{% endgeneration %}."
        )
    return {"input_ids": ids, "labels": labels, **encoded}


def _named(part: Mapping[str, Any]) -> str:
    source = next(value for name, value in part.items() if name != "type")
    return str(source) if isinstance(source, Path) else f"{part['type']} in memory"


@dataclass(frozen=True)
class CrossLMMDataCollator:
    """Samples to a batch: texts padded on the right, videos one after the other, images likewise.

    Samples are what `encode_chat` makes, or records that it is to be made of (a `datasets` row with `messages`).
    processor: the model's. media_root, max_length: see `encode_chat`; for records alone.

    Returns `input_ids`, `attention_mask` and `labels` (B, L), and `pixel_values_videos` (F, 3, S, S),
    `video_num_frames` (videos,), `pixel_values` (images, 3, S, S), each where there is one. Raises UnusableSample for
    records that cannot be used, ValueError for a batch without any token to learn and for samples without `labels`.
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
        for name in ("pixel_values_videos", "video_num_frames", "pixel_values"):
            present = [torch.as_tensor(sample[name]) for sample in encoded if sample.get(name) is not None]
            if present:
                batch[name] = torch.cat(present)
        return batch

    def _encoded(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        if "input_ids" not in sample:
            return encode_chat(self.processor, sample, media_root=self.media_root, max_length=self.max_length)
        missing = "`labels`" if "labels" not in sample else "pixels" if _lost_its_media(sample) else None
        if missing:
            raise ValueError(
                f"A sample has `input_ids` and no {missing}: something before the collator made tokens of its chat, "
                'and left the media out. With TRL pass `dataset_kwargs={"skip_prepare_dataset": True}`.'
            )
        return sample

    @property
    def _padding(self) -> int:
        tokenizer: Any = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _lost_its_media(sample: Mapping[str, Any]) -> bool:
    """Whether the chat that still stands beside a sample's tokens has media, and the sample has no pixels."""
    if any(sample.get(name) is not None for name in ("pixel_values_videos", "pixel_values")):
        return False
    if any(sample.get(name) for name in ("image", "images", "video", "videos")):
        return True
    contents = [turn.get("content") for turn in sample.get("messages") or () if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in ("image", "video") for part in parts)


# --- datasets -------------------------------------------------------------------------------------------------------


class _Encoder:
    """Records to samples, with the samples that cannot be used counted or refused.

    num_skipped: how many were, in all worker processes.
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
        """The sample of what `read` returns, or None if it was skipped."""
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
"""So many unusable samples in a row are taken for a mistake in the data, not in the samples."""


class CrossLMMDataset(Dataset):
    """Samples for `CrossLMMDataCollator` from records that are read, decoded and encoded when they are asked for.

    records: of `load_records`, or any sequence of records (see `chat_of`), a `datasets.Dataset` for one; its `Image`
        and `Video` columns are decoded here, not there.
    media_root, max_length: see `encode_chat`.
    unusable: "raise" for a sample that is broken, too long or does not decode, or "skip" it: the next usable one takes
        its place, so that batches keep their size, and it is counted in `num_skipped` and named in the log.

    Raises ValueError for no records, and where `TRIES` samples in a row are unusable.
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
            raise ValueError("There is nothing to train on: the dataset has no records.")
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
            "why. Look at the data with `crosslmm data check`."
        )


def _row(records: Any, index: int) -> Any:
    try:
        return records[index]
    except (RuntimeError, OSError) as error:  # `datasets` decodes media inside of other columns when a row is read
        raise UnusableSample(str(error)) from error


def where(records: Any, index: int) -> str:
    """What to call a record in a message: its file and line where it has them."""
    return records.where(index) if hasattr(records, "where") else f"row {index}"


def undecoded(rows: Any) -> Any:
    """`datasets` rows whose `Image` and `Video` columns stay bytes and paths, for our own decoder; others as they are.

    Media inside of other columns of a map-style dataset are left to `datasets`: changing those would copy it all.
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
    """`CrossLMMDataset` for a `datasets.IterableDataset`: another one, of samples.

    Its shards go to processes and workers as `datasets` does it. A skipped sample leaves no gap: the next one follows.
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


def find_broken(records: Any, media_root: str | os.PathLike | None) -> Iterator[str]:
    """One line for each record that cannot become a sample, with where it is and why; decodes nothing."""
    records = undecoded(records)
    for index in range(len(records)):
        record = None
        try:
            record = _row(records, index)
            with_media_below(chat_of(record), media_root)
        except UnusableSample as error:
            yield f"{_identified(where(records, index), record)}: {error}"


def _identified(place: str, record: Any) -> str:
    name = record.get("id") if isinstance(record, Mapping) else None
    return place if name is None else f"{place} (id {name})"
