"""Training by several processes of this host: `accelerate launch` as a child, watched and ended by this process.

    launch-…/settings.json   what the children train by; in the stage's scratch, as the rest
    launch-…/progress.json   done, total and note, by the first of them
    launch-…/problem.json    a mistake of the user's that one of them met
    launch-…/log             what they print

Hosts that train together may share the stage's scratch: each has a folder of its own.

Checkpoints and curves are where one process has them, so that it makes no difference who goes on.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hass_core import errors
from hass_core.config import RunConfig
from hass_core.errors import HassError
from hass_core.json_files import write_whole
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, Store
from hass_core.target_model.known import KnownTarget
from hass_core.training.feed import Division
from hass_core.training.train import draft_folder, train_draft

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 300.0  # of one that was asked to stop: a step, a validation, a checkpoint
LINES_SHOWN = 5


def train_on_all(
    config: RunConfig, features: Artifact, store: Store, target: KnownTarget, progress: Progress = no_progress
) -> Artifact:
    """Train with `execution.gpus` processes; here when that is one. The draft is the same.

    Raises as `train_draft` does, and HassError with the end of their log when they fail. Whatever else ends this
    function, a cancellation say, ends them too, once their state is saved.
    """
    execution = config.execution
    if execution.gpus == 1 and not execution.accelerate:
        return train_draft(config, features, store, target, progress)
    folder = draft_folder(config, features, store, target)
    if done := folder.artifact():
        return done
    Division(config.training.packs_per_step, config.training.packs_per_micro_batch, execution.gpus)
    place = Path(tempfile.mkdtemp(prefix="launch-", dir=folder.scratch()))
    (place / "settings.json").write_text(config.model_dump_json())
    command = [*launcher(config), str(place / "settings.json"), "--features", features.url, "--reports", str(place)]
    with (place / "log").open("wb") as log, _children(command, log, target.device.type == "cpu") as process:
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            _pass_on(place, progress)
    if done := folder.artifact():
        steps, rate = done.summary["steps"], done.summary["tokens_per_second"]
        progress(steps, steps, f"{rate:,.0f} tokens/s")  # the last look may have been before the last step
        return done
    raise _failure(place, process.returncode)


def launcher(config: RunConfig) -> list[str]:
    """The command that starts the processes, up to what they run."""
    execution = config.execution
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = ["--multi_gpu", "--num_machines", "1", "--main_process_port", str(port)]
    own += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    chosen = ["--config_file", execution.accelerate] if execution.accelerate else own
    processes = ["--num_processes", str(execution.gpus)] if execution.gpus > 1 else []
    module = ["-m", "accelerate.commands.launch", *chosen, *processes, "-m", "hass_core.training"]
    return [sys.executable, *module]


@contextmanager
def _children(command: list[str], log: IO[bytes], on_cpu: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The processes. They hold the other end of a pipe: when this end closes, because the block is left or this process
    killed, they save their state and end (`stop_with_parent`)."""
    variables = {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | variables, start_new_session=True
    )
    assert process.stdin
    try:
        yield process
    finally:
        process.stdin.close()
        for end in (lambda: None, process.terminate, process.kill):  # the launcher passes a SIGTERM on
            end()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
                break


def stop_with_parent() -> None:
    """In one of the processes: SIGTERM to itself once the parent wants no more of it, or is gone."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock a thread must not hold when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _pass_on(place: Path, progress: Progress) -> None:
    with suppress(FileNotFoundError):
        progress(*json.loads((place / "progress.json").read_text()))


def _failure(place: Path, status: int) -> HassError:
    """What the first of the processes that met a user's mistake said, else the end of the log."""
    with suppress(FileNotFoundError):
        reported = json.loads((place / "problem.json").read_text())
        return getattr(errors, reported["kind"], HassError)(reported["message"])
    return HassError(f"training by several processes ended with exit status {status}: {_end_of(place / 'log')}")


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return " / ".join([line.strip() for line in lines if line.strip()][-LINES_SHOWN:]) + f" (all of it in {log})"


def report_progress(place: Path, done: int, total: int, note: str = "") -> None:
    """Called by the first of the processes: what its parent passes on."""
    write_whole(place / "progress.json", [done, total, note])


def report_problem(place: Path, problem: HassError) -> None:
    """Called by any of them before it ends by a user's mistake."""
    write_whole(place / "problem.json", {"kind": type(problem).__name__, "message": str(problem)})
