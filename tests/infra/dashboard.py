"""What the queries of the Grafana dashboard ask for, read as Prometheus reads them, and whether pages have it."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[2] / "infra" / "grafana" / "hass.json"


def queries() -> list[str]:
    """Every query, with Grafana's own variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [expression.replace("$__rate_interval", "5m") for expression in found]


def selectors(expression: Any) -> Iterator[Any]:
    """The metrics that a query reads."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    elif isinstance(expression, promql_parser.MatrixSelector):
        yield expression.vector_selector
    else:
        parts = [getattr(expression, name, None) for name in ("expr", "lhs", "rhs")]
        for part in [*parts, *getattr(expression, "args", [])]:
            if part is not None:
                yield from selectors(part)


def samples(pages: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    """By name, the labels of every sample on these pages."""
    found: dict[str, list[dict[str, str]]] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
    return found


def unanswered(pages: Iterable[str]) -> list[str]:
    """The queries that read or group by something that the pages do not have."""
    held = samples(pages)
    return [query for query in queries() if not _is_answered(query, held)]


def _is_answered(query: str, held: dict[str, list[dict[str, str]]]) -> bool:
    labels = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))) - {"instance"}  # Prometheus' own
    read = list(selectors(promql_parser.parse(query)))
    return bool(read) and all(_has(selector, labels, held.get(selector.name or "", [])) for selector in read)


def _has(selector: Any, labels: set[str], there: list[dict[str, str]]) -> bool:
    kept = [sample for sample in there if all(_matches(one, sample) for one in selector.matchers.matchers)]
    return any(labels <= sample.keys() for sample in kept)


def _matches(matcher: Any, sample: dict[str, str]) -> bool:
    value = sample.get(matcher.name)
    if matcher.op == promql_parser.MatchOp.Re:
        return value is not None and re.fullmatch(matcher.value, value) is not None
    assert matcher.op == promql_parser.MatchOp.Equal, "teach this test the other matchers"
    return value == matcher.value
