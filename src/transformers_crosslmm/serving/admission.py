"""Admission control of `crosslmm serve`: which requests are accepted, their limits, and when their work ends."""

import asyncio
import ipaddress
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from transformers.utils import logging

from ..asking.allowed_files import SHORTAGES

logger = logging.get_logger(__name__)

T = TypeVar("T")

MAX_ARRIVING = 256
"""Most requests whose bodies may be arriving at once."""
ARRIVING_BODIES = 4
"""Most memory of all arriving bodies, in bodies of the largest size."""
STOP_SECONDS = 8.0
"""Time that running requests get to finish when the server stops."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server: the checkpoint and the limits.

    checkpoint: a folder or a name on the Hub. device: as for `load_model`. add_timestamps: as for `load_processor`.
    allowed_folders: folders whose videos requests may name by path; none by default.
    allow_private_urls: fetch from this machine and private networks as well.
    max_running: requests whose videos may be in memory at once; their videos are decoded in parallel, their answers
        generated one by one. max_waiting: requests that may wait for a place; further ones get a 429.
    max_frames: of all videos of a request together; None for the checkpoint's limit of one video.
    max_new_tokens: of one answer.
    max_body_bytes: of one request, with the videos in it. max_video_bytes: of one video.
    body_seconds: for a request to arrive. decode_seconds: to decode a video. request_seconds: for the whole request.
    decoder_bytes: memory of the process that decodes one video.
    cache_bytes, cache_entries: limits of the cache of encoded and prefilled videos.
    """

    checkpoint: str
    device: str | None = None
    add_timestamps: bool | None = None
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
        """The model's name in requests: the folder's name, or the whole name on the Hub."""
        return Path(self.checkpoint).resolve().name if os.path.isdir(self.checkpoint) else self.checkpoint

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class RefusedError(Exception):
    """An error to answer a request with, in OpenAI's format. code: OpenAI's error code, or our own.

    retry_after: seconds.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message.encode(errors="replace").decode())  # a quoted value may have lone surrogates
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
    """The client has disconnected."""


def explained(error: BaseException, settings: ServerSettings) -> RefusedError:
    """Converts any error to one for the client. Details of internal errors are logged and not sent."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, TimeoutError):
        return too_late(settings)
    if isinstance(error, asyncio.CancelledError):
        return stopping()
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RefusedError(503, "The server is out of memory. Ask with fewer frames.", code="out_of_memory")
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        return busy("open files or processes")
    logger.error("A request failed.", exc_info=error)
    return RefusedError(500, "The server failed on this request; its log says why.", code="internal_error")


def too_late(settings: ServerSettings) -> RefusedError:
    seconds = settings.request_seconds
    return RefusedError(
        504, f"The answer took longer than {seconds:g} s. Ask with fewer frames or tokens.", code="timeout"
    )


def busy(lacking: str) -> RefusedError:
    return RefusedError(
        503, f"The server has no {lacking} left at the moment. Retry later.", code="overloaded", retry_after=5
    )


def stopping() -> RefusedError:
    return RefusedError(503, "The server is stopping. Ask again soon.", code="stopping", retry_after=10)


def check_host(request: Request, settings: ServerSettings) -> None:
    """Refuses a foreign `Host` on a loopback server, so that web pages cannot reach it by DNS rebinding."""
    if settings.is_loopback:
        host = request.headers.get("host", "")
        named = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:@/\[\]]+)(:\d*)?", host)
        if named is None or named[1].strip("[]").lower() not in ("localhost", "127.0.0.1", "::1", settings.host):
            raise RefusedError(421, f"This server answers as localhost only; got `Host: {host[:80]}`.")


class Visit:
    """One request, from its arrival until all work for it has ended, which may be after its client has disconnected.

    gone: set when the client has its answer or has disconnected. task: serves the request; cancelled when the client
    disconnects or the server stops.
    """

    def __init__(self, places: "Places", request: Request) -> None:
        self.places = places
        self.began = time.monotonic()
        self.deadline = self.began + places.settings.request_seconds
        self.gone = threading.Event()
        self.is_running = False
        self.task: Any = asyncio.current_task()
        self._watcher = asyncio.ensure_future(self._watch(request))
        self._holders: set[Any] = {self.task}

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.gone.set()
        self.task.cancel()

    async def begin(self) -> None:
        """Waits until the request may run."""
        await self.places.turns.acquire()
        self.is_running = True

    def start(self, work: Callable[..., T], *arguments: Any, on: Any = None) -> "asyncio.Future[T]":
        """Starts `work` on a thread of the executor `on`. The work holds the request's place until it ends, even if
        the request does not wait for it. To await the future, shield it."""

        def end(future: asyncio.Future) -> None:
            future.exception()  # marks it as retrieved, for requests that ended early
            self._leave(future)

        future = asyncio.get_running_loop().run_in_executor(on, work, *arguments)
        self._holders.add(future)
        future.add_done_callback(end)
        return future

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.shield(self.start(work, *arguments))

    def check(self) -> None:
        """Raises GoneError if the client has disconnected, RefusedError after the deadline. On any thread."""
        if self.gone.is_set():
            raise GoneError
        if time.monotonic() > self.deadline:
            raise too_late(self.places.settings)

    def leave_place(self) -> None:
        """Frees the place as soon as the work on threads ends, while the client may still read."""
        self._leave(self.task)

    def close(self) -> None:
        """Ends the request: the client has its answer or has disconnected."""
        self.gone.set()
        self._watcher.cancel()
        self.leave_place()

    def _leave(self, holder: Any) -> None:
        self._holders.discard(holder)
        if self._holders:
            return
        self.places.visits.discard(self)
        if self.is_running:
            self.is_running = False
            self.places.turns.release()
            self.places.mean_seconds += 0.1 * (time.monotonic() - self.began - self.places.mean_seconds)


class Places:
    """Limits the requests at once: `max_running` with videos in memory, `max_waiting` in the queue, and separately
    those whose bodies are arriving."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.room = settings.max_running + settings.max_waiting
        self.turns = asyncio.Semaphore(settings.max_running)
        self.visits: set[Visit] = set()
        self.mean_seconds = 1.0
        self.arriving = self.arriving_bytes = 0
        self.is_stopping = False

    @property
    def running(self) -> int:
        return sum(visit.is_running for visit in self.visits)

    @property
    def waiting(self) -> int:
        return len(self.visits) - self.running

    def check_room(self) -> None:
        """Raises RefusedError when all places are taken."""
        if self.is_stopping:
            raise stopping()
        if len(self.visits) >= self.room:
            raise RefusedError(
                429,
                f"The server has {len(self.visits)} requests already, and room for {self.room}. Retry later.",
                code="rate_limit_exceeded",
                retry_after=min(60, max(1, ceil(self.mean_seconds))),
            )

    @asynccontextmanager
    async def visit(self, request: Request) -> AsyncIterator[Visit]:
        """A place for a request that has arrived. Raises RefusedError when all places are taken, and GoneError when
        the client disconnects."""
        self.check_room()
        visit = Visit(self, request)
        self.visits.add(visit)
        try:
            yield visit
        except asyncio.CancelledError:
            if visit.gone.is_set():
                raise GoneError from None
            raise
        finally:
            visit.close()

    async def body(self, request: Request) -> bytearray:
        """Reads a request's body. Raises RefusedError if it is too large or too slow, GoneError if the client
        disconnects."""
        self.check_room()
        if self.arriving >= MAX_ARRIVING:
            raise busy("room for arriving requests")
        body = bytearray()
        self.arriving += 1
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                size = await self._receive(request, body)
        except TimeoutError:
            raise RefusedError(
                408, f"The request took longer than {self.settings.body_seconds:g} s to arrive. Send it faster."
            ) from None
        finally:
            self.arriving -= 1
            self.arriving_bytes -= len(body)
        if size > self.settings.max_body_bytes:
            raise RefusedError(
                413,
                f"A request must have at most {self.settings.max_body_bytes} bytes; this one has more. Send large "
                "videos by URL or path.",
                code="request_too_large",
            )
        return body

    async def _receive(self, request: Request, body: bytearray) -> int:
        """Fills `body` and returns its full size. A body of up to twice the limit is read to its end without being
        kept, because most clients read the error only after they have sent everything."""
        limit = self.settings.max_body_bytes
        size = int(request.headers.get("content-length", 0))
        if size > 2 * limit:
            return size
        size = 0
        while size <= 2 * limit:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            piece = message.get("body", b"")
            size += len(piece)
            if size <= limit:
                if self.arriving_bytes + len(piece) > ARRIVING_BODIES * limit:
                    raise busy("room for arriving requests")
                body += piece
                self.arriving_bytes += len(piece)
            if not message.get("more_body"):
                break
        return size

    def stop(self) -> None:
        """Cancels waiting requests now, and running ones after `STOP_SECONDS`."""
        self.is_stopping = True
        for visit in self.visits:
            asyncio.get_running_loop().call_later(STOP_SECONDS if visit.is_running else 0, visit.task.cancel)


__all__ = ["GoneError", "Places", "RefusedError", "ServerSettings", "Visit", "busy", "check_host", "explained"]
