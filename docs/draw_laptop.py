"""Draws docs/laptop.svg: the loss of the run that benchmarks/laptop.json keeps, level after level.

python docs/draw_laptop.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
INK, GREY, COLOUR = "#1f2937", "#6b7280", "#4f46e5"


def draw() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "laptop", "font.family": ["DejaVu Sans"]}
    matplotlib.rcParams |= {"font.size": 10, "text.color": INK}
    from matplotlib import pyplot

    runs = json.loads((ROOT / "benchmarks" / "laptop.json").read_text(encoding="utf-8"))["runs"]
    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    began = 0
    for name, run in runs.items():
        steps, losses = zip(*run["losses"], strict=True)
        axes.plot([began + step for step in steps], losses, color=COLOUR, linewidth=1.8)
        axes.axvline(began, color=GREY, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.text(began + 3, 2, name.removeprefix("level-"), color=GREY)
        began += run["steps"]
    axes.set(xlim=(0, began), yscale="log", xlabel="step of 8 chats", ylabel="loss per token of an answer")
    axes.set_yticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"], minor=False)
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e7eb")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(ROOT / "docs" / "laptop.svg", metadata={"Date": None, "Title": "Loss of the run on a laptop"})


if __name__ == "__main__":
    draw()
