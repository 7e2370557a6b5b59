"""Frames from video files: this package's decoder beside the readers of Transformers and torchcodec.

    python benchmarks/video_decoding.py make FOLDER                    # the files: about 3 GB, a few minutes
    python benchmarks/video_decoding.py run FOLDER --rounds 3          # -> benchmarks/video_decoding.json
    python benchmarks/video_decoding.py threads FOLDER --rounds 3      # -> benchmarks/video_decoding_threads.json
    python benchmarks/video_decoding.py chart                          # -> benchmarks/video_decoding.png

Every measurement is a process of its own on one core, after its imports: CPU seconds of all its threads (the claim),
wall seconds (worth little where other work runs beside it), and the peak of its memory over what it held after
importing. Readers take turns in a round; the medians of the rounds are kept. Every reader ends with (T, 3, 384, 384)
uint8 frames at T moments spread evenly: readers that give full-size frames are followed by the same antialiased
bicubic resize, frame by frame.
`--python` names an interpreter that has torchcodec, decord and opencv-python-headless beside torch, av and
transformers; a reader that cannot be imported there is left out. torchcodec needs FFmpeg's shared libraries:
`--library-path` is where it finds them (the ones bundled with PyAV will do, under their usual names).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

from origin import commit

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "video_decoding.json"
THREADS = HERE / "video_decoding_threads.json"
SIZE = 384
READERS = (
    "ours",
    "torchcodec_exact",
    "torchcodec_approximate",
    "transformers_pyav",
    "transformers_torchcodec",
    "transformers_decord",
    "transformers_opencv",
)
ENCODERS = {
    "h264": ("libx264", {"preset": "faster"}),
    "h264_no_b": ("libx264", {"preset": "faster", "bf": "0"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:bframes=4"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "16", "auto-alt-ref": "1"}),
    "av1": ("libsvtav1", {"preset": "12"}),
}
COPIES = {"10s": None, "5min": 5, "60min": 60}
# (codec, length, T): sparse, dense, and other codecs. No target falls on a keyframe of a repeated minute.
CASES = (
    ("h264", "60min", 13),
    ("h264_no_b", "60min", 13),
    ("h264", "10s", 256),
    ("h264", "10s", 32),
    ("h264", "60min", 64),
    ("h264", "5min", 64),
    ("h264_no_b", "60min", 64),
    ("hevc", "60min", 13),
    ("vp9", "60min", 13),
    ("av1", "60min", 13),
    ("hevc", "10s", 64),
    ("vp9", "10s", 64),
    ("av1", "10s", 64),
    ("hevc", "5min", 32),
    ("vp9", "5min", 32),
    ("av1", "5min", 32),
)
# These decode an hour from its start: up to a quarter of an hour each time, so only with --everything.
FROM_THE_START = ("transformers_pyav", "transformers_opencv")
# Measured once, except on the short file.
ONCE = ("transformers_pyav", "transformers_opencv", "transformers_decord", "transformers_torchcodec")


def make(folder: Path) -> None:
    """A minute of moving test picture with noise, 1280x720 at 30 frames/s, per codec; repeated for the lengths."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    for codec, (encoder, options) in ENCODERS.items():
        container = "webm" if codec == "vp9" else "mp4"
        minute = folder / f"{codec}_1min.{container}"
        for path, seconds in ((minute, 60), (folder / f"{codec}_10s.{container}", 10)):
            if path.exists():
                continue
            graph = av.filter.Graph()
            source = graph.add("testsrc2", "size=1280x720:rate=30")
            noise = graph.add("noise", "alls=8:allf=t")
            pixels, sink = graph.add("format", "yuv420p"), graph.add("buffersink")
            source.link_to(noise)
            noise.link_to(pixels)
            pixels.link_to(sink)
            graph.configure()
            with av.open(str(path), "w") as output:
                stream = output.add_stream(encoder, rate=30, options=options)
                stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
                stream.codec_context.gop_size, stream.bit_rate = 250, 3_000_000
                for number in range(seconds * 30):
                    frame = graph.pull()
                    frame.pts, frame.time_base = number, Fraction(1, 30)
                    frame.pict_type = 0  # the source calls every picture a keyframe
                    output.mux(stream.encode(frame))
                output.mux(stream.encode())
        for length, copies in COPIES.items():
            path = folder / f"{codec}_{length}.{container}"
            if copies is None or path.exists() or not any(case[:2] == (codec, length) for case in CASES):
                continue
            with av.open(str(path), "w") as output:
                copied = None
                for turn in range(copies):
                    with av.open(str(minute)) as source:
                        stream = source.streams.video[0]
                        copied = copied or output.add_stream_from_template(stream, opaque=True)
                        shift = round(60 * turn / stream.time_base)
                        for packet in source.demux(stream):
                            if packet.dts is not None:
                                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                                packet.stream = copied
                                output.mux(packet)


def read(reader: str, path: str, num_frames: int, num_threads: int):
    """(T, 3, SIZE, SIZE) uint8 frames; a function that does it, so that imports are not measured."""
    import numpy as np
    import torch

    def resize(frame):
        return torch.nn.functional.interpolate(frame[None], (SIZE, SIZE), mode="bicubic", antialias=True)[0]

    if reader == "ours":
        # The decoder's files without the package around them, which imports much more.
        package = sys.modules["decoder"] = types.ModuleType("decoder")
        package.__path__ = [str(HERE.parent / "src" / "transformers_crosslmm")]
        decoder = importlib.import_module("decoder.video_decoding")
        options = {"frame_transform": resize, "num_threads": num_threads}
        return lambda: decoder.decode_video(path, num_frames=num_frames, **options).frames
    if reader.startswith("torchcodec"):
        from torchcodec.decoders import VideoDecoder

        def direct():
            decoder = VideoDecoder(path, seek_mode=reader.removeprefix("torchcodec_"))
            length = decoder.metadata.duration_seconds
            moments = [(i + 0.5) * length / num_frames for i in range(num_frames)]
            return torch.stack([resize(frame) for frame in decoder.get_frames_played_at(moments).data])

        return direct
    from transformers.video_utils import load_video

    backend = reader.removeprefix("transformers_")
    if backend != "pyav":
        __import__({"opencv": "cv2"}.get(backend, backend))

    def loaded():
        frames, _ = load_video(path, num_frames=num_frames, backend=backend)
        return torch.stack(
            [
                resize(torch.as_tensor(frame).permute(*((2, 0, 1) if frame.shape[-1] == 3 else (0, 1, 2))))
                for frame in (frames if isinstance(frames, torch.Tensor) else np.asarray(frames))
            ]
        )

    return loaded


def measure(reader: str, path: str, num_frames: int, num_threads: int) -> dict[str, float]:
    import torch

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    work = read(reader, path, num_frames, num_threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, cpu, wall = _memory("VmRSS"), time.process_time(), time.perf_counter()
    frames = work()
    return {
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "extra_memory_mb": round(_memory("VmHWM") - held, 1),
        "frames": len(frames),
    }


def _memory(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def run(folder: Path, python: str, library_path: str, rounds: int, everything: bool) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": library_path}
    results = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    done = {(row["codec"], row["length"], row["num_frames"], row["reader"]) for row in results}
    for codec, length, num_frames in CASES:
        path = _path(folder, codec, length)
        if not path.exists():
            continue
        samples: dict[str, list[dict[str, float]]] = {}
        for turn in range(rounds):
            for reader in READERS:
                once = turn and reader in ONCE and length != "10s"
                if reader in FROM_THE_START and length == "60min" and not everything:
                    continue
                if once or (codec, length, num_frames, reader) in done:
                    continue
                command = [python, __file__, "one", reader, str(path), str(num_frames)]
                answer = subprocess.run(command, capture_output=True, text=True, env=environment)
                if answer.returncode == 0:
                    samples.setdefault(reader, []).append(json.loads(answer.stdout.splitlines()[-1]))
                elif not turn:
                    reason = (answer.stderr.strip().splitlines() or ["killed"])[-1][:200]
                    results.append(_row(codec, length, num_frames, reader) | {"error": reason})
        for reader, turns in samples.items():
            row = _row(codec, length, num_frames, reader) | {"rounds": len(turns)}
            row |= {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            results.append(row)
            print(row, flush=True)
        RESULTS.write_text(json.dumps({"about": _about(python), "results": results}, indent=1) + "\n")


def compare_threads(folder: Path, rounds: int) -> None:
    """CPU seconds of this decoder by its number of threads; the core that all of them share is given."""
    rows = []
    for codec in ENCODERS:
        for length, num_frames in (("10s", 256), ("5min", 32), ("60min", 13)):
            path = _path(folder, codec, length)
            if not path.exists():
                continue
            counts = (1, 2, 4)
            seconds: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(rounds):
                for count in counts:
                    command = [sys.executable, __file__, "one", "ours", str(path), str(num_frames), str(count)]
                    answer = subprocess.run(command, capture_output=True, text=True, check=True)
                    seconds[count].append(json.loads(answer.stdout.splitlines()[-1])["cpu_seconds"])
            medians = {str(count): statistics.median(seconds[count]) for count in counts}
            rows.append(
                {"codec": codec, "length": length, "num_frames": num_frames, "cpu_seconds_by_threads": medians}
            )
            print(rows[-1], flush=True)
            THREADS.write_text(json.dumps({"about": _about(sys.executable), "results": rows}, indent=1) + "\n")


def _path(folder: Path, codec: str, length: str) -> Path:
    return folder / f"{codec}_{length}.{'webm' if codec == 'vp9' else 'mp4'}"


def _about(python: str) -> dict:
    """Where the figures come from."""
    script = (
        "import importlib.metadata as m, json\n"
        "names = 'av', 'torch', 'transformers', 'torchcodec', 'decord', 'opencv-python-headless'\n"
        "known = {d.metadata['Name'].lower() for d in m.distributions()}\n"
        "print(json.dumps({name: m.version(name) for name in names if name in known}))"
    )
    versions = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    about = {"commit": commit(), "python": platform.python_version(), "cores": os.cpu_count(), "cpu": _cpu()}
    return about | {"versions": json.loads(versions), "pictures": "1280x720, 30 frames/s"}


def _row(codec: str, length: str, num_frames: int, reader: str) -> dict:
    return {"codec": codec, "length": length, "num_frames": num_frames, "reader": reader}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def chart() -> None:
    import matplotlib.pyplot as plt

    rows = [row for row in json.loads(RESULTS.read_text())["results"] if "error" not in row]
    cases = list(dict.fromkeys((row["codec"], row["length"], row["num_frames"]) for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), sharey=True)
    for axis, key, title in (
        (axes[0], "cpu_seconds", "CPU time"),
        (axes[1], "extra_memory_mb", "memory over imports"),
    ):
        for shift, reader in enumerate(READERS):
            points = []
            for place, case in enumerate(cases):
                found = {row["reader"]: row[key] for row in rows if tuple(row.values())[:3] == case}
                if reader in found and found.get("ours"):
                    points.append((found[reader] / found["ours"], place + (shift - 3) / 9))
            if points:
                axis.plot(*zip(*points, strict=True), "o", label=reader)
        axis.axvline(1, color="grey", linewidth=1)
        axis.set(xscale="log", xlabel=f"{title}, this decoder = 1 (right is worse)")
        for one in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            one(lambda ratio, _: f"{ratio:g}" if ratio in (0.5, 1, 2, 4, 6, 10) else "")
    axes[0].set_yticks(range(len(cases)), [f"{codec}, {length}, {count} frames" for codec, length, count in cases])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=len(READERS), fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(HERE / "video_decoding.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    command = commands.add_parser("run")
    command.add_argument("folder", type=Path)
    command.add_argument("--python", default=sys.executable)
    command.add_argument("--library-path", default=os.environ.get("LD_LIBRARY_PATH", ""))
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--everything", action="store_true")
    command = commands.add_parser("one")
    command.add_argument("reader", choices=READERS)
    command.add_argument("path")
    command.add_argument("num_frames", type=int)
    command.add_argument("num_threads", type=int, nargs="?", default=1)
    command = commands.add_parser("threads")
    command.add_argument("folder", type=Path)
    command.add_argument("--rounds", type=int, default=3)
    commands.add_parser("chart")
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder)
    elif given.command == "run":
        run(given.folder, given.python, given.library_path, given.rounds, given.everything)
    elif given.command == "one":
        print(json.dumps(measure(given.reader, given.path, given.num_frames, given.num_threads)))
    elif given.command == "threads":
        compare_threads(given.folder, given.rounds)
    else:
        chart()


if __name__ == "__main__":
    main()
