"""MLflow, the Prefect server with pools and deployments, and the workers."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx

from infra.stack.machine import StackError, answers, has_gpu
from infra.stack.postgres import Postgres
from infra.stack.processes import Processes, without_other_servers

PREFECT = [sys.executable, "-m", "prefect"]
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Eight processes and 1.3 GB for judges of answers, which the pipeline does not use."""

KEPT_LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
"""A server that forgets the leases of concurrency limits when it is restarted ends the runs that hold one."""


def start_mlflow(processes: Processes, postgres: Postgres, environment: dict[str, str], port: int) -> dict[str, str]:
    """Start MLflow, its artifacts in the S3 store; the environment that names it. It may not be ready yet."""
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", postgres.address("mlflow", "psycopg2"), "--artifacts-destination", "s3://mlflow"]
    command = [sys.executable, "-m", "mlflow", "server", *address, *places]
    processes.start("mlflow", command, environment | postgres.environment | WITHOUT_JOBS)
    return {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}


def start_prefect(processes: Processes, postgres: Postgres, environment: dict[str, str], port: int) -> dict[str, str]:
    """Start the Prefect server; the environment that names it. It may not be ready yet."""
    api = f"http://127.0.0.1:{port}/api"
    own = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.address("prefect", "asyncpg"),
        "PREFECT_UI_API_URL": api,  # its pages would ask port 4200, whatever --port says
        **KEPT_LEASES,
    }
    command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    processes.start("prefect", command, environment | postgres.environment | own)
    return {"PREFECT_API_URL": api}


def wait_for_servers(processes: Processes, environment: dict[str, str]) -> None:
    """Until MLflow and Prefect answer."""
    processes.wait_until("mlflow", lambda: answers(f"{environment['MLFLOW_TRACKING_URI']}/health"))
    processes.wait_until("prefect", lambda: answers(f"{environment['PREFECT_API_URL']}/health"))


def start_exporter(processes: Processes, environment: dict[str, str], port: int) -> str:
    """Start the page of metrics for Prometheus; its address."""
    command = [sys.executable, "-m", "infra.exporter", "--port", str(port)]
    page = f"http://127.0.0.1:{port}/metrics"
    processes.start("exporter", command, environment)
    processes.wait_until("exporter", lambda: answers(page))
    return page


def deploy(environment: dict[str, str], root: Path) -> None:
    """Create pools, automations and deployments, as `make deploy` does."""
    command = [sys.executable, "-m", "infra.deploy"]
    done = subprocess.run(command, cwd=root, env=without_other_servers() | environment, capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"pools and deployments could not be made:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


def start_workers(processes: Processes, environment: dict[str, str]) -> list[str]:
    """Start a worker on the pool cpu, and one on gpu where there is a GPU; the pools, whose workers ask for runs."""
    pools, began = ["cpu", "gpu"] if has_gpu() else ["cpu"], datetime.now(UTC)
    for pool in pools:
        command = [*PREFECT, "worker", "start", "--pool", pool, "--name", f"stack-{pool}"]
        processes.start(f"worker-{pool}", command, environment)
    for pool in pools:
        processes.wait_until(f"worker-{pool}", lambda pool=pool: _has_worker(environment, pool, began))
    return pools


def _has_worker(environment: dict[str, str], pool: str, since: datetime) -> bool:
    """Whether the pool's worker has told Prefect that it lives; a stack before this one had one of the same name."""
    try:
        url = f"{environment['PREFECT_API_URL']}/work_pools/{pool}/workers/filter"
        workers = httpx.post(url, json={}, timeout=10).raise_for_status().json()
    except httpx.HTTPError:  # busy
        return False
    return any(
        worker["name"] == f"stack-{pool}" and datetime.fromisoformat(worker["last_heartbeat_time"]) > since
        for worker in workers
    )
