"""A server with a draft, started by a shell command for a measurement and stopped after it."""

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from hass_core.errors import BadInput

START_SECONDS = 1800  # an engine loads a large target and captures its graphs
STOP_SECONDS = 60
SHOWN = 1500  # characters of what a server said before it ended
ERRORS = re.compile(r"\b\w*(?:Error|Exception): .*")


@contextmanager
def serving(
    command: str, target: str, draft: Path, depth: int, what: str = "promotion.server_command"
) -> Iterator[str]:
    """The address of the server that `command` runs, once it answers; it and its children end with the block.

    The command finds HASS_TARGET and HASS_DRAFT (folders), HASS_DEPTH (tokens it may draft in a row) and HASS_PORT in
    its environment, and has to serve OpenAI's endpoints and /metrics at that port of the loopback. Raises BadInput
    with the errors of its output when it does not; there it is called `what`.
    """
    port = _free_port()
    told = {"HASS_TARGET": target, "HASS_DRAFT": str(draft), "HASS_DEPTH": str(depth), "HASS_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, shell=True, env=os.environ | told, stdout=output, stderr=output, start_new_session=True
        )
        try:
            if problem := _waited(process, url):
                output.seek(0)
                said = _cause_in(output.read().decode(errors="replace"))
                raise BadInput(f"{what} {problem}; it said: {said}")
            yield url
        finally:
            _stop(process)


def _cause_in(output: str) -> str:
    """The errors that it names, the first of which is the cause of the others; else its end."""
    errors = dict.fromkeys(line.strip() for line in ERRORS.findall(output))
    return " / ".join(errors)[:SHOWN] or output.strip()[-SHOWN:]


def _waited(process: subprocess.Popen[bytes], url: str) -> str | None:
    """Nothing once it answers, else why it does not."""
    deadline = time.monotonic() + START_SECONDS
    while not _answers(url):
        if (status := process.poll()) is not None:
            return f"ended with {status} before it served at {url}"
        if time.monotonic() > deadline:
            return f"did not serve at {url} within {START_SECONDS} s"
        time.sleep(0.5)
    return None


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).is_success
    except httpx.HTTPError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: engines have workers of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
