"""At which learning rate the gates of a composed model open: one question about a picture, asked of a tiny SigLIP and
a tiny Qwen2 put together by `compose` (gates 0), all of which learn. Writes gate_learning_rate.json beside this file.

    python benchmarks/gate_learning_rate.py
    python benchmarks/gate_learning_rate.py taught      # writes gate_learning_rate_taught.json

A picture is noise with one patch in one of eight colours, never the middle one, which the pooled token is made of; the
answer is the colour. So the shortest way from the patch to the answer is T2V. The loss is that of the answer and its
end mark on pictures held out: ln 8 / 2 = 1.04 for who does not look.

"taught" is the case of `adapt`: the language model learns the answers' form first, with all gates at 0, and then stays
as it is, so that a branch which opens before it has learned would disturb something.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from origin import origin
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.checkpoints.compose import compose
from transformers_crosslmm.checkpoints.conversion import write_checkpoint
from transformers_crosslmm.tiny.train import build_tokenizer
from transformers_crosslmm.training.samples import CrossLMMDataCollator
from transformers_crosslmm.training.trainer import parameter_groups, train_only

STEPS, BATCH_SIZE, HELD_OUT = 200, 16, 256
SIZE, PATCH = 30, 6
COLOURS = np.array([[r, g, b] for r in (30, 225) for g in (30, 225) for b in (30, 225)], dtype=np.uint8)


def write_composition(folder: Path, *, seed: int = 0) -> Path:
    """A composed checkpoint of random backbones; returns where it lies."""
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    tokenizer = build_tokenizer()
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    Qwen2ForCausalLM(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    plan = compose(folder / "vision", folder / "text", cross_attention_interval=2, pooled_grid_size=1, seed=seed)
    write_checkpoint(plan, folder / "composed")
    return folder / "composed"


def draw_records(rng: np.random.Generator, count: int) -> list[dict]:
    """Chats about pictures, each with one coloured patch."""
    records = []
    grid = SIZE // PATCH
    places = [place for place in range(grid * grid) if place != grid * grid // 2]
    for _ in range(count):
        picture = rng.integers(100, 156, (SIZE, SIZE, 3), dtype=np.uint8)
        row, column = divmod(int(rng.choice(places)), grid)
        answer = int(rng.integers(len(COLOURS)))
        picture[PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)] = COLOURS[answer]
        question = [{"type": "image", "image": picture}, {"type": "text", "text": "Colour?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "abcdefgh"[answer]}]
        records.append({"messages": turns})
    return records


@contextmanager
def switched_off(model: torch.nn.Module, branch: str) -> Iterator[None]:
    """The model with all gates of "v2v" or "t2v" at 0."""
    gates = [p for name, p in model.named_parameters() if name.endswith(f"{branch}.gate.weight")]
    values = [gate.data.clone() for gate in gates]
    for gate in gates:
        gate.data.zero_()
    yield
    for gate, value in zip(gates, values, strict=True):
        gate.data.copy_(value)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, collator: CrossLMMDataCollator) -> float:
    """The loss on pictures that are the same for every run."""
    return float(model.eval()(**collator(draw_records(np.random.default_rng(10**6), HELD_OUT))).loss)


def train(checkpoint: Path, *, learning_rate: float, gate_learning_rate: float, seed: int) -> dict:
    """One run, and what it came to."""
    collator = CrossLMMDataCollator(CrossLMMProcessor.from_pretrained(checkpoint))
    model = CrossLMMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).train()
    groups = parameter_groups(model, learning_rate=learning_rate, gate_learning_rate=gate_learning_rate)
    optimizer = torch.optim.AdamW(groups)
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        model(**collator(draw_records(rng, BATCH_SIZE))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = {"learning_rate": learning_rate, "gate_learning_rate": gate_learning_rate, "seed": seed}
    result["loss"] = held_out_loss(model, collator)
    for branch in ("t2v", "v2v"):
        with switched_off(model, branch):
            result[f"loss_without_{branch}"] = held_out_loss(model, collator)
    for branch in ("t2v", "v2v"):
        gates = [p for name, p in model.named_parameters() if name.endswith(f"{branch}.gate.weight")]
        result[f"largest_{branch}_gate"] = max(abs(torch.tanh(gate).item()) for gate in gates)
    return result


def train_taught(checkpoint: Path) -> Iterator[dict]:
    """Runs from one taught language model, measured twice; `first_loss` is the mean of the first thirty steps."""
    collator = CrossLMMDataCollator(CrossLMMProcessor.from_pretrained(checkpoint))
    model = CrossLMMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)

    def learn(parts: list[str], gate_learning_rate: float, seed: int) -> Iterator[float]:
        train_only(model, parts)
        groups = parameter_groups(model, learning_rate=1e-3, gate_learning_rate=gate_learning_rate)
        optimizer = torch.optim.AdamW(groups)
        rng = np.random.default_rng(seed)
        while True:
            loss = model.train()(**collator(draw_records(rng, BATCH_SIZE))).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    list(islice(learn(["language_model"], 1e-3, seed=99), 250))
    taught = {name: value.clone() for name, value in model.state_dict().items()}
    taught_loss = held_out_loss(model, collator)
    for seed in range(3):
        for gate_learning_rate in (1e-3, 1e-2):
            model.load_state_dict(taught)
            steps = learn(["projector", "v2v", "t2v"], gate_learning_rate, seed)
            first = list(islice(steps, 30))
            for done, more in ((300, 270), (600, 300), (1500, 900)):
                list(islice(steps, more))
                result = {"gate_learning_rate": gate_learning_rate, "seed": seed, "steps": done}
                result |= {"loss": held_out_loss(model, collator), "taught_loss": taught_loss}
                with switched_off(model, "t2v"):
                    result["loss_without_t2v"] = held_out_loss(model, collator)
                yield result | {"first_loss": float(np.mean(first))}


def save(case: str | None, what: str, runs: list[dict]) -> None:
    """Writes the result of a case, with where it was made."""
    result = {"what": what, **origin(__file__, *filter(None, [case])), "runs": runs}
    file = Path(__file__).with_name("_".join(["gate_learning_rate", *filter(None, [case])]) + ".json")
    file.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=["taught"], help="the case of adapt; without it, all parts learn")
    case = parser.parse_args().case
    if case == "taught":
        taught: list[dict] = []
        with tempfile.TemporaryDirectory() as folder:
            for result in train_taught(write_composition(Path(folder))):
                taught.append(result)
                save(case, "the same, cross-attention after the language model", taught)
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_composition(Path(folder))
        for learning_rate in (3e-4, 1e-3, 3e-3):
            for gate_learning_rate in (1e-5, 1e-3, 1e-2):
                for seed in range(3):
                    runs.append(
                        train(
                            checkpoint, learning_rate=learning_rate, gate_learning_rate=gate_learning_rate, seed=seed
                        )
                    )
                    print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    save(case, f"a composed tiny model after {STEPS} steps of {BATCH_SIZE}, gates at three learning rates", runs)


if __name__ == "__main__":
    main()
