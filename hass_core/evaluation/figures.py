"""Figures: speed bars, τ per benchmark, acceptance by depth, use of the tree, the training's curves, one draft's gain.

Drawn without a display: SVG for pages, PNG for the files of a run. matplotlib is imported when a figure is made.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from hass_core.evaluation.method_names import PLAIN
from hass_core.evaluation.render import label
from hass_core.evaluation.report import ALL, Report
from hass_core.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (7, 4.2)
DOTS_PER_INCH = 130
INK, GREY = "#24292f", "#8a919a"  # in a page the ink is that of its text; grey reads on white and on black
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hass",
    "font.size": 10.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8a919a40",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}
COLORS = {
    "plain": "#9aa3ad",
    "pld": "#c9a227",
    "sps": "#b07aa1",
    "eagle": "#76b7b2",
    "eagle2": "#4e79a7",
    "hass": "#d1495b",
}
STEP_COLORS = ("#d1495b", "#4e79a7", "#59a14f", "#c9a227", "#b07aa1", "#76b7b2", "#9aa3ad", INK)

CHOICE_COLORS = ("#8f2a3b", "#d1495b", "#e58a97", "#f2c1c8")  # the draft's first choice is the darkest

Draw = Callable[["Axes"], None]


def figures_of(report: Report) -> list[Markup]:
    """The figures of a report's page."""
    fills = [partial(_speed, report=report), partial(_tau, report=report)]
    if report.score(report.main_method).acceptance_by_depth:
        fills.append(partial(_acceptance, report=report))
    if report.tree_use:
        fills.append(partial(_tree_use, report=report))
    return [svg(fill) for fill in fills]


def curves_of(metrics: list[dict[str, Any]]) -> list[Markup]:
    """Loss, step accuracy and τ over the optimizer steps; what metrics.jsonl lacks is not drawn."""
    names = {name for row in metrics for name in row}
    steps = sorted(name for name in names if name.startswith("val/accuracy_step_"))
    panels = [
        ("Loss", "loss", 0, {"train/loss": "training", "val/loss": "held-out"}),
        ("Step accuracy, held-out", "share right", 0, {name: f"step {name.rpartition('_')[2]}" for name in steps}),
        ("τ, held-out", "tokens per cycle", 1, {"val/tau": "chain of 5", "val/tree_tau": "tree"}),
    ]
    present = [
        (title, unit, start, curves)
        for title, unit, start, given in panels
        if (curves := {name: shown for name, shown in given.items() if name in names})
    ]
    fills = [partial(_curves, metrics=metrics, curves=c, title=t, unit=u, start=s) for t, u, s, c in present]
    return [svg(fill) for fill in fills]


def draw_gains(gains: Mapping[str, Estimate], path: Path, title: str) -> Path:
    """A draft's speed-up over another's less 1, per benchmark: a point and its interval."""
    return draw(path, lambda axes: _gains(axes, gains, title))


def gains_of(gains: Mapping[str, Estimate], title: str) -> Markup:
    """The same for a page."""
    return svg(lambda axes: _gains(axes, gains, title))


def svg(fill: Draw) -> Markup:
    """One figure for a page: its ink follows the page's, its text stays text."""
    buffer = StringIO()
    with _figure(fill) as figure:
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :].replace(INK, "currentColor"))


def draw(path: Path, fill: Draw) -> Path:
    """One figure as a PNG."""
    with _figure(fill) as figure:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


@contextmanager
def _figure(fill: Draw) -> "Iterator[Figure]":
    """A figure whose axes `fill` has drawn into, in this module's style until the block ends."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES)
        figure.set_layout_engine("constrained")
        FigureCanvasAgg(figure)
        fill(figure.subplots())
        yield figure


def _speed(axes: "Axes", report: Report) -> None:
    methods = report.methods
    rates = [report.score(method).tokens_per_second for method in methods]
    axes.bar(range(len(methods)), [rate.value for rate in rates], width=0.62, color=[COLORS[m] for m in methods])
    axes.errorbar(range(len(methods)), *_bars(rates), fmt="none", ecolor=INK, capsize=5, linewidth=1.3)
    for place, (method, rate) in enumerate(zip(methods, rates, strict=True)):
        gain = "" if method == PLAIN else f"\n{report.score(method).speedup.value:.2f} ×"
        axes.annotate(
            f"{rate.value:.1f}{gain}", (place, rate.high), (0, 5), textcoords="offset points", ha="center", va="bottom"
        )
    axes.set_xticks(range(len(methods)), [label(method) for method in methods])
    axes.set_ylim(0, 1.25 * max(rate.high for rate in rates))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("tokens per second")
    axes.set_title(f"Speed, T = {report.temperatures[0]:g}, 95 % intervals")


def _tau(axes: "Axes", report: Report) -> None:
    names = [*report.benchmarks, ALL] if len(report.benchmarks) > 1 else list(report.benchmarks)
    methods = [method for method in report.methods if method != PLAIN] or report.methods
    width = 0.75 / len(methods)
    for i, method in enumerate(methods):
        taus = [report.score(method, name).tau_macro for name in names]
        places = [place + (i - (len(methods) - 1) / 2) * width for place in range(len(names))]
        heights = [tau.value for tau in taus]
        axes.bar(places, heights, width=0.92 * min(width, 0.5), color=COLORS[method], label=label(method))
        axes.errorbar(places, *_bars(taus), fmt="none", ecolor=INK, capsize=3, linewidth=1.1)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(names)), [name[:24] for name in names], parse_math=False)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("τ, tokens per cycle")
    axes.set_title("Acceptance length per benchmark, 95 % intervals")
    if len(methods) > 1:
        axes.legend(ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _acceptance(axes: "Axes", report: Report) -> None:
    for method in report.methods:
        shares = report.score(method).acceptance_by_depth
        if method == PLAIN or not shares:
            continue
        depths = range(1, len(shares) + 1)
        color = COLORS[method]
        axes.plot(depths, [100 * s.value for s in shares], marker="o", color=color, linewidth=2, label=label(method))
        axes.fill_between(
            depths, [100 * s.low for s in shares], [100 * s.high for s in shares], color=color, alpha=0.16, linewidth=0
        )
    if report.n_alpha:
        rates = [100 * rate.value for rate in report.n_alpha]
        name = f"{label(report.main_method)} chain: n-α, % of tries"
        axes.plot(range(1, len(rates) + 1), rates, marker="s", color=INK, linestyle=":", label=name)
    deepest = max(len(report.score(method).acceptance_by_depth) for method in report.methods)
    axes.set_xticks(range(1, 1 + max(deepest, len(report.n_alpha))))
    axes.set_ylim(0, None)
    axes.set_xlabel("depth")
    axes.set_ylabel("% of cycles that reach the depth")
    axes.set_title("Acceptance by depth")
    axes.legend()


def _tree_use(axes: "Axes", report: Report) -> None:
    """A bar per depth, stacked by the draft's choices; what comes after the last colour is one part."""
    depths = range(1, len(report.tree_use) + 1)
    bottoms = [0.0] * len(depths)
    last = len(CHOICE_COLORS) - 1
    for choice, color in enumerate(CHOICE_COLORS):
        heights = [
            100 * (sum(row[last:]) if choice == last else sum(row[choice : choice + 1])) for row in report.tree_use
        ]
        if any(heights):
            name = f"choice {choice + 1}" + (" and later" if choice == last else "")
            bars = axes.bar(depths, heights, 0.62, bottoms, color=color, label=name)
            shown = [f"{height:.0f}" if height >= 5 else "" for height in heights]
            axes.bar_label(bars, shown, label_type="center", color="white" if choice < 2 else "#1b1f24")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    tree = report.tree
    axes.set_xticks(depths)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("depth in the tree")
    axes.set_ylabel("% of cycles that accept a token there")
    axes.set_title(f"Use of the tree: {tree.nodes} nodes, {tree.kind}")
    if axes.containers:  # none where nothing was accepted
        axes.set_ylim(0, 1.2 * max(bottoms))  # above the bars, where nothing is
        axes.legend(ncols=len(CHOICE_COLORS), loc="upper center", columnspacing=1)


def _gains(axes: "Axes", gains: Mapping[str, Estimate], title: str) -> None:
    percents = [Estimate(value=100 * e.value, low=100 * e.low, high=100 * e.high) for e in gains.values()]
    rows = range(len(percents))
    values, distances = _bars(percents)
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
    axes.errorbar(values, rows, xerr=distances, fmt="o", color=COLORS["hass"], markersize=8, capsize=5, linewidth=1.6)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(f"{value:+.1f} %", (value, row), (0, 9), textcoords="offset points", ha="center")
    axes.set_yticks(rows, [name[:24] for name in gains], parse_math=False)
    axes.set_ylim(len(percents) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("gain in tokens/s, %, with 95 % intervals over the same questions")
    axes.set_title(title)


def _curves(
    axes: "Axes", metrics: list[dict[str, Any]], curves: Mapping[str, str], title: str, unit: str, start: float
) -> None:
    from matplotlib.ticker import MaxNLocator

    for (name, shown), color in zip(curves.items(), STEP_COLORS * 4, strict=False):
        points = [(row["step"], row[name]) for row in metrics if name in row]
        marker = "o" if len(points) <= 40 else None
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker=marker, markersize=4, label=shown)
    axes.set_ylim(start, start + 1.05 * (axes.get_ylim()[1] - start))
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.legend()


def _bars(estimates: list[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Values and the interval's two distances from them, as errorbar takes them."""
    values = [e.value for e in estimates]
    distances = [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]
    return values, distances
