"""Drafts of the model registry for the command line, which knows no MLflow."""

from pathlib import Path
from typing import NamedTuple

from hass_core.config import RunConfig
from hass_core.errors import TrackingError
from hass_core.evaluation.evaluate import local_draft as files_of
from hass_core.store import store_at
from tasks import tracking
from tasks.tracking import DraftVersion


class Found(NamedTuple):
    """A draft of the registry: how people call it, and its local folder."""

    name: str
    folder: Path


def local_draft(address: str) -> Path:
    """The files behind models:/NAME@ALIAS or models:/NAME/VERSION. Raises TrackingError when that leads nowhere."""
    return _folder(tracking.find_address(tracking.connect(RunConfig()), address))


def find_champion() -> Found | None:
    """The only champion there is; None where there is none. Raises TrackingError where there are several."""
    found = tracking.champions(tracking.connect(RunConfig()))
    if len(found) > 1:
        named = ", ".join(f"models:/{version.model}@{tracking.CHAMPION}" for version in found)
        raise TrackingError(f"there are several champions: name one of {named}")
    return Found(f"{found[0].model} version {found[0].version}", _folder(found[0])) if found else None


def _folder(version: DraftVersion) -> Path:
    store, artifact = store_at(version.draft.url, "draft")
    return files_of(store.open(artifact))
