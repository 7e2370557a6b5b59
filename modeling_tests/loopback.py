"""Servers on a free port of this machine, for what fetches from them."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator, Mapping


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with bytes, and keeps no log."""

    def answer(self, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def served_by(handler: Callable) -> Iterator[str]:
    """The URL of a server of this handler class, which ends with the block."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class DrippingServer:
    """Answers one connection with `begin`, and then, unless that is empty, a byte every twentieth of a second, without
    end. has_sent: it has begun. left: it was hung up on."""

    def __init__(self, begin: bytes) -> None:
        self.begin, self.left, self.has_sent = begin, threading.Event(), threading.Event()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._drip, daemon=True).start()

    def _drip(self) -> None:
        connection, _ = self.listening.accept()
        connection.settimeout(0.05)
        try:
            connection.sendall(self.begin)
            while True:
                try:
                    if not connection.recv(4096):
                        break
                except TimeoutError:
                    pass
                if self.begin:
                    connection.sendall(b"x")
                self.has_sent.set()
        except OSError:
            pass
        self.left.set()
