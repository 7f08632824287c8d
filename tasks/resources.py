"""What the stages of one process share: the store and the loaded target."""

import json
from functools import lru_cache
from typing import Any

from transformers.utils.logging import disable_progress_bar

from hass_core.config import RunConfig, TargetConfig
from hass_core.errors import StoreError
from hass_core.evaluation.measure import device_name
from hass_core.stages import STEP_VERSIONS
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import Target, load_target
from tasks import tracking
from tasks.clone import is_of_one_run


def store_of(config: RunConfig) -> Store:
    """The store. Raises StoreError unless it can be written, and outlives this run."""
    store = Store(config.store)
    if store.is_local and is_of_one_run(store.root):
        raise StoreError(
            f"the store {config.store} lies in the clone of the code that this run alone has, and would be gone with "
            "it: set HASS_STORE on the worker, or store in the preset, to a whole path or s3://BUCKET/PREFIX"
        )
    store.check_writable()
    return store


def target_of(config: RunConfig) -> Target:
    """The target, loaded once per process: all stages of a retraining use the same one."""
    return _loaded(config.target.model_dump_json())


def made_by(config: RunConfig) -> dict[str, Any]:
    """What decides results beside settings and prompts: the target, the machine, the versions of the steps."""
    target = target_of(config)
    return {
        "target": tracking.target_identity(target),
        "device": device_name(target.device),
        "dtype": str(target.dtype),
        "steps": STEP_VERSIONS,
    }


def is_served(config: RunConfig, version: tracking.DraftVersion) -> bool:
    """Whether a version was trained for the target of the settings; its draft says so where the registry does not."""
    target = target_of(config)
    if version.target:
        return tracking.serves(version, target)
    record = json.loads(store_of(config).open(version.draft).read_text("config.json")).get("hass", {})
    return not target.differing(record)


def is_held(config: RunConfig, version: tracking.DraftVersion) -> bool:
    """Whether the store holds a version's draft: somebody may have removed it, or the store is another by now."""
    return store_of(config).artifact("draft", version.draft.digest) is not None


def made_of(config: RunConfig, version: tracking.DraftVersion, stage: str) -> Artifact | None:
    """A stage that a version came from; None where the store does not hold it."""
    digest = tracking.lineage(tracking.connect(config), version).get(f"hass.digest.{stage}")
    return store_of(config).artifact(stage, digest) if digest else None


@lru_cache(maxsize=1)
def _loaded(target: str) -> Target:
    disable_progress_bar()  # a flow has one of its own
    return load_target(TargetConfig.model_validate_json(target))
