"""Bootstrap intervals over questions: what a result could have been with other questions of the same kind.

The question is the unit that is drawn again, never the token or the cycle: tokens of one answer depend on each other.
Two methods are compared by drawing the same questions for both (paired bootstrap).

Shapes: Q questions, R resamples.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel

LEVEL = 0.95  # of all intervals
ELEMENTS_PER_CHUNK = 1 << 22  # bounds the memory of one block of resamples
NORMAL = NormalDist()

Statistic = Callable[..., np.ndarray]
"""Takes one or more arrays [..., Q] and reduces the last axis."""


class Estimate(BaseModel, frozen=True):
    """A value and its interval. With a single question there is no spread: low = high = value."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean(values: np.ndarray) -> np.ndarray:
    """Σ v / Q: each question counts the same (macro)."""
    return values.mean(-1)


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Σ n / Σ d: a question counts by its size (micro). 0 where every denominator is 0."""
    total = denominators.sum(-1)
    return np.divide(numerators.sum(-1), total, out=np.zeros(np.shape(total)), where=total != 0)


def ratio_of_rates(
    amounts: np.ndarray, times: np.ndarray, base_amounts: np.ndarray, base_times: np.ndarray
) -> np.ndarray:
    """(Σ n / Σ t) / (Σ n₀ / Σ t₀): one method's rate over another's on the same questions."""
    return ratio_of_sums(amounts, times) / ratio_of_sums(base_amounts, base_times)


def quantile(share: float) -> Statistic:
    """The statistic that is the `share` quantile over questions."""
    return lambda values: np.quantile(values, share, axis=-1)


def bootstrap(statistic: Statistic, *columns: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The statistic of `columns` (each [Q]) with its bias-corrected, accelerated interval (Efron 1987).

    All columns are resampled with the same questions, so a statistic of two methods gets its paired interval.
    """
    data = tuple(np.asarray(column, dtype=np.float64) for column in columns)
    questions = len(data[0])
    assert questions > 0
    assert all(len(column) == questions for column in data), [len(column) for column in data]
    value = float(statistic(*data))
    drawn = _resampled(statistic, data, resamples, seed)
    if questions == 1 or np.ptp(drawn) == 0:
        return Estimate(value=value, low=value, high=value)
    low, high = _bca_levels(value, drawn, _jackknife(statistic, data))
    return Estimate(value=value, low=float(np.quantile(drawn, low)), high=float(np.quantile(drawn, high)))


def crossed_mean(values: np.ndarray) -> Estimate:
    """The mean of `values` [Q, N], N rounds of the same questions, with its interval.

    Both questions and rounds are a sample of those that could have been (two-way random effects), so the variance of
    the mean is (MS_questions + max(0, MS_rounds − MS_rest)) / QN: it holds what differs between questions, the noise
    within them, and what a whole round has in common. Student's t with Satterthwaite's (1946) degrees of freedom makes
    up for few rounds.
    """
    questions, rounds = values.shape
    mean, by_question, by_round = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_question[:, None] - by_round + mean
    squares = {
        "questions": (rounds * ((by_question - mean) ** 2).sum(), questions - 1),
        "rounds": (questions * ((by_round - mean) ** 2).sum(), rounds - 1),
        "rest": ((rest**2).sum(), (questions - 1) * (rounds - 1)),
    }
    ms = {name: float(total) / freedom if freedom else 0.0 for name, (total, freedom) in squares.items()}
    parts = {"questions": ms["questions"], "rounds": max(0.0, ms["rounds"] - ms["rest"])}
    if not (total := sum(parts.values())):
        return Estimate(value=float(mean), low=float(mean), high=float(mean))
    freedom = total**2 / sum(part**2 / squares[name][1] for name, part in parts.items() if part)
    reach = _student_quantile((1 + LEVEL) / 2, freedom) * float(np.sqrt(total / values.size))
    return Estimate(value=float(mean), low=float(mean) - reach, high=float(mean) + reach)


def _student_quantile(share: float, freedom: float) -> float:
    """A quantile of Student's t, from its own draws with a fixed seed: right to about a hundredth."""
    return float(np.quantile(np.random.default_rng(0).standard_t(freedom, 50_000), share))


def _resampled(statistic: Statistic, data: tuple[np.ndarray, ...], resamples: int, seed: int) -> np.ndarray:
    """[R]: the statistic of R draws of Q questions with replacement."""
    questions = len(data[0])
    generator = np.random.default_rng(seed)
    rows = max(1, ELEMENTS_PER_CHUNK // questions)
    parts = []
    for start in range(0, resamples, rows):
        chosen = generator.integers(0, questions, size=(min(rows, resamples - start), questions))
        parts.append(statistic(*(column[chosen] for column in data)))
    return np.concatenate(parts)


def _jackknife(statistic: Statistic, data: tuple[np.ndarray, ...]) -> np.ndarray:
    """[Q]: the statistic without each question in turn."""
    questions = len(data[0])
    return np.array([statistic(*(np.delete(column, i) for column in data)) for i in range(questions)])


def _bca_levels(value: float, drawn: np.ndarray, left_out: np.ndarray) -> tuple[float, float]:
    """The quantiles of the resamples that bound the interval: Φ(z₀ + (z₀ + z) / (1 − a (z₀ + z))).

    z₀ measures the median bias of the resamples, a the skewness of the jackknife values.
    """
    below = (np.sum(drawn < value) + 0.5 * np.sum(drawn == value)) / len(drawn)
    bias = NORMAL.inv_cdf(float(np.clip(below, 1 / len(drawn), 1 - 1 / len(drawn))))
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5) if spread else 0.0

    def adjusted(tail: float) -> float:
        z = bias + NORMAL.inv_cdf(tail)
        return NORMAL.cdf(bias + z / (1 - acceleration * z))

    return adjusted((1 - LEVEL) / 2), adjusted((1 + LEVEL) / 2)
