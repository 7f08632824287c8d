"""Explain a low τ: measure the draft as it is served, then with one suspected cause after the other removed.

In: a draft folder, a target, questions. Out: τ, and the causes with what each costs, the dearest first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hass_core.diagnosis import causes, variants
from hass_core.diagnosis.causes import Cause
from hass_core.diagnosis.chain import tau
from hass_core.diagnosis.variants import Case, Settings
from hass_core.draft_model.checkpoint import load_draft
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.progress import Progress, no_progress
from hass_core.target_model.loader import Target


@dataclass(frozen=True)
class Diagnosis:
    """τ as served, of a chain, and its causes, the dearest first; what cannot be measured stands before them."""

    tau: float
    questions: int
    cycles: int
    causes: list[Cause]


VARIANTS: tuple[Callable[[Case], Cause | None], ...] = (
    variants.rope_cause,
    variants.template_cause,
    variants.target_cause,
    variants.vocabulary_cause,
    variants.dtype_cause,
    variants.sampling_cause,
)


def diagnose(
    folder: Path,
    target: Target,
    questions: Sequence[Question],
    settings: Settings,
    progress: Progress = no_progress,
) -> Diagnosis:
    """Measure and weigh. Only the first turn of each question is asked.

    Raises BadInput without a question, or when no answer is long enough to draft for; DraftMismatch when the draft's
    sizes do not fit the target at all.
    """
    if not questions:
        raise BadInput("no question to ask; give a file with at least one")

    def part(number: int, name: str) -> Callable[[int], None]:
        total = (len(VARIANTS) + 1) * len(questions)
        return lambda done: progress(number * len(questions) + done, total, f"{name}, {done} of {len(questions)}")

    draft = load_draft(folder, target, check=False)
    case = Case(folder, target, draft, questions, settings, base=[], done=part(0, "as served"))
    case.done(0)
    case = replace(case, base=case.measure())
    if not case.base:
        raise BadInput("the target ended every answer at once, nothing was drafted; ask other questions")
    found = [causes.depth_cause(case.base), causes.first_position_cause(case.base)]
    trained_tokens = settings.trained_tokens or case.draft.info.get("trained_tokens")
    found += [causes.category_cause(case.base), causes.context_cause(case.base, trained_tokens)]
    for number, variant in enumerate(VARIANTS, start=1):
        found.append(variant(replace(case, done=part(number, variant.__name__.removesuffix("_cause")))))
    dearest = sorted((c for c in found if c), key=lambda c: (c.loss is not None, -(c.loss or 0.0)))
    return Diagnosis(tau(case.base), len(questions), len(case.base), dearest)
