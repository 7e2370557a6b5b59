"""Writes model cards from a config and kept results, so that their numbers cannot become outdated.

    python -m transformers_crosslmm.checkpoints.model_card model_cards

writes the cards of the paper's sizes and of the bundled checkpoint.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_crosslmm import PRESETS, CrossLMMConfig
from .name_tables import BACKBONES
from .network import expected_shapes

TEMPLATE = Path(__file__).parent / "model_card_template.md"

BENCHMARKS = (  # columns of the paper's Table 1
    "MVBench",
    "PerceptionTest",
    "LongVideoBench",
    "MLVU",
    "VideoMME, without subtitles",
    "VideoMME, with subtitles",
)
PAPER_SCORES = {
    # Table 1 of the paper: accuracy in per cent, by size and tokens per frame
    ("2B", 1): (58.6, 58.1, 47.3, 57.6, 55.5, 58.9),
    ("2B", 9): (63.5, 63.5, 51.8, 61.0, 59.1, 61.3),
    ("7B", 1): (62.7, 64.8, 54.5, 64.0, 61.3, 63.7),
    ("7B", 9): (68.2, 68.4, 56.0, 67.2, 62.6, 64.7),
    ("7B-16", 16): (68.8, 71.4, 60.4, 70.7, 65.4, 67.6),
}
PAPER_COSTS: dict[str, tuple[tuple[int, int, int], ...]] = {
    # Figure 4 and Table 6: by size, with 9 tokens per frame, on an H800; frames, memory in MB, prefill in ms
    "2B": ((32, 716, 264), (64, 825, 506), (128, 1047, 910), (256, 1490, 1698)),
    "7B": ((32, 1753, 335), (64, 1864, 578), (128, 2087, 1063), (256, 2530, 1975)),
}
PAPER_DATA = {
    # name in the paper's Appendix A.1: data set on the Hub that we take it to be
    "CapsFusion": "BAAI/CapsFusion-120M",
    "InternVid": "OpenGVLab/InternVid",
    "LLaVA-NeXT": "lmms-lab/LLaVA-NeXT-Data",
    "ALLaVA": "FreedomIntelligence/ALLaVA-4V",
    "ShareGPT-4o": "OpenGVLab/ShareGPT-4o",
    "LLaVA-Interleave": "lmms-lab/M4-Instruct-Data",
    "VideoChat2": "OpenGVLab/VideoChat2-IT",
    "VideoChatGPT-Plus": "MBZUAI/VCG-plus_112K",
    "LLaVA-Video-178K": "lmms-lab/LLaVA-Video-178K",
    "LLaVA-Hound": "ShareGPTVideo/train_video_and_instruction",
    "MovieChat": "Enxin/MovieChat-1K_train",
    "Vript": "Mutonix/Vript",
    "LongVid": "OpenGVLab/LongVid",
}
PAPER_TRAINING = """\
The paper trains in two stages: first projector and cross-attention on 15 M images with captions (CapsFusion) and 5 M
short videos with captions (InternVid), then everything on about 3 M instructions: images (LLaVA-NeXT, ALLaVA,
ShareGPT-4o, LLaVA-Interleave), short videos (VideoChat2, InternVideo2, ShareGPT-4o, VideoChatGPT-Plus,
LLaVA-Video-178K, LLaVA-Hound) and long ones (MovieChat, Vript, LongVid). The names on the Hub in this card's metadata
are what we take these to be; we did not find InternVideo2's instruction data. Each data set has its own terms. Each
stage is one epoch, in batches of 512 and 128: about 39,000 and 23,000 steps. The paper does not give the cost."""
LICENCES = {
    "google/siglip2-so400m-patch14-384": "Apache-2.0",
    "google/siglip2-giant-opt-patch16-384": "Apache-2.0",
    "Qwen/Qwen2.5-1.5B-Instruct": "Apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "Apache-2.0",
}
UNTRAINED = """\
**Untrained.** These weights were composed from other checkpoints and never trained as a CrossLMM: the gates of the
cross-attention have their initial value. Use them as a starting point for training, not to answer questions."""


@dataclass(frozen=True)
class Costs:
    """Parameters by part, cached bytes per frame at 16 bits, and multiply-accumulates per frame."""

    parameters: int
    vision: int
    projector: int
    cross_attention: int
    language_model: int
    features_bytes: int
    kv_bytes: int
    language_bytes: int
    macs_per_frame: int


def counted_costs(config: CrossLMMConfig) -> Costs:
    """Counts parameters, bytes and multiply-accumulates from a config.

    Multiply-accumulates: each weight matrix times the tokens of a frame that pass it, and the encoder's attention.
    Attention of the cross-attention and the language model is left out, because it depends on the video's length.
    """
    text: Any = config.text_config
    patches, tokens = config.patch_grid_size**2, config.tokens_per_frame
    count = dict.fromkeys(("vision", "projector", "cross_attention", "language_model"), 0)
    macs = 2 * patches**2 * config.vision_config.hidden_size * config.num_vision_blocks
    for name, shape in expected_shapes(config).items():
        size = math.prod(shape)
        if name.startswith("model.vision_tower."):
            part, times = "vision", 0 if "position_embedding" in name else patches
        elif name.startswith("model.multi_modal_projector."):
            part, times = "projector", tokens
        elif ".cross_attention." in name:
            is_key_or_value = ".k_proj." in name or ".v_proj." in name
            part, times = "cross_attention", patches if is_key_or_value else tokens if ".v2v." in name else 0
        else:
            part, times = "language_model", tokens if ".layers." in name else 0
        count[part] += size
        macs += size * times if len(shape) > 1 else 0
    head_bytes = 2 * 2 * config.num_key_value_heads * config.head_dim
    cross_layers = len(config.cross_attention_layer_indices) if config.use_t2v else 0
    return Costs(
        parameters=sum(count.values()),
        **count,
        features_bytes=2 * patches * config.vision_config.hidden_size,
        kv_bytes=cross_layers * patches * head_bytes,
        language_bytes=text.num_hidden_layers * tokens * head_bytes,
        macs_per_frame=macs,
    )


def model_card(
    config: CrossLMMConfig,
    *,
    title: str,
    repo: str,
    sources: dict[str, str] | None = None,
    preset: str | None = None,
    results: dict[str, Any] | None = None,
    training_data: str | None = None,
    datasets: list[str] | None = None,
    first_line: str | None = None,
    with_code: bool = False,
) -> ModelCard:
    """Builds the card of a checkpoint.

    sources: {part: name} of its sources; names on the Hub become base models. preset: the size of the paper whose
    figures the card quotes. results: {"rows": [{"name": ..., "value": ...}], "command": ..., "commit": ...,
    "machine": ...}. first_line: the most important thing to know; for untrained weights it is `UNTRAINED`.
    """
    text: Any = config.text_config
    tokens = config.tokens_per_frame
    scores: dict[str, float] = {}
    if preset is not None:
        scores = dict(zip(BENCHMARKS, PAPER_SCORES[preset, tokens], strict=True))
    sources = sources or {}
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        tags=["crosslmm", "video", "multimodal", "arxiv:2505.17020"],
        base_model=[source for source in sources.values() if is_hub_name(source)] or None,
        datasets=datasets,
        model_name=title,
    )
    options = {
        name: getattr(config, name)
        for name, default in (("v2v_scope", "video"), ("visual_norm", "none"), ("visual_time", "none"))
        if getattr(config, name) != default
    }
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        first_line=UNTRAINED if config.untrained else first_line or "Trained as a CrossLMM.",
        title=title,
        repo=repo,
        tokens_per_frame=tokens,
        layers=config.cross_attention_layer_indices,
        depth=text.num_hidden_layers,
        patches=config.patch_grid_size**2,
        grid=config.patch_grid_size,
        pooled=config.pooled_grid_size,
        pooling_mode=config.pooling_mode,
        image_size=config.vision_config.image_size,
        context=config.max_sequence_length,
        costs=counted_costs(config),
        options=", ".join(f"`{name}={value!r}`" for name, value in options.items()) or "none",
        has_time=config.visual_time != "none",
        results=results,
        paper=scores,
        paper_tokens=tokens,
        paper_costs=PAPER_COSTS.get(preset or "", ()),
        training_data=training_data or "Unknown: the publisher of this card has not described it.",
        parts=[
            *(
                {"name": name, "source": source, "licence": LICENCES.get(source, "its source's")}
                for name, source in sources.items()
            ),
            {"name": "code and new weights", "source": "transformers_crosslmm", "licence": "Apache-2.0"},
        ],
        with_code=with_code,
    )


def is_hub_name(source: str) -> bool:
    """Whether a source can be a model's name on the Hub, and is not a path."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def preset_card(preset: str) -> ModelCard:
    """Builds the card of a size of the paper, a start for the card of trained weights."""
    vision, text = BACKBONES[preset]
    return model_card(
        CrossLMMConfig.from_preset(preset),
        title=f"CrossLMM-{preset}",
        repo=f"YOUR_NAME/crosslmm-{preset.lower()}",
        sources={"vision encoder": vision, "language model": text},
        preset=preset,
        training_data=PAPER_TRAINING,
        datasets=list(PAPER_DATA.values()),
        first_line=(
            "**No weights of this size are public, neither the authors' nor ours.** This card describes the size. To "
            f"make weights, run `crosslmm compose --preset {preset}` and train them."
        ),
    )


def results_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Converts a kept evaluation of `measuring.quality` to the `results` of `model_card`."""
    scores = evaluation["scores"]["as_trained"]
    rows = [
        {"name": f"{kind.replace('_', ' ')} ({score['asked']} questions)", "value": f"{score['accuracy']:.1%}"}
        for kind, score in scores.items()
    ]
    return {"rows": rows, **{name: evaluation[name] for name in ("command", "commit", "machine")}}


def tiny_card(folder: Path, results: dict[str, Any] | None) -> ModelCard:
    """Builds the card of the bundled checkpoint."""
    return model_card(
        CrossLMMConfig.from_pretrained(folder),
        title="CrossLMM, tiny",
        repo="YOUR_NAME/crosslmm-tiny",
        results=results,
        training_data=(
            "Videos of moving shapes and questions about them, drawn by "
            "`transformers_crosslmm.tiny.procedural_videos`. There are no photographs among them, and no words other "
            "than those of these questions."
        ),
        first_line="A toy: a tiny model, trained from scratch on synthetic videos to show that the method works.",
    )


def main(out: str) -> None:
    for preset in PRESETS:
        preset_card(preset).save(Path(out) / f"crosslmm-{preset.lower()}.md")
    from .. import TINY_CHECKPOINT

    if (TINY_CHECKPOINT / "config.json").is_file():
        kept = Path(out).parent / "benchmarks" / "tiny_checkpoint.json"
        card = tiny_card(TINY_CHECKPOINT, results_of(json.loads(kept.read_text())) if kept.is_file() else None)
        card.save(Path(out) / "crosslmm-tiny.md")


if __name__ == "__main__":
    main(sys.argv[1])
