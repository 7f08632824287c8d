"""Promotion: measure champion and challenger on the same questions here, judge, move the alias, say why."""

import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict

from hass_core.config import RunConfig
from hass_core.evaluation import evaluate as core
from hass_core.evaluation.figures import draw_gains
from hass_core.evaluation.metrics import Measurement
from hass_core.progress import Progress
from hass_core.store import Artifact
from tasks import tracking
from tasks.export import export_objections
from tasks.gate import Verdict, judge
from tasks.progress import reporting
from tasks.resources import store_of, target_of
from tasks.retries import NETWORK_RETRIES
from tasks.tracking import DraftVersion


@task(name="decide-promotion", **NETWORK_RETRIES)
def decide(config: RunConfig, challenger: DraftVersion, again: bool = False) -> Verdict:
    """Make `challenger` the champion if the gate lets it; the verdict goes to the version, its run and Prefect.

    A version that a rollback withdrew is refused unless `again`.
    """
    client = tracking.connect(config)
    while True:
        champion = tracking.champion(client, challenger.model)
        verdict = _verdict(config, challenger, champion, again)
        taken = verdict.promoted and champion != challenger
        if not taken or tracking.crown(client, challenger, champion):
            break  # else another promotion came first: compare with the new champion
    _record(config, challenger, verdict)
    create_markdown_artifact(verdict.markdown(), key="promotion", description="Verdict of the promotion gate")
    return verdict


class RolledBack(BaseModel):
    """What a rollback did."""

    model_config = ConfigDict(frozen=True)
    restored: DraftVersion
    withdrawn: DraftVersion

    def __str__(self) -> str:
        name, before = self.restored.model, self.restored.version
        return f"version {before} of {name} is the champion again; version {self.withdrawn.version} is withdrawn"


@task(name="roll-back")
def roll_back(config: RunConfig) -> RolledBack:
    """Give the alias back to the champion before. Raises TrackingError when there was none."""
    restored, withdrawn = tracking.restore(tracking.connect(config), tracking.registered_name(config))
    done = RolledBack(restored=restored, withdrawn=withdrawn)
    create_markdown_artifact(str(done), key="rollback", description="What the rollback did")
    return done


@task(name="find-version")
def find_version(config: RunConfig, number: int | None) -> DraftVersion:
    """A registered version; None = the challenger. Raises TrackingError when there is none."""
    return tracking.find_version(tracking.connect(config), tracking.registered_name(config), number)


def _verdict(config: RunConfig, challenger: DraftVersion, champion: DraftVersion | None, again: bool) -> Verdict:
    names = {"challenger": challenger.version, "champion": champion and champion.version}
    if champion is None:
        return Verdict(promoted=True, reasons=("there is no champion",), **names)
    if champion.version == challenger.version:
        first = challenger.version == "1" and not again
        reason = "it is the first draft, with none to beat" if first else "it is the champion already"
        return Verdict(promoted=True, reasons=(reason,), **names)
    if challenger.withdrawn and not again:
        reason = f"a rollback withdrew it; promote-draft with version = {challenger.version} brings it back"
        return Verdict(promoted=False, reasons=(reason,), **names)
    if objections := export_objections(config, challenger):
        return Verdict(promoted=False, reasons=objections, **names)
    with reporting("promotion") as progress:
        ours, theirs = (_measured(config, version, progress) for version in (challenger, champion))
    lossless = bool(ours.summary["lossless"])
    verdict = judge(_measurements(config, ours), _measurements(config, theirs), lossless, config.promotion)
    return verdict.model_copy(update=names)


def _record(config: RunConfig, challenger: DraftVersion, verdict: Verdict) -> None:
    with tempfile.TemporaryDirectory(prefix="hass-promotion-") as folder:
        figures = []
        if gains := verdict.gains():
            title = f"Version {verdict.challenger} against version {verdict.champion}, the champion: {verdict.outcome}"
            figures.append(draw_gains(gains, Path(folder) / "gain.png", title))
        client = tracking.connect(config)
        tracking.record_verdict(client, challenger, verdict.promoted, verdict.markdown(), figures)


def _measured(config: RunConfig, version: DraftVersion, progress: Progress) -> Artifact:
    """The version's evaluation with these settings on this machine: found in the store, or made now."""
    return core.evaluate_draft(config, version.draft, store_of(config), target_of(config), progress)


def _measurements(config: RunConfig, evaluation: Artifact) -> list[Measurement]:
    file = store_of(config).open(evaluation).local_path("per_question.parquet")
    return [Measurement.model_validate(row) for row in pq.read_table(file).to_pylist()]
