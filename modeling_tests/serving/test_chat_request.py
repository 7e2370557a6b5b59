"""What a chat request may say, and what a bad one costs."""

import base64
import json
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import GOOD, IDLE, httpx, openai, user, wait_until

from transformers_crosslmm.serving.admission import RefusedError
from transformers_crosslmm.serving.chat_request import ChatRequest


def nested(depth: int) -> bytes:
    return b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "JSON object"),
        (b"{", "JSON object"),
        (b"[]", "JSON object"),
        (b"\xff\xfe", "body|JSON"),
        (nested(100_000), "JSON|body|messages"),
        ({}, "`messages`"),
        (GOOD | {"messages": []}, "`messages`"),
        (GOOD | {"messages": "Hello!"}, "`messages`"),
        (GOOD | {"messages": [{"role": "user"}]}, "messages.0.content"),
        (GOOD | {"messages": [{"role": "user", "content": ""}]}, "must have content"),
        (GOOD | {"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
        (GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "video_url"),
        (GOOD | {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}]}, "video_url"),
        (GOOD | {"temperature": 3}, "`temperature`"),
        (GOOD | {"temperature": "0"}, "`temperature`"),
        (GOOD | {"top_p": 0}, "`top_p`"),
        (GOOD | {"max_tokens": 0}, "`max_tokens`"),
        (GOOD | {"max_tokens": 1.5}, "`max_tokens`"),
        (GOOD | {"n": 2}, "`n`"),
        (GOOD | {"seed": -1}, "`seed`"),
        (GOOD | {"stop": ["x"] * 5}, "`stop"),
        (GOOD | {"logprobs": True}, "`logprobs`"),
        (GOOD | {"tools": [{}]}, "`tools`"),
        (GOOD | {"generation_config": "{}"}, "`generation_config`"),
        (GOOD | {"response_format": {"type": "json_object"}}, "`response_format"),
        (GOOD | {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        (GOOD | {"chat_template_kwargs": {"num_frames": 2, "fps": 1}}, "exclude each other"),
        (GOOD | {"model": "another"}, "has the model 'checkpoint'"),
        (json.dumps(GOOD).replace("Hello!", "\\ud800").encode(), "surrogate|JSON"),
        (json.dumps(GOOD).replace('"max', '"\\ud800": 1, "max').encode(), "surrogate|JSON"),
        (json.dumps(GOOD).replace("2}", "NaN}").encode(), "max_tokens"),
    ],
)
def test_a_bad_request_gets_an_error_in_openais_shape(server, body, field):
    if isinstance(body, bytes):
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
    else:
        reply = server.post(body)
    assert reply.status_code == (404 if "has the model" in field else 400)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert any(part in error["message"] for part in field.split("|"))
    assert server.health() == IDLE


def test_what_changes_nothing_is_taken(server):
    extras = {"n": 1, "user": "me", "metadata": {}, "stream_options": {"include_usage": True}, "presence_penalty": 0.0}
    assert server.post(GOOD | extras).status_code == 200
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": "Be brief."}, *GOOD["messages"], answer, *GOOD["messages"]]
    assert server.post(GOOD | {"messages": messages}).status_code == 200


def test_a_chat_that_is_too_long_for_the_context_is_refused(server, clip):
    with pytest.raises(openai.BadRequestError, match="context of 512 tokens") as refused:
        server.answer("word " * 200, clip)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context of 512 tokens"):
        server.answer("word " * 200_000)
    reply = server.ask("Hello!", max_tokens=100_000)
    assert reply.usage.total_tokens <= 513


def sized(pattern: bytes, size: int) -> bytes:
    return pattern * (size // len(pattern))


COSTLY = {
    "a message is a number": b'{"messages": [' + sized(b"0,", 10**6) + b"0]}",
    "a part is a number": b'{"messages": [{"role": "user", "content": [' + sized(b"0,", 10**6) + b"0]}]}",
    "parts": b'{"messages": [{"role": "user", "content": [' + sized(b'{"type":"text","text":"a"},', 10**6) + b"0]}]}",
    "messages": b'{"messages": [' + sized(b'{"role":"user","content":"a"},', 10**6) + b"0]}",
    "times": b'{"messages": [], "chat_template_kwargs": {"times": [' + sized(b"0,", 10**6) + b"0]}}",
    "stops": b'{"messages": [], "stop": [' + sized(b'"",', 10**6) + b"0]}",
    "fields that nobody knows": b"{" + b",".join(b'"f%d":0' % i for i in range(80_000)) + b"}",
    "an ignored field": b'{"messages": [], "metadata": {"x": [' + sized(b"[0],", 10**6) + b"0]}}",
    "an ignored key of a message": b'{"messages": [{"role": "user", "x": [' + sized(b"[],", 10**6) + b"0]}]}",
    "nesting": b'{"messages": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "open strings": b'{"messages": ' + sized(b'"url":"data:', 60 * 10**6),
    "URLs": b'{"messages": [' + sized(b'{"url":"data:"},', 60 * 10**6) + b"0]}",
    "blanks before a URL": b'{"messages": [' + sized(b'"url"' + b" " * 10**5, 60 * 10**6) + b"0]}",
    "backslashes": b'{"url":"data:' + b"\\" * (60 * 10**6) + b'"}',
    "numbers": b'{"messages": [], "n": ' + b"9" * 10**6 + b"}",
    "zeros of five MiB": b'{"messages": [' + sized(b"0,", 5 * 2**20) + b"0]}",
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_request_costs_no_more_than_its_bytes(kind):
    """A fraction of a second and a few times its size, whatever is in it."""
    began = time.process_time()
    with pytest.raises(RefusedError) as refused:
        ChatRequest.parse(COSTLY[kind])
    assert time.process_time() - began < 2
    assert refused.value.status in (400, 413)
    assert len(str(refused.value)) < 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak of memory")
def test_a_costly_request_takes_little_memory():
    def kib(name: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    with pytest.raises(RefusedError):
        ChatRequest.parse(COSTLY["a message is a number"])
    assert kib("VmHWM") - before < 200 * 1024


def test_others_do_not_wait_while_a_request_is_parsed(server, monkeypatch):
    parse, is_parsing, go_on = ChatRequest.parse, threading.Event(), threading.Event()

    def parse_when_told(body: bytes):
        is_parsing.set()
        go_on.wait(60)
        return parse(body)

    monkeypatch.setattr(ChatRequest, "parse", parse_when_told)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, b'{"messages": [0]}')
        try:
            assert is_parsing.wait(20)
            assert server.health() == {"status": "ok", "running": 0, "waiting": 1}
        finally:
            go_on.set()
    assert reply.result().status_code == 400
    wait_until(lambda: server.health() == IDLE)


def test_a_video_in_a_request_counts_apart_from_its_json(server, clip):
    """Padded far beyond what its JSON may have, and in every spelling of JSON."""
    padded = clip.read_bytes() + struct.pack(">I", 8 + 3 * 2**20) + b"free" + bytes(3 * 2**20)
    url = "data:video/mp4;base64," + base64.b64encode(padded).decode()
    expected = server.answer("What?", clip)
    plain = json.dumps({"messages": [user("What?", url)], "max_tokens": 12, "temperature": 0})
    spellings = [plain, plain.replace("/", "\\/"), plain.replace('"url": "', '"url"\n:\t"')]
    for body in spellings:
        assert server.post(body.encode()).json()["choices"][0]["message"]["content"] == expected
    reply = server.post({"messages": [user("a" * 3 * 2**20)]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


def test_a_text_that_looks_like_a_carried_video_is_text(server, generated):
    for text in ('"url": "data:video/mp4;base64,AAAA"', '{"url":"data:x"}', "data:0", "data:,a"):
        chat = [user(text)]
        assert server.answer(chat) == generated(chat)
    reply = server.post({"messages": [user("What?", "data:0")]})
    assert "no comma" in reply.json()["error"]["message"]


NUMBERS = (0, -1, 0.5, 1e-3, 1e-40, 5e-324, 1.7e308, -1.7e308, 2**31, 2**63 - 1, 10**400)
FIELDS = (
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "max_tokens",
    "max_completion_tokens",
)
SAMPLINGS = ("num_frames", "fps", "max_frames", "times", "start_seconds", "end_seconds")


@pytest.mark.parametrize("field", FIELDS + SAMPLINGS)
def test_no_number_crashes_the_server(server, clip, field):
    for number in NUMBERS:
        if field in FIELDS:
            body = {"messages": [user("What?", clip)], "max_tokens": 2, field: number}
        else:
            sampling = {field: [number] if field == "times" else number}
            body = {"messages": [user("What?", clip)], "max_tokens": 2, "chat_template_kwargs": sampling}
        reply = server.post(body)
        assert reply.status_code in (200, 400), f"{field}={number}: {reply.text}"
    together = {
        "temperature": 0.01,
        "top_p": 5e-324,
        "frequency_penalty": 2,
        "presence_penalty": -2,
        "seed": 2**63 - 1,
    }
    assert server.post({"messages": [user("What?")], "max_tokens": 30, **together}).status_code == 200
