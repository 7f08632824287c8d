"""Create the user that workers record runs as, who is no administrator: `python -m infra.mlflow_user`.

Reads MLFLOW_TRACKING_URI, the administrator's MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and
MLFLOW_WORKER_PASSWORD. An existing user gets that password. What a user creates, experiments and registered models, it
may change; all else it may read.
"""

import os

from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

USER = "worker"


def main() -> None:
    """Create the user, or give it its password of now."""
    client = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    password = os.environ["MLFLOW_WORKER_PASSWORD"]
    try:
        client.create_user(USER, password)
        print(f"user {USER} created")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(USER, password)
        print(f"user {USER} has its password of now")


if __name__ == "__main__":
    main()
