"""What the stages of one process share: the store and the loaded target."""

from functools import lru_cache

from transformers.utils.logging import disable_progress_bar

from hass_core.config import RunConfig, TargetConfig
from hass_core.store import Store
from hass_core.target_model.loader import Target, load_target


def store_of(config: RunConfig) -> Store:
    """The store. Raises StoreError unless it can be written."""
    store = Store(config.store)
    store.check_writable()
    return store


def target_of(config: RunConfig) -> Target:
    """The target, loaded once per process: all stages of a retraining use the same one."""
    return _loaded(config.target.model_dump_json())


@lru_cache(maxsize=1)
def _loaded(target: str) -> Target:
    disable_progress_bar()  # a flow has one of its own
    return load_target(TargetConfig.model_validate_json(target))
