"""What the runs kept in benchmarks/ablation.json say: effects with intervals, and docs/ablation.svg, their picture.

python docs/draw_ablation.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "ablation.svg"
INK, GREY, COLOUR = "#1f2937", "#6b7280", "#4f46e5"

EFFECTS: dict[str, list[tuple[str, str, str]]] = {
    "Table 2a": [
        ("T2V alone against neither", "t2v", "none"),
        ("V2V alone against neither", "v2v", "none"),
        ("both against neither", "both", "none"),
        ("both against T2V alone", "both", "t2v"),
        ("both against V2V alone", "both", "v2v"),
    ],
    "Table 2b": [("K = 1 against K = 2", "interval_1", "both"), ("K = 4 against K = 2", "interval_4", "both")],
    "Table 2c": [
        ("T2V in both stages against the second only", "stages_t2v", "stages"),
        ("two stages against one", "stages", "both"),
    ],
    "what V2V sees": [
        ('v2v_scope="video" against "frame"', "scope_video", "both"),
        ('v2v_scope="causal" against "frame"', "scope_causal", "both"),
    ],
    "norm and time": [
        ("with visual_time against without", "both", "no_time"),
        ("with visual_norm against without, no time", "no_time", "no_norm"),
    ],
    "the question": [
        ("before the video against after it", "question_before", "both"),
        ("on both sides against after it", "question_both", "both"),
        ("V2V alone: before against after", "v2v_question_before", "v2v"),
    ],
    "gates": [
        ("gate_init=0 against 1", "gate_0", "both"),
        ("gate_init=0: gates 10 × as fast", "gate_0_fast", "gate_0"),
        ("gates that hardly learn (1e-5)", "gate_still", "both"),
    ],
    "pooling": [("average against bilinear", "average", "both")],
    "all at once": [("the paper's defaults against ours", "paper", "both")],
}
"""Under each heading: words, the arm, and the arm it is compared with."""


def load_runs() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The runs of the most common length, and what is said about them."""
    kept = json.loads((ROOT / "benchmarks" / "ablation.json").read_text(encoding="utf-8"))
    lengths = [run["steps"] for run in kept["runs"]]
    steps = max(set(lengths), key=lengths.count)
    return [run for run in kept["runs"] if run["steps"] == steps], {**kept["about"], "steps": steps}


def as_numbers(run: Mapping[str, Any]) -> np.ndarray:
    """(videos, kinds): 1, 0, or NaN where nothing was asked."""
    return np.array([[np.nan if mark == "-" else float(mark) for mark in marks] for marks in run["right"].values()]).T


def interval(values: Sequence[np.ndarray], *, draws: int = 4000) -> np.ndarray:
    """Mean, lower and upper end of the 95 % interval, of each kind and, last, of their mean: (3, kinds + 1).

    Bootstrap over seeds and, within each, over videos.
    values: of each seed (videos, kinds), NaN where nothing was asked.
    """
    rng = np.random.default_rng(0)
    shares = []
    for per_video in values:
        counts = rng.multinomial(len(per_video), np.full(len(per_video), 1 / len(per_video)), size=draws)
        shares.append((counts @ np.nan_to_num(per_video)) / (counts @ ~np.isnan(per_video)))
    by_seed = np.stack(shares)  # (seeds, draws, kinds)
    chosen = rng.integers(len(values), size=(len(values), draws))
    # A seed that is drawn twice brings different videos each time.
    drawn = np.mean([by_seed[seeds, (np.arange(draws) + i) % draws] for i, seeds in enumerate(chosen)], axis=0)
    means = np.mean([np.nanmean(per_video, axis=0) for per_video in values], axis=0)
    low, high = np.percentile(np.column_stack([drawn, drawn.mean(-1)]), [2.5, 97.5], axis=0)
    return np.stack([np.append(means, means.mean()), low, high])


def accuracy(runs: Sequence[Mapping[str, Any]], arm: str) -> tuple[np.ndarray, int]:
    """See `interval`; and of how many seeds."""
    values = [as_numbers(run) for run in runs if run["arm"] == arm]
    return interval(values), len(values)


def effect(runs: Sequence[Mapping[str, Any]], arm: str, against: str) -> tuple[np.ndarray, int] | None:
    """What `arm` has more than `against`, question by question, and of how many seeds; None if they share none."""
    found = {(run["arm"], run["seed"]): as_numbers(run) for run in runs}
    seeds = [seed for name, seed in found if name == arm and (against, seed) in found]
    if not seeds:
        return None
    return interval([found[arm, seed] - found[against, seed] for seed in seeds]), len(seeds)


def draw() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "ablation",
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "text.color": INK,
    }
    from matplotlib import pyplot

    runs, about = load_runs()
    rows: list[tuple[str, np.ndarray | None]] = []
    for heading, pairs in EFFECTS.items():
        found = [(words, effect(runs, arm, against)) for words, arm, against in pairs]
        done = [(words, result[0]) for words, result in found if result is not None]
        rows += [(heading, None), *done] if done else []
    figure, axes = pyplot.subplots(figsize=(5.4, 0.36 * len(rows) + 1.1))
    for row, (words, values) in enumerate(rows):  # the words stand above their interval, to be read on a phone too
        is_heading = values is None
        label = axes.text(
            0 if is_heading else 0.03,
            row if is_heading else row - 0.38,
            words,
            va="center",
            transform=axes.get_yaxis_transform(),
            fontweight="bold" if is_heading else "normal",
        )
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        if values is not None:
            mean, low, high = 100 * values[:, -1]
            axes.plot([low, high], [row, row], color=COLOUR, linewidth=2, solid_capstyle="round")
            axes.plot(mean, row, "o", color=COLOUR, markersize=5)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.set(ylim=(len(rows) - 0.4, -0.8), yticks=[], xlabel="more right answers, percentage points")
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle(
        f"What each choice changes, with 95 % intervals ({about['steps']} steps)", fontweight="bold", fontsize=10.5
    )
    figure.subplots_adjust(
        left=0.02, right=0.98, top=1 - 0.5 / figure.get_figheight(), bottom=0.55 / figure.get_figheight()
    )
    figure.savefig(PICTURE, metadata={"Date": None, "Title": "Effects of the ablation with 95 % intervals"})


if __name__ == "__main__":
    draw()
