"""Promotion: measure champion and challenger on the same questions here, judge, move the alias, say why."""

import tempfile
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict

from hass_core.config import CHAMPION, RunConfig
from hass_core.evaluation import duel as core
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.evaluation.evaluate import evaluate_draft, read_report
from hass_core.evaluation.figures import draw_gains
from hass_core.evaluation.server_duel import Server, contest
from hass_core.export.exporter import check_engines
from hass_core.progress import Progress
from hass_core.store import Artifact
from hass_core.target_model.loader import Target
from hass_core.training.train import start_architecture
from tasks import tracking
from tasks.export import export_objections
from tasks.gate import NOT_LOSSLESS, PLAIN_DECODING, Verdict, judge
from tasks.progress import reporting
from tasks.resources import is_served, store_of, target_of
from tasks.retries import NETWORK_RETRIES
from tasks.tracking import DraftVersion

PLAIN_ROUNDS = 1  # against plain decoding gains are far larger than what a round adds


@task(name="decide-promotion", **NETWORK_RETRIES)
def decide(config: RunConfig, challenger: DraftVersion, again: bool = False) -> Verdict:
    """Make `challenger` the champion if the gate lets it; the verdict goes to the version, its run and Prefect.

    A version that a rollback withdrew is refused unless `again`.
    """
    client = tracking.connect(config)
    while True:
        champion = tracking.champion(client, challenger.model)
        verdict = _verdict(config, challenger, champion, again)
        decided = champion is None or champion.version != challenger.version
        taken = verdict.promoted and decided
        if not taken or tracking.crown(client, challenger, champion):
            break  # else another promotion came first: compare with the new champion
    if decided:  # else there was nothing to decide: the verdict by which it became champion stands
        _record(config, challenger, verdict)
    create_markdown_artifact(verdict.markdown(), key="promotion", description="Verdict of the promotion gate")
    return verdict


class RolledBack(BaseModel):
    """What a rollback did."""

    model_config = ConfigDict(frozen=True)
    restored: DraftVersion
    withdrawn: DraftVersion
    passed_over: tuple[str, ...] = ()  # former champions of another target

    def __str__(self) -> str:
        name, before = self.restored.model, self.restored.version
        told = f"version {before} of {name} is the champion again; version {self.withdrawn.version} is withdrawn"
        if self.passed_over:
            told += f"; not version {' or '.join(self.passed_over)}, whose target was another"
        return told


@task(name="check-promotion", **NETWORK_RETRIES)
def check_promotion(config: RunConfig) -> None:
    """Raise ConfigError, before anything is paid for, where no draft of these settings could ever be promoted: an
    engine of `promotion.engines` or `promotion.release` has no place for it."""
    if not config.promotion.automatic or config.draft.warm_start == CHAMPION:
        return
    target = target_of(config)
    draft = start_architecture(config, target)
    check_engines(config.promotion.engines, draft, target, "promotion.engines")
    check_engines(config.promotion.release, draft, target, "promotion.release")


@task(name="roll-back")
def roll_back(config: RunConfig) -> RolledBack:
    """Give the alias back to the last champion before of the same target. Raises TrackingError when there was none."""
    target = tracking.target_identity(target_of(config))
    done = RolledBack(**tracking.restore(tracking.connect(config), tracking.registered_name(config), target))
    create_markdown_artifact(str(done), key="rollback", description="What the rollback did")
    return done


@task(name="reject")
def reject(config: RunConfig, version: DraftVersion, reason: str) -> DraftVersion:
    """Refuse a version that waits, with the reason on record. Raises TrackingError for the champion."""
    verdict = Verdict(promoted=False, reasons=(reason,), challenger=version.version)
    tracking.reject(tracking.connect(config), version, verdict.markdown())
    return version


@task(name="find-version")
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
    if objections := export_objections(config, challenger):
        return Verdict(promoted=False, reasons=objections, **names)
    with reporting("promotion") as progress:
        verdict = _measured(config, challenger, champion, progress)
    return verdict.model_copy(update=names)


def _measured(
    config: RunConfig, challenger: DraftVersion, champion: DraftVersion | None, progress: Progress
) -> Verdict:
    """The gate's word after a duel with the champion, or with plain decoding where none is of this target."""
    target, rules = target_of(config), config.promotion
    evaluation = _evaluated(config, challenger, progress)
    lossless = bool(evaluation.summary["lossless"])
    tree = read_report(store_of(config), evaluation).tree

    def duel(opponent: Artifact | None, name: str, rounds: int) -> Verdict:
        found = core.run_duel(config, challenger.draft, opponent, tree, rounds, store_of(config), target, progress)
        return judge(core.read_bouts(store_of(config), found), lossless, rules, name)

    if champion and is_served(config, champion):
        if rules.judge == "server":
            return _judged_by_servers(config, target, lossless, f"the champion (version {champion.version})", progress)
        return duel(champion.draft, f"the champion (version {champion.version})", rules.rounds)
    reason = "there is no champion"
    if champion:
        reason = f"version {champion.version} is no draft of {target.name} as it is now: it counts as none"
    if not rules.beat_plain:
        return Verdict(promoted=lossless, reasons=(reason if lossless else NOT_LOSSLESS,))
    plain = duel(None, PLAIN_DECODING, PLAIN_ROUNDS)
    return plain.model_copy(update={"reasons": (reason, *plain.reasons)})


def _judged_by_servers(config: RunConfig, target: Target, lossless: bool, opponent: str, progress: Progress) -> Verdict:
    """The gate's word after the servers have answered; which draft each one serves is their operator's word."""
    rules = config.promotion
    assert rules.challenger_url
    assert rules.champion_url
    challenger, champion = Server(rules.challenger_url), Server(rules.champion_url)
    questions, samplings = load_benchmarks(config.evaluation), core.duel_samplings(target)
    found = contest(challenger, champion, questions, samplings, rules.rounds, config.evaluation, progress)
    verdict = judge(found.bouts, lossless, rules, opponent)
    counted = f"{found.challenger.tau:.2f} and {found.champion.tau:.2f}"
    told = f"{verdict.measured} Measured in the servers {challenger.url} and {champion.url}, which counted τ {counted}."
    return verdict.model_copy(update={"measured": told})


def _record(config: RunConfig, challenger: DraftVersion, verdict: Verdict) -> None:
    with tempfile.TemporaryDirectory(prefix="hass-promotion-") as folder:
        figures = []
        if gains := verdict.gains():
            title = f"Version {verdict.challenger} against {verdict.opponent}: {verdict.outcome}"
            figures.append(draw_gains(gains, Path(folder) / "gain.png", title))
        client = tracking.connect(config)
        tracking.record_verdict(client, challenger, verdict.promoted, verdict.markdown(), figures)


def _evaluated(config: RunConfig, version: DraftVersion, progress: Progress) -> Artifact:
    """The evaluation that the version was registered with; one made here where the store does not hold it."""
    store = store_of(config)
    digest = tracking.lineage(tracking.connect(config), version).get("hass.digest.evaluation")
    found = store.artifact("evaluation", digest) if digest else None
    return found or evaluate_draft(config, version.draft, store, target_of(config), progress)
