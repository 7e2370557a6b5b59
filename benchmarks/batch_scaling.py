"""Answers per second of `crosslmm batch`, by engine and workers: local, Ray with one worker, Ray with two.

    python benchmarks/batch_scaling.py            # -> benchmarks/batch_scaling.json; five minutes on two idle cores
    python benchmarks/batch_scaling.py --quick    # one small round, printed and not kept

Each worker has one thread, one worker alone too, and beside it the process that decodes its video. Settings take turns
in every round; a ratio is one of medians. The rate is that of the middle half of the answers, when all workers are at
work: without the start, and without the last videos, which a worker may answer alone. All runs give the same answers.
`waited_share` tells whether the machine was idle: the share of that time for which a worker was ready and other
programs had the cores.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from origin import commit

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "modeling_tests"))
RESULTS = HERE / "batch_scaling.json"
SETTINGS = {"local": ("local", None), "Ray, 1 worker": ("ray", 1), "Ray, 2 workers": ("ray", 2)}
ROUNDS, VIDEOS, QUESTIONS = 3, 16, 6
FRAMES, NEW_TOKENS, SECONDS, FPS = 16, 16, 8, 4
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}


def make_corpus(folder: Path, num_videos: int) -> None:
    """A random checkpoint, clips of noise, and the same questions about each."""
    from factories import mp4_of, random_frames, random_model, tiny_config, tiny_processor

    processor = tiny_processor()
    config = tiny_config(
        text_config=SIZES | {"vocab_size": len(processor.tokenizer)},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    random_model(config).save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    lines = []
    for video in range(num_videos):
        name = f"{video}.mp4"
        (folder / name).write_bytes(mp4_of(random_frames(SECONDS, seed=video).repeat(FPS, axis=0), fps=FPS))
        lines += [json.dumps({"video": name, "question": f"Question {number}?"}) for number in range(QUESTIONS)]
    (folder / "questions.jsonl").write_text("\n".join(lines))


# --- one run, in a process of its own -------------------------------------------------------------------------------


def one_run(folder: Path, engine: str, workers: int | None) -> dict:
    import pyarrow.parquet

    from transformers_crosslmm.serving.corpus import answer_corpus

    began, marks = time.monotonic(), []
    quarter = None

    def mark(done: int, total: int) -> None:
        nonlocal quarter
        quarter = quarter or [total // 4, total - total // 4]
        if done in quarter:
            marks.append((time.monotonic(), *_worker_seconds(engine)))
        if done == 1:
            marks.append((time.monotonic(), 0.0, 0.0))

    with tempfile.TemporaryDirectory() as out:
        answer_corpus(
            folder / "questions.jsonl",
            out,
            model=folder / "checkpoint",
            engine=engine,
            workers=workers,
            max_new_tokens=NEW_TOKENS,
            num_frames=FRAMES,
            on_progress=mark,
        )
        rows = pyarrow.parquet.read_table(out).to_pylist()
    assert all(row["error"] is None for row in rows)
    first, (start, cpu_before, waited_before), (end, cpu, waited) = marks
    answers = quarter[1] - quarter[0]
    return {
        "answers_per_second": answers / (end - start),
        "worker_cpu_seconds_per_answer": (cpu - cpu_before) / answers,
        "waited_share": (waited - waited_before) / (end - start) / (workers or 1),
        "seconds_to_first_answer": first[0] - began,
        "seconds_in_all": time.monotonic() - began,
        "answers": {row["id"]: row["answer"] for row in rows},
    }


def _worker_seconds(engine: str) -> tuple[float, float]:
    """Of all workers: CPU time, their decoders' that have ended too, and the time they waited for a core."""
    from test_batch_crosslmm import workers_below

    pids = [os.getpid()] if engine == "local" else workers_below(os.getpid())
    processes = [Path("/proc", str(pid)) for pid in pids]
    cpu = sum(sum(map(int, (path / "stat").read_text().rpartition(")")[2].split()[11:15])) for path in processes)
    waited = sum(int((path / "schedstat").read_text().split()[1]) for path in processes)
    return cpu / os.sysconf("SC_CLK_TCK"), waited / 1e9


# --- all runs -------------------------------------------------------------------------------------------------------


def run(folder: Path, engine: str, workers: int | None) -> dict:
    command = [sys.executable, __file__, "--one", str(folder), engine, str(workers or "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(num_rounds: int, num_videos: int) -> dict:
    runs: dict[str, list[dict]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        make_corpus(Path(name), num_videos)
        for _ in range(num_rounds):
            for setting, (engine, workers) in SETTINGS.items():
                runs[setting].append(run(Path(name), engine, workers))
                print(setting, {key: value for key, value in runs[setting][-1].items() if key != "answers"})
    answers = [one.pop("answers") for ones in runs.values() for one in ones]
    assert all(one == answers[0] for one in answers), "an engine gives other answers"
    keys = runs["local"][0]
    medians = {
        setting: {key: round(statistics.median(one[key] for one in ones), 4) for key in keys}
        for setting, ones in runs.items()
    }
    rate = {setting: median["answers_per_second"] for setting, median in medians.items()}
    return {
        "about": about(num_rounds, num_videos),
        "ratios": {
            "Ray, 2 workers / Ray, 1 worker": round(rate["Ray, 2 workers"] / rate["Ray, 1 worker"], 2),
            "Ray, 1 worker / local": round(rate["Ray, 1 worker"] / rate["local"], 2),
        },
        "medians": medians,
        "runs": {
            setting: [{key: round(one[key], 4) for key in keys} for one in ones] for setting, ones in runs.items()
        },
    }


def about(num_rounds: int, num_videos: int) -> dict:
    packages = ("torch", "transformers", "ray", "pyarrow", "av")
    return {
        "command": "python benchmarks/batch_scaling.py",
        "commit": commit(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "rounds": num_rounds,
        "videos": num_videos,
        "questions_per_video": QUESTIONS,
        "frames": FRAMES,
        "new_tokens": NEW_TOKENS,
        "threads_per_worker": 1,
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        folder, engine, workers = sys.argv[2:]
        print(json.dumps(one_run(Path(folder), engine, int(workers) if workers else None)))
        return
    is_quick = sys.argv[1:] == ["--quick"]
    results = measure(1, 8) if is_quick else measure(ROUNDS, VIDEOS)
    if not is_quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["ratios"] | results["medians"], indent=1))


if __name__ == "__main__":
    main()
