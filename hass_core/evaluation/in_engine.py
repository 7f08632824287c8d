"""Which servers an evaluation asks: running ones by their addresses, or a vLLM started here, plain and with the draft.

A side is a server by name: `plain`, or one with the draft. The sides of running servers are asked in turns; a vLLM
that is started here has the machine for itself, one side after the other.
"""

import shlex
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from hass_core.config import EvaluationConfig, TreeConfig
from hass_core.draft_model.files import read_config
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.method_names import PLAIN
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.report import Report
from hass_core.evaluation.served import Measured, check_served, measure_sides, scores
from hass_core.evaluation.server import Server
from hass_core.evaluation.server_process import serving
from hass_core.export.card import method_of
from hass_core.export.exporter import export_draft
from hass_core.memory import release_unused
from hass_core.progress import Progress
from hass_core.target_model.loader import Target

Sides = Mapping[str, Server]
CPU_CACHE_GB = 2  # for keys and values where the machine has no GPU; vLLM's own choice is nearly all of its memory
IS_FOR_CPUS = "from vllm.platforms import current_platform; print(current_platform.is_cpu())"


class Where(Protocol):
    """Servers to ask, in sessions."""

    def check(self, target: Target, question: Question, temperatures: Sequence[float]) -> None:
        """Raise what can be known before anything slow."""
        ...

    def sessions(self, target: Target, draft: Path | None, question: Question) -> Generator[Sides, None, None]:
        """Sides that are there at the same time, and when those are done with, others."""
        ...


@dataclass(frozen=True)
class RunningServers:
    """One that serves the target with the draft, and, for the speed-up, one without."""

    drafted: Server
    plain: Server | None

    def check(self, target: Target, question: Question, temperatures: Sequence[float]) -> None:
        """Raise BadInput where one serves another model, or drafts where it should not, or the other way round."""
        check_served(self.drafted, target, question, drafts=True)
        if self.plain:
            check_served(self.plain, target, question, drafts=False)

    def sessions(self, target: Target, draft: Path | None, question: Question) -> Generator[Sides, None, None]:
        """Both at once."""
        yield {"drafted": self.drafted} | ({PLAIN: self.plain} if self.plain else {})

    def __str__(self) -> str:
        return self.drafted.url + (f", without a draft {self.plain.url}" if self.plain else "")


@dataclass(frozen=True)
class StartedVllm:
    """vLLM by the Python of its environment, with chains of so many drafts."""

    python: str
    arguments: str  # more of vLLM's own, as a shell reads them
    chains: Sequence[int]

    def check(self, target: Target, question: Question, temperatures: Sequence[float]) -> None:
        """Raise BadInput where no vLLM is there, or one for CPUs is to draw: with drafts its text is not the target's,
        seen with 0.32."""
        if any(temperatures) and self._draws_wrongly():
            raise BadInput(
                f"the vLLM of {self.python} is the one for CPUs, which accepts too few drafts when it draws, so its "
                "text is not the target's and its figures would be wrong: leave --temperatures at 0, or measure where "
                "there is a GPU"
            )

    def _draws_wrongly(self) -> bool:
        asked = subprocess.run([self.python, "-c", IS_FOR_CPUS], capture_output=True, text=True)
        if asked.returncode:
            said = asked.stderr.strip().splitlines()[-1:]
            raise BadInput(f"{self.python} has no vLLM that starts: {' '.join(said)}; name another --engine-python")
        return asked.stdout.split()[-1:] == ["True"]

    def sessions(self, target: Target, draft: Path | None, question: Question) -> Generator[Sides, None, None]:
        """Plain first. Raises BadInput with vLLM's own words where it does not start, DraftMismatch for a draft that it
        has no place for."""
        if draft is None:
            raise BadInput("there is no draft to serve: name one, for --engine serves the target with it")
        if target.device.type != "cpu" and not target.is_spread:
            target.model.to("cpu")  # pyright: ignore[reportArgumentType]  # the engine wants the device for itself
            release_unused()
        with TemporaryDirectory(prefix="hass-engine-") as scratch:
            tree = TreeConfig(kind="chain", depth=max(self.chains))
            exported = export_draft(draft, target, "vllm", Path(scratch) / "draft", tree, target.name)
            for chain in (0, *self.chains):
                with serving(self._command(exported, target, chain), target.folder, exported, chain, "vLLM") as url:
                    server = Server(url)
                    check_served(server, target, question, drafts=chain > 0)
                    yield {f"chain of {chain}" if chain else PLAIN: server}

    def _command(self, draft: Path, target: Target, chain: int) -> str:
        """For a shell, which fills in the folders and the port."""
        dtype = str(target.dtype).removeprefix("torch.")
        command = (
            f'VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE="${{VLLM_CPU_KVCACHE_SPACE:-{CPU_CACHE_GB}}}" '
            f"exec {shlex.quote(self.python)} -m vllm.entrypoints.openai.api_server "
            f'--model "$HASS_TARGET" --host 127.0.0.1 --port "$HASS_PORT" --dtype {dtype} --no-enable-prefix-caching '
            f"{self.arguments}"
        )
        if not chain:
            return command
        method = method_of(read_config(draft))
        opening = f'{{"method": "{method}", "num_speculative_tokens": {chain}, "model": "'
        return f"""{command} --speculative-config {shlex.quote(opening)}"$HASS_DRAFT"'"}}'"""

    def __str__(self) -> str:
        return f"vLLM of {self.python}" + (f", {self.arguments}" if self.arguments else "")


@dataclass(frozen=True)
class InEngine:
    """What an evaluation asks of serving engines, beside our own decoders."""

    where: Where
    rows: Sequence[int]  # requests at once

    def added_to(
        self,
        report: Report,
        own: Sequence[Measurement],
        questions: Sequence[Question],
        target: Target,
        draft: Path | None,
        config: EvaluationConfig,
        progress: Progress,
    ) -> Report:
        """The report with the engine's rows. Raises BadInput where the engine's counts cannot be its answers'."""
        measured: list[Measured] = []
        engine = ""
        with closing(self.where.sessions(target, draft, questions[0])) as sessions:  # a started engine ends with it
            for sides in sessions:
                engine = next(iter(sides.values())).reading().engine
                measured += measure_sides(sides, questions, own, self.rows, target, config, progress)
        found = scores(measured, engine, list(report.benchmarks), config)
        return report.model_copy(update={"served": found, "served_how": str(self.where)})
