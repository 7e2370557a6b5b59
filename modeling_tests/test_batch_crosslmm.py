"""A corpus of questions: rows, one look at each video, and runs that were killed and go on."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import crosslmm_cli
from factories import mp4_of, random_frames, save_checkpoint
from transformers_crosslmm import batch_crosslmm
from transformers_crosslmm.batch_crosslmm import COLUMNS, answer_corpus, read_corpus
from transformers_crosslmm.conversation_crosslmm import load_model, load_processor

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
def encoded_frames(monkeypatch) -> list[int]:
    """Frames of each call of a vision tower from now on."""
    counts: list[int] = []

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        model.model.vision_tower.register_forward_hook(
            lambda module, inputs, named, output: counts.append(len((*inputs, *named.values())[0])), with_kwargs=True
        )
        return model

    monkeypatch.setattr(batch_crosslmm, "load_model", load)
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


def test_answers_are_those_of_generate(folder, tmp_path, ask):
    report = ask(about(*CLIPS))
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
            processor_kwargs={"num_frames": FRAMES},
        )
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        [text] = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected[record["video"], record["question"]] = text.strip()
    assert answers_of(tmp_path / "answers") == expected
    assert len(set(expected.values())) > 1  # or the order of the rows would not matter


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


def test_a_video_outside_the_root_is_never_opened(folder, tmp_path, ask, monkeypatch):
    link = folder / "link.mp4"
    link.symlink_to(folder.parent / "secret.mp4")
    opened = []
    iter_video = batch_crosslmm.iter_video
    monkeypatch.setattr(batch_crosslmm, "iter_video", lambda path, **o: opened.append(path) or iter_video(path, **o))
    outside = ["../secret.mp4", str(folder.parent / "secret.mp4"), "link.mp4"]
    try:
        report = ask(about(*outside, "0.mp4"))
    finally:
        link.unlink()
    assert report.failed == len(outside) * len(QUESTIONS)
    errors = [row["error"] for row in rows_of(tmp_path / "answers") if row["video"] in outside]
    assert errors
    assert all("must lie below" in error for error in errors)
    assert opened == [os.path.realpath(folder / "0.mp4")]


def test_a_fault_of_the_program_ends_the_run_instead_of_becoming_a_row(tmp_path, ask, monkeypatch):
    def broken(*arguments, **options):
        raise AttributeError("a bug")

    monkeypatch.setattr(batch_crosslmm, "iter_video", broken)
    with pytest.raises(AttributeError, match="a bug"):
        ask(about("0.mp4"))
    assert not list((tmp_path / "answers").glob("part-*"))


def test_a_video_that_killed_several_workers_gets_an_error(folder, tmp_path):
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    options = {"device": "cpu", "max_new_tokens": NEW_TOKENS, "sampling": {"num_frames": FRAMES}}
    answer = batch_crosslmm.VideoAnswerer(str(folder / "checkpoint"), str(attempts), **options)
    [question] = [{"id": "a", "video": "0.mp4", "question": "Why?"}]
    group = {"path": str(folder / "0.mp4"), "error": None, "questions": [question]}
    answer._answers = lambda *arguments: (_ for _ in ()).throw(SystemExit)  # the worker dies
    for _ in range(batch_crosslmm.MAX_ATTEMPTS):
        with pytest.raises(SystemExit):
            answer(group)
    [row] = answer(group)
    assert row["answer"] is None
    assert "workers died" in row["error"]


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
        ('{"video": "1.mp4"}', '"question" of line 2'),
        ('{"video": " ", "question": "Why?"}', '"video" of line 2'),
        ('{"video": "1.mp4", "question": "Why?", "id": true}', '"id" of line 2'),
        ('{"video": "1.mp4", "question": "Why?", "id": "a"}', "id 'a' of line 1"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"video": "0.mp4", "question": "Why?", "id": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_corpus(path)


# --- runs that go on ------------------------------------------------------------------------------------------------


def test_a_folder_of_answers_refuses_other_settings(tmp_path, ask):
    ask(about("0.mp4"))
    before = rows_of(tmp_path / "answers")
    for changed in ({"num_frames": FRAMES + 1}, {"max_new_tokens": NEW_TOKENS + 1}):
        with pytest.raises(ValueError, match="name another folder"):
            ask(about("0.mp4", "1.mp4"), **changed)
    assert rows_of(tmp_path / "answers") == before


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
from transformers_crosslmm import batch_crosslmm
questions, root, moment, new_tokens, frames = sys.argv[1:]
batch_crosslmm.ROWS_PER_PART = 2
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replace = os.replace
def rename(source, target):
    die() if moment == "between a part and its name" and "00001" in str(target) else replace(source, target)
os.replace = rename
batch_crosslmm.answer_corpus(
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
    command = [Path(sys.executable).with_name("crosslmm"), "batch", questions, "--out", "answers", "--engine", "local"]
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
    report = {"questions": 4, "videos": 2, "answered_before": 0, "failed": 2, "duplicates": 0}
    assert json.loads(finished.stdout) == report
    assert len(rows_of(tmp_path / "answers")) == 4

    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(crosslmm_cli.app, [os.fspath(part) for part in command[1:]])
    assert again.exit_code == 0
    assert "4 questions about 2 videos, 4 of them answered before; 2 have an error for an answer" in again.stdout


def test_the_command_names_the_extra_where_ray_is_missing(folder, tmp_path, monkeypatch):
    questions = write(tmp_path / "questions.jsonl", about("0.mp4"))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    command = ["batch", questions, "--out", tmp_path / "answers", "--root", folder, "--model", folder / "checkpoint"]
    result = CliRunner().invoke(crosslmm_cli.app, [os.fspath(part) for part in command])
    assert result.exit_code == 1
    assert "transformers_crosslmm[ray]" in " ".join(result.output.split())


# --- many workers ---------------------------------------------------------------------------------------------------


def workers_below(pid: int) -> list[int]:
    """The processes of Ray's workers that this process, or one that it started, started."""
    parents, titles = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            number = int(process.name)
            parents[number] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            titles[number] = (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue

    def is_below(number: int) -> bool:
        return number == pid or (number in parents and is_below(parents[number]))

    return [number for number, title in titles.items() if b"VideoAnswerer" in title and is_below(number)]


@pytest.mark.slow
def test_with_ray_the_rows_are_those_of_one_process_though_a_worker_is_killed(folder, tmp_path, ask):
    pytest.importorskip("ray", reason='pip install "transformers_crosslmm[ray]"')
    clips = [f"ray-{number}.mp4" for number in range(8)]
    for number, clip in enumerate(clips):
        (folder / clip).write_bytes((folder / CLIPS[number % VIDEOS]).read_bytes())
    records = about(*clips, "notes.mp4", "../secret.mp4")
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
