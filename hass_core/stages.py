"""The five stages in order, each reusing what its store already holds. What the flows do, without a workflow engine."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from hass_core.config import CHAMPION, RunConfig, Stage, stages_until
from hass_core.data import prompts, responses
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.evaluation import evaluate
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.evaluation.evaluate import evaluate_draft
from hass_core.evaluation.measure import check_lengths
from hass_core.evaluation.method_names import HASS, check_methods
from hass_core.features import extract
from hass_core.features.extract import extract_features
from hass_core.memory import release_unused
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, FinishedStore, Store, Unfinished
from hass_core.target_model.loader import Target, load_target
from hass_core.training import train
from hass_core.training.launch import train_on_all

STEP_VERSIONS: dict[Stage, int] = {
    "prompts": prompts.STEP_VERSION,
    "responses": responses.STEP_VERSION,
    "features": extract.STEP_VERSION,
    "draft": train.STEP_VERSION,
    "evaluation": evaluate.STEP_VERSION,
}
Work = Callable[[RunConfig, Artifact, Store, Target, Progress], Artifact]
WORK: dict[Stage, Work] = {  # of the stages behind prompts, each on what the one before it made
    "responses": generate_responses,
    "features": extract_features,
    "draft": train_on_all,
    "evaluation": evaluate_draft,
}


def run_until(
    last: Stage, config: RunConfig, progress_for: Callable[[Stage], Progress] = lambda stage: no_progress
) -> dict[Stage, Artifact]:
    """Run the stages up to and including `last`; finished ones are found in the store and not run again."""
    store = Store(config.store)
    store.check_writable()
    target = load_target(config.target)
    check_ahead(last, config, target)
    return _run(last, config, store, target, progress_for)


def check_ahead(last: Stage, config: RunConfig, target: Target) -> None:
    """Look at what the stages up to `last` will need beside each other's results, before the first of them is paid for.

    Raises what they would raise: TargetError, CorruptFile or DraftMismatch for a draft that cannot be begun, BadInput,
    ContextTooLong or ConfigError for questions that cannot be asked.
    """
    if last in ("features", "draft", "evaluation"):
        extract.check_states(config, target)
    if last in ("draft", "evaluation") and config.draft.warm_start != CHAMPION:
        train.start_architecture(config, target)
    if last == "evaluation":
        check_methods(config.evaluation.methods, {HASS: Path(config.store)})
        check_lengths(target, load_benchmarks(config.evaluation), config.evaluation)


def find_finished(last: Stage, config: RunConfig, target: Target) -> dict[Stage, Artifact] | None:
    """The stages up to `last` where the store holds all of them finished, else None; nothing is written."""
    try:
        return _run(last, config, FinishedStore(config.store), target, lambda stage: no_progress)
    except Unfinished:
        return None


def _run(
    last: Stage, config: RunConfig, store: Store, target: Target, progress_for: Callable[[Stage], Progress]
) -> dict[Stage, Artifact]:
    done: dict[Stage, Artifact] = {"prompts": collect_prompts(config, store, target, progress_for("prompts"))}
    for source, stage in pairwise(stages_until(last)):
        done[stage] = WORK[stage](config, done[source], store, target, progress_for(stage))
        release_unused()
    return done
