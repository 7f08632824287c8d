"""The record of every retraining in MLflow. The only package that imports mlflow.

A retraining is one parent run with one child run per stage. Both are found again by a tag that holds the digest of
the settings and prompts, so a retry or a second identical run continues them and nothing stands there twice.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from tasks.tracking.client import as_default, connect, run_url, ui_command
from tasks.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    DraftVersion,
    champion,
    crown,
    find_address,
    find_version,
    lineage,
    record_export,
    record_failed_export,
    record_verdict,
    register,
    registered_name,
    restore,
)
from tasks.tracking.runs import StageRun, open_retraining, resume, stage_run

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "DraftVersion",
    "StageRun",
    "as_default",
    "champion",
    "connect",
    "crown",
    "find_address",
    "find_version",
    "lineage",
    "open_retraining",
    "record_export",
    "record_failed_export",
    "record_verdict",
    "register",
    "registered_name",
    "restore",
    "resume",
    "run_url",
    "stage_run",
    "ui_command",
]
