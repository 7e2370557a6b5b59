"""`lmms_eval --model crosslmm`, run as its users run it, answers as our own evaluation does."""

import configparser
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

from transformers_crosslmm import TINY_CHECKPOINT
from transformers_crosslmm.checkpoints.load import load_model, load_processor
from transformers_crosslmm.measuring.quality import answer_questions, evaluate, read_questions
from transformers_crosslmm.media_crosslmm import CrossLMMEncodedMedia
from transformers_crosslmm.tiny.procedural_videos import write_videos

NEEDED = 'needs pip install "transformers_crosslmm[eval]", in an environment of its own'
MODULE = "transformers_crosslmm.measuring.lmms_eval"
NUM_FRAMES = 6  # of 8 seconds: not what the checkpoint would take by itself

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{"test": {questions}}}
test_split: test
output_type: generate_until
doc_to_visual: !function procedural.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs: {options}
process_results: !function procedural.process_results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
TASK_FUNCTIONS = """from pathlib import Path

def doc_to_visual(doc):
    return [str(Path(__file__).parent / "videos" / doc["video"])]

def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


class Exam:
    """Questions about three videos, what our own evaluation says to them, and the same as tasks for lmms-eval."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_videos(folder / "videos", num_videos=3, seed=5, split="train", size=64, fps=2)
        self.questions = read_questions(folder / "videos")
        self.model, self.processor = load_model(TINY_CHECKPOINT, device="cpu"), load_processor(TINY_CHECKPOINT)
        self.answers: list[str] = []
        self.first_tokens: list[str] = []
        for _, group in groupby(self.questions, key=lambda question: question.video):
            inputs = self.inputs(list(group))
            self.answers += answer_questions(self.model, inputs, self.processor)
            with torch.no_grad():
                output = self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            self.first_tokens += [text.strip() for text in texts]
        self.ends = sorted({answer[1] for answer in self.answers if len(answer) > 2})[:2]
        self.write_task("whole", max_new_tokens=8, temperature=0)
        self.write_task("first_token", max_new_tokens=1, temperature=0)
        self.write_task("cut", max_new_tokens=8, temperature=0, until=self.ends)
        (folder / "procedural.py").write_text(TASK_FUNCTIONS, encoding="utf-8")

    def inputs(self, questions):
        chats = []
        for question in questions:
            parts = [{"type": "video", "path": str(question.video)}, {"type": "text", "text": question.question}]
            chats.append([{"role": "user", "content": parts}])
        options = {"num_frames": NUM_FRAMES, "padding": True, "padding_side": "left", "return_tensors": "pt"}
        return self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
        )

    def write_task(self, name: str, **options) -> None:
        questions = json.dumps(str(self.folder / "videos" / "questions.jsonl"))
        text = TASK.format(name=f"crosslmm_{name}", questions=questions, options=json.dumps(options))
        (self.folder / f"crosslmm_{name}.yaml").write_text(text, encoding="utf-8")

    def sit(self, output: Path, *, batch_size: int, tasks: str) -> tuple[dict, dict]:
        """Scores and samples by task, as the `lmms_eval` command writes them."""
        command = [sys.executable, "-m", "lmms_eval", "--model", "crosslmm", "--include_path", self.folder]
        command += ["--model_args", f"pretrained={TINY_CHECKPOINT},num_frames={NUM_FRAMES}", "--tasks", tasks]
        command += ["--batch_size", batch_size, "--device", "cpu", "--log_samples", "--output_path", output]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "cache")}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        [results] = output.rglob("*_results.json")
        samples = {}
        for name in tasks.split(","):
            [file] = output.rglob(f"*_samples_{name}.jsonl")
            rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            samples[name] = sorted(rows, key=lambda row: row["doc_id"])
        return json.loads(results.read_text(encoding="utf-8"))["results"], samples


@pytest.fixture(scope="module")
def lmms_eval():
    return pytest.importorskip("lmms_eval", reason=NEEDED)


@pytest.fixture(scope="module")
def exam(lmms_eval, tmp_path_factory):
    return Exam(tmp_path_factory.mktemp("exam"))


@pytest.fixture(scope="module", params=[1, 3], ids=["one at a time", "batches of three"])
def sat(request, exam, tmp_path_factory):
    tasks = "crosslmm_whole,crosslmm_first_token,crosslmm_cut"
    return exam.sit(tmp_path_factory.mktemp("results"), batch_size=request.param, tasks=tasks)


def written(samples: list[dict]) -> list[str]:
    return [sample["filtered_resps"] for sample in samples]


def test_the_questions_tell_whether_the_frames_were_looked_at(exam):
    with torch.no_grad():
        inputs = exam.inputs(exam.questions)
        [pixels] = [name for name in inputs if name.startswith("pixel_values")]
        inputs[pixels] = torch.zeros_like(inputs[pixels])
        assert answer_questions(exam.model, inputs, exam.processor) != exam.answers


def test_every_question_is_answered_as_by_our_own_evaluation(exam, sat):
    _, samples = sat
    assert [sample["input"] for sample in samples["crosslmm_whole"]] == [asked.question for asked in exam.questions]
    assert written(samples["crosslmm_whole"]) == exam.answers


def test_the_score_is_that_of_our_own_evaluation(exam, sat):
    scores, _ = sat
    ours = evaluate(exam.model, exam.processor, exam.questions, num_frames=NUM_FRAMES)["as_trained"]
    right = ours["fine_detail"]["right"] + ours["order_and_count"]["right"]
    assert scores["crosslmm_whole"]["right,none"] == pytest.approx(right / len(exam.questions))


def test_an_answer_is_as_long_as_the_task_allows(exam, sat):
    _, samples = sat
    assert written(samples["crosslmm_first_token"]) == exam.first_tokens
    assert {sample["token_counts"][0]["output_tokens"] for sample in samples["crosslmm_first_token"]} == {1}


def test_an_answer_ends_before_the_first_of_the_strings_that_end_it(exam, sat):
    _, samples = sat
    expected = []
    for answer in exam.answers:
        places = [answer.index(end) for end in exam.ends if end in answer]
        expected.append(answer[: min(places, default=len(answer))].strip())
    assert expected != exam.answers
    assert written(samples["crosslmm_cut"]) == expected


def test_likelihoods_and_rounds_are_refused_with_what_to_do(lmms_eval):
    model = importlib.import_module(MODULE).CrossLMM(str(TINY_CHECKPOINT), device="cpu")
    with pytest.raises(NotImplementedError, match="generating variant: perceptiontest_val_mc,"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


def test_a_wrong_batch_size_or_two_rules_of_sampling_are_refused_before_a_checkpoint_is_read(lmms_eval):
    model_class = importlib.import_module(MODULE).CrossLMM
    with pytest.raises(ValueError, match="positive number; got 'auto'"):
        model_class("no/such-checkpoint", batch_size="auto")
    with pytest.raises(ValueError, match=r"exclude each other; got 8 and 2\.0"):
        model_class("no/such-checkpoint", num_frames=8, fps=2.0)


def entry_point() -> tuple[str, str]:
    """Module and function under `crosslmm` of the entry points `lmms_eval.models` in setup.cfg."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
    lines = setup["options.entry_points"]["lmms_eval.models"].strip().splitlines()
    [(name, target)] = [[part.strip() for part in line.split("=")] for line in lines]
    assert name == "crosslmm"
    module, function = target.split(":")
    return module, function


def test_the_entry_point_names_a_module_of_the_package():
    module, function = entry_point()
    found = importlib.util.find_spec(module)
    assert found is not None
    assert f"def {function}(" in Path(found.origin).read_text(encoding="utf-8")


def test_the_entry_point_gives_lmms_eval_a_class_that_it_can_load(lmms_eval):
    module, function = entry_point()
    manifest = getattr(importlib.import_module(module), function)()
    assert manifest.model_id == "crosslmm"
    path, name = manifest.chat_class_path.rsplit(".", 1)
    assert issubclass(
        getattr(importlib.import_module(path), name), importlib.import_module("lmms_eval.api.model").lmms
    )


def test_without_lmms_eval_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"] + ["lmms_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[eval\]"'):
        importlib.import_module(MODULE)


def test_videos_of_a_batch_keep_which_of_their_frames_are_shown(lmms_eval):
    from transformers_crosslmm.measuring.lmms_eval import EncodedVideo, _shared

    skipped = CrossLMMEncodedMedia(
        last_hidden_state=torch.randn(2, 25, 6), pooler_output=(torch.randn(4 * 9, 8),), frame_index=(0, 0, 1, 1)
    )
    whole = CrossLMMEncodedMedia(last_hidden_state=torch.randn(3, 25, 6), pooler_output=(torch.randn(3 * 9, 8),))
    joined = _shared([EncodedVideo(media, 0, None) for media in (skipped, whole, skipped)])
    assert joined.frame_index == (0, 0, 1, 1, 2, 3, 4)
    assert joined.media_index == (0, 1, 0)
    assert torch.equal(joined.last_hidden_state, torch.cat([skipped.last_hidden_state, whole.last_hidden_state]))
