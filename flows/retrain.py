"""The whole retraining: `python -m flows.retrain [PRESET] [section.key=value …]`.

Prompts, answers, features, training, evaluation, registration; what the store already holds is not done again.
"""

from prefect import flow
from pydantic import BaseModel
from rich.console import Console

from flows.chain import run_until
from flows.parameters import RunParameters
from flows.terminal import main
from hass_core.config import RunConfig
from hass_core.store import Artifact
from tasks.promotion import Verdict, decide
from tasks.registration import register_draft
from tasks.summary import report_tables, version_lines
from tasks.tracking import DraftVersion, ui_command


class Retrained(BaseModel):
    """What a retraining leaves behind."""

    run_id: str
    evaluation: Artifact
    version: DraftVersion
    verdict: Verdict | None


@flow(name="retrain", flow_run_name="retrain {run.preset}")
def retrain(run: RunParameters) -> Retrained:
    """Retrain the draft, measure it, register it, and put it in use when it is better than the present one."""
    config = run.config()
    with run_until("evaluation", run) as chain:
        version = register_draft(config, chain.artifacts, chain.run_id)
        verdict = decide(config, version) if config.promotion.automatic else None
    return Retrained(run_id=chain.run_id, evaluation=chain.last, version=version, verdict=verdict)


def show(console: Console, config: RunConfig, done: Retrained) -> None:
    """The report, the registered version and how to see more."""
    console.print(report_tables(config, done.evaluation))
    console.print(version_lines(done.version, done.verdict), highlight=False)
    console.print(f"runs and figures: {ui_command(config)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(retrain, show)
