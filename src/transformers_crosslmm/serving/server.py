"""`transformers serve` for CrossLMM: its OpenAI-compatible server with our model, and what strangers' videos need.

    app = build_app(ServerSettings("path/to/checkpoint", allowed_folders=(Path("/data/videos"),)))

Transformers brings the routes, the answers' form, the streams and the thread that generates. Here is the rest: which
requests come in (`Gate`), what they may say (`ChatRequest`), where their videos come from (`VideoReader`) and how
several questions about one video share the work (`RememberingModel`).
"""

import asyncio
import copy
import hashlib
import ipaddress
import json
import os
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from transformers import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

try:
    if not is_serve_available():
        raise ImportError("fastapi, uvicorn and openai")
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
except ImportError as error:
    raise ImportError(
        f'Serving needs packages that are missing ({error}): `pip install "transformers_crosslmm[serve]"`.'
    ) from error

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, reset_torch_cache, set_torch_seed

from ..checkpoints.load import load_model, load_processor
from ..frames_crosslmm import SAMPLING_KWARGS, CrossLMMVideoMetadata, FrameSampling, frame_chunk
from ..media_crosslmm import CrossLMMEncodedMedia, encode_video, join_media
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor
from ..video_decoding import VideoError, VideoLimits, decode_video, open_source

logger = logging.get_logger(__name__)

CHAT_PATH = "/v1/chat/completions"
SERVED_PATHS = (CHAT_PATH, "/v1/models")
"""What is kept of Transformers' routes. The others load any model that a stranger names, unload ours, or fetch media
without limits."""

T = TypeVar("T")


@dataclass(frozen=True)
class ServerSettings:
    """What is served, and how much at once.

    checkpoint: a folder or a name on the Hub. device: as for `load_model`.
    allowed_folders: where videos may be that requests name by path; none by default.
    allow_private_urls: fetch from this machine and private networks as well.
    max_running: requests whose videos may be in memory at once; they are decoded side by side and answered one after
        the other. max_waiting: requests that may wait for that; the next one is told to come back.
    max_frames: of all videos of a request; the checkpoint's own limit for one when not given.
    max_new_tokens: of one answer.
    max_body_bytes: of one request, with the videos it carries itself. max_video_bytes: of one video.
    body_seconds, decode_seconds, request_seconds: for a request to arrive, a video to be decoded, all together.
    decoder_bytes: memory of the process that decodes one video.
    cache_bytes, cache_entries: what is remembered of videos.
    """

    checkpoint: str
    device: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_folders: tuple[Path, ...] = ()
    allow_private_urls: bool = False
    max_running: int = 2
    max_waiting: int = 16
    max_frames: int | None = None
    max_new_tokens: int = 1024
    max_body_bytes: int = 64 * 1024**2
    max_video_bytes: int = 4 * 1024**3
    body_seconds: float = 60.0
    decode_seconds: float = 120.0
    request_seconds: float = 300.0
    decoder_bytes: int = 2 * 1024**3
    cache_bytes: int = 4 * 1024**3
    cache_entries: int = 64

    @property
    def model_name(self) -> str:
        """What clients call the model: the folder's name, or the whole name on the Hub."""
        return Path(self.checkpoint).resolve().name if os.path.isdir(self.checkpoint) else self.checkpoint

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


# --- Errors in OpenAI's shape ----------------------------------------------------------------------------------------


class RefusedError(Exception):
    """A request that gets an error for an answer. code: OpenAI's word for it, or ours."""

    def __init__(self, status: int, message: str, *, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message.encode(errors="replace").decode())  # it may quote what is no Unicode
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.body, status_code=self.status, headers=headers)


class GoneError(Exception):
    """Nobody waits for the answer any more."""


def _refused_video(error: ValueError) -> RefusedError:
    """What a client is told of a video that cannot be read, with a remedy that is a client's."""
    reason, _, is_limit = str(error).partition(" Pass `limits=")
    reason = reason.removesuffix(" Without `strict=True` it is marked in `valid` instead.")
    remedy = " That is a limit of this server, which those who run it can change." if is_limit else ""
    return RefusedError(400, f"The video cannot be read: {reason}{remedy}", code="invalid_video")


def _explained(error: BaseException) -> RefusedError:
    """Any error as one for the client; what is not the client's doing goes to the log and not out."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RefusedError(503, "The server is out of memory. Ask with fewer frames.", code="out_of_memory")
    logger.error("A request failed.", exc_info=error)
    return RefusedError(500, "The server failed on this request; its log says why.", code="internal_error")


# --- What a request may say ------------------------------------------------------------------------------------------


def _checked_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Input should be Unicode; it has half of a surrogate pair") from None
    return text


_Text = Annotated[str, AfterValidator(_checked_unicode)]
_Stop = Annotated[_Text, StringConstraints(min_length=1, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _TextPart(_Strict):
    type: Literal["text"]
    text: _Text


class _Url(_Strict):
    url: _Text


class _VideoPart(_Strict):
    type: Literal["video_url"]
    video_url: _Url


class _Message(BaseModel):
    """Other keys than these are what clients keep of earlier answers."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[Annotated[_TextPart | _VideoPart, Field(discriminator="type")]]
    tool_calls: None = None


class _Sampling(_Strict):
    """Which frames of the videos; the words of `CrossLMMVideoProcessor`."""

    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0)] | None = None
    max_frames: Annotated[int, Field(ge=1)] | None = None
    times: Annotated[list[float], Field(min_length=1)] | None = None
    start_seconds: Annotated[float, Field(ge=0)] | None = None
    end_seconds: Annotated[float, Field(gt=0)] | None = None


class _TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """OpenAI's chat request, as far as one can be answered. What would change the answer and is not there is refused;
    what changes nothing is taken.

    chat_template_kwargs: how to sample the videos, as `transformers serve` calls it.
    """

    messages: Annotated[list[_Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(min_length=1, max_length=4)] | None = None
    chat_template_kwargs: _Sampling = _Sampling()
    # Only with the one value that this server gives anyway.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: _TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    # Of no consequence here.
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @classmethod
    def read(cls, body: dict[str, Any]) -> "ChatRequest":
        """Raises RefusedError with one thing that is wrong."""
        try:
            request = cls.model_validate(body)
        except ValidationError as error:
            # Of the forms that a value may have, the one that went furthest is the one that was meant.
            wrong = max(error.errors(include_url=False), key=lambda wrong: len(wrong["loc"]))
            steps = [str(step) for step in wrong["loc"]]
            place = ".".join(step for step in steps if "[" not in step and step != "str") or "the request"
            got = "" if wrong["type"] in ("missing", "extra_forbidden") else f"; got {_shortened(wrong['input'])}"
            remedy = {
                "extra_forbidden": "This server does not know the field; leave it out.",
                "missing": "Add it.",
                "union_tag_invalid": "Send text, and videos as `video_url`.",
            }.get(wrong["type"], "Correct it, or leave it out if it may be.")
            raise RefusedError(400, f"`{place}`: {wrong['msg']}{got}. {remedy}", code="invalid_value") from error
        if not any(part for message in request.messages for part in message.content):
            raise RefusedError(400, "`messages` must say something; got only empty ones.", code="invalid_value")
        return request

    def chat(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The messages as the chat template takes them, and where their videos are, in order."""
        messages: list[dict[str, Any]] = []
        urls: list[str] = []
        for message in self.messages:
            content: Any = message.content
            if not isinstance(content, str):
                urls += [part.video_url.url for part in content if isinstance(part, _VideoPart)]
                content = [
                    {"type": "text", "text": part.text}
                    if isinstance(part, _TextPart)
                    else {"type": "video", "path": "-"}
                    for part in content
                ]
            messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return messages, urls


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


# --- Which requests come in ------------------------------------------------------------------------------------------


class Visit:
    """One request, from its arrival until nothing works for it any more, which may be after its client has gone.

    gone: set when nobody waits for the answer. is_answered: all of it was sent. error: what ended its generation.
    """

    def __init__(self, places: "Places", seconds: float) -> None:
        self.places = places
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.gone = threading.Event()
        self.is_answered = False
        self.error: Exception | None = None
        self._holders, self._is_running = 1, False

    async def begin(self) -> None:
        """Waits for its turn."""
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                await self.places.turns.acquire()
        except TimeoutError:
            raise self.too_late() from None
        self._is_running = True
        self.places.running += 1

    def hold(self) -> None:
        """Something works for the request; it says `leave` when it is done. On the event loop's thread, like
        `leave`."""
        self._holders += 1

    def leave(self) -> None:
        self._holders -= 1
        if self._holders:
            return
        self.places.taken -= 1
        if self._is_running:
            self.places.running -= 1
            self.places.turns.release()
            self.places.mean_seconds += 0.1 * (time.monotonic() - self.began - self.places.mean_seconds)

    def check(self) -> None:
        """Raises when the answer is not wanted any more, or not in time. On any thread."""
        if self.gone.is_set():
            raise GoneError
        if time.monotonic() > self.deadline:
            raise self.too_late()

    def too_late(self) -> RefusedError:
        seconds = self.deadline - self.began
        return RefusedError(
            504, f"The answer took longer than {seconds:g} s. Ask with fewer frames or tokens.", code="timeout"
        )

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work` on a thread. It counts as the request's until it ends, even if the request does not wait for it."""
        self.hold()
        future = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
        future.add_done_callback(lambda _: self.leave())
        return await asyncio.shield(future)


class Places:
    """How many requests there may be at once: `max_running` with videos in memory, `max_waiting` in the queue."""

    def __init__(self, settings: ServerSettings) -> None:
        self.room = settings.max_running + settings.max_waiting
        self.seconds = settings.request_seconds
        self.turns = asyncio.Semaphore(settings.max_running)
        self.taken = self.running = 0
        self.mean_seconds = 1.0

    def enter(self) -> Visit:
        """Raises RefusedError when all places are taken."""
        if self.taken >= self.room:
            raise RefusedError(
                429,
                f"The server has {self.taken} requests already, and room for {self.room}. Come back later.",
                code="rate_limit_exceeded",
                retry_after=min(60, max(1, ceil(self.mean_seconds))),
            )
        self.taken += 1
        return Visit(self, self.seconds)


VISIT: ContextVar[Visit] = ContextVar("visit")
"""The request that is being answered: Transformers' routes hand on only its body."""


class Gate:
    """Middleware around the chat route: a place or 429 before the body is read, a body of bounded size in bounded
    time, and an end to the work when the client has gone."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, places: Places, metrics: "Metrics") -> None:
        self.app, self.settings, self.places, self.metrics = app, settings, places, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            if scope["path"] != CHAT_PATH or scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            visit = self.places.enter()
        except RefusedError as refused:
            self.metrics.requests.labels(refused.status).inc()
            await refused.response()(scope, receive, send)
            return
        VISIT.set(visit)
        is_inside = True

        def leave() -> None:
            nonlocal is_inside
            if is_inside:
                is_inside = False
                visit.leave()

        async def note_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                leave()  # a client that is slow to read takes nobody's place
                self.metrics.requests.labels(message["status"]).inc()
            elif not message.get("more_body"):
                visit.is_answered = True
            await send(message)

        try:
            body = await self._body(scope, receive)
            await self._answer(visit, scope, body, receive, note_and_send)
        except GoneError:
            self.metrics.requests.labels("gone").inc()
        except Exception as error:
            if not is_inside:  # an answer has begun
                raise
            await _explained(error).response()(scope, receive, note_and_send)
        finally:
            visit.gone.set()
            leave()
            self.metrics.seconds.observe(time.monotonic() - visit.began)

    def _check_host(self, scope: Scope) -> None:
        """A page in a browser of this machine must not reach the server under a name of its own (DNS rebinding)."""
        if not self.settings.is_loopback:
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = urllib.parse.urlsplit(f"//{host}").hostname
        if name not in ("localhost", "127.0.0.1", "::1", self.settings.host):
            raise RefusedError(421, f"This server answers as localhost only; got `Host: {host[:80]}`.")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        size, body = 0, bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    if int(announced) > 2 * limit or size > 2 * limit:
                        break
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    piece = message.get("body", b"")
                    size += len(piece)
                    # One that is a little too long is read to its end: most clients listen only then.
                    if size <= limit:
                        body += piece
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise RefusedError(
                408, f"The request took longer than {self.settings.body_seconds:g} s to arrive. Send it faster."
            ) from None
        if size > limit or int(announced) > limit:
            raise RefusedError(
                413,
                f"A request must have at most {limit} bytes; this one has more. Send large videos by URL or path.",
                code="request_too_large",
            )
        return bytes(body)

    async def _answer(self, visit: Visit, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The app's work, which ends when the client has gone."""
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await asyncio.shield(until_gone)

        async def watch() -> Message:
            while (message := await receive())["type"] != "http.disconnect":
                pass
            return message

        until_gone = asyncio.ensure_future(watch())
        work = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({until_gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not visit.is_answered:
                work.cancel()
                await asyncio.wait({work})
                raise GoneError
            await work
        finally:
            work.cancel()
            until_gone.cancel()


# --- Where videos come from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampledVideo:
    """A video as a request asks for it.

    key: its content and the sampling. pixels: (T, 3, S, S), None where `media` has what was made of them.
    """

    key: Hashable
    metadata: CrossLMMVideoMetadata
    pixels: torch.Tensor | None
    media: CrossLMMEncodedMedia | None

    @property
    def num_frames(self) -> int:
        return len(self.metadata.frames_indices or ())


class VideoReader:
    """Videos by path, URL and data URI, decoded in processes of their own, those that are remembered not at all."""

    def __init__(self, settings: ServerSettings, processor: CrossLMMProcessor, cache: "BoundedCache") -> None:
        self.processor, self.cache = processor.video_processor, cache
        self.folders = [folder.resolve(strict=True) for folder in settings.allowed_folders]
        self.max_frames = settings.max_frames or self.processor.max_frames
        self.limits = VideoLimits(
            max_bytes=settings.max_video_bytes,
            max_frames=self.max_frames,
            max_decode_seconds=settings.decode_seconds,
            max_memory_bytes=settings.decoder_bytes,
            allow_private_addresses=settings.allow_private_urls,
        )

    def sampling(self, asked: dict[str, Any]) -> FrameSampling:
        """What is asked for, completed by the checkpoint's defaults."""
        try:
            sampling = self.processor._sampling(**{name: asked.get(name) for name in SAMPLING_KWARGS})
        except ValueError as error:
            raise RefusedError(400, f"`chat_template_kwargs`: {error}", code="invalid_value") from error
        self.check_frames(max(sampling.num_frames or 0, asked.get("max_frames") or 0, len(sampling.times or ())))
        if sampling.max_frames is not None:
            sampling = replace(sampling, max_frames=min(sampling.max_frames, self.max_frames))
        return sampling

    def check_frames(self, count: int) -> None:
        """Raises RefusedError for more frames than a request may have."""
        if count > self.max_frames:
            raise RefusedError(
                400,
                f"The videos of a request may have {self.max_frames} frames together; got {count}. Ask for fewer.",
                code="invalid_value",
            )

    def read(self, url: str, sampling: FrameSampling) -> SampledVideo:
        """The video, from the cache where its bytes and the sampling are the same."""
        source = self._source(url)
        try:
            with open_source(source, self.limits) as file:
                version = _version(file)
                key = hashlib.file_digest(file, "sha256").hexdigest(), repr(sampling)  # type: ignore[arg-type]
                known = self.cache.get(key)
                if known is not None:
                    return SampledVideo(key, known.metadata, None, known.media)
                pixels, metadata = self._decoded(file, sampling)
                if _version(file) != version:
                    raise RefusedError(400, "The video changed while it was read. Ask again when it is complete.")
        except ValueError as error:
            raise _refused_video(error) from error
        return SampledVideo(key, metadata, pixels, None)

    def _source(self, url: str) -> str:
        """The URL, or the path of a file within the allowed folders, all links followed."""
        scheme, shown = url.partition(":")[0].lower() if ":" in url else "", _shortened(url)
        if scheme in ("http", "https", "data"):
            return url
        if scheme == "file":
            parts = urllib.parse.urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise RefusedError(400, f"A file:// URL must name this machine; got host {_shortened(parts.netloc)}.")
            url = urllib.request.url2pathname(parts.path)
        elif not url.startswith("/"):
            raise RefusedError(
                400,
                f"A video is an absolute path, or a URL of scheme http, https, file or data; got {shown}.",
                code="invalid_value",
            )
        try:
            path = Path(os.path.realpath(url))
        except (OSError, ValueError) as error:
            raise RefusedError(400, f"{shown} is no path: {error}.", code="invalid_value") from error
        if not any(path.is_relative_to(folder) for folder in self.folders):
            raise RefusedError(
                403,
                f"Videos by path must lie in a folder that this server was started with; {shown} does not. "
                "Send it as a data: URL, or have its folder allowed (`--allowed-folder`).",
                code="path_not_allowed",
            )
        return str(path)

    def _decoded(self, file: Any, sampling: FrameSampling) -> tuple[torch.Tensor, CrossLMMVideoMetadata]:
        """(T, 3, S, S) and where they come from, as the processor would give them."""

        def processed(frame: torch.Tensor) -> torch.Tensor:
            features = self.processor(
                [frame[None]], do_sample_frames=False, input_data_format="channels_first", return_tensors="pt"
            )
            return features["pixel_values_videos"][0]

        try:
            video = decode_video(
                file,
                frame_transform=processed,
                limits=self.limits,
                strict=True,  # a client sees no warnings
                isolated=True,
                **{name: getattr(sampling, name) for name in SAMPLING_KWARGS},
            )
        except StopIteration:
            raise VideoError("It has no frames.") from None
        return video.frames, frame_chunk(video, None).metadata


def _version(file: Any) -> Hashable:
    """Changes when somebody writes to a named file; nothing else can be written to while it is read."""
    try:
        about = os.fstat(file.fileno())
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


# --- What is remembered of videos ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownVideo:
    """An encoded video, whoever sent it."""

    media: CrossLMMEncodedMedia
    metadata: CrossLMMVideoMetadata


class BoundedCache:
    """Tensors by key; what was not used for longest goes first. Threads may share it.

    A key must say everything that its value depends on, because no value belongs to a client.
    """

    def __init__(self, *, max_bytes: int, max_entries: int) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.num_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """The value, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        """Keeps a value if it fits at all."""
        with self._lock:
            self._drop(key)
            if num_bytes > self.max_bytes or self.max_entries < 1:
                return
            self._entries[key] = value, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes or len(self._entries) > self.max_entries:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key)[1]


def _bytes_of(tensors: Iterator[Any]) -> int:
    """Memory behind the tensors among them, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors_of(cache: DynamicCache) -> Iterator[Any]:
    for layer in cache.layers:
        yield from vars(layer).values()
        if hasattr(layer, "memory"):
            yield layer.memory.states
            if layer.memory.norm is not None:
                yield from (layer.memory.norm.scale, layer.memory.norm.codes)
            for pair in layer.memory.folding.values():
                yield from pair


@dataclass(frozen=True)
class Question:
    """What a request asks of the model: tokens, the videos in them, and on whose behalf. seed: of the sampling."""

    visit: Visit
    videos: list[SampledVideo]
    seed: int | None


class _Wanted(StoppingCriteria):
    """Stops an answer that nobody waits for."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.visit.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class RememberingModel:
    """The model as Transformers' server sees it: `generate`, on its one thread.

    A video is encoded once, and everything up to the end of the last video is prefilled once; each question goes on
    in a fork of that, which shares the visual part.
    """

    def __init__(
        self,
        model: CrossLMMForConditionalGeneration,
        processor: CrossLMMProcessor,
        cache: BoundedCache,
        metrics: "Metrics",
    ) -> None:
        self.model, self.processor, self.cache, self.metrics = model, processor, cache, metrics
        self.config, self.device, self.generation_config = model.config, model.device, model.generation_config

    @torch.no_grad()
    def generate(
        self, *, input_ids: torch.Tensor, question: Question, streamer: Any = None, **options: Any
    ) -> torch.Tensor:
        """As the model's own. Raises what `Visit.check` raises, RefusedError for what the model refuses."""
        visit = question.visit
        try:
            visit.check()
            past = self._prefilled(input_ids, question) if question.videos else None
            if question.seed is not None:
                set_torch_seed(question.seed)
            written: torch.Tensor = self.model.generate(  # type: ignore[assignment]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=past,
                streamer=streamer,
                stopping_criteria=[_Wanted(visit)],
                **options | {"tokenizer": self.processor.tokenizer},  # the server would pass the processor
            )
            self.metrics.tokens.inc(written.shape[1] - input_ids.shape[1])
            return written
        except Exception as error:
            visit.error = RefusedError(400, str(error)) if isinstance(error, ValueError) else error
            if isinstance(error, torch.OutOfMemoryError):
                self.cache.clear()
                reset_torch_cache()
            raise visit.error from error

    def _prefilled(self, input_ids: torch.Tensor, question: Question) -> DynamicCache:
        """A fork of the cache that has seen everything up to the last video's end."""
        end = int((input_ids[0] == self.config.video_token_id).nonzero()[-1]) + 1
        prefix = input_ids[:, :end]
        key = "prefix", tuple(prefix[0].tolist()), tuple(video.key for video in question.videos)
        known = self.cache.get(key)
        self.metrics.lookups.labels("prefix", "hit" if known else "miss").inc()
        if known is None:
            media = [self._encoded(video, question.visit) for video in question.videos]
            question.visit.check()
            known = DynamicCache()
            self.model(
                input_ids=prefix,
                mm_encoder_outputs={"video": join_media(media)},
                past_key_values=known,
                logits_to_keep=1,
            )
            self.cache.put(key, known, _bytes_of(_tensors_of(known)))
        return copy.deepcopy(known)

    def _encoded(self, video: SampledVideo, visit: Visit) -> CrossLMMEncodedMedia:
        known = self.cache.get(video.key)
        media = video.media if known is None else known.media
        self.metrics.lookups.labels("video", "miss" if media is None else "hit").inc()
        if media is None:
            assert video.pixels is not None
            media = encode_video(self.model, video.pixels, on_progress=lambda done, total: visit.check())
            self.metrics.frames.inc(len(video.pixels))
        if known is None:
            tensors = [media.last_hidden_state, *media.pooler_output]  # type: ignore[misc]
            self.cache.put(video.key, KnownVideo(media, video.metadata), _bytes_of(iter(tensors)))
        return media


# --- Transformers' server with our classes in it ---------------------------------------------------------------------


class OneModel(ModelManager):
    """Transformers' model manager with one model, loaded by our classes, and no way to another."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        super().__init__(force_model=settings.model_name)

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        return load_processor(self.settings.checkpoint)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return load_model(self.settings.checkpoint, device=self.settings.device)

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """The one model, instead of a scan of the disk."""
        return [{"id": self.settings.model_name, "object": "model", "created": 0, "owned_by": "crosslmm"}]


class Generation(GenerateManager):
    """Transformers' thread that generates. A request keeps its place until the thread is done with it, even if its
    client has gone."""

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Future:
        visit, loop = VISIT.get(), asyncio.get_running_loop()
        visit.hold()
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(visit.leave))
        return future

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> asyncio.Future:
        visit = VISIT.get()
        visit.hold()
        future = super().async_submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: visit.leave())
        return asyncio.shield(future)

    @property
    def is_alive(self) -> bool:
        return self._thread._thread.is_alive()


class ChatHandler(ChatCompletionHandler):
    """Transformers' handler of chats; the answers' form and the streams are its own."""

    def __init__(
        self, manager: OneModel, state: GenerationState, settings: ServerSettings, metrics: "Metrics"
    ) -> None:
        super().__init__(manager, state)
        loaded: Any = manager.load_model_and_processor(manager.process_model_name(settings.model_name))
        model, self.processor = loaded
        self.settings = settings
        self.cache = BoundedCache(max_bytes=settings.cache_bytes, max_entries=settings.cache_entries)
        self.model = RememberingModel(model, self.processor, self.cache, metrics)
        self.reader = VideoReader(settings, self.processor, self.cache)
        self.generation = Generation()

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        """One chat. Raises RefusedError."""
        visit = VISIT.get()
        request = ChatRequest.read(body)
        name = self.settings.model_name
        if request.model not in (None, name):
            raise RefusedError(
                404, f"This server has the model {name!r}; got {_shortened(request.model)}.", code="model_not_found"
            )
        messages, urls = request.chat()
        sampling = self.reader.sampling(request.chat_template_kwargs.model_dump())
        await visit.begin()
        videos: list[SampledVideo] = []
        for url in urls:
            visit.check()
            videos.append(await visit.run(self.reader.read, url, sampling))
            self.reader.check_frames(sum(video.num_frames for video in videos))
        ids = await visit.run(self._ids, messages, videos)
        config = self._generation_config(request, ids.shape[1])
        inputs = {"input_ids": ids, "question": Question(visit, videos, request.seed)}
        arguments: Any = request_id, self.model, self.processor, name, inputs, config, self.generation
        if not request.stream:
            return await self._non_streaming(*arguments)
        response = self._streaming(*arguments)
        response.body_iterator = self._events(cast(AsyncIterator[Any], response.body_iterator), visit)
        return response

    def _ids(self, messages: list[dict[str, Any]], videos: list[SampledVideo]) -> torch.Tensor:
        """(1, L) the chat's tokens, with as many placeholders as the videos have frames."""
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        num_frames, metadata = [video.num_frames for video in videos], [video.metadata for video in videos]
        (text,), _ = self.processor._expand([text], num_frames, metadata, say_times=self.processor.time_instruction)
        longest = self.model.config.max_sequence_length
        # No text has so many characters per token; splitting it into tokens could take minutes.
        length = len(text) // 32
        if length <= longest:
            ids = self.processor.tokenizer([text], add_special_tokens=False, return_tensors="pt")["input_ids"]
            length = ids.shape[1]
        if length > longest:
            raise RefusedError(
                400,
                f"The chat must fit the context of {longest} tokens; got at least {length}. Shorten it, or ask with "
                "fewer frames.",
                code="context_length_exceeded",
            )
        return ids.to(self.model.device)

    def _generation_config(self, request: ChatRequest, length: int) -> Any:
        asked = request.model_dump(exclude={"messages", "seed", "chat_template_kwargs"}, exclude_none=True)
        config = self._build_generation_config(asked, self.model.generation_config)
        room = self.model.config.max_sequence_length - length + 1
        config.max_new_tokens = min(config.max_new_tokens, self.settings.max_new_tokens, room)
        if request.temperature or (request.top_p is not None and request.temperature is None):
            config.do_sample = True
        return config

    async def _events(self, events: AsyncIterator[Any], visit: Visit) -> AsyncIterator[Any]:
        """A stream with its end mark, and with errors in OpenAI's shape, where Transformers writes their bare text."""
        async for event in events:
            if visit.error is not None:
                break
            yield event
        if visit.error is None:
            yield "data: [DONE]\n\n"
        else:
            yield f"data: {json.dumps(_explained(visit.error).body)}\n\n"


class Metrics:
    """What `/metrics` tells, in Prometheus' format."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("crosslmm_requests", "Chat requests by status", ["status"], registry=registry)
        self.seconds = Histogram("crosslmm_request_seconds", "Time per chat request", registry=registry)
        self.tokens = Counter("crosslmm_generated_tokens", "Tokens written", registry=registry)
        self.frames = Counter("crosslmm_encoded_frames", "Frames through the vision tower", registry=registry)
        self.lookups = Counter("crosslmm_cache_lookups", "What was remembered", ["kind", "result"], registry=registry)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(name, help_text, registry=self.registry).set_function(value)


def build_app(settings: ServerSettings) -> FastAPI:
    """Loads the model and builds the ASGI app. Raises OSError or ValueError for a checkpoint that is none of ours."""
    metrics, places = Metrics(), Places(settings)
    manager, state = OneModel(settings), GenerationState()
    handler = ChatHandler(manager, state, settings, metrics)
    unused: Any = None
    app: FastAPI = build_server(manager, handler, unused, unused, unused, unused, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in SERVED_PATHS]
    metrics.watch("crosslmm_running", "Requests that are worked on", lambda: places.running)
    metrics.watch("crosslmm_waiting", "Requests that wait", lambda: places.taken - places.running)
    metrics.watch("crosslmm_cache_bytes", "Memory of the cache", lambda: handler.cache.num_bytes)
    metrics.watch("crosslmm_cache_entries", "Entries of the cache", lambda: len(handler.cache))

    @app.get("/health")
    async def health() -> JSONResponse:
        is_well = handler.generation.is_alive
        numbers = {"running": places.running, "waiting": places.taken - places.running}
        return JSONResponse({"status": "ok" if is_well else "dead", **numbers}, status_code=200 if is_well else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def refuse_body(_: Any, error: Exception) -> Response:
        return RefusedError(
            400, "The request must be a JSON object, sent as application/json; this one is not.", code="invalid_json"
        ).response()

    async def refuse_request(_: Any, error: Any) -> Response:
        served = f" Served are {', '.join(SERVED_PATHS)}, /health and /metrics." if error.status_code != 400 else ""
        return RefusedError(error.status_code, f"{error.detail}.{served}").response()

    app.state.handler = handler
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse_request)
    app.add_middleware(Gate, settings=settings, places=places, metrics=metrics)
    return app


def serve(settings: ServerSettings) -> None:
    """Serves until interrupted, and says on stderr where."""
    import uvicorn

    app = build_app(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"Serving {settings.model_name} at http://{host}:{settings.port}/v1", file=sys.stderr)
    if not settings.is_loopback:
        print(
            f"WARNING: {settings.host} can be reached from other machines, by anybody: this server asks for no key, "
            "and does not encrypt.\nWARNING: put a reverse proxy with TLS and authentication in front of it, or serve "
            "on 127.0.0.1.",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_level="warning", timeout_graceful_shutdown=10
    )
    uvicorn.Server(config).run()


__all__ = ["ServerSettings", "build_app", "serve"]
