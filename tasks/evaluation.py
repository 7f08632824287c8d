"""Evaluation: the draft's speed-up on held-out questions, and that it changes no output."""

from prefect import task

from hass_core.config import RunConfig
from hass_core.evaluation import evaluate as core
from hass_core.store import Artifact
from tasks.retries import NETWORK_RETRIES
from tasks.stage import run_stage


@task(name="evaluate-draft", **NETWORK_RETRIES)
def evaluate_draft(config: RunConfig, draft: Artifact, run_id: str) -> Artifact:
    """Draft → what it is worth: acceptance, speed, losslessness, with figures."""
    return run_stage("evaluation", core.evaluate_draft, config, draft, run_id)
