"""A retraining whose stages run elsewhere, one deployment after the other. This process waits, and loads no model."""

from typing import Annotated

from prefect import State, flow
from prefect.states import Completed
from pydantic import Field

from flows.parameters import RunParameters
from tasks.deployment import completed

LONGEST_SECONDS = 14 * 86_400.0  # each of the runs it waits for has a limit of its own
GPU = ("generate-data/gpu", "extract-features/gpu", "train-draft/gpu", "retrain/gpu")

Deployments = Annotated[tuple[str, ...], Field(min_length=1)]


@flow(name="retrain", flow_run_name="retrain {run.preset} elsewhere", timeout_seconds=LONGEST_SECONDS)
def relay(run: RunParameters, via: Deployments = GPU) -> State[None]:
    """Run the deployments `via` in their order, with the same settings; it ends as the last of them does.

    Each goes on from what the store holds, so they need the same store and MLflow, and machines of one kind. The last
    one is a `retrain`: it finds the stages finished, measures, judges and releases. Raises HassError where one of them
    does not complete.
    """
    run.config()  # a wrong setting is told before anything starts
    asked = {"run": run.model_dump(mode="json", exclude_none=True, exclude={"deployments"})}
    ended = [completed(deployment, asked) for deployment in via]
    return Completed(name=ended[-1].name, message=ended[-1].message)
