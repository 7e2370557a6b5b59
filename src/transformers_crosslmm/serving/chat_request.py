"""OpenAI's chat request as `crosslmm serve` accepts it: the schema and the parser.

Requests are untrusted, so their cost is bounded before parsing: videos in `data:` URLs are cut out of the JSON, the
rest has a size limit of its own, and validation stops at the first error.
"""

import json
import re
import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .admission import RefusedError

MAX_JSON_BYTES = 1024**2
"""Largest request, not counting the videos in it."""
MAX_VIDEOS = 64
"""Most videos of one request."""

_CARRIED = re.compile(rb'("url"\s*+:\s*+)("(?i:data):(?:[^"\\]++|\\.)*+")', re.DOTALL)
"""A `data:` URL as the value of "url". Quotes within JSON strings are escaped, so this cannot match inside of one."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shortened(value: Any) -> str:
    """A value as text of bounded length, for an error message."""
    return _REPR.repr(value)


Limited = Annotated[float, Field(ge=0, le=1e6)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _Url(_Strict):
    url: str


class _VideoPart(_Strict):
    type: Literal["video_url"]
    video_url: _Url


_Part = Annotated[_TextPart | _VideoPart, Field(discriminator="type")]


class _Message(BaseModel):
    """A message. Other keys are ignored: clients send back all fields of earlier answers."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=1024, fail_fast=True)]
    tool_calls: None = None


class _Sampling(_Strict):
    """Options of `CrossLMMVideoProcessor` that choose frames."""

    num_frames: Annotated[int, Field(ge=1, le=10**6)] | None = None
    fps: Annotated[float, Field(ge=1e-4, le=1e4)] | None = None
    max_frames: Annotated[int, Field(ge=1, le=10**6)] | None = None
    times: Annotated[list[Limited], Field(min_length=1, max_length=10**5, fail_fast=True)] | None = None
    start_seconds: Limited | None = None
    end_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None


class _TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """OpenAI's chat request. A field that would change the answer and is not supported is refused.

    chat_template_kwargs: how to sample the videos, under the name that vLLM and `transformers serve` use.
    """

    messages: Annotated[list[_Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    model: str | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(min_length=1, max_length=4, fail_fast=True)] | None = None
    chat_template_kwargs: _Sampling = _Sampling()
    # Accepted with their defaults only.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    response_format: _TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    # Accepted and ignored.
    stream_options: Annotated[dict[str, bool], Field(max_length=4)] | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @classmethod
    def parse(cls, body: bytes | bytearray) -> "tuple[ChatRequest, list[str]]":
        """Parses a body into the request and the URLs of its videos. Raises RefusedError with the first error."""
        json_bytes, carried = _without_videos(body)
        try:
            request = cls.model_validate_json(json_bytes)
        except ValidationError as error:
            raise _refused(error) from error
        urls = []
        for message in request.messages:
            for part in message.content:
                if isinstance(part, _VideoPart):
                    kind, _, number = part.video_url.url.partition(":")
                    is_carried = kind == "data" and number.isdecimal() and int(number) < len(carried)
                    urls.append(_string(carried[int(number)]) if is_carried else part.video_url.url)
        if len(urls) > MAX_VIDEOS:
            raise _too_many_videos()
        if not any(part for message in request.messages for part in message.content):
            raise RefusedError(400, "`messages` must have content; got only empty ones.", code="invalid_value")
        return request, urls

    def chat(self) -> list[dict[str, Any]]:
        """The messages as the chat template takes them."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [
                    {"type": "text", "text": part.text}
                    if isinstance(part, _TextPart)
                    else {"type": "video", "path": "-"}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _without_videos(body: bytes | bytearray) -> tuple[bytes, list[bytes]]:
    """Replaces each `data:` URL of a video by `data:<number>`; returns the JSON, and the URLs as JSON strings."""
    pieces: list[bytes | bytearray] = []
    carried: list[bytes] = []
    end = 0
    for match in _CARRIED.finditer(body):
        pieces += [body[end : match.end(1)], b'"data:%d"' % len(carried)]
        carried.append(match[2])
        end = match.end()
        if len(carried) > MAX_VIDEOS:
            raise _too_many_videos()
    if sum(map(len, pieces)) + len(body) - end > MAX_JSON_BYTES:
        raise RefusedError(
            413,
            f"A request must have at most {MAX_JSON_BYTES} bytes without its videos; this one has more. Shorten it.",
            code="request_too_large",
        )
    return b"".join([*pieces, body[end:]]), carried


def _string(json_bytes: bytes) -> str:
    try:
        return json.loads(json_bytes)
    except ValueError as error:
        raise RefusedError(400, f"A data: URL must be a JSON string: {error}.", code="invalid_json") from error


def _too_many_videos() -> RefusedError:
    return RefusedError(400, f"A request may have {MAX_VIDEOS} videos; this one has more.", code="invalid_value")


def _refused(error: ValidationError) -> RefusedError:
    # A value of a union gives one error per member; the deepest is of the member that fits best.
    wrong = max(error.errors(include_url=False), key=lambda wrong: len(wrong["loc"]))
    if wrong["type"] == "json_invalid" or not wrong["loc"]:
        return RefusedError(
            400, f"The request must be a JSON object; this one is not: {wrong['msg']}.", code="invalid_json"
        )
    steps = [str(step) for step in wrong["loc"]]
    place = ".".join(step for step in steps if "[" not in step and step != "str")
    got = "" if wrong["type"] in ("missing", "extra_forbidden") else f"; got {shortened(wrong['input'])}"
    remedy = {
        "extra_forbidden": "This server does not support the field; leave it out.",
        "missing": "Add it.",
        "union_tag_invalid": "Send text, and videos as `video_url`.",
    }.get(wrong["type"], "Correct it, or leave it out if it is optional.")
    return RefusedError(400, f"`{place[:200]}`: {wrong['msg'][:400]}{got}. {remedy}", code="invalid_value")


__all__ = ["ChatRequest", "shortened"]
