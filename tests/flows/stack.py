"""A real Prefect server and worker on loopback, in processes of their own, stopped by their ids.

Where PostgreSQL is installed the server's database is one: on SQLite a busy server drops events, and an automation that
waits for them does nothing.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from infra.stack.machine import StackError
from infra.stack.postgres import postgres_program, start_postgres
from infra.stack.processes import Processes

ROOT = Path(__file__).parents[2]
BUSY = 4  # so many times as long as on a machine that does nothing else
PREFECT = [sys.executable, "-m", "prefect"]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's shell starts `pytest … &` so, and a worker that
    signal.signal(signal.SIGINT, signal.default_int_handler)  # inherits it never stops: Prefect's SIGTERM is a SIGINT


class Stack:
    """Server, pool `cpu`, all deployments, one worker; everything under `home`."""

    def __init__(self, home: Path, **environment: str):
        self.home = home
        self._port = free_port()
        self.api = f"http://127.0.0.1:{self._port}/api"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))},
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self._database = Database(home / "database")
        try:
            self.environment |= self._database.start()
            self.server = self.start_server()
            self.deploy()
            self.worker = self.start_worker()
        except BaseException:
            self.stop()
            raise

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A long-running prefect command; its output goes to NAME.log."""
        return self.program(name, "-m", "prefect", *arguments)

    def program(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A long-running program of Python; its output goes to NAME.log."""
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def start_server(self) -> subprocess.Popen[bytes]:
        """The Prefect server; returns when it answers."""
        server = self.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(self._port))
        wait_for(lambda: answers(f"{self.api}/health"), "the Prefect server", 120)
        return server

    def deploy(self) -> str:
        """What `make deploy` runs; its output."""
        return self._run(sys.executable, "-m", "infra.deploy", check=True).stdout

    def restart_server(self, seconds_away: float) -> None:
        """Stop the server as an operator does, and start it again after a while."""
        self.server.terminate()
        self.server.wait(60)
        time.sleep(seconds_away)
        self.server = self.start_server()

    def start_worker(self) -> subprocess.Popen[bytes]:
        """A process worker on the pool `cpu`."""
        return self.start("worker", "worker", "start", "--pool", "cpu", "--name", "test")

    def prefect(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A prefect command, run to its end."""
        return self._run(*PREFECT, *arguments, check=check)

    def _run(self, *command: str, check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, done.stdout + done.stderr + self.log("worker")
        return done

    def log(self, name: str) -> str:
        """What a long-running command has printed."""
        path = self.home / f"{name}.log"
        return path.read_text(errors="replace")[-8000:] if path.exists() else ""

    def api_get(self, path: str) -> dict[str, Any]:
        """What the server tells of something."""
        return self._asked("GET", path, None).json()

    def api_post(self, path: str, body: object) -> Any:
        """Make or ask for something; None where nothing is answered."""
        answer = self._asked("POST", path, body)
        return answer.json() if answer.content else None

    def api_patch(self, path: str, change: dict[str, Any]) -> None:
        """Change something on the server as its UI does."""
        self._asked("PATCH", path, change)

    def _asked(self, method: str, path: str, body: object) -> httpx.Response:
        """Its answer, asked for as Prefect's client does: a server on SQLite is busy now and then, and says 503."""
        answers: list[httpx.Response] = []

        def answered() -> bool:
            answers.append(httpx.request(method, f"{self.api}/{path}", json=body, timeout=60))
            return answers[-1].status_code != 503

        wait_for(answered, f"{method} {path}", 60)
        return answers[-1].raise_for_status()

    def set_state(self, run_id: str, kind: str, name: str | None = None) -> None:
        """Put a flow run into a state, as a person or an engine does."""
        self.api_post(f"flow_runs/{run_id}/set_state", {"state": {"type": kind, "name": name}})

    def flow_runs(self) -> list[dict[str, Any]]:
        """All flow runs, newest first."""
        return self.api_post("flow_runs/filter", {"sort": "START_TIME_DESC"})

    def flow_process(self) -> psutil.Process | None:
        """The process that executes a flow run for the worker."""
        running = psutil.Process(self.worker.pid).children(recursive=True)
        return next((process for process in running if _executes_a_flow(process)), None)

    def stop(self) -> None:
        """End every process that was started here, children first."""
        for process in reversed(self._processes):
            if process.poll() is None:
                end(process)
        self._database.stop()


class Database:
    """PostgreSQL for one Prefect server; without it that server makes a SQLite file of its own."""

    def __init__(self, logs: Path):
        self._processes = Processes(logs, ROOT)
        # not under pytest's own, which only its owner may enter: where root runs the tests, PostgreSQL is another user
        self._folder = Path(tempfile.mkdtemp(prefix="hass-postgres-"))
        self._folder.chmod(0o755)

    def start(self) -> dict[str, str]:
        """What the server needs to know of it. Nothing, with a warning, where it is not installed."""
        try:
            postgres_program("initdb")
        except StackError as error:
            warnings.warn(f"Prefect is on SQLite, and tests that wait for its events may fail: {error}", stacklevel=2)
            return {}
        postgres = start_postgres(self._processes, self._folder)
        address = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.address("prefect", "asyncpg")}
        return address | postgres.environment

    def stop(self) -> None:
        """End it; what it held is gone."""
        self._processes.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _executes_a_flow(process: psutil.Process) -> bool:
    try:
        return not {"prefect.flow_engine", "prefect.engine"}.isdisjoint(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has just ended
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children by their ids."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(30)


def wait_for(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Wait until the condition holds, on a busy machine longer. Fails naming what did not come."""
    deadline = time.monotonic() + BUSY * seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {BUSY * seconds:.0f} s for {what}"
        time.sleep(0.25)


def answers(url: str) -> bool:
    """Whether a server is there and well."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port of loopback that nobody uses at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
