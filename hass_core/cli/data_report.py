"""The mask audit on a terminal: sample conversations in colour, shares, findings."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hass_core.features.checks import Audit, Sample

MOST_SHOWN = 20


def show_audit(console: Console, audit: Audit) -> None:
    """Samples with the supervised text in green, then the numbers."""
    for sample in audit.samples:
        console.rule(Text(sample.id), align="left", style="dim")
        console.print(coloured(sample), soft_wrap=True)
    console.rule(style="dim")
    table = Table(show_header=False)
    table.add_row("conversations", f"{audit.conversations:,}")
    table.add_row("tokens", f"{audit.tokens:,}")
    table.add_row("supervised (green)", f"{audit.supervised_tokens:,}, {_share(audit):.1%}")
    spread = ", ".join(f"{share:.0%}" for share in audit.supervised_share_percentiles.values())
    table.add_row("share per conversation: least, quartiles, most", spread)
    table.add_row("masks that cannot be right", f"{audit.problem_count:,}")
    console.print(table)


def coloured(sample: Sample) -> Text:
    """The conversation's text: supervised pieces green, context dim."""
    text = Text()
    for piece in sample.pieces:
        text.append(piece.text, style="green" if piece.supervised else "dim")
    return text


def show_problems(console: Console, problems: list[str]) -> None:
    """The findings, or that there are none."""
    for problem in problems[:MOST_SHOWN]:
        console.print(Text(problem, style="red"), soft_wrap=True)
    if len(problems) > MOST_SHOWN:
        console.print(f"... and {len(problems) - MOST_SHOWN} more")
    if not problems:
        console.print("no fault found")


def _share(audit: Audit) -> float:
    return audit.supervised_tokens / max(1, audit.tokens)
