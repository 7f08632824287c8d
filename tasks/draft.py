"""Training: the draft model learns to guess what the target says next."""

from contextlib import AbstractContextManager

from prefect import task

from hass_core.config import RunConfig
from hass_core.store import Artifact
from hass_core.training import train as core
from hass_core.training.launch import train_on_all
from tasks.resources import store_of, target_of
from tasks.retries import LONG
from tasks.stage import run_stage
from tasks.tracking import StageRun


@task(name="train-draft", **LONG)
def train_draft(config: RunConfig, features: Artifact, run_id: str) -> Artifact:
    """Features → a draft, by `execution.gpus` processes. Its curves reach MLflow while it trains."""
    metrics = core.metrics_path(config, features, store_of(config), target_of(config))

    def watch(run: StageRun) -> AbstractContextManager[None]:
        return run.following(metrics)

    return run_stage("draft", train_on_all, config, features, run_id, watch)
