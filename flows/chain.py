"""The stages in order, under one MLflow run. A finished stage is found in the store, so a flow starts where it must."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from prefect import Flow, flow

from flows.collector import imported
from flows.parameters import RunParameters
from hass_core.config import Stage, stages_until
from hass_core.store import Artifact
from tasks import stages
from tasks.elsewhere import run_elsewhere
from tasks.finished import find_finished
from tasks.links import link_to_mlflow, prefect_tags
from tasks.resources import made_by
from tasks.retries import LONGEST_SECONDS
from tasks.stage_lines import between_lines
from tasks.tracking import connect, open_retraining
from tasks.warm_start import resolve_warm_start

STEPS = {  # behind the prompts
    "responses": stages.generate_responses,
    "features": stages.extract_features,
    "draft": stages.train_draft,
    "evaluation": stages.evaluate_draft,
}


@dataclass(frozen=True)
class Chain:
    """What has been made, and the MLflow run that records it."""

    run_id: str
    artifacts: list[Artifact]
    new: bool = True  # False: all of it was finished and recorded before, and nothing was touched
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, of those made now

    @property
    def last(self) -> Artifact:
        return self.artifacts[-1]


@contextmanager
def run_until(last: Stage, run: RunParameters) -> Iterator[Chain]:
    """Run prompts to `last`; the MLflow run ends with the block. What is all finished and recorded is only found.

    A stage named in `run.deployments` becomes a flow run of that deployment, the others run in this process.
    """
    imported()
    asked = run.config()
    connect(asked)  # a server that is away, or may not be told this machine's keys, is named before any work
    stages.check_ahead(asked, last)
    seconds: dict[str, float] = {}
    collected = between_lines(asked, "prompts", lambda: stages.collect_prompts(asked), seconds)
    config, began = resolve_warm_start(asked, collected, run.continues)
    if began:
        stages.check_ahead(config, last)
    if found := find_finished(config, last):
        yield Chain(*found, new=False)
        return
    with open_retraining(asked, collected, prefect_tags() | began, made_by(asked), run.continues) as run_id:
        link_to_mlflow(config, run_id)
        stages.record_prompts(config, collected, run_id)
        done = [collected]
        for stage in stages_until(last)[1:]:
            if deployment := run.deployments.get(stage):
                work = partial(run_elsewhere, stage, deployment, run.for_sub_flow(run_id), config, run_id)
            else:
                work = partial(STEPS[stage], config, done[-1], run_id)
            done.append(between_lines(config, stage, work, seconds))
        yield Chain(run_id, done, seconds=seconds)


def stage_flow(name: str, last: Stage, purpose: str) -> Flow[[RunParameters], Artifact]:
    """The flow `name` that runs the stages up to `last`, the finished ones excepted, and gives what that one made."""

    @flow(name=name, flow_run_name=f"{name} {{run.preset}}", description=purpose, timeout_seconds=LONGEST_SECONDS)
    def run_stages(run: RunParameters) -> Artifact:
        with run_until(last, run) as chain:
            return chain.last

    return run_stages
