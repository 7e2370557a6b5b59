"""vLLM's own server with the plugin: a load run, and killed workers. An environment of its own, see test_vllm."""

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factories import mp4_of, random_frames

pytest.importorskip("vllm", reason="needs vLLM: `make vllm-environment`")

import psutil
from vllm_cases import answer_to_chat, save

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save("qwen2", tmp_path_factory.mktemp("checkpoint"))


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """vLLM's server in a process of its own, found through the entry point: its address and the process."""
    # The port stays bound, so that no other server can take it and answer while vLLM starts, which takes a minute.
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does: both may bind, it alone listens
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--served-model-name", "m", *options]
        with _running(command, folder.parent / "server.log", f"http://127.0.0.1:{port}") as server:
            yield f"http://127.0.0.1:{port}", server


@contextmanager
def _running(command: list[str], log: Path, address: str) -> Iterator[subprocess.Popen]:
    """The server from its first answer; it and its workers end with the context."""
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        )
    try:
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield server
    finally:
        everyone = []
        if server.poll() is None:  # while it starts, it is slow to end and leaves its workers
            process = psutil.Process(server.pid)
            everyone = [process, *process.children(recursive=True)]
        server.terminate()
        _, left = psutil.wait_procs(everyone, timeout=60)
        for one in left:
            one.kill()


@pytest.fixture(scope="module")
def chats(folder) -> list[tuple[list[dict[str, Any]], list[int]]]:
    """25 messages, most of them with a video, and what `generate` answers."""
    found = []
    for number in range(25):
        content = [{"type": "text", "text": f"Question {number}: what is there? <|video_pad|>"}]
        if number % 5:
            data = base64.b64encode(mp4_of(random_frames(1 + number % 7, seed=number % 8), fps=1)).decode()
            content.insert(0, {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}})
        found.append((content, answer_to_chat(folder, content)[1]))
    return found


def answer(address: str, content: list[dict[str, Any]], **options: Any) -> list[int]:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "return_token_ids": True}
    body |= {"temperature": 0, "max_tokens": 12, "ignore_eos": True} | options
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        error.add_note(error.read().decode())  # the server's reason
        raise


def test_a_thousand_requests_are_answered_and_none_is_mixed_up(folder, chats):
    with served(folder) as (address, _), ThreadPoolExecutor(16) as pool:
        written = list(pool.map(lambda number: answer(address, chats[number % 25][0]), range(1000)))
    assert written == [chats[number % 25][1] for number in range(1000)]


@pytest.mark.parametrize(
    "options",
    [
        ("--mm-processor-cache-type", "shm"),
        # Refused requests keep their places in the cache: here they fill it.
        ("--mm-processor-cache-type", "shm", "--mm-processor-cache-gb", "0.0002"),
        ("--mm-processor-cache-gb", "0"),
    ],
    ids=["shared memory", "shared memory that is full", "no cache"],
)
def test_with_these_caches_of_media_a_refused_request_costs_the_next_one_nothing(folder, chats, options):
    """As docs/vllm.md advises: with its own choice of cache, vLLM fails the next request about the same video."""
    refused = [{"temperature": -3}, {"max_tokens": 0}, {"truncate_prompt_tokens": 8, "truncation_side": "right"}]
    with served(folder, *options) as (address, _):
        for number, (content, _) in enumerate(chats):
            if number % 5 == 0:  # without a video
                continue
            with pytest.raises(urllib.error.HTTPError, match="400"):
                answer(address, content, **refused[number % 3])
        for _ in range(2):
            assert [answer(address, content) for content, _ in chats] == [expected for _, expected in chats]


@pytest.mark.parametrize(
    ("options", "worker"), [((), "EngineCore"), (("--tensor-parallel-size", "2"), "Worker_TP1")], ids=["one", "two"]
)
def test_a_killed_worker_costs_answers_and_spoils_none(folder, chats, options, worker):
    """What was being answered fails, at once; vLLM's server ends, and one that is started anew answers rightly."""
    counts = {"right": 0, "failed": 0}
    with served(folder, *options) as (address, server), ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> None:
            content, expected = chats[number % 25]
            try:
                written = answer(address, content)
            except (OSError, http.client.HTTPException):
                counts["failed"] += 1
            else:
                assert written == expected
                counts["right"] += 1

        asked = [pool.submit(ask, number) for number in range(200)]
        while counts["right"] < 20:
            assert server.poll() is None
            time.sleep(0.05)
        (killed,) = (
            one for one in psutil.Process(server.pid).children(recursive=True) if worker in " ".join(one.cmdline())
        )
        killed.kill()
        for one in asked:
            one.result(timeout=120)
        assert counts["right"] >= 20
        assert counts["failed"] > 0
        assert server.wait(timeout=120) is not None
    with served(folder, *options) as (address, _):
        assert [answer(address, content) for content, _ in chats] == [expected for _, expected in chats]
