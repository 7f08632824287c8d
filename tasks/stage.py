"""What surrounds every stage: progress, the MLflow child run, a summary in Prefect's UI."""

import html
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

from prefect.artifacts import create_markdown_artifact

from hass_core.config import RunConfig
from hass_core.memory import release_unused
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, FinishedStore, Store, Unfinished
from hass_core.target_model.loader import Target
from tasks.progress import reporting
from tasks.resources import store_of, target_of
from tasks.tracking import StageRun, is_recorded, stage_run

CoreStage = Callable[[RunConfig, Artifact, Store, Target, Progress], Artifact]
Watch = Callable[[StageRun], AbstractContextManager[None]]


def run_stage(
    stage: str,
    work: CoreStage,
    config: RunConfig,
    source: Artifact,
    run_id: str,
    watch: Watch = lambda run: nullcontext(),
) -> Artifact:
    """Do one stage's work on `source`, or find it done; `run_id` is the retraining's MLflow run.

    What is finished and recorded is left alone: nothing is written. `watch` is entered while the work is under way.
    """
    store, target = store_of(config), target_of(config)
    with suppress(Unfinished):
        found = work(config, source, FinishedStore(config.store), target, no_progress)
        if is_recorded(config, run_id, found):
            return found
    with reporting(stage) as progress, stage_run(config, run_id, stage) as run:
        with watch(run):
            artifact = work(config, source, store, target, progress)
        run.record(store, artifact, {source.stage: source})
    release_unused()
    publish_summary(artifact)
    return artifact


def publish_summary(artifact: Artifact) -> None:
    """A table of the stage's numbers as a Prefect artifact."""
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in artifact.summary.items())
    text = f"## {artifact.stage} `{artifact.digest}`\n\n| | |\n|---|---|\n{rows}\n\nStored in `{_cell(artifact.url)}`\n"
    create_markdown_artifact(text, key=f"{artifact.stage}-summary", description=f"What {artifact.stage} made")


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
