"""Export: a draft in the layout of a serving engine, checked as that engine would load it."""

import html
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel

from hass_core.config import Engine, RunConfig, TreeConfig
from hass_core.errors import HassError
from hass_core.evaluation.evaluate import read_report
from hass_core.export import exporter
from hass_core.store import MANIFEST, store_at
from hass_core.target_model.licence import target_licence
from tasks import tracking
from tasks.resources import made_of, store_of, target_of
from tasks.retries import SHORT
from tasks.tracking import DraftVersion


class DraftSource(BaseModel, frozen=True):
    """Where a draft is: a registered version, or else a folder (of the store, or any local one)."""

    version: DraftVersion | None = None
    folder: str = ""

    def __str__(self) -> str:
        return f"version {self.version.version} of {self.version.model}" if self.version else self.folder

    @property
    def short_name(self) -> str:
        """For the name of a folder."""
        return f"{self.version.model}-{self.version.version}" if self.version else Path(self.folder).name


class Exported(BaseModel, frozen=True):
    """A folder that an engine loads, and what is in it."""

    source: DraftSource
    engine: Engine
    folder: str
    card: str


@task(name="find-draft", **SHORT)
def find_draft(config: RunConfig, named: str | None) -> DraftSource:
    """`models:/NAME@ALIAS`, `models:/NAME/VERSION`, a version's number or a folder; None = the champion.

    Raises TrackingError when the registry has no such version.
    """
    client, name = tracking.connect(config), tracking.registered_name(config)
    if named is None or named.isdigit():
        number = int(named) if named else None
        return DraftSource(version=tracking.find_version(client, name, number, tracking.CHAMPION))
    if named.startswith("models:/"):
        return DraftSource(version=tracking.find_address(client, named))
    return DraftSource(folder=named.rstrip("/"))


@task(name="export-draft", **SHORT)
def export_draft(config: RunConfig, source: DraftSource, engine: Engine, out: Path, served_as: str | None) -> Exported:
    """Write the draft to `out` for one engine; its version, its run and Prefect are told, of a failure too.

    `served_as` is the target's name at the engine, for the command on the card; None: its folder or id.
    Raises DraftMismatch with the findings when the draft cannot serve there.
    """
    with _failure_recorded(config, source, engine):
        write_export(config, source, engine, out, tree_of(config, source.version), served_as)
    card = (out / "README.md").read_text()
    if source.version:
        tracking.record_export(tracking.connect(config), source.version, engine, out)
    _publish(engine, f"{source} for {engine}, every check passed: `{out}`\n\n{card}")
    return Exported(source=source, engine=engine, folder=str(out), card=card)


def export_objections(config: RunConfig, version: DraftVersion) -> tuple[str, ...]:
    """Why the draft could not serve under the engines that promotion asks for; none when all checks pass."""
    objections = []
    for engine in config.promotion.engines:
        with tempfile.TemporaryDirectory(prefix="hass-export-") as folder:
            try:
                write_export(config, DraftSource(version=version), engine, Path(folder) / engine, config.tree, None)
            except HassError as error:
                objections.append(f"the export check for {engine} failed: {error}")
    return tuple(objections)


@contextmanager
def _failure_recorded(config: RunConfig, source: DraftSource, engine: Engine) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if source.version:
            tracking.record_failed_export(tracking.connect(config), source.version, engine, str(error))
        _publish(engine, f"{source} could not be exported for {engine}: {html.escape(str(error))}")
        raise


def _publish(engine: Engine, text: str) -> None:
    create_markdown_artifact(text, key=f"export-{engine}", description=f"The draft for {engine}")


def write_export(
    config: RunConfig, source: DraftSource, engine: Engine, out: Path, tree: TreeConfig, served_as: str | None
) -> None:
    """Write a draft for one engine into the new local folder `out`, checked. Raises DraftMismatch with the findings."""
    target, licence = target_of(config), target_licence(config.target)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _local(config, source) as draft:
        exporter.export_draft(draft, target, engine, out, tree, served_as or target.folder, licence)


@contextmanager
def _local(config: RunConfig, source: DraftSource) -> Iterator[Path]:
    """The draft's files in a local folder; those of a store are checked against its manifest."""
    if source.version:
        stored = store_of(config).open(source.version.draft)
    elif "://" in source.folder or Path(source.folder, MANIFEST).is_file():
        store, artifact = store_at(source.folder, "draft")
        stored = store.open(artifact)
    else:
        yield Path(source.folder)
        return
    with tempfile.TemporaryDirectory(prefix="hass-draft-") as folder:
        yield stored.copied(Path(folder) / "draft", exporter.is_draft_file)


def tree_of(config: RunConfig, version: DraftVersion | None) -> TreeConfig:
    """The tree that the version's evaluation decoded with, chosen by measuring where it was; else the settings'."""
    evaluation = made_of(config, version, "evaluation") if version else None
    return read_report(store_of(config), evaluation).tree if evaluation else config.tree
