"""Watching: does the draft in use guess as well where it serves as its evaluation let expect, and do people still ask
what it was trained on?"""

import time
from collections.abc import Iterable

from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel

from hass_core.config import PromptsConfig, RunConfig
from hass_core.data.conversations import Record, user_text
from hass_core.data.live import newest_of, resolve
from hass_core.data.prompts import read_prompts
from hass_core.errors import BadInput, ConfigError
from hass_core.evaluation.drift import Drift, traffic_drift
from hass_core.evaluation.engine_metrics import Acceptance, expected_tau, read_acceptance, read_prometheus
from hass_core.evaluation.evaluate import read_report
from hass_core.store import Artifact
from tasks import tracking
from tasks.events import ACCEPTANCE_FELL, TRAFFIC_DRIFTED, emit
from tasks.resources import made_of, store_of
from tasks.retries import SHORT
from tasks.tracking import DraftVersion, WatchState

OWN_SOURCES = ("builtin", "self-written")  # prompts that are nobody's traffic


class Watched(BaseModel, frozen=True):
    """One reading of the draft in use."""

    version: DraftVersion
    tau: float | None = None  # None: no engine asked, or too few drafts since the last reading
    expected: float | None = None
    drafts: float = 0
    low_in_a_row: int = 0
    drift: Drift | None = None  # None: no log of traffic
    alarms: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"version {self.version.version} of {self.version.model}"]
        if self.expected is not None:
            told.append(self._acceptance())
        if self.drift:
            told.append(
                f"traffic is {self.drift.distance:.4f} bits from what it was trained on; chance gives up to "
                f"{self.drift.by_chance:.4f}"
            )
        return "\n".join([*told, *(f"alarm: {alarm}" for alarm in self.alarms)])

    def _acceptance(self) -> str:
        if self.tau is None:
            return f"{self.drafts:.0f} drafts since the last reading are too few to tell"
        told = f"τ {self.tau:.2f}, the evaluation lets expect {self.expected:.2f}"
        return told + (f"; too low for {self.low_in_a_row} readings in a row" if self.low_in_a_row else "")


@task(name="watch-champion", **SHORT)
def watch_champion(config: RunConfig) -> Watched:
    """Read the engines' counts and the log, note both at the champion's version, tell Prefect what calls for action.

    Raises ConfigError with nothing to watch, TrackingError without a champion, BadInput for a page without counts.
    """
    rules, client = config.watch, tracking.connect(config)
    if not (rules.endpoints or rules.prometheus or rules.traffic):
        raise ConfigError(
            "there is nothing to watch: give watch.endpoints (the engines' /metrics), watch.prometheus or watch.traffic"
        )
    version = tracking.find_version(client, tracking.registered_name(config), None, tracking.CHAMPION)
    before = tracking.watch_state(client, version)
    watched, state = Watched(version=version), before
    if rules.endpoints or rules.prometheus:
        watched, state = _acceptance(config, watched, before)
    if rules.traffic:
        watched = watched.model_copy(update={"drift": _drift(config, version)})
    alarms = _alarms(config, watched, before)
    watched = watched.model_copy(update={"alarms": tuple(alarms)})
    state = state.model_copy(update={"alarmed": before.alarmed | dict.fromkeys(alarms, time.time())})
    tracking.record_watch(client, version, state, _numbers(watched))
    for event in alarms:
        emit(event, version, str(watched), _numbers(watched) | {"readings": watched.low_in_a_row})
    create_markdown_artifact(str(watched), key="watch", description="How the draft in use does")
    return watched


def _acceptance(config: RunConfig, watched: Watched, before: WatchState) -> tuple[Watched, WatchState]:
    """The reading of the engines, and what to remember of it."""
    rules = config.watch
    counts = {url: read_acceptance(url) for url in rules.endpoints}
    if rules.prometheus:
        counts |= read_prometheus(rules.prometheus, rules.selector)
    new = [read.since(before.counts.get(url)) for url, read in counts.items()]
    tau = _mean_tau(new, rules.min_drafts)
    expected = _expected(config, watched.version, max(len(read.by_position) for read in new))
    low = tau is not None and tau < (1 - rules.tolerance) * expected
    in_a_row = before.low_in_a_row if tau is None else before.low_in_a_row + 1 if low else 0
    found = {"tau": tau, "expected": expected, "drafts": sum(read.drafts for read in new), "low_in_a_row": in_a_row}
    # counts that were too few are kept with the next reading's: their start stays where it was
    kept = counts if tau is not None else before.counts or counts
    return watched.model_copy(update=found), WatchState(counts=kept, low_in_a_row=in_a_row)


def _alarms(config: RunConfig, watched: Watched, before: WatchState) -> list[str]:
    """The events that are due, each at most once in the quiet hours."""
    rules, drift = config.watch, watched.drift
    fell = watched.tau is not None and watched.low_in_a_row >= rules.readings
    drifted = drift is not None and drift.distance > rules.drift * drift.by_chance
    due = {ACCEPTANCE_FELL: fell, TRAFFIC_DRIFTED: drifted}
    quiet = time.time() - 3600 * rules.quiet_hours
    return [event for event, is_due in due.items() if is_due and before.alarmed.get(event, 0) <= quiet]


def _numbers(watched: Watched) -> dict[str, float]:
    """The metrics of a reading."""
    numbers = {"tau": watched.tau, "expected_tau": None if watched.tau is None else watched.expected}
    if watched.drift:
        numbers |= {"traffic_distance": watched.drift.distance, "traffic_by_chance": watched.drift.by_chance}
    return {name: value for name, value in numbers.items() if value is not None}


def _mean_tau(reads: list[Acceptance], min_drafts: int) -> float | None:
    """τ of all engines together, those that draft more counting more; None while there are too few drafts."""
    gauges = [read.gauge for read in reads if read.gauge is not None]
    if gauges:
        return sum(gauges) / len(gauges)
    drafts = sum(read.drafts for read in reads)
    return 1 + sum(read.accepted for read in reads) / drafts if drafts >= min_drafts else None


def _expected(config: RunConfig, version: DraftVersion, positions: int) -> float:
    store = store_of(config)
    return expected_tau(read_report(store, _required(config, version, "evaluation")), positions)


def _drift(config: RunConfig, version: DraftVersion) -> Drift:
    """The newest of the log against what the draft was trained on: traffic of then, where there was any."""
    records = read_prompts(store_of(config), _required(config, version, "prompts"))
    traffic = [record for record in records if record.source not in OWN_SOURCES] or records
    log = PromptsConfig(files=config.watch.traffic, newest=config.watch.newest)
    recent = [item for item in newest_of(resolve(log), log) if isinstance(item, Record)]
    if not recent:
        raise BadInput(f"{', '.join(config.watch.traffic)}: no conversation there; check watch.traffic")
    return traffic_drift(_asked(traffic), _asked(recent))


def _asked(records: Iterable[Record]) -> list[str]:
    """What people asked, each once: the prompts have no duplicates, a log has."""
    return list(dict.fromkeys(user_text(record.messages) for record in records))


def _required(config: RunConfig, version: DraftVersion, stage: str) -> Artifact:
    """A stage that the version came from. Raises ConfigError where the store does not hold it."""
    artifact = made_of(config, version, stage)
    if artifact is None:
        raise ConfigError(
            f"the store {config.store} does not hold the {stage} of version {version.version} of {version.model}: what "
            "to expect is unknown; watch with the store that the draft was made in"
        )
    return artifact
