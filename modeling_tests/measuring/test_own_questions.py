"""`crosslmm evaluate`: the share of right answers to somebody's own questions."""

import json

import pytest
from typer.testing import CliRunner

import crosslmm_cli
from factories import mp4_of, random_frames, save_checkpoint
from transformers_crosslmm.asking.conversation import VideoConversation, read_video
from transformers_crosslmm.checkpoints.load import load_model, load_processor
from transformers_crosslmm.measuring.own_questions import is_right, read_own_questions

FRAMES, NEW_TOKENS = 3, 5


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "checkpoint")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(mp4_of(random_frames(6), fps=4))
    return tmp_path


def test_the_share_is_that_of_answers_given_one_by_one(folder):
    model, processor = load_model(folder / "checkpoint", device="cpu"), load_processor(folder / "checkpoint")

    def answer(video, question):
        seen = read_video(processor, str(folder / video), num_frames=FRAMES)
        return VideoConversation(model, processor, seen).ask(question, max_new_tokens=NEW_TOKENS).text

    asked = [("b.mp4", "What?"), ("a.mp4", "Where?"), ("b.mp4", "Who?")]
    truths = [answer(*asked[0]), "nothing of the kind", answer(*asked[2]) + "."]
    lines = [
        json.dumps({"video": v, "question": q, "answer": a}) for (v, q), a in zip(asked, truths, strict=True) if a
    ]
    assert len(lines) == 3
    (folder / "own.jsonl").write_text("\n".join(lines) + "\n\n")
    command = ["evaluate", str(folder / "own.jsonl"), "--model", str(folder / "checkpoint"), "--frames", str(FRAMES)]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    result = CliRunner().invoke(crosslmm_cli.app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["asked"], report["right"]) == (3, 2)
    [wrong] = report["wrong"]
    assert (wrong["video"], wrong["given"]) == ("a.mp4", answer(*asked[1]))
    result = CliRunner().invoke(crosslmm_cli.app, [*command, "--show-wrong"])
    assert "2 of 3 right, 66.7 %".replace(" %", "%") in result.stdout
    assert "nothing of the kind" in result.stdout


def test_case_space_and_a_full_stop_do_not_matter():
    assert is_right(" Red.", "red")
    assert not is_right("red star", "red")


@pytest.mark.parametrize("line", ["{", "[]", '{"video": "a.mp4", "question": "Why?"}', '{"video": 1}', '"text"', ""])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_text('{"video": "a.mp4", "question": "Why?", "answer": "so"}\n' * bool(line) + line + "\n")
    with pytest.raises(ValueError, match="Line 2 of .*own.jsonl" if line else "has no questions"):
        read_own_questions(path)
