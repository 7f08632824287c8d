"""Measure a draft: `python -m flows.evaluate_draft [PRESET] [section.key=value …]`."""

from prefect import flow

from flows.chain import run_until
from flows.parameters import RunParameters
from flows.terminal import main
from hass_core.store import Artifact


@flow(name="evaluate-draft", flow_run_name="evaluate-draft {run.preset}")
def evaluate_draft(run: RunParameters) -> Artifact:
    """The report on a draft, after whatever comes before and is not finished."""
    with run_until("evaluation", run) as chain:
        return chain.last


if __name__ == "__main__":
    main(evaluate_draft)
