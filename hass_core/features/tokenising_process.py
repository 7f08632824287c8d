"""A process that tokenises parts of the responses.

It loads the tokenizer, and neither torch nor the program that started it, which takes it a second; processes made by
multiprocessing import the starter's main module too. It is given the tokenizer's folder and the settings, reads names
and paths of parts from its input, a line of JSON each, and writes a byte when it is ready, then tokenised parts, each
behind its length, until its input ends, which it does with the parent's life.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from transformers import PreTrainedTokenizerFast

from hass_core.config import FeaturesConfig
from hass_core.features.tokenised import Part, encode_part

READY, LENGTH_BYTES = b"+", 8
# some versions of transformers import torch for any tokenizer, which takes seconds, unless it is not to be had
START = f"import sys; sys.modules['torch'] = None; from {__name__} import main; main()"

log = logging.getLogger(__name__)


class TokenisingProcess:
    """The parent's side; used by one thread at a time. Leaving the context ends the process."""

    def __init__(self, folder: str, settings: FeaturesConfig):
        self.alive, self._ready = True, False
        command = [sys.executable, "-c", START, folder, settings.model_dump_json()]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables
        )
        self._requests, self._answers = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)

    @property
    def pid(self) -> int:
        """The system's number of the process."""
        return self._process.pid

    def ready(self) -> bool:
        """Whether it would begin a part at once. Starting takes a second or, on a busy machine, several."""
        return self._ready or bool(select.select([self._answers], [], [], 0)[0])

    def encode(self, name: str, path: Path) -> Part | None:
        """The part, or None where this process can't. Waits until it is ready."""
        try:
            if not self._ready:
                self._ready = self._read(len(READY)) == READY
            self._requests.write(json.dumps([name, str(path)]).encode() + b"\n")
            self._requests.flush()
            length = int.from_bytes(self._read(LENGTH_BYTES), "little")
            return Part.from_bytes(name, self._read(length)) if length else None
        except (OSError, EOFError):
            self.alive = False
            log.warning("a process that tokenised has ended with status %s; a thread goes on", self._process.poll())
            return None

    def _read(self, count: int) -> bytes:
        data = self._answers.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def __enter__(self) -> "TokenisingProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # it holds nothing that could be lost
        for pipe in (self._requests, self._answers):
            with suppress(OSError):  # a request may still wait to be sent
                pipe.close()
        self._process.wait()


def main() -> None:
    """Answer the parent until it closes the input or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what others print is no answer
    # by its file as it is: a model's own class may build the cutting anew
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
    settings = FeaturesConfig.model_validate_json(sys.argv[2])
    answers.write(READY)
    answers.flush()
    for request in requests:
        name, path = json.loads(request)
        try:
            data = encode_part(name, Path(path), tokenizer, settings).to_bytes()
        except Exception:
            data = b""  # the parent tries it too and meets the error
        answers.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        answers.flush()
