"""The report on a terminal: the headline, the paper's table and acceptance by depth."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from hass_core.evaluation.render import Rows, acceptance_table, headline, paper_table
from hass_core.evaluation.report import Report


def terminal(report: Report) -> RenderableType:
    """What `hass evaluate` prints."""
    parts: list[RenderableType] = [
        _table("Result", ["", ""], headline(report)),
        _table("Speed-up and τ, each with its 95 % interval", *paper_table(report)),
    ]
    if report.score(report.main_method).acceptance_by_depth:
        parts.append(_table("Acceptance by depth", *acceptance_table(report)))
    return Group(*parts)


def _table(title: str, columns: Sequence[str], rows: Rows) -> Table:
    table = Table(*map(escape, columns), title=title, show_header=any(columns), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
