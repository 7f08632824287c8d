"""Export: a registered draft in the layout of a serving engine, checked as that engine would load it."""

import tempfile
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict

from hass_core.config import Engine, RunConfig, TreeConfig
from hass_core.errors import HassError
from hass_core.evaluation.evaluate import read_report
from hass_core.export import exporter
from hass_core.store import Artifact
from tasks import tracking
from tasks.resources import store_of, target_of
from tasks.retries import NETWORK_RETRIES
from tasks.tracking import DraftVersion


class Exported(BaseModel):
    """A folder that an engine loads, and what is in it."""

    model_config = ConfigDict(frozen=True)
    version: DraftVersion
    engine: Engine
    folder: str
    card: str


@task(name="export-draft", **NETWORK_RETRIES)
def export_draft(
    config: RunConfig, version: DraftVersion, engine: Engine, out: Path, served_as: str | None
) -> Exported:
    """Write the version's draft to `out` for one engine; version, run and Prefect are told.

    `served_as` is the target's name at the engine, for the command on the card; None: its folder or id.
    Raises DraftMismatch with the findings when the draft cannot serve there.
    """
    tree = _tree(config, version)
    _write(config, version, engine, out, tree, served_as)
    card = (out / "README.md").read_text()
    tracking.record_export(tracking.connect(config), version, engine, out)
    text = f"Version {version.version} of `{version.model}` for {engine}, every check passed: `{out}`\n\n{card}"
    create_markdown_artifact(text, key=f"export-{engine}", description=f"The draft for {engine}")
    return Exported(version=version, engine=engine, folder=str(out), card=card)


def export_objections(config: RunConfig, version: DraftVersion) -> tuple[str, ...]:
    """Why the draft could not serve under the engines that promotion asks for; none when all checks pass."""
    objections = []
    for engine in config.promotion.engines:
        with tempfile.TemporaryDirectory(prefix="hass-export-") as folder:
            try:
                _write(config, version, engine, Path(folder) / engine, config.tree, None)
            except HassError as error:
                objections.append(f"the export check for {engine} failed: {error}")
    return tuple(objections)


def _write(
    config: RunConfig, version: DraftVersion, engine: Engine, out: Path, tree: TreeConfig, served_as: str | None
) -> None:
    target = target_of(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hass-draft-") as folder:
        draft = store_of(config).open(version.draft).copied(Path(folder) / "draft", exporter.is_draft_file)
        exporter.export_draft(
            draft, target.model.config, target.embedding, engine, out, tree, served_as or target.folder
        )


def _tree(config: RunConfig, version: DraftVersion) -> TreeConfig:
    """The tree that the version's evaluation decoded with, chosen by measuring where it was; else the settings'."""
    store = store_of(config)
    digest = tracking.lineage(tracking.connect(config), version).get("hass.digest.evaluation")
    evaluation: Artifact | None = store.artifact("evaluation", digest) if digest else None
    return read_report(store, evaluation).tree if evaluation else config.tree
