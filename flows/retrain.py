"""The whole retraining: `python -m flows.retrain [PRESET] [section.key=value …]`.

Prompts, answers, features, training, evaluation, registration; what the store already holds is not done again.
"""

from prefect import flow
from pydantic import BaseModel
from rich.console import Console

from flows.chain import run_until
from flows.decision import decide
from flows.outcome import completed
from flows.parameters import RunParameters
from flows.terminal import main
from hass_core.config import RunConfig
from hass_core.store import Artifact
from tasks.finished import find_judged
from tasks.forecast import announce
from tasks.gate import Verdict
from tasks.promotion import check_promotion
from tasks.registration import register_draft
from tasks.release import release_champion
from tasks.report import publish_report, report_address
from tasks.retries import LONGEST_SECONDS
from tasks.summary import next_steps, nothing_new, places, report_tables, version_lines
from tasks.tracking import DraftVersion


class Retrained(BaseModel):
    """What a retraining leaves behind."""

    run_id: str
    evaluation: Artifact
    version: DraftVersion
    verdict: Verdict | None = None
    report: str = ""  # address of its page
    new: bool = True  # False: nothing has changed since it was made, and nothing was done


@flow(name="retrain", flow_run_name="retrain {run.preset}", timeout_seconds=LONGEST_SECONDS)
def retrain(run: RunParameters) -> Retrained:
    """Retrain the draft, measure it, register it, and put it in use when it is better than the present one.

    Where nothing is new the run completes as "Nothing new" and leaves every record as it is.
    """
    config = run.config()
    check_promotion(config)
    with run_until("evaluation", run) as chain:
        if not chain.new and (version := find_judged(config, chain.artifacts[-2])):
            release_champion(config)  # where that was left undone
            report = report_address(config, chain.run_id)
            done = Retrained(run_id=chain.run_id, evaluation=chain.last, version=version, report=report, new=False)
            return completed(done, nothing_new(version), name="Nothing new")
        version = register_draft(config, chain.artifacts, chain.run_id)
    rules = config.promotion
    verdict = decide(config, version, approval=rules.approval) if rules.automatic else None
    report = publish_report(config, chain.run_id, chain.artifacts, chain.seconds, version, verdict)
    release_champion(config)
    done = Retrained(run_id=chain.run_id, evaluation=chain.last, version=version, verdict=verdict, report=report)
    return completed(done, version_lines(version, verdict))


def show(console: Console, config: RunConfig, done: Retrained) -> None:
    """The report, the registered version, where everything is and what to do next."""
    console.print(report_tables(config, done.evaluation))
    told = version_lines(done.version, done.verdict) if done.new else nothing_new(done.version)
    console.print(told, highlight=False, soft_wrap=True)
    for line in [*places(config, done.version, done.report), "", *next_steps(config, done.version)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main(retrain, show, announce)
