"""The options of `hass evaluate` about serving engines, checked before anything is loaded."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hass_core.errors import ConfigError

if TYPE_CHECKING:
    from hass_core.evaluation.in_engine import InEngine

MOST_ROWS, MOST_DRAFTS = 1024, 16
ENGINE = "vllm"


@dataclass(frozen=True)
class EngineOptions:
    """As they were given."""

    server: str | None
    plain_server: str | None
    engine: str | None
    python: str | None
    arguments: str
    chains: str
    rows: str

    def checked(self, draft: Path | None) -> "EngineOptions":
        """The same. Raises ConfigError for what contradicts or cannot be."""
        if self.server and self.engine:
            raise ConfigError("--server asks a server that runs, --engine starts one: give one of them")
        if self.plain_server and not self.server:
            raise ConfigError("--plain-server goes with --server, the one that has the draft; --engine needs neither")
        if self.engine not in (None, ENGINE):
            raise ConfigError(
                f"--engine starts {ENGINE} only, not {self.engine}; for another start it and give --server"
            )
        if self.engine and draft is None:
            raise ConfigError("--engine serves the target with the draft under test: name one")
        if self.engine and self._python() is None:
            raise ConfigError(
                f"no environment with {ENGINE} was found: name its Python with --engine-python or HASS_VLLM_PYTHON"
            )
        try:
            shlex.split(self.arguments)
        except ValueError as error:
            raise ConfigError(f"--engine-args {self.arguments!r} cannot be read: {error}") from None
        numbers(self.rows, "--rows", MOST_ROWS)
        numbers(self.chains, "--chains", MOST_DRAFTS)
        return self

    def in_engine(self) -> "InEngine | None":
        """What to ask of engines; nothing where none was named. Raises BadInput or Unreachable for a server that is
        none."""
        from hass_core.evaluation.in_engine import InEngine, RunningServers, StartedVllm
        from hass_core.evaluation.server import Server

        rows = numbers(self.rows, "--rows", MOST_ROWS)
        if self.server:
            plain = Server(self.plain_server) if self.plain_server else None
            return InEngine(RunningServers(Server(self.server), plain), rows)
        if self.engine:
            python = self._python()
            assert python is not None
            return InEngine(StartedVllm(python, self.arguments, numbers(self.chains, "--chains", MOST_DRAFTS)), rows)
        return None

    def _python(self) -> str | None:
        """That of the environment: the one named, else the one beside the `vllm` on the path."""
        if self.python:
            return shutil.which(self.python)
        found = shutil.which(ENGINE)
        return shutil.which(str(Path(found).resolve().with_name("python"))) if found else None


def numbers(text: str, option: str, most: int) -> tuple[int, ...]:
    """Whole numbers with commas between, each once. Raises ConfigError."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= number <= most for number in found):
        raise ConfigError(f"{option} takes whole numbers from 1 to {most} with commas between, not {text!r}")
    return tuple(dict.fromkeys(found))
