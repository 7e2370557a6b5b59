"""`crosslmm serve`: OpenAI's chat requests about videos, answered by one model on one machine.

    app = build_app(ServerSettings("path/to/checkpoint", allowed_folders=(Path("/data/videos"),)))

A request's body is received within limits (`admission`) and parsed (`chat_request`). When a place is free, its videos
are decoded on threads (`strangers_videos`), and the model's single thread writes the answer (`remembered_videos`).
"""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.routing import WebSocketRoute
    from starlette.types import Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError(
        f'Serving needs packages that are missing ({error}): `pip install -e ".[serve]"` in your clone.'
    ) from error

from ..asking.answer_text import AnswerText
from ..checkpoints.load import load_model, load_processor
from .admission import GoneError, Places, RefusedError, ServerSettings, check_host, explained
from .chat_request import ChatRequest, shortened
from .live_sessions import LiveRoute
from .remembered_videos import BoundedCache, Question, RememberingModel, SampledVideo
from .strangers_videos import VideoReader

CHAT_PATH, MODELS_PATH, LIVE_PATH = "/v1/chat/completions", "/v1/models", "/v1/live"

COLDEST = 0.01
"""Below this temperature decoding is greedy, because logits divided by it could overflow."""


IDLE_CONNECTION_SECONDS = 75
"""Longer than clients and proxies reuse an idle connection (openai: 5 s). With uvicorn's own 5 s, a request was lost
now and then: it was sent while the server closed its connection."""


class Metrics:
    """The metrics of `/metrics`, in Prometheus' format."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("crosslmm_requests", "Chat requests by status", ["status"], registry=registry)
        self.seconds = Histogram("crosslmm_request_seconds", "Seconds per chat request", registry=registry)
        self.tokens = Counter("crosslmm_generated_tokens", "Tokens generated", registry=registry)
        self.frames = Counter("crosslmm_encoded_frames", "Frames encoded", registry=registry)
        self.lookups = Counter(
            "crosslmm_cache_lookups", "Cache hits and misses", ["kind", "result"], registry=registry
        )

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is read at every scrape."""
        Gauge(name, help_text, registry=self.registry).set_function(value)


class ChatService:
    """The chat route as an ASGI app, with the loaded model, the cache and the requests."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics, self.places = Metrics(), Places(settings)
        self.processor = load_processor(settings.checkpoint, add_timestamps=settings.add_timestamps)
        self.cache = BoundedCache(max_bytes=settings.cache_bytes, max_entries=settings.cache_entries)
        self.reader = VideoReader(settings, self.processor, self.cache)
        network = load_model(settings.checkpoint, device=settings.device)
        self.model = RememberingModel(network, self.processor, self.cache, self.metrics)
        self.model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.metrics.watch("crosslmm_running", "Running requests", lambda: self.places.running)
        self.metrics.watch("crosslmm_waiting", "Waiting requests", lambda: self.places.waiting)
        self.metrics.watch("crosslmm_arriving", "Arriving requests", lambda: self.places.arriving)
        self.metrics.watch("crosslmm_cache_bytes", "Memory of the cache", lambda: self.cache.num_bytes)
        self.metrics.watch("crosslmm_cache_entries", "Entries of the cache", lambda: len(self.cache))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one chat request, whole or as a stream, or with an error in OpenAI's format."""
        began, status = time.monotonic(), "gone"

        async def note_and_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            check_host(request := Request(scope, receive), self.settings)
            async with asyncio.timeout(self.settings.request_seconds):
                await self._answer(request, note_and_send)
        except GoneError:
            pass
        except (Exception, asyncio.CancelledError) as error:
            refused = explained(error, self.settings)
            if status == "gone":
                await refused.response()(scope, receive, note_and_send)
            else:  # a stream has begun
                await send({"type": "http.response.body", "body": _event(refused.body)})
        finally:
            self.metrics.requests.labels(status).inc()
            self.metrics.seconds.observe(time.monotonic() - began)

    async def _answer(self, request: Request, send: Send) -> None:
        body = await self.places.body(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # other types can be sent from any web site, without a CORS preflight
            raise RefusedError(
                400,
                "The request must be a JSON object, sent as application/json; this one is not.",
                code="invalid_json",
            )
        async with self.places.visit(request) as visit:
            chat, urls = await visit.run(ChatRequest.parse, body)
            del body
            name = self.settings.model_name
            if chat.model not in (None, name):
                raise RefusedError(
                    404, f"This server has the model {name!r}; got {shortened(chat.model)}.", code="model_not_found"
                )
            sampling = self.reader.sampling(chat.chat_template_kwargs.model_dump())
            await visit.begin()
            videos: list[SampledVideo] = []
            for url in urls:
                videos.append(await visit.run(self.reader.read, url, sampling, visit))
                self.reader.check_frames(sum(video.num_frames for video in videos))
            ids = await visit.run(self._token_ids, chat, videos)
            penalties = chat.frequency_penalty, chat.presence_penalty
            question = Question(visit, ids, videos, chat.seed, penalties, self._options(chat, len(ids)))
            await self._send(question, chat, request, send)

    async def _send(self, question: Question, chat: ChatRequest, request: Request, send: Send) -> None:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        text = AnswerText(
            self.processor.tokenizer,
            lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece),  # type: ignore[arg-type]
            stop=chat.stops,
        )
        writing = question.visit.start(self.model.write, question, text, on=self.model_thread)
        writing.add_done_callback(lambda _: pieces.put_nowait(None))
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.settings.model_name}

        def said(kind: str, reason: str | None = None, **words: dict[str, str]) -> dict[str, Any]:
            asked, written = len(question.token_ids), text.num_tokens
            usage = {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
            choices = [{"index": 0, "finish_reason": reason} | words]
            given = about | {"object": kind, "choices": choices} | ({} if reason is None else {"usage": usage})
            checked = (ChatCompletionChunk if kind.endswith("chunk") else ChatCompletion).model_validate(given)
            return checked.model_dump(mode="json", exclude_unset=True)

        if not chat.stream:
            reason = await asyncio.shield(writing)
            content = "".join(iter(pieces.get_nowait, None))  # type: ignore[arg-type]
            whole = said("chat.completion", reason, message={"role": "assistant", "content": content})
            question.visit.leave_place()
            await JSONResponse(whole)(request.scope, request.receive, send)
            return

        async def send_event(event: dict[str, Any]) -> None:
            await send({"type": "http.response.body", "body": _event(event), "more_body": True})

        question.visit.leave_place()  # a slow reader must not hold the place; the model's work still does
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send_event(said("chat.completion.chunk", delta={"role": "assistant", "content": ""}))
        while (piece := await pieces.get()) is not None:
            await send_event(said("chat.completion.chunk", delta={"content": piece}))
        await send_event(said("chat.completion.chunk", await asyncio.shield(writing), delta={}))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def _token_ids(self, chat: ChatRequest, videos: list[SampledVideo]) -> list[int]:
        """The chat's token ids, with placeholders for the videos' frames. Raises RefusedError if they do not fit."""
        text = self.processor.apply_chat_template(chat.chat(), tokenize=False, add_generation_prompt=True)
        num_frames, metadata = [video.num_frames for video in videos], [video.metadata for video in videos]
        (text,), _ = self.processor._expand([text], num_frames, metadata, say_times=self.processor.time_instruction)
        # Tokenizing a very long text could take minutes; no text has more than 32 characters per token.
        ids, length = [], len(text) // 32
        longest = self.model.model.config.max_sequence_length
        if length <= longest:
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            length = len(ids)
        if length > longest:
            raise RefusedError(
                400,
                f"The chat must fit the context of {longest} tokens; got at least {length}. Shorten it, or ask with "
                "fewer frames.",
                code="context_length_exceeded",
            )
        return ids

    def _options(self, chat: ChatRequest, length: int) -> dict[str, Any]:
        """A request's length and sampling as options of `generate`, completed by the checkpoint's defaults."""
        defaults = self.model.model.generation_config
        room = self.model.model.config.max_sequence_length - length + 1
        asked = chat.max_completion_tokens or chat.max_tokens or self.settings.max_new_tokens
        options: dict[str, Any] = {"max_new_tokens": min(asked, self.settings.max_new_tokens, room)}
        temperature = defaults.temperature if chat.temperature is None else chat.temperature
        top_p = defaults.top_p if chat.top_p is None else chat.top_p
        is_drawn = bool(defaults.do_sample) if chat.temperature is chat.top_p is None else temperature != 0
        if is_drawn and (temperature is None or temperature >= COLDEST):
            return options | {"do_sample": True, "temperature": temperature, "top_p": top_p}
        # `generate` warns of sampling options in greedy decoding.
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


def build_app(settings: ServerSettings) -> FastAPI:
    """Loads the model and builds the ASGI app. Raises OSError or ValueError if it is not a CrossLMM checkpoint."""
    service = ChatService(settings)

    async def has_our_host(request: Request) -> None:
        check_host(request, settings)

    app = FastAPI(dependencies=[Depends(has_our_host)], docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_route(CHAT_PATH, service, methods=["POST"])  # type: ignore[arg-type]
    app.router.routes.append(WebSocketRoute(LIVE_PATH, LiveRoute(service)))

    @app.get(MODELS_PATH, response_model=None)
    async def models() -> JSONResponse:
        model = {"id": settings.model_name, "created": 0, "object": "model", "owned_by": "crosslmm"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        places = service.places
        status = "stopping" if places.is_stopping else "ok"
        numbers = {"running": places.running, "waiting": places.waiting}
        return JSONResponse({"status": status} | numbers, status_code=503 if places.is_stopping else 200)

    @app.get("/metrics", response_model=None)
    async def numbers() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def refuse(_: Request, error: Any) -> Response:
        if isinstance(error, HTTPException):
            served = f" This server has {CHAT_PATH}, {MODELS_PATH}, /health and /metrics."
            error = RefusedError(error.status_code, f"{error.detail}.{served}")
        return explained(error, settings).response()

    for kind in (RefusedError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    return app


class Server(uvicorn.Server):
    """A uvicorn server that stops the service's requests before it shuts down."""

    async def shutdown(self, sockets: Any = None) -> None:
        self.config.app.state.service.places.stop()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(settings: ServerSettings) -> None:
    """Serves until interrupted, and prints the address on stderr."""
    app = build_app(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"Serving {settings.model_name} at http://{host}:{settings.port}/v1", file=sys.stderr)
    if not settings.is_loopback:
        print(
            f"WARNING: other machines can reach {settings.host}: this server has no authentication and no "
            "encryption.\nWARNING: put a reverse proxy with TLS and authentication in front of it, or serve on "
            "127.0.0.1.",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=10,
    )
    Server(config).run()


__all__ = ["ServerSettings", "build_app", "serve"]
