"""Features: the target's hidden states over its own answers."""

from prefect import task

from hass_core.config import RunConfig
from hass_core.features import extract as core
from hass_core.store import Artifact
from tasks.retries import NETWORK_RETRIES
from tasks.stage import run_stage


@task(name="extract-features", **NETWORK_RETRIES)
def extract_features(config: RunConfig, responses: Artifact, run_id: str) -> Artifact:
    """Answers → the target's hidden states, in Parquet shards."""
    return run_stage("features", core.extract_features, config, responses, run_id)
