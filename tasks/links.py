"""The way from an MLflow run to the Prefect run that filled it, and back."""

import os

from prefect.artifacts import create_link_artifact
from prefect.runtime import flow_run

from hass_core.config import RunConfig
from tasks import tracking


def prefect_tags() -> dict[str, str]:
    """Id, name and, where a server keeps it, address of the present flow run."""
    tags = {"prefect.flow_run_id": flow_run.id, "prefect.flow_run_name": flow_run.name}
    if os.environ.get("PREFECT_API_URL"):
        tags["prefect.flow_run_url"] = flow_run.ui_url
    return {name: str(value) for name, value in tags.items() if value}


def link_to_mlflow(config: RunConfig, run_id: str) -> None:
    """A link to the MLflow run in Prefect's UI, where MLflow has a page for it."""
    if url := tracking.run_url(config, run_id):
        create_link_artifact(url, link_text="MLflow run", key="mlflow-run", description="Curves, figures, report")
