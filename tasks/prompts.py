"""Prompts: written for the project, from files or data sets, or by the target itself."""

from prefect import task

from hass_core import stages
from hass_core.config import RunConfig, Stage
from hass_core.data import prompts as core
from hass_core.store import Artifact
from tasks.progress import reporting
from tasks.resources import store_of, target_of
from tasks.retries import LONG, SHORT
from tasks.stage import publish_summary
from tasks.tracking import is_recorded, stage_run


@task(name="check-ahead", **SHORT)
def check_ahead(config: RunConfig, last: Stage) -> None:
    """Refuse settings and files that a later stage up to `last` would refuse, before anything is paid for."""
    stages.check_ahead(last, config, target_of(config))


@task(name="collect-prompts", **LONG)
def collect_prompts(config: RunConfig) -> Artifact:
    """Settings → prompts.parquet. Runs before there is an MLflow run: the prompts are part of its identity."""
    with reporting("prompts") as progress:
        artifact = core.collect_prompts(config, store_of(config), target_of(config), progress)
    publish_summary(artifact)
    return artifact


@task(name="record-prompts", **SHORT)
def record_prompts(config: RunConfig, prompts: Artifact, run_id: str) -> None:
    """Enter the prompts into the retraining's MLflow run."""
    if is_recorded(config, run_id, prompts):
        return
    with stage_run(config, run_id, "prompts") as run:
        run.record(store_of(config), prompts, {})
