"""Servers to ask, videos to ask about, and the answers that the model itself gives."""

import functools
import json
import threading
from pathlib import Path

import pytest

from factories import mp4_of, random_frames, save_checkpoint
from transformers_crosslmm.checkpoints.load import load_model, load_processor


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A checkpoint, a folder of videos, and others beside it."""
    from served import FPS, SECONDS

    root = tmp_path_factory.mktemp("serving")
    save_checkpoint(root / "checkpoint")
    for folder in ("videos", "videos-of-others"):
        (root / folder).mkdir()
    for seed, name in enumerate(("videos/one.mp4", "videos/two.mp4", "videos-of-others/secret.mp4")):
        (root / name).write_bytes(mp4_of(random_frames(SECONDS, seed=seed).repeat(FPS, axis=0), fps=FPS))
    (root / "videos/link.mp4").symlink_to(root / "videos-of-others/secret.mp4")
    (root / "videos/inner.mp4").symlink_to(root / "videos/one.mp4")
    return root


@pytest.fixture(scope="session")
def clip(root) -> Path:
    return root / "videos/one.mp4"


@pytest.fixture(scope="session")
def generated(root):
    """What the model itself answers, without any of the server's code."""
    model, processor = load_model(root / "checkpoint", device="cpu"), load_processor(root / "checkpoint")

    @functools.cache
    def answer(chat: str, sampling: str) -> str:
        inputs = processor.apply_chat_template(
            json.loads(chat),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=json.loads(sampling),
        )
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return lambda messages, sampling={}: answer(json.dumps(messages), json.dumps(sampling))


@pytest.fixture(scope="module")
def server(root):
    from served import Server

    server = Server(root / "checkpoint", allowed_folders=(root / "videos",))
    yield server
    server.stop()


@pytest.fixture
def started(root):
    """Starts servers with settings of their own."""
    from served import Server

    servers = []

    def start(**settings) -> Server:
        servers.append(Server(root / "checkpoint", allowed_folders=(root / "videos",), **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def forget(server):
    server.handler.cache.clear()


@pytest.fixture
def slow(monkeypatch):
    """Makes a server's model wait, before it generates, until told: `release = slow(server)`."""
    events = []

    def slow(server) -> threading.Event:
        event = threading.Event()
        events.append(event)
        generate = server.handler.model.model.generate

        def wait_and_generate(**options):
            event.wait(30)
            return generate(**options)

        monkeypatch.setattr(server.handler.model.model, "generate", wait_and_generate)
        return event

    yield slow
    for event in events:
        event.set()
