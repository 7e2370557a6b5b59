"""Which branch carries the picture into a frozen real language model, and how fast gates should learn: short runs of
the first level of examples/laptop. Writes laptop_branches.json beside this file; runs that it has are not repeated.

    python benchmarks/laptop_branches.py runs/laptop [SEED ...]

runs/laptop: where road.sh has put parts and clips; all runs of the file are on the same chats. A run is 120 steps of 8
chats about clips of one second. Every chat is seen once, so its loss is that of a clip that the model has not seen.
"""

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

from origin import origin

from transformers_crosslmm.checkpoints.compose import compose
from transformers_crosslmm.checkpoints.conversion import write_checkpoint
from transformers_crosslmm.training.trainer import main as train

HERE = Path(__file__).parent
KEPT = HERE / "laptop_branches.json"
STEPS, BATCH_SIZE = 120, 8
ARMS: dict[str, tuple[bool, bool, str]] = {
    "both": (True, True, "1e-2"),
    "both, gates at 1e-3": (True, True, "1e-3"),
    "T2V": (False, True, "1e-2"),
    "V2V": (True, False, "1e-2"),
    "neither": (False, False, "1e-2"),
}
"""Of each arm: whether it has V2V, T2V, and the rate of its gates."""


def run(folder: Path, arm: str, seed: int) -> dict:
    use_v2v, use_t2v, gate_rate = ARMS[arm]
    parts = ["projector", *(name for name, used in (("v2v", use_v2v), ("t2v", use_t2v)) if used)]
    fields = {"flavour": "recommended", "pooled_grid_size": 1, "use_v2v": use_v2v, "use_t2v": use_t2v, "seed": seed}
    with tempfile.TemporaryDirectory() as temporary:
        composed, out = Path(temporary) / "composed", Path(temporary) / "out"
        write_checkpoint(compose(folder / "vision", folder / "text", **fields), composed)
        options = ["--model", composed, "--output_dir", out, "--train_data", folder / "clips" / "train-1.jsonl"]
        options += ["--media_root", folder / "clips", "--seed", seed, "--gate_learning_rate", gate_rate]
        options += ["--max_steps", STEPS, "--global_batch_size", BATCH_SIZE, "--save_strategy", "no"]
        began = time.process_time()
        train(
            [str(HERE.parent / "examples" / "laptop" / "recipe.yaml"), *map(str, options), "--trained_parts", *parts]
        )
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {
        "arm": arm,
        "seed": seed,
        "losses": [[entry["step"], round(float(entry["loss"]), 4)] for entry in log if "loss" in entry],
        "cpu_seconds": round(time.process_time() - began),
    }


def main(folder: Path, seeds: list[int]) -> None:
    chats = hashlib.sha256((folder / "clips" / "train-1.jsonl").read_bytes()).hexdigest()
    kept = {**origin(__file__, "runs/laptop"), "chats": chats, "runs": []}
    if KEPT.is_file():
        kept = json.loads(KEPT.read_text())
    if kept.get("chats") != chats:
        raise SystemExit(
            f"{KEPT} has runs on other chats (commit {kept['commit']}), so these cannot be compared to them. Move it "
            "away."
        )
    for seed in seeds:
        for arm in ARMS:
            if (arm, seed) not in [(done["arm"], done["seed"]) for done in kept["runs"]]:
                kept["runs"].append(run(folder, arm, seed))
                KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0])
