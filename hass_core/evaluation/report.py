"""The result of an evaluation as data: what a table, a figure, a registry or the next report is made from."""

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from hass_core.config import TreeConfig
from hass_core.decoding.planner import Plan
from hass_core.evaluation import metrics
from hass_core.evaluation.lossless import Certificate
from hass_core.evaluation.method_names import HASS, PLAIN
from hass_core.evaluation.metrics import Measurement, Sample
from hass_core.evaluation.statistics import Estimate, bootstrap

ALL = "all"  # every benchmark together


class Score(BaseModel, frozen=True):
    """One method on one benchmark (or on all) at one temperature. The formulas are in `metrics`."""

    method: str
    benchmark: str
    temperature: float
    questions: int
    new_tokens: int
    tau_macro: Estimate
    tau_micro: Estimate
    tokens_per_second: Estimate
    time_per_output_token_p50: Estimate  # ms
    time_per_output_token_p95: Estimate  # ms
    speedup: Estimate
    acceptance_by_depth: list[Estimate]  # first entry: depth 1
    acceptance_by_rank: list[Estimate]  # first entry: the draft's first choice


class Comparison(BaseModel, frozen=True):
    """One method against another on the same questions, all benchmarks together."""

    method: str
    other: str
    temperature: float
    speed_ratio: Estimate  # tokens/s over the other's
    tau_gain: Estimate  # macro τ less the other's


class Served(BaseModel, frozen=True):
    """A serving engine's rate and acceptance with so many requests at once, plain or with a draft."""

    engine: str
    chain: int | None  # drafts in a row; 0 = without a draft, None = the engine does not tell
    temperature: float
    rows: int  # requests at once
    benchmark: str
    requests: int
    new_tokens: int
    tokens_per_second: Estimate  # of all requests together, prefill included
    speedup: Estimate | None  # over the engine without a draft; None where none was measured
    tau: Estimate | None  # by the engine's own counters; None without a draft
    acceptance_by_depth: list[Estimate]  # first entry: depth 1; empty where the engine counts no positions


class Report(BaseModel, frozen=True):
    """A whole evaluation."""

    target: str
    target_fingerprint: str
    draft: dict[str, Any]  # the `hass` section of the draft's config
    device: str
    dtype: str
    tree: TreeConfig
    plan: Plan | None  # how the tree was chosen; None = as set
    max_new_tokens: int
    repeats: int
    benchmarks: dict[str, int]  # questions of each
    scores: list[Score]
    comparisons: list[Comparison]
    n_alpha: list[Estimate]  # chain drafting; entry n: n of the inputs were drafted
    tree_use: list[list[float]] = []  # `metrics.tree_use` of the main method; first temperature, all benchmarks
    lossless: Certificate | None  # None when only plain decoding was measured
    same_precision: Certificate | None  # the same comparison in the precision measured; None when that is float32
    generate_tokens_per_second: float  # transformers' own generate on one question, for reference
    compilations: int = 0  # of kernels and captures of graphs while something was timed
    leak_checked: bool  # whether the training prompts were known and hold none of the questions
    provenance: dict[str, Any] = {}
    draws: int = 1  # `hass_core.sampling.DRAWS_VERSION`: what a seed meant
    served: list[Served] = []  # the same questions in a serving engine
    served_how: str = ""  # which engine that was

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(score.method for score in self.scores))

    @property
    def temperatures(self) -> list[float]:
        return list(dict.fromkeys(score.temperature for score in self.scores))

    @property
    def main_method(self) -> str:
        """What the evaluation is about: hass, or the last method where hass was not measured."""
        return HASS if HASS in self.methods else self.methods[-1]

    def score(self, method: str, benchmark: str = ALL, temperature: float | None = None) -> Score:
        """One score; by default over all benchmarks, at the first temperature."""
        wanted = (method, benchmark, self.temperatures[0] if temperature is None else temperature)
        return next(s for s in self.scores if (s.method, s.benchmark, s.temperature) == wanted)

    def summary(self) -> dict[str, float | bool]:
        """The main method's numbers by the names of docs/mlflow.md; first temperature, all benchmarks."""
        main, plain = self.score(self.main_method), self.score(PLAIN)
        by_depth = {f"acceptance_depth_{d}": e.value for d, e in enumerate(main.acceptance_by_depth, start=1)}
        by_rank = {f"acceptance_rank_{r}": e.value for r, e in enumerate(main.acceptance_by_rank, start=1)}
        return {
            "tau_macro": main.tau_macro.value,
            "tau_micro": main.tau_micro.value,
            "speedup": main.speedup.value,
            "speedup_low": main.speedup.low,
            "speedup_high": main.speedup.high,
            "tokens_per_second": main.tokens_per_second.value,
            "plain_tokens_per_second": plain.tokens_per_second.value,
            "time_per_output_token_p50": main.time_per_output_token_p50.value,
            "time_per_output_token_p95": main.time_per_output_token_p95.value,
            **by_depth,
            **by_rank,
            **{f"n_alpha_{n}": e.value for n, e in enumerate(self.n_alpha)},
            "lossless": self.lossless is None or self.lossless.identical,
        }


class Estimator:
    """Turns measurements into scores with intervals."""

    def __init__(self, measured: Iterable[Measurement], resamples: int, seed: int):
        self._measured = list(measured)
        self._resamples, self._seed = resamples, seed
        self.methods = list(dict.fromkeys(m.method for m in self._measured))
        self.temperatures = list(dict.fromkeys(m.temperature for m in self._measured))
        self.benchmarks = list(dict.fromkeys(m.benchmark for m in self._measured))

    def estimate(self, sample: Sample) -> Estimate:
        """The sample's statistic and interval."""
        return bootstrap(sample.statistic, *sample.columns, resamples=self._resamples, seed=self._seed)

    def scores(self) -> list[Score]:
        """Every method on every benchmark, then on all together, at every temperature."""
        groups = [*self.benchmarks, ALL] if len(self.benchmarks) > 1 else self.benchmarks
        found = [self._score(m, b, t) for t in self.temperatures for b in groups for m in self.methods]
        if len(self.benchmarks) == 1:
            found += [score.model_copy(update={"benchmark": ALL}) for score in found]
        return found

    def comparisons(self, method: str) -> list[Comparison]:
        """`method` against every other one."""
        return [
            self._comparison(method, other, temperature)
            for temperature in self.temperatures
            for other in self.methods
            if other not in (method, PLAIN)
        ]

    def tree_use(self, method: str) -> list[list[float]]:
        """Where in the tree the method's tokens are accepted, at the first temperature."""
        return metrics.tree_use(self._of(method, ALL, self.temperatures[0]))

    def n_alpha(self, chain: Sequence[Measurement]) -> list[Estimate]:
        """n-α for n = 0, 1, … from chain decoding."""
        return [self.estimate(metrics.n_alpha(chain, n)) for n in range(metrics.deepest(chain))]

    def _of(self, method: str, benchmark: str, temperature: float) -> list[Measurement]:
        return [
            m
            for m in self._measured
            if m.method == method and m.temperature == temperature and benchmark in (ALL, m.benchmark)
        ]

    def _comparison(self, method: str, other: str, temperature: float) -> Comparison:
        ours, theirs = self._of(method, ALL, temperature), self._of(other, ALL, temperature)
        return Comparison(
            method=method,
            other=other,
            temperature=temperature,
            speed_ratio=self.estimate(metrics.speedup(ours, theirs)),
            tau_gain=self.estimate(metrics.tau_gain(ours, theirs)),
        )

    def _score(self, method: str, benchmark: str, temperature: float) -> Score:
        ours, plain = self._of(method, benchmark, temperature), self._of(PLAIN, benchmark, temperature)
        depths, ranks = range(1, metrics.deepest(ours) + 1), range(1, metrics.widest(ours) + 1)
        return Score(
            method=method,
            benchmark=benchmark,
            temperature=temperature,
            questions=len(ours),
            new_tokens=sum(m.new_tokens for m in ours),
            tau_macro=self.estimate(metrics.tau_macro(ours)),
            tau_micro=self.estimate(metrics.tau_micro(ours)),
            tokens_per_second=self.estimate(metrics.tokens_per_second(ours)),
            time_per_output_token_p50=self.estimate(metrics.time_per_output_token(ours, 0.5)),
            time_per_output_token_p95=self.estimate(metrics.time_per_output_token(ours, 0.95)),
            speedup=self.estimate(metrics.speedup(ours, plain)),
            acceptance_by_depth=[self.estimate(metrics.acceptance_at_depth(ours, d)) for d in depths],
            acceptance_by_rank=[self.estimate(metrics.acceptance_at_rank(ours, r)) for r in ranks],
        )
