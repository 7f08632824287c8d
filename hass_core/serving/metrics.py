"""Counters of a server in Prometheus' text form."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from hass_core.decoding.answers import Step


class Metrics:
    """What /metrics shows. `running` and `waiting` are asked for when it is read."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self._registry = registry = CollectorRegistry()
        self._cycles, self._accepted, self._seconds, self._tokens = 0, 0, 0.0, 0
        self._requests = Counter("hass_requests", "Requests by outcome", ["outcome"], registry=registry)
        self._new_tokens = Counter("hass_generated_tokens", "Tokens generated", registry=registry)
        self._prompt_tokens = Counter("hass_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cycle_count = Counter("hass_cycles", "Verifications", registry=registry)
        self._by_depth = Counter(
            "hass_accepted", "Cycles that accepted at least so many drafts", ["depth"], registry=registry
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "hass_tau": ("Tokens per verification since the start", self.tau),
            "hass_tokens_per_second": ("Tokens per second of decoding since the start", self._rate),
            "hass_requests_running": ("Requests that get cycles", running),
            "hass_requests_waiting": ("Requests in line", waiting),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def observe(self, step: Step) -> None:
        """Count one step of any request; called by the decoding thread alone."""
        self._new_tokens.inc(len(step.token_ids))
        self._tokens += len(step.token_ids)
        self._seconds += step.timing.total_seconds
        if step.trace.drafted_depth:  # the first step, the prefill, drafts nothing
            self._cycles, self._accepted = self._cycles + 1, self._accepted + step.trace.accepted
            self._cycle_count.inc()
            for depth in range(1, step.trace.accepted + 1):
                self._by_depth.labels(depth=depth).inc()

    def request(self, outcome: str, prompt_tokens: int = 0) -> None:
        """Count a request that has ended: ok, cancelled, refused or failed."""
        self._requests.labels(outcome=outcome).inc()
        self._prompt_tokens.inc(prompt_tokens)

    def tau(self) -> float:
        """Tokens per verification; 1 before the first."""
        return 1 + self._accepted / self._cycles if self._cycles else 1.0

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def _rate(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0
