"""`crosslmm watch`: senders that behave, die, stall and send rubbish, with FFmpeg as the sender over loopback."""

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from factories import random_model, save_checkpoint, tiny_config, tiny_processor
from transformers_crosslmm.asking import live_source, waiting_frames, watch
from transformers_crosslmm.asking.live import LiveVideo
from transformers_crosslmm.asking.live_source import LiveSource
from transformers_crosslmm.video_decoding import VideoError, decode_video
from video_files import encode

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="FFmpeg's command is the sender")
SENDER = ["ffmpeg", "-loglevel", "quiet", "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=10"]
MPEGTS = ["-c:v", "mpeg2video", "-g", "5", "-f", "mpegts"]


@pytest.fixture(scope="module")
def clip() -> bytes:
    """Six seconds of MPEG-TS, ten pictures a second."""
    return encode(container="mpegts", num_frames=60, gop=5, time_base=Fraction(1, 10))


@pytest.fixture
def opened():
    """Opens sources and closes them: `opened(name, fps=…)`."""
    sources = []

    def opened(source, **options) -> LiveSource:
        sources.append(LiveSource(str(source), tiny_processor(), **{"silence_seconds": 2.0} | options))
        return sources[-1]

    yield opened
    for source in sources:
        source.close()


@pytest.fixture
def sender():
    """Starts FFmpeg: `sender("-f", "mpegts", …)`; `-re` sends as fast as one watches."""
    processes = []

    def sender(*arguments: str, realtime: bool = True) -> subprocess.Popen:
        processes.append(subprocess.Popen([*SENDER[:3], *["-re"] * realtime, *SENDER[3:], *arguments]))
        return processes[-1]

    yield sender
    for process in processes:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def patient(open_it, seconds: float = 30.0):
    """What `open_it` returns once the sender listens."""
    end = time.monotonic() + seconds
    while True:
        try:
            return open_it()
        except VideoError:
            assert time.monotonic() < end
            time.sleep(0.1)


# --- files -----------------------------------------------------------------------------------------------------------


def test_its_frames_are_those_that_a_decoder_samples(opened, clip, tmp_path):
    (tmp_path / "clip.ts").write_bytes(clip)
    source = opened(tmp_path / "clip.ts", fps=2.0)
    until(lambda: source.ending is not None)
    frames, times = source.waiting.take()
    assert times == pytest.approx([0.5 * i for i in range(12)])
    assert source.ending == ""
    expected = decode_video(clip, times=[time + 0.01 for time in times], frame_transform=source.waiting._fit)
    assert torch.equal(torch.stack(frames), expected.frames)
    assert source.waiting.take() == ([], [])


def test_a_file_is_followed_while_it_grows(opened, clip, tmp_path):
    path, half = tmp_path / "clip.ts", len(clip) // 376 * 188
    path.write_bytes(clip[:half])
    source = opened(path, silence_seconds=3.0)
    until(lambda: source.waiting.num_received >= 2)
    before = source.waiting.num_received
    assert source.ending is None
    with path.open("ab") as file:
        file.write(clip[half:])
    until(lambda: source.ending is not None)
    assert (before < 6, source.waiting.num_received, source.ending) == (True, 6, "")


def test_the_newest_frames_are_kept_and_the_dropped_are_counted(opened, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(waiting_frames, "MAX_WAITING", 4)
    (tmp_path / "clip.ts").write_bytes(clip)
    source = opened(tmp_path / "clip.ts", fps=2.0)
    until(lambda: source.ending is not None)
    _, times = source.waiting.take()
    assert times == pytest.approx([4.0, 4.5, 5.0, 5.5])
    waiting = source.waiting
    assert (waiting.num_received, waiting.num_dropped, waiting.newest_seconds) == (12, 8, pytest.approx(5.5))


@pytest.mark.parametrize("container", ["mpegts", "matroska"])
def test_the_last_pictures_of_a_file_are_those_that_its_decoder_holds_back(opened, tmp_path, container):
    """Five pictures of H.264 with B-frames: the decoder gives none before it knows that no more come."""
    clip = encode(container=container, num_frames=5, gop=50, time_base=Fraction(1, 10))
    (tmp_path / "short").write_bytes(clip)
    source = opened(tmp_path / "short", fps=10.0, silence_seconds=1.0)
    until(lambda: source.ending is not None)
    assert source.waiting.take()[1] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=0.01)
    assert source.ending == ""


def test_a_clock_that_begins_anew_goes_on(opened, clip, tmp_path):
    (tmp_path / "clip.ts").write_bytes(clip + clip)
    source = opened(tmp_path / "clip.ts", fps=10.0)
    times = []
    until(lambda: (times.extend(source.waiting.take()[1]), source.ending is not None)[1])
    times += source.waiting.take()[1]
    assert (np.diff(times) > 0).all()
    assert max(times) > 5.8


@pytest.mark.parametrize("kind", ["rubbish", "nothing", "a folder", "a pipe", "nowhere"])
def test_what_is_no_video_is_refused_in_time(opened, tmp_path, kind):
    path = tmp_path / "source"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind != "nowhere":
        path.write_bytes(np.random.default_rng(0).bytes(200_000) if kind == "rubbish" else b"")
    began = time.monotonic()
    with pytest.raises((VideoError, FileNotFoundError)):
        opened(path, silence_seconds=0.5)
    assert time.monotonic() - began < 20


def test_rubbish_after_good_pictures_ends_it_and_keeps_them(opened, clip, tmp_path):
    rubbish = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "clip.ts").write_bytes(clip[: len(clip) // 376 * 188] + rubbish)
    source = opened(tmp_path / "clip.ts")
    until(lambda: source.ending is not None)
    assert len(source.waiting.take()[0]) >= 2


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtsp://127.0.0.1:1/a", "HTTP://127.0.0.1:1/a", "https://127.0.0.1:1"])
def test_the_network_is_used_only_when_asked_for(opened, name, monkeypatch):
    monkeypatch.setattr(live_source.av, "open", None)
    with pytest.raises(VideoError, match=r"only when asked for.*Add --allow-network"):
        opened(name)


@pytest.mark.parametrize("name", ["udp://127.0.0.1:1", "file:///etc/passwd", "concat://a|b", "x://secret"])
def test_other_addresses_are_refused_with_and_without_the_flag(opened, name, monkeypatch):
    monkeypatch.setattr(live_source.av, "open", None)
    for allow_network in (False, True):
        with pytest.raises(VideoError, match="camera, a file, or one of rtsp"):
            opened(name, allow_network=allow_network)


@needs_ffmpeg
def test_a_playlist_from_the_network_leads_nowhere_else(opened, clip, tmp_path):
    (tmp_path / "secret.ts").write_bytes(clip)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form: str, *arguments: object) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(VideoError):
            opened(f"http://127.0.0.1:{server.server_port}/list.m3u8", allow_network=True)
        server.shutdown()
    assert set(asked) == {"/list.m3u8"}


@needs_ffmpeg
@pytest.mark.parametrize("end", ["stops", "dies", "stalls"])
def test_an_http_stream_that_ends_however_leaves_its_frames(opened, sender, end):
    address = f"http://127.0.0.1:{free_port()}"
    process = sender(*["-t", "3"] * (end == "stops"), *MPEGTS, "-listen", "1", address)
    source = patient(lambda: opened(address, allow_network=True, fps=5.0, silence_seconds=4.0))
    until(lambda: source.waiting.num_received >= 5)
    if end != "stops":
        process.send_signal(signal.SIGKILL if end == "dies" else signal.SIGSTOP)
    until(lambda: source.ending is not None)
    assert end != "stalls" or source.ending == "nothing came for 4 s"
    assert source.waiting.num_received >= 5
    assert source.waiting.take()[0]


@needs_ffmpeg
def test_an_rtsp_stream_is_watched(opened, sender, monkeypatch):
    """FFmpeg pushes; the source listens, which it does not otherwise."""
    monkeypatch.setitem(
        live_source.STREAMS, "rtsp", live_source.STREAMS["rtsp"] | {"rtsp_flags": "listen", "listen_timeout": "60"}
    )
    address = f"rtsp://127.0.0.1:{free_port()}/live"
    found = []
    options = {"allow_network": True, "fps": 5.0, "silence_seconds": 60.0}
    waiting = threading.Thread(target=lambda: found.append(opened(address, **options)))
    waiting.start()
    while waiting.is_alive():  # a sender that comes before the listener gives up
        process = sender("-c:v", "mpeg4", "-g", "5", "-f", "rtsp", "-rtsp_transport", "tcp", address)
        while waiting.is_alive() and process.poll() is None:
            waiting.join(0.1)
    [source] = found
    until(lambda: source.waiting.num_received >= 5)
    _, times = source.waiting.take()
    assert (np.diff(times) > 0.15).all()
    process.kill()
    until(lambda: source.ending is not None)


# --- the command -----------------------------------------------------------------------------------------------------


def live_video(**options) -> LiveVideo:
    processor = tiny_processor(add_timestamps=True)
    config = tiny_config(
        text_config={"vocab_size": len(processor.tokenizer), "v2v_scope": "causal", "max_position_embeddings": 2048},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    return LiveVideo(random_model(config), processor, **options)


@pytest.fixture
def typed(monkeypatch) -> "queue.SimpleQueue[str | None]":
    """What a person types."""
    lines = queue.SimpleQueue()
    monkeypatch.setattr(watch, "typed_lines", lambda: lines)
    return lines


def test_questions_are_answered_from_what_has_been_seen(opened, clip, tmp_path, typed, capsys):
    (tmp_path / "clip.ts").write_bytes(clip)
    source, live = opened(tmp_path / "clip.ts"), live_video(max_frames=4)
    until(lambda: source.ending is not None)
    for line in ("What?", "", " ", "?" * 3000, "Where?", None):
        typed.put(line)
    watch.watch(live, source, max_new_tokens=5)
    said, told = capsys.readouterr()
    assert said.split("\n") == [
        live.ask("What?", max_new_tokens=5).text,
        "",
        live.ask("Where?", max_new_tokens=5).text,
        "",
    ]
    assert told.count("error: The sequence must fit the context") == 1
    assert "4 frames seen, 4 kept, 0 dropped, 0.0 s behind, ended" in told


def test_a_finished_mp4_whose_index_stands_at_its_end_is_left_to_chat(opened, typed):
    source = opened(Path(__file__).parents[2] / "samples" / "shapes.mp4", silence_seconds=0.5)
    typed.put(None)
    with pytest.raises(VideoError, match=r"must be playable from its beginning.*`crosslmm chat`"):
        watch.watch(live_video(), source, max_new_tokens=5)


def test_the_state_says_what_is_dropped_damaged_and_silent(opened, clip, tmp_path):
    (tmp_path / "clip.ts").write_bytes(clip)
    source, live = opened(tmp_path / "clip.ts", fps=5.0), live_video(max_frames=8)
    until(lambda: source.ending is not None)
    frames, times = source.waiting.take()
    live.add(torch.stack(frames[:10]), times[:10])
    source.num_damaged = 3
    assert watch.state(live, source) == ("8 frames seen, 8 kept, 14 dropped, 1.2 s behind, 3 packets damaged, ended")
    source.ending, source._heard = None, time.monotonic() - 7
    assert watch.state(live, source).endswith("3 packets damaged, silent for 7 s")


def test_ctrl_c_ends_an_answer_and_then_the_command(opened, clip, tmp_path, typed, monkeypatch, capsys):
    (tmp_path / "clip.ts").write_bytes(clip)
    source, live = opened(tmp_path / "clip.ts"), live_video(max_frames=4)
    until(lambda: source.ending is not None)
    ask, calls = live.ask, []

    def interrupted(question: str, **options):
        calls.append(question)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return ask(question, **options)

    monkeypatch.setattr(live, "ask", interrupted)
    for line in ("What?", "What?", None):
        typed.put(line)
    watch.watch(live, source, max_new_tokens=5)
    assert capsys.readouterr().out.split("\n")[0] == " (interrupted)"
    assert calls == ["What?", "What?"]
    monkeypatch.setattr(source.waiting, "take", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        watch.watch(live, source, max_new_tokens=5)


@needs_ffmpeg
def test_the_command_on_a_terminal(tmp_path, sender):
    """A real process, a real terminal, and a sender over HTTP."""
    import pty

    save_checkpoint(tmp_path / "checkpoint", text_config={"v2v_scope": "causal"})
    address = f"http://127.0.0.1:{free_port()}"
    sender(*MPEGTS, "-listen", "1", address)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "crosslmm_cli", "watch", address, "--allow-network", "--silence", "60"]
    command += ["--model", str(tmp_path / "checkpoint"), "--max-frames", "4", "--max-new-tokens", "5", "--fps", "5"]
    folder = Path(watch.__file__).parents[2]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"PYTHONPATH": str(folder)}
    )
    os.close(theirs)
    told = bytearray()

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                told.extend(piece)
        except OSError:
            pass

    threading.Thread(target=read, daemon=True).start()
    try:
        until(lambda: b"frames seen, 4 kept" in told, 240)
        os.write(ours, b"What happens?\n")
        assert process.stdout.readline().strip()
        os.write(ours, b"\x04")
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert b"s behind" in told
