"""A flow run of another deployment as part of this one. Loads no model, so that whoever only waits need not."""

from collections.abc import Mapping
from typing import Any

from prefect import State
from prefect.deployments import run_deployment

from hass_core.errors import HassError


def completed(deployment: str, parameters: Mapping[str, Any]) -> State[Any]:
    """Run it as a sub-flow and wait for its last state. Raises HassError where that is not a completion."""
    ran: Any = run_deployment(deployment, parameters=dict(parameters), as_subflow=True)
    if ran.state is None or not ran.state.is_completed():
        end = ran.state.name if ran.state else "no state"
        raise HassError(
            f"{deployment} ran as flow run {ran.name!r} and ended as {end}; see its log. The same command continues "
            "from what is finished"
        )
    return ran.state
