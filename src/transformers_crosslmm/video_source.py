"""Opens the source of a video under limits, and refuses unsafe sources.

A source is a path, a URI, bytes or a file object; it is opened as a seekable file of limited size. FFmpeg reads it
only through `Bytes`, without a name from which it could choose a format or open other files.
"""

from __future__ import annotations

import base64
import binascii
import errno
import http.client
import io
import ipaddress
import os
import queue
import re
import socket
import ssl
import stat
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias, cast

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"
OnWait: TypeAlias = "Callable[[], None]"
WAIT_SECONDS = 0.25
"""Longest wait for the network or a process between two checks of the clock and calls of `on_wait`."""
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "transformers_crosslmm"}
RAISE_LIMITS = "Pass `limits=VideoLimits(...)` with a higher value if that is intended."


class VideoError(ValueError):
    """A video could not be read as asked."""


class VideoOpenError(VideoError):
    """The source cannot be opened, or is not a video file of a kind that is accepted."""


class NoVideoStreamError(VideoOpenError):
    """The file has no video stream (an audio file, a cover picture)."""


class VideoLimitError(VideoError):
    """The video is larger than a limit of `VideoLimits` allows."""


class VideoTimeoutError(VideoLimitError):
    """Decoding took longer than `VideoLimits.max_decode_seconds`."""


class VideoDecodeError(VideoError):
    """The file opened, but its pictures cannot be decoded."""


@dataclass(frozen=True)
class VideoLimits:
    """Limits of one call. The defaults allow any ordinary video; lower them for untrusted files.

    max_bytes: size of the file, the data or the download.
    max_pixels: width times height of a picture; the default allows 8K.
    max_frames: frames that one call may return.
    max_output_bytes: size of the frames of `decode_video`, or of one chunk of `iter_video`.
    max_duration_seconds: length that the file announces.
    max_decode_seconds: time for reading and decoding, checked between FFmpeg's calls (strictly with `isolated=True`);
        for a URL, the time from name look-up to the last byte.
    max_memory_bytes: memory of the process of `isolated=True`.
    max_redirects: number of redirects of an http(s) URL.
    network_timeout_seconds: longest time without data from a server.
    allow_private_addresses: whether URLs may resolve to this machine and to private networks.
    use_proxy: whether to download through the environment's proxy (`http_proxy`, `https_proxy`, `no_proxy`), which
        then resolves the addresses.
    """

    max_bytes: int = 16 * 1024**3
    max_pixels: int = 8192 * 4320
    max_frames: int = 1_000_000
    max_output_bytes: int = 16 * 1024**3
    max_duration_seconds: float = 24 * 3600.0
    max_decode_seconds: float = 3600.0
    max_memory_bytes: int = 4 * 1024**3
    max_redirects: int = 5
    network_timeout_seconds: float = 30.0
    allow_private_addresses: bool = False
    use_proxy: bool = False


DEFAULT_LIMITS = VideoLimits()


@contextmanager
def open_source(source: VideoSource, limits: VideoLimits, on_wait: OnWait | None = None) -> Iterator[BinaryIO]:
    """Opens a source as a seekable binary file of at most `max_bytes`; closes it at the end unless the caller owns it.

    on_wait: called every `WAIT_SECONDS` while the call waits for the network; an exception from it ends the call.
    """
    if isinstance(source, (str, os.PathLike)):
        file, own = _open_named(os.fspath(source), limits, on_wait), True
    elif isinstance(source, (bytes, bytearray, memoryview)):
        file, own = io.BytesIO(source), True
    elif callable(getattr(source, "read", None)):
        file, own = source, False
    else:
        raise TypeError(
            f"A video source is a path, a URI, bytes or a binary file object with read(); got {type(source).__name__}."
        )
    try:
        if not (hasattr(file, "seekable") and file.seekable()):
            file, own = _spooled(file, limits, Clock(limits)), True
        size = file.seek(0, os.SEEK_END)
        _check_size(size if isinstance(size, int) else file.tell(), limits)
        file.seek(0)
        yield file
    finally:
        if own:
            file.close()


def _open_named(name: str, limits: VideoLimits, on_wait: OnWait | None) -> BinaryIO:
    scheme = name.partition(":")[0].lower() if isinstance(name, str) else ""
    if scheme == "data":
        return io.BytesIO(_data_uri(name, limits))
    if scheme in ("http", "https"):
        return _download(name, limits, Clock(limits, on_wait))
    if scheme == "file":
        name = file_named_by(name)
    elif "://" in name:
        raise VideoOpenError(
            f"URLs of scheme {shown(scheme)} are not accepted, only http, https, file and data. "
            "Download the video first."
        )
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer; Windows has neither.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoOpenError(
            f"Cannot open {shown(name)}: {reason}. Check the path; a relative one starts in the current folder."
        ) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        remedy = "Name a file in it" if stat.S_ISDIR(mode) else "Pass a file object to read from a pipe or device"
        raise VideoOpenError(
            f"{shown(name)} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}. {remedy}."
        )
    return open(descriptor, "rb", buffering=0)


def file_named_by(uri: str) -> str:
    """The path in a file:// URI. Raises VideoOpenError for one of another machine, and for one that is no URI."""
    try:
        parts = urllib.parse.urlsplit(uri)
    except ValueError as error:
        raise VideoOpenError(f"{shown(uri)} is not a URI: {error}.") from error
    if parts.netloc not in ("", "localhost"):
        raise VideoOpenError(f"A file:// URI must name this machine; got host {shown(parts.netloc)}.")
    return urllib.request.url2pathname(parts.path)


def _data_uri(uri: str, limits: VideoLimits) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise VideoOpenError("A data: URI has the form data:video/mp4;base64,...; this one has no comma.")
    media_type, *parameters = header.lower().removeprefix("data:").split(";")
    if media_type == "video/jpeg":
        raise VideoOpenError(
            "data:video/jpeg is a list of JPEG pictures and not a file. Pass a list of frames, each a "
            "data:image/jpeg URI."
        )
    if "base64" in parameters:
        return from_base64(payload, limits)
    return urllib.parse.unquote_to_bytes(payload)


def from_base64(text: str, limits: VideoLimits) -> bytes:
    """Decodes base64; line breaks, percent-encoding and missing padding are accepted."""
    _check_size(len(text) * 3 // 4, limits)
    data = urllib.parse.unquote_to_bytes(text).translate(None, b" \t\r\n")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise VideoOpenError(f"The data is not valid base64: {error}.") from error


def shown(name: str) -> str:
    """Shortens a path or URL for an error message, because it may contain data."""
    return repr(name) if len(name) <= 200 else f"{name[:60]!r}... ({len(name):,} characters)"


def _spooled(stream, limits: VideoLimits, clock: Clock) -> BinaryIO:
    """Copies a stream that cannot be rewound: into memory up to 16 MiB, to disk beyond."""
    file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=16 * 1024**2))  # noqa: SIM115, the caller closes it
    while piece := stream.read(64 * 1024):
        clock.check()
        file.write(piece)
        _check_size(file.tell(), limits)
    return file


def _check_size(size: int, limits: VideoLimits) -> None:
    if size > limits.max_bytes:
        raise VideoLimitError(f"The video has more than max_bytes={limits.max_bytes} bytes. {RAISE_LIMITS}")
    if size == 0:
        raise VideoOpenError("The video file is empty. Copy or download it again.")


class Bytes:
    """Gives FFmpeg the bytes of a file, without a name from which to choose a format or open other files."""

    name = "video"

    def __init__(self, file: BinaryIO, clock: Clock):
        self._file, self._clock = file, clock

    def read(self, size: int) -> bytes:
        self._clock.check()
        piece = self._file.read(size)
        # PyAV copies the result into a buffer of `size` bytes without checking its length.
        if not isinstance(piece, bytes) or len(piece) > size:
            raise VideoOpenError(
                f"read({size}) of the file object must return at most as many bytes; got {type(piece).__name__}"
                + (f" of length {len(piece)}." if isinstance(piece, bytes) else ". Open it in binary mode.")
            )
        return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()


class Clock:
    """Measures the seconds of work; it is paused while the caller has the frames."""

    def __init__(self, limits: VideoLimits, on_wait: OnWait | None = None):
        self._limit, self._on_wait = limits.max_decode_seconds, on_wait
        self._spent, self._since = 0.0, time.monotonic()

    def check(self) -> float:
        """Calls `on_wait` and returns the seconds left. Raises VideoTimeoutError if there are none."""
        if self._on_wait is not None:
            self._on_wait()
        left = self._limit - (self._spent + time.monotonic() - self._since)
        if left < 0:
            raise VideoTimeoutError(f"Decoding took longer than max_decode_seconds={self._limit}. {RAISE_LIMITS}")
        return left

    @contextmanager
    def paused(self):
        self._spent += time.monotonic() - self._since
        yield
        self._since = time.monotonic()


def _download(url: str, limits: VideoLimits, clock: Clock) -> BinaryIO:
    """Downloads the body of an http(s) response of at most `max_bytes`; every redirect is checked."""
    for _ in range(limits.max_redirects + 1):
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise VideoOpenError(f"{shown(url)} is not a URL: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise VideoOpenError(f"A video URL must be http(s) with a host name; got {shown(url)}.")
        if parts.username is not None:
            raise VideoOpenError("A video URL must not carry a user name or password. Download the video first.")
        proxy = _proxy(parts.scheme, parts.hostname) if limits.use_proxy else None
        origin = f"http://{parts.netloc}" if proxy and parts.scheme == "http" else ""
        with closing(_connection(parts.scheme, parts.hostname, port, limits, clock, proxy)) as connection:
            try:
                path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
                query = "?" + urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~-._") if parts.query else ""
                connection.request("GET", origin + path + query, headers=HEADERS)
                answer = connection.getresponse()
                target = answer.headers.get("Location")
                if answer.status in (301, 302, 303, 307, 308) and target:
                    url = urllib.parse.urljoin(url, target)
                    continue
                if answer.status not in (200, 206):
                    raise VideoOpenError(f"{shown(url)} returned status {answer.status} {answer.reason}.")
                part = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "bytes 0-0/1"))
                if part is None or (int(part[1]), int(part[2]) + 1) != (0, int(part[3])):
                    raise VideoOpenError(f"{shown(url)} returned only a part of the file. Download it first.")
                _check_size(1 if answer.length is None else answer.length, limits)
                file = _spooled(answer, limits, clock)
                if answer.length:
                    raise VideoOpenError(f"The download of {shown(url)} ends {answer.length} bytes early.")
                return file
            except (OSError, http.client.HTTPException) as error:
                raise VideoOpenError(f"Cannot download {shown(url)}: {error}.") from error
    raise VideoLimitError(f"The URL redirects more than max_redirects={limits.max_redirects} times. {RAISE_LIMITS}")


def _proxy(scheme: str, host: str) -> urllib.parse.SplitResult | None:
    """The proxy for this host from the environment."""
    proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    return urllib.parse.urlsplit(proxies[scheme]) if proxies.get(scheme) else None


def _connection(
    scheme: str, host: str, port: int, limits: VideoLimits, clock: Clock, proxy: urllib.parse.SplitResult | None
) -> http.client.HTTPConnection:
    """Connects to the proxy, or to the checked address itself, so that a second name look-up cannot give another."""
    stream: _PatientSocket | None = None
    try:
        found = _look_up(proxy.hostname or "", proxy.port or 80, clock) if proxy else _look_up(host, port, clock)
        for address in (str(address[0]) for *_, address in found):
            if proxy is None and not limits.allow_private_addresses and not _is_public(address):
                raise VideoOpenError(
                    f"{shown(host)} resolves to {address}, which is not a public address. Pass "
                    "`limits=VideoLimits(allow_private_addresses=True)` if that is intended."
                )
        stream = _PatientSocket(found[0][0], socket.SOCK_STREAM)
        stream.begin(clock, limits.network_timeout_seconds)
        stream.connect(found[0][4])
        if scheme == "https":
            if proxy is not None:
                _tunnel(stream, host, port)
            context = ssl.create_default_context()
            context.sslsocket_class = _PatientTLSSocket
            stream = cast(
                _PatientTLSSocket,
                context.wrap_socket(stream, server_hostname=host, do_handshake_on_connect=False),
            )
            stream.begin(clock, limits.network_timeout_seconds)
            stream.do_handshake()
    except BaseException as error:
        if stream is not None:
            stream.close()
        if isinstance(error, (OSError, UnicodeError)):
            raise VideoOpenError(f"Cannot connect to {shown(host)}: {error}.") from error
        raise
    connection = http.client.HTTPConnection(host, port)
    connection.sock = stream
    return connection


def _tunnel(stream: _PatientSocket, host: str, port: int) -> None:
    """Opens a tunnel to a host through a proxy."""
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    stream.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n".encode())
    answer = http.client.HTTPResponse(stream, method="CONNECT")
    answer.begin()
    if answer.status != 200:
        raise OSError(f"the proxy returned status {answer.status} {answer.reason}")


_LOOK_UPS = threading.BoundedSemaphore(32)


def _look_up(host: str, port: int, clock: Clock) -> list:
    """Resolves a name on a thread that is abandoned at the time limit, because `getaddrinfo` cannot be interrupted."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)
        finally:
            _LOOK_UPS.release()

    while not _LOOK_UPS.acquire(timeout=WAIT_SECONDS):
        clock.check()
    threading.Thread(target=ask, daemon=True).start()
    while True:
        clock.check()
        try:
            answer = answers.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            continue
        if isinstance(answer, Exception):
            raise answer
        return answer


class _PatientSocket(socket.socket):
    """A socket that waits in short steps and checks the clock in each, so that a server that keeps sending single
    bytes cannot exceed the time limit."""

    def begin(self, clock: Clock, silence_seconds: float) -> None:
        self._clock, self._silence_seconds = clock, silence_seconds
        self.settimeout(WAIT_SECONDS)

    def _patiently(self, act: Callable, *arguments):
        began = time.monotonic()
        while True:
            self._clock.check()
            try:
                return act(*arguments)
            except TimeoutError:
                if time.monotonic() - began > self._silence_seconds:
                    raise

    def connect(self, address) -> None:
        def go_on() -> None:
            status = self.connect_ex(address)
            if status in (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK):
                time.sleep(WAIT_SECONDS / 10)
                raise TimeoutError("the server does not answer")
            if status not in (0, errno.EISCONN):
                raise OSError(status, os.strerror(status))

        self._patiently(go_on)

    def recv_into(self, *arguments, **options) -> int:
        return self._patiently(lambda: super(_PatientSocket, self).recv_into(*arguments, **options))

    def sendall(self, data, *arguments) -> None:
        left = memoryview(data)
        while left:
            left = left[self._patiently(self.send, left) :]


class _PatientTLSSocket(_PatientSocket, ssl.SSLSocket):
    def do_handshake(self, *arguments) -> None:
        self._patiently(super().do_handshake, *arguments)


_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # IPv6 addresses that embed an IPv4 address are judged by it: mapped, 6to4, Teredo and NAT64.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:  # all other addresses are local or specific to a network
            return False
    return ip.is_global and not ip.is_multicast
