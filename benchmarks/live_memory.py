"""A live video with `max_frames`: CPU seconds that a frame takes, and memory of the process, frame by frame.

    python benchmarks/live_memory.py            # -> benchmarks/live_memory.json, docs/images/live_memory.svg
    python benchmarks/live_memory.py --draw     # the picture alone

"tiny": an hour at 1 frame per second on the bundled checkpoint, asked once a minute, with scope "causal", for which it
was not trained. "wide": widths of SigLIP2-so400m at 384 pixels and of Qwen2.5-1.5B with random weights, few
layers of each. Each is a process of one thread.

Seconds of minutes apart cannot be compared where other work comes and goes. So at the end a second video begins, with
as many frames in view, and both take new frames in turns: is the one that has seen an hour slower than the new one?
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from origin import commit

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "live_memory.json"
PICTURE = HERE.parent / "docs" / "images" / "live_memory.svg"
RUNS = {
    "tiny, causal": {"frames": 3600, "max_frames": 96, "ask_every": 60},
    "wide, causal": {"frames": 240, "max_frames": 8, "ask_every": 8},
}
ROUNDS = 5


def live_video(name: str, max_frames: int):
    import torch

    from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMConfig, CrossLMMForConditionalGeneration
    from transformers_crosslmm.asking.live import LiveVideo
    from transformers_crosslmm.checkpoints.load import load_model, load_processor

    torch.set_num_threads(1)
    processor = load_processor(TINY_CHECKPOINT)
    processor.add_timestamps = True
    if name.startswith("tiny"):
        model = load_model(TINY_CHECKPOINT, device="cpu")
        model.config.v2v_scope = "causal"
        return LiveVideo(model, processor, max_frames)
    config = CrossLMMConfig.from_preset("2B")
    tokenizer = processor.tokenizer
    config.vision_config.num_hidden_layers = 2  # of which one runs
    config.text_config.num_hidden_layers = config.text_config.max_window_layers = 2  # one with cross-attention
    config.text_config.layer_types = config.text_config.layer_types[:2]
    fields = config.to_dict() | {"v2v_scope": "causal", "cross_attention_interval": 2, "cross_attention_layers": None}
    fields |= {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    fields["text_config"] |= {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    config = CrossLMMConfig(**fields)
    model = CrossLMMForConditionalGeneration(config).eval()
    wide = type(processor).from_config(config, tokenizer, add_timestamps=True)
    return LiveVideo(model, wide, max_frames)


def measure(name: str, frames: int, max_frames: int, ask_every: int) -> dict:
    import numpy as np

    live = live_video(name, max_frames)
    draw = np.random.default_rng(0)

    def add(video, second: int) -> float:
        frame = draw.integers(0, 256, (1, 240, 320, 3), dtype=np.uint8)
        began = time.process_time()
        video.add(frame, [float(second)])
        return round(time.process_time() - began, 5)

    seconds, answer_seconds, megabytes = [], [], []
    for second in range(frames):
        seconds.append(add(live, second))
        if second % ask_every == ask_every - 1:
            began = time.process_time()
            live.ask("What happens?", max_new_tokens=8)
            answer_seconds.append(round(time.process_time() - began, 4))
        status = Path("/proc/self/status").read_text()
        megabytes.append(round(int(status.partition("VmRSS:")[2].split()[0]) / 1024, 1))
    assert live.num_seen == frames
    in_view, ratios = len(live.times), []
    young, young_frames = type(live)(live.model, live.processor, max_frames), 0
    while young_frames < max_frames or len(young.times) != in_view:
        add(young, frames + young_frames)
        young_frames += 1
    for turn in range(ROUNDS):
        spent = [0.0, 0.0]
        for i in range(turn * max_frames, (turn + 1) * max_frames):  # forgets four times
            spent[0] += add(live, frames + i)
            spent[1] += add(young, frames + young_frames + i)
        ratios.append(round(spent[0] / spent[1], 3))
    return {
        "frames_in_view": in_view,
        "seconds": seconds,
        "answer_seconds": answer_seconds,
        "mb": megabytes,
        "seconds_over_those_of_a_new_video": ratios,
    }


def summary(run: dict, max_frames: int) -> dict:
    """The run's second quarter, when `max_frames` are in view for the first time, beside its last."""
    count = len(run["seconds"])
    early, late = slice(count // 4, count // 2), slice(3 * count // 4, count)

    def mean(values: list[float], part: slice) -> float:
        chosen = values[part]
        return round(sum(chosen) / len(chosen), 4)

    return {
        "seconds_per_frame": [mean(run["seconds"], part) for part in (early, late)],
        "most_mb": [max(run["mb"][part]) for part in (early, late)],
        "seconds_over_those_of_a_new_video": statistics.median(run["seconds_over_those_of_a_new_video"]),
        "max_frames": max_frames,
    }


def draw(results: dict) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "live", "font.family": ["DejaVu Sans"]}
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, 2, figsize=(10, 5), sharex="col")
    for column, kind in enumerate(("tiny", "wide")):
        for name, run in results["runs"].items():
            if not name.startswith(kind):
                continue
            width = max(1, results["summary"][name]["max_frames"] // 4)
            means = [
                sum(run["seconds"][i : i + width]) / width for i in range(0, len(run["seconds"]) - width + 1, width)
            ]
            rows[0][column].plot([width * i for i in range(len(means))], means, label=name)
            rows[1][column].plot(run["mb"], label=name)
        rows[0][column].legend(fontsize=8)
        rows[1][column].set_xlabel("frames added")
        for axes in (rows[0][column], rows[1][column]):
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel("CPU seconds per frame,\nmean over a quarter of the frames in view", fontsize=8)
    rows[1][0].set_ylabel("memory of the process, MB", fontsize=8)
    rows[0][0].set_title("tiny checkpoint, 96 frames in view", fontsize=10)
    rows[0][1].set_title("real widths, few layers, 8 frames in view", fontsize=10)
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None, "Title": "Seconds per frame and memory of a live video"})


def main() -> None:
    if sys.argv[1:] == ["--draw"]:
        draw(json.loads(RESULTS.read_text()))
        return
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], **RUNS[sys.argv[1]])))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"about": about(), "summary": {}, "runs": {}}
    for name, options in RUNS.items():
        if name in results["runs"]:  # from a command that was interrupted; delete the file to begin anew
            continue
        answer = subprocess.run([sys.executable, __file__, name], stdout=subprocess.PIPE, text=True, check=True)
        results["runs"][name] = run = json.loads(answer.stdout.splitlines()[-1])
        results["about"]["commits"][name] = commit()
        results["summary"][name] = summary(run, options["max_frames"])
        RESULTS.write_text(json.dumps(results) + "\n")
    draw(results)
    print(json.dumps(results["summary"], indent=1))


def about() -> dict:
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "note": "CPU seconds of one thread"}
    return {"command": "python benchmarks/live_memory.py", "commits": {}} | machine


if __name__ == "__main__":
    main()
