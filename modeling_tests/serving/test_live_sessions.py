"""`/v1/live`: frames and questions over a WebSocket, through Starlette's own client, and once over a real socket."""

import base64
import io
import json
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from served import wait_until
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from factories import random_frames
from transformers_crosslmm.asking import waiting_frames
from transformers_crosslmm.asking.live import LiveVideo
from transformers_crosslmm.checkpoints.load import load_model, load_processor
from transformers_crosslmm.serving.server import ServerSettings, build_app

FRAMES = random_frames(6)
TIMES = [0.0, 1.0, 2.5, 3.0, 4.5, 6.0]


@pytest.fixture(scope="module")
def app(root):
    return build_app(ServerSettings(str(root / "checkpoint"), device="cpu", max_new_tokens=8, max_running=2))


@pytest.fixture
def with_settings(app, monkeypatch):
    def change(**settings) -> None:
        for name, value in settings.items():
            monkeypatch.setitem(app.state.service.settings.__dict__, name, value)

    return change


@pytest.fixture
def connect(app):
    """`with connect() as session`: its first message, the state of nothing, has been read."""
    visits = app.state.service.places.visits

    @contextmanager
    def connect(*, waits: bool = False):
        before = set(visits)
        with connect_only(app) as session:
            wait_until(lambda: visits - before)
            [visit] = visits - before
            assert waits or told(session)["seen"] == 0
            yield session
            session.close()
            wait_until(lambda: visit not in visits)  # Starlette's client would cancel the app while it ends

    return connect


def connect_only(app, **headers: str):
    return TestClient(app).websocket_connect("/v1/live", headers={"host": "localhost"} | headers)


def told(session, kind: str = "state") -> dict:
    """The next message of a kind; those before it are skipped."""
    while (message := session.receive_json())["type"] != kind:
        assert message["type"] != "error", message
    return message


def picture(frame: np.ndarray, form: str = "PNG") -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def send(session, kind: str, **content) -> None:
    session.send_json({"type": kind} | content)


def send_frames(session, frames=FRAMES, times=TIMES) -> None:
    for frame, seconds in zip(frames, times, strict=True):
        send(session, "frame", seconds=seconds, image=picture(frame))


def answer_to(session, question: str = "What?") -> dict:
    send(session, "ask", question=question)
    return told(session, "answer")


@pytest.fixture(scope="module")
def expected(root):
    """What `LiveVideo` itself answers."""
    model, processor = load_model(root / "checkpoint", device="cpu"), load_processor(root / "checkpoint")

    def expected(frames=FRAMES, times=TIMES, question: str = "What?", **options) -> str:
        live = LiveVideo(model, processor, **options)
        live.add(frames, times)
        return live.ask(question, max_new_tokens=8).text

    return expected


def test_frames_are_asked_about_while_they_come(connect, expected):
    with connect() as session:
        send_frames(session, FRAMES[:3], TIMES[:3])
        send(session, "ask", question="What?")
        pieces = []
        while (message := session.receive_json())["type"] != "answer":
            pieces += [message["text"]] if message["type"] == "text" else []
        assert message == {"type": "answer", "text": expected(FRAMES[:3], TIMES[:3]), "is_whole": True}
        assert "".join(pieces).strip() == message["text"]
        send_frames(session, FRAMES[3:], TIMES[3:])
        assert answer_to(session)["text"] == expected()


def test_sessions_do_not_mix_and_forget_when_told(connect, expected):
    with connect() as one, connect() as other:
        send_frames(one)
        send_frames(other, FRAMES[::-1])
        assert answer_to(one)["text"] == expected()
        assert answer_to(other)["text"] == expected(FRAMES[::-1])
        send(one, "forget")
        send_frames(one, FRAMES[2:4], [0.0, 0.5])
        assert answer_to(one)["text"] == expected(FRAMES[2:4], [0.0, 0.5])
        assert answer_to(other)["text"] == expected(FRAMES[::-1])


def test_max_frames_of_the_server_bounds_a_session(connect, with_settings, expected):
    with_settings(max_frames=4)
    with connect() as session:
        send_frames(session)
        assert answer_to(session)["text"] == expected(FRAMES, TIMES, max_frames=4)
        send_frames(session, FRAMES[:1], [7.0])
        state = told(session)
        assert state["seen"] == state["kept"] + state["forgotten"]
        assert state["kept"] <= 4


def test_the_newest_frames_are_kept_while_the_model_is_busy(app, connect, monkeypatch, expected):
    monkeypatch.setattr(waiting_frames, "MAX_WAITING", 2)
    busy = threading.Event()
    with connect() as session:
        app.state.service.model_thread.submit(busy.wait, 60)
        send_frames(session)
        send(session, "ask", question=3)  # refused once all frames have been taken in
        while session.receive_json()["type"] != "error":
            pass
        busy.set()
        state = told(session)
        while state["seconds_behind"]:
            state = told(session)
        assert state["seen"] + state["dropped"] == len(FRAMES)
        assert 3 <= state["dropped"] <= 4
        kept = [0, *range(len(FRAMES) - 2, len(FRAMES))] if state["seen"] == 3 else range(len(FRAMES) - 2, len(FRAMES))
        assert answer_to(session)["text"] == expected(FRAMES[list(kept)], [TIMES[i] for i in kept])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("no json", "Expecting value"),
        ("[" * 100_000, ""),
        ("3", 'whose "type" is'),
        ({"type": "what"}, 'whose "type" is'),
        ({"type": "frame", "seconds": "1", "image": ""}, "must be a number"),
        ({"type": "frame", "seconds": float("nan"), "image": ""}, "must be a number"),
        ({"type": "frame", "seconds": 1e300, "image": ""}, "must be a number"),
        ({"type": "frame", "seconds": -1, "image": ""}, "must be a number"),
        ({"type": "frame", "seconds": 1, "image": 7}, "must be a data: URL or base64"),
        ({"type": "frame", "seconds": 1, "image": "/etc/passwd"}, "must be a whole JPEG"),
        ({"type": "frame", "seconds": 1, "image": "http://127.0.0.1/a.png"}, "must be a whole JPEG"),
        ({"type": "frame", "seconds": 1, "image": picture(FRAMES[0])[:400]}, "must be a whole JPEG"),
        ({"type": "frame", "seconds": 1, "image": picture(FRAMES[0], "BMP")}, "must be a whole JPEG"),
        ({"type": "frame", "seconds": 1, "image": picture(np.zeros((4097, 8, 3), np.uint8))}, "at most 4096 x 4096"),
        ({"type": "ask"}, "`question` must be a text"),
        ({"type": "ask", "question": "?" * 10_001}, "`question` must be a text"),
        ({"type": "ask", "question": "?"}, "no frame to ask about"),
        (b"\x00\x01", 'whose "type" is'),
    ],
    ids=range(18),
)
def test_a_bad_message_is_an_error_and_the_session_goes_on(connect, expected, message, reason):
    with connect() as session:
        if isinstance(message, bytes):
            session.send_bytes(message)
        else:
            session.send_text(message if isinstance(message, str) else json.dumps(message))
        error = session.receive_json()
        assert error["type"] == "error"
        assert reason in error["message"]
        send_frames(session, FRAMES[:1], TIMES[:1])
        assert answer_to(session)["text"] == expected(FRAMES[:1], TIMES[:1])


@pytest.mark.parametrize("before", ["", '"image": "AAAA", '])
def test_a_message_is_parsed_within_a_limit_of_its_own_beside_its_picture(connect, before):
    """16 MiB of names took the event loop, and with it every other client, two seconds and more."""
    names = ",".join(f'"{number}":0' for number in range(1_000_000))
    with connect() as session:
        began = time.perf_counter()
        session.send_text(f'{{"type": "frame", {before}{names}}}')
        error = session.receive_json()
        assert time.perf_counter() - began < 0.5
        assert "bytes beside its picture" in error["message"]
        frame = json.dumps({"image": picture(FRAMES[0]), "seconds": 0.0, "type": "frame"})
        session.send_text(frame.replace("/", r"\/").replace("+", r"\u002b"))  # as some clients write base64
        assert told(session)["seen"] == 1


def test_a_question_that_is_no_unicode_is_an_error_and_the_session_goes_on(connect, expected):
    with connect() as session:
        send_frames(session, FRAMES[:1], TIMES[:1])
        assert told(session)["seen"] == 1
        send(session, "ask", question="\ud800")
        assert "half a surrogate pair" in session.receive_json()["message"]
        assert answer_to(session)["text"] == expected(FRAMES[:1], TIMES[:1])


def test_a_frame_that_does_not_come_later_is_refused(connect):
    with connect() as session:
        send_frames(session, FRAMES[:2], [1.0, 2.0])
        send(session, "frame", seconds=2.0, image=picture(FRAMES[2]))
        while (message := session.receive_json())["type"] == "state":
            pass
        assert "larger than the one before" in message["message"]


def test_an_answer_is_stopped(app, connect, expected, monkeypatch):
    written, go_on = threading.Event(), threading.Event()
    ask = LiveVideo.ask

    def slow(self, question, *, on_text, **options):
        def wait(piece: str) -> None:
            on_text(piece)
            written.set()
            go_on.wait(30)

        return ask(self, question, on_text=wait, **options)

    with connect() as session:
        send_frames(session)
        with monkeypatch.context() as patch:
            patch.setattr(LiveVideo, "ask", slow)
            send(session, "ask", question="What?")
            assert written.wait(60)
            send(session, "stop")
            send(session, "ask", question=3)  # an error, once "stop" has been taken in
            while session.receive_json()["type"] != "error":
                pass
            go_on.set()
            stopped = told(session, "answer")
        assert not stopped["is_whole"]
        assert expected().startswith(stopped["text"])
        assert answer_to(session) == {"type": "answer", "text": expected(), "is_whole": True}


def test_a_session_takes_a_place_and_gives_it_back(app, connect, with_settings):
    places = app.state.service.places
    with connect(), connect():
        assert places.running == 2
        with connect(waits=True) as third:  # for a place, in silence
            send(third, "what")
            assert third.receive_json()["type"] == "error"
            assert places.waiting == 1
    wait_until(lambda: not places.visits)
    with_settings(request_seconds=0.2)
    with connect():  # and says nothing for too long
        wait_until(lambda: not places.visits)
    wait_until(lambda: not places.visits)


def test_a_full_server_says_so_and_hangs_up(app, monkeypatch):
    monkeypatch.setattr(app.state.service.places, "room", 0)
    with connect_only(app) as session:
        assert "room for 0" in session.receive_json()["message"]
        with pytest.raises(WebSocketDisconnect):
            session.receive_json()


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"host": "localhost", "origin": "https://evil.example"}, {"origin": "null"}]
)
def test_pages_of_other_sites_are_kept_out(app, headers):
    with pytest.raises(WebSocketDisconnect), connect_only(app, **headers):
        pass


def test_a_page_of_the_server_itself_may_use_it(app):
    with connect_only(app, host="localhost:8000", origin="http://localhost:8000") as session:
        assert told(session)["seen"] == 0
        session.close()
        wait_until(lambda: not app.state.service.places.visits)


def test_out_of_memory_ends_the_session_and_nothing_else(connect, expected, monkeypatch):
    with monkeypatch.context() as patch, connect() as session:
        patch.setattr(LiveVideo, "add", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        send_frames(session, FRAMES[:1], TIMES[:1])
        assert "out of memory" in session.receive_json()["message"]
    with connect() as session:
        send_frames(session)
        assert answer_to(session)["text"] == expected()


def test_over_a_real_socket_a_client_that_dies_frees_its_place(started, expected):
    client = pytest.importorskip("websockets.sync.client", reason="uvicorn speaks WebSocket through `websockets`")
    server = started(max_new_tokens=8)
    with client.connect(f"ws://127.0.0.1:{server.port}/v1/live", close_timeout=0.1) as session:
        for frame, seconds in zip(FRAMES, TIMES, strict=True):
            session.send(json.dumps({"type": "frame", "seconds": seconds, "image": picture(frame)}))
        session.send(json.dumps({"type": "ask", "question": "What?"}))
        while (message := json.loads(session.recv(60)))["type"] != "answer":
            assert message["type"] != "error"
        assert message["text"] == expected()
        assert server.health()["running"] == 1
        session.socket.shutdown(socket.SHUT_RDWR)  # without a word
        wait_until(lambda: server.health()["running"] == 0)
