"""Which requests come in, and how their work ends."""

import json
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest
import torch
from served import GOOD, IDLE, QUESTIONS, begin_request, httpx, openai, user, wait_until

from transformers_crosslmm.serving import admission


def test_a_page_of_another_site_cannot_ask(server):
    """Browsers send a form's text without asking first, and a name that leads here with that name as the host."""
    address = f"{server.url}/v1/chat/completions"
    as_text = httpx.post(address, content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    assert (as_text.status_code, as_text.json()["error"]["code"]) == (400, "invalid_json")
    renamed = httpx.post(address, json=GOOD, headers={"Host": "evil.example:8000"})
    assert renamed.status_code == 421
    assert httpx.get(f"{server.url}/metrics", headers={"Host": "evil.example"}).status_code == 421


def test_a_body_is_bounded_in_size_and_time(started):
    server = started(max_body_bytes=2000, body_seconds=0.5)
    for length in (2001, 3000, 50_000):
        try:
            reply = server.post(b" " * length)
        except httpx.TransportError:
            assert length == 50_000  # the server has hung up long before the end
        else:
            assert reply.status_code == 413
            assert "at most 2000 bytes" in reply.json()["error"]["message"]
    in_pieces = httpx.post(f"{server.url}/v1/chat/completions", content=(b" " * 300 for _ in range(9)))
    assert in_pieces.status_code == 413
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        slow.settimeout(20)
        assert b"408" in slow.recv(1000)
    assert server.post(GOOD).status_code == 200
    assert server.health() == IDLE


def test_a_full_server_says_when_to_come_back(started, generated, slow, clip):
    server = started(max_running=1, max_waiting=2)
    release = slow(server)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(server.answer(QUESTIONS[0], clip))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.health()["running"] == 1 and server.health()["waiting"] == 2)
    with pytest.raises(openai.RateLimitError, match="room for 3") as refused:
        server.answer(QUESTIONS[0], clip)
    assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 60
    assert server.number("crosslmm_running") == 1
    release.set()
    for thread in threads:
        thread.join()
    assert answers == [generated([user(QUESTIONS[0], clip)])] * 3
    assert server.health() == IDLE
    patient = server.client.with_options(max_retries=3)
    assert patient.chat.completions.create(model=server.model, messages=[user("Hello!")], max_tokens=1)


def test_a_stream_keeps_its_place_until_it_is_written(started, slow):
    server = started(max_running=1)
    release = slow(server)
    first, second = (begin_request(server, GOOD | {"stream": stream}) for stream in (True, False))
    wait_until(lambda: server.health() == {"status": "ok", "running": 1, "waiting": 1})
    release.set()
    wait_until(lambda: server.health() == IDLE)
    first.close()
    second.close()


def test_nothing_that_goes_wrong_keeps_a_place(started, root, clip, monkeypatch):
    server = started(max_running=1, max_waiting=0)
    (root / "videos/bad.mp4").write_bytes(b"not a video")
    for _ in range(3):
        assert server.post(b"{").status_code == 400
        assert server.post(GOOD | {"n": 2}).status_code == 400
        assert server.post(GOOD | {"messages": [user("x", "/etc/passwd")]}).status_code == 403
        assert server.post(GOOD | {"messages": [user("x", root / "videos/bad.mp4")]}).status_code == 400
        for stream in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(server.handler.model.model, "generate", lambda **options: 1 / 0)
                if stream:
                    with pytest.raises(openai.APIError, match="failed on this request"):
                        list(server.ask("Hello!", stream=True))
                else:
                    with pytest.raises(openai.InternalServerError, match="failed on this request") as failed:
                        server.answer("Hello!")
                    assert "division" not in str(failed.value)
            wait_until(lambda: server.health() == IDLE)
    assert server.answer(QUESTIONS[0], clip)


def test_running_out_of_memory_empties_the_cache_and_goes_on(server, clip, monkeypatch):
    server.answer(QUESTIONS[0], clip)
    assert len(server.handler.cache) > 0

    def fail(**options):
        raise torch.OutOfMemoryError("tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(server.handler.model.model, "generate", fail)
        with pytest.raises(openai.InternalServerError, match="out of memory") as failed:
            server.answer(QUESTIONS[0], clip)
    assert failed.value.status_code == 503
    assert len(server.handler.cache) == 0
    assert server.answer(QUESTIONS[0], clip)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends(started, slow, stream):
    server = started(request_seconds=2)
    model = server.handler.model.model
    hook = model.register_forward_pre_hook(lambda *args: time.sleep(0.05))
    body = GOOD | {"max_tokens": 200, "stream": stream}
    reply = server.post(body)
    hook.remove()
    if stream:
        assert '"code": "timeout"' in reply.text.rstrip().splitlines()[-1]
        assert "[DONE]" not in reply.text
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert server.post(GOOD).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_generation(server, stream):
    status = "200" if stream else "gone"  # a stream that has begun has its status
    steps, counted = [], f'crosslmm_requests_total{{status="{status}"}}'
    before = server.number(counted)

    def step(*args):
        steps.append(1)
        time.sleep(0.02)

    hook = server.handler.model.model.register_forward_pre_hook(step)
    try:
        body = json.dumps(GOOD | {"max_tokens": 400, "stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: len(steps) >= 5)
        wait_until(lambda: server.health()["running"] == 0)
        done = len(steps)
        time.sleep(0.2)
        assert len(steps) == done < 100
    finally:
        hook.remove()
    wait_until(lambda: server.number(counted) == before + 1)
    assert server.post(GOOD).status_code == 200


def test_a_client_that_goes_while_it_waits_frees_its_place(started, slow):
    server = started(max_running=1, max_waiting=1)
    release = slow(server)
    first = threading.Thread(target=server.answer, args=("Hello!",))
    first.start()
    wait_until(lambda: server.health()["running"] == 1)
    second = begin_request(server, GOOD)
    wait_until(lambda: server.health()["waiting"] == 1)
    second.close()
    wait_until(lambda: server.health()["waiting"] == 0)
    release.set()
    first.join()
    assert server.answer("Hello!") is not None


# -- what is on its way -----------------------------------------------------------------------------------------------


def test_bodies_on_their_way_take_no_place(started, clip):
    server = started(max_running=1, max_waiting=0)
    arriving = [begin_request(server, b"{", length=1000) for _ in range(5)]
    wait_until(lambda: server.number("crosslmm_arriving") == 5)
    assert server.answer(QUESTIONS[0], clip)
    for connection in arriving:
        connection.close()
    wait_until(lambda: server.number("crosslmm_arriving") == 0, seconds=10)


def test_there_is_a_cap_on_bodies_that_are_on_their_way(started, monkeypatch):
    server = started()
    monkeypatch.setattr(admission, "MAX_ARRIVING", 3)
    arriving = [begin_request(server, b"{", length=1000) for _ in range(3)]
    wait_until(lambda: server.number("crosslmm_arriving") == 3)
    reply = server.post(GOOD)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
    assert int(reply.headers["Retry-After"]) > 0
    arriving[0].close()
    wait_until(lambda: server.number("crosslmm_arriving") == 2, seconds=10)
    assert server.post(GOOD).status_code == 200


def test_bodies_on_their_way_have_a_size_together(started):
    server = started(max_body_bytes=10_000)
    arriving = [begin_request(server, b" " * 9_000, length=10_000) for _ in range(4)]
    wait_until(lambda: server.handler.places.arriving_bytes == 36_000)
    assert server.post(b" " * 9_000).status_code == 503
    assert server.post(GOOD).status_code == 200
    for connection in arriving:
        connection.close()
    wait_until(lambda: server.handler.places.arriving_bytes == 0, seconds=10)
    assert server.post(b" " * 9_000).status_code == 400


def test_what_waits_is_only_what_the_answer_needs(started, slow, clip):
    """A request that waits with a video of 9 MB in it holds its URL once, and nothing else of its body."""
    server = started(max_running=1)
    release = slow(server)
    first = threading.Thread(target=server.answer, args=("Hello!",))
    first.start()
    wait_until(lambda: server.health()["running"] == 1)
    script = """
import socket, sys, time
body = b'{"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,'
body += b"A" * 12_000_000 + b'"}}]}]}'
head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
connection.recv(1000)
"""
    tracemalloc.start()
    client = subprocess.Popen([sys.executable, "-c", script, str(server.port)])
    try:
        wait_until(lambda: server.health()["waiting"] == 1)
        assert tracemalloc.get_traced_memory()[0] >= 12_000_000
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < 14_000_000)  # once it is parsed
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        release.set()
        first.join()
        client.wait(timeout=20)
    assert 12_000_000 <= held < 14_000_000


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_server_that_stops_tells_everybody_to_come_back(started, slow, monkeypatch):
    """Those who wait at once, the one at work after a while; and a stream that has begun in its own form."""
    monkeypatch.setattr(admission, "STOP_SECONDS", 3)
    server = started(max_running=2)
    release = slow(server)
    replies: dict[str, httpx.Response] = {}

    def ask(name: str, stream: bool) -> None:
        replies[name] = server.post(GOOD | {"stream": stream})

    asking = [threading.Thread(target=ask, args=who) for who in (("stream", True), ("running", False))]
    for thread in asking:
        thread.start()
    wait_until(lambda: server.health()["running"] == 2)
    asking.append(threading.Thread(target=ask, args=("waiting", False)))
    asking[-1].start()
    wait_until(lambda: server.health()["waiting"] == 1)
    server.server.should_exit = True
    wait_until(lambda: "waiting" in replies)
    assert "running" not in replies
    for thread in asking:
        thread.join(timeout=20)
    release.set()
    for name in ("waiting", "running"):
        assert (replies[name].status_code, replies[name].json()["error"]["code"]) == (503, "stopping")
        assert int(replies[name].headers["Retry-After"]) > 0
    assert replies["stream"].status_code == 200
    last = replies["stream"].text.rstrip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"


@pytest.mark.parametrize(
    "host", ["evil@localhost", "localhost@evil", "evil.example", "localhost.evil", "[::1", "", "a b"]
)
def test_another_host_is_refused_in_every_spelling(server, host):
    assert server.post(GOOD, headers={"Host": host}).status_code in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"])
def test_every_name_of_this_machine_is_taken(server, host):
    assert server.post(GOOD, headers={"Host": host}).status_code == 200
