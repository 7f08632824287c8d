"""Start the stack, say how to use it, and stop it at Ctrl-C or when a part ends: `python -m infra.stack`."""

import argparse
import contextlib
import fcntl
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import infra.stack
from hass_core.errors import sentence_of
from infra.stack.backup import back_up, check_copy, restore_buckets, restore_databases
from infra.stack.machine import StackError, claim_ports, write_private
from infra.stack.parts import show_logs, show_status, write_parts
from infra.stack.postgres import start_postgres
from infra.stack.processes import Processes
from infra.stack.s3 import start_s3
from infra.stack.servers import deploy, start_exporter, start_mlflow, start_prefect, start_workers, wait_for_servers

ROOT = Path(__file__).parents[2]
SERVERS = ("prefect", "mlflow", "exporter")  # those with a port that people type
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.stack", description=infra.stack.__doc__)
    parser.add_argument("action", nargs="?", choices=("start", "status", "logs", "backup"), default="start")
    parser.add_argument("--copy", type=Path, help="of backup: the new folder to write; of start: begin with that copy")
    parser.add_argument("--part", help="of logs: one process, such as worker-cpu; default: all")
    parser.add_argument("--lines", type=int, default=20, help="of logs: so many of each, from the end")
    parser.add_argument("--folder", type=Path, default=ROOT / ".hass" / "stack", help="where everything lies")
    parser.add_argument("--prefect-port", type=int, default=4200, help="of the UI and API; 0: any free one")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="of the UI and API; 0: any free one")
    parser.add_argument("--exporter-port", type=int, default=9108, help="of the metrics; 0: any free one")
    return parser.parse_args()


def start(processes: Processes, folder: Path, ports: dict[str, int], copy: Path | None) -> None:
    """Start all parts, each when those it needs answer, with the state of `copy` where one is named.

    Raises StackError naming the part that does not start.
    """
    environment = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "HASS_CACHE": str(folder / "cache"),
    }
    postgres = start_postgres(processes, folder)
    environment |= start_s3(processes, folder)
    if copy:
        restore_databases(copy, postgres)
        restore_buckets(copy, environment)
    environment |= start_mlflow(processes, postgres, environment, ports["mlflow"])
    environment |= start_prefect(processes, postgres, environment, ports["prefect"])
    wait_for_servers(processes, environment)
    deploy(environment, ROOT)
    pools = start_workers(processes, environment)
    metrics = start_exporter(processes, environment, ports["exporter"])
    write_environment(folder / "env", environment)
    write_parts(folder, processes.pids)
    greet(folder, environment, pools, metrics)


def write_environment(path: Path, environment: dict[str, str]) -> None:
    """A file for `.` in a shell, so that prefect and hass mean this stack. Only its owner may read it."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    write_private(path, "\n".join(lines) + "\n")


def greet(folder: Path, environment: dict[str, str], pools: list[str], metrics: str) -> None:
    """What runs where, and the next command."""
    print(f"\nPrefect  {environment['PREFECT_API_URL'].removesuffix('/api')}  (workers: {', '.join(pools)})")
    print(f"MLflow   {environment['MLFLOW_TRACKING_URI']}")
    print(f"Metrics  {metrics}  (for Prometheus)")
    print(f"Logs     {folder}/logs")
    print(f"\nIn another shell:\n  . {shlex.quote(str(folder / 'env'))}")
    print("  prefect deployment run 'retrain/smollm2-cpu' --watch\n\nCtrl-C stops everything.", flush=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other stacks out of the folder. Raises StackError when one runs in it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"a stack runs in {folder} already") from error
        yield


def run(processes: Processes, folder: Path, ports: dict[str, int], copy: Path | None) -> None:
    """Start all parts, wait until one ends by itself, and in any case stop the others."""
    try:
        start(processes, folder, ports, copy)
        print(processes.wait_for_an_end(), file=sys.stderr, flush=True)
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave parts behind
        processes.stop()


def asked_to_stop(*_: object) -> NoReturn:
    """Ctrl-C, SIGTERM and a closed terminal mean the same."""
    print("stopping, up to a minute", flush=True)
    raise KeyboardInterrupt


def copied(folder: Path, copy: Path | None) -> int:
    """Copy the running stack; the exit status."""
    try:
        if copy is None:
            raise StackError("say where to: backup --copy FOLDER")
        back_up(folder, copy.resolve())
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """Run the stack; the exit status: 0 when it was asked to stop, 1 when it could not start or a part ended."""
    given = arguments()
    folder = given.folder.resolve()
    if given.action == "status":
        return show_status(folder)
    if given.action == "logs":
        return show_logs(folder, given.part, given.lines)
    if given.action == "backup":
        return copied(folder, given.copy)
    for number in SIGNALS:
        signal.signal(number, asked_to_stop)
    try:
        if given.copy:
            check_copy(given.copy, folder)
        folder.mkdir(parents=True, exist_ok=True)
        processes = Processes(folder / "logs", ROOT)
        with held(folder):
            asked = {name: getattr(given, f"{name}_port") for name in SERVERS}
            run(processes, folder, claim_ports(asked), given.copy)
    except (StackError, OSError) as error:  # a folder that nobody may write to
        print(sentence_of(error) or error, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
