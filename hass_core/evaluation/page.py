"""The report for people: one HTML page that needs nothing beside it, on a phone, on paper and in the dark.

Names from outside (targets, benchmarks, questions, answers) may hold markup: the template escapes all that is not a
figure drawn here.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hass_core.evaluation import figures
from hass_core.evaluation.examples import Example
from hass_core.evaluation.method_names import PLAIN
from hass_core.evaluation.render import (
    Rows,
    acceptance_table,
    comparison_table,
    difference_table,
    headline,
    interval,
    measured_how,
    n_alpha_table,
    paper_table,
    rank_table,
    served_by_benchmark,
    served_table,
    speed_table,
)
from hass_core.evaluation.report import Report

TEMPLATE = "page.html.jinja"
IN_ENGINE = (
    "The same questions, one at a time and with many at once. The speed-up is over plain decoding at the same place, "
    "with as many at once; τ is counted by the engine. Intervals: over questions, or over groups of requests."
)


@dataclass(frozen=True)
class Part:
    """One part of the page: a title and what stands below it. A `figure` is SVG that this package drew."""

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    commands: Sequence[str] = ()
    lines: Sequence[str] = ()
    figure: Markup | None = None


def page(
    report: Report,
    examples: Sequence[Example],
    training: list[dict[str, Any]],
    first: Sequence[Part] = (),
    verdict: str = "",
    last: Sequence[Part] | None = None,
) -> str:
    """report.html. `first` comes behind the headline, `verdict` behind its sentence, `last` in place of how to repeat
    an evaluation: what a retraining has to add."""
    return _environment().get_template(TEMPLATE).render(
        title=f"Draft for {report.target}",
        verdict=" ".join(filter(None, (verdict_words(report), verdict))),
        headline=headline(report),
        first=first,
        figures=figures.figures_of(report) + figures.curves_of(training),
        tables=_tables(report),
        examples=examples,
        measured=measured_how(report),
        last=[_again(report)] if last is None else last,
        provenance=report.provenance,
    )  # fmt: skip


def verdict_words(report: Report) -> str:
    """What the evaluation found, in a sentence."""
    main = report.score(report.main_method)
    if report.main_method == PLAIN:
        return f"{report.target} decodes {interval(main.tokens_per_second, 1)} tokens/s without a draft."
    if report.lossless and not report.lossless.identical:
        return f"Not usable: this draft changes the output of {report.target}."
    gain, tau = main.speedup, main.tau_macro.value
    measured = f"{gain.value:.2f} times as fast as plain decoding, 95 % interval {gain.low:.2f} to {gain.high:.2f}"
    if gain.low > 1:
        return f"With this draft {report.target} is {measured}, at {tau:.2f} tokens per cycle; its output is unchanged."
    if gain.high < 1:
        return f"This draft slows {report.target} down: {measured}; its output is unchanged."
    return f"No gain could be measured: with this draft {report.target} is {measured}; its output is unchanged."


def _tables(report: Report) -> list[Part]:
    """All tables that have rows."""
    found: list[tuple[str, str, tuple[list[str], Rows]]] = [
        ("Speed-up and τ", "Each value with its 95 % interval over questions.", paper_table(report)),
        ("Here and in the engine", IN_ENGINE, served_table(report)),
        ("In the engine, by benchmark", "", served_by_benchmark(report)),
        ("Speed", "", speed_table(report)),
        ("Acceptance by depth", "", acceptance_table(report)),
        ("Choices of the draft", "", rank_table(report)),
        ("Chain drafting: n-α", "", n_alpha_table(report)),
        ("Methods compared on the same questions", "", comparison_table(report)),
        ("Places where outputs part", "", difference_table(report)),
    ]
    return [Part(title, text, columns, rows) for title, text, (columns, rows) in found if rows]


def _again(report: Report) -> Part:
    """How to repeat the evaluation, from what it wrote down of itself."""
    made = report.provenance
    commands = [f"git checkout {made['commit'].removesuffix('+changes')}"] if made.get("commit") else []
    if made.get("argv"):
        commands.append(shlex.join(made["argv"]))
    return Part("How to repeat it", commands=commands)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("hass_core.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
