"""vLLM's own server with the plugin, on this machine: a load run. An environment of its own, see test_vllm."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from factories import mp4_of, random_frames

pytest.importorskip("vllm", reason="needs vLLM: `make vllm-environment`")

from vllm_cases import answer_to_chat, save

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save("qwen2", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def address(folder):
    """vLLM's server in a process of its own, found through the entry point."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--served-model-name", "m"]
    log = folder.parent / "server.log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        )
        try:
            deadline = time.monotonic() + 400
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            else:
                pytest.fail(log.read_text()[-3000:])
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=60)


def test_a_thousand_requests_are_answered_and_none_is_mixed_up(folder, address):
    chats = []
    for number in range(25):
        content = [{"type": "text", "text": f"Question {number}: what is there? <|video_pad|>"}]
        if number % 5:
            data = base64.b64encode(mp4_of(random_frames(1 + number % 7, seed=number % 8), fps=1)).decode()
            content.insert(0, {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}})
        chats.append(content)
    expected = [answer_to_chat(folder, content)[1] for content in chats]

    def answer(number: int) -> list[int]:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": chats[number % 25]}],
            "temperature": 0,
            "max_tokens": 12,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(16) as pool:
        written = list(pool.map(answer, range(1000)))
    assert written == [expected[number % 25] for number in range(1000)]
