"""`crosslmm serve` under load: 200 requests, 20 at a time, good, bad and hostile ones mixed, in four rounds.

    python benchmarks/serving_load.py            # -> benchmarks/serving_load.json and .png; two minutes on one core

The server is the real command with the tiny checkpoint, on loopback, one process for all rounds. Every good answer is
compared with what `generate` writes without the server, every other request with the status that it must get; 429 is
tried again when the server says. Memory is that of the server's own process, without the short-lived ones that decode.
"""

import base64
import importlib.metadata
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
from origin import commit

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "modeling_tests"))
RESULTS, CHART = HERE / "serving_load.json", HERE / "serving_load.png"
ROUNDS, REQUESTS, AT_ONCE = 4, 200, 20
SHARES = {"good": 120, "bad": 40, "hostile": 40}
VIDEOS, SECONDS, FPS, TOKENS = 6, 6, 3, 12
QUESTIONS = ("What happens?", "Which colour comes first?", "Who is there, and where?", "How many frames are blue?")
MAX_BODY_MIB = 1


@dataclass(frozen=True)
class Case:
    """A request. expected: the answer of a good one, the status of another or several that it may get, None where the
    client does not wait."""

    kind: str
    name: str
    body: bytes
    expected: str | int | tuple[int, ...] | None


def chat(question: str, *urls: str, **options) -> dict:
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"messages": [message], "max_tokens": TOKENS, "temperature": 0} | options


def make_videos(folder: Path) -> list[Path]:
    from factories import mp4_of, random_frames

    for name in ("videos", "videos-of-others"):
        (folder / name).mkdir()
    paths = [folder / "videos" / f"{number}.mp4" for number in range(VIDEOS)]
    for seed, path in enumerate([*paths, folder / "videos-of-others/secret.mp4"]):
        path.write_bytes(mp4_of(random_frames(SECONDS, seed=seed).repeat(FPS, axis=0), fps=FPS))
    (folder / "videos/link.mp4").symlink_to(folder / "videos-of-others/secret.mp4")
    return paths


def data_url(content: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


def good_cases(paths: list[Path]) -> list[Case]:
    """Every question on every video, by path, with the content in the request, and as a stream."""
    from transformers_crosslmm import TINY_CHECKPOINT
    from transformers_crosslmm.checkpoints.load import load_model, load_processor

    model, processor = load_model(TINY_CHECKPOINT, device="cpu"), load_processor(TINY_CHECKPOINT)
    cases = []
    for path in paths:
        for question in QUESTIONS:
            inputs = processor.apply_chat_template(
                chat(question, str(path))["messages"],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            bodies = {
                "path": chat(question, str(path)),
                "data URL": chat(question, data_url(path.read_bytes())),
                "stream": chat(question, str(path), stream=True),
            }
            cases += [Case("good", name, json.dumps(body).encode(), expected) for name, body in bodies.items()]
    return cases


def bad_cases(video: str) -> list[Case]:
    bodies = {
        "no JSON": (b"{", 400),
        "no messages": ({"temperature": 0}, 400),
        "an unknown field": (chat("Why?", video, beams=4), 400),
        "two answers": (chat("Why?", video, n=2), 400),
        "too many frames": (chat("Why?", video, chat_template_kwargs={"num_frames": 10**9}), 400),
        "another model": (chat("Why?", video, model="other"), 404),
        "no such file": (chat("Why?", str(Path(video).with_name("none.mp4"))), 400),
        "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400),
    }
    return [make_case("bad", name, *what) for name, what in bodies.items()]


def hostile_cases(folder: Path) -> list[Case]:
    video = folder / "videos/0.mp4"
    content = video.read_bytes()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n"
    bodies = {
        "a file of the system": (chat("Read it.", "file:///etc/passwd"), 403),
        "a folder with a longer name": (chat("Read it.", str(folder / "videos-of-others/secret.mp4")), 403),
        "a link out of the folder": (chat("Read it.", str(folder / "videos/link.mp4")), 403),
        "a private address": (chat("Fetch it.", "http://169.254.169.254/latest/meta-data"), 400),
        "a playlist": (chat("Play it.", data_url(playlist)), 400),
        "half a file": (chat("Why?", data_url(content[: len(content) // 2])), 400),
        "noise": (chat("Why?", data_url(random.Random(0).randbytes(50_000))), 400),
        "too large": (b" " * int(1.5 * MAX_BODY_MIB * 2**20), 413),
        "gone in the middle of its request": (chat("Why?", str(video)), None),
        "gone before the answer": (chat("Tell me all.", str(video), max_tokens=200), None),
    }
    return [make_case("hostile", name, *what) for name, what in bodies.items()]


def make_case(kind: str, name: str, body: dict | bytes, expected: int | tuple[int, ...] | None) -> Case:
    return Case(kind, name, body if isinstance(body, bytes) else json.dumps(body).encode(), expected)


def one_round(cases: dict[str, list[Case]], seed: int) -> list[Case]:
    """As many of each kind as SHARES says, every case about equally often, in an order of chance."""
    drawn = [cases[kind][number % len(cases[kind])] for kind, count in SHARES.items() for number in range(count)]
    random.Random(seed).shuffle(drawn)
    assert len(drawn) == REQUESTS
    return drawn


class Client:
    """Sends cases, and counts what comes back."""

    def __init__(self, port: int, timeout: float = 120) -> None:
        self.port, self.timeout = port, timeout
        self.base = f"http://127.0.0.1:{port}"
        self.openai = openai.OpenAI(base_url=f"{self.base}/v1", api_key="none", max_retries=0, timeout=timeout)
        self.seconds: list[float] = []
        self.counts: Counter = Counter()
        self.wrong: list[str] = []

    def send(self, case: Case) -> None:
        began = time.monotonic()
        try:
            got = self._got(case)
        except Exception as error:
            got = repr(error)
        if got not in (case.expected if isinstance(case.expected, tuple) else (case.expected,)):
            self.wrong.append(f"{case.kind}, {case.name}: {repr(got)[:200]} instead of {case.expected!r}"[:500])
        elif case.kind == "good":
            self.seconds.append(time.monotonic() - began)
        self.counts[f"{case.kind}, {case.name}"] += 1

    def _got(self, case: Case) -> str | int | None:
        if case.expected is None:
            self._leave_early(case)
            return None
        while True:
            status, got, retry_after = self._ask(case) if case.kind == "good" else self._post(case)
            if status != 429:
                return got
            self.counts["429"] += 1
            time.sleep(retry_after)

    def _ask(self, case: Case) -> tuple[int, str | int, float]:
        body = json.loads(case.body)
        try:
            reply = self.openai.chat.completions.create(model="crosslmm-tiny", **body)
            if body.get("stream"):
                return 200, "".join(chunk.choices[0].delta.content or "" for chunk in reply), 0
            return 200, reply.choices[0].message.content, 0
        except openai.RateLimitError as error:
            return 429, 429, float(error.response.headers["Retry-After"])

    def _post(self, case: Case) -> tuple[int, int, float]:
        headers = {"Content-Type": "application/json"}
        address = f"{self.base}/v1/chat/completions"
        reply = httpx2.post(address, content=case.body, headers=headers, timeout=self.timeout)
        assert reply.status_code == 200 or reply.json()["error"]["message"]
        return reply.status_code, reply.status_code, float(reply.headers.get("Retry-After", 0))

    def _leave_early(self, case: Case) -> None:
        half = "middle" in case.name
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(case.body)}\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            body = case.body[: len(case.body) // 2] if half else case.body
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            time.sleep(0.2)

    def is_idle(self) -> bool:
        health = httpx2.get(f"{self.base}/health").json()
        return health == {"status": "ok", "running": 0, "waiting": 0}


@contextmanager
def served(folder: Path, log: Path, *options: str):
    """The real command in a process of its own: the process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "crosslmm_cli", "serve", "--port", str(port), "--device", "cpu"]
    command += ["--allowed-folder", str(folder / "videos"), "--max-body-mib", str(MAX_BODY_MIB), *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            _wait_until(lambda: _is_up(port) or process.poll() is not None, 600)
            assert process.poll() is None, log.read_text()
            yield process, port
        finally:
            process.terminate()
            process.wait(timeout=30)


def _is_up(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx2.TransportError:
        return False


def _wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def memory_mb(process: subprocess.Popen) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024, 1)


def main() -> None:
    rounds, samples = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_videos(folder)
        cases = {"good": good_cases(paths), "bad": bad_cases(str(paths[0])), "hostile": hostile_cases(folder)}
        with served(folder, folder / "log") as (process, port):
            began, is_over = time.monotonic(), threading.Event()

            def watch() -> None:
                while not is_over.wait(0.25):
                    samples.append((round(time.monotonic() - began, 2), memory_mb(process)))

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                for number in range(ROUNDS):
                    rounds.append(run_round(Client(port), process, one_round(cases, seed=number), began))
            finally:
                is_over.set()
                watcher.join()
    RESULTS.write_text(json.dumps({"about": about(cases), "rounds": rounds, "memory_mb": samples}, indent=1) + "\n")
    draw(rounds, samples)
    print(json.dumps([{key: value for key, value in one.items() if key != "counts"} for one in rounds], indent=1))
    if any(one["wrong"] for one in rounds):
        sys.exit("Some requests did not get what they must; see `wrong`.")


def run_round(client: Client, process: subprocess.Popen, drawn: list[Case], began: float) -> dict:
    before, start = memory_mb(process), time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(client.send, drawn))
    end = time.monotonic()
    _wait_until(client.is_idle, 60)  # no place is kept by those who left
    return {
        "began_seconds": round(start - began, 2),
        "ended_seconds": round(end - began, 2),
        "good_sent": SHARES["good"],
        "good_answered_as_expected": len(client.seconds),
        "told_to_come_back": client.counts.pop("429", 0),
        "wrong": client.wrong,
        "good_median_seconds": round(sorted(client.seconds)[len(client.seconds) // 2], 2) if client.seconds else None,
        "memory_before_mb": before,
        "memory_after_mb": memory_mb(process),
        "counts": dict(sorted(client.counts.items())),
    }


def about(cases: dict[str, list[Case]]) -> dict:
    packages = ("torch", "transformers", "openai", "fastapi", "uvicorn", "av")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    return {
        "command": "python benchmarks/serving_load.py",
        "commit": commit(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "requests": SHARES,
        "at_once": AT_ONCE,
        "different_good_requests": len(cases["good"]),
        "different_good_answers": len({case.expected for case in cases["good"]}),
    }


def draw(rounds: list[dict], samples: list[tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
    axes.plot(*zip(*samples, strict=True))
    for number, one in enumerate(rounds, 1):
        axes.axvspan(one["began_seconds"], one["ended_seconds"], alpha=0.1)
        axes.text(one["began_seconds"], 10, f" round {number}")
    axes.set(xlabel="seconds", ylabel="memory of the server, MB", ylim=(0, 1.2 * max(mb for _, mb in samples)))
    figure.savefig(CHART, dpi=100)


if __name__ == "__main__":
    main()
