"""Draws docs/memory.svg: what a 7B keeps of an hour of video while it answers, counted from the preset.

python docs/draw_memory.py
"""

from pathlib import Path

from transformers_crosslmm import CrossLMMConfig
from transformers_crosslmm.checkpoints.inspect import count_costs

PICTURE = Path(__file__).parent / "memory.svg"
FRAMES = 3600  # an hour at 1 frame per second
INK, GREY = "#1f2937", "#6b7280"
TEXT_COLOUR, PATCH_COLOUR, WEIGHTS_COLOUR = "#a5a8ef", "#f5b85c", "#d1d5db"


def bars() -> list[tuple[str, float, float]]:
    """Per way of keeping a video: its name, GB of the language model's own cache, GB kept of the original tokens."""
    config = CrossLMMConfig.from_preset("7B")
    costs = count_costs(config)
    own = costs.language_bytes_per_frame
    everything = own / config.tokens_per_frame * config.patch_grid_size**2
    kept = costs.cache_bytes_per_frame
    gigabytes = FRAMES / 1e9
    return [
        ("all 729 patches of a frame in the context", everything * gigabytes, 0.0),
        ('CrossLMM, cross_attention_cache="kv" (default)', own * gigabytes, kept["kv"] * gigabytes),
        ('CrossLMM, cross_attention_cache="features"', own * gigabytes, kept["features"] * gigabytes),
    ]


def labels() -> list[str]:
    return [f"+ {context + patches:.1f} GB" for _, context, patches in bars()]


def draw() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "memory",
        "font.family": ["DejaVu Sans"],
        "font.size": 11,
        "text.color": INK,
    }
    from matplotlib import pyplot

    weights = count_costs(CrossLMMConfig.from_preset("7B")).weight_bytes / 1e9
    figure, axes = pyplot.subplots(figsize=(5.6, 4.4))
    height = 0.36
    for row, ((name, context, patches), label) in enumerate(zip(bars(), labels(), strict=True)):
        axes.barh(row, weights, height, color=WEIGHTS_COLOUR)
        axes.barh(row, context, height, left=weights, color=TEXT_COLOUR)
        axes.barh(row, patches, height, left=weights + context, color=PATCH_COLOUR)
        end = axes.text(weights + context + patches + 2, row, label, va="center", fontweight="bold")
        end.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        axes.text(0, row - 0.32, name, va="center").set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    for memory in (24, 80, 141):
        axes.vlines(memory, -0.55, 2.3, color=GREY, linestyle=(0, (2, 3)), linewidth=1, zorder=0)
        axes.text(memory, -0.72, f"{memory} GB", color=GREY, ha="center", fontsize=10)
    axes.text(0, -0.95, "memory of a GPU:", color=GREY, fontsize=10)
    axes.set(xlim=(0, 200), ylim=(3.35, -1.1), yticks=[], xticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.vlines(0, -0.55, 2.3, color=GREY, linewidth=1)
    for row, (colour, words) in enumerate(
        (
            (WEIGHTS_COLOUR, f"weights: {weights:.1f} GB"),
            (TEXT_COLOUR, "keys and values of the context"),
            (PATCH_COLOUR, "original tokens, or T2V's keys and values of them"),
        )
    ):
        axes.add_patch(pyplot.Rectangle((0, 2.5 + 0.3 * row), 5, 0.2, color=colour))
        axes.text(8, 2.6 + 0.3 * row, words, va="center", fontsize=10)
    figure.suptitle(f"One hour of video, {FRAMES:,} frames, 7B in bfloat16", fontweight="bold", fontsize=13, y=0.97)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.92, bottom=0.02)
    figure.savefig(PICTURE, metadata={"Date": None, "Title": "What an hour of video takes while a 7B answers"})


if __name__ == "__main__":
    draw()
