"""Which reading of the paper's cross-attention fits the paper's own cost figures? Prints the comparison of
docs/decisions.md, D1: multiply-accumulates of one prefill, in T, for each reading of K and V.

    python benchmarks/paper_cost.py
"""

from itertools import product

FRAMES = (32, 64, 128, 256)
PAPER = {"7B": (13.17, 25.92, 51.43, 102.42), "2B": (10.93, 21.77, 43.46, 86.82)}
LLM = {
    "7B": {"width": 3584, "mlp": 18944, "kv": 4 * 128, "vocabulary": 152_064},
    "2B": {"width": 1536, "mlp": 8960, "kv": 2 * 128, "vocabulary": 151_936},
}
D, VISION_MLP, VISION_BLOCKS, N, POOLED, LAYERS, CROSS_LAYERS, TEXT_TOKENS = 1152, 4304, 26, 729, 9, 28, 7, 64


def prefill_macs(size: str, frames: int, *, projected: bool = False, v2v_scores: bool = False) -> float:
    """Multiply-accumulates of a prefill without the language model's own attention scores, which the paper's figures,
    linear in the number of frames, leave no room for."""
    llm = LLM[size]
    width, tokens = llm["width"], frames * POOLED + TEXT_TOKENS
    vision = frames * N * (3 * 14 * 14 * D + VISION_BLOCKS * (4 * D * D + 2 * D * VISION_MLP + 2 * N * D))
    projector = frames * (N if projected else POOLED) * (D * width + width * width)
    language = tokens * LAYERS * (2 * width * width + 2 * width * llm["kv"] + 3 * width * llm["mlp"])
    keys_values = CROSS_LAYERS * 2 * 2 * frames * N * (width if projected else D) * llm["kv"]
    queries = CROSS_LAYERS * 2 * tokens * width * width
    scores = CROSS_LAYERS * 2 * TEXT_TOKENS * frames * N * width
    if v2v_scores:
        scores += CROSS_LAYERS * 2 * frames * POOLED * frames * N * width
    return vision + projector + language + keys_values + queries + scores + width * llm["vocabulary"]


if __name__ == "__main__":
    for projected, v2v_scores in product((False, True), repeat=2):
        print(
            f"K and V of {'projected' if projected else 'raw'} features, "
            f"V2V scores {'' if v2v_scores else 'not '}counted"
        )
        for size, figures in PAPER.items():
            for frames, figure in zip(FRAMES, figures, strict=True):
                counted = prefill_macs(size, frames, projected=projected, v2v_scores=v2v_scores) / 1e12
                print(
                    f"  {size} {frames:4d} frames: {counted:7.2f} T, paper {figure:7.2f} T, "
                    f"{counted / figure - 1:+.1%}"
                )
