"""Run compose.yaml without a container engine: each service's own command and environment, as processes on loopback.

Started by the test in a network, mount and process namespace of its own: there the services' names mean 127.0.0.1,
their ports are free, files that compose puts into a container lie where it says, and all ends with this process.

    python compose_processes.py FOLDER COMMAND…     runs COMMAND with a worker's environment when all is up
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 600
DEBIAN_POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
ENTRYPOINTS = {"chrislusf/seaweedfs": ["weed"]}  # what an image's own entrypoint puts before the command


class Services:
    """The services of compose.yaml; `folder` holds their volumes and logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        text = (ROOT / "infra" / "compose.yaml").read_text()
        self._compose = yaml.safe_load(text)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_with_needs(self, name: str) -> None:
        """Start a service when those it depends on are as it wants them."""
        service = self._compose["services"][name]
        for other, needed in service.get("depends_on", {}).items():
            if other not in self._processes:
                self.start_with_needs(other)
            self._wait(other, needed["condition"])
        self.start(name)

    def start(self, name: str) -> None:
        """Start a service as it is written."""
        service = self._compose["services"][name]
        self._place_configs(service)
        if service["image"].startswith("postgres:"):
            self._start_postgres(name, service)
            return
        image = service["image"].partition(":")[0]
        command = [*service.get("entrypoint", ENTRYPOINTS.get(image, [])), *service["command"]]
        self._run(name, [self._in_volumes(service, filled(part)) for part in command], self.environment(name))

    def environment(self, name: str) -> dict[str, str]:
        """What the container would find, on top of what every program here needs."""
        service = self._compose["services"][name]
        told = service.get("environment", {})
        own = {key: self._in_volumes(service, filled(str(value))) for key, value in told.items()}
        own |= {"HASS_CODE_DIRECTORY": str(ROOT)} if "HASS_CODE_DIRECTORY" in own else {}
        base = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if key in os.environ}
        home = {"PREFECT_HOME": str(self.folder / name), "HF_HUB_OFFLINE": "1", "PREFECT_WORKER_QUERY_SECONDS": "1"}
        return base | home | own

    def _start_postgres(self, name: str, service: dict[str, Any]) -> None:
        """What the image's entrypoint does: a user with a password, a database, the scripts of its folder."""
        told = {key: filled(value) for key, value in service["environment"].items()}
        data, programs = self.folder / "postgres", DEBIAN_POSTGRES[-1]
        secret = self.folder / "postgres.secret"
        secret.write_text(told["POSTGRES_PASSWORD"])
        as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--"]
        subprocess.run(["install", "--directory", "--owner=postgres", str(data)], check=True)
        options = [f"--username={told['POSTGRES_USER']}", f"--pwfile={secret}", "--auth=scram-sha-256"]
        subprocess.run([*as_user, programs / "initdb", "-D", data, *options], check=True, stdout=subprocess.DEVNULL)
        listen = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=/var/run/postgresql"]
        subprocess.run(["install", "--directory", "--owner=postgres", "/var/run/postgresql"], check=True)
        self._run(name, [*as_user, str(programs / "postgres"), "-D", str(data), *listen], {})
        client = {"PGPASSWORD": told["POSTGRES_PASSWORD"], "PGUSER": told["POSTGRES_USER"], "PGHOST": "127.0.0.1"}
        until(lambda: succeeds(["pg_isready"], os.environ | client), name)
        psql = ["psql", "-v", "ON_ERROR_STOP=1", "-q", "-d"]
        create = f"CREATE DATABASE {told['POSTGRES_DB']}"
        subprocess.run([*psql, "postgres", "-c", create], env=os.environ | client, check=True)
        for config in service["configs"]:
            subprocess.run([*psql, told["POSTGRES_DB"], "-f", config["target"]], env=os.environ | client, check=True)

    def _run(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment or os.environ, stdout=log, stderr=log
            )

    def _place_configs(self, service: dict[str, Any]) -> None:
        for config in service.get("configs", []):
            path = Path(config["target"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(filled(self._compose["configs"][config["source"]]["content"]))

    def _in_volumes(self, service: dict[str, Any], text: str) -> str:
        """`text` with the paths of the service's volumes, which lie in `folder` here."""
        for volume in service.get("volumes", []):
            name, path = volume.split(":")
            (self.folder / name).mkdir(exist_ok=True)
            text = re.sub(rf"(?<![\w/.]){path}(?![\w])", str(self.folder / name), text)
        return text

    def _wait(self, name: str, condition: str) -> None:
        process, service = self._processes[name], self._compose["services"][name]
        if condition == "service_completed_successfully":
            if process.wait(PATIENCE_SECONDS) != 0:
                raise SystemExit(f"{name} failed:\n{self.log(name)}")
            return
        kind, *test = service["healthcheck"]["test"]
        command = ["sh", "-c", filled(test[0])] if kind == "CMD-SHELL" else [filled(part) for part in test]
        until(lambda: self._healthy(name, process, command), name)

    def _healthy(self, name: str, process: subprocess.Popen[bytes], command: list[str]) -> bool:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with {process.returncode}:\n{self.log(name)}")
        return succeeds(command, os.environ)

    def log(self, name: str) -> str:
        """The end of what a service printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-5000:]


def filled(text: str) -> str:
    """Text with compose's variables put in, and its doubled dollars made single."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return os.environ.get(name) or (default or "" if default is not None else os.environ[name])

    text = re.sub(r"(?<!\$)\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}", value, text)
    return text.replace("$$", "$")


def succeeds(command: list[str], environment: Any) -> bool:
    """Whether a command ends well."""
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def until(condition: Any, what: str) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} was not ready after {PATIENCE_SECONDS} s")
        time.sleep(0.5)


def prepare_namespace(folder: Path) -> None:
    """Loopback up, the services' names in hosts; /etc and /var/run are copies, gone with the namespace."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["cp", "-a", "/etc", str(folder / "etc")], check=True)
    subprocess.run(["mount", "--bind", str(folder / "etc"), "/etc"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    Path("/etc/hosts").write_text("127.0.0.1 localhost postgres s3 prefect mlflow\n")


def main() -> int:
    """Start everything, deploy, and run the command as a worker would."""
    folder = Path(sys.argv[1])
    prepare_namespace(folder)
    services = Services(folder)
    services.start_with_needs("worker-cpu")
    services.start("deploy")
    services._wait("deploy", "service_completed_successfully")
    done = subprocess.run(
        sys.argv[2:],
        cwd=ROOT,
        env=services.environment("worker-cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    services.start("exporter")
    services._wait("exporter", "service_healthy")
    if done.returncode:
        print(services.log("prefect"), services.log("worker-cpu"), sep="\n")
    print(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
