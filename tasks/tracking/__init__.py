"""The record of every retraining in MLflow. The only package that imports mlflow.

A retraining is one parent run with one child run per stage. Both are found again by a tag that holds the digest of
the settings and prompts, so a retry or a second identical run continues them and nothing stands there twice.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported

from tasks.tracking.client import connect, ui_command
from tasks.tracking.registry import (
    DraftVersion,
    champion,
    register,
    registered_name,
)
from tasks.tracking.runs import StageRun, open_retraining, stage_run

__all__ = [
    "DraftVersion",
    "StageRun",
    "champion",
    "connect",
    "open_retraining",
    "register",
    "registered_name",
    "stage_run",
    "ui_command",
]
