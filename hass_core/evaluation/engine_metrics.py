"""What a serving engine counts of its speculative decoding, from its own page or from a Prometheus server.

vLLM     vllm:spec_decode_num_drafts, …_num_accepted_tokens, …_num_accepted_tokens_per_pos{position}   counters
SGLang   sglang:spec_verify_calls, with sglang:num_requests and sglang:generation_tokens               counters
         sglang:spec_accept_length                                                                     a gauge, τ
hass     hass_cycles, hass_accepted{depth}                                                             counters
"""

import math
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydantic import BaseModel

from hass_core.errors import BadInput, Unreachable
from hass_core.evaluation.report import Report

PATIENCE_SECONDS = 10
VLLM_COUNTERS = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total")
HASS_COUNTERS = ("hass_cycles_total", "hass_accepted_total")
SGLANG, SGLANG_CYCLES = "sglang:spec_accept_length", "sglang:spec_verify_calls_total"
COUNTED = (*VLLM_COUNTERS, *HASS_COUNTERS, SGLANG)
VLLM_ENGINE, SGLANG_ENGINE, HASS_ENGINE = "vLLM", "SGLang", "hass serve"
TRAFFIC = {  # requests that ended, and tokens generated
    VLLM_ENGINE: ("vllm:request_success_total", "vllm:generation_tokens_total"),
    SGLANG_ENGINE: ("sglang:num_requests_total", "sglang:generation_tokens_total"),
    HASS_ENGINE: ("hass_requests_total", "hass_generated_tokens_total"),
}
IS_THERE = {VLLM_ENGINE: "vllm:num_requests_running", SGLANG_ENGINE: "sglang:num_running_reqs", HASS_ENGINE: "hass_tau"}


class Acceptance(BaseModel, frozen=True):
    """Counts since an engine started, or between two readings."""

    drafts: float = 0  # verifications
    by_position: tuple[float, ...] = ()  # of those, how many accepted at least 1, 2, … tokens
    total: float | None = None  # accepted tokens, where an engine does not tell positions apart
    gauge: float | None = None  # τ of late, where an engine counts nothing

    @property
    def accepted(self) -> float:
        """Accepted tokens."""
        return sum(self.by_position) if self.total is None else self.total

    @property
    def tau(self) -> float | None:
        """Tokens a verification: accepted drafts and one of the target's own; None before any draft."""
        if self.gauge is not None:
            return self.gauge
        return 1 + self.accepted / self.drafts if self.drafts else None

    def since(self, before: "Acceptance | None") -> "Acceptance":
        """What came after an earlier reading; all of it where the engine was started again meanwhile: a count fell."""
        if before is None or self.gauge is not None or self._fell_from(before):
            return self
        earlier = before.by_position + (0.0,) * (len(self.by_position) - len(before.by_position))
        positions = tuple(new - old for new, old in zip(self.by_position, earlier, strict=False))
        total = None if self.total is None else self.total - (before.total or 0)
        return Acceptance(drafts=self.drafts - before.drafts, by_position=positions, total=total)

    def _fell_from(self, before: "Acceptance") -> bool:
        """Whether any count is smaller: one alone may have outgrown the earlier reading since a restart."""
        ours, theirs = ((read.drafts, read.accepted, *read.by_position) for read in (self, before))
        return any(new < old for new, old in zip_longest(ours, theirs, fillvalue=0.0))


class Reading(BaseModel, frozen=True):
    """All that an engine's page tells of its work so far."""

    engine: str
    requests: float  # that ended
    tokens: float  # generated
    acceptance: Acceptance | None  # None: it runs without a draft


def read_acceptance(url: str) -> Acceptance:
    """Fetch and read an engine's page. Raises BadInput when there is none, or one without such counts."""
    return parse_acceptance(_fetched(url), url)


def read_engine(url: str) -> Reading:
    """Fetch a page and read all of it. Raises BadInput when there is none, or it is of no engine known here."""
    samples = _samples(_fetched(url), url)
    names = {sample.name for sample in samples}
    engine = next((engine for engine, name in IS_THERE.items() if name in names), None)
    if engine is None:
        raise BadInput(
            f"{url} is the page of neither vLLM, SGLang nor hass serve; start the engine with its metrics on (SGLang: "
            "--enable-metrics)"
        )
    requests, tokens = (_sum(samples, name) or 0.0 for name in TRAFFIC[engine])
    return Reading(engine=engine, requests=requests, tokens=tokens, acceptance=_of_samples(samples, url))


def _fetched(url: str) -> str:
    try:
        answer = httpx.get(url, timeout=PATIENCE_SECONDS)
        answer.raise_for_status()
    except (httpx.HTTPStatusError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise BadInput(f"{url} shows no metrics: {error}; give the address of an engine's /metrics") from error
    except httpx.TransportError as error:
        raise Unreachable(f"{url} cannot be read: {error!r}; check that the engine runs") from error
    return answer.text


def read_prometheus(server: str, selector: str = "") -> dict[str, Acceptance]:
    """Ask a Prometheus server what the engines that `selector` picks (label matchers, such as model_name="org/model")
    count now; by instance. Raises BadInput where it is none, or knows no engine that drafts."""
    names = "|".join(COUNTED)
    matchers = ", ".join(part for part in (f'__name__=~"{names}"', selector) if part)
    try:
        answer = httpx.get(
            f"{server.rstrip('/')}/api/v1/query", params={"query": f"{{{matchers}}}"}, timeout=PATIENCE_SECONDS
        )
        answer.raise_for_status()
        series = answer.json()["data"]["result"]
        samples = [Sample(one["metric"]["__name__"], one["metric"], float(one["value"][1])) for one in series]
    except (
        httpx.HTTPStatusError,
        httpx.InvalidURL,
        httpx.UnsupportedProtocol,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        raise BadInput(f"{server} does not answer as a Prometheus server, asked for {{{matchers}}}: {error}") from error
    except httpx.TransportError as error:
        raise Unreachable(f"{server} cannot be read: {error!r}; check that Prometheus runs") from error
    if not samples:
        raise BadInput(f"{server} knows no engine that drafts: no series of {{{matchers}}}; check watch.selector")
    _check_one_model(samples, server)
    by_instance: dict[str, list[Sample]] = {}
    for sample in samples:
        by_instance.setdefault(sample.labels.get("instance", ""), []).append(sample)
    return {name: _of_samples(own, f"{name} at {server}") or Acceptance() for name, own in sorted(by_instance.items())}


def parse_acceptance(text: str, where: str) -> Acceptance:
    """Read a page. Raises BadInput naming `where` when no engine counts drafts in it."""
    if found := _of_samples(_samples(text, where), where):
        return found
    raise BadInput(
        f"{where} counts no speculative decoding: neither vLLM's, SGLang's nor hass serve's; start the engine with the "
        "draft, and SGLang with --enable-metrics"
    )


def expected_tau(report: Report, positions: int) -> float:
    """τ that an evaluation lets expect of a chain of `positions` drafts: 1 + Σ over d of Π of n-α below d.

    Without a chain's length (an engine that drafts the tree): the tree's own τ.
    """
    if not positions:
        return report.score(report.main_method).tau_micro.value
    tau, reached = 1.0, 1.0
    for share in report.n_alpha[:positions]:
        reached *= share.value
        tau += reached
    return tau


def _samples(text: str, where: str) -> list[Sample]:
    try:
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        raise BadInput(f"{where} is no Prometheus page: {error}") from error


def _of_samples(samples: Iterable[Any], where: str) -> Acceptance | None:
    """What one engine counts; None where these are no samples of an engine that drafts.

    Raises BadInput for several models, and for counts that τ cannot be made of.
    """
    _check_one_model(samples, where)
    found = next((found for engine in (_vllm, _hass, _sglang) if (found := engine(samples)) is not None), None)
    if found is None:
        return None
    if found.drafts and not found.by_position and _sum(samples, VLLM_COUNTERS[0]):
        raise BadInput(f"{where} counts drafts, but not {VLLM_COUNTERS[1]}; have whatever stands between pass it on")
    if not all(math.isfinite(count) for count in (found.drafts, found.accepted)):
        raise BadInput(f"{where} counts {found.drafts:g} drafts and {found.accepted:g} accepted tokens: no numbers")
    return found


def _check_one_model(samples: Iterable[Any], where: str) -> None:
    """Raise BadInput where engines of several models are counted: their sum says nothing of one draft."""
    models = {
        sample.labels["model_name"] for sample in samples if sample.name in COUNTED and "model_name" in sample.labels
    }
    if len(models) > 1:
        named = ", ".join(sorted(models))
        raise BadInput(
            f"{where} counts drafts of several models ({named}): pick one by watch.selector of a Prometheus server, "
            f'such as model_name="{min(models)}"'
        )


def _vllm(samples: Iterable[Any]) -> Acceptance | None:
    if not (drafts := _sum(samples, VLLM_COUNTERS[0])):
        return None if drafts is None else Acceptance()
    positions = _by_label(samples, VLLM_COUNTERS[1], "position")
    return Acceptance(drafts=drafts, by_position=positions)


def _hass(samples: Iterable[Any]) -> Acceptance | None:
    cycles, accepted = HASS_COUNTERS
    if (drafts := _sum(samples, cycles)) is None:
        return None
    return Acceptance(drafts=drafts, by_position=_by_label(samples, accepted, "depth"))


def _sglang(samples: Iterable[Any]) -> Acceptance | None:
    values = [sample.value for sample in samples if sample.name == SGLANG]
    live = [value for value in values if value > 0]  # 0 before the first answer, and without a draft
    if cycles := _sum(samples, SGLANG_CYCLES):
        # a request's first token comes with its prompt, each verification adds one token of the target's own
        requests, tokens = (_sum(samples, name) or 0.0 for name in TRAFFIC[SGLANG_ENGINE])
        return Acceptance(drafts=cycles, total=tokens - requests - cycles)
    if not values:
        return None
    return Acceptance(gauge=sum(live) / len(live)) if live else Acceptance()


def _sum(samples: Iterable[Any], name: str) -> float | None:
    """Over all processes of the engine; None where the page does not have it."""
    values = [sample.value for sample in samples if sample.name == name]
    return sum(values) if values else None


def _by_label(samples: Iterable[Any], name: str, label: str) -> tuple[float, ...]:
    totals: dict[int, float] = {}
    for sample in samples:
        if sample.name == name and (place := sample.labels.get(label, "")).isdecimal():
            totals[int(place)] = totals.get(int(place), 0.0) + sample.value
    return tuple(totals[place] for place in sorted(totals))
