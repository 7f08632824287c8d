"""A store that only looks: what is finished in it, found by the same keys, with nothing begun."""

from collections.abc import Mapping
from typing import Any

from hass_core.store.artifacts import digest_of
from hass_core.store.store import StageFolder, Store


class Unfinished(Exception):
    """A stage that a `FinishedStore` was asked for is not finished."""


class FinishedStore(Store):
    """A store for asking a stage's own code what it would find: it raises Unfinished instead of starting work."""

    def stage(self, stage: str, key: Mapping[str, Any]) -> StageFolder:
        """The folder of a finished stage. Raises Unfinished."""
        folder = StageFolder(self, stage, digest_of({"stage": stage, **key}), dict(key))
        if folder.manifest() is None:
            raise Unfinished(folder.url)
        return folder
