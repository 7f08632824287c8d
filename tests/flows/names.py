"""The names of metrics and tags that README and docs/retraining.md promise, as patterns.

They are compared with those that MLflow holds.
"""

import re
from collections.abc import Iterable

from tests.flows.stack import ROOT


def promised_metrics() -> set[str]:
    """First columns of the tables of metrics."""
    evaluation, mlflow = _section("## Metrics", "## By hand").split("### In MLflow")
    return {f"evaluation/{name}" for name in _names(evaluation)} | _names(mlflow.split("Parameters are")[0])


def promised_tags() -> set[str]:
    """First columns of the tables of tags."""
    loop = (ROOT / "docs/retraining.md").read_text()
    return _names(_section("| tag | meaning |", "## By hand")) | _names(loop[loop.index("| tag | meaning |") :])


def unlisted(held: Iterable[str], promised: set[str]) -> set[str]:
    """Names that MLflow holds and README does not list."""
    return {name for name in held if not any(_is(name, pattern) for pattern in promised)}


def missing(held: Iterable[str], promised: set[str]) -> set[str]:
    """Names that README lists and MLflow does not hold."""
    return {pattern for pattern in promised if not any(_is(name, pattern) for name in held)}


def _section(start: str, end: str) -> str:
    text = (ROOT / "README.md").read_text()
    return text[text.index(start) : text.index(end)]


def _names(table: str) -> set[str]:
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def _is(name: str, pattern: str) -> bool:
    """`accuracy_step_J` stands for any number, `digest.STAGE` for any word, `system/…` for anything."""
    stands_for = re.sub(r"_[A-Z]$", r"_\\d+", re.sub(r"\.[A-Z]+$", r"\\.\\w+", pattern))
    return re.fullmatch(stands_for.replace("…", ".+"), name) is not None
