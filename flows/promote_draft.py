"""Promote a draft: `python -m flows.promote_draft [PRESET] [version=N] [section.key=value …]`."""

from prefect import flow
from rich.console import Console
from rich.markdown import Markdown

from flows.decision import decide
from flows.outcome import completed
from flows.parameters import PromotionParameters
from flows.terminal import main
from hass_core.config import RunConfig
from tasks.gate import Verdict
from tasks.promotion import find_version
from tasks.release import release_champion
from tasks.retries import LONGEST_SECONDS


@flow(name="promote-draft", flow_run_name="promote-draft {run.preset}", timeout_seconds=LONGEST_SECONDS)
def promote_draft(run: PromotionParameters) -> Verdict:
    """Compare a registered draft with the champion and let the better one win."""
    config = run.config()
    verdict = decide(config, find_version(config, run.version), again=run.version is not None)
    release_champion(config)
    return completed(verdict, str(verdict))


def show(console: Console, config: RunConfig, verdict: Verdict) -> None:
    """The verdict and its reasons."""
    console.print(Markdown(verdict.markdown()))


if __name__ == "__main__":
    main(promote_draft, show)
