"""What a person reads in the terminal when a flow has ended."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from hass_core.command_path import command_path
from hass_core.config import RunConfig
from hass_core.evaluation.evaluate import PAGE, read_report
from hass_core.evaluation.terminal import terminal
from hass_core.store import Artifact
from tasks.gate import Verdict
from tasks.resources import store_of
from tasks.tracking import DraftVersion, ui_command


def stage_table(artifact: Artifact) -> RenderableType:
    """A stage's numbers and where its files are."""
    table = Table("", "", title=f"{artifact.stage} {artifact.digest}", title_justify="left", show_header=False)
    for name, value in artifact.summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    table.add_row("stored in", artifact.url)
    if artifact.stage == "evaluation":
        table.add_row("report", f"{artifact.url}/{PAGE}")
    return table


def stage_words(artifact: Artifact) -> str:
    """What a stage made, in a few words."""
    found = artifact.summary
    words = {
        "prompts": "{prompts:,} prompts, {skipped:,} left out",
        "responses": "{conversations:,} answers, {response_tokens:,} tokens",
        "features": "{tokens:,} tokens of {conversations:,} conversations",
        "draft": "{steps:,} steps, {tokens_seen:,} tokens seen",
        "evaluation": "speed-up {speedup:.2f} ×, τ {tau_macro:.2f}",
    }
    reasons = _reasons(found)
    if reasons and artifact.stage == "responses":
        reasons = f"; {found['skipped']:,} left out{reasons}"
    try:
        return words[artifact.stage].format(**found) + reasons + _unused(found)
    except KeyError:  # a stage of an earlier version
        return artifact.digest


def _reasons(summary: Mapping[str, Any]) -> str:
    """Why prompts or answers were left out, the commonest reason first."""
    counts = Counter({name.removeprefix("skipped/"): n for name, n in summary.items() if name.startswith("skipped/")})
    told = ", ".join(f"{n:,} × {reason}" for reason, n in counts.most_common())
    return f": {told}" if told else ""


def _unused(summary: Mapping[str, Any]) -> str:
    """Which of the user's own sources gave no prompt."""
    return f"; nothing of {summary['unused']}" if "unused" in summary else ""


def report_tables(config: RunConfig, evaluation: Artifact) -> RenderableType:
    """The evaluation's tables."""
    return terminal(read_report(store_of(config), evaluation))


def version_lines(version: DraftVersion, verdict: Verdict | None) -> str:
    """The registered version, and what the gate said."""
    lines = [f"registered  {version.model} version {version.version}"]
    if verdict:
        first, *more = (f"{verdict.outcome}: {reason}" for reason in verdict.reasons)
        if not verdict.promoted:  # behind what refuses stands what is only so besides
            more = [f"    {reason}" for reason in verdict.reasons[1:]]
        lines += [first, *more]
    if verdict is None or verdict.waits:
        lines += ["it waits for promote-draft or reject-draft"]
    return "\n".join(lines)


def nothing_new(version: DraftVersion) -> str:
    """What a retraining says that found everything done."""
    named = f"{version.model} version {version.version}" + (f", the {version.alias}," if version.alias else "")
    return f"nothing new: {named} was made of the same prompts, target and settings"


def places(config: RunConfig, version: DraftVersion, report: str) -> list[str]:
    """Where the draft, its report and the runs are."""
    shown = [("draft", version.draft.url), ("report", report), ("runs and figures", ui_command(config))]
    return [f"{name}: {where}" for name, where in shown if where]


def next_steps(config: RunConfig, version: DraftVersion) -> list[str]:
    """What to do with the draft now, as commands to paste."""
    hass, folder = command_path("hass"), version.draft.url
    return [
        "Next:",
        f"  {hass} chat {folder}",
        f"  {hass} serve {folder}",
        f"  {hass} export {folder} --engine vllm -o exported",
    ]
