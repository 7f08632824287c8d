"""Draw what curve.py measured: acceptance against the training tokens seen, and tokens per cycle by benchmark.

python infra/evidence/curve_figure.py CURVE.json OUT.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("tab:blue", "tab:orange", "lightskyblue", "sandybrown")


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel for the curves, one for decoding with 95 % intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for recipe, colour in zip(record["recipes"], COLOURS, strict=False):
        _curves(left, recipe, colour)
    left.set(xlabel="training tokens seen, millions", ylabel="τ, tokens per cycle", xlim=0)
    left.set_title("held-out answers; solid: tree of 60, dashed: chain of 5", fontsize=10)
    left.grid(alpha=0.3)
    _bars(right, record["recipes"])
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(*right.get_legend_handles_labels(), loc="lower center", ncols=len(record["recipes"]), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, recipe: dict[str, Any], colour: str) -> None:
    seen = [point["tokens_seen"] / 1e6 for point in recipe["validation"]]
    for name, style in (("val/tree_tau", "-"), ("val/tau", "--")):
        axes.plot(seen, [point[name] for point in recipe["validation"]], style, color=colour, marker="o", markersize=3)


def _bars(axes: Axes, recipes: list[dict[str, Any]]) -> None:
    names = list(recipes[0]["decoding"])
    width = 0.8 / len(recipes)
    for number, (recipe, colour) in enumerate(zip(recipes, COLOURS, strict=False)):
        found = [recipe["decoding"][name] for name in names]
        places = [i + (number - (len(recipes) - 1) / 2) * width for i in range(len(names))]
        errors = [[f["tau"] - f["low"] for f in found], [f["high"] - f["tau"] for f in found]]
        axes.bar(places, [f["tau"] for f in found], width, yerr=errors, color=colour, capsize=3, label=recipe["label"])
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=1)
    axes.set_ylabel("τ, tokens per cycle")
    axes.set_title("greedy decoding, tree of 60, 80 questions each", fontsize=10)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
