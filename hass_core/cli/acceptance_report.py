"""A diagnosis of acceptance on a terminal: τ, then one paragraph per cause, the dearest first."""

from rich.console import Console
from rich.markup import escape

from hass_core.diagnosis.acceptance import Diagnosis
from hass_core.diagnosis.causes import Cause
from hass_core.diagnosis.chain import DEPTH


def show_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Causes that cost something in full; the others in one line each."""
    asked = f"{diagnosis.questions} questions, {diagnosis.cycles} cycles"
    console.print(f"τ {diagnosis.tau:.2f} of at most {DEPTH + 1} (a chain of {DEPTH}), {asked}", highlight=False)
    for cause in diagnosis.causes:
        style = "bold red" if cause.matters else "green"
        console.print(f"[{style}]{escape(cause.name)}[/]  {_cost(cause)}  {escape(cause.what)}.", highlight=False)
        if cause.matters:
            console.print(f"    To mend: {escape(cause.mend)}.", highlight=False)


def _cost(cause: Cause) -> str:
    if cause.loss is None:
        return "cost unknown"
    within = "" if cause.within is None else f" ± {cause.within:.2f}"
    return f"costs {cause.loss:.2f}{within}" if cause.matters else f"costs nothing ({cause.loss:.2f}{within})"
