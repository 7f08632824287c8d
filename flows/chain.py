"""The stages in order, under one MLflow run. A finished stage is found in the store, so a flow starts where it must."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flows.parameters import RunParameters
from hass_core.store import Artifact
from tasks import draft, evaluation, features, prompts, responses
from tasks.elsewhere import run_elsewhere
from tasks.links import link_to_mlflow, prefect_tags
from tasks.tracking import open_retraining

STEPS = {
    "responses": responses.generate_responses,
    "features": features.extract_features,
    "draft": draft.train_draft,
    "evaluation": evaluation.evaluate_draft,
}


@dataclass(frozen=True)
class Chain:
    """What has been made, and the MLflow run that records it."""

    run_id: str
    artifacts: list[Artifact]

    @property
    def last(self) -> Artifact:
        return self.artifacts[-1]


@contextmanager
def run_until(last: str, run: RunParameters) -> Iterator[Chain]:
    """Run prompts to `last`; the MLflow run ends with the block.

    A stage named in `run.deployments` becomes a flow run of that deployment, the others run in this process.
    """
    config = run.config()
    collected = prompts.collect_prompts(config)
    with open_retraining(config, collected, prefect_tags()) as run_id:
        link_to_mlflow(config, run_id)
        prompts.record_prompts(config, collected, run_id)
        done = [collected]
        for stage, step in STEPS.items():
            if deployment := run.deployments.get(stage):
                done.append(run_elsewhere(stage, deployment, run.for_sub_flow(), config, run_id))
            else:
                done.append(step(config, done[-1], run_id))
            if stage == last:
                break
        yield Chain(run_id, done)
