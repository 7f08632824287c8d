"""Create the user that workers record runs as, who is no administrator: `python -m infra.mlflow_user`.

Reads MLFLOW_TRACKING_URI, the administrator's MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and
MLFLOW_WORKER_PASSWORD. An existing user gets that password. What a user creates, experiments and registered models, it
may change; all else it may read.
"""

import os
import warnings

from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

from infra.mistakes import in_one_sentence, needed
from tasks.tracking import unusable

USER = "worker"


def main() -> None:
    """Create the user, or give it its password of now. Raises TrackingError where MLflow is away or refuses."""
    uri, password = needed("MLFLOW_TRACKING_URI"), needed("MLFLOW_WORKER_PASSWORD")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # who started this waits for it
    try:
        print(f"user {USER} {_put(uri, password)}")
    except MlflowException as error:
        raise unusable(uri, error) from None


def _put(uri: str, password: str) -> str:
    with warnings.catch_warnings():  # of Starlette, about what MLflow's server imports
        warnings.simplefilter("ignore")
        client = get_app_client("basic-auth", tracking_uri=uri)
    try:
        client.create_user(USER, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(USER, password)
        return "has its password of now"
    return "created"


if __name__ == "__main__":
    in_one_sentence(main)
