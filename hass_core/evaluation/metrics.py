"""Every measured quantity as a formula; docs/mlflow.md has their names, units and meanings.

A measurement is one question answered by one method at one temperature. A cycle is one verification by the target:
it accepts a ≥ 0 draft tokens and adds one token of the target's own. Plain decoding has a = 0 in every cycle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from pydantic import BaseModel

from hass_core.evaluation.statistics import Statistic, mean, quantile, ratio_of_rates, ratio_of_sums


class Measurement(BaseModel, frozen=True):
    """One question answered by one method. Lists have one entry per cycle, over all turns of the question."""

    benchmark: str
    question: str
    category: str
    temperature: float
    method: str
    prompt_tokens: int
    new_tokens: int
    seconds: float  # with prefill; the fastest of the repeats
    decode_seconds: float
    compilations: int = 0  # and captures of CUDA graphs while these seconds ran
    accepted: list[int]
    drafted_depth: list[int]  # levels offered for verification
    ranks: list[int] = []  # one per accepted token: its place among its siblings, 0 = the draft's first choice
    offered: list[int] = []  # one per tree node reached: how many children it had
    token_ids: list[list[int]]  # the answer of each turn


@dataclass(frozen=True)
class Sample:
    """A statistic and the columns [Q] it is computed from: what the bootstrap takes."""

    statistic: Statistic
    columns: tuple[np.ndarray, ...]


def tau_macro(measured: Sequence[Measurement]) -> Sample:
    """τ as HASS and EAGLE report it: mean over questions of mean(a) + 1."""
    return Sample(mean, (_taus(measured),))


def tau_gain(measured: Sequence[Measurement], base: Sequence[Measurement]) -> Sample:
    """Mean over questions of the method's τ less the base method's on the same question."""
    assert [_question(m) for m in measured] == [_question(m) for m in base]
    return Sample(mean, (_taus(measured) - _taus(base),))


def tau_micro(measured: Sequence[Measurement]) -> Sample:
    """Σ (a + 1) / cycles: what a cycle yields, long answers counting more."""
    return Sample(ratio_of_sums, (_sums(measured, lambda m: sum(m.accepted) + len(m.accepted)), _cycles(measured)))


def tokens_per_second(measured: Sequence[Measurement]) -> Sample:
    """Σ new tokens / Σ seconds, prefill included."""
    return Sample(ratio_of_sums, (_sums(measured, lambda m: m.new_tokens), _sums(measured, lambda m: m.seconds)))


def speedup(measured: Sequence[Measurement], base: Sequence[Measurement]) -> Sample:
    """Rate over the base method's rate; both hold the same questions in the same order."""
    assert [_question(m) for m in measured] == [_question(m) for m in base]
    return Sample(ratio_of_rates, tokens_per_second(measured).columns + tokens_per_second(base).columns)


def time_per_output_token(measured: Sequence[Measurement], share: float) -> Sample:
    """The `share` quantile over questions of decoding milliseconds per new token."""
    columns = (np.array([1000 * m.decode_seconds / max(1, m.new_tokens) for m in measured]),)
    return Sample(quantile(share), columns)


def acceptance_at_depth(measured: Sequence[Measurement], depth: int) -> Sample:
    """Share of cycles that accept at least `depth` tokens (depth 1 = the first level below the root)."""
    return Sample(ratio_of_sums, (_sums(measured, lambda m: _at_least(m.accepted, depth)), _cycles(measured)))


def n_alpha(measured: Sequence[Measurement], drafted_inputs: int) -> Sample:
    """n-α of EAGLE: how often a draft is right when `drafted_inputs` of its inputs are the draft's own features.

    Σ [a ≥ n + 1] / Σ [a ≥ n and level n + 1 was drafted], from chain decoding.
    """

    def tried(m: Measurement) -> int:
        pairs = zip(m.accepted, m.drafted_depth, strict=True)
        return sum(a >= drafted_inputs and depth > drafted_inputs for a, depth in pairs)

    right = _sums(measured, lambda m: _at_least(m.accepted, drafted_inputs + 1))
    return Sample(ratio_of_sums, (right, _sums(measured, tried)))


def acceptance_at_rank(measured: Sequence[Measurement], rank: int) -> Sample:
    """Share of the places offering a `rank`-th choice (1 = the draft's first) at which it was accepted."""
    accepted = _sums(measured, lambda m: m.ranks.count(rank - 1))
    return Sample(ratio_of_sums, (accepted, _sums(measured, lambda m: sum(n >= rank for n in m.offered))))


def tree_use(measured: Sequence[Measurement]) -> list[list[float]]:
    """[depth - 1][choice - 1]: share of cycles that accept, at this depth, the draft's first, second, … choice."""
    accepted = np.zeros((deepest(measured), widest(measured)))
    for m in measured:
        ranks = iter(m.ranks)
        for depth, rank in ((d, r) for length in m.accepted for d, r in enumerate(islice(ranks, length))):
            accepted[depth, rank] += 1
    return (accepted / _cycles(measured).sum()).tolist()


def deepest(measured: Sequence[Measurement]) -> int:
    """Levels that were ever offered."""
    return max((depth for m in measured for depth in m.drafted_depth), default=0)


def widest(measured: Sequence[Measurement]) -> int:
    """The largest number of children ever offered at one place."""
    return max((number for m in measured for number in m.offered), default=0)


def _question(m: Measurement) -> tuple[str, str, float]:
    return m.benchmark, m.question, m.temperature


def _taus(measured: Sequence[Measurement]) -> np.ndarray:
    return np.array([np.mean(m.accepted) + 1 if m.accepted else 1.0 for m in measured])


def _at_least(accepted: list[int], depth: int) -> int:
    return sum(a >= depth for a in accepted)


def _cycles(measured: Sequence[Measurement]) -> np.ndarray:
    return _sums(measured, lambda m: len(m.accepted))


def _sums(measured: Sequence[Measurement], quantity: Callable[[Measurement], float]) -> np.ndarray:
    return np.array([quantity(m) for m in measured], dtype=np.float64)
