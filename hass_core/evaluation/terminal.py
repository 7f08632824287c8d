"""The report on a terminal: the headline, the paper's table and acceptance by depth."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from hass_core.evaluation.render import (
    Rows,
    acceptance_table,
    half_paper_table,
    headline,
    paper_table,
    served_table,
    training_prompts,
)
from hass_core.evaluation.report import Report


def terminal(report: Report) -> RenderableType:
    """What `hass evaluate` prints."""
    parts: list[RenderableType] = [_table("Result", ["", ""], headline(report))]
    if len(report.benchmarks) == 1:
        parts.append(_table("Speed-up and τ, each with its 95 % interval", *paper_table(report)))
    else:
        parts.append(_table("Speed-up, × plain", *half_paper_table(report, lambda score: score.speedup)))
        parts.append(_table("τ, tokens per cycle", *half_paper_table(report, lambda score: score.tau_macro)))
    if report.served:
        parts.append(_table("Here and in the engine", *served_table(report)))
    if report.score(report.main_method).acceptance_by_depth:
        parts.append(_table("Acceptance by depth", *acceptance_table(report)))
    return Group(*parts, escape(training_prompts(report)))


def _table(title: str, columns: Sequence[str], rows: Rows) -> Table:
    table = Table(*map(escape, columns), title=title, show_header=any(columns), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
