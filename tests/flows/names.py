"""The names of metrics and tags that docs/mlflow.md promises, as patterns.

They are compared with those that MLflow holds.
"""

import re
from collections.abc import Iterable

from tests.flows.stack import ROOT


def promised_metrics() -> set[str]:
    """First columns of the tables of metrics."""
    evaluation, others = _page().partition("Tags, of runs")[0].split("## Names")
    return {f"evaluation/{name}" for name in _names(evaluation)} | _names(others)


def promised_tags() -> set[str]:
    """First column of the table of tags."""
    return _names(_page().partition("Tags, of runs")[2])


def unlisted(held: Iterable[str], promised: set[str]) -> set[str]:
    """Names that MLflow holds and the page does not list."""
    return {name for name in held if not any(_is(name, pattern) for pattern in promised)}


def missing(held: Iterable[str], promised: set[str]) -> set[str]:
    """Names that the page lists and MLflow does not hold."""
    return {pattern for pattern in promised if not any(_is(name, pattern) for name in held)}


def _page() -> str:
    return (ROOT / "docs/mlflow.md").read_text()


def _names(table: str) -> set[str]:
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def _is(name: str, pattern: str) -> bool:
    """`accuracy_step_J` stands for any number, `digest.STAGE` for any word, `system/…` for anything."""
    stands_for = re.sub(r"_[A-Z]$", r"_\\d+", re.sub(r"\.[A-Z]+$", r"\\.\\w+", pattern))
    return re.fullmatch(stands_for.replace("…", ".+"), name) is not None
