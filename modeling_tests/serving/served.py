"""A server of `crosslmm serve` on a free port of this machine, and what its clients need."""

import base64
import json
import socket
import threading
import time
from pathlib import Path

import pytest

NEEDED = 'needs pip install "transformers_crosslmm[serve]"'
openai = pytest.importorskip("openai", reason=NEEDED)
httpx = pytest.importorskip("httpx2", reason=NEEDED)  # comes with openai
uvicorn = pytest.importorskip("uvicorn", reason=NEEDED)
pytest.importorskip("fastapi", reason=NEEDED)
pytest.importorskip("prometheus_client", reason=NEEDED)

from transformers_crosslmm.serving import server as server_module  # noqa: E402
from transformers_crosslmm.serving.server import ServerSettings, build_app  # noqa: E402

SECONDS, FPS = 7, 3
QUESTIONS = ["What happens?", "Who is there, and where?"]
GOOD = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
IDLE = {"status": "ok", "running": 0, "waiting": 0}


class Server:
    """A server on a free port of this machine, and what its clients need."""

    def __init__(self, checkpoint: Path, **settings) -> None:
        self.app = build_app(ServerSettings(str(checkpoint), device="cpu", **settings))
        self.handler = self.app.state.service
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=10)
        self.server = server_module.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.model = self.handler.settings.model_name

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive(), "the server does not stop"

    def post(self, body, **options):
        """A request that no client of OpenAI's would send."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        return httpx.post(f"{self.url}/v1/chat/completions", content=content, headers=headers, timeout=60, **options)

    def ask(self, question: str | list, url: str | Path = "", *, system=None, sampling=None, **options):
        messages = question if isinstance(question, list) else [user(question, url)]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        options = {"max_tokens": 12, "temperature": 0} | options
        extra = {"chat_template_kwargs": sampling} if sampling else None
        return self.client.chat.completions.create(model=self.model, messages=messages, extra_body=extra, **options)

    def answer(self, *arguments, **options) -> str:
        return self.ask(*arguments, **options).choices[0].message.content

    def health(self) -> dict:
        return httpx.get(f"{self.url}/health", timeout=20).json()

    def number(self, name: str) -> float:
        """A number of /metrics, 0 where there is none yet."""
        lines = httpx.get(f"{self.url}/metrics", timeout=20).text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


def user(question: str, *urls: str | Path) -> dict:
    parts = [{"type": "video_url", "video_url": {"url": str(url)}} for url in urls if str(url)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def begin_request(server: Server, body: dict | bytes, *, length: int | None = None) -> socket.socket:
    """A connection on which a request was sent, of which the answer is not read. length: what is announced."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode() + content)
    return connection


def data_url(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
