"""`/v1/live` of `crosslmm serve`: a WebSocket on which a client sends frames and asks while they go on.

A message is a JSON object. The client's: {"type": "frame", "seconds": 1.5, "image": a data: URL or base64 of a JPEG,
PNG or WebP}, {"type": "ask", "question": …}, {"type": "stop"} to end an answer, {"type": "forget"} to begin anew.
The server's: "state" with `seen`, `kept`, `forgotten`, `dropped` and `seconds_behind`, "text" with a piece of an
answer, "answer" with the whole of it and whether it `is_whole`, "error" with `message`, which ends nothing.

A session takes the place of a request for as long as it lasts, and its work waits for the model like theirs.
"""

import asyncio
import json
import re
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

import torch
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..asking.live import LiveVideo, most_frames
from ..asking.waiting_frames import WaitingFrames
from .admission import GoneError, Places, RefusedError, Visit, check_host, explained, too_late

MAX_QUESTIONS = 4
MAX_QUESTION_CHARACTERS = 10_000
MAX_MESSAGE_BYTES = 16 * 2**20
MAX_JSON_BYTES = 2**17
"""Largest message, not counting the picture in it: parsing JSON stops all threads, and 16 MiB of it take seconds."""

_PICTURE = re.compile(r'("image"\s*+:\s*+)("(?:[^"\\]++|\\.)*+")', re.DOTALL)
"""A picture as the value of "image". Quotes within JSON strings are escaped, so this cannot match inside of one."""


class StoppedError(Exception):
    """The client wants no more of this answer."""


class LiveRoute:
    """The route as an ASGI app; service: the `ChatService` whose model and places it shares."""

    def __init__(self, service: Any) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        places: Places = self.service.places
        try:
            check_host(socket, places.settings)  # type: ignore[arg-type]  # of a request it reads the headers alone
            check_origin(socket)
        except RefusedError:
            await socket.close()  # before it is accepted: HTTP 403
            return
        await socket.accept()
        client = Client(socket)
        try:
            async with places.visit(client) as visit:  # type: ignore[arg-type]
                await LiveSession(self.service, client, visit).run()
        except GoneError:
            pass
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and not places.is_stopping:
                raise
            await client.tell("error", message=str(explained(error, places.settings)))
            await client.close()


def check_origin(socket: WebSocket) -> None:
    """A page of another site may open WebSockets without asking; browsers say whose page it is."""
    origin = socket.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != socket.headers.get("host"):
        raise RefusedError(403, "Pages of other sites must not use this server.")


class Client:
    """The connection: one message at a time, and none to a client that has gone."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket, self._sending = socket, asyncio.Lock()

    async def receive(self) -> dict[str, str]:
        """A visit watches for the end of an HTTP request here; that of a session `next` tells."""
        return await asyncio.get_running_loop().create_future()

    async def next(self) -> str:
        """The text of the next message, "" for bytes. Raises GoneError when the client leaves."""
        message = await self.socket.receive()
        if message["type"] == "websocket.disconnect":
            raise GoneError
        return message.get("text") or ""

    async def tell(self, kind: str, **content: Any) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            async with self._sending:
                await self.socket.send_text(json.dumps({"type": kind} | content))

    async def close(self) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            await self.socket.close(1013)


class LiveSession:
    """One client's live video. `listen` takes messages in, `work` has the model look and answer."""

    def __init__(self, service: Any, client: Client, visit: Visit) -> None:
        self.service, self.client, self.visit = service, client, visit
        processor, settings = service.processor, service.settings
        network = service.model.model
        most = min(settings.max_frames or processor.video_processor.max_frames, most_frames(network, processor))
        self.live = LiveVideo(network, processor, most)
        self.waiting = WaitingFrames(processor)
        self.questions: deque[str] = deque()
        self.must_forget = False
        self.stopped, self.wake = threading.Event(), asyncio.Event()

    async def run(self) -> None:
        """Until the client or the server leaves, or the session fails."""
        tasks = [asyncio.ensure_future(self.listen()), asyncio.ensure_future(self.work())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def listen(self) -> None:
        """Raises GoneError after `request_seconds` without a message."""
        while True:
            try:
                async with asyncio.timeout(self.service.settings.request_seconds):
                    text = await self.client.next()
            except TimeoutError:
                raise GoneError from None
            try:
                await self._take(text)
            except (ValueError, OverflowError, RecursionError) as error:
                await self.client.tell("error", message=str(error)[:500])
            self.wake.set()

    async def _take(self, text: str) -> None:
        """Raises ValueError for a message that is none of ours."""
        if len(text) > MAX_MESSAGE_BYTES:
            raise ValueError(f"A message has at most {MAX_MESSAGE_BYTES} bytes; this one has {len(text)}.")
        picture = _PICTURE.search(text)
        if picture:
            text = f"{text[: picture.end(1)]}0{text[picture.end() :]}"
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"A message has at most {MAX_JSON_BYTES} bytes beside its picture; got {len(text)}.")
        message = json.loads(text) if text else None
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "frame":
            image = json.loads(picture[2]) if picture else None
            await self.visit.run(self.waiting.put_file, image, message.get("seconds"))
        elif kind == "ask":
            question = message.get("question")
            if not isinstance(question, str) or len(question) > MAX_QUESTION_CHARACTERS:
                raise ValueError(f"`question` must be a text of at most {MAX_QUESTION_CHARACTERS} characters.")
            if len(self.questions) == MAX_QUESTIONS:
                raise ValueError(f"{MAX_QUESTIONS} questions wait already. Ask again after an answer.")
            self.questions.append(question)
        elif kind == "stop":
            self.stopped.set()
        elif kind == "forget":
            self.waiting.forget()
            self.must_forget = True
        else:
            raise ValueError('A message is a JSON object whose "type" is "frame", "ask", "stop" or "forget".')

    async def work(self) -> None:
        await self.visit.begin()
        await self._tell_state()
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.must_forget or self.waiting or self.questions:
                if self.must_forget:
                    self.must_forget = False
                    self.live.forget()
                elif self.waiting:
                    frames, times = self.waiting.take()
                    await self._on_model(self.live.add, torch.stack(frames), times)
                    self.service.metrics.frames.inc(len(times))
                else:
                    await self._answer(self.questions.popleft())
                    continue
                await self._tell_state()

    async def _on_model(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.shield(self.visit.start(work, *arguments, on=self.service.model_thread))

    async def _answer(self, question: str) -> None:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop, settings = asyncio.get_running_loop(), self.service.settings
        deadline = time.monotonic() + settings.request_seconds
        self.stopped.clear()

        def pass_on(piece: str) -> None:
            if self.stopped.is_set() or self.visit.gone.is_set():
                raise StoppedError
            if time.monotonic() > deadline:
                raise too_late(settings)
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def ask() -> Any:
            return self.live.ask(question, max_new_tokens=settings.max_new_tokens, on_text=pass_on)

        writing = self.visit.start(ask, on=self.service.model_thread)
        writing.add_done_callback(lambda _: pieces.put_nowait(None))
        said = ""
        while (piece := await pieces.get()) is not None:
            said += piece
            await self.client.tell("text", text=piece)
        try:
            answer = await asyncio.shield(writing)
        except StoppedError:
            await self.client.tell("answer", text=said.strip(), is_whole=False)
        except (ValueError, RefusedError) as error:
            await self.client.tell("error", message=str(error)[:500])
        else:
            self.service.metrics.tokens.inc(len(answer.tokens))
            await self.client.tell("answer", text=answer.text, is_whole=True)

    async def _tell_state(self) -> None:
        live, waiting = self.live, self.waiting
        counts = {"seen": live.num_seen, "kept": len(live.times), "forgotten": live.num_forgotten}
        behind = round(waiting.seconds_behind(live), 3)
        await self.client.tell("state", **counts, dropped=waiting.num_dropped, seconds_behind=behind)


__all__ = ["LiveRoute"]
