"""The record of every retraining in MLflow. The only package that imports mlflow.

A retraining is one parent run with one child run per stage. Both are found again by a tag that holds the digest of
the settings and prompts, so a retry or a second identical run continues them and nothing stands there twice.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the flow prints the address itself

from tasks.tracking.client import as_default, connect, run_url, ui_command, unusable
from tasks.tracking.outage import outage_or
from tasks.tracking.overview import champion_records, last_stages
from tasks.tracking.registry import (
    CHAMPION,
    DraftVersion,
    champion,
    champions,
    crown,
    find_address,
    find_version,
    forget_release,
    is_judged,
    is_released,
    lineage,
    record_export,
    record_failed_export,
    record_release,
    record_verdict,
    register,
    registered_draft,
    registered_name,
    reject,
    restore,
    serves,
    target_identity,
)
from tasks.tracking.report import differences, is_published, log_page, page_address
from tasks.tracking.runs import (
    WARM_START,
    StageRun,
    find_recorded,
    is_recorded,
    is_running,
    open_retraining,
    recorded_warm_start,
    resume,
    stage_run,
    tags_of,
)
from tasks.tracking.traces import record_trace
from tasks.tracking.watching import WatchState, record_watch, watch_state
