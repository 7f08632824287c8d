"""Continue from the draft in use: `draft.warm_start = "champion"` becomes the folder of one certain draft."""

from prefect import task

from hass_core.config import CHAMPION, RunConfig
from hass_core.draft_model.eagle3 import is_eagle3
from hass_core.draft_model.eagle3_files import reads_last_state, taps_told
from hass_core.draft_model.files import read_config
from hass_core.evaluation.evaluate import local_draft
from hass_core.store import Artifact
from tasks import resources, tracking
from tasks.resources import is_held, is_served, made_by, store_of
from tasks.retries import SHORT

NONE = "none"


@task(name="resolve-warm-start", **SHORT)
def resolve_warm_start(config: RunConfig, prompts: Artifact, continues: str | None) -> tuple[RunConfig, dict[str, str]]:
    """The settings with a folder for `champion`, and the tags by which a retraining remembers its choice.

    One retraining (settings, prompts, target) starts from one draft for ever: its record says which. A new one takes
    the champion of this target; where there is none, or one of another architecture or over other states of the target,
    the draft starts as draft.start says.
    """
    if config.draft.warm_start != CHAMPION:
        return config, {}
    chosen = tracking.recorded_warm_start(config, prompts, made_by(config), continues) or _present(config)
    folder = None
    if chosen != NONE:
        folder = str(local_draft(store_of(config).open(Artifact.model_validate_json(chosen))))
    draft = config.draft.model_copy(update={"warm_start": folder})
    return config.model_copy(update={"draft": draft}), {tracking.WARM_START: chosen}


def _present(config: RunConfig) -> str:
    """The champion's draft, or none."""
    champion = tracking.champion(tracking.connect(config), tracking.registered_name(config))
    if champion is None or not is_held(config, champion) or not is_served(config, champion):
        return NONE
    folder = local_draft(store_of(config).open(champion.draft))
    told, wanted = read_config(folder), config.draft
    if is_eagle3(told, {}) != (wanted.architecture == "eagle3"):
        return NONE
    if wanted.architecture == "eagle3":
        layers = resources.target_of(config).num_layers
        if (() if reads_last_state(told) else taps_told(told, layers)) != wanted.tapped(layers):
            return NONE
    return champion.draft.model_dump_json(exclude={"summary"})
