"""A corpus of questions: rows, one look at each video, and runs that were killed and go on."""

import errno
import importlib.util
import ipaddress
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import crosslmm_cli
from factories import mp4_of, random_frames, save_checkpoint
from transformers_crosslmm import CrossLMMProcessor, frames_crosslmm
from transformers_crosslmm.checkpoints.load import load_model, load_processor
from transformers_crosslmm.serving import corpus
from transformers_crosslmm.serving.corpus import COLUMNS, answer_corpus, read_corpus

parquet = pytest.importorskip("pyarrow.parquet", reason="answers are Parquet files; pyarrow is not installed")

VIDEOS, FRAMES, NEW_TOKENS = 3, 5, 6
QUESTIONS = ("Why?", "How many?")
OPTIONS = {"max_new_tokens": NEW_TOKENS, "num_frames": FRAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint and some clips, with a text that is no video and, beside the folder, a clip that is out of it."""
    folder = tmp_path_factory.mktemp("corpus") / "inside"
    save_checkpoint(folder / "checkpoint")
    for number in range(VIDEOS):
        (folder / f"{number}.mp4").write_bytes(mp4_of(random_frames(5, seed=number).repeat(4, axis=0), fps=4))
    (folder / "notes.mp4").write_text("not a video")
    (folder.parent / "secret.mp4").write_bytes((folder / "0.mp4").read_bytes())
    return folder


@pytest.fixture
def ask(folder, tmp_path):
    """Answers records, of the folder's videos, into `tmp_path / "answers"`: `ask([{"video": …, "question": …}])`."""

    def ask(records: list[dict], **options):
        options = {"model": folder / "checkpoint", "engine": "local", "root": folder} | OPTIONS | options
        return answer_corpus(write(tmp_path / "questions.jsonl", records), tmp_path / "answers", **options)

    return ask


@pytest.fixture
def two_rows_per_part(monkeypatch) -> None:
    monkeypatch.setattr(corpus, "ROWS_PER_PART", 2)
    monkeypatch.setattr(corpus, "SECONDS_PER_PART", math.inf)


@pytest.fixture
def encoded_frames(monkeypatch) -> list[int]:
    """Frames of each call of a vision tower from now on."""
    counts: list[int] = []

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        model.model.vision_tower.register_forward_hook(
            lambda module, inputs, named, output: counts.append(len((*inputs, *named.values())[0])), with_kwargs=True
        )
        return model

    monkeypatch.setattr(corpus, "load_model", load)
    return counts


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def about(*videos: str) -> list[dict]:
    """Records with every question about each video, so that no two neighbours are about the same."""
    return [{"video": video, "question": question} for question in QUESTIONS for video in videos]


CLIPS = [f"{number}.mp4" for number in range(VIDEOS)]


def rows_of(folder: Path) -> list[dict]:
    return parquet.read_table(folder).to_pylist()


def answers_of(folder: Path) -> dict[tuple[str, str], str | None]:
    return {(row["video"], row["question"]): row["answer"] for row in rows_of(folder)}


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_timestamps", [None, True], ids=["frames alone", "timestamps"])
def test_answers_are_those_of_generate(folder, tmp_path, ask, add_timestamps):
    report = ask(about(*CLIPS), add_timestamps=add_timestamps)
    rows = rows_of(tmp_path / "answers")
    assert all(tuple(row) == COLUMNS and row["error"] is None and row["warning"] is None for row in rows)
    assert (report.questions, report.videos, report.answered_before, report.failed) == (len(rows), VIDEOS, 0, 0)

    model, processor = load_model(folder / "checkpoint", device="cpu"), load_processor(folder / "checkpoint")
    expected = {}
    for record in about(*CLIPS):
        parts = [
            {"type": "video", "path": str(folder / record["video"])},
            {"type": "text", "text": record["question"]},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": FRAMES, "add_timestamps": bool(add_timestamps)},
        )
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        [text] = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected[record["video"], record["question"]] = text.strip()
    assert answers_of(tmp_path / "answers") == expected
    assert len(set(expected.values())) > 1  # or the order of the rows would not matter


def test_a_checkpoint_that_skips_unchanged_frames_does_so_in_a_corpus(folder, tmp_path, ask, encoded_frames):
    shutil.copytree(folder / "checkpoint", tmp_path / "skipping")
    skipping = CrossLMMProcessor.from_pretrained(tmp_path / "skipping")
    skipping.video_processor.skip_unchanged = 8  # what the codec changes in a picture that stays
    skipping.save_pretrained(tmp_path / "skipping")
    ask(about("0.mp4"), model=tmp_path / "skipping", num_frames=20)
    assert sum(encoded_frames) == 5


def test_a_video_is_encoded_once_however_often_and_under_whatever_name_it_is_asked_about(folder, ask, encoded_frames):
    report = ask([*about(*CLIPS), {"video": "./0.mp4", "question": "Who?"}, {"video": "1.mp4", "question": "Who?"}])
    assert report.videos == VIDEOS
    assert sum(encoded_frames) == VIDEOS * FRAMES


@pytest.mark.parametrize(("video", "error"), [("notes.mp4", "FFmpeg cannot open"), ("nothing.mp4", "No such file")])
def test_a_video_that_fails_becomes_rows_with_its_error_and_the_others_are_answered(tmp_path, ask, video, error):
    report = ask(about(video, "0.mp4"))
    rows = rows_of(tmp_path / "answers")
    assert len(rows) == report.questions == 2 * len(QUESTIONS)
    assert report.failed == len(QUESTIONS)
    for row in rows:
        if row["video"] == video:
            assert row["answer"] is None
            assert error in row["error"]
        else:
            assert row["answer"] is not None
            assert row["error"] is None


def test_what_the_caller_warns_of_between_two_rows_is_heard(ask):
    with pytest.warns(UserWarning, match="1 of 2"):
        ask(about("notes.mp4"), on_progress=lambda done, total: warnings.warn(f"{done} of {total}", stacklevel=1))


def test_a_video_outside_the_root_is_never_opened(folder, tmp_path, ask, monkeypatch):
    link = folder / "link.mp4"
    link.symlink_to(folder.parent / "secret.mp4")
    opened = []
    iter_video = frames_crosslmm.iter_video

    def note(source, **options):
        opened.append(source if isinstance(source, str) else os.readlink(f"/proc/self/fd/{source.fileno()}"))
        return iter_video(source, **options)

    monkeypatch.setattr(frames_crosslmm, "iter_video", note)
    outside = ["../secret.mp4", str(folder.parent / "secret.mp4"), "link.mp4"]
    try:
        report = ask(about(*outside, "0.mp4"))
    finally:
        link.unlink()
    assert report.failed == len(outside) * len(QUESTIONS)
    errors = [row["error"] for row in rows_of(tmp_path / "answers") if row["video"] in outside]
    assert errors
    assert all("must be in" in error for error in errors)
    assert set(opened) - {os.devnull} == {os.path.realpath(folder / "0.mp4")}


def test_a_fault_of_the_program_ends_the_run_instead_of_becoming_a_row(tmp_path, ask, monkeypatch):
    def broken(*arguments, **options):
        raise AttributeError("a bug")

    monkeypatch.setattr(frames_crosslmm, "iter_video", broken)
    with pytest.raises(AttributeError, match="a bug"):
        ask(about("0.mp4"))
    assert not list((tmp_path / "answers").glob("part-*"))


def test_a_video_that_killed_several_workers_gets_an_error(folder, tmp_path):
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    options = {"device": "cpu", "max_new_tokens": NEW_TOKENS, "sampling": {"num_frames": FRAMES}}
    answer = corpus.VideoAnswerer(str(folder / "checkpoint"), str(folder), str(attempts), **options)
    [question] = [{"id": "a", "video": "0.mp4", "question": "Why?"}]
    group = {"path": str(folder / "0.mp4"), "error": None, "questions": [question]}
    answer._answers = lambda *arguments: (_ for _ in ()).throw(SystemExit)  # the worker dies
    for _ in range(corpus.MAX_ATTEMPTS):
        with pytest.raises(SystemExit):
            next(answer(group))
    [row] = answer(group)
    assert row["answer"] is None
    assert "workers died" in row["error"]


def test_who_interrupts_a_run_may_do_so_as_often_as_they_like(tmp_path, ask, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "PrefilledVideo", interrupted)
        for _ in range(corpus.MAX_ATTEMPTS):
            with pytest.raises(KeyboardInterrupt):
                ask(about("0.mp4"))
    assert ask(about("0.mp4")).failed == 0


@pytest.mark.parametrize("end", ["terminated", "an error of the program"])
def test_a_run_that_is_ended_does_not_count_against_the_video_at_work(tmp_path, ask, monkeypatch, end):
    def ended(*arguments, **options):
        if end == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise RuntimeError("a bug")

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "PrefilledVideo", ended)
        for _ in range(corpus.MAX_ATTEMPTS + 1):
            with pytest.raises(KeyboardInterrupt if end == "terminated" else RuntimeError):
                ask(about("0.mp4"))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list((tmp_path / "answers").glob("part-*"))
    assert ask(about("0.mp4")).failed == 0


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_the_command_says_that_it_was_terminated(folder, tmp_path, engine):
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip('needs pip install "transformers_crosslmm[ray]"')
    questions = write(tmp_path / "questions.jsonl", [{"video": "0.mp4", "question": f"Why {n}?"} for n in range(500)])
    command = [sys.executable, "-m", "crosslmm_cli", "batch", questions, "--out", tmp_path / "answers"]
    command += ["--root", folder, "--model", folder / "checkpoint", "--engine", engine, "--max-new-tokens", "20"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    attempts = tmp_path / "answers/_attempts"
    wait_until(lambda: attempts.is_dir() and any(attempts.iterdir()), seconds=120)
    run.terminate()
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "Interrupted." in said
    assert not any(attempts.iterdir())
    parts = list((tmp_path / "answers").glob("part-*"))
    assert not parts or all(row["error"] is None for row in rows_of(tmp_path / "answers"))


def test_rows_with_errors_are_asked_again_only_if_one_says_so(folder, tmp_path, ask, two_rows_per_part):
    late = folder / "late.mp4"
    records = about("0.mp4", "late.mp4", "1.mp4")
    assert ask(records).failed == len(QUESTIONS)
    before = {row["id"]: row for row in rows_of(tmp_path / "answers")}
    late.write_bytes((folder / "2.mp4").read_bytes())
    try:
        assert ask(records).failed == len(QUESTIONS)
        report = ask(records, retry_errors=True)
    finally:
        late.unlink()
    rows = rows_of(tmp_path / "answers")
    assert (report.failed, report.answered_before) == (0, 2 * len(QUESTIONS))
    assert len(rows) == len(records)
    assert [row for row in rows if row["video"] != "late.mp4"] == [
        before[row["id"]] for row in rows if row["video"] != "late.mp4"
    ]
    assert all(row["answer"] for row in rows)


def test_a_machine_that_can_start_no_more_processes_ends_the_run_instead_of_failing_all_videos(
    tmp_path, ask, monkeypatch
):
    def full(*arguments, **options):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", full)
        with pytest.raises(BlockingIOError):
            ask(about("0.mp4", "1.mp4"))
    assert not list((tmp_path / "answers").glob("part-*"))
    assert ask(about("0.mp4", "1.mp4")).failed == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "slurm"}, ValueError, '"ray", "local" or "vllm"'),
        ({"workers": 2}, ValueError, "`workers` needs Ray"),
        ({"engine": "ray", "device": "cuda"}, ValueError, "`device` is for the local engine"),
        ({"engine": "ray", "workers": 0}, ValueError, "`workers` must be at least 1"),
        ({"engine": "ray", "cpus_per_worker": 0}, ValueError, "`cpus_per_worker` must be at least 1"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be at least 1"),
        ({"engine": "vllm", "add_timestamps": True}, ValueError, "vLLM prompts have no timestamps"),
        ({"num_frames": 0}, ValueError, "`num_frames` must be at least 1"),
        ({"fps": 2.0}, ValueError, "exclude each other"),
        ({"start_seconds": 3.0, "end_seconds": 2.0}, ValueError, "before `end_seconds`"),
        ({"model": "no/such/model/here"}, OSError, "no/such/model"),
        ({"root": "nowhere"}, NotADirectoryError, "must be a folder"),
    ],
    ids=str,
)
def test_options_that_no_video_could_meet_end_the_run_before_it_begins(
    tmp_path, ask, monkeypatch, options, error, message
):
    monkeypatch.setattr(corpus, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=message):
        ask(about("0.mp4"), **options)
    assert not (tmp_path / "answers").exists()


# --- the folder of answers ------------------------------------------------------------------------------------------


def test_a_part_that_is_damaged_is_named_and_asked_again_once_it_is_deleted(tmp_path, ask, two_rows_per_part):
    ask(about("0.mp4", "1.mp4"))
    expected = answers_of(tmp_path / "answers")
    first, second = sorted((tmp_path / "answers").glob("part-*"))
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{first.name} must be a file of answers.*Delete it"):
        ask(about("0.mp4", "1.mp4"))
    first.unlink()
    report = ask(about("0.mp4", "1.mp4"))
    assert report.answered_before == 2
    assert len(rows_of(tmp_path / "answers")) == 4
    assert answers_of(tmp_path / "answers") == expected
    assert second.exists()


def test_every_flipped_bit_of_a_part_is_seen(tmp_path, ask, two_rows_per_part):
    ask(about("0.mp4"))
    part = min((tmp_path / "answers").glob("part-*"))
    whole = part.read_bytes()
    for position in range(0, len(whole), 97):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=rf"{part.name} must be a file of answers.*Delete it"):
            ask(about("0.mp4"))
    part.write_bytes(whole)
    assert ask(about("0.mp4")).answered_before == len(about("0.mp4"))


def test_a_file_that_is_no_part_of_ours_is_named(tmp_path, ask):
    ask(about("0.mp4"))
    table = corpus._pyarrow().table({"name": ["x"]})
    parquet.write_table(table, tmp_path / "answers/part-of-something-else.parquet")
    with pytest.raises(ValueError, match=r"part-of-something-else\.parquet must be a file of answers"):
        ask(about("0.mp4", "1.mp4"))


def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(tmp_path, ask, monkeypatch, two_rows_per_part):
    written = []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            ask(about(*CLIPS))
    assert len(rows_of(tmp_path / "answers")) == 2
    report = ask(about(*CLIPS))
    assert report.answered_before == 2
    assert Counter(row["id"] for row in rows_of(tmp_path / "answers")).most_common(1)[0][1] == 1
    assert len(rows_of(tmp_path / "answers")) == len(about(*CLIPS))
    assert not list((tmp_path / "answers").glob(".part-*"))


def test_a_folder_of_answers_that_is_a_file_is_left_alone(tmp_path, ask):
    (tmp_path / "answers").write_text("mine")
    with pytest.raises(OSError, match="answers"):
        ask(about("0.mp4"))
    assert (tmp_path / "answers").read_text() == "mine"


def test_an_answer_that_took_long_is_on_disk_before_the_next_question_is_asked(tmp_path, ask, monkeypatch):
    monkeypatch.setattr(corpus, "SECONDS_PER_PART", 0.0)
    fork, on_disk = corpus.PrefilledVideo.fork, []

    def noted(video):
        on_disk.append(len(rows_of(tmp_path / "answers")))
        return fork(video)

    monkeypatch.setattr(corpus.PrefilledVideo, "fork", noted)
    ask(about("0.mp4"))
    assert on_disk == [0, 1]


# --- questions ------------------------------------------------------------------------------------------------------


def test_a_question_that_is_repeated_is_asked_once(tmp_path, ask):
    report = ask([*about("0.mp4"), {"video": "./0.mp4", "question": QUESTIONS[0]}])
    assert (report.questions, report.duplicates) == (len(QUESTIONS), 1)
    assert len(rows_of(tmp_path / "answers")) == len(QUESTIONS)


def test_ids_are_kept_and_the_same_question_with_another_id_is_another(tmp_path, ask):
    ask([{"video": "0.mp4", "question": "Why?", "id": name} for name in ("a", 7)])
    assert sorted(row["id"] for row in rows_of(tmp_path / "answers")) == ["7", "a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 .* must be a JSON object"),
        ("[1]", "got a list"),
        ('{"video": "1.mp4"}', 'Line 2 .*: "question"'),
        ('{"video": " ", "question": "Why?"}', 'Line 2 .*: "video"'),
        ('{"video": "1.mp4", "question": "Why?", "id": true}', 'Line 2 .*: "id"'),
        ('{"video": "1.mp4", "question": "Why?", "id": "a"}', "id 'a' of line 1"),
        ('{"video": "1.mp4", "question": "\\ud800?"}', "Line 2 .* in UTF-8"),
        (b'{"video": "1.mp4", "question": "\xff"}', "Line 2 .* in UTF-8"),
        ("[" * 100_000, "Line 2 .* must be a JSON object"),
        ('{"video": "1.mp4", "question": "Why?", "id": ' + "9" * 5000 + "}", "Line 2 .* must be a JSON object"),
        ('{"video": "1.mp4", "question": ["' + "x" * 5000 + '"]}', 'Line 2 .*: "question"'),
        ('{"video": "1.mp4", "question": "Why?", "id": ["' + "x" * 5000 + '"]}', 'Line 2 .*: "id"'),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "bytes that are no UTF-8",
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"video": "0.mp4", "question": "Why?", "id": "a"}\n' + line)
    with pytest.raises(ValueError, match=message) as raised:
        read_corpus(path)
    assert len(str(raised.value)) < 400


def test_all_scripts_and_a_byte_order_mark_are_read_and_names_that_cannot_be_files_are_errors(tmp_path):
    records = [
        {"video": "Vidéo 映像.mp4", "question": "¿Qué pasa? \u2028 何？ 🎬"},
        {"video": "a\x00b.mp4", "question": "Why?"},
        {"video": "x" * 5000, "question": "Why?"},
    ]
    path = tmp_path / "questions.jsonl"
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in records)
    path.write_bytes(lines.encode("utf-8-sig"))
    questions = read_corpus(path)
    assert [(question.video, question.question) for question in questions] == [
        (record["video"], record["question"]) for record in records
    ]
    assert questions.groups[0].path == str(tmp_path.resolve() / records[0]["video"])
    assert "null" in questions.groups[1].error


def test_a_hundred_thousand_questions_are_read_in_seconds(tmp_path):
    path = tmp_path / "questions.jsonl"
    with path.open("w") as file:
        for number in range(100_000):
            file.write(json.dumps({"video": f"{number % 997}.mp4", "question": f"Why {number}?"}) + "\n")
    began = time.process_time()
    questions = read_corpus(path)
    assert time.process_time() - began < 20
    assert len(questions.groups) == 997
    assert sum(1 for _ in questions) == 100_000


# --- runs that go on ------------------------------------------------------------------------------------------------


def test_a_folder_of_answers_refuses_other_settings(tmp_path, ask):
    ask(about("0.mp4"))
    before = rows_of(tmp_path / "answers")
    for changed in ({"num_frames": FRAMES + 1}, {"max_new_tokens": NEW_TOKENS + 1}, {"add_timestamps": True}):
        with pytest.raises(ValueError, match="name another folder"):
            ask(about("0.mp4", "1.mp4"), **changed)
    assert rows_of(tmp_path / "answers") == before
    same = ask(about("0.mp4"), add_timestamps=False)  # as the checkpoint's processor does
    assert same.answered_before == len(before)


def test_a_folder_of_answers_refuses_whatever_else_decides_an_answer(folder, tmp_path, ask, monkeypatch):
    """Another root with the same names, the same folder with other weights, another release of the package."""
    inside = shutil.copytree(folder, tmp_path / "copy")
    ask(about("0.mp4"), model=inside / "checkpoint")
    shutil.copytree(inside / "checkpoint", tmp_path / "moved")
    assert ask(about("0.mp4"), model=tmp_path / "moved").answered_before == len(QUESTIONS)
    with pytest.raises(ValueError, match="name another folder"):
        ask(about("0.mp4"), model=inside / "checkpoint", root=inside)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "__version__", "99.0")
        with pytest.raises(ValueError, match="name another folder"):
            ask(about("0.mp4"))
    weights = inside / "checkpoint/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="name another folder"):
        ask(about("0.mp4"), model=inside / "checkpoint")


def test_a_video_that_becomes_a_link_out_of_the_root_meanwhile_is_not_followed(folder, tmp_path, ask):
    swapped = folder / "swapped.mp4"
    swapped.write_bytes((folder / "0.mp4").read_bytes())

    def swap(done: int, total: int) -> None:
        if not swapped.is_symlink():
            swapped.unlink()
            swapped.symlink_to(folder.parent / "secret.mp4")

    try:
        report = ask(about("swapped.mp4"), on_progress=swap)
    finally:
        swapped.unlink()
    assert report.failed == len(QUESTIONS)
    assert all("must lie in" in row["error"] for row in rows_of(tmp_path / "answers"))


def test_a_folder_of_answers_refuses_another_question_under_an_id_it_has(ask):
    ask([{"video": "0.mp4", "question": "Why?", "id": "a"}])
    with pytest.raises(ValueError, match="another question under the id 'a'"):
        ask([{"video": "0.mp4", "question": "Who?", "id": "a"}])


def test_a_run_on_the_same_answers_at_the_same_time_is_refused(tmp_path, ask):
    refused = []

    def again(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(ValueError, match="Another run is writing"):
                ask(about("0.mp4"))
            refused.append(done)

    ask(about("0.mp4"), on_progress=again)
    assert refused


def test_new_questions_are_answered_and_old_ones_are_not_asked_again(tmp_path, ask, encoded_frames):
    ask(about("0.mp4"))
    encoded_frames.clear()
    report = ask(about("0.mp4", "1.mp4"))
    assert (report.questions, report.answered_before) == (2 * len(QUESTIONS), len(QUESTIONS))
    assert sum(encoded_frames) == FRAMES
    encoded_frames.clear()
    assert ask(about("0.mp4", "1.mp4")).answered_before == 2 * len(QUESTIONS)
    assert not encoded_frames


DRIVER = """
import os, signal, sys
from transformers_crosslmm.serving import corpus
questions, root, moment, new_tokens, frames = sys.argv[1:]
corpus.ROWS_PER_PART, corpus.SECONDS_PER_PART = 2, 1e9
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replace = os.replace
def rename(source, target):
    die() if moment == "between a part and its name" and "00001" in str(target) else replace(source, target)
os.replace = rename
corpus.answer_corpus(
    questions, "answers", root=root, model=root + "/checkpoint", engine="local",
    max_new_tokens=int(new_tokens), num_frames=int(frames),
    on_progress=lambda done, total: die() if moment == "with an answer in hand" and done == 3 else None,
)
"""


@pytest.mark.parametrize("moment", ["with an answer in hand", "between a part and its name"])
def test_a_driver_that_was_killed_goes_on_and_answers_each_question_once(
    folder, tmp_path, ask, encoded_frames, moment
):
    questions = write(tmp_path / "questions.jsonl", about(*CLIPS))
    killed = subprocess.run(
        [sys.executable, "-c", DRIVER, questions, folder, moment, str(NEW_TOKENS), str(FRAMES)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = rows_of(tmp_path / "answers")
    assert len(kept) == 2

    report = ask(about(*CLIPS))
    rows = rows_of(tmp_path / "answers")
    assert Counter(row["id"] for row in rows) == Counter(
        question.id for question in read_corpus(questions, root=folder)
    )
    assert report.answered_before == len(kept)
    assert [row for row in rows if row in kept] == kept
    assert sum(encoded_frames) == (VIDEOS - 1) * FRAMES  # the first video's two answers are on disk
    assert not list((tmp_path / "answers").glob(".part-*"))


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_answers_and_goes_on(folder, tmp_path, monkeypatch):
    questions = write(tmp_path / "questions.jsonl", about("0.mp4", "notes.mp4"))
    command = [sys.executable, "-m", "crosslmm_cli", "batch", questions, "--out", "answers", "--engine", "local"]
    command += [
        "--root",
        folder,
        "--model",
        folder / "checkpoint",
        "--frames",
        str(FRAMES),
        "--max-new-tokens",
        str(NEW_TOKENS),
    ]
    finished = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report.pop("first_error").startswith("VideoOpenError: ")
    assert report == {"questions": 4, "videos": 2, "answered_before": 0, "failed": 2, "duplicates": 0}
    assert len(rows_of(tmp_path / "answers")) == 4

    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(crosslmm_cli.app, [os.fspath(part) for part in command[3:]])
    assert again.exit_code == 0
    assert (
        "4 questions about 2 videos, 4 of them answered before; 2 have an error instead of an answer" in again.stdout
    )


def test_the_command_shows_the_first_error_where_all_fail(folder, tmp_path):
    questions = write(tmp_path / "questions.jsonl", about("notes.mp4", "missing.mp4"))
    command = ["batch", questions, "--out", tmp_path / "answers", "--root", folder, "--model", folder / "checkpoint"]
    result = CliRunner().invoke(crosslmm_cli.app, [os.fspath(part) for part in [*command, "--engine", "local"]])
    assert result.exit_code == 0
    assert "All of them failed. The first error: VideoOpenError: " in result.stderr


def test_the_command_names_the_extra_where_ray_is_missing(folder, tmp_path, monkeypatch):
    questions = write(tmp_path / "questions.jsonl", about("0.mp4"))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    command = ["batch", questions, "--out", tmp_path / "answers", "--root", folder, "--model", folder / "checkpoint"]
    result = CliRunner().invoke(crosslmm_cli.app, [os.fspath(part) for part in command])
    assert result.exit_code == 1
    assert 'pip install -e ".[ray]"' in " ".join(result.output.split())


# --- many workers ---------------------------------------------------------------------------------------------------


RAY_DRIVER = """
import sys
from transformers_crosslmm.serving import corpus
questions, root, new_tokens, frames = sys.argv[1:]
corpus.ROWS_PER_PART = 2
corpus.answer_corpus(
    questions, "answers", root=root, model=root + "/checkpoint", engine="ray", workers=2,
    max_new_tokens=int(new_tokens), num_frames=int(frames),
    on_progress=lambda done, total: print(done, flush=True),
)
"""


def below(pid: int) -> dict[int, bytes]:
    """The processes that this one, or one that it started, started, with their command lines."""
    parents, titles = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            number = int(process.name)
            parents[number] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            titles[number] = (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue

    def is_below(number: int) -> bool:
        return number in parents and (parents[number] == pid or is_below(parents[number]))

    return {number: title for number, title in titles.items() if is_below(number)}


def workers_below(pid: int) -> list[int]:
    return [number for number, title in below(pid).items() if b"VideoAnswerer" in title]


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses at which these processes take TCP connections."""
    sockets = set()
    for pid in pids:
        with suppress(OSError):  # it has ended
            sockets |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = bytes.fromhex(local.partition(":")[0])
                turned = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                addresses.add(str(ipaddress.ip_address(turned)))
    return addresses


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def needs_ray() -> None:
    """Ray is there, and not imported by this, so that it listens on this machine alone."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('needs pip install "transformers_crosslmm[ray]"')


@pytest.fixture
def many_clips(folder) -> list[str]:
    """More videos than two workers have at once."""
    clips = [f"ray-{number}.mp4" for number in range(8)]
    for number, clip in enumerate(clips):
        (folder / clip).write_bytes((folder / CLIPS[number % VIDEOS]).read_bytes())
    return clips


@pytest.mark.slow
def test_with_ray_the_rows_are_those_of_one_process_though_a_worker_is_killed(needs_ray, many_clips, tmp_path, ask):
    records = about(*many_clips, "notes.mp4", "../secret.mp4")
    ask(records)
    expected = rows_of(tmp_path / "answers")
    (tmp_path / "answers").rename(tmp_path / "local")

    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done and not killed:
            killed.append(workers_below(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    report = ask(records, engine="ray", workers=2, on_progress=kill)
    rows = rows_of(tmp_path / "answers")
    assert killed
    assert report.failed == 2 * len(QUESTIONS)
    assert sorted(rows, key=lambda row: row["id"]) == sorted(expected, key=lambda row: row["id"])


@pytest.mark.slow
def test_a_worker_is_killed_then_the_driver_and_the_next_run_answers_each_question_once(
    needs_ray, many_clips, folder, tmp_path, ask
):
    records = about(*many_clips, "notes.mp4")
    questions = write(tmp_path / "questions.jsonl", records)
    ask(records)
    expected = rows_of(tmp_path / "answers")
    (tmp_path / "answers").rename(tmp_path / "local")

    driver = subprocess.Popen(
        [sys.executable, "-c", RAY_DRIVER, questions, folder, str(NEW_TOKENS), str(FRAMES)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    started: set[int] = set()
    workers: list[int] = []
    for line in driver.stdout:
        if not line.strip().isdigit():  # Ray tells of the worker's end on standard output
            continue
        done = int(line)
        started |= set(below(driver.pid))
        if done and not workers:
            workers = workers_below(driver.pid)
            os.kill(workers[0], signal.SIGKILL)
        if done >= len(records) // 2:
            break
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    driver.stdout.close()
    kept = rows_of(tmp_path / "answers")
    assert workers
    assert 0 < len(kept) < len(records)
    wait_until(lambda: not any(map(is_running, started)), seconds=120)

    report = ask(records, engine="ray", workers=2)
    rows = rows_of(tmp_path / "answers")
    assert report.answered_before == len(kept)
    assert [row for row in rows if row in kept] == kept
    assert sorted(rows, key=lambda row: row["id"]) == sorted(expected, key=lambda row: row["id"])
    assert not list((tmp_path / "answers/_attempts").iterdir())


def wait_until(is_so: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import ray"], ids=["Ray imported by us", "Ray imported before"])
def test_ray_takes_connections_from_this_machine_alone_or_a_warning_says_that_it_does_not(
    needs_ray, folder, tmp_path, first
):
    questions = write(tmp_path / "questions.jsonl", about("0.mp4"))
    command = [sys.executable, "-c", first + RAY_DRIVER, questions, folder, str(NEW_TOKENS), str(FRAMES)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    with (tmp_path / "errors").open("w+") as errors:
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=errors) as driver:
            addresses = set()
            for _ in driver.stdout:
                addresses |= listening([driver.pid, *below(driver.pid)])
        errors.seek(0)
        warning = "listens on every network interface" in errors.read()
    assert driver.returncode == 0
    assert addresses
    is_local = addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::1"}
    assert (is_local, warning) == ((False, True) if first else (True, False))
