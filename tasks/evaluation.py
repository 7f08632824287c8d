"""Evaluation: the draft's speed-up on held-out questions, and that it changes no output."""

from prefect import task

from hass_core.config import RunConfig
from hass_core.evaluation import evaluate as core
from hass_core.store import Artifact
from tasks import tracking
from tasks.resources import store_of, target_of
from tasks.retries import LONG
from tasks.stage import run_stage


@task(name="evaluate-draft", **LONG)
def evaluate_draft(config: RunConfig, draft: Artifact, run_id: str) -> Artifact:
    """Draft → what it is worth: acceptance, speed, losslessness, with figures, and one answer as a trace."""
    evaluation = run_stage("evaluation", core.evaluate_draft, config, draft, run_id)
    examples = core.read_examples(config, store_of(config), evaluation, target_of(config))
    if examples:
        tracking.record_trace(config, run_id, examples[len(examples) // 2])
    return evaluation
