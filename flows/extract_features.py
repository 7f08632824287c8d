"""Make the features: `python -m flows.extract_features [PRESET] [section.key=value …]`."""

from prefect import flow

from flows.chain import run_until
from flows.parameters import RunParameters
from flows.terminal import main
from hass_core.store import Artifact


@flow(name="extract-features", flow_run_name="extract-features {run.preset}")
def extract_features(run: RunParameters) -> Artifact:
    """The target's hidden states over its answers, after whatever comes before and is not finished."""
    with run_until("features", run) as chain:
        return chain.last


if __name__ == "__main__":
    main(extract_features)
