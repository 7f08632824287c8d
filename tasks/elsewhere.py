"""A stage as a flow run of its own deployment, on the work pool that the stage needs."""

from collections.abc import Mapping
from typing import Any

from hass_core.config import RunConfig
from hass_core.errors import HassError
from hass_core.store import Artifact
from tasks import tracking
from tasks.deployment import completed
from tasks.links import prefect_tags
from tasks.resources import store_of


def run_elsewhere(
    stage: str, deployment: str, parameters: Mapping[str, Any], config: RunConfig, run_id: str
) -> Artifact:
    """Run the deployment as a sub-flow with these parameters, and take what it stored of `stage`.

    Store and MLflow must be the same for both workers. Raises HassError when the sub-flow does not complete.
    """
    client = tracking.connect(config)
    was_running = tracking.is_running(client, run_id)
    completed(deployment, {"run": dict(parameters)})
    if was_running:  # else it was finished before, and the sub-flow found nothing to add
        tracking.resume(client, run_id, prefect_tags())
    digest = tracking.tags_of(client, run_id).get(f"hass.digest.{stage}")
    artifact = digest and store_of(config).artifact(stage, digest)
    if not artifact:
        raise HassError(
            f"{deployment} completed, but the store {config.store} holds no finished stage {stage} of it; "
            "give both workers the same store and the same MLflow"
        )
    return artifact
