"""Make the training data: `python -m flows.generate_data [PRESET] [section.key=value …]`."""

from prefect import flow

from flows.chain import run_until
from flows.parameters import RunParameters
from flows.terminal import main
from hass_core.store import Artifact


@flow(name="generate-data", flow_run_name="generate-data {run.preset}")
def generate_data(run: RunParameters) -> Artifact:
    """Prompts and the target's answers to them."""
    with run_until("responses", run) as chain:
        return chain.last


if __name__ == "__main__":
    main(generate_data)
