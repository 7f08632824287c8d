"""Training writes metrics.jsonl; this copies it into MLflow while it grows, each value once.

A line is `{"step": 120, "time": 1764000000.0, "train/loss": 1.2, …}`. After a crash the training repeats the steps
since its last checkpoint: steps MLflow already has are left out.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis

from hass_core.training.metrics import read_metrics
from tasks.tracking.outage import outage_in

POLL_SECONDS = 2.0
METRICS_PER_CALL = 1000  # MLflow's limit
NOT_METRICS = {"step", "time", "tokens_seen"}

logger = logging.getLogger(__name__)


class Follower:
    """A thread that reads new lines every two seconds; used as a context manager.

    MLflow being away does not stop the training: the lines are sent at the next turn, or when the stage is recorded.
    """

    def __init__(self, client: MlflowClient, run_ids: Sequence[str], path: Path):
        self._client, self._run_ids, self._path = client, run_ids, path
        self._last_step: dict[tuple[str, str], int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def log(self, rows: Iterable[dict[str, Any]]) -> None:
        """Send the rows' values whose step is new."""
        rows = list(rows)
        for run_id in self._run_ids:
            metrics = [metric for row in rows for metric in self._new_metrics(run_id, row)]
            for start in range(0, len(metrics), METRICS_PER_CALL):
                self._client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])
            for metric in metrics:
                key = (run_id, metric.key)
                self._last_step[key] = max(self._last_step[key], metric.step)

    def _new_metrics(self, run_id: str, row: dict[str, Any]) -> list[Metric]:
        when = int(row["time"] * 1000) if "time" in row else get_current_time_millis()
        return [
            Metric(name, float(value), when, int(row["step"]))
            for name, value in row.items()
            if name not in NOT_METRICS and isinstance(value, (int, float)) and row["step"] > self._known(run_id, name)
        ]

    def _known(self, run_id: str, name: str) -> int:
        """The last step MLflow has of a metric; -1 for none."""
        key = (run_id, name)
        if key not in self._last_step:
            history = self._client.get_metric_history(run_id, name)
            self._last_step[key] = max((metric.step for metric in history), default=-1)
        return self._last_step[key]

    def _follow(self) -> None:
        sent = 0
        while True:
            last_turn = self._stopped.wait(POLL_SECONDS)
            rows = read_metrics(self._path.read_text()) if self._path.exists() else []
            sent = min(sent, len(rows))  # shorter after the training went back to a checkpoint
            try:
                self.log(rows[sent:])
                sent = len(rows)
            except MlflowException as error:
                logger.warning("MLflow does not take metrics now: %s", outage_in(error) or error)
            if last_turn:
                return
