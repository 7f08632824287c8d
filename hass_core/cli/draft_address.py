"""Which draft a command means, and which target that draft is for: told by the draft itself.

A draft is named by a folder, by its address in a store (STORE/draft/DIGEST, on S3 too) or by its place in the model
registry (models:/NAME@champion, models:/NAME/VERSION). Where none is named it is the champion found here.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hass_core.cli.common import notes
from hass_core.config import RunConfig, TargetConfig
from hass_core.draft_model.shipped import shipped_draft
from hass_core.errors import BadInput, ConfigError
from hass_core.json_files import read_object
from hass_core.target_model.source import DEFAULT, check_source, target_name

REGISTRY = "models:/"
PLAIN = "none"
A_DRAFT = "a draft is a folder with config.json and its weights"
LOCAL_DATABASE = Path(".hass/mlflow.db")


def find_draft(address: str) -> Path:
    """The local folder of a draft. Raises BadInput, ConfigError, TrackingError or StoreError where there is none."""
    if address.startswith(REGISTRY):
        return _registry().local_draft(address)
    if "://" in address:
        from hass_core.evaluation.evaluate import local_draft
        from hass_core.store import store_at

        store, artifact = store_at(address, "draft")
        return local_draft(store.open(artifact))
    folder = Path(address)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise BadInput(f"the draft {folder} is {what}: {A_DRAFT}, or models:/NAME@champion")
    read_object(folder / "config.json", BadInput, A_DRAFT)
    return folder


def default_draft(given: Path | None, target: str | None = None) -> Path | None:
    """`given`, else the champion of this folder's registry, else the shipped draft where `target` is its own, else
    none: plain decoding. `none` asks for that."""
    if given is not None:
        return None if str(given) == PLAIN else given
    if LOCAL_DATABASE.is_file() or os.environ.get("MLFLOW_TRACKING_URI"):
        found = _registry().find_champion()
        if found is not None:
            notes.print(f"[dim]draft: {found.name}, the champion[/]", highlight=False)
            return found.folder
    if target in (None, DEFAULT):
        notes.print("[dim]draft: the one that comes with the package; no champion is here[/]", highlight=False)
        return shipped_draft()
    told = "no champion is here: decoding without a draft; `make retrain` makes one, if it is faster than that"
    notes.print(f"[dim]{told}[/]", highlight=False)
    return None


def target_of(draft: Path | None, given: str | None) -> TargetConfig:
    """The target that is `given`, else the one that the draft's record names, else the default's."""
    if given is not None:
        return TargetConfig(source=given)
    record: dict[str, Any] = read_object(draft / "config.json", BadInput, A_DRAFT).get("hass") or {} if draft else {}
    if source := record.get("target_source"):
        check_source(source)
        return TargetConfig(source=source, revision=record.get("target_revision"))
    if draft is None or record.get("target") in (None, target_name(DEFAULT)):
        check_source(DEFAULT)
        return TargetConfig(source=DEFAULT)
    raise BadInput(f"the draft in {draft} was trained for {record['target']}; say where that is: --target")


def with_target_of(draft: Path, chosen: RunConfig, changes: Sequence[str]) -> RunConfig:
    """The settings with the draft's own target, unless one of the `changes` names another."""
    if any(change.startswith("target.source") for change in changes):
        return chosen
    own = target_of(draft, None)
    target = chosen.target.model_copy(update={"source": own.source, "revision": own.revision})
    return chosen.model_copy(update={"target": target})


def _registry() -> Any:
    """The part that knows MLflow. The core imports no tracker, so it is loaded by name, when it is asked for."""
    try:
        return import_module("tasks.draft_address")
    except ImportError as error:
        raise ConfigError(
            f"{REGISTRY}… needs {error.name}: pip install 'hass-pipeline[pipeline]', or name the draft's folder"
        ) from None
