"""How large pooled tokens should be at the start: as large as words, or as a deviation of 0.02 makes them. A language
model that stays frozen, the tiny checkpoint's vision encoder, and pictures of one colour with its name as the answer.
Writes projector_scale.json beside this file.

    python benchmarks/projector_scale.py LANGUAGE_MODEL [STEPS]

The loss is that of the answer and its end mark on pictures held out.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from origin import origin
from transformers import SiglipVisionModel

from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.checkpoints.compose import compose
from transformers_crosslmm.checkpoints.conversion import write_checkpoint
from transformers_crosslmm.training.samples import CrossLMMDataCollator
from transformers_crosslmm.training.trainer import parameter_groups, train_only

BATCH_SIZE, HELD_OUT, SEEDS = 4, 12, (0, 1)
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 210),
    "yellow": (225, 210, 50),
    "white": (235, 235, 235),
    "black": (25, 25, 25),
}


def draw_records(rng: np.random.Generator, count: int) -> list[dict]:
    """Chats about noisy pictures of one colour each."""
    records = []
    for _ in range(count):
        name = str(rng.choice(list(COLOURS)))
        picture = np.clip(np.array(COLOURS[name]) + rng.normal(0, 20, (60, 60, 3)), 0, 255).astype(np.uint8)
        question = [{"type": "image", "image": picture}, {"type": "text", "text": "Which colour is it?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {name}."}]
        records.append({"messages": turns})
    return records


def train(checkpoint: Path, *, scaled: bool, seed: int, steps: int) -> dict:
    """One run of projector and cross-attention, and its losses."""
    model = CrossLMMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).train()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.model.multi_modal_projector.named_parameters():
            if name.endswith("weight"):
                deviation = float(parameter.std()) if scaled else 0.02
                parameter.normal_(0.0, deviation)
    collator = CrossLMMDataCollator(CrossLMMProcessor.from_pretrained(checkpoint))
    train_only(model, ["projector", "v2v", "t2v"])
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, gate_learning_rate=1e-2))
    rng, held_out = np.random.default_rng(seed), collator(draw_records(np.random.default_rng(10**6), HELD_OUT))
    losses, curve, started = [], {}, time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**collator(draw_records(rng, BATCH_SIZE))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        if step % 5 == 0:
            with torch.no_grad():
                curve[step] = round(model.eval()(**held_out).loss.item(), 4)
            model.train()
            print("as words" if scaled else "0.02", seed, step, losses[-1], curve[step], flush=True)
    return {
        "projector": "as large as words" if scaled else "deviation 0.02",
        "seed": seed,
        "held_out_loss_by_step": curve,
        "training_losses": losses,
        "seconds": round(time.monotonic() - started),
    }


def main(language_model: str, steps: int = 20) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny = CrossLMMForConditionalGeneration.from_pretrained(TINY_CHECKPOINT)
        # The encoder is cut behind the layer that is read; the block after it is drawn anew and not read.
        whole = SiglipVisionModel(tiny.config.vision_config)
        whole.load_state_dict(tiny.model.vision_tower.state_dict(), strict=False)
        whole.save_pretrained(folder / "vision")
        plan = compose(folder / "vision", language_model, pooled_grid_size=1)
        report = write_checkpoint(plan, folder / "composed", try_out=True)
        about = origin(__file__, Path(language_model).name, str(steps))
        result = {**about, "rms": report["rms"], "runs": []}
        for seed in SEEDS:
            for scaled in (True, False):
                result["runs"].append(train(folder / "composed", scaled=scaled, seed=seed, steps=steps))
                Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
