"""Small things that many tests build: each call builds a new one, so that no test can spoil another's."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CompileConfig, Qwen2Tokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from transformers_crosslmm import (
    CrossLMMConfig,
    CrossLMMForConditionalGeneration,
    CrossLMMProcessor,
    CrossLMMVideoProcessor,
)
from transformers_crosslmm.configuration_crosslmm import CROSS_ATTENTION_FIELDS

VISION = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 33,
    "patch_size": 6,
}
"""Fields of the vision encoder of `tiny_config()`."""


def tiny_config(
    *, text_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None, **overrides: Any
) -> CrossLMMConfig:
    """A new CrossLMM config with a 5×5 patch grid (and 3 pixels to spare), five decoder layers and no two sizes alike.

    text_config, vision_config: fields that differ from the tiny ones; those of the cross-attention may stand among the
    former. overrides: fields of the top config. A config belongs to one model: building a model writes the attention
    implementation into it, so ask for one each time.
    """
    text = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
    }
    top = {"image_token_id": 127, "video_token_id": 128, "pooled_grid_size": 3, "vision_chunk_size": 4} | overrides
    own = {name: value for name, value in (text_config or {}).items() if name not in CROSS_ATTENTION_FIELDS}
    top |= {name: value for name, value in (text_config or {}).items() if name in CROSS_ATTENTION_FIELDS}
    if "cross_attention_layers" not in top:
        top.setdefault("cross_attention_interval", 2)
    model_type = own.get("model_type", "qwen2")
    return CrossLMMConfig(
        text_config=text | own | {"model_type": model_type}, vision_config=VISION | (vision_config or {}), **top
    )


def random_model(
    config: CrossLMMConfig, *, attn_implementation: str | None = None, seed: int = 0
) -> CrossLMMForConditionalGeneration:
    """A model in eval mode whose every parameter matters: seeded normal weights, norms off 1, gates far from 0.

    With Transformers' own initialisation (0.02, zero biases, our zero gates) most of the network adds next to nothing
    to the logits, and a comparison would not see it.
    """
    model = CrossLMMForConditionalGeneration._from_config(config, attn_implementation=attn_implementation).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("2v.gate.weight"):
                value = noise.sign() * (0.5 + noise.abs())  # tanh of it is far from the gate itself
            elif "norm" in name and name.endswith("weight"):
                value = 1 + 0.3 * noise
            elif parameter.ndim == 1:
                value = 0.3 * noise
            elif "embed" in name and parameter.ndim == 2:
                value = noise
            else:
                fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()  # 3: experts
                value = noise / fan_in**0.5  # keeps the size of what goes through
            parameter.copy_(value)
    return model


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from where Transformers' initialisation leaves it, so that none can be confused."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def traced() -> dict[str, Any]:
    """Options with which `generate` traces its step with Dynamo, without a break, and runs what was traced."""
    torch.compiler.reset()
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True  # CPUs too
    return {"cache_implementation": "static", "compile_config": compile_config}


def tiny_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 tokenizer whose vocabulary is the 256 bytes, three merges and Qwen2.5's marks for roles and media."""
    merges = [("<", "|"), ("|", ">"), ("i", "m")]  # so that a mark cut in pieces shows in the ids
    vocabulary = [*sorted(ByteLevel.alphabet()), *map("".join, merges)]
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return Qwen2Tokenizer(
        vocab={token: token_id for token_id, token in enumerate(vocabulary)},
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=marks,
    )


def tiny_processor(**overrides: Any) -> CrossLMMProcessor:
    """The processor of `tiny_config()`: frames of 33×33, a 5×5 patch grid, nine tokens per frame."""
    size = {"height": 33, "width": 33}
    fields = {
        "image_processor": SiglipImageProcessorPil(size=size),
        "tokenizer": tiny_tokenizer(),
        "video_processor": CrossLMMVideoProcessor(size=size),
        "pooled_grid_size": 3,
        "patch_size": 6,
    }
    return CrossLMMProcessor(**(fields | overrides))


def random_frames(num_frames: int = 10, *, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """(T, H, W, 3) uint8: smooth pictures, no two alike, that a video codec keeps nearly as they are."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (num_frames, 3, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), Image.BICUBIC)) for frame in coarse])


def mp4_of(frames: np.ndarray, *, fps: int) -> bytes:
    """An H.264 file of (T, H, W, 3) frames shown 1/fps seconds each; H and W even."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def save_checkpoint(folder: Path, *, text_config: dict[str, Any] | None = None, **overrides: Any) -> None:
    """A random model and the processor it fits, as a user would have them on disk; for the rest see `tiny_config`."""
    processor = tiny_processor()
    config = tiny_config(
        text_config={"vocab_size": len(processor.tokenizer)} | (text_config or {}),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        **overrides,
    )
    random_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_training_data(folder: Path) -> None:
    """Under `media` and `data.jsonl`: five questions about clips of 2 to 4 frames, two that have no video, one about
    a picture. No two have answers of one length, so that a mean over samples is not one over tokens."""
    (folder / "media").mkdir(parents=True)
    lines = []
    for i in range(8):
        record: dict[str, Any] = {"id": f"record {i}"}
        if i in (0, 2, 3, 5, 6):
            record["video"] = f"{i}.mp4"
            (folder / "media" / f"{i}.mp4").write_bytes(mp4_of(random_frames(2 + i % 3, seed=i), fps=1))
        elif i == 7:
            record["image"] = f"{i}.png"
            Image.fromarray(random_frames(1, seed=i)[0]).save(folder / "media" / f"{i}.png")
        mark = "<image>\n" if len(record) > 1 else ""
        answer = " and ".join(["This"] * (i + 1))
        turns = [{"from": "human", "value": f"{mark}What?"}, {"from": "gpt", "value": f"{answer}."}]
        lines.append(json.dumps(record | {"conversations": turns}))
    (folder / "data.jsonl").write_text("\n".join(lines))
