"""What an earlier retraining has done already: found in the store and in MLflow without writing a word."""

from prefect import task

from hass_core.config import RunConfig, Stage
from hass_core.stages import find_finished as find
from hass_core.store import Artifact
from tasks import tracking
from tasks.resources import store_of, target_of
from tasks.retries import SHORT


@task(name="find-finished", **SHORT)
def find_finished(config: RunConfig, last: Stage) -> tuple[str, list[Artifact]] | None:
    """The MLflow run and the stages up to `last` where all of them are finished and recorded; else None."""
    store_of(config)
    done = find(last, config, target_of(config))
    if done is None:
        return None
    artifacts = list(done.values())
    run_id = tracking.find_recorded(config, artifacts)
    return (run_id, artifacts) if run_id else None


@task(name="find-judged", **SHORT)
def find_judged(config: RunConfig, draft: Artifact) -> tracking.DraftVersion | None:
    """The draft's version where it is registered, and judged unless people promote by hand; else None."""
    client = tracking.connect(config)
    version = tracking.registered_draft(client, tracking.registered_name(config), draft)
    if version is None or (config.promotion.automatic and not tracking.is_judged(client, version)):
        return None
    return version
