"""Features: the target's hidden states over its own answers."""

from functools import partial

from prefect import task

from hass_core.config import RunConfig
from hass_core.features import extract as core
from hass_core.store import Artifact
from tasks.resources import store_of, target_of
from tasks.retries import LONG
from tasks.shards import mapped
from tasks.stage import run_stage


@task(name="extract-features", **LONG)
def extract_features(config: RunConfig, responses: Artifact, run_id: str) -> Artifact:
    """Answers → the target's hidden states, in Parquet shards."""
    work = core.extract_features
    if config.execution.workers > 1:  # for one worker, the core's own pipeline wastes less
        work = partial(work, spread=mapped(extract_part, config.execution, config=config, responses=responses))
    return run_stage("features", work, config, responses, run_id)


@task(name="extract-part", task_run_name="extract {name}", **LONG)
def extract_part(config: RunConfig, responses: Artifact, name: str) -> str:
    """One shard of the answers; loads the target once per process."""
    return core.extract_part(config, responses, store_of(config), target_of(config), name)
