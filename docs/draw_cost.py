"""Draws docs/images/cost.png: memory per frame and multiply-accumulates of a prefill of 7B models, and of an hour.

python docs/draw_cost.py [RESULTS.json PICTURE.png]  # results of `crosslmm bench`; the kept ones, if none are given
Times of a prefill are a third chart, if the results have them at full size.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers_crosslmm import CrossLMMConfig
from transformers_crosslmm.measuring.cost import FRAMES, multiply_accumulates

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "cost_counted.json", ROOT / "docs" / "images" / "cost.png"
MODELS = {
    "CrossLMM-7B video features": ('CrossLMM-7B,\n"features"', "#4f46e5"),
    "CrossLMM-7B video kv": ('CrossLMM-7B,\n"kv" (default)', "#4f46e5"),
    "Qwen2.5-VL-7B": ("Qwen2.5-VL-7B", "#0f766e"),
    "Qwen3-VL-8B": ("Qwen3-VL-8B", "#6b7280"),
    "LLaVA-OneVision-7B": ("LLaVA-\nOneVision-7B", "#b45309"),
}
INK = "#1f2937"
HOURS = {
    f'{what},\nscope "{scope}"': (scope, d)
    for scope in ("video", "frame")
    for what, d in (("film", None), ("slides", 60))
}
SHARES = {
    "encoder": ("vision", "#4f46e5"),
    "V2V": ("V2V scores", "#a5b4fc"),
    "language model and others": (None, "#9ca3af"),
}


def draw_bars(place: Any, rows: list[dict[str, Any]]) -> None:
    """MB that a frame keeps, of each model at its largest number of frames."""
    most = {row["model"]: row for row in rows}
    for place_of_model, (model, (_, colour)) in enumerate(MODELS.items()):
        kept = most[model]["cache_bytes"] / most[model]["frames"] / 1e6
        place.barh(place_of_model, kept, 0.62, color=colour)
        place.text(kept + 0.15, place_of_model, f"{kept:.1f}", va="center")
    place.set(yticks=range(len(MODELS)), yticklabels=[name for name, _ in MODELS.values()], xlim=(0, 12.9), xticks=[])
    place.invert_yaxis()
    place.tick_params(left=False)
    place.spines["bottom"].set_visible(False)


def draw_lines(place: Any, points: dict[str, dict[int, float]]) -> None:
    for model, values in points.items():
        name, colour = MODELS[model]
        name = name.split(",")[0].replace("\n", "")
        place.plot(list(values), list(values.values()), marker="o", markersize=5, color=colour)
        place.annotate(
            name,
            (FRAMES[-1], values[FRAMES[-1]]),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=11,
        )
    place.set(yscale="log", xscale="log", xlabel="frames", xticks=FRAMES, xticklabels=[str(n) for n in FRAMES])
    place.set_xlim(FRAMES[0] * 0.9, FRAMES[-1] * 6)
    place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    place.minorticks_off()
    place.grid(color="#e5e7eb", linewidth=0.8)


def draw_hours(place: Any) -> None:
    """T multiply-accumulates of 3,600 frames of the 7B, all different or of 60 slides, by part."""
    for row, (scope, distinct) in enumerate(HOURS.values()):
        config = CrossLMMConfig.from_preset("7B", long_context=True)
        config.v2v_scope, config.cross_attention_cache = scope, "features"
        parts = multiply_accumulates(config, 3600, distinct=distinct)
        left = 0.0
        for name, (part, colour) in SHARES.items():
            macs = (parts[part] if part else sum(parts.values()) - left * 1e12) / 1e12
            place.barh(row, macs, 0.62, left=left, color=colour, label=name if row == 0 else None)
            left += macs
        place.text(left + 60, row, f"{left:,.0f}", va="center")
    place.set(yticks=range(len(HOURS)), yticklabels=list(HOURS), xlim=(0, 7000), xticks=[])
    place.invert_yaxis()
    place.tick_params(left=False)
    place.spines["bottom"].set_visible(False)
    place.legend(frameon=False, fontsize=11, loc="lower right")


def draw(results: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.family": ["DejaVu Sans"], "font.size": 12, "text.color": INK}
    from matplotlib import pyplot

    def points(rows: list[dict[str, Any]], value: Any) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["model"] in MODELS and "kv" not in row["model"] and row["frames"] in FRAMES:
                found.setdefault(row["model"], {})[row["frames"]] = value(row)
        return found

    timed = results.get("timed", []) if results["size"] == "full" else []
    bars = {
        "MB kept per frame, bfloat16": lambda place: draw_bars(
            place, [row for row in results["counted"] if row["frames"] in FRAMES]
        ),
        "the same of an hour, CrossLMM-7B": draw_hours,
    }
    charts: dict[str, dict[str, dict[int, float]]] = {
        "T multiply-accumulates of a prefill": points(results["counted"], lambda row: row["macs"]["total"] / 1e12),
    }
    if timed:
        charts["ms of a prefill"] = points(timed, lambda row: row["seconds"]["prefill"] * 1000)
    drawn = list(bars.items())
    drawn[1:1] = [(title, partial(draw_lines, points=lines)) for title, lines in charts.items()]
    figure, axes = pyplot.subplots(len(drawn), 1, figsize=(5.2, 3.9 * len(drawn)), layout="constrained")
    for place, (title, draw_on) in zip(axes, drawn, strict=True):
        draw_on(place)
        place.set_title(title, fontsize=12.5, fontweight="bold", loc="left")
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
    figure.savefig(picture, dpi=140, metadata={"Software": None})


if __name__ == "__main__":
    results, picture = map(Path, sys.argv[1:]) if sys.argv[1:] else (RESULTS, PICTURE)
    draw(json.loads(results.read_text(encoding="utf-8")), picture)
