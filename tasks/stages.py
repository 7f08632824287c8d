"""The stages as Prefect tasks, each on what the one before it made."""

from contextlib import AbstractContextManager
from functools import partial

from prefect import task

from hass_core import stages as core
from hass_core.config import RunConfig, Stage
from hass_core.data import prompts as prompts_stage
from hass_core.evaluation.evaluate import read_examples
from hass_core.features import extract
from hass_core.store import Artifact
from hass_core.training.train import metrics_path
from tasks import tracking
from tasks.progress import reporting
from tasks.resources import store_of, target_of
from tasks.retries import LONG, SHORT
from tasks.shards import mapped
from tasks.stage import publish_summary, run_stage


@task(name="check-ahead", **SHORT)
def check_ahead(config: RunConfig, last: Stage) -> None:
    """Refuse settings and files that a later stage up to `last` would refuse, before anything is paid for."""
    core.check_ahead(last, config, target_of(config))


@task(name="collect-prompts", **LONG)
def collect_prompts(config: RunConfig) -> Artifact:
    """Settings → prompts.parquet. Runs before there is an MLflow run: the prompts are part of its identity."""
    with reporting("prompts") as progress:
        artifact = prompts_stage.collect_prompts(config, store_of(config), target_of(config), progress)
    publish_summary(artifact)
    return artifact


@task(name="record-prompts", **SHORT)
def record_prompts(config: RunConfig, prompts: Artifact, run_id: str) -> None:
    """Enter the prompts into the retraining's MLflow run."""
    if tracking.is_recorded(config, run_id, prompts):
        return
    with tracking.stage_run(config, run_id, "prompts") as run:
        run.record(store_of(config), prompts, {})


@task(name="generate-responses", **LONG)
def generate_responses(config: RunConfig, prompts: Artifact, run_id: str) -> Artifact:
    """prompts.parquet → the target's own answers, in Parquet shards."""
    return run_stage("responses", core.WORK["responses"], config, prompts, run_id)


@task(name="extract-features", **LONG)
def extract_features(config: RunConfig, responses: Artifact, run_id: str) -> Artifact:
    """Answers → the target's hidden states, in Parquet shards."""
    work = extract.extract_features
    if config.execution.workers > 1:  # for one worker, the core's own pipeline wastes less
        work = partial(work, spread=mapped(extract_part, config.execution, config=config, responses=responses))
    return run_stage("features", work, config, responses, run_id)


@task(name="extract-part", task_run_name="extract {name}", **LONG)
def extract_part(config: RunConfig, responses: Artifact, name: str) -> str:
    """One shard of the answers; loads the target once per process."""
    return extract.extract_part(config, responses, store_of(config), target_of(config), name)


@task(name="train-draft", **LONG)
def train_draft(config: RunConfig, features: Artifact, run_id: str) -> Artifact:
    """Features → a draft, by `execution.gpus` processes. Its curves reach MLflow while it trains."""
    metrics = metrics_path(config, features, store_of(config), target_of(config))

    def watch(run: tracking.StageRun) -> AbstractContextManager[None]:
        return run.following(metrics)

    return run_stage("draft", core.WORK["draft"], config, features, run_id, watch)


@task(name="evaluate-draft", **LONG)
def evaluate_draft(config: RunConfig, draft: Artifact, run_id: str) -> Artifact:
    """Draft → what it is worth: acceptance, speed, losslessness, with figures, and one answer as a trace."""
    evaluation = run_stage("evaluation", core.WORK["evaluation"], config, draft, run_id)
    examples = read_examples(config, store_of(config), evaluation, target_of(config))
    if examples:
        tracking.record_trace(config, run_id, examples[len(examples) // 2])
    return evaluation
