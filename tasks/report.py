"""A retraining's page: the evaluation's, with the verdict, what changed, what it cost and how to repeat it."""

from collections.abc import Mapping, Sequence

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from hass_core.config import RunConfig
from hass_core.evaluation.evaluate import stored_page
from hass_core.evaluation.figures import gains_of
from hass_core.evaluation.page import Part
from hass_core.settings import as_toml
from hass_core.store import Artifact
from hass_core.store.provenance import code_commit
from tasks import tracking
from tasks.gate import Verdict
from tasks.resources import store_of, target_of
from tasks.retries import SHORT
from tasks.summary import stage_words
from tasks.tracking import DraftVersion


@task(name="publish-report", **SHORT)
def publish_report(
    config: RunConfig,
    run_id: str,
    stages: Sequence[Artifact],
    seconds: Mapping[str, float],
    version: DraftVersion,
    verdict: Verdict | None,
) -> str:
    """Write report.html into the retraining's MLflow run, and its address into Prefect; returns the address.

    `stages`: prompts to evaluation; `seconds`: what each took this time, for those that were made now.
    """
    by_name = {artifact.stage: artifact for artifact in stages}
    html = stored_page(
        config,
        store_of(config),
        by_name["draft"],
        by_name["evaluation"],
        target_of(config),
        first=[*_judged(verdict), _changes(config, version, verdict), _costs(stages, seconds)],
        verdict=_verdict(version, verdict),
        last=[_again(config, stages)],
    )
    address = tracking.log_page(config, run_id, html)
    _link(address)
    return address


def report_address(config: RunConfig, run_id: str) -> str:
    """Where the page of an earlier retraining is; empty where it has none."""
    return tracking.page_address(config, run_id) if tracking.is_published(config, run_id) else ""


def _link(address: str) -> None:
    about = "Verdict, figures, answers, costs"
    if address.startswith("http"):
        create_link_artifact(address, link_text="report of the retraining", key="report", description=about)
    else:
        create_markdown_artifact(f"`{address}`", key="report", description=about)


def _verdict(version: DraftVersion, verdict: Verdict | None) -> str:
    named = f"Version {version.version} of {version.model}"
    return f"{named}: {verdict.title}." if verdict else f"{named} waits for promote-draft or reject-draft."


def _judged(verdict: Verdict | None) -> list[Part]:
    if verdict is None:
        return []
    gains = verdict.gains()
    figure = gains_of(gains, f"Tokens/s over those of {verdict.opponent}") if gains else None
    return [Part("Verdict", verdict.measured, lines=verdict.reasons, figure=figure)]


def _changes(config: RunConfig, version: DraftVersion, verdict: Verdict | None) -> Part:
    """Against the champion before this version; where there was none, there is nothing to compare."""
    client = tracking.connect(config)
    before = _before(config, version, verdict)
    if before is None:
        return Part("What changed", "There was no champion to compare with: it is the first.")
    title = f"What changed since the champion, version {before.version}"
    if (found := tracking.differences(client, before, version)) is None:
        return Part(title, "That is unknown: MLflow no longer has the run of one of them.")
    settings, results = found
    told = "" if settings else "No setting differs; the prompts, the answers, the target or the machine do."
    return Part(title, told, ("", f"version {before.version}", f"version {version.version}"), [*results, *settings])


def _before(config: RunConfig, version: DraftVersion, verdict: Verdict | None) -> DraftVersion | None:
    client = tracking.connect(config)
    if verdict and verdict.champion:
        number = verdict.champion
        return None if number == version.version else tracking.find_version(client, version.model, int(number))
    champion = tracking.champion(client, version.model)
    return None if champion is None or champion.version == version.version else champion


def _costs(stages: Sequence[Artifact], seconds: Mapping[str, float]) -> Part:
    rows = [
        (stage.stage, f"{seconds[stage.stage]:.0f} s" if stage.stage in seconds else "found finished", words)
        for stage, words in ((stage, stage_words(stage)) for stage in stages)
    ]
    total = f"{sum(seconds.values()):.0f} s of work in this run."
    return Part("What it cost", total, ("stage", "time", "made"), rows)


def _again(config: RunConfig, stages: Sequence[Artifact]) -> Part:
    """The settings that differ from the defaults, as a file; the commit; the names of all results."""
    commit = code_commit()
    text, cleared = as_toml(config)
    commands = [f"git checkout {commit.removesuffix('+changes')}"] if commit else []
    commands += ["cat > run.toml <<'END'", text.rstrip(), "END"]
    commands.append(" ".join(["python -m flows.retrain run.toml", *cleared]))
    return Part("How to repeat it", commands=commands, lines=[f"{s.stage} {s.digest}: {s.url}" for s in stages])
