"""A copy of all that a stack knows, taken while it runs, and a new stack that begins with it.

A copy is a folder: `mlflow.dump` and `prefect.dump` for pg_restore, and the files of both buckets. The databases are
copied first: whatever they name is in the store by then.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from infra.buckets import BUCKETS
from infra.stack.machine import StackError
from infra.stack.postgres import DATABASES, Postgres, postgres_program
from infra.stack.processes import without_other_servers

ROOT = Path(__file__).parents[2]


def back_up(folder: Path, copy: Path) -> None:
    """Copy the running stack of `folder`. Raises StackError where none runs, and where `copy` exists."""
    postgres, environment = _running(folder), _environment(folder / "env")
    if copy.exists():
        raise StackError(f"{copy} exists already: a copy is written whole or not at all, so name a new folder")
    unfinished = copy.with_name(f"{copy.name}.unfinished")
    unfinished.mkdir(parents=True, mode=0o700, exist_ok=True)
    for name in DATABASES:
        _on_postgres("pg_dump", postgres, "--format=custom", f"--file={unfinished}/{name}.dump", name)
    print(_buckets("save", unfinished, environment), end="")
    unfinished.rename(copy)
    print(f"{', '.join(DATABASES)} and the buckets {', '.join(BUCKETS)} are in {copy}")


def check_copy(copy: Path, folder: Path) -> None:
    """Raises StackError unless `copy` is one, and `folder` has no state yet."""
    if missing := [name for name in DATABASES if not (copy / f"{name}.dump").exists()]:
        raise StackError(f"{copy} is no copy of a stack: {missing[0]}.dump is not there")
    if (folder / "postgres").exists():
        raise StackError(f"{folder} holds a stack: restoring would mix two; name a new folder with --folder")


def restore_databases(copy: Path, postgres: Postgres) -> None:
    """Fill the new databases, before a server makes tables in them."""
    for name in DATABASES:
        _on_postgres("pg_restore", postgres, "--no-owner", "--exit-on-error", f"--dbname={name}", f"{copy}/{name}.dump")


def restore_buckets(copy: Path, environment: dict[str, str]) -> None:
    """Fill the new buckets."""
    print(_buckets("load", copy, environment), end="")


def _running(folder: Path) -> Postgres:
    """The PostgreSQL server of a running stack."""
    try:
        port = int((folder / "postgres" / "postmaster.pid").read_text().splitlines()[3])
    except (OSError, IndexError) as error:
        raise StackError(f"no stack runs in {folder}: a copy is taken of a running one") from error
    return Postgres(port, folder / "postgres.password")


def _environment(file: Path) -> dict[str, str]:
    """What `env` exports."""
    lines = [shlex.split(line)[1] for line in file.read_text().splitlines() if line.startswith("export ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines) if name != "PATH"}


def _on_postgres(name: str, postgres: Postgres, *arguments: str) -> None:
    address = ["--host=127.0.0.1", f"--port={postgres.port}", "--username=hass", "--no-password"]
    command = [postgres_program(name), *address, *arguments]
    done = subprocess.run(command, env=os.environ | postgres.environment, capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"{name} failed: {done.stderr[-2000:]}")


def _buckets(action: str, copy: Path, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "infra.buckets", action, str(copy)]
    done = subprocess.run(command, cwd=ROOT, env=without_other_servers() | environment, capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"the buckets could not be copied:\n{done.stderr[-2000:]}")
    return done.stdout
