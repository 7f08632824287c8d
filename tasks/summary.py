"""What a person reads in the terminal when a flow has ended."""

from rich.console import RenderableType
from rich.table import Table

from hass_core.config import RunConfig
from hass_core.evaluation.evaluate import read_report
from hass_core.evaluation.terminal import terminal
from hass_core.store import Artifact
from tasks.gate import Verdict
from tasks.resources import store_of
from tasks.tracking import DraftVersion


def stage_table(artifact: Artifact) -> RenderableType:
    """A stage's numbers and where its files are."""
    table = Table("", "", title=f"{artifact.stage} {artifact.digest}", title_justify="left", show_header=False)
    for name, value in artifact.summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    table.add_row("stored in", artifact.url)
    return table


def report_tables(config: RunConfig, evaluation: Artifact) -> RenderableType:
    """The evaluation's tables."""
    return terminal(read_report(store_of(config), evaluation))


def version_lines(version: DraftVersion, verdict: Verdict | None) -> str:
    """The registered version, and what the gate said."""
    lines = [f"registered  {version.model} version {version.version}"]
    if verdict:
        lines += [f"{verdict.outcome}: {reason}" for reason in verdict.reasons]
    else:
        lines += ["it waits for promote-draft or reject-draft"]
    return "\n".join(lines)


def nothing_new(version: DraftVersion) -> str:
    """What a retraining says that found everything done."""
    named = f"{version.model} version {version.version}" + (f", the {version.alias}," if version.alias else "")
    return f"nothing new: {named} was made of the same prompts, target and settings"
