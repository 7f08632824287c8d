"""Watching: does the draft in use guess as well where it serves as its evaluation let expect?"""

import time

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from pydantic import BaseModel, ConfigDict

from hass_core.config import RunConfig
from hass_core.errors import ConfigError
from hass_core.evaluation.engine_metrics import Acceptance, expected_tau, read_acceptance
from hass_core.evaluation.evaluate import read_report
from tasks import tracking
from tasks.resources import store_of
from tasks.retries import NETWORK_RETRIES
from tasks.tracking import DraftVersion, WatchState

EVENT = "hass.acceptance-fell"


class Watched(BaseModel):
    """One reading of the draft in use."""

    model_config = ConfigDict(frozen=True)
    version: DraftVersion
    tau: float | None  # None: too few drafts since the last reading
    expected: float
    drafts: float
    low_in_a_row: int
    alarm: bool

    def __str__(self) -> str:
        named = f"version {self.version.version} of {self.version.model}"
        if self.tau is None:
            return f"{named}: {self.drafts:.0f} drafts since the last reading are too few to tell"
        told = f"{named}: τ {self.tau:.2f}, the evaluation lets expect {self.expected:.2f}"
        if self.low_in_a_row:
            told += f"; too low for {self.low_in_a_row} readings in a row"
        return told + ("; alarm" if self.alarm else "")


@task(name="watch-champion", **NETWORK_RETRIES)
def watch_champion(config: RunConfig) -> Watched:
    """Read the engines' counts, note τ at the champion's version, and tell Prefect when it has fallen for long.

    Raises ConfigError without endpoints, TrackingError without a champion, BadInput for a page without counts.
    """
    if not config.watch.endpoints:
        raise ConfigError("watch.endpoints is empty: name the addresses of the engines' /metrics")
    client = tracking.connect(config)
    version = tracking.find_version(client, tracking.registered_name(config), None, tracking.CHAMPION)
    before = tracking.watch_state(client, version)
    counts = {url: read_acceptance(url) for url in config.watch.endpoints}
    new = {url: read.since(before.counts.get(url)) for url, read in counts.items()}
    watched, state = _weighed(config, version, before, new)
    # counts that were too few are kept with the next reading's: their start stays where it was
    kept = counts if watched.tau is not None else before.counts or counts
    numbers = {} if watched.tau is None else {"tau": watched.tau, "expected_tau": watched.expected}
    tracking.record_watch(client, version, state.model_copy(update={"counts": kept}), numbers)
    if watched.alarm:
        _alarm(watched)
    return watched


def _weighed(
    config: RunConfig, version: DraftVersion, before: WatchState, new: dict[str, Acceptance]
) -> tuple[Watched, WatchState]:
    """The reading, and what to remember."""
    rules = config.watch
    drafts = sum(read.drafts for read in new.values())
    tau = _mean_tau(list(new.values()), rules.min_drafts)
    positions = max(len(read.by_position) for read in new.values())
    expected = _expected(config, version, positions)
    low = tau is not None and tau < (1 - rules.tolerance) * expected
    in_a_row = before.low_in_a_row if tau is None else before.low_in_a_row + 1 if low else 0
    rested = before.alarmed is None or time.time() - before.alarmed >= 3600 * rules.quiet_hours
    alarm = low and in_a_row >= rules.readings and rested
    watched = Watched(version=version, tau=tau, expected=expected, drafts=drafts, low_in_a_row=in_a_row, alarm=alarm)
    return watched, WatchState(low_in_a_row=in_a_row, alarmed=time.time() if alarm else before.alarmed)


def _mean_tau(reads: list[Acceptance], min_drafts: int) -> float | None:
    """τ of all engines together, those that draft more counting more; None while there are too few drafts."""
    gauges = [read.gauge for read in reads if read.gauge is not None]
    if gauges:
        return sum(gauges) / len(gauges)
    drafts = sum(read.drafts for read in reads)
    return 1 + sum(sum(read.by_position) for read in reads) / drafts if drafts >= min_drafts else None


def _expected(config: RunConfig, version: DraftVersion, positions: int) -> float:
    store = store_of(config)
    digest = tracking.lineage(tracking.connect(config), version).get("hass.digest.evaluation")
    evaluation = store.artifact("evaluation", digest) if digest else None
    if evaluation is None:
        raise ConfigError(
            f"the store {config.store} does not hold the evaluation of version {version.version} of {version.model}: "
            "what to expect is unknown; watch with the store that the draft was made in"
        )
    return expected_tau(read_report(store, evaluation), positions)


def _alarm(watched: Watched) -> None:
    model, number = watched.version.model, watched.version.version
    emit_event(
        event=EVENT,
        resource={"prefect.resource.id": f"hass.draft.{model}", "prefect.resource.name": f"{model} version {number}"},
        payload={"tau": watched.tau, "expected_tau": watched.expected, "readings": watched.low_in_a_row},
    )
    create_markdown_artifact(str(watched), key="watch", description="The draft in use guesses worse than it should")
