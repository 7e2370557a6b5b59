"""Reads training records from files of several formats, and converts each record to a chat.

records = load_records("mixture.yaml")
chat = with_media_below(chat_of(records[0]), "videos")
"""

import base64
import binascii
import codecs
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from ..frames_crosslmm import SOURCES, VIDEO_OPTIONS, source_in
from ..processing_crosslmm import _prepared_part
from ..video_source import file_named_by, shown


class UnusableSample(ValueError):
    """A sample cannot be used for training. Callers that know the record's place add it to the message."""


class RecordFile(Sequence):
    """The records of a JSON array or a JSONL file, read lazily: only their positions are kept in memory.

    path: the file. lines: the line on which each record begins, from 1. Raises ValueError, with the line, if an array
    is not JSON. A broken line of JSONL raises only when its record is read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            first = next((line for line in file if _words(line)), b"")
        places = self._array() if _words(first)[:1] == b"[" else self._lines()
        table = np.fromiter(places, dtype=np.dtype((np.int64, 3)))
        self.spans, self.lines = table[:, :2], table[:, 2]

    def _array(self) -> Iterator[tuple[int, int, int]]:
        """Yields begin, end and line of each record."""
        # Latin-1 has one character per byte, so positions are bytes; JSON's own characters are ASCII in UTF-8 too.
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
            raise ValueError(f"{self.path}: not readable: brackets are nested too deeply.") from error

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
    """Strips a byte order mark and blanks from a line."""
    return line.removeprefix(codecs.BOM_UTF8).strip()


class RecordMixture(Sequence):
    """The records of several files, or of parts of them, in sequence.

    parts: each file with the indices of the records taken from it.
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
    """Opens training records without reading them.

    path: a LLaVA file (`.json`, `.jsonl`), a mixture (`.yaml`: `datasets`, a list of `json_path` and
        `sampling_strategy`, "all", "first:1000", "end:10%", "random:10%"; paths relative to the YAML file's folder),
        or a dataset for `datasets`: a folder written by `save_to_disk`, or a folder or repository of data files, of
        which the split "train" is read.
    streaming: read a dataset in order without loading it. seed: for "random".

    Raises ValueError for an invalid file or mixture, and for `streaming` of a file.
    """
    suffix = Path(path).suffix
    if suffix in (".json", ".jsonl", ".yaml", ".yml"):
        if streaming:
            raise ValueError(f"`streaming` is for `datasets`; {os.fspath(path)} is read lazily anyway. Leave it out.")
        if suffix in (".yaml", ".yml"):
            return _mixture(Path(path), seed)
        file = RecordFile(path)
        return RecordMixture([(file, range(len(file)))])
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Data other than JSON and YAML needs `datasets`: `pip install -e ".[train]"` in your clone.'
        ) from error
    if (Path(path) / "state.json").is_file():  # written by `save_to_disk`
        rows = datasets.load_from_disk(os.fspath(path))
        return rows.to_iterable_dataset() if streaming else rows
    return datasets.load_dataset(os.fspath(path), split="train", streaming=streaming)


DEEPEST = 20
"""Most levels of a recipe or mixture."""


def read_yaml(path: Path) -> Any:
    """Parses a YAML file. Raises ValueError, with the line, for invalid YAML, for more than `DEEPEST` levels, which
    take the parser hours, and for aliases, with which a few lines expand to billions of values."""
    text, depth = path.read_bytes(), 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                what = f"more than {DEEPEST} levels" if depth > DEEPEST else f"an alias, *{event.anchor}"
                raise ValueError(f"{path}:{event.start_mark.line + 1}: {what}. Write plain lists and names.")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path if mark is None else f"{path}:{mark.line + 1}"
        raise ValueError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}.") from error


def _mixture(path: Path, seed: int) -> RecordMixture:
    content = read_yaml(path)
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: a mixture must have a list `datasets` of at least one entry.")
    parts = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"json_path"} <= entry.keys() <= {"json_path", "sampling_strategy"}:
            raise ValueError(
                f"{path}: an entry must have `json_path` and may have `sampling_strategy`; got {repr(entry)[:200]}."
            )
        if not isinstance(entry["json_path"], str):
            raise ValueError(f"{path}: `json_path` must be a file's name; got {entry['json_path']!r}.")
        file = RecordFile(path.parent / entry["json_path"])
        parts.append((file, _drawn(len(file), entry.get("sampling_strategy", "all"), seed, where=str(path))))
    return RecordMixture(parts)


def _drawn(count: int, strategy: str, seed: int, *, where: str) -> Sequence[int]:
    """The indices that a sampling strategy takes of `count` records; a percentage is rounded up."""
    match = re.fullmatch(r"all|(first|end|random):(?:(\d+)|(\d+(?:\.\d+)?)%)", str(strategy))
    if match is None:
        raise ValueError(
            f"{where}: `sampling_strategy` must be all, or first, end or random with a number or a percentage, such "
            f"as first:1000 or random:10%; got {strategy!r}."
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


def chat_of(record: Any) -> list[dict[str, Any]]:
    """Converts a record to a chat: messages whose content is a list of parts, media with their sources.

    record: LLaVA's `conversations` (`from` human or gpt, `value`), a chat's `messages` (`role`, `content`), a `prompt`
        and its `response`, or a `question` and its `answer`. Media are in the parts, with options (`VIDEO_OPTIONS`),
        or in `image`, `images`, `video` and `videos`, one or a list. The latter are put, in order, into parts without
        a source, or else at the marks `<image>` and `<video>` of user messages, or before a prompt. (LLaVA writes
        `<image>` for videos too. The line break next to a mark is dropped: our templates have none there.) A system
        prompt may be in `system` or `system_prompt`. A video may be an object with `video_path` and `segments`, pairs
        of seconds, each of which becomes a video. A record with no turns may have one `video` and `segments`, each
        [start, end, text] or an object of these, in seconds from the beginning of the file. Each becomes a turn: 'When
        does this happen: "A door opens."', "3.4 to 7.0 seconds".
    Raises UnusableSample for other records, and if the numbers of media and of their places differ.
    """
    if not isinstance(record, Mapping):
        raise UnusableSample(
            f"a record must be an object with `conversations` or `messages`; got {type(record).__name__}."
        )
    if record.get("tools"):
        raise UnusableSample(
            "`tools` are not put into the chat, so an answer that uses them would be wrong. Leave it out."
        )
    waiting = {kind: _listed(record, kind) for kind in ("image", "video")}
    given = {kind: len(media) for kind, media in waiting.items()}
    turns = record.get("conversations") or record.get("messages") or _prompt_and_response(record, given)
    turns = turns or _about_segments(record, given)
    if not isinstance(turns, list | tuple) or not turns:
        raise UnusableSample("a record needs `conversations` or `messages`, a list of at least one turn.")
    chat = [_message(turn) for turn in turns]
    systems = [record[name] for name in ("system", "system_prompt") if record.get(name)]
    if len(systems) + (chat[0]["role"] == "system") > 1:
        raise UnusableSample("two system prompts: the turns' own, `system` or `system_prompt`; take one out.")
    chat[:0] = [_message({"role": "system", "content": system}) for system in systems]
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
            f"{needed['video']} of videos; each medium needs one mark, <image> or <video>, in a user message."
        )
    sources = {kind: iter(media) for kind, media in waiting.items()}
    for part in places:
        part[part["type"]] = next(sources[part["type"]])
    if not any(message["role"] == "assistant" and _says_something(message) for message in chat):
        raise UnusableSample("nothing to learn: no turn of the assistant has text.")
    return chat


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = re.compile(r"\n?<(?:(image|video)|\|(image|video)\|)>\n?")  # LLaVA's, and MOSS-VL's


def _listed(record: Mapping, kind: str) -> list[Any]:
    media = [record[name] for name in (kind, kind + "s") if record.get(name) is not None]
    if len(media) > 1:
        raise UnusableSample(f"media must be in `{kind}` or in `{kind}s`; got both.")
    listed = media[0] if media and isinstance(media[0], list | tuple) else media
    return [clip for medium in listed if medium is not None for clip in _segments(medium)]


def _segments(medium: Any) -> list[Any]:
    """Splits a video with `segments` into one video per segment; other media are returned as they are."""
    if not isinstance(medium, Mapping) or medium.get("video_path") is None:
        return [medium]
    segments = medium.get("segments")
    if segments is None and medium.keys() <= {"video_path", "segments"}:
        return [{"path": medium["video_path"]}]
    try:
        if medium.keys() != {"video_path", "segments"} or not segments:
            raise ValueError
        times = [(float(start), float(end)) for start, end in segments]
    except (TypeError, ValueError, OverflowError) as error:
        raise UnusableSample(
            "a video with a `video_path` may have `segments`, a list of pairs of seconds, such as [[0, 10]], and "
            f"nothing else; got {repr(dict(medium))[:200]}."
        ) from error
    return [{"path": medium["video_path"], "start_seconds": start, "end_seconds": end} for start, end in times]


def _prompt_and_response(record: Mapping, num_media: Mapping[str, int]) -> list[dict[str, Any]] | None:
    prompt, response = record.get("prompt", record.get("question")), record.get("response", record.get("answer"))
    if not isinstance(prompt, str) or not isinstance(response, str):
        return None
    is_marked = any(num_media.values()) and MARK.search(prompt)
    media = [{"type": kind} for kind, number in num_media.items() for _ in range(number) if not is_marked]
    return [{"role": "user", "content": [*media, prompt]}, {"role": "assistant", "content": response}]


def _about_segments(record: Mapping, num_media: Mapping[str, int]) -> list[dict[str, Any]] | None:
    segments = record.get("segments")
    if segments is None:
        return None
    if num_media != {"image": 0, "video": 1} or not isinstance(segments, list | tuple) or not segments:
        raise UnusableSample("`segments` is a list, at least one long, about one `video` and no image.")
    turns: list[dict[str, Any]] = []
    for segment in segments:
        values = [segment.get(name) for name in ("start", "end", "text")] if isinstance(segment, Mapping) else segment
        try:
            start, end, text = cast(Any, values)
            if not 0 <= start <= end < math.inf or not text.strip():
                raise ValueError
            answer = f"{start:.1f} to {end:.1f} seconds"
        except (TypeError, ValueError, AttributeError, OverflowError) as error:  # overflow: an integer of 400 digits
            raise UnusableSample(
                'a segment is [start, end, text], such as [3.4, 7.0, "A door opens."], seconds in order and words; '
                f"got {repr(segment)[:200]}."
            ) from error
        question = {"type": "text", "text": f'When does this happen: "{text.strip()}"'}
        turns += [
            {"role": "user", "content": [question] if turns else [{"type": "video"}, question]},
            {"role": "assistant", "content": answer},
        ]
    return turns


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UnusableSample(f"a turn must be an object; got {type(turn).__name__}.")
    role, content = (
        turn[ours] if turn.get(ours) is not None else turn.get(llavas)  # `datasets` fills missing fields with None
        for ours, llavas in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableSample(f"a turn's role must be one of {', '.join(ROLES)}; got {repr(role)[:40]}.")
    for name in ("loss", "loss_scale", "weight"):
        if turn.get(name) not in (None, ROLES[role] == "assistant"):
            raise UnusableSample(
                f"`{name}` of a turn cannot be {repr(turn[name])[:40]}: every turn of the assistant is learned, "
                "with weight 1, and no other. Leave it out."
            )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise UnusableSample(f"a turn's content must be a string or a list of parts; got {type(content).__name__}.")
    try:
        parts = [_prepared_part(part) for part in content]
        for part in parts:
            part.get("text", "").encode()  # raises for lone surrogates, which no tokenizer takes
    except ValueError as error:
        raise UnusableSample(str(error)) from error
    return {"role": ROLES[role], "content": parts}


def _places(chat: Sequence[Mapping]) -> list[dict[str, Any]]:
    """The parts that are media without a source."""
    media = [part for message in chat for part in message["content"] if part["type"] != "text"]
    return [part for part in media if part.keys().isdisjoint({part["type"], *SOURCES})]


def _says_something(message: Mapping) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in message["content"])


def _split_at_marks(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    split: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            split.append(part)
            continue
        pieces = MARK.split(part["text"])  # text, LLaVA's kind, MOSS-VL's kind, text, …
        for words, *kinds in zip_longest(pieces[::3], pieces[1::3], pieces[2::3]):
            split += [{"type": "text", "text": words}] if words else []
            split += [{"type": kind} for kind in kinds if kind]
    return split


def with_media_below(chat: list[dict[str, Any]], media_root: str | os.PathLike | None) -> list[dict[str, Any]]:
    """Resolves every media file name in a chat to a path in `media_root`; media in memory are unchanged.

    Data is untrusted: URLs and paths out of the folder, links followed, are refused. Raises UnusableSample for these
    and for missing files, ValueError for a file name without a `media_root`, NotADirectoryError if that is no folder.
    """
    return [
        {
            **message,
            "content": [
                {"type": part["type"], **_safe_medium(part, part["type"], media_root)}
                if part["type"] != "text"
                else dict(part)
                for part in message["content"]
            ],
        }
        for message in chat
    ]


def _safe_medium(medium: Mapping, kind: str, root: str | os.PathLike | None) -> dict[str, Any]:
    """The source under the name of its kind, read strictly as its key says, with its options."""
    try:
        content, options = source_in(medium, kind, VIDEO_OPTIONS if kind == "video" else ())
    except ValueError as error:
        raise UnusableSample(str(error)) from error
    given = next((name for name in ("bytes", kind, *SOURCES) if medium.get(name) is not None), None)
    if given is None:
        raise UnusableSample(f"a medium has none of {', '.join((kind, *SOURCES))}.")
    if given == "url":
        raise UnusableSample("a `url` is never fetched; training reads files in the media folder. Use `path`.")
    if given in ("bytes", "array") and isinstance(content, str | os.PathLike):
        raise UnusableSample(f"`{given}` of a medium is text. Name a file by `path`.")
    if given == "base64":
        try:
            return {kind: base64.b64decode(medium[given], validate=True), **options}
        except (TypeError, ValueError, binascii.Error) as error:
            raise UnusableSample(f"`base64` of a medium is not base64: {error}.") from error
    return {kind: _below(content, kind, root), **options}


def _below(source: Any, kind: str, root: str | os.PathLike | None) -> Any:
    if isinstance(source, Mapping):
        return _safe_medium(source, kind, root)
    if isinstance(source, list | tuple):  # frames
        return [_below(frame, "image", root) for frame in source]
    if not isinstance(source, str | os.PathLike):
        return source
    if root is None:
        raise ValueError(f"{shown(os.fspath(source))} is a media file's name: pass its folder as `media_root`.")
    folder = Path(root).resolve()
    try:
        if isinstance(source, str) and source.startswith("file://"):
            source = file_named_by(source)
        path = (folder / source).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        raise UnusableSample(f"{shown(os.fspath(source))} is not a file's name: {str(error)[:200]}.") from error
    if not path.is_relative_to(folder):
        raise UnusableSample(f"{shown(os.fspath(source))} is outside of the media folder {folder}.")
    if not is_file:
        if not folder.is_dir():
            raise NotADirectoryError(f"There is no folder {folder}; `media_root` must be the folder of the media.")
        raise UnusableSample(f"there is no file {path}.")
    return path
