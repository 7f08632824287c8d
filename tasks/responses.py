"""Responses: the target answers the prompts."""

from prefect import task

from hass_core.config import RunConfig
from hass_core.data import responses as core
from hass_core.store import Artifact
from tasks.retries import LONG
from tasks.stage import run_stage


@task(name="generate-responses", **LONG)
def generate_responses(config: RunConfig, prompts: Artifact, run_id: str) -> Artifact:
    """prompts.parquet → the target's own answers, in Parquet shards."""
    return run_stage("responses", core.generate_responses, config, prompts, run_id)
