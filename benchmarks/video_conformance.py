"""Every video of a folder, decoded here and by the ffmpeg command line: the same frames, times and pixels?

    python benchmarks/video_conformance.py FOLDER          # -> benchmarks/video_conformance.json

ffmpeg gives the pictures of the stream that it chooses itself, in the order and with the times of its decoder. Here
each file is decoded twice: every frame, and eight sampled ones. A file agrees when both have as many frames, times
(from the first frame on) within 2 ms, pictures that differ by less than 3 grey levels on average over blocks, and
when the sampled frames are those that the rule of sampling names.

The JSON keeps one row per file, found again by its SHA-256. `why`, written there by hand for a file that differs, is
kept when the file is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

import av
import numpy as np
import torch
from origin import origin

from transformers_crosslmm.video_decoding import VideoError, VideoLimits, decode_video, sample_times

RESULTS = Path(__file__).resolve().parent / "video_conformance.json"
BLOCKS = 12
SECONDS_EACH = 60
NUM_SAMPLED = 8
MOST_GREY_LEVELS = 3.0
MOST_SECONDS = 0.002


def blocks(picture: torch.Tensor) -> torch.Tensor:
    """(3, BLOCKS, BLOCKS) means of a (3, H, W) picture, of every few pixels of a large one."""
    step = max(1, min(picture.shape[1:]) // 100)
    return torch.nn.functional.adaptive_avg_pool2d(picture[:, ::step, ::step].float(), BLOCKS)


def by_ffmpeg(ffmpeg: str, path: Path) -> tuple[list[float], list[torch.Tensor], str]:
    """Times, block means and the first error of the pictures that the command line gives."""
    command = [ffmpeg, "-hide_banner", "-nostdin", "-copyts", "-i", str(path), "-an", "-sn", "-dn", "-vf", "showinfo"]
    command += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"]
    means = []
    with tempfile.TemporaryFile("w+", errors="replace") as told:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told)
        until = time.monotonic() + SECONDS_EACH
        while process.stdout.readline() == b"P6\n" and time.monotonic() < until:
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()  # the largest value, 255
            rows = np.frombuffer(bytearray(process.stdout.read(3 * width * height)), np.uint8)
            if rows.size == 3 * width * height:
                means.append(blocks(torch.from_numpy(rows.reshape(height, width, 3)).permute(2, 0, 1)))
        process.kill()
        process.wait()
        process.stdout.close()
        told.seek(0)
        lines = told.readlines()
    # `pts_time` has six digits only.
    base = next((line for line in lines if "config in time_base" in line), "time_base: 0/1")
    tick = Fraction(re.search(r"time_base: (\d+/\d+)", base)[1])
    found = (re.search(r"Parsed_showinfo.* n: *\d+ pts: *(-?\d+)", line) for line in lines)
    times = [float(int(line[1]) * tick) for line in found if line]
    times = list(accumulate(times, max))  # ffmpeg never writes them backwards
    count = min(len(times), len(means))
    if time.monotonic() > until:
        return [], [], "longer than the time limit"
    messages = (re.sub(r" @ 0x\w+", "", line.strip()) for line in lines if str(path) not in line)
    error = next((line for line in messages if re.search("error|invalid|corrupt", line, re.I)), "")
    return times[:count], means[:count], error[:200]


def by_us(path: Path, **request):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limits = VideoLimits(max_decode_seconds=SECONDS_EACH)
        decoded = decode_video(path, frame_transform=blocks, limits=limits, **request)
    return decoded, "; ".join(str(warning.message) for warning in caught)


def compare(ffmpeg: str, path: Path) -> dict:
    """A row of the results: `outcome`, and `differences` in words."""
    row: dict = {"file": path.name}
    times, means, row["ffmpeg_error"] = by_ffmpeg(ffmpeg, path)
    try:
        decoded, row["warning"] = by_us(path)
    except VideoError as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
        return row | {"outcome": "only ffmpeg" if means else "neither", "frames": len(means)}
    except Exception as error:
        return row | {"outcome": "uncaught", "error": repr(error)}
    row |= {"codec": decoded.codec, "frames": len(decoded.times)}
    if not means:
        return row | {"outcome": "only here" if decoded.valid.any() else "neither"}
    differences = []
    if not decoded.valid.all():
        differences.append(f"{int((~decoded.valid).sum())} frames not valid")
    if len(times) != len(decoded.times):
        differences.append(f"{len(decoded.times)} frames, ffmpeg has {len(times)}")
    both = range(min(len(times), len(decoded.times)))
    late = max(abs((decoded.times[k] - decoded.times[0]) - (times[k] - times[0])) for k in both)
    if late > MOST_SECONDS:
        differences.append(f"times differ by up to {late:.3f} s")
    gaps = [after - before for before, after in pairwise(decoded.times)]
    rest = decoded.duration_seconds - decoded.times[-1]
    if rest > max([3 / decoded.fps, *(2 * gap for gap in gaps)]) + 0.1:
        differences.append(f"lasts {rest:.3f} s beyond its last picture")
    off = [float((decoded.frames[k] - means[k]).abs().mean()) for k in both if decoded.valid[k]]
    if off and max(off) > MOST_GREY_LEVELS:
        count = sum(level > MOST_GREY_LEVELS for level in off)
        differences.append(f"{count} pictures differ, by up to {max(off):.1f} grey levels")
    differences += sampled(path, decoded)
    return row | {"outcome": "differs" if differences else "agrees", "differences": differences}


def sampled(path: Path, everything) -> list[str]:
    """What is wrong with eight sampled frames, measured by all of them."""
    try:
        got, _ = by_us(path, num_frames=NUM_SAMPLED)
    except VideoError as error:
        return [f"no sampled frames: {error}"[:200]]
    moments = sample_times(got.duration_seconds, num_frames=NUM_SAMPLED)
    last = [max((k for k, due in enumerate(everything.times) if due <= t + 1e-7), default=0) for t in moments]
    wanted = list(dict.fromkeys(last))
    if len(got.times) != len(wanted) or any(
        abs(have - everything.times[k]) > 1e-6 for have, k in zip(got.times, wanted, strict=True)
    ):
        due = [round(everything.times[k], 3) for k in wanted]
        return [f"sampled frames are due at {[round(moment, 3) for moment in got.times]}, should be {due}"]
    off = [
        float((got.frames[place] - everything.frames[k]).abs().max())
        for place, k in enumerate(wanted)
        if got.valid[place] and everything.valid[k]
    ]
    return [f"sampled pictures differ by {max(off):.1f} grey levels"] if off and max(off) > 0 else []


def keep(rows: list[dict], out: Path, ffmpeg: str) -> dict:
    """Write what is known so far, and return what it comes to."""
    version = subprocess.run([ffmpeg, "-version"], capture_output=True, text=True).stdout.split(" Copyright")[0]
    about = origin(__file__, "FOLDER") | {
        "ffmpeg": version,
        "pyav": av.__version__,
        "its_ffmpeg": av.ffmpeg_version_info,
        "files": len(rows),
        "outcomes": dict(Counter(row["outcome"] for row in rows).most_common()),
        "differ_without_a_reason": sum(
            row["outcome"] not in ("agrees", "neither", "only here") and "why" not in row for row in rows
        ),
    }
    out.write_text(json.dumps({"about": about, "files": rows}, indent=1) + "\n")
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ffmpeg", default="ffmpeg")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    kept = json.loads(given.out.read_text())["files"] if given.out.exists() else []
    reasons = {row["sha256"]: row["why"] for row in kept if "why" in row}
    torch.set_num_threads(1)
    paths = sorted(path for path in given.folder.rglob("*") if path.is_file())
    rows: dict[str, dict] = {}
    for number, path in enumerate(paths, 1):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest in rows:
            continue
        began = time.monotonic()
        row = compare(given.ffmpeg, path)
        row = {key: value for key, value in row.items() if value not in ("", [])} | {"sha256": digest}
        if digest in reasons and row["outcome"] not in ("agrees", "neither", "only here"):
            row["why"] = reasons[digest]
        rows[digest] = row
        said = row.get("differences") or row.get("error") or ""
        seconds = time.monotonic() - began
        print(f"{number}/{len(paths)} {row['outcome']:12} {seconds:5.1f} s {path.name[-60:]} {said}", flush=True)
        about = keep(list(rows.values()), given.out, given.ffmpeg)
    for outcome, count in about["outcomes"].items():
        print(f"{outcome:12} {count:6}")
    print(f"{about['differ_without_a_reason']} differ without a reason -> {given.out}")


if __name__ == "__main__":
    main()
