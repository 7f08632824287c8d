"""Tags that lead from an MLflow run to the Prefect run that filled it."""

import os

from prefect.runtime import flow_run


def prefect_tags() -> dict[str, str]:
    """Id, name and, where a server keeps it, address of the present flow run."""
    tags = {"prefect.flow_run_id": flow_run.id, "prefect.flow_run_name": flow_run.name}
    if os.environ.get("PREFECT_API_URL"):
        tags["prefect.flow_run_url"] = flow_run.ui_url
    return {name: str(value) for name, value in tags.items() if value}
