"""Train a draft: `python -m flows.train_draft [PRESET] [section.key=value …]`."""

from prefect import flow

from flows.chain import run_until
from flows.parameters import RunParameters
from flows.terminal import main
from hass_core.store import Artifact


@flow(name="train-draft", flow_run_name="train-draft {run.preset}")
def train_draft(run: RunParameters) -> Artifact:
    """A trained draft, after whatever comes before and is not finished."""
    with run_until("draft", run) as chain:
        return chain.last


if __name__ == "__main__":
    main(train_draft)
