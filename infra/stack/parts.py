"""What runs in a stack's folder, as another shell sees it: `python -m infra.stack status` and `logs`."""

import json
import sys
from pathlib import Path

import psutil

PARTS = "parts.json"


def write_parts(folder: Path, pids: dict[str, int]) -> None:
    """Note the processes of the stack that has just started, with when each began: an id alone may be taken again."""
    began = {name: psutil.Process(pid).create_time() for name, pid in pids.items()}
    (folder / PARTS).write_text(json.dumps({name: [pid, began[name]] for name, pid in pids.items()}))


def running_parts(folder: Path) -> dict[str, tuple[int, bool]]:
    """By name: the process id, and whether that process still runs. Empty where no stack has run."""
    file = folder / PARTS
    noted: dict[str, tuple[int, float]] = json.loads(file.read_text()) if file.exists() else {}
    return {name: (pid, _runs(pid, began)) for name, (pid, began) in noted.items()}


def _runs(pid: int, began: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def show_status(folder: Path) -> int:
    """One line a part. The exit status: 0 when all run, 1 otherwise."""
    parts = running_parts(folder)
    if not parts:
        print(f"no stack has run in {folder}; make stack starts one", file=sys.stderr)
        return 1
    for name, (pid, runs) in parts.items():
        print(f"{name:12} {'running' if runs else 'ended':8} {pid:8}  {folder}/logs/{name}.log")
    return 0 if all(runs for _, runs in parts.values()) else 1


def show_logs(folder: Path, part: str | None, lines: int) -> int:
    """The end of each part's log, or of one. The exit status: 1 where there is none."""
    logs = sorted((folder / "logs").glob("*.log"))
    chosen = [log for log in logs if part in (None, log.stem)]
    if not chosen:
        names = ", ".join(log.stem for log in logs)
        print(
            f"no log of {part or 'a stack'} in {folder}/logs" + (f"; there are {names}" if names else ""),
            file=sys.stderr,
        )
        return 1
    for log in chosen:
        print(f"== {log}")
        print("\n".join(log.read_text(errors="replace").splitlines()[-lines:]))
    return 0
