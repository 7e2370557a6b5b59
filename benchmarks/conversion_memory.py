"""What composing a full-size 2B holds in memory and how long it takes, on random weights of the real sizes. Needs 9 GB
of disk for a few minutes; writes conversion_memory.json beside this file.

    python benchmarks/conversion_memory.py [FOLDER_FOR_THE_WEIGHTS]
"""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from origin import origin
from transformers import Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from transformers_crosslmm.checkpoints.folder import SHARD_BYTES, StoredTensor, write_weights
from transformers_crosslmm.configuration_crosslmm import PRESETS, CrossLMMConfig

HERE = Path(__file__).parent
TOGETHER = 10**12  # bytes: in one file, as both are published


def write_backbone(folder: Path, model_class: type, config, dtype: torch.dtype) -> int:
    """A checkpoint of these sizes, every tensor a piece of the same million random numbers; returns its bytes."""
    folder.mkdir()
    config.save_pretrained(folder)
    numbers = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        state = model_class(config).state_dict()
    if getattr(config, "tie_word_embeddings", False):
        del state["lm_head.weight"]

    def values(shape: torch.Size) -> torch.Tensor:
        repeated = numbers.repeat(shape.numel() // len(numbers) + 1)[: shape.numel()]
        return repeated.to(dtype).view(shape)

    tensors = {name: StoredTensor(tuple(t.shape), dtype, partial(values, t.shape)) for name, t in state.items()}
    write_weights(folder, tensors, TOGETHER)
    return sum(tensor.num_bytes for tensor in tensors.values())


def peak_and_seconds(code: str) -> tuple[int, float]:
    """The most memory that a process of its own has resident while it runs this code, and how long it takes."""
    measured = f"{code}\nprint([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", measured], check=True, stdout=subprocess.PIPE, text=True)
    _, kibibytes, _ = done.stdout.splitlines()[-2].split()
    return int(kibibytes) * 1024, time.monotonic() - started


def main(where: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=where) as temporary:
        folder = Path(temporary)
        vision_config = SiglipVisionConfig(**PRESETS["2B"]["vision_config"])
        vision_bytes = write_backbone(folder / "vision", SiglipVisionModel, vision_config, torch.float32)
        text_config = CrossLMMConfig().text_config
        text_bytes = write_backbone(folder / "text", Qwen2ForCausalLM, text_config, torch.bfloat16)
        imports, _ = peak_and_seconds("import transformers_crosslmm.checkpoints.commands")
        peak, seconds = peak_and_seconds(
            f"from crosslmm_cli import app\n"
            f"app(['compose', '--preset', '2B', '--out', {str(folder / 'out')!r}, '--vision', "
            f"{str(folder / 'vision')!r}, '--text', {str(folder / 'text')!r}], standalone_mode=False)"
        )
        report = json.loads((folder / "out" / "conversion_report.json").read_text())
    result = origin(__file__) | {
        "what": "crosslmm compose --preset 2B, random weights of the real sizes",
        "bytes_read": {"vision, float32": vision_bytes, "text, bfloat16": text_bytes},
        "bytes_written": report["bytes"],
        "shard_bytes_at_most": SHARD_BYTES,
        "largest_shard_bytes": report["largest_shard_bytes"],
        "peak_resident_bytes": peak,
        "peak_resident_bytes_of_imports_alone": imports,
        "seconds_including_entropy": round(seconds, 1),
    }
    (HERE / "conversion_memory.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
