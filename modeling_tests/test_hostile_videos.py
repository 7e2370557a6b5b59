"""Files and URLs from strangers: no other file is read, no connection is opened, no process is lost."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch

from loopback import DrippingServer, Handler, served_by
from transformers_crosslmm import video_decoding, video_file, video_packets, video_source, video_worker
from transformers_crosslmm.video_decoding import (
    VideoDecodeError,
    VideoError,
    VideoLimitError,
    VideoLimits,
    VideoOpenError,
    VideoTimeoutError,
    decode_video,
)
from transformers_crosslmm.video_source import _is_public
from video_files import CLEAN, encode, make

MUTATED = (
    "h264_mp4",
    "h264_fragmented",
    "h264_mkv",
    "vp9_webm",
    "h264_ts",
    "mpeg4_avi",
    "mjpeg_avi",
    "gif",
    "hevc_mp4",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="session")
def clip(folder) -> Path:
    return make("h264_mp4", folder)


@pytest.fixture
def server(clip):
    """A server on this machine that notes what it is asked for."""
    asked = []

    class Hostile(Handler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/redirect/"):
                left = int(self.path.rsplit("/", 1)[1])
                self.send_response(302)
                self.send_header("Location", f"/redirect/{left - 1}" if left else "/clip.mp4")
                self.end_headers()
            elif self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
            elif self.path == "/missing":
                self.send_error(404)
            elif self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(bytes(65536))
                except OSError:
                    pass
            else:
                self.answer(clip.read_bytes())

    with served_by(Hostile) as url:
        yield SimpleNamespace(asked=asked, url=url)


# Files that refer to others


def mp4_that_refers_to(path: str) -> bytes:
    """An mp4 whose data reference names another file instead of saying "here"."""
    data = encode(num_frames=5, b_frames=0)
    at = data.index(b"url \x00\x00\x00\x01")
    location = path.encode() + b"\x00"
    entry = struct.pack(">I4sI", 12 + len(location), b"url ", 0) + location
    grown = len(entry) - 12
    spoiled = bytearray(data[: at - 4] + entry + data[at + 8 :])
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = spoiled.index(box) - 4
        spoiled[place : place + 4] = struct.pack(">I", struct.unpack(">I", spoiled[place : place + 4])[0] + grown)
    return bytes(spoiled)


def playlists(target: str, url: str) -> dict[str, bytes]:
    """Texts that FFmpeg would take for a video and follow."""
    hls = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:5.0,\n{}\n#EXT-X-ENDLIST\n"
    return {
        "concat_relative": f"ffconcat version 1.0\nfile '{Path(target).name}'\n".encode(),
        "concat_absolute": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
        "concat_http": f"ffconcat version 1.0\nfile '{url}/clip.mp4'\n".encode(),
        "hls_file": hls.format(target).encode(),
        "hls_http": hls.format(f"{url}/clip.mp4").encode(),
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        b"a=rtpmap:96 H264/90000\n",
        "dash": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT5S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
            '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000" codecs="avc1.42c00d" '
            f'width="160" height="96"><BaseURL>{url}/clip.mp4</BaseURL></Representation></AdaptationSet></Period>'
            "</MPD>"
        ).encode(),
        "mov_reference": mp4_that_refers_to(target),
        "smil": f'<smil><body><video src="{url}/clip.mp4"/></body></smil>'.encode(),
    }


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".sdp", ".ffconcat"])
@pytest.mark.parametrize("kind", list(playlists("/x/clip.ts", "http://x")))
def test_a_file_that_refers_to_another_reads_nothing_else(kind, suffix, tmp_path, server, monkeypatch):
    secret = tmp_path / "secret.ts"
    secret.write_bytes(encode(container="mpegts", num_frames=10, b_frames=0))
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(playlists(str(secret), server.url)[kind])
    opened, connected = [], []
    monkeypatch.chdir(tmp_path)  # relative names in a file without a name are looked for here
    monkeypatch.setattr(socket.socket, "connect_ex", lambda stream, address: connected.append(address))

    def watch(event, arguments):
        if event == "open" and str(arguments[0]).startswith(str(tmp_path)):
            opened.append(Path(str(arguments[0])).name)
        if event == "socket.connect":
            connected.append(arguments)

    # What FFmpeg opens itself is outside Python: the access time of the bait and the server tell.
    os.utime(secret, (1, 1))
    sys.addaudithook(watch)
    for source in (path, path.read_bytes()):
        if kind == "mov_reference":  # the reference is passed over, the data taken from the file itself
            assert len(decode_video(source).times) == 5
        else:
            with pytest.raises(VideoError):
                decode_video(source, num_frames=2)
    assert set(opened) <= {path.name}
    assert not connected
    assert not server.asked
    read_at = secret.stat().st_atime
    secret.read_bytes()
    if secret.stat().st_atime == 1:
        pytest.skip("this file system keeps no access times")
    assert read_at == 1, "the other file was read"


@pytest.mark.parametrize(
    "source",
    [
        "concat:{0}|{0}",
        "subfile,,start,0,end,0,,:{0}",
        "crypto:{0}",
        "pipe:0",
        "async:{0}",
        "fd:0",
        "unix:/tmp/x",
        "lavfi:testsrc",
    ],
)
def test_ffmpeg_protocols_are_plain_names_of_files_that_do_not_exist(source, clip):
    with pytest.raises(VideoOpenError):
        decode_video(source.format(clip), num_frames=2)


def test_a_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VideoOpenError, match="not a regular file"):
        decode_video(tmp_path / "pipe", num_frames=2)


def test_a_file_object_that_returns_too_much_is_refused(clip):
    class Lying(io.BytesIO):
        def read(self, size=-1):
            return super().read(size) + bytes(100_000)

    with pytest.raises(VideoOpenError, match="at most as many bytes"):
        decode_video(Lying(clip.read_bytes()), num_frames=2)


# URLs


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("[::ffff:127.0.0.1]", "[fe80::1]", "[fc00::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        *(
            "[fec0::1]",
            "[::127.0.0.1]",
            "[::ffff:0:7f00:1]",
            "[::ffff:0:5db8:d822]",
            "[64:ff9b:1::5db8:d822]",
            "[ff0e::1]",
        ),
        *("2130706433", "0x7f.1", "host:port", "[bad"),
    ],
)
def test_private_addresses_are_refused_without_a_connection(host, monkeypatch):
    connected = []
    monkeypatch.setattr(socket.socket, "connect_ex", lambda stream, address: connected.append(address))
    with pytest.raises(VideoOpenError, match=r"not a public address|Cannot connect|not a URL"):
        decode_video(f"http://{host}/clip.mp4", num_frames=2)
    assert not connected


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))]]
    connected = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers.pop(0))

    def connect_ex(stream, address):
        connected.append(address)
        return errno.ENETUNREACH

    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)
    with pytest.raises(VideoOpenError, match="Cannot connect"):
        decode_video("http://rebinding.example/clip.mp4", num_frames=2)
    assert connected == [("93.184.216.34", 80)]


def test_a_url_is_downloaded_where_its_address_is_allowed(server, clip):
    limits = VideoLimits(allow_private_addresses=True)
    decoded = decode_video(f"{server.url}/clip.mp4", num_frames=5, limits=limits)
    assert torch.equal(decoded.frames, decode_video(clip, num_frames=5).frames)
    decoded = decode_video(f"{server.url}/redirect/3", num_frames=5, limits=limits)
    assert len(decoded.times) == 5


@pytest.mark.parametrize(
    ("path", "limits", "error", "message"),
    [
        ("/redirect/5", {"max_redirects": 2}, VideoLimitError, "max_redirects=2"),
        ("/clip.mp4", {"max_bytes": 1000}, VideoLimitError, "max_bytes=1000"),
        ("/endless", {"max_bytes": 10**6}, VideoLimitError, "max_bytes"),
        ("/endless", {"max_decode_seconds": 0.2}, VideoTimeoutError, "max_decode_seconds"),
        ("/missing", {}, VideoOpenError, "404"),
        ("/away", {}, VideoOpenError, "http"),
    ],
)
def test_a_download_has_limits(server, path, limits, error, message):
    with pytest.raises(error, match=message):
        decode_video(f"{server.url}{path}", num_frames=2, limits=VideoLimits(allow_private_addresses=True, **limits))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_public_addresses_are_public(address):
    assert _is_public(address)


DRIPS = {
    "silence": ("http", b""),
    "status line": ("http", b"HTTP/1.1 "),
    "headers": ("http", b"HTTP/1.1 200 OK\r\nX: "),
    "body": ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
    "chunk": ("http", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n"),
    "handshake": ("https", b""),
}


@pytest.mark.parametrize("kind", DRIPS)
def test_a_server_that_drips_has_no_more_time_than_another(kind):
    scheme, begin = DRIPS[kind]
    server = DrippingServer(begin)
    limits = VideoLimits(allow_private_addresses=True, max_decode_seconds=0.5)
    began = time.monotonic()
    with pytest.raises(VideoTimeoutError, match="max_decode_seconds"):
        decode_video(f"{scheme}://{server.address}/clip.mp4", num_frames=2, limits=limits)
    assert time.monotonic() - began < 10
    assert server.left.wait(10), "the connection stays open"


@pytest.mark.parametrize("kind", DRIPS)
def test_a_download_that_nobody_wants_any_more_is_left(kind):
    scheme, begin = DRIPS[kind]
    server = DrippingServer(begin)

    def leave() -> None:
        if server.has_sent.is_set():
            raise LookupError("gone")

    limits = VideoLimits(allow_private_addresses=True)
    with pytest.raises(LookupError, match="gone"):
        decode_video(f"{scheme}://{server.address}/clip.mp4", num_frames=2, limits=limits, on_wait=leave)
    assert server.left.wait(10), "the connection stays open"


def test_a_name_that_is_looked_up_for_ever_ends_with_the_time(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: release.wait(30) and [])
    began = time.monotonic()
    try:
        with pytest.raises(VideoTimeoutError):
            decode_video("http://slow.example/clip.mp4", num_frames=2, limits=VideoLimits(max_decode_seconds=0.5))
        assert time.monotonic() - began < 10
    finally:
        release.set()


def test_an_address_that_never_answers_ends_with_the_time(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect_ex", lambda stream, address: errno.EALREADY)
    limits = VideoLimits(allow_private_addresses=True, max_decode_seconds=0.5)
    with pytest.raises(VideoTimeoutError):
        decode_video("http://127.0.0.1:9/clip.mp4", num_frames=2, limits=limits)
    limits = VideoLimits(allow_private_addresses=True, network_timeout_seconds=0.5)
    with pytest.raises(VideoOpenError, match="does not answer"):
        decode_video("http://127.0.0.1:9/clip.mp4", num_frames=2, limits=limits)


def test_decoding_that_nobody_wants_any_more_ends_its_process(monkeypatch, bomb):
    workers = []
    start = subprocess.Popen

    def note(*arguments, **options):
        workers.append(start(*arguments, **options))
        return workers[-1]

    monkeypatch.setattr(subprocess, "Popen", note)

    def leave() -> None:
        raise LookupError("gone")

    limits = VideoLimits(max_pixels=10**8)
    with pytest.raises(LookupError):
        decode_video(bomb, num_frames=1, isolated=True, limits=limits, on_wait=leave)
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL]


def test_decoding_works_beyond_a_thousand_open_files(clip):
    """`select.select` does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    files = []
    try:
        files += [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        assert len(decode_video(clip, num_frames=3, isolated=True).times) == 3
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_url_with_a_password_is_refused():
    with pytest.raises(VideoOpenError, match="password"):
        decode_video("http://user:secret@example.org/clip.mp4", num_frames=2)


# Bombs


@pytest.fixture(scope="session")
def bomb(folder) -> Path:
    """A picture of 8000x8000 in a few kilobytes."""
    path = folder / "bomb.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width = stream.height = 8000
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        frame = av.VideoFrame(8000, 8000, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.pts = 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak of memory")
def test_a_huge_picture_is_refused_before_it_takes_memory(bomb):
    script = (
        "import sys, torch, types\n"
        "sys.modules['decoder'] = package = types.ModuleType('decoder')\n"
        "package.__path__ = [sys.argv[2]]  # the decoder without the rest of the package\n"
        "from decoder.video_decoding import VideoLimitError, decode_video\n"
        "def memory(field):\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(field))\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew\n"
        "before = memory('VmRSS')\n"
        "try: decode_video(sys.argv[1], num_frames=1)\n"
        "except VideoLimitError as error: assert 'max_pixels' in str(error), error\n"
        "print(memory('VmHWM') - before)\n"
    )
    command = [sys.executable, "-c", script, str(bomb), str(Path(video_decoding.__file__).parent)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    # Decoding one picture takes 96 MB, several of them while FFmpeg looks for the frame rate.
    assert int(answer.stdout.split()[-1]) < 60_000


# A process of its own


def test_an_isolated_decode_gives_the_same(clip, folder):
    for source in (clip, clip.read_bytes(), make("rotated", folder), make("h264_raw", folder)):
        plain, isolated = decode_video(source, num_frames=9), decode_video(source, num_frames=9, isolated=True)
        assert torch.equal(plain.frames, isolated.frames)
        for name in ("times", "frame_indices", "fps", "duration_seconds", "total_num_frames", "width", "height"):
            assert getattr(plain, name) == getattr(isolated, name), name


def test_an_isolated_decode_reads_what_a_file_object_gives_and_not_what_lies_behind_it(clip, tmp_path):
    (tmp_path / "clip.gz").write_bytes(gzip.compress(clip.read_bytes()))
    with gzip.open(tmp_path / "clip.gz") as file:
        assert torch.equal(
            decode_video(file, num_frames=3, isolated=True).frames, decode_video(clip, num_frames=3).frames
        )


def test_an_isolated_decode_raises_the_same_errors(clip):
    with pytest.raises(VideoOpenError, match="cannot open this as a video"):
        decode_video(b"nonsense" * 100, num_frames=2, isolated=True)
    with pytest.raises(VideoLimitError, match="max_frames=2"):
        decode_video(clip, num_frames=3, limits=VideoLimits(max_frames=2), isolated=True)
    with pytest.raises(ValueError, match="must be within the video"):
        decode_video(clip, num_frames=3, start_seconds=50.0, isolated=True)


def test_an_isolated_bomb_costs_its_own_process_only(bomb):
    limits = VideoLimits(max_pixels=10**8, max_memory_bytes=200 * 1024**2)
    with pytest.raises(VideoError):
        decode_video(bomb, num_frames=1, limits=limits, isolated=True)


@pytest.mark.parametrize(
    ("script", "limits", "error", "message"),
    [
        (
            "import os, signal\ndef main(file): os.kill(os.getpid(), signal.SIGSEGV)",
            {},
            VideoDecodeError,
            "died on this video",
        ),
        (
            "import time\ndef main(file): time.sleep(60)",
            {"max_decode_seconds": 0.5},
            VideoTimeoutError,
            "max_decode_seconds",
        ),
        ("def main(file): print('x' * 10**6)", {}, VideoDecodeError, "no header"),
    ],
    ids=["crash", "hang", "babble"],
)
def test_a_lost_worker_costs_one_call_with_a_clear_error(script, limits, error, message, clip, tmp_path, monkeypatch):
    worker = tmp_path / "video_worker.py"
    worker.write_text(script)
    monkeypatch.setattr(video_worker, "__file__", str(worker))
    with pytest.raises(error, match=message):
        decode_video(clip, num_frames=2, limits=VideoLimits(**limits), isolated=True)


def test_the_worker_starts_without_torch_and_without_the_package(clip, tmp_path, monkeypatch):
    for module in (video_file, video_packets, video_source, video_worker):
        shutil.copy(module.__file__, tmp_path)
    with open(tmp_path / "video_worker.py", "a") as worker:
        worker.write(
            "\ndef main(file): print(json.dumps({'error': 'VideoError', 'message': ' '.join(sys.modules)}))\n"
        )
    monkeypatch.setattr(video_worker, "__file__", str(tmp_path / "video_worker.py"))
    with pytest.raises(VideoError) as told:
        decode_video(clip, num_frames=3, isolated=True)
    loaded = set(str(told.value).split())
    assert {"av", "decoder.video_packets"} <= loaded
    assert not loaded & {"torch", "transformers", "transformers_crosslmm"}


def test_the_worker_takes_no_module_from_the_current_folder_or_pythonpath(clip, tmp_path, monkeypatch):
    for name in ("json", "av", "resource", "decoder", "sitecustomize", "usercustomize", "video_source"):
        (tmp_path / f"{name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'taken')!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(decode_video(clip, num_frames=3, isolated=True).times) == 3
    assert not (tmp_path / "taken").exists()


def test_an_isolated_decode_takes_more_moments_than_a_command_line_holds(clip):
    times = [k / 10_000 for k in range(50_000)]
    assert len(decode_video(clip, times=times, isolated=True).times) == 150


# Mutated files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The file with one kind of harm done to it."""
    spoiled = bytearray(data)
    kind = rng.randrange(8)
    if kind == 0:  # turned bits
        for _ in range(rng.choice((1, 5, 50, 500))):
            spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # turned bits in the header
        for _ in range(rng.choice((1, 3, 10))):
            spoiled[rng.randrange(min(2000, len(spoiled)))] = rng.randrange(256)
    elif kind == 2:  # cut off
        del spoiled[rng.randrange(1, len(spoiled)) :]
    elif kind == 3:  # a piece missing
        start = rng.randrange(len(spoiled))
        del spoiled[start : start + rng.randrange(1, 5000)]
    elif kind == 4:  # a piece twice
        start = rng.randrange(len(spoiled))
        spoiled[start:start] = spoiled[start : start + rng.randrange(1, 5000)]
    elif kind == 5:  # noise
        start = rng.randrange(len(spoiled))
        spoiled[start : start + 300] = rng.randbytes(300)
    elif kind == 6:  # extreme numbers where sizes, counts and times may be
        for _ in range(rng.choice((1, 4))):
            start = rng.randrange(max(1, len(spoiled) - 4))
            spoiled[start : start + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
    else:  # the same near the end, where mp4 has its index
        for _ in range(rng.choice((1, 4, 16))):
            start = max(0, len(spoiled) - 1 - rng.randrange(1, 4000))
            spoiled[start : start + 4] = rng.choice((b"\xff" * 4, bytes(4), rng.randbytes(4)))
    return bytes(spoiled)


def fuzz(folder: Path, count: int, seed: int, seconds_each: float = 20.0) -> dict:
    """Decode `count` mutants in this process; what came of them. The caller limits memory and time."""
    import time
    import warnings

    warnings.simplefilter("ignore")
    seeds = {name: CLEAN[name](num_frames=40, width=112, height=80) for name in MUTATED}
    torch.set_num_threads(1)
    outcomes: dict[str, int] = {}
    slowest = 0.0
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        name = MUTATED[number % len(MUTATED)]
        data = mutate(seeds[name], rng)
        (folder / "last_mutant").write_bytes(data)
        request = rng.choice(({"num_frames": 4}, {"num_frames": 40}, {"fps": 3.0}, {}))
        began = time.monotonic()
        try:
            decoded = decode_video(
                data,
                num_threads=rng.choice((1, 1, 3)),
                frame_transform=lambda frame: frame[:, :8, :8].float().mean(dim=(1, 2)),
                limits=VideoLimits(max_pixels=1920 * 1080, max_frames=5000, max_decode_seconds=seconds_each),
                **request,
            )
            outcome = "right" if decoded.valid.all() else "marked"
        except VideoError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = f"uncaught {error!r}"
        slowest = max(slowest, time.monotonic() - began)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    # Not `ru_maxrss`, which begins with what the parent held when it forked.
    status = Path("/proc/self/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    return {"mutants": count, "seed": seed, "outcomes": outcomes, "slowest_seconds": slowest, "peak_memory_mb": peak}


def limited_fuzz(folder: Path, count: int, seed: int) -> dict:
    script = (
        "import json, resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[4])\n"
        "import test_hostile_videos\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))\n"
        "print(json.dumps(test_hostile_videos.fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(count), str(seed), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=60 + 2 * count,
    )
    assert answer.returncode == 0, (answer.returncode, answer.stderr[-2000:])
    return json.loads(answer.stdout.splitlines()[-1])


def test_vp9_is_not_decoded_several_frames_at_a_time(folder):
    """With frame threads FFmpeg 8.1 died on one of 20,000 mutants, a damaged VP9 file."""
    file = io.BytesIO(make("vp9_webm", folder).read_bytes())
    context = video_file.VideoFile(file, limits=VideoLimits(), num_threads=3)._context
    assert (context.thread_count, context.thread_type) == (3, av.codec.context.ThreadType.SLICE)


def test_mutated_files_neither_crash_nor_hang_nor_leak(tmp_path):
    report = limited_fuzz(tmp_path, 120, seed=0)
    allowed = {"right", "marked"} | set(video_worker._ERRORS) - {"VideoTimeoutError"}
    assert set(report["outcomes"]) <= allowed, report
    assert report["slowest_seconds"] < 25, report
    assert report["peak_memory_mb"] < 1500, report


if __name__ == "__main__":
    # python modeling_tests/test_hostile_videos.py FOLDER 20000: the long run, in pieces of their own processes.
    into, total = Path(sys.argv[1]), int(sys.argv[2])
    into.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    command = f"python modeling_tests/test_hostile_videos.py FOLDER {total}"
    origin = {"command": command, "commit": commit, "machine": f"{cpu}, {os.cpu_count()} cores"}
    summary = {"mutants": 0, "processes_that_died": 0, "outcomes": {}, "slowest_seconds": 0.0, "peak_memory_mb": 0.0}
    for piece in range(math.ceil(total / 500)):
        try:
            report = limited_fuzz(into, 500, seed=1 + piece)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            print(f"seed {1 + piece}: {error}", flush=True)
            (into / "last_mutant").rename(into / f"mutant_of_seed_{1 + piece}")
            summary["processes_that_died"] += 1
            continue
        summary["mutants"] += report["mutants"]
        for outcome, number in report["outcomes"].items():
            summary["outcomes"][outcome] = summary["outcomes"].get(outcome, 0) + number
        for key in ("slowest_seconds", "peak_memory_mb"):
            summary[key] = round(max(summary[key], report[key]), 2)
        about = {"seeds": f"1 to {1 + piece}", "pyav": av.__version__, "ffmpeg": av.ffmpeg_version_info}
        modules = (video_source, video_file, video_packets, video_worker, video_decoding)
        code = b"".join(Path(module.__file__).read_bytes() for module in modules)
        about["decoder"] = hashlib.sha256(code).hexdigest()[:16]
        (into / "video_fuzz.json").write_text(
            json.dumps(origin | summary | about | {"files": list(MUTATED)}, indent=1) + "\n"
        )
