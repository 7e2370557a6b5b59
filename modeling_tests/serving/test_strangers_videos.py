"""Where videos may come from."""

import errno
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from served import IDLE, QUESTIONS, Server, begin_request, data_url, openai, user, wait_until

from factories import mp4_of, random_frames
from loopback import DrippingServer
from transformers_crosslmm import video_worker
from transformers_crosslmm.serving import strangers_videos
from transformers_crosslmm.serving.admission import RefusedError
from transformers_crosslmm.serving.chat_request import shortened
from transformers_crosslmm.video_decoding import VideoError


def test_a_path_outside_of_the_allowed_folders_is_refused(server, root):
    """Also beside a folder of nearly the same name, through links and through `..`; whether it exists is not told."""
    secret = root / "videos-of-others/secret.mp4"
    told = set()
    for path in (
        secret,
        secret.as_uri(),
        root / "videos/link.mp4",
        f"{root}/videos/../videos-of-others/secret.mp4",
        f"file://{root}/videos/%2e%2e/videos-of-others/secret.mp4",
        "/etc/passwd",
        root / "videos-of-others/missing.mp4",
        "/missing/altogether",
    ):
        with pytest.raises(openai.PermissionDeniedError, match="must be in a folder") as refused:
            server.answer(QUESTIONS[0], path)
        told.add(refused.value.body["message"].replace(shortened(str(path)), "IT"))
    assert len(told) == 1
    assert server.health() == IDLE


def test_no_folder_allows_no_path(root, clip):
    server = Server(root / "checkpoint")
    try:
        with pytest.raises(openai.PermissionDeniedError, match="--allowed-folder"):
            server.answer(QUESTIONS[0], clip)
        assert server.answer(QUESTIONS[0], data_url(clip))
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("one.mp4", "absolute path"),
        ("ftp://example.com/clip.mp4", "absolute path, or a URL of scheme"),
        ("concat:/etc/passwd", "absolute path"),
        ("file://elsewhere/clip.mp4", "must name this machine"),
        ("/videos/\0.mp4", "null byte"),
        ("data:video/mp4;base64", "no comma"),
        ("data:video/mp4;base64,!!!", "not valid base64"),
        ("data:video/mp4;base64,é", "cannot be read"),
        ("http://[::1", "cannot be read"),
        ("https://user:password@example.com/a.mp4", "user name or password"),
        ("", "absolute path"),
    ],
)
def test_what_names_no_video_is_refused(server, url, reason):
    body = {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]}
    reply = server.post(body)
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"])
def test_a_url_that_leads_to_a_private_address_is_not_fetched(server, host):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        url = f"http://{host}:{listening.getsockname()[1]}/clip.mp4"
        with pytest.raises(openai.BadRequestError, match="not a public address") as refused:
            server.answer(QUESTIONS[0], url)
        assert "VideoLimits" not in str(refused.value)
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize("address", ["fec0::1", "::127.0.0.1", "::ffff:0:7f00:1"])
def test_no_spelling_of_a_private_address_is_fetched(server, address):
    with pytest.raises(openai.BadRequestError, match="not a public address"):
        server.answer(QUESTIONS[0], f"http://[{address}]/clip.mp4")


DRIPS = {
    "headers": b"HTTP/1.1 200 OK\r\nX: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
}


@pytest.mark.parametrize("kind", DRIPS)
def test_a_url_that_drips_holds_its_place_no_longer_than_a_request_may_take(started, kind):
    server, dripping = started(allow_private_urls=True, request_seconds=5), DrippingServer(DRIPS[kind])
    began = time.monotonic()
    reply = server.post({"messages": [user("What?", f"http://{dripping.address}/clip.mp4")]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    wait_until(lambda: server.health() == IDLE, seconds=10)
    assert time.monotonic() - began < 15
    assert dripping.left.wait(10)


@pytest.mark.parametrize("kind", DRIPS)
def test_a_url_that_drips_is_left_when_the_client_leaves(started, kind):
    server, dripping = started(allow_private_urls=True, max_running=1), DrippingServer(DRIPS[kind])
    connection = begin_request(server, {"messages": [user("What?", f"http://{dripping.address}/clip.mp4")]})
    assert dripping.has_sent.wait(10)
    assert server.health()["running"] == 1
    connection.close()
    wait_until(lambda: server.health() == IDLE, seconds=10)
    assert dripping.left.wait(10)
    assert server.answer("Hello!") is not None


def test_a_decoder_ends_when_its_client_leaves(started, clip, monkeypatch):
    """Two that never come to an end leave both places within a second, and take no other process with them."""
    server, workers, start = started(max_running=2), [], subprocess.Popen

    def note(*arguments, **options):
        workers.append(start(*arguments, **options))
        return workers[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    monkeypatch.setattr(video_worker, "_START", "import time; time.sleep(60)")
    connections = [begin_request(server, {"messages": [user("What?", clip)]}) for _ in range(2)]
    wait_until(lambda: len(workers) == 2)
    for connection in connections:
        connection.close()
    began = time.monotonic()
    assert server.answer("Hello!") is not None
    assert time.monotonic() - began < 15
    wait_until(lambda: server.health() == IDLE, seconds=10)
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] * 2


def test_hashing_ends_when_its_client_leaves(started, root):
    server, path = started(max_running=1, max_video_bytes=2**40), root / "videos/large.mp4"
    with open(path, "wb") as file:
        file.truncate(64 * 2**30)  # a file of nothing, which takes minutes to hash
    try:
        connection = begin_request(server, {"messages": [user("What?", path)]})
        wait_until(lambda: server.health()["running"] == 1)
        connection.close()
        wait_until(lambda: server.health() == IDLE, seconds=10)
    finally:
        path.unlink()


@pytest.mark.parametrize("shortage", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN])
@pytest.mark.parametrize("where", ["opening", "decoding"])
def test_a_server_that_is_out_of_files_or_processes_does_not_blame_the_client(
    server, clip, monkeypatch, forget, shortage, where
):
    def fail(*arguments, **options):
        raise OSError(shortage, os.strerror(shortage))

    if where == "opening":
        monkeypatch.setattr(os, "open", fail)
    else:
        monkeypatch.setattr(subprocess, "Popen", fail)
    reply = server.post({"messages": [user("What?", clip)]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
    assert int(reply.headers["Retry-After"]) > 0


def test_a_file_that_is_swapped_for_a_link_is_not_followed(server, root, clip):
    """While somebody swaps it without end, good answers and refusals come, and never the other file's."""
    path, spare, secret = root / "videos/swapped.mp4", root / "videos/spare", root / "videos-of-others/secret.mp4"
    folder, beside = root / "videos/swapped", root / "videos/beside"
    folder.mkdir()
    (folder / "secret.mp4").write_bytes(clip.read_bytes())
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            spare.symlink_to(secret)
            os.replace(spare, path)
            os.rename(folder, beside)
            folder.symlink_to(secret.parent)
            spare.write_bytes(clip.read_bytes())
            os.replace(spare, path)
            folder.unlink()
            os.rename(beside, folder)

    swapping = threading.Thread(target=swap)
    swapping.start()
    reader, seen = server.handler.reader, set()
    expected, wanted = clip.read_bytes(), 0
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            for name in (path, folder / "secret.mp4"):
                try:
                    with reader._opened(str(name), None) as file:
                        seen.add(file.read() == expected)
                        wanted += 1
                except (RefusedError, VideoError):
                    pass
    finally:
        is_over.set()
        swapping.join()
    assert seen == {True}
    assert wanted > 10


def hostile_files(root: Path, clip: Path) -> dict[str, bytes]:
    data = clip.read_bytes()
    secret = root / "videos-of-others/secret.mp4"
    return {
        "empty": b"",
        "text": b"not a video",
        "noise": os.urandom(5000),
        "cut": data[: len(data) // 3],
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "playlist": f"#EXTM3U\n#EXTINF:1,\n{secret}\n".encode(),
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "bomb": mp4_of(random_frames(1, height=2, width=2).repeat(300, 1).repeat(400, 2), fps=1),
    }


def test_a_hostile_file_costs_its_own_request_only(started, generated, root, clip):
    server = started(max_frames=20)
    server.handler.reader.limits = strangers_videos.replace(server.handler.reader.limits, max_pixels=400_000)
    for name, data in hostile_files(root, clip).items():
        path = root / f"videos/{name}.mp4"
        path.write_bytes(data)
        with pytest.raises(openai.APIStatusError) as refused:
            server.answer(QUESTIONS[0], path)
        assert refused.value.status_code == 400, name
        assert refused.value.body["code"] == "invalid_video"
        assert "secret" not in str(refused.value)
        assert server.answer(QUESTIONS[0], clip) == generated([user(QUESTIONS[0], clip)])
    assert server.health() == IDLE


def test_strangers_videos_are_decoded_in_a_limited_process(server, clip, monkeypatch, forget):
    seen = {}
    decode = strangers_videos.decode_video

    def spy(*arguments, **options):
        seen.update(options)
        return decode(*arguments, **options)

    monkeypatch.setattr(strangers_videos, "decode_video", spy)
    server.answer(QUESTIONS[0], clip)
    assert seen["isolated"]
    assert seen["strict"]
    assert seen["limits"].max_memory_bytes == 2 * 1024**3
    assert seen["limits"].max_decode_seconds == 120
    assert not seen["limits"].allow_private_addresses


def test_a_request_has_only_so_many_frames(started, clip, root):
    server = started(max_frames=10)
    assert server.answer(QUESTIONS[0], clip, sampling={"num_frames": 6})
    for sampling in ({"num_frames": 11}, {"max_frames": 11}, {"times": [i / 4 for i in range(11)]}):
        with pytest.raises(openai.BadRequestError, match="may have 10 frames together; got 11"):
            server.answer(QUESTIONS[0], clip, sampling=sampling)
    assert server.ask(QUESTIONS[0], clip, sampling={"fps": 3}).usage.prompt_tokens < 10 * 9 + 60
    with pytest.raises(openai.BadRequestError, match="10 frames together; got 14"):
        server.answer([user("Both?", clip, root / "videos/two.mp4")])
