"""The model registry: one version per draft; alias `champion` on the draft in use, `challenger` on one that waits.

A version's tags lead back to everything it came from: digests and addresses of its stages, the parent run, the commit.
"""

import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict

from hass_core.config import RunConfig
from hass_core.errors import TrackingError
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import Target
from hass_core.target_model.source import target_name
from tasks.tracking.client import as_default, connect, tracking_uri
from tasks.tracking.lock import locked
from tasks.tracking.package import log_draft_model

CHAMPION, CHALLENGER = "champion", "challenger"
NOTE = "mlflow.note.content"  # the description on a run's page
VERDICT = "## Version "  # begins a verdict's text, behind the card in a version's description


class DraftVersion(BaseModel):
    """One registered draft."""

    model_config = ConfigDict(frozen=True)
    model: str
    version: str
    alias: str | None
    draft: Artifact
    withdrawn: bool = False  # by a rollback

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.version}"


def registered_name(config: RunConfig) -> str:
    """`hass-draft-<target>`, without the word that all targets share."""
    target = target_name(config.target.source).removesuffix("-instruct")
    return config.tracking.registered_model or f"hass-draft-{target}"


def register(
    config: RunConfig,
    run_id: str,
    draft: Artifact,
    store: Store,
    target: Target,
    lineage: Mapping[str, str],
    card: str = "",
) -> DraftVersion:
    """The draft's version: the one that exists, or a new one with alias champion (the first) or challenger.

    `card` (Markdown) becomes the version's description and the folder's README.md.
    """
    client, name = connect(config), registered_name(config)
    if version_of(client, name, draft) is None:
        with tempfile.TemporaryDirectory(prefix="hass-draft-") as folder:
            source = log_draft_model(config, run_id, draft, store, target, Path(folder), card)
        with locked(client, name):
            if version_of(client, name, draft) is None:  # another process may have been faster
                _create_model(client, name, target)
                tags = {"hass.digest.draft": draft.digest, "hass.draft.artifact": draft.model_dump_json(), **lineage}
                with as_default(tracking_uri(config)):  # where `models:/` addresses are looked up
                    new = client.create_model_version(
                        name, source.model_uri, run_id, tags=tags, description=card, model_id=source.model_id
                    )
                client.set_tag(run_id, NOTE, card)
                alias = CHALLENGER if champion(client, name) else CHAMPION
                client.set_registered_model_alias(name, alias, new.version)
    version = version_of(client, name, draft)
    assert version is not None
    return describe(client, name, version.version)


def version_of(client: MlflowClient, name: str, draft: Artifact) -> ModelVersion | None:
    """The version that holds this draft."""
    found = client.search_model_versions(f"name = '{name}' and tags.`hass.digest.draft` = '{draft.digest}'")
    return min(found, key=lambda version: int(version.version)) if found else None


def champion(client: MlflowClient, name: str) -> DraftVersion | None:
    """The draft in use."""
    return by_alias(client, name, CHAMPION)


def by_alias(client: MlflowClient, name: str, alias: str) -> DraftVersion | None:
    """The version an alias points to."""
    try:
        return described(client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            return None
        raise


def find_version(client: MlflowClient, name: str, number: int | None, alias: str = CHALLENGER) -> DraftVersion:
    """A version by its number; None = the one with the alias. Raises TrackingError when there is none."""
    if number is None:
        found = by_alias(client, name, alias)
        if found is None:
            raise TrackingError(f"{name} has no {alias}; `make retrain` makes one, or name a version")
        return found
    try:
        return describe(client, name, str(number))
    except MlflowException as error:
        raise TrackingError(f"{name} has no version {number}; `make ui` lists them under Models") from error


def find_address(client: MlflowClient, address: str) -> DraftVersion:
    """A version by models:/NAME@ALIAS or models:/NAME/VERSION. Raises TrackingError when that leads nowhere."""
    named = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", address)
    if named is None:
        raise TrackingError(f"{address} has another form than models:/NAME@ALIAS and models:/NAME/VERSION")
    name, alias, number = named.groups()
    return find_version(client, name, int(number) if number else None, alias or CHAMPION)


def describe(client: MlflowClient, name: str, version: str) -> DraftVersion:
    """A version with its draft. Raises TrackingError for a version that this pipeline did not register."""
    return described(client.get_model_version(name, version))


def described(found: ModelVersion) -> DraftVersion:
    """The same, of a version that has been fetched."""
    if "hass.draft.artifact" not in found.tags:
        raise TrackingError(
            f"version {found.version} of {found.name} was not registered by this pipeline; remove its alias"
        )
    return DraftVersion(
        model=found.name,
        version=str(found.version),
        alias=CHAMPION if CHAMPION in found.aliases else next(iter(found.aliases), None),
        draft=Artifact.model_validate_json(found.tags["hass.draft.artifact"]),
        withdrawn="hass.withdrawn" in found.tags,
    )


def crown(client: MlflowClient, challenger: DraftVersion, expected: DraftVersion | None) -> bool:
    """Make `challenger` the champion if `expected` still is it; False when another promotion came first."""
    name = challenger.model
    with locked(client, name):
        present = champion(client, name)
        if (present and present.version) != (expected and expected.version):
            return False
        if expected:
            client.set_model_version_tag(name, challenger.version, "hass.replaced", expected.version)
        client.set_registered_model_alias(name, CHAMPION, challenger.version)
        if CHALLENGER in client.get_model_version(name, challenger.version).aliases:
            client.delete_registered_model_alias(name, CHALLENGER)
        if challenger.withdrawn:
            client.delete_model_version_tag(name, challenger.version, "hass.withdrawn")
    return True


def record_verdict(
    client: MlflowClient, challenger: DraftVersion, promoted: bool, text: str, figures: Iterable[Path] = ()
) -> None:
    """Tags and description of the version, and files in the run that made it."""
    version = client.get_model_version(challenger.model, challenger.version)
    client.set_model_version_tag(challenger.model, challenger.version, "hass.promoted", str(promoted).lower())
    card = (version.description or "").partition(VERDICT)[0].rstrip()
    description = f"{card}\n\n{text}".lstrip()
    client.update_model_version(challenger.model, challenger.version, description=description)
    if version.run_id:
        client.set_tag(version.run_id, NOTE, description)
        client.set_tag(version.run_id, "hass.promoted", str(promoted).lower())
        client.log_text(version.run_id, text, "promotion/verdict.md")
        for figure in figures:
            client.log_artifact(version.run_id, str(figure), "promotion")


def record_export(client: MlflowClient, version: DraftVersion, engine: str, folder: Path) -> None:
    """Note an export that passed its check: a tag of the version, card and config.json in the run that made it."""
    client.set_model_version_tag(version.model, version.version, f"hass.export.{engine}", "passed")
    if run_id := client.get_model_version(version.model, version.version).run_id:
        for name in ("README.md", "config.json"):
            client.log_artifact(run_id, str(folder / name), f"export/{engine}")


def record_failed_export(client: MlflowClient, version: DraftVersion, engine: str, reason: str) -> None:
    """Note why an export failed, as a tag of the version."""
    client.set_model_version_tag(version.model, version.version, f"hass.export.{engine}", f"failed: {reason}"[:500])


def lineage(client: MlflowClient, version: DraftVersion) -> dict[str, str]:
    """The version's tags: digests and addresses of all it came from."""
    return dict(client.get_model_version(version.model, version.version).tags)


def restore(client: MlflowClient, name: str) -> tuple[DraftVersion, DraftVersion]:
    """Give the alias back to the champion before; returns (restored, withdrawn). Raises TrackingError without one."""
    with locked(client, name):
        present = champion(client, name)
        if present is None:
            raise TrackingError(f"{name} has no champion; `make retrain` makes one")
        withdrawn = client.get_model_version(name, present.version)
        before = withdrawn.tags.get("hass.replaced")
        if before is None:
            raise TrackingError(f"version {present.version} of {name} replaced no other: nothing to go back to")
        client.set_registered_model_alias(name, CHAMPION, before)
        client.set_model_version_tag(name, present.version, "hass.withdrawn", str(int(time.time())))
        if withdrawn.run_id:
            client.set_tag(withdrawn.run_id, "hass.promoted", "withdrawn")
    return describe(client, name, before), describe(client, name, present.version)


def _create_model(client: MlflowClient, name: str, target: Target) -> None:
    try:
        client.create_registered_model(name, {"hass.target": target.fingerprint}, f"HASS drafts for {target.name}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
