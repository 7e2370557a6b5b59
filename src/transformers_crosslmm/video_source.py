"""Where the bytes of a video come from, what one call may cost, and what is refused.

A source is a path, a URI, bytes or a file object; what comes out of here is a seekable file of a limited size. FFmpeg
sees it only through `Bytes`: without a name by which it could choose a format or find a neighbour.
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
"""How long a wait for somebody else may last before the clock, and the caller's `on_wait`, are asked again."""
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
    """What one call may cost. The defaults let any ordinary video pass; lower them for files from strangers.

    max_bytes: size of the file, the data or the download.
    max_pixels: width times height of a picture; the default holds 8K.
    max_frames: frames that one call may return.
    max_output_bytes: size of the frames that `decode_video`, or one chunk of `iter_video`, holds.
    max_duration_seconds: length that the file announces.
    max_decode_seconds: time spent reading and decoding, checked between FFmpeg's calls (`isolated=True` is strict);
        for a URL from the look-up of its name to the last byte.
    max_memory_bytes: memory of the process of `isolated=True`.
    max_redirects: how often an http(s) URL may lead to another one.
    network_timeout_seconds: how long a server may stay silent.
    allow_private_addresses: let URLs lead to this machine and to private networks.
    use_proxy: download through the proxy that the environment names (`http_proxy`, `https_proxy`, `no_proxy`), which
        then decides where URLs lead.
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
    """A seekable binary file of at most `max_bytes`; closed at the end unless it is the caller's own.

    on_wait: called every `WAIT_SECONDS` while the network is waited for; what it raises ends the call.
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
        parts = urllib.parse.urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            raise VideoOpenError(f"A file:// URI must name a file of this machine; got host {shown(parts.netloc)}.")
        name = urllib.request.url2pathname(parts.path)
    elif "://" in name:
        raise VideoOpenError(
            f"URLs of scheme {shown(scheme)} are not accepted, only http, https, file and data. "
            "Download the video first."
        )
    try:
        # Without O_NONBLOCK a named pipe would wait here for a writer; Windows has neither.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoOpenError(
            f"Cannot open {shown(name)}: {reason}. Check the path; a relative one begins in the current folder."
        ) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        remedy = "Name a file in it" if stat.S_ISDIR(mode) else "Pass a file object to read from a pipe or device"
        raise VideoOpenError(
            f"{shown(name)} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}. {remedy}."
        )
    return open(descriptor, "rb", buffering=0)


def _data_uri(uri: str, limits: VideoLimits) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise VideoOpenError("A data: URI has the form data:video/mp4;base64,...; this one has no comma.")
    media_type, *parameters = header.lower().removeprefix("data:").split(";")
    if media_type == "video/jpeg":
        raise VideoOpenError(
            "data:video/jpeg is a list of JPEG pictures, not a file. Pass a list of frames, each a data:image/jpeg "
            "URI."
        )
    if "base64" in parameters:
        return from_base64(payload, limits)
    return urllib.parse.unquote_to_bytes(payload)


def from_base64(text: str, limits: VideoLimits) -> bytes:
    """Data written as base64; line breaks, percent-encoding and a lack of padding do no harm."""
    _check_size(len(text) * 3 // 4, limits)
    data = urllib.parse.unquote_to_bytes(text).translate(None, b" \t\r\n")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise VideoOpenError(f"The data is not valid base64: {error}.") from error


def shown(name: str) -> str:
    """A path or URL for an error, which must not carry what may be data."""
    return repr(name) if len(name) <= 200 else f"{name[:60]!r}... ({len(name):,} characters)"


def _spooled(stream, limits: VideoLimits, clock: Clock) -> BinaryIO:
    """What cannot be rewound is kept in memory up to 16 MiB and on disk beyond."""
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
    """What FFmpeg sees of a file: its bytes, and no name by which to choose a format or find a neighbour."""

    name = "video"

    def __init__(self, file: BinaryIO, clock: Clock):
        self._file, self._clock = file, clock

    def read(self, size: int) -> bytes:
        self._clock.check()
        piece = self._file.read(size)
        # PyAV copies the answer into a buffer of `size` bytes without looking at its length.
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
    """Seconds of work spent so far; stands still while the caller has the frames."""

    def __init__(self, limits: VideoLimits, on_wait: OnWait | None = None):
        self._limit, self._on_wait = limits.max_decode_seconds, on_wait
        self._spent, self._since = 0.0, time.monotonic()

    def check(self) -> float:
        """Seconds left."""
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
    """The body of an http(s) answer, checked at every redirect and never larger than `max_bytes`."""
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
                    raise VideoOpenError(f"{shown(url)} answers with status {answer.status} {answer.reason}.")
                part = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "bytes 0-0/1"))
                if part is None or (int(part[1]), int(part[2]) + 1) != (0, int(part[3])):
                    raise VideoOpenError(f"{shown(url)} answers with a part of the file only. Download it first.")
                _check_size(1 if answer.length is None else answer.length, limits)
                file = _spooled(answer, limits, clock)
                if answer.length:
                    raise VideoOpenError(f"The download of {shown(url)} ends {answer.length} bytes early.")
                return file
            except (OSError, http.client.HTTPException) as error:
                raise VideoOpenError(f"Cannot download {shown(url)}: {error}.") from error
    raise VideoLimitError(f"The URL redirects more than max_redirects={limits.max_redirects} times. {RAISE_LIMITS}")


def _proxy(scheme: str, host: str) -> urllib.parse.SplitResult | None:
    """The proxy that the environment names for this host."""
    proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    return urllib.parse.urlsplit(proxies[scheme]) if proxies.get(scheme) else None


def _connection(
    scheme: str, host: str, port: int, limits: VideoLimits, clock: Clock, proxy: urllib.parse.SplitResult | None
) -> http.client.HTTPConnection:
    """A connection to the proxy, or to an address that was checked itself, so that a second look-up cannot lead
    elsewhere."""
    stream: _PatientSocket | None = None
    try:
        found = _look_up(proxy.hostname or "", proxy.port or 80, clock) if proxy else _look_up(host, port, clock)
        for address in (str(address[0]) for *_, address in found):
            if proxy is None and not limits.allow_private_addresses and not _is_public(address):
                raise VideoOpenError(
                    f"{shown(host)} leads to {address}, which is not a public address. Pass "
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
    """Has a proxy pass on what follows."""
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    stream.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n".encode())
    answer = http.client.HTTPResponse(stream, method="CONNECT")
    answer.begin()
    if answer.status != 200:
        raise OSError(f"the proxy answers with status {answer.status} {answer.reason}")


_LOOK_UPS = threading.BoundedSemaphore(32)


def _look_up(host: str, port: int, clock: Clock) -> list:
    """`getaddrinfo`, which nothing can interrupt, on a thread that is left behind when the time is up."""
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
    """A socket that waits in short steps, with an eye on the clock: a server that sends a byte now and then is not
    silent, and may still not have more time than there is."""

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
        # Addresses that carry an IPv4 address lead where that one leads: mapped, 6to4, Teredo and NAT64.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:  # all else is local, or has a meaning that some network gives it
            return False
    return ip.is_global and not ip.is_multicast
