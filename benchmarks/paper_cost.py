"""Which reading of the paper's cross-attention fits the paper's own cost figures? Prints the comparison of
docs/decisions.md, D1: multiply-accumulates of one prefill, in T, for each reading of K and V.

    python benchmarks/paper_cost.py
"""

from itertools import product

from transformers_crosslmm import CrossLMMConfig
from transformers_crosslmm.measuring.cost import FRAMES, multiply_accumulates, paper_macs
from transformers_crosslmm.measuring.cost import PAPER as PAPER_FIGURES

PAPER = {preset: PAPER_FIGURES[f"CrossLMM-{preset}"]["macs"] for preset in ("7B", "2B")}


def prefill_macs(preset: str, frames: int, *, projected: bool = False, v2v_scores: bool = False) -> float:
    """Of the preset as the paper counts, or of what it is not: with K and V of `projected` features, for which all
    patches go through the projector, or with the scores of V2V over the whole video."""
    config = CrossLMMConfig.from_preset(preset)
    parts = multiply_accumulates(config, frames)
    macs = paper_macs(config, frames)
    if projected:
        macs += parts["projector"] * (config.patch_grid_size**2 / config.tokens_per_frame - 1)
        macs += parts["keys and values"] * (config.text_config.hidden_size / config.vision_config.hidden_size - 1)
    return macs + parts["V2V scores"] * v2v_scores


if __name__ == "__main__":
    for projected, v2v_scores in product((False, True), repeat=2):
        print(
            f"K and V of {'projected' if projected else 'raw'} features, "
            f"V2V scores {'' if v2v_scores else 'not '}counted"
        )
        for preset, figures in PAPER.items():
            for frames, figure in zip(FRAMES, figures, strict=True):
                counted = prefill_macs(preset, frames, projected=projected, v2v_scores=v2v_scores) / 1e12
                print(
                    f"  {preset} {frames:4d} frames: {counted:7.2f} T, paper {figure:7.2f} T, "
                    f"{counted / figure - 1:+.1%}"
                )
