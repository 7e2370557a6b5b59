"""Answers a corpus of questions about videos, in this process or on a Ray cluster. Each video is decoded, encoded and
prefilled once; answers are Parquet files; a run that was killed resumes where it stopped.

    answer_corpus("questions.jsonl", "answers", model="YOU/NAME")  # Ray: one worker per GPU, or per `cpus_per_worker`
    answer_corpus("questions.jsonl", "answers", engine="local")  # here, without Ray
    pandas.read_parquet("answers")

Each worker (`VideoAnswerer`) answers the questions about one video at a time. Only the driver writes, so that an
answer that is given again after a worker was killed is kept once. POSIX only, like isolated decoding.
"""

import hashlib
import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from .. import TINY_CHECKPOINT, __version__
from ..asking.allowed_files import open_below
from ..asking.prefilled import VIDEO_FAILURES, IsolatedStream, PrefilledVideo
from ..checkpoints.folder import checkpoint_digest, checksum, find_folder
from ..checkpoints.load import load_model, load_processor
from ..video_decoding import VideoDecodeWarning
from ..video_source import shown

Engine = Literal["ray", "local", "vllm"]
Row = dict[str, str | None]
Answers = Generator[Row, None, None]

COLUMNS = ("id", "video", "question", "answer", "error", "warning")
"""Columns of an answers file, all strings. `answer` is null if there is an `error`; `warning` names frames that could
not be decoded."""

MAX_ATTEMPTS = 3
"""After this many deaths of workers on a video, its questions get an error."""

ROWS_PER_PART = 10_000
SECONDS_PER_PART = 20.0
"""Time between two answers files, and so the most work that a killed driver loses."""

MAX_TASKS = 10_000
"""Most Ray tasks; with more videos than this, several share a task."""


@dataclass(frozen=True)
class CorpusQuestion:
    """A question of a corpus. id: the line's own, or a hash of video and question. video: as written in the line."""

    id: str
    video: str
    question: str


@dataclass(frozen=True)
class VideoGroup:
    """A video and its questions. path: the file, links resolved. error: why it must not be opened, or None."""

    path: str
    error: str | None = None
    questions: list[CorpusQuestion] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """A corpus, grouped by video. root: see `read_corpus`. duplicates: lines that repeat an earlier question."""

    root: str
    groups: list[VideoGroup]
    duplicates: int

    def __iter__(self) -> Iterator[CorpusQuestion]:
        return (question for group in self.groups for question in group.questions)


@dataclass(frozen=True)
class CorpusReport:
    """Counts of a run. questions, videos: distinct ones. answered_before: by earlier runs. failed: all questions whose
    row has an error. duplicates: lines that repeat an earlier question. first_error: of this run."""

    questions: int
    videos: int
    answered_before: int
    failed: int
    duplicates: int
    first_error: str | None = None


# --- the questions --------------------------------------------------------------------------------------------------


def read_corpus(path: str | os.PathLike, *, root: str | os.PathLike | None = None) -> Corpus:
    """Reads a JSON Lines file of questions, `{"video": …, "question": …, "id": …}`, and groups them by video.

    root: the folder that `video` is relative to, and that every video must be in, links resolved; None for the file's
        own folder. Questions about a video elsewhere get an error as answer.

    An `id` is a string or an integer; the default is a hash of the question and the video's path below `root`. A line
    that repeats id, video and question is a duplicate; the same question with another id is another question. Other
    keys are ignored. Raises ValueError, with the line number, for an invalid line and for an id of two questions.
    """
    path = Path(path)
    root_path = os.path.realpath(path.parent if root is None else root)
    if not os.path.isdir(root_path):
        raise NotADirectoryError(f"`root` must be a folder, the one of the videos; {root_path!r} is not.")
    groups: dict[str, VideoGroup] = {}
    located: dict[str, tuple[str, str | None]] = {}
    seen: dict[str, tuple[tuple[str, str], int]] = {}
    duplicates = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {path.name}"
            given_id, video, question = _parsed(line, where)
            if video not in located:
                located[video] = _locate(video, root_path)
            file, error = located[video]
            content = (os.path.relpath(file, root_path) if error is None else file, question)
            question_id = _hash(content) if given_id is None else given_id
            if question_id in seen:
                earlier, earlier_number = seen[question_id]
                if earlier != content:
                    raise ValueError(
                        f"{where} has the id {shown(question_id)} of line {earlier_number}, which is another "
                        "question. Give each question its own id, or leave ids out."
                    )
                duplicates += 1
                continue
            seen[question_id] = (content, number)
            group = groups.setdefault(file, VideoGroup(file, error))
            group.questions.append(CorpusQuestion(question_id, video, question))
    if not groups:
        raise ValueError(f"{path} has no questions; write one JSON object per line.")
    return Corpus(root_path, list(groups.values()), duplicates)


def _parsed(line: bytes, where: str) -> tuple[str | None, str, str]:
    """Id, video and question of a line."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # raises for lone surrogates, which Parquet cannot store
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a JSON object in UTF-8: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f'{where} must be a JSON object with "video" and "question"; got a {type(record).__name__}.')
    for name in ("video", "question"):
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'{where}: "{name}" must be a non-empty string; got {repr(value)[:80]}.')
    given_id = record.get("id")
    if given_id is not None and (isinstance(given_id, bool) or not isinstance(given_id, str | int) or given_id == ""):
        raise ValueError(f'{where}: "id" must be a string or an integer; got {repr(given_id)[:80]}.')
    return None if given_id is None else str(given_id), record["video"], record["question"]


def _locate(video: str, root: str) -> tuple[str, str | None]:
    """The video's path with links resolved, and why it must not be opened, or None."""
    try:
        file = os.path.realpath(os.path.join(root, video))
    except (ValueError, OSError) as error:  # a null character, a ring of links
        return video, f"{type(error).__name__}: {error}"
    if os.path.commonpath([file, root]) != root:
        return video, f"ValueError: The video must be in {root!r}; {shown(video)} is not."
    return file, None


def _hash(content: tuple[str, str]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


# --- a worker -------------------------------------------------------------------------------------------------------


class VideoAnswerer:
    """Answers all questions about one video at a time, greedily. A video that fails gives rows with its error.

    model: folder or name of a checkpoint. root: the folder that all videos must be in. attempts: a folder that counts
    how often each video was started, so that one which kills its workers is given up. num_threads: of torch, on a CPU.
    add_timestamps: as for `load_processor`. sampling: as for `read_video`.
    """

    def __init__(
        self,
        model: str,
        root: str,
        attempts: str,
        *,
        device: str | None = None,
        max_new_tokens: int = 256,
        num_threads: int | None = None,
        add_timestamps: bool | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.root, self.attempts = Path(root), Path(attempts)
        self.max_new_tokens, self.sampling = max_new_tokens, dict(sampling or {})
        self.processor = load_processor(model, add_timestamps=add_timestamps)
        self._load(model, device)

    def _load(self, model: str, device: str | None) -> None:
        self.model = load_model(model, device=device)
        options = self.model.generation_config
        options.do_sample, options.temperature, options.top_p, options.top_k = False, None, None, None

    def __call__(self, group: Mapping[str, Any]) -> Iterator[Row]:
        """Yields a row (`COLUMNS`) for each question of a group, a `VideoGroup` as a dict."""
        questions = [CorpusQuestion(**question) for question in group["questions"]]
        if group["error"] is not None:
            yield from (_row(question, error=group["error"]) for question in questions)
            return
        note = self.attempts / hashlib.sha256(os.fsencode(group["path"])).hexdigest()
        if note.exists() and note.stat().st_size >= MAX_ATTEMPTS:
            error = f"RuntimeError: {MAX_ATTEMPTS} workers died or were killed while they worked on this video."
            yield from (_row(question, error=error) for question in questions)
        else:
            with open(note, "ab") as file:
                file.write(b".")
            yield from self._answers(group["path"], questions)
        note.unlink(missing_ok=True)

    def _answers(self, path: str, questions: list[CorpusQuestion]) -> Iterator[Row]:
        failure = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with open_below(path, [self.root]) as file:
                    stream = IsolatedStream(self.processor, file, **self.sampling)
                    video = PrefilledVideo(self.model, self.processor, stream)
            except VIDEO_FAILURES as error:
                failure = _described(error)
        if failure is not None:
            yield from (_row(question, error=failure) for question in questions)
            return
        warning = " ".join(str(w.message) for w in caught if isinstance(w.message, VideoDecodeWarning)) or None
        for question in questions:
            try:
                answer = video.fork().ask(question.question, max_new_tokens=self.max_new_tokens).text
            except VIDEO_FAILURES as error:
                yield _row(question, error=_described(error), warning=warning)
            else:
                yield _row(question, answer=answer, warning=warning)


def _described(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()


def _row(question: CorpusQuestion, **outcome: str | None) -> Row:
    return dict.fromkeys(COLUMNS) | asdict(question) | outcome


# --- the files ------------------------------------------------------------------------------------------------------


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            'Writing answers needs pyarrow: `pip install -e ".[ray]"` in your clone, or pyarrow alone for the local '
            "engine."
        ) from error
    return pyarrow


class AnswerFiles:
    """The folder of answers: files `part-00000-….parquet`, written atomically, with their SHA-256 in the name.

    `_run.json` records the settings of the answers and is locked while a run writes. Readers of Parquet folders ignore
    names that begin with "_" or ".".
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if another run is writing, or the answers were made with other settings."""
        import fcntl

        self.pyarrow = _pyarrow()
        self.schema = self.pyarrow.schema([(name, self.pyarrow.string()) for name in COLUMNS])
        self.folder = Path(folder)
        self.attempts = self.folder / "_attempts"
        self.attempts.mkdir(parents=True, exist_ok=True)
        self._run: BinaryIO = open(self.folder / "_run.json", "a+b")  # noqa: SIM115, stays open while locked
        try:
            fcntl.flock(self._run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._run.close()
            raise ValueError(
                f"Another run is writing to {self.folder}. Wait for it, or name another folder."
            ) from error
        for leftover in self.folder.glob(".part-*"):
            leftover.unlink()
        self.parts = list(self.folder.glob("part-*.parquet"))
        self._waiting: list[Row] = []
        self._written = time.monotonic()
        try:
            self._check(json.loads(json.dumps(settings)))
        except Exception:
            self.close()
            raise

    def _check(self, settings: dict[str, Any]) -> None:
        self._run.seek(0)
        text = self._run.read()
        if not self.parts:  # without answers the settings may change
            self._run.truncate(0)
            self._run.write(json.dumps(settings, indent=1).encode() + b"\n")
            self._run.flush()
            return
        earlier = json.loads(text) if text else None
        if earlier != settings:
            raise ValueError(
                f"{self.folder} has answers made with {earlier}; this run has {settings}. Answers of different "
                "settings do not mix: name another folder."
            )

    def finished(self) -> dict[str, tuple[str, str, bool]]:
        """Maps ids to video, question, and whether the row has an error. Raises ValueError for a damaged file."""
        found = {}
        for part in self.parts:
            try:
                for digest in part.stem.split("-")[2:]:
                    if not checksum(part).startswith(digest):
                        raise ValueError("its SHA-256 is not the one in its name")
                rows = self._read(part)
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{part} must be a file of answers: {error}. Delete it, and its questions are asked again."
                ) from error
            for row in rows:
                found[row["id"]] = (row["video"], row["question"], row["error"] is not None)
        return found

    def _read(self, part: Path) -> list[dict[str, Any]]:
        return self.pyarrow.parquet.read_table(part, columns=list(COLUMNS), partitioning=None).to_pylist()

    def forget_errors(self) -> None:
        """Removes rows with errors, so that their questions are asked again. Call after `finished`."""
        for part in list(self.parts):
            rows = self._read(part)
            answered = [row for row in rows if row["error"] is None]
            if len(answered) < len(rows):
                self.parts.remove(part)
                self._write(answered, instead_of=part)

    def forget_attempts(self) -> None:
        """Deletes the notes of all started videos: a run that ends by itself was not killed by a video."""
        for note in self.attempts.iterdir():
            note.unlink()

    def add(self, row: Row) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= ROWS_PER_PART or time.monotonic() - self._written >= SECONDS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Writes the waiting rows."""
        self._write(self._waiting)
        self._waiting, self._written = [], time.monotonic()

    def _write(self, rows: list[Row], *, instead_of: Path | None = None) -> None:
        """Writes a file under a temporary name and renames it, so that no partial file is ever seen."""
        unfinished = self.folder / ".part-unfinished.parquet"
        if rows:
            with open(unfinished, "wb") as file:
                self.pyarrow.parquet.write_table(self.pyarrow.Table.from_pylist(rows, schema=self.schema), file)
                file.flush()
                os.fsync(file.fileno())
        if instead_of is not None:
            instead_of.unlink()  # first, so that a kill here loses rows, to be asked again, and duplicates none
        if rows:
            self.parts.append(self.folder / f"part-{len(self.parts):05d}-{checksum(unfinished)[:16]}.parquet")
            os.replace(unfinished, self.parts[-1])

    def close(self) -> None:
        self._run.close()


# --- a run ----------------------------------------------------------------------------------------------------------


def answer_corpus(
    questions: str | os.PathLike,
    out: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    model: str | os.PathLike = TINY_CHECKPOINT,
    engine: Engine = "ray",
    workers: int | None = None,
    cpus_per_worker: int = 1,
    device: str | None = None,
    max_new_tokens: int = 256,
    add_timestamps: bool | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> CorpusReport:
    """Answers the questions of a file that have no answer in `out` yet.

    questions, root: see `read_corpus`. out: a folder of Parquet files with `COLUMNS`.
    engine: "ray" runs on the cluster of RAY_ADDRESS, or on this machine; every machine must see videos, `out` and a
        local `model` under the same paths. "vllm" is the same with vLLM in the workers. "local" is this process.
    workers: number of Ray workers; by default one per GPU of the cluster, or else one per `cpus_per_worker` CPUs.
    cpus_per_worker: CPUs and torch threads of a Ray worker.
    device: for the local engine; Ray assigns each worker a GPU or the CPU.
    retry_errors: ask questions again that have an error instead of an answer.
    on_progress: called with the number of answered questions and of all questions.
    max_new_tokens: of one answer. add_timestamps: as for `load_processor`; not with vLLM.
    sampling: as for `read_video`. These, the two options above, the root, the checkpoint's weights and the package
        must be those that `out` was begun with.

    Decoding is isolated. A video that fails (missing, hostile, too long) gives rows with its error. Raises, before the
    model is loaded, ValueError for an invalid questions file, invalid options or an `out` of other settings, and
    OSError for a checkpoint or folder that does not exist or cannot be written.
    """
    if engine not in ("ray", "local", "vllm"):
        raise ValueError(f'`engine` must be "ray", "local" or "vllm"; got {engine!r}.')
    if engine == "local" and workers is not None:
        raise ValueError(f"`workers` needs Ray; the local engine is one process. Leave out workers={workers}.")
    if engine != "local" and device is not None:
        raise ValueError(f"`device` is for the local engine; Ray assigns GPUs. Leave out device={device!r}.")
    counts = {"workers": workers, "cpus_per_worker": cpus_per_worker, "max_new_tokens": max_new_tokens}
    for option, number in counts.items():
        if number is not None and number < 1:
            raise ValueError(f"`{option}` must be at least 1; got {number}.")
    corpus = read_corpus(questions, root=root)
    name = os.fspath(model)
    name = os.path.abspath(name) if os.path.isdir(name) else name
    processor = load_processor(name, add_timestamps=add_timestamps)
    IsolatedStream(processor, os.devnull, **sampling)  # checks processor and sampling; opens nothing
    if engine == "vllm" and processor.add_timestamps:
        raise ValueError("vLLM prompts have no timestamps. Use another engine, or turn `add_timestamps` off.")
    decides = {
        "root": corpus.root,
        "checkpoint": checkpoint_digest(find_folder(name)),
        "max_new_tokens": max_new_tokens,
        "add_timestamps": processor.add_timestamps,
        "sampling": sampling,
        "package": __version__,
    }
    files = AnswerFiles(out, decides)
    try:
        if engine != "local":  # Ray's workers die with the driver, so their notes do not count against a video
            files.forget_attempts()
        answerer = {
            "model": name,
            "root": corpus.root,
            "attempts": str(files.attempts.absolute()),
            "device": device,
            "max_new_tokens": max_new_tokens,
            "add_timestamps": add_timestamps,
            "sampling": sampling,
        }
        answers = (
            partial(_local, answerer)
            if engine == "local"
            else partial(_ray, answerer, engine=engine, workers=workers, cpus_per_worker=cpus_per_worker)
        )
        with _terminated_as_interrupted():
            return _run(corpus, files, answers, on_progress=on_progress, retry_errors=retry_errors)
    except BaseException:  # the run ended by itself; the started videos killed no worker
        files.forget_attempts()
        raise
    finally:
        files.close()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Turns SIGTERM, which schedulers send, into KeyboardInterrupt, so that it does not count against a video."""

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _run(
    corpus: Corpus,
    files: AnswerFiles,
    answer: Callable[[list[VideoGroup]], Answers],
    *,
    on_progress: Callable[[int, int], None] | None,
    retry_errors: bool,
) -> CorpusReport:
    finished = files.finished()
    if retry_errors:
        files.forget_errors()
        finished = {name: row for name, row in finished.items() if not row[2]}
    failed, first_error = 0, None
    asked: set[str] = set()
    for question in corpus:
        if question.id not in finished:
            asked.add(question.id)
            continue
        video, text, is_failed = finished[question.id]
        is_same_video = video == question.video or _locate(video, corpus.root) == _locate(question.video, corpus.root)
        if text != question.question or not is_same_video:
            raise ValueError(
                f"{files.folder} has another question under the id {shown(question.id)}: {shown(text)} about "
                f"{shown(video)}; the file has {shown(question.question)} about {shown(question.video)}. Name another "
                "folder, or give the question another id."
            )
        failed += is_failed
    total = sum(1 for _ in corpus)
    answered_before = total - len(asked)
    if on_progress is not None:
        on_progress(answered_before, total)
    if asked:
        left = [replace(group, questions=[q for q in group.questions if q.id in asked]) for group in corpus.groups]
        try:
            with closing(answer([group for group in left if group.questions])) as answers:
                for row in answers:
                    if row["id"] not in asked:  # answered again, because a worker was killed after its answer
                        continue
                    asked.remove(row["id"])
                    files.add(row)
                    failed += row["error"] is not None
                    first_error = first_error or row["error"]
                    if on_progress is not None:
                        on_progress(total - len(asked), total)
        finally:
            files.flush()
    if asked:
        raise RuntimeError(f"{len(asked)} questions got no row, {min(asked)!r} among them. Run the command again.")
    return CorpusReport(total, len(corpus.groups), answered_before, failed, corpus.duplicates, first_error)


def _local(answerer: dict[str, Any], groups: list[VideoGroup]) -> Answers:
    answer = VideoAnswerer(**answerer)
    for group in groups:
        yield from answer(asdict(group))


def _ray(
    answerer: dict[str, Any], groups: list[VideoGroup], *, engine: Engine, workers: int | None, cpus_per_worker: int
) -> Answers:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_cluster = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    if not is_cluster:
        # Makes all of Ray's servers listen on 127.0.0.1 only; must be set before its import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            'The engine "ray" needs Ray: `pip install -e ".[ray]"` in your clone, or take the engine "local".'
        ) from error
    is_ours = not ray.is_initialized()
    if is_ours:
        # The object store holds names, questions and answers; no videos.
        here: dict[str, Any] = {"address": "local", "include_dashboard": False, "object_store_memory": 256 * 2**20}
        ray.init(**({} if is_cluster else here), log_to_driver=False, logging_level="ERROR")
        if not is_cluster and ray.util.get_node_ip_address() != "127.0.0.1":
            warnings.warn(
                "Ray was imported before the run, so it listens on every network interface of this machine and runs "
                "code that anybody sends. Import Ray later, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0.",
                stacklevel=2,
            )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # Ray replaced our handler
    try:
        size, resources = _pool(ray.cluster_resources(), workers=workers, cpus_per_worker=cpus_per_worker)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items(
            [asdict(group) for group in groups], override_num_blocks=min(len(groups), MAX_TASKS)
        )
        answers = rows.flat_map(
            _worker_class(engine),
            fn_constructor_kwargs=answerer | {"num_threads": cpus_per_worker, "device": None},
            # One task at a time, so that a killed worker loses no other video and no worker queues the last ones.
            compute=ray.data.ActorPoolStrategy(size=min(size, len(groups)), max_tasks_in_flight_per_actor=1),
            **resources,
        )
        yield from answers.iter_rows()
    finally:
        if is_ours:
            ray.shutdown()


def _worker_class(engine: Engine) -> type[VideoAnswerer]:
    if engine == "ray":
        return VideoAnswerer
    try:
        from .vllm.corpus import VllmVideoAnswerer
    except ImportError as error:
        raise ImportError(
            'The engine "vllm" needs vLLM: `pip install -e ".[vllm,ray]"` in your clone, in an environment of its own.'
        ) from error
    return VllmVideoAnswerer


def _pool(available: Mapping[str, float], *, workers: int | None, cpus_per_worker: int) -> tuple[int, dict[str, int]]:
    """The number of workers, and the resources of each. Raises ValueError if they do not fit the cluster."""
    need = {"CPU": cpus_per_worker}
    if available.get("GPU", 0) >= 1:
        need["GPU"] = 1
    room = min(int(available.get(name, 0) // count) for name, count in need.items())
    if room < (workers or 1):
        has = {name: int(available.get(name, 0)) for name in need}
        raise ValueError(
            f"{workers or 1} workers of {need} each do not fit the cluster, which has {has}. Ask for fewer workers "
            "or fewer CPUs each."
        )
    return workers or room, {f"num_{name.lower()}s": count for name, count in need.items()}


__all__ = ["Corpus", "CorpusQuestion", "CorpusReport", "VideoAnswerer", "answer_corpus", "read_corpus"]
