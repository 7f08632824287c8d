"""The causes of a low τ. Each takes what was measured and says what mending it would add to τ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hass_core.diagnosis.chain import DEPTH, Cycle, difference, right_after, tau

FEWEST_CYCLES = 20  # fewer say nothing about a category or a length


@dataclass(frozen=True)
class Cause:
    """One cause. `loss` is in τ: what is missing because of it; None where it cannot be measured.

    `within` is the half width of the loss's 95 % interval; None for a share of the cycles measured once.
    """

    name: str
    loss: float | None
    what: str
    mend: str
    within: float | None = None

    @property
    def matters(self) -> bool:
        """False for what chance explains. What could not be measured matters until it is."""
        return self.loss is None or self.loss > max(self.within or 0.0, 0.01)


def from_variant(name: str, what: str, mend: str, base: Sequence[Cycle], mended: Sequence[Cycle]) -> Cause:
    """A cause weighed by answering the same questions with it removed."""
    loss, within = difference(base, mended)
    return Cause(name, loss, f"{what}: τ {tau(base):.2f}, without that {tau(mended):.2f}", mend, within)


def depth_cause(cycles: Sequence[Cycle]) -> Cause:
    """The draft's own features as input: what deeper positions lose against the first one."""
    shares = [share for share in right_after(cycles) if not math.isnan(share)]
    even = sum(shares[0] ** depth for depth in range(1, DEPTH + 1)) + 1
    listed = ", ".join(f"{share:.0%}" for share in shares)
    deeper = "" if len(shares) == DEPTH else "; no cycle got deeper"
    return Cause(
        "depth",
        even - tau(cycles),
        f"right drafts at depth 1 to {len(shares)}, of those tried: {listed}{deeper}",
        "train with more alignment steps (training.align_steps): they make deeper positions as good as the first",
    )


def first_position_cause(cycles: Sequence[Cycle]) -> Cause:
    """What is missing at the very first position, where the draft sees only the target's own features."""
    share = right_after(cycles)[0]
    return Cause(
        "first position",
        (DEPTH + 1) - (sum(share**depth for depth in range(1, DEPTH + 1)) + 1),
        f"{share:.0%} of first drafts are right; with all right and every depth as good, τ would be {DEPTH + 1}",
        "the rest is the draft's own quality: more conversations, more passes over them",
    )


def category_cause(cycles: Sequence[Cycle]) -> Cause | None:
    """Domain shift: what the weakest category takes from τ. None with fewer than two categories."""
    groups = _groups([(cycle.category, cycle) for cycle in cycles])
    if len(groups) < 2:
        return None
    weakest = min(groups, key=lambda name: tau(groups[name]))
    rest = [cycle for cycle in cycles if cycle.category != weakest]
    listed = ", ".join(f"{name} {tau(groups[name]):.2f}" for name in sorted(groups, key=lambda name: tau(groups[name])))
    return Cause(
        "domain",
        tau(rest) - tau(cycles),
        f"τ by category: {listed}",
        f"add prompts of the kind {weakest!r} to the training prompts (prompts.files)",
    )


def context_cause(cycles: Sequence[Cycle], trained_tokens: int | None) -> Cause | None:
    """Context beyond training. None when nothing lies beyond, or it is not known how far training went."""
    edges = [0, 128, 256, 512, 1024, 2048, 4096, 8192, 2**31]
    groups = _groups([(_bucket(cycle.context_tokens, edges), cycle) for cycle in cycles])
    listed = ", ".join(f"{name} tokens {tau(groups[name]):.2f}" for name in groups)
    known = [cycle for cycle in cycles if trained_tokens is None or cycle.context_tokens <= trained_tokens]
    mend = "train on longer conversations (features.max_tokens_per_conversation), or serve shorter ones"
    if trained_tokens is None:
        what = f"τ by context: {listed}; how long the training conversations were is not on record (--trained-tokens)"
        return Cause("context", 0.0, what, mend)
    if len(known) == len(cycles):
        return None
    beyond = len(cycles) - len(known)
    what = f"{beyond} of {len(cycles)} cycles lie beyond the {trained_tokens} tokens trained on; τ by context: {listed}"
    return Cause("context", tau(known) - tau(cycles) if known else None, what, mend)


def _bucket(tokens: int, edges: list[int]) -> str:
    low, high = next((low, high) for low, high in pairwise(edges) if tokens <= high)
    return f"{low + 1}-{high}" if high < 2**31 else f"over {low}"


def _groups(named: Sequence[tuple[str, Cycle]]) -> dict[str, list[Cycle]]:
    """Cycles by name, groups too small to judge left out."""
    groups: dict[str, list[Cycle]] = {}
    for name, cycle in named:
        groups.setdefault(name, []).append(cycle)
    return {name: cycles for name, cycles in groups.items() if len(cycles) >= FEWEST_CYCLES}
