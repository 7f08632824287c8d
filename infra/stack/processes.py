"""Long-running programs that start in order, are watched, and end in the reverse order."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.stack.machine import StackError, program

READY_SECONDS = 180
STOP_SECONDS = 35  # a worker takes up to 30 to end its runs
PAUSE_SECONDS = 0.3
ELSEWHERE = ("PREFECT_", "MLFLOW_", "AWS_", "HASS_STORE")  # what a shell may have set for other servers


@dataclass(frozen=True)
class Running:
    """A program, its log, and the signal that ends it well."""

    process: subprocess.Popen[bytes]
    log: Path
    stop_signal: signal.Signals


class Processes:
    """What runs, in the order it was started. Each program writes to NAME.log in `logs`."""

    def __init__(self, logs: Path, cwd: Path):
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._cwd = logs, cwd
        self._running: dict[str, Running] = {}

    def start(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Start a program, as another user where one is named. It also ends when this process is killed."""
        options = ["--pdeathsig", stop_signal.name.removeprefix("SIG")]
        if user:
            options += ["--reuid", user, "--regid", user, "--init-groups"]
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program("setpriv", "it belongs to Linux (util-linux)"), *options, "--", *command],
                cwd=self._cwd,
                env=without_other_servers() | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
            )
        self._running[name] = Running(process, log, stop_signal)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: running.process.pid for name, running in self._running.items()}

    def wait_until(self, name: str, ready: Callable[[], bool]) -> None:
        """Until a program is ready. Raises StackError with the end of its log when it ends or takes too long."""
        running, deadline = self._running[name], time.monotonic() + READY_SECONDS
        while not ready():
            ended = running.process.poll() is not None
            if ended or time.monotonic() > deadline:
                why = "did not start" if ended else f"was not ready after {READY_SECONDS} s"
                text = running.log.read_text(errors="replace")[-2000:]
                raise StackError(f"{name} {why}. The end of {running.log}:\n{text}")
            time.sleep(PAUSE_SECONDS)
        print(f"{name} is up", flush=True)

    def wait_for_an_end(self) -> str:
        """Block until a program ends by itself; what to tell about it."""
        while True:
            for name, running in self._running.items():
                if running.process.poll() is not None:
                    return f"{name} has ended (status {running.process.returncode}); see {running.log}"
            time.sleep(PAUSE_SECONDS)

    def stop(self) -> None:
        """End all programs and what they started, the last one first."""
        for running in reversed(self._running.values()):
            running.process.send_signal(running.stop_signal)
            try:
                running.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            kill_group(running.process.pid)
        self._running.clear()


def without_other_servers() -> dict[str, str]:
    """This process's environment without addresses and passwords of servers that are not part of the stack."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ELSEWHERE)}


def kill_group(group: int) -> None:
    """Kill what is left of a process group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
