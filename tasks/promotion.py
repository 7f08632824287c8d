"""Promotion: the gate's verdict on a draft, the alias that follows it, and the ways back."""

import tempfile
from functools import partial
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel

from hass_core.config import CHAMPION, RunConfig
from hass_core.evaluation.figures import draw_gains
from hass_core.export.exporter import check_engines
from hass_core.training.train import start_architecture
from tasks import tracking
from tasks.events import PROMOTED, REFUSED, ROLLED_BACK, emit
from tasks.export import export_objections
from tasks.gate import Verdict
from tasks.measuring import measured_verdict
from tasks.progress import reporting
from tasks.resources import is_held, target_of
from tasks.retries import LONG, SHORT
from tasks.stage_lines import told
from tasks.tracking import DraftVersion


@task(name="judge-draft", **LONG)
def judge_draft(config: RunConfig, challenger: DraftVersion, again: bool = False) -> Verdict:
    """The gate's verdict on `challenger` and the present champion; nothing moves and nothing is recorded.

    A version that a rollback withdrew is refused unless `again`.
    """
    champion = tracking.champion(tracking.connect(config), challenger.model)
    verdict = _verdict(config, challenger, champion, again)
    publish(verdict)
    return verdict


@task(name="settle-promotion", **SHORT)
def settle_promotion(config: RunConfig, challenger: DraftVersion, verdict: Verdict) -> bool:
    """Move the alias as the verdict says and write it down; False when another promotion came first: judge again."""
    if verdict.champion == challenger.version:
        return True  # nothing to decide: the verdict by which it became champion stands
    client = tracking.connect(config)
    before = tracking.find_version(client, challenger.model, int(verdict.champion)) if verdict.champion else None
    if verdict.promoted and not tracking.crown(client, challenger, before):
        return False
    _record(config, challenger, verdict)
    publish(verdict)
    emit(PROMOTED if verdict.promoted else REFUSED, challenger, f"{verdict.title}: {'; '.join(verdict.reasons)}")
    return True


def publish(verdict: Verdict) -> None:
    """Show a verdict in Prefect."""
    create_markdown_artifact(verdict.markdown(), key="promotion", description="Verdict of the promotion gate")


class RolledBack(BaseModel, frozen=True):
    """What a rollback did."""

    restored: DraftVersion
    withdrawn: DraftVersion
    passed_over: tuple[str, ...] = ()  # former champions of another target

    def __str__(self) -> str:
        name, before = self.restored.model, self.restored.version
        told = f"version {before} of {name} is the champion again; version {self.withdrawn.version} is withdrawn"
        if self.passed_over:
            told += f"; not version {' or '.join(self.passed_over)}, whose target was another"
        return told


@task(name="check-promotion", **SHORT)
def check_promotion(config: RunConfig) -> None:
    """Raise ConfigError, before anything is paid for, where no draft of these settings could ever be promoted: an
    engine of `promotion.engines` or `promotion.release` has no place for it."""
    if not config.promotion.automatic or config.draft.warm_start == CHAMPION:
        return
    target = target_of(config)
    draft = start_architecture(config, target)
    check_engines(config.promotion.engines, draft, target, "promotion.engines")
    check_engines(config.promotion.release, draft, target, "promotion.release")


@task(name="roll-back", timeout_seconds=SHORT["timeout_seconds"])
def roll_back(config: RunConfig) -> RolledBack:
    """Give the alias back to the last champion before of the same target. Raises TrackingError when there was none, or
    the store holds its draft no longer."""
    name, target = tracking.registered_name(config), tracking.target_identity(target_of(config))
    done = RolledBack(**tracking.restore(tracking.connect(config), name, target, partial(is_held, config)))
    create_markdown_artifact(str(done), key="rollback", description="What the rollback did")
    emit(ROLLED_BACK, done.restored, str(done))
    return done


@task(name="reject", **SHORT)
def reject(config: RunConfig, version: DraftVersion, reason: str) -> DraftVersion:
    """Refuse a version that waits, with the reason on record. Raises TrackingError for the champion."""
    verdict = Verdict(promoted=False, reasons=(reason,), challenger=version.version)
    tracking.reject(tracking.connect(config), version, verdict.markdown())
    emit(REFUSED, version, f"refused by a person: {reason}")
    return version


@task(name="find-version", **SHORT)
def find_version(config: RunConfig, number: int | None) -> DraftVersion:
    """A registered version; None = the challenger. Raises TrackingError when there is none."""
    return tracking.find_version(tracking.connect(config), tracking.registered_name(config), number)


def _verdict(config: RunConfig, challenger: DraftVersion, champion: DraftVersion | None, again: bool) -> Verdict:
    names = {"challenger": challenger.version, "champion": champion and champion.version}
    if champion and champion.version == challenger.version:
        return Verdict(promoted=True, reasons=("it is the champion already",), **names)
    if challenger.withdrawn and not again:
        reason = f"it was withdrawn; promote-draft with version = {challenger.version} brings it back"
        return Verdict(promoted=False, reasons=(reason,), **names)
    if objections := _exported(config, challenger):
        return Verdict(promoted=False, reasons=objections, **names)
    with reporting("promotion") as progress:
        verdict = measured_verdict(config, challenger, champion, progress)
    return verdict.model_copy(update=names)


def _exported(config: RunConfig, challenger: DraftVersion) -> tuple[str, ...]:
    """Why the draft could not serve; a check that has nothing to look at says nothing."""
    if not config.promotion.engines:
        return ()
    engines = ", ".join(config.promotion.engines)
    return told(
        "exports",
        lambda: export_objections(config, challenger),
        lambda objections: "; ".join(objections) or f"{engines} would build it",
    )


def _record(config: RunConfig, challenger: DraftVersion, verdict: Verdict) -> None:
    with tempfile.TemporaryDirectory(prefix="hass-promotion-") as folder:
        figures = []
        if gains := verdict.gains():
            title = f"Version {verdict.challenger} against {verdict.opponent}: {verdict.outcome}"
            figures.append(draw_gains(gains, Path(folder) / "gain.png", title))
        client = tracking.connect(config)
        tracking.record_verdict(client, challenger, verdict.promoted, verdict.markdown(), figures)
