"""What is known of a draft in service: its τ by day as metrics of its version, and where the engines' counts stood."""

import time

from mlflow import MlflowClient
from mlflow.entities import Metric
from pydantic import BaseModel, ValidationError

from hass_core.evaluation.engine_metrics import Acceptance
from tasks.tracking.registry import LOGGED_MODEL, DraftVersion, lineage, living_run

STATE = "hass.watch"  # tag of a version
SECONDS_PER_DAY = 86_400


class WatchState(BaseModel, frozen=True):
    """Between two readings of one version."""

    counts: dict[str, Acceptance] = {}  # by endpoint
    low_in_a_row: int = 0
    alarmed: dict[str, float] = {}  # Unix time of the last alarm, by event


def watch_state(client: MlflowClient, version: DraftVersion) -> WatchState:
    """What the last reading left; of a tag that somebody broke, nothing."""
    try:
        return WatchState.model_validate_json(lineage(client, version).get(STATE, "{}"))
    except ValidationError:
        return WatchState()


def record_watch(client: MlflowClient, version: DraftVersion, state: WatchState, numbers: dict[str, float]) -> None:
    """Keep the state, and the numbers as metrics `watch/…` of the version's model, a step a day."""
    client.set_model_version_tag(version.model, version.version, STATE, state.model_dump_json())
    found = client.get_model_version(version.model, version.version)
    run, model_id = living_run(client, found.run_id), found.tags.get(LOGGED_MODEL)
    now = time.time()
    values = [
        Metric(f"watch/{name}", value, int(1000 * now), int(now // SECONDS_PER_DAY), model_id=model_id)
        for name, value in numbers.items()
    ]
    if run and values:  # else the tag still tells
        client.log_batch(run.info.run_id, metrics=values)
