"""Processes that need not import torch first, which takes seconds: forks of one that has done so for all.

The server that forks is multiprocessing's, a process without threads that has loaded what is named below and nothing
else. Prefect and MLflow are not among it: they read settings while they are imported.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

from flows.collector import imported

LOADED = ("tests.conftest", "accelerate", "transformers.models.llama.modeling_llama", "hass_core.training.train",
          "hass_core.evaluation.evaluate", "hass_core.export.exporter", "hass_core.decoding.planner")  # fmt: skip
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(list(LOADED))


def start(function: Callable[..., object], *arguments: object, **environment: str) -> ForkServerProcess:
    """Call a function of a module in a process of its own, which begins with these variables."""
    process = _forks.Process(target=_call, args=(function, arguments, environment))
    process.start()
    return process


def wait(process: ForkServerProcess, seconds: float = 200) -> int:
    """The exit status, that of subprocess.Popen."""
    process.join(seconds)
    assert process.exitcode is not None, f"still running after {seconds:.0f} s"
    return process.exitcode


def _call(function: Callable[..., object], arguments: tuple[object, ...], environment: dict[str, str]) -> None:
    imported()
    os.environ.update(environment)
    function(*arguments)
