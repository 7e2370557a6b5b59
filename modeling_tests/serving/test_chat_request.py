"""What a chat request may say, and what a bad one costs."""

import json

import pytest
from served import GOOD, IDLE, httpx, openai


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
        (GOOD | {"messages": [{"role": "user", "content": ""}]}, "must say something"),
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
