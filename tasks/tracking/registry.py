"""The model registry: one version per draft; alias `champion` on the draft in use, `challenger` on one that waits.

A version's tags lead back to everything it came from: digests and addresses of its stages, the parent run, the commit.
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import BaseModel

from hass_core.config import CHAMPION, LONGEST_NAME, NOT_IN_NAMES, RunConfig
from hass_core.errors import TrackingError
from hass_core.evaluation.report import Report
from hass_core.store import Artifact, Store, digest_of
from hass_core.target_model.loader import Target
from hass_core.target_model.source import target_name
from tasks.tracking.client import as_default, connect, tracking_uri
from tasks.tracking.lock import locked
from tasks.tracking.package import log_draft_model

CHALLENGER = "challenger"
PROMOTED = "hass.promoted"  # tag of a version and its run: the gate's verdict
WITHDRAWN = "hass.withdrawn"  # tag of a version that a rollback took out of use or a person refused
RELEASED = "hass.released"  # tag of a version: the engines it was released for
LOGGED_MODEL = "hass.logged_model"  # tag of a version: the model whose metrics and parameters are its own
TARGET = "hass.target"  # tag of a version: the identity of its target
NOTE = "mlflow.note.content"  # the description on a run's page
VERDICT = "## Version "  # begins a verdict's text, behind the card in a version's description


class DraftVersion(BaseModel, frozen=True):
    """One registered draft."""

    model: str
    version: str
    alias: str | None
    draft: Artifact
    withdrawn: bool = False  # by a rollback, or refused by a person
    target: str = ""  # identity of the target it was trained for; empty where that was not recorded

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.version}"


def target_identity(target: Target) -> str:
    """Names what a draft depends on: the target's weights, configuration, tokenizer and template."""
    return digest_of(target.identity.parts("weights", "config", "tokenizer", "template"))


def serves(version: DraftVersion, target: Target) -> bool:
    """Whether the version was trained for this very target."""
    return version.target == target_identity(target)


def registered_name(config: RunConfig) -> str:
    """`hass-draft-<target>`, without the word that all targets share and the letters that MLflow takes in no name."""
    target = target_name(config.target.source).removesuffix("-instruct")
    return config.tracking.registered_model or f"hass-draft-{NOT_IN_NAMES.sub('-', target)}"[:LONGEST_NAME].strip()


def register(
    config: RunConfig,
    run_id: str,
    draft: Artifact,
    store: Store,
    target: Target,
    lineage: Mapping[str, str],
    card: str = "",
    evaluation: Report | None = None,
) -> DraftVersion:
    """The draft's version: the one that exists, or a new one with the alias challenger; the gate makes champions.

    `evaluation` is the report it was measured with: the packed model decodes with that tree and type. `card` (Markdown)
    becomes the version's description and the folder's README.md.
    """
    client, name = connect(config), registered_name(config)
    if version_of(client, name, draft) is None:
        with tempfile.TemporaryDirectory(prefix="hass-draft-") as folder:
            source = log_draft_model(config, run_id, draft, store, target, Path(folder), card, evaluation)
        with locked(client, name):
            if version_of(client, name, draft) is None:  # another process may have been faster
                _create_model(client, name, target)
                tags = {
                    TARGET: target_identity(target),
                    LOGGED_MODEL: source.model_id,
                    "hass.digest.draft": draft.digest,
                    "hass.draft.artifact": draft.model_dump_json(),
                    **lineage,
                }
                with as_default(tracking_uri(config)):  # where `models:/` addresses are looked up
                    new = client.create_model_version(
                        name, source.model_uri, run_id, tags=tags, description=card, model_id=source.model_id
                    )
                client.set_tag(run_id, NOTE, card)
                client.set_registered_model_alias(name, CHALLENGER, new.version)
    version = version_of(client, name, draft)
    assert version is not None
    return describe(client, name, version.version)


def version_of(client: MlflowClient, name: str, draft: Artifact) -> ModelVersion | None:
    """The version that holds this draft."""
    found = client.search_model_versions(f"name = '{name}' and tags.`hass.digest.draft` = '{draft.digest}'")
    return min(found, key=lambda version: int(version.version)) if found else None


def registered_draft(client: MlflowClient, name: str, draft: Artifact) -> DraftVersion | None:
    """The draft's version, if it has one."""
    found = version_of(client, name, draft)
    return describe(client, name, str(found.version)) if found else None


def is_judged(client: MlflowClient, version: DraftVersion) -> bool:
    """Whether the gate has given its verdict on the version."""
    return PROMOTED in lineage(client, version)


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


def champions(client: MlflowClient) -> list[DraftVersion]:
    """The drafts in use, of every target."""
    names = [model.name for model in client.search_registered_models() if CHAMPION in model.aliases]
    return [version for name in names if (version := champion(client, name))]


def find_version(client: MlflowClient, name: str, number: int | None, alias: str = CHALLENGER) -> DraftVersion:
    """A version by its number; None = the one with the alias. Raises TrackingError when there is none."""
    if number is None:
        found = by_alias(client, name, alias)
        if found is None:
            raise _absent(client, name, alias)
        return found
    try:
        return describe(client, name, str(number))
    except MlflowException as error:
        raise TrackingError(f"{name} has no version {number}; `make ui` lists them under Models") from error


def _absent(client: MlflowClient, name: str, alias: str) -> TrackingError:
    """Why no version has the alias: none was made, or what became of those that were."""
    made = client.search_model_versions(f"name = '{name}'")
    if not made:
        return TrackingError(f"{name} has no {alias}; `make retrain` makes one")
    newest = client.get_model_version(name, str(max(int(version.version) for version in made)))
    count = "no draft waits"
    if alias == CHAMPION:
        promoted = sorted(int(version.version) for version in made if version.tags.get(PROMOTED) == "true")
        count = f"{len(made)} draft{'s were' if len(made) > 1 else ' was'} made and none promoted"
        if promoted:
            count = f"the alias was taken from version {promoted[-1]}, the last that was promoted"
    return TrackingError(
        f"{name} has no {alias}: {count}; version {newest.version}, the newest, {_fate(newest)}. promote-draft with "
        "version=N measures one again; `make retrain` with new prompts or other settings makes another"
    )


def _fate(version: ModelVersion) -> str:
    """What the gate or a person said of a version, with the first reason."""
    if CHAMPION in version.aliases:
        return "is the champion"
    reason = re.search(r"^- (.+)$", (version.description or "").partition(VERDICT)[2], re.MULTILINE)
    if PROMOTED not in version.tags or reason is None:
        return "has no verdict yet"
    said = "was promoted" if version.tags[PROMOTED] == "true" else "was refused"
    unescaped = re.sub(r"\\(.)", r"\1", reason[1])  # it is Markdown there
    return f"{said} ({unescaped})"


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
        withdrawn=WITHDRAWN in found.tags,
        target=found.tags.get(TARGET, ""),
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
            client.delete_model_version_tag(name, challenger.version, WITHDRAWN)
    return True


def record_verdict(
    client: MlflowClient, challenger: DraftVersion, promoted: bool, text: str, figures: Iterable[Path] = ()
) -> None:
    """Tags and description of the version, and files in the run that made it."""
    version = client.get_model_version(challenger.model, challenger.version)
    client.set_model_version_tag(challenger.model, challenger.version, PROMOTED, str(promoted).lower())
    card = (version.description or "").partition(VERDICT)[0].rstrip()
    description = f"{card}\n\n{text}".lstrip()
    client.update_model_version(challenger.model, challenger.version, description=description)
    if run := living_run(client, version.run_id):
        run_id = run.info.run_id
        client.set_tag(run_id, NOTE, description)
        client.set_tag(run_id, PROMOTED, str(promoted).lower())
        client.log_text(run_id, text, "promotion/verdict.md")
        for figure in figures:
            client.log_artifact(run_id, str(figure), "promotion")


def record_export(client: MlflowClient, version: DraftVersion, engine: str, folder: Path) -> None:
    """Note an export that passed its check: a tag of the version, card and config.json in the run that made it."""
    client.set_model_version_tag(version.model, version.version, f"hass.export.{engine}", "passed")
    if run := living_run(client, client.get_model_version(version.model, version.version).run_id):
        for name in ("README.md", "config.json"):
            client.log_artifact(run.info.run_id, str(folder / name), f"export/{engine}")


def record_failed_export(client: MlflowClient, version: DraftVersion, engine: str, reason: str) -> None:
    """Note why an export failed, as a tag of the version."""
    client.set_model_version_tag(version.model, version.version, f"hass.export.{engine}", f"failed: {reason}"[:500])


def record_release(client: MlflowClient, version: DraftVersion, engines: Iterable[str]) -> None:
    """Note that the engines load this version now, and that the servers know."""
    client.set_model_version_tag(version.model, version.version, RELEASED, ", ".join(engines))


def forget_release(client: MlflowClient, version: DraftVersion) -> None:
    """Take back that note: a release begins."""
    if is_released(client, version):
        client.delete_model_version_tag(version.model, version.version, RELEASED)


def is_released(client: MlflowClient, version: DraftVersion) -> bool:
    """Whether a release of the version has been finished."""
    return RELEASED in lineage(client, version)


def reject(client: MlflowClient, version: DraftVersion, text: str) -> None:
    """Note a person's refusal: the version waits no longer. Raises TrackingError for the champion."""
    with locked(client, version.model):
        tags = client.get_model_version(version.model, version.version)
        if CHAMPION in tags.aliases:
            raise TrackingError(
                f"version {version.version} of {version.model} is the champion; rollback-draft withdraws it"
            )
        if CHALLENGER in tags.aliases:
            client.delete_registered_model_alias(version.model, CHALLENGER)
        client.set_model_version_tag(version.model, version.version, WITHDRAWN, str(int(time.time())))
    record_verdict(client, version, False, text)


def lineage(client: MlflowClient, version: DraftVersion) -> dict[str, str]:
    """The version's tags: digests and addresses of all it came from."""
    return dict(client.get_model_version(version.model, version.version).tags)


def restore(
    client: MlflowClient, name: str, target: str, is_held: Callable[[DraftVersion], bool] | None = None
) -> dict[str, Any]:
    """Give the alias back to the last champion before that was trained for `target` (an identity).

    Returns the versions `restored` and `withdrawn`, and the numbers of those `passed_over` for their target. Raises
    TrackingError where there is nothing to go back to, or by `is_held` its draft is gone; then nothing has changed.
    """
    with locked(client, name):
        present = champion(client, name)
        if present is None:
            raise _absent(client, name, CHAMPION)
        before, passed_over = _former(client, present, target)
        if is_held and not is_held(before):
            raise TrackingError(
                f"version {before.version} of {name} would be the champion again, but {before.draft.url} is gone: put "
                "it back, or name another version to promote-draft"
            )
        client.set_registered_model_alias(name, CHAMPION, before.version)
        client.set_model_version_tag(name, present.version, WITHDRAWN, str(int(time.time())))
        if run := living_run(client, client.get_model_version(name, present.version).run_id):
            client.set_tag(run.info.run_id, PROMOTED, "withdrawn")
    restored, withdrawn = (describe(client, name, version.version) for version in (before, present))
    return {"restored": restored, "withdrawn": withdrawn, "passed_over": passed_over}


def _former(client: MlflowClient, present: DraftVersion, target: str) -> tuple[DraftVersion, tuple[str, ...]]:
    """The latest former champion of `target` that no rollback withdrew, and those of other targets after it."""
    others: list[str] = []
    seen, version = {present.version}, present
    while (number := lineage(client, version).get("hass.replaced")) and number not in seen:
        seen.add(number)
        version = find_version(client, present.model, int(number))
        if version.target == target and not version.withdrawn:
            return version, tuple(others)
        others += [] if version.target == target else [number]
    if others:
        named = ", ".join(others)
        raise TrackingError(
            f"the versions of {present.model} before version {present.version} ({named}) are drafts of another version "
            "of the target: nothing to go back to; name a version to promote-draft instead"
        )
    what = "replaced only versions that were withdrawn since" if len(seen) > 1 else "replaced no other"
    raise TrackingError(f"version {present.version} of {present.model} {what}: nothing to go back to")


def found_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run that made a version, deleted or not; None where `mlflow gc` has left nothing of it."""
    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def living_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """The same; None where somebody has deleted it, for MLflow then refuses what is written there."""
    run = found_run(client, run_id)
    return run if run and run.info.lifecycle_stage == LifecycleStage.ACTIVE else None


def _create_model(client: MlflowClient, name: str, target: Target) -> None:
    try:
        client.create_registered_model(name, description=f"HASS drafts for {target.name}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
