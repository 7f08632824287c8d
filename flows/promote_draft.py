"""Promote a draft: `python -m flows.promote_draft [PRESET] [version=N] [section.key=value …]`."""

from prefect import flow
from pydantic import Field

from flows.parameters import RunParameters
from flows.terminal import main
from tasks.gate import Verdict
from tasks.promotion import decide, find_version


class PromotionParameters(RunParameters):
    """The settings it is measured with, and which version."""

    version: int | None = Field(default=None, ge=1, description="Registered version; empty = the challenger")


@flow(name="promote-draft", flow_run_name="promote-draft {run.preset}")
def promote_draft(run: PromotionParameters) -> Verdict:
    """Compare a registered draft with the champion and let the better one win."""
    config = run.config()
    return decide(config, find_version(config, run.version), again=run.version is not None)


if __name__ == "__main__":
    main(promote_draft, PromotionParameters)
