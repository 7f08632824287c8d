"""The pipeline's own metrics for Prometheus: `python -m infra.exporter [--port 9108]`, then http://HOST:9108/metrics.

Flows are processes that come and go, so nothing of theirs can be scraped. This asks what they leave behind: Prefect for
runs, MLflow for stages and drafts in use, the store for what it takes. It reads the same environment as a worker
(PREFECT_API_URL, MLFLOW_TRACKING_URI, HASS_STORE and keys). infra/grafana/hass.json shows the numbers.
"""

import argparse
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import httpx
from prefect.settings import get_current_settings
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from flows.prefect_server import wait_for_server
from hass_core.config import STAGES, RunConfig, load_config
from hass_core.errors import ConfigError, sentence_of
from hass_core.store import Store
from hass_core.store.housekeeping import entries
from infra.mistakes import in_one_sentence
from tasks.tracking import champion_records, last_stages

STATES = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING", "COMPLETED", "FAILED", "CANCELLED", "CRASHED")
TAG = "hass"  # of every deployment in prefect.yaml
STORED = (*STAGES, "duel")
TIMED = STAGES[1:]  # prompts are collected before there is a run that could say how long that took
CHAMPION_NUMBERS = {
    "hass_champion_tau": ("evaluation/tau_macro", "Tokens per cycle of the draft in use, where it was evaluated"),
    "hass_champion_speedup": ("evaluation/speedup", "Tokens per second with the draft in use over those without"),
    "hass_champion_served_tau": ("watch/tau", "Tokens per cycle of the draft in use where it serves, as last watched"),
    "hass_champion_expected_tau": ("watch/expected_tau", "What its evaluation lets expect there"),
}
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""What is not told now is asked for again soon anyway."""
log = logging.getLogger(__name__)

Number = tuple[Gauge, tuple[str, ...], float]
"""A gauge, its labels' values, and what it shows."""


class PipelineMetrics:
    """The numbers, in a registry of their own. What a source does not tell is absent, not as it was before."""

    def __init__(self, registry: CollectorRegistry):
        self._up = Gauge("hass_source_up", "Whether a source answered when last asked", ["source"], registry=registry)
        self._asked = Counter("hass_source_errors", "Times that a source did not answer", ["source"], registry=registry)
        self._gauges: dict[str, list[Gauge]] = defaultdict(list)
        self._told: dict[str, str] = {}  # by source, of those that are away

        def gauge(source: str, name: str, about: str, *labels: str) -> Gauge:
            made = Gauge(name, about, labels, registry=registry)
            self._gauges[source].append(made)
            return made

        self._runs = gauge("prefect", "hass_flow_runs", "Flow runs of the pipeline by state", "state")
        self._seconds = gauge("stages", "hass_stage_seconds", "Duration of a stage's last finished run", "stage")
        self._ended = gauge("stages", "hass_stage_finished_timestamp_seconds", "When that run ended", "stage")
        self._rate = gauge("stages", "hass_stage_tokens_per_second", "Tokens per second of that run", "stage")
        self._version = gauge("champions", "hass_champion_version", "Version of the draft in use", "model")
        self._registered = gauge("champions", "hass_champion_registered_timestamp_seconds", "When it was made", "model")
        self._champion = {
            number: gauge("champions", name, about, "model") for name, (number, about) in CHAMPION_NUMBERS.items()
        }
        self._bytes = gauge("store", "hass_store_bytes", "Size of what the store holds", "stage", "finished")
        self._folders = gauge("store", "hass_store_folders", "Number of results in the store", "stage", "finished")

    def refresh(self, source: str, read: Callable[[], Iterable[Number]]) -> None:
        """Show a source's numbers of now, all or none; note whether it answered, and tell when that changes."""
        numbers: list[Number] = []
        away = ""
        try:
            numbers.extend(read())
        except Exception as error:  # whatever it is, the other sources are still worth showing
            numbers.clear()
            self._up.labels(source).set(0)
            self._asked.labels(source).inc()
            away = sentence_of(error) or f"{type(error).__name__}: {error}"
        for gauge in self._gauges[source]:
            gauge.clear()
        for gauge, labels, value in numbers:
            gauge.labels(*labels).set(value)
        if not away:
            self._up.labels(source).set(1)  # only now: who sees it sees the numbers
        self._tell(source, away)

    def _tell(self, source: str, away: str) -> None:
        """Why a source is away, once; and that it is back."""
        before = self._told.get(source, "")
        self._told[source] = away
        if away and away != before:
            log.warning("%s: %s", source, away)
        elif before and not away:
            log.warning("%s: answers again", source)

    def read_runs(self) -> Iterator[Number]:
        """Count runs by state."""
        api = get_current_settings().api
        if not api.url:
            raise ConfigError("PREFECT_API_URL is not set: no runs can be counted")
        wait_for_server(api.url, pauses=())
        user, _, password = api.auth_string.get_secret_value().partition(":") if api.auth_string else ("", "", "")
        with httpx.Client(auth=(user, password) if user else None, timeout=30) as client:
            for state in STATES:
                wanted = {"flow_runs": {"tags": {"all_": [TAG]}, "state": {"type": {"any_": [state]}}}}
                answer = client.post(f"{api.url}/flow_runs/count", json=wanted).raise_for_status()
                yield self._runs, (state.lower(),), answer.json()

    def read_stages(self, config: RunConfig) -> Iterator[Number]:
        """The last run of each stage."""
        for record in last_stages(config, TIMED):
            stage = (record.stage,)
            yield self._seconds, stage, record.seconds
            yield self._ended, stage, record.ended
            if (rate := record.numbers.get(f"{record.stage}/tokens_per_second")) is not None:
                yield self._rate, stage, rate

    def read_champions(self, config: RunConfig) -> Iterator[Number]:
        """The drafts in use."""
        for record in champion_records(config):
            model = (record.model,)
            yield self._version, model, record.version
            yield self._registered, model, record.registered
            for number, gauge in self._champion.items():
                if number in record.numbers:
                    yield gauge, model, record.numbers[number]

    def read_store(self, config: RunConfig) -> Iterator[Number]:
        """Sizes of what the store holds, unfinished results apart."""
        sizes = {(stage, finished): [0, 0] for stage in STORED for finished in ("true", "false")}
        for entry in entries(Store(config.store), STORED):
            size = sizes[entry.stage, str(entry.finished).lower()]
            size[0] += entry.bytes
            size[1] += 1
        for labels, (taken, folders) in sizes.items():
            yield self._bytes, labels, taken
            yield self._folders, labels, folders


def servers(metrics: PipelineMetrics, config: RunConfig) -> dict[str, Callable[[], None]]:
    """What reads each server's numbers anew."""

    def read_mlflow() -> None:
        metrics.refresh("stages", lambda: metrics.read_stages(config))
        metrics.refresh("champions", lambda: metrics.read_champions(config))

    return {
        "prefect": lambda: metrics.refresh("prefect", metrics.read_runs),
        "mlflow": read_mlflow,
        "store": lambda: metrics.refresh("store", lambda: metrics.read_store(config)),
    }


def _again_and_again(read: Callable[[], None], seconds: float) -> None:
    while True:
        read()
        time.sleep(seconds)


def main(arguments: Iterable[str] | None = None) -> None:
    """Serve the page, and ask every server again and again, until stopped.

    Each has a thread of its own: one that takes a connection and says nothing keeps no other's numbers waiting.
    """
    parser = argparse.ArgumentParser(prog="python -m infra.exporter", description=__doc__)
    parser.add_argument("--address", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=int, default=9108)
    parser.add_argument("--seconds", type=float, default=30, help="between two readings of Prefect and MLflow")
    parser.add_argument("--store-seconds", type=float, default=600, help="between two readings of the store")
    parser.add_argument("--preset", default="smollm2-cpu", help="preset or .toml file that names experiment and store")
    options = parser.parse_args(None if arguments is None else list(arguments))
    for name, value in IMPATIENT.items():
        os.environ.setdefault(name, value)
    config, registry = load_config(options.preset, []), CollectorRegistry()
    readers = servers(PipelineMetrics(registry), config)
    try:
        start_http_server(options.port, options.address, registry)
    except OSError as error:
        reason = (error.strerror or f"{error}").lower()
        raise ConfigError(
            f"cannot listen on {options.address}:{options.port}: {reason}; choose another --port"
        ) from None
    store = readers.pop("store")
    threading.Thread(target=_again_and_again, args=(store, options.store_seconds), daemon=True).start()
    for read in readers.values():
        threading.Thread(target=_again_and_again, args=(read, options.seconds), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    in_one_sentence(main)
