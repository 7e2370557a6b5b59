"""Whether a model of examples/laptop tells times apart: two things that differ in everything, one after the other, and
for the first and the last second whether the colour of the true thing is likelier than that of the other, right after
the second's number. Blindly: half. Adds to laptop_times.json beside this file.

    python benchmarks/laptop_times.py MODEL SECONDS [NUM_VIDEOS]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from origin import commit

from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.measuring.quality import score
from transformers_crosslmm.tiny.procedural_videos import random_generator, write_mp4
from transformers_crosslmm.training.samples import CrossLMMDataCollator, encode_chat

HERE = Path(__file__).parent
KEPT = HERE / "laptop_times.json"
sys.path.insert(0, str(HERE.parent / "examples" / "laptop"))
from clips import pair, slowed  # noqa: E402


@torch.no_grad()
def marks(model, processor, folder: Path, *, num_seconds: int, num_videos: int) -> list[bool]:
    processor.video_processor.fps = 1.0
    right = []
    for index in range(num_videos):
        rng = random_generator(seed=77, split="heldout", index=index)
        video = slowed(pair(rng, "heldout"), num_seconds // 2)
        file = f"{index}.mp4"
        write_mp4(video, folder / file, size=120, fps=2)
        for second in (1, num_seconds):
            own, other = (video.scenes[k - 1][0].thing for k in (second, num_seconds + 1 - second))
            said = [
                {"from": "human", "value": f"<video>\nWhat do you see in second {second}?"},
                {"from": "gpt", "value": f"Second {second}"},
            ]
            sample = encode_chat(processor, {"video": file, "conversations": said}, media_root=folder)
            inputs = CrossLMMDataCollator(processor)([sample])
            last = int((inputs.pop("labels")[0] != -100).nonzero()[-1]) - 1  # the end mark comes after the number
            while processor.tokenizer.decode(inputs["input_ids"][0, last]).strip() != str(second):
                last -= 1
            logits = model(**inputs).logits[0, last]
            one, two = (
                processor.tokenizer(f" {thing.colour}", add_special_tokens=False)["input_ids"][0]
                for thing in (own, other)
            )
            right.append(bool(logits[one] > logits[two]))
    return right


def main(folder: Path, num_seconds: int, num_videos: int) -> None:
    model = CrossLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CrossLMMProcessor.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as temporary:
        right = marks(model, processor, Path(temporary), num_seconds=num_seconds, num_videos=num_videos)
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else []
    kept.append({"model": folder.name, "seconds": num_seconds, "commit": commit()} | score(right))
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    print(kept[-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 40)
