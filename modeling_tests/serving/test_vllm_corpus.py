"""`crosslmm batch --engine vllm`: Ray's workers ask vLLM. An environment of its own, see test_vllm."""

import json

import pytest

from factories import mp4_of, random_frames

pytest.importorskip("vllm", reason="needs vLLM: `make vllm-environment`")
pytest.importorskip("ray", reason='needs pip install "transformers_crosslmm[ray]"')

from vllm_cases import save

from transformers_crosslmm.serving.corpus import answer_corpus

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_a_corpus_is_answered_by_vllm_as_it_is_here(tmp_path, monkeypatch):
    import pyarrow.parquet

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = save("qwen2", tmp_path / "checkpoint")
    lines = [{"video": "missing.mp4", "question": "What?"}]
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(mp4_of(random_frames(2 + number, seed=number), fps=1))
        lines += [{"video": f"{number}.mp4", "question": f"{word}?"} for word in ("What", "Where", "<|video_pad|>")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {}
    for engine in ("local", "vllm"):
        report = answer_corpus(
            tmp_path / "questions.jsonl", tmp_path / engine, model=folder, engine=engine, max_new_tokens=8
        )
        assert (report.questions, report.failed) == (10, 1)
        rows = pyarrow.parquet.read_table(tmp_path / engine).to_pylist()
        found[engine] = sorted((row["video"], row["question"], row["answer"]) for row in rows if row["answer"])
    assert found["vllm"] == found["local"]
