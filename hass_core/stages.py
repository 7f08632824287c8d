"""The five stages in order, each reusing what its store already holds. What the flows do, without a workflow engine."""

from collections.abc import Callable
from typing import get_args

from hass_core.config import RunConfig, Stage
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.evaluation.evaluate import evaluate_draft
from hass_core.features.extract import extract_features
from hass_core.memory import release_unused
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import Target, load_target
from hass_core.training.train import train_draft

STAGES: tuple[Stage, ...] = get_args(Stage)
Work = Callable[[RunConfig, Artifact, Store, Target, Progress], Artifact]


def run_until(
    last: Stage, config: RunConfig, progress_for: Callable[[Stage], Progress] = lambda stage: no_progress
) -> dict[Stage, Artifact]:
    """Run the stages up to and including `last`; finished ones are found in the store and not run again."""
    store = Store(config.store)
    store.check_writable()
    target = load_target(config.target)
    done: dict[Stage, Artifact] = {"prompts": collect_prompts(config, store, target, progress_for("prompts"))}
    following: tuple[tuple[Stage, Work, Stage], ...] = (
        ("responses", generate_responses, "prompts"),
        ("features", extract_features, "responses"),
        ("draft", train_draft, "features"),
        ("evaluation", evaluate_draft, "draft"),
    )
    for stage, run, source in following[: STAGES.index(last)]:
        done[stage] = run(config, done[source], store, target, progress_for(stage))
        release_unused()
    return done
