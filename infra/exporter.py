"""The pipeline's own metrics for Prometheus: `python -m infra.exporter [--port 9108]`, then http://HOST:9108/metrics.

Flows are processes that come and go, so nothing of theirs can be scraped. This asks what they leave behind: Prefect for
runs, MLflow for stages and drafts in use, the store for what it takes. It reads the same environment as a worker
(PREFECT_API_URL, MLFLOW_TRACKING_URI, HASS_STORE and keys). infra/grafana/hass.json shows the numbers.
"""

import argparse
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import httpx
from prefect.settings import get_current_settings
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from hass_core.config import STAGES, RunConfig, load_config
from hass_core.errors import ConfigError, TrackingError
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
log = logging.getLogger(__name__)


class PipelineMetrics:
    """The numbers, in a registry of their own. What a source does not tell is absent, not as it was before."""

    def __init__(self, registry: CollectorRegistry):
        self._up = Gauge("hass_source_up", "Whether a source answered when last asked", ["source"], registry=registry)
        self._asked = Counter("hass_source_errors", "Times that a source did not answer", ["source"], registry=registry)
        self._gauges: dict[str, list[Gauge]] = defaultdict(list)

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

    def refresh(self, source: str, read: Callable[[], None]) -> None:
        """Read a source's numbers anew; note whether it answered."""
        for gauge in self._gauges[source]:
            gauge.clear()
        try:
            read()
            self._up.labels(source).set(1)
        except Exception as error:  # whatever it is, the other sources are still worth showing
            log.warning("%s: %s", source, error)
            self._up.labels(source).set(0)
            self._asked.labels(source).inc()

    def read_runs(self) -> None:
        """Count runs by state."""
        api = get_current_settings().api
        if not api.url:
            raise TrackingError("PREFECT_API_URL is not set: no runs can be counted")
        user, _, password = api.auth_string.get_secret_value().partition(":") if api.auth_string else ("", "", "")
        with httpx.Client(auth=(user, password) if user else None, timeout=30) as client:
            for state in STATES:
                wanted = {"flow_runs": {"tags": {"all_": [TAG]}, "state": {"type": {"any_": [state]}}}}
                answer = client.post(f"{api.url}/flow_runs/count", json=wanted).raise_for_status()
                self._runs.labels(state.lower()).set(answer.json())

    def read_stages(self, config: RunConfig) -> None:
        """The last run of each stage."""
        for record in last_stages(config, TIMED):
            self._seconds.labels(record.stage).set(record.seconds)
            self._ended.labels(record.stage).set(record.ended)
            if (rate := record.numbers.get(f"{record.stage}/tokens_per_second")) is not None:
                self._rate.labels(record.stage).set(rate)

    def read_champions(self, config: RunConfig) -> None:
        """The drafts in use."""
        for record in champion_records(config):
            self._version.labels(record.model).set(record.version)
            self._registered.labels(record.model).set(record.registered)
            for number, gauge in self._champion.items():
                if number in record.numbers:
                    gauge.labels(record.model).set(record.numbers[number])

    def read_store(self, config: RunConfig) -> None:
        """Sizes of what the store holds, unfinished results apart."""
        for stage in STORED:
            for finished in ("true", "false"):
                self._bytes.labels(stage, finished).set(0)
                self._folders.labels(stage, finished).set(0)
        for entry in entries(Store(config.store), STORED):
            finished = str(entry.finished).lower()
            self._bytes.labels(entry.stage, finished).inc(entry.bytes)
            self._folders.labels(entry.stage, finished).inc()


def refresh_all(metrics: PipelineMetrics, config: RunConfig, with_store: bool) -> None:
    """Ask every source; the store only when it is due, for listing a large one takes a while."""
    metrics.refresh("prefect", metrics.read_runs)
    metrics.refresh("stages", lambda: metrics.read_stages(config))
    metrics.refresh("champions", lambda: metrics.read_champions(config))
    if with_store:
        metrics.refresh("store", lambda: metrics.read_store(config))


def main(arguments: Iterable[str] | None = None) -> None:
    """Serve the page, and ask all sources again and again, until stopped."""
    parser = argparse.ArgumentParser(prog="python -m infra.exporter", description=__doc__)
    parser.add_argument("--address", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=int, default=9108)
    parser.add_argument("--seconds", type=float, default=30, help="between two readings of Prefect and MLflow")
    parser.add_argument("--store-seconds", type=float, default=600, help="between two readings of the store")
    parser.add_argument("--preset", default="smollm2-cpu", help="preset or .toml file that names experiment and store")
    options = parser.parse_args(None if arguments is None else list(arguments))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # it is asked again soon anyway
    config, registry = load_config(options.preset, []), CollectorRegistry()
    metrics = PipelineMetrics(registry)
    try:
        start_http_server(options.port, options.address, registry)
    except OSError as error:
        reason = (error.strerror or f"{error}").lower()
        raise ConfigError(
            f"cannot listen on {options.address}:{options.port}: {reason}; choose another --port"
        ) from None
    store_read = -options.store_seconds
    while True:
        due = time.monotonic() - store_read >= options.store_seconds
        if due:
            store_read = time.monotonic()
        refresh_all(metrics, config, due)
        time.sleep(options.seconds)


if __name__ == "__main__":
    in_one_sentence(main)
