"""The shards of a stage, mapped over threads, over one process per GPU, or over a Ray cluster.

Prefect records a task run per shard. No more shards are submitted than there are workers, so the first failure ends
the stage and a store of thousands of shards asks nothing more of the Prefect server than a small one.
"""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task

from hass_core.config import ExecutionConfig
from hass_core.errors import BadInput
from hass_core.features.extract import Spread

RAY_ATTEMPTS = 5  # of a shard whose worker died
RAY_OBJECTS_BYTES = 200_000_000  # only settings and names travel by Ray; features go to the store


def mapped(task: Task[..., str], execution: ExecutionConfig, **same: Any) -> Spread:
    """A `Spread` that runs `task(**same, name=…)` for each shard on the runner of the settings."""

    def spread(names: list[str]) -> Iterator[str]:
        with runner_of(execution) as runner, worker_needs(execution):
            coming = (runner.submit(task, {**same, "name": name}) for name in names)
            running: list[PrefectFuture[str]] = list(islice(coming, execution.workers))
            while running:
                done = next(as_completed(running))
                running.remove(done)
                yield done.result()
                running += islice(coming, 1)

    return spread


def runner_of(execution: ExecutionConfig) -> TaskRunner[Any]:
    """Prefect's task runner for these settings. Raises BadInput when Ray is asked for and not installed."""
    if execution.runner == "ray":
        return _ray_runner(execution)
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return ThreadPoolTaskRunner(max_workers=execution.workers)
    turns = multiprocessing.get_context("spawn").Value("i", 0)
    return ProcessPoolTaskRunner(min(gpus, execution.workers), initializer=take_gpu, initargs=(turns, gpus))


def take_gpu(turns: Any, gpus: int) -> None:
    """Runs first in each worker process: the next GPU is the only one it sees."""
    with turns.get_lock():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(turns.value % gpus)
        turns.value += 1


def _ray_runner(execution: ExecutionConfig) -> TaskRunner[Any]:
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise BadInput('execution.runner = "ray" needs Ray; run `pip install "hass-pipeline[ray]"`') from None
    if execution.ray_address:
        return RayTaskRunner(execution.ray_address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"num_cpus": execution.workers, "object_store_memory": RAY_OBJECTS_BYTES, "include_dashboard": False}
    return RayTaskRunner("local", init_kwargs=local)


@contextmanager
def worker_needs(execution: ExecutionConfig) -> Iterator[None]:
    """What goes to the workers with each shard: where the flow's Prefect server is, a temporary one too, and for Ray
    to try again when a worker dies, and a GPU for each shard where there are any. The runner must have connected.
    """
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        if execution.runner != "ray":
            yield
            return
        import ray
        from prefect_ray.context import remote_options

        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        with remote_options(max_retries=RAY_ATTEMPTS, num_gpus=gpus):
            yield
