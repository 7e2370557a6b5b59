"""Draws docs/images/cost.png, after the paper's Figure 4: memory, multiply-accumulates and prefill time of 7B models.

python docs/draw_cost.py [RESULTS.json PICTURE.png]  # results of `crosslmm bench`; the kept ones, if none are given
"""

import json
import sys
from pathlib import Path
from typing import Any

from transformers_crosslmm.measuring.cost import FRAMES, PAPER

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "cost_counted.json", ROOT / "docs" / "images" / "cost.png"
COLOURS = {
    "CrossLMM-7B video features": "#4f46e5",
    "CrossLMM-7B frame features": "#a5a8ef",
    "LLaVA-OneVision-7B": "#b45309",
    "Qwen2.5-VL-7B": "#0f766e",
    "Qwen3-VL-8B": "#6b7280",
}
PAPER_COLOURS = {"CrossLMM-7B": "#4f46e5", "LLaVA-OneVision-7B": "#b45309"}
INK, GREY = "#1f2937", "#6b7280"


def lines(results: dict[str, Any]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Per panel and model: frames, and what it came to."""
    timed = results.get("timed", []) if results["size"] == "full" else []
    values = {
        "memory": [(row, row["cache_bytes"] / 1e6) for row in results["counted"]],
        "macs": [(row, row["macs"]["total"] / 1e12) for row in results["counted"]],
        "prefill": [(row, row["seconds"]["prefill"] * 1000) for row in timed],
    }
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for panel, points in values.items():
        panels[panel] = {}
        for row, value in points:
            if row["model"] in COLOURS and row["frames"] in FRAMES:
                frames, found = panels[panel].setdefault(row["model"], ([], []))
                frames.append(row["frames"])
                found.append(value)
    return panels


def draw(results: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.family": ["DejaVu Sans"], "font.size": 10, "text.color": INK}
    from matplotlib import pyplot

    titles = {
        "memory": ("MB: counted, what a prefill keeps;\nthe paper's, measured, with activations"),
        "macs": "T multiply-accumulates of a prefill,\nevery term counted",
        "prefill": "ms of a prefill",
    }
    panels = lines(results)
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.6))
    for place, (panel, title) in zip(axes, titles.items(), strict=True):
        for model, (frames, found) in panels[panel].items():
            place.plot(frames, found, marker="o", markersize=4, color=COLOURS[model], label=f"{model}, here")
        for model, colour in PAPER_COLOURS.items():
            style = {"linestyle": ":", "marker": "s", "markersize": 5, "markerfacecolor": "white"}
            place.plot(FRAMES, PAPER[model][panel], color=colour, label=f"{model}, the paper's", **style)
        place.set(yscale="log", xscale="log", xlabel="frames", xticks=FRAMES, xticklabels=[str(n) for n in FRAMES])
        place.set_title(title, fontsize=10)
        place.minorticks_off()
        place.grid(color="#e5e7eb", linewidth=0.8)
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
    if not panels["prefill"]:
        axes[2].set_title("ms of a prefill, the paper's on an H800;\nours: not measured, no GPU yet", fontsize=10)
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.88, bottom=0.25, wspace=0.18)
    figure.savefig(picture, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    results, picture = map(Path, sys.argv[1:]) if sys.argv[1:] else (RESULTS, PICTURE)
    draw(json.loads(results.read_text(encoding="utf-8")), picture)
