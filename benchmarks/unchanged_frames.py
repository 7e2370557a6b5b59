"""What `skip_unchanged` saves: distinct frames, encoder calls, time and memory, on videos that this script makes.

    python benchmarks/unchanged_frames.py        # -> benchmarks/unchanged_frames.json

Videos of SECONDS at 10 frames per second, encoded by x264 with its defaults, sampled at 1 frame per second:
slides, each shown for 15 seconds; a screen on which something is typed every 5 seconds and a cursor moves every 3; a
fixed camera, that is, a still picture with sensor noise and a walker; and film, where everything moves. "Exact slides"
are the same slides without loss (x264 with `qp=0`): what a file of pictures, or a lossless recording, gives. A small
model with a 7B's patches and tokens per frame prefills exact slides and film, with and without in turn: CPU seconds of
one thread from the file on, of a decode step after it, of reading alone, and of the comparisons of frames, medians;
memory is what is kept of the video (form "features", original tokens). Tokens are those that `generate` writes.

What a tolerance changes: the last position's logits of a 7B's widths with two layers, for slides and screen, as the
largest difference from those without `skip_unchanged` in standard deviations of the logits; and the answers of the
bundled checkpoint to questions about held-out H.264 files of 8 seconds, at 2 frames per second.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from origin import origin
from transformers import DynamicCache
from transformers.utils import logging

from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMVideoProcessor
from transformers_crosslmm.cache_crosslmm import memory_in
from transformers_crosslmm.checkpoints.load import load_model, load_processor
from transformers_crosslmm.frames_crosslmm import UnchangedFrames
from transformers_crosslmm.measuring.contenders import CrossLMM
from transformers_crosslmm.measuring.quality import answer_questions, batches_of, read_questions, score
from transformers_crosslmm.tiny.procedural_videos import write_videos

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "unchanged_frames.json"
SECONDS, RATE, WIDTH, HEIGHT = 60, 10, 640, 360
TOLERANCES = (0, 2, 8, 24)
TIMED = ("exact slides", "film")
NEAR = ("slides", "screen")
ROUNDS, NEW_TOKENS = 3, 8
RNG = np.random.default_rng(0)


def page(number: int) -> np.ndarray:
    """A slide: lines of blocks, as text is, on white; a picture beside them."""
    rng = np.random.default_rng(number)
    picture = np.full((HEIGHT, WIDTH, 3), 250, dtype=np.uint8)
    for top in range(40, HEIGHT - 40, 24):
        for left in range(30, 30 + int(rng.integers(100, 330)), 9):
            picture[top : top + int(rng.integers(6, 13)), left : left + 6] = 30
    picture[80:280, 420:600] = rng.integers(0, 256, (10, 9, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
    return picture


def slides(number: int) -> np.ndarray:
    return page(number // (15 * RATE))


def screen(number: int) -> np.ndarray:
    picture = page(0).copy()
    typed = number // (5 * RATE)
    picture[300:312, 30 : 30 + 9 * typed] = 60
    left, top = 37 * (number // (3 * RATE)) % (WIDTH - 12), 53 * (number // (3 * RATE)) % (HEIGHT - 18)
    picture[top : top + 18, left : left + 12] = (200, 30, 30)
    return picture


SCENE = np.kron(RNG.integers(40, 216, (12, 20, 3)), np.ones((32, 32, 1))).astype(np.int16)[:HEIGHT, :WIDTH]


def camera(number: int) -> np.ndarray:
    picture = SCENE + np.random.default_rng(number).normal(0, 2, SCENE.shape).round().astype(np.int16)
    left = 2 * number % (WIDTH - 40)
    picture[200:300, left : left + 40] = 20
    return picture.clip(0, 255).astype(np.uint8)


def film(number: int) -> np.ndarray:
    return np.roll(SCENE, (3 * number, 5 * number), (0, 1)).astype(np.uint8)


VIDEOS: dict[str, tuple[Callable[[int], np.ndarray], dict[str, str]]] = {
    "slides": (slides, {}),
    "exact slides": (slides, {"qp": "0"}),
    "screen": (screen, {}),
    "camera": (camera, {}),
    "film": (film, {}),
}


def encoded(draw: Callable[[int], np.ndarray], options: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(SECONDS * RATE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


class Watcher:
    """A model, what its encoder was called with, and a video as it comes with and without `skip_unchanged`."""

    def __init__(self, size: str) -> None:
        contender = CrossLMM("7B", form="features")
        torch.manual_seed(0)
        config = contender.config(size)
        config.gate_init, config.vision_config.num_hidden_layers = 1.0, 2  # of which the last is not built
        text = config.text_config
        text.num_hidden_layers, text.layer_types = 2, text.layer_types[:2]
        self.model = contender.model_class._from_config(config).eval()
        contender.prepare(self.model)
        self.processor, self.frames, self.comparing = CrossLMMVideoProcessor(), 0, 0.0
        self.model.model.vision_tower.register_forward_pre_hook(self._count)

        compare = UnchangedFrames.__call__

        def timed(self_: UnchangedFrames, chunk):
            start = time.process_time()
            try:
                return compare(self_, chunk)
            finally:
                self.comparing += time.process_time() - start

        UnchangedFrames.__call__ = timed

    def _count(self, module: torch.nn.Module, args: tuple) -> None:
        self.frames += len(args[0])

    def inputs(self, clip: bytes, level: float | bool) -> dict[str, torch.Tensor]:
        inputs = dict(self.processor(clip, fps=1, skip_unchanged=level, return_tensors="pt"))
        tokens = int(inputs["video_num_frames"]) * self.model.config.tokens_per_frame
        ids = torch.tensor([[*[self.model.config.video_token_id] * tokens, *range(10, 26)]])
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prefill(self, clip: bytes, level: float | bool) -> dict[str, float]:
        self.frames, self.comparing, start = 0, 0.0, time.process_time()
        inputs = self.inputs(clip, level)
        read = time.process_time()
        cache = DynamicCache(config=self.model.config.text_config)
        self.model(**inputs, past_key_values=cache, logits_to_keep=1)
        end = time.process_time()
        kept = memory_in(cache).states.untyped_storage().nbytes()
        self.model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        step = time.process_time() - end
        return {
            "encoded": self.frames,
            "read": read - start,
            "comparing": self.comparing,
            "seconds": end - start,
            "step": step,
            "bytes": kept,
        }

    def logits(self, clip: bytes, level: float | bool) -> torch.Tensor:
        return self.model(**self.inputs(clip, level), logits_to_keep=1).logits[0, -1]

    def tokens(self, clip: bytes, level: float | bool) -> list[int]:
        inputs = self.inputs(clip, level)
        options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        return self.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def count(processor: CrossLMMVideoProcessor, clip: bytes) -> dict[int, int]:
    """Distinct frames by tolerance."""
    streams = {level: processor.stream([clip], fps=1, skip_unchanged=float(level)) for level in TOLERANCES}
    return {level: sum(map(len, stream)) for level, [stream] in streams.items()}


@torch.no_grad()
def measure(watcher: Watcher, clip: bytes) -> dict:
    """Ratios are of the time or bytes with `skip_unchanged` to those without."""
    rounds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for skip, found in rounds.items():
            found.append(watcher.prefill(clip, skip))
    without, skipping = median(rounds[False]), median(rounds[True])
    return {
        "encoded": {"without": without["encoded"], "skipping": skipping["encoded"]},
        "ratio": {name: round(skipping[name] / without[name], 3) for name in ("read", "seconds", "step", "bytes")},
        "comparing": round(skipping["comparing"] / without["seconds"], 5),
        "same_tokens": watcher.tokens(clip, True) == watcher.tokens(clip, False),
    }


@torch.no_grad()
def changed_logits(watcher: Watcher, clip: bytes) -> dict[int, float]:
    """The largest change of the last position's logits by tolerance, in standard deviations of all logits."""
    full = watcher.logits(clip, False)
    changes = {level: (watcher.logits(clip, float(level)) - full).abs().max() for level in TOLERANCES}
    return {level: round(float(change / full.std()), 5) for level, change in changes.items()}


def answers_of_the_tiny_checkpoint(videos: int = 30, num_frames: int = 16) -> dict[str, dict]:
    """Accuracy and the share of distinct frames, by tolerance ("off": without `skip_unchanged`)."""
    model, processor = load_model(str(TINY_CHECKPOINT)), load_processor(str(TINY_CHECKPOINT))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder), split="heldout", seed=1000, num_videos=videos, size=240, fps=8)
        questions = read_questions(Path(folder))
        for name, level in {"off": False, "24": 24.0, "72": 72.0, "128": 128.0}.items():
            processor.video_processor.skip_unchanged = level
            marks, distinct = [], 0
            for asked, inputs in batches_of(processor, questions, num_frames=num_frames):
                answers = answer_questions(model, inputs, processor)
                marks += [answer == question.answer for answer, question in zip(answers, asked, strict=True)]
                distinct += len(inputs["pixel_values_videos"]) // len(asked)
            results[name] = score(marks) | {"distinct": round(distinct / videos / num_frames, 4)}
            print("bundled checkpoint", name, json.dumps(results[name]), flush=True)
    return results


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    about = origin(__file__) | {"av": av.__version__}
    watcher, videos = Watcher("toy"), {}
    for name, (draw, options) in VIDEOS.items():
        clip = encoded(draw, options)
        videos[name] = {"frames": SECONDS, "distinct": count(watcher.processor, clip)}
        if name in TIMED:
            videos[name] |= measure(watcher, clip)
        print(name, json.dumps(videos[name]), flush=True)
    del watcher
    wide = Watcher("full")
    for name in NEAR:
        videos[name]["changed_logits"] = changed_logits(wide, encoded(*VIDEOS[name]))
        print(name, json.dumps(videos[name]["changed_logits"]), flush=True)
    del wide
    results = {"about": about, "videos": videos, "bundled_checkpoint": answers_of_the_tiny_checkpoint()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
