"""PostgreSQL for MLflow and Prefect. Its password lies in one file, which clients read by PGPASSFILE."""

import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from infra.stack.machine import StackError, free_port, program, write_private
from infra.stack.processes import Processes

DATABASES = ("mlflow", "prefect")
HINT = "on Debian and Ubuntu, apt install postgresql; without it, see docs/team.md on servers with SQLite"


@dataclass(frozen=True)
class Postgres:
    """A server on loopback, its user `hass`, and the file with the password."""

    port: int
    password_file: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs beside an address."""
        return {"PGPASSFILE": str(self.password_file)}

    def address(self, database: str, driver: str) -> str:
        """The address of a database for SQLAlchemy. It holds no password."""
        return f"postgresql+{driver}://hass@127.0.0.1:{self.port}/{database}"

    def connect(self) -> psycopg2.extensions.connection:
        """A connection for administration."""
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user="hass", dbname="postgres", passfile=str(self.password_file)
        )
        connection.autocommit = True
        return connection

    def answers(self) -> bool:
        """Whether it takes connections."""
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True


def start_postgres(processes: Processes, folder: Path) -> Postgres:
    """Start the server on folder/postgres, made at the first start. Raises StackError where it is not installed."""
    initdb = postgres_program("initdb")
    user = _other_user(folder)
    data, postgres = folder / "postgres", Postgres(free_port(), folder / "postgres.password")
    if not (data / "PG_VERSION").exists():
        _create(initdb, data, postgres.password_file, user)
    listen = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-p", str(postgres.port)]
    server = [str(Path(initdb).with_name("postgres")), "-D", str(data), *listen]
    processes.start("postgres", server, {}, user=user, stop_signal=signal.SIGINT)
    processes.wait_until("postgres", postgres.answers)
    _create_databases(postgres)
    return postgres


def postgres_program(name: str) -> str:
    """The path of a program of PostgreSQL: Debian keeps them off PATH, a folder for each version. Raises StackError."""
    return program(name, HINT, *(str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)))


def _other_user(folder: Path) -> str | None:
    """The user to run as: PostgreSQL refuses root. Raises StackError where that user cannot reach the folder."""
    if os.getuid() != 0:
        return None
    closed = [path for path in (folder, *folder.parents) if not path.stat().st_mode & stat.S_IXOTH]
    if closed:
        raise StackError(
            f"PostgreSQL refuses to run as root, and the user postgres cannot enter {closed[-1]}: "
            f"choose another folder, or chmod o+x {closed[-1]}"
        )
    return "postgres"


def _create(initdb: str, data: Path, password_file: Path, user: str | None) -> None:
    """Make the data folder with the user `hass` and a new password."""
    data.mkdir(mode=0o700, exist_ok=True)
    password = secrets.token_urlsafe(24)
    with tempfile.NamedTemporaryFile("w") as first_password:
        first_password.write(password)
        first_password.flush()
        if user:
            shutil.chown(data, user, user)
            shutil.chown(first_password.name, user, user)
        options = ["--auth=scram-sha-256", "--username=hass", "--encoding=UTF8", "--locale=C"]
        command = [initdb, "-D", str(data), f"--pwfile={first_password.name}", *options]
        done = subprocess.run(command, cwd=data, user=user, group=user, extra_groups=[] if user else None,
                              capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise StackError(f"PostgreSQL could not make its data folder {data}: {done.stderr}")
    write_private(password_file, f"*:*:*:hass:{password}\n")


def _create_databases(postgres: Postgres) -> None:
    """The databases of MLflow and Prefect, where they are missing."""
    connection = postgres.connect()
    with connection.cursor() as cursor:
        cursor.execute("SELECT datname FROM pg_database")
        existing = {name for (name,) in cursor.fetchall()}
        for name in DATABASES:
            if name not in existing:
                cursor.execute(f"CREATE DATABASE {name}")
    connection.close()
