"""Processes with a tokenizer are started side by side, whatever they are given."""

import time
from pathlib import Path

import pytest

from hass_core.data.processes import tokenizer_processes
from tests.conftest import byte_tokenizer


class Waits:
    """Is not there, in another process, before `sign` is; a megabyte lies behind it."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return arrive, (str(self.sign),)


def arrive(sign: str) -> str:
    while not Path(sign).exists():
        time.sleep(0.01)
    return sign


def begin(tokenizer: object, waited: str, much: bytes) -> None:
    global ready
    ready = (waited, len(much))


def what_is_ready() -> tuple[str, int]:
    return ready


@pytest.mark.timeout(60)
def test_a_process_that_is_not_up_holds_up_nobody(tmp_path):
    sign = tmp_path / "sign"
    with tokenizer_processes(2, byte_tokenizer(), begin, Waits(sign), bytes(1 << 20)) as processes:
        asked = [processes.submit(what_is_ready) for _ in range(2)]
        sign.touch()  # only here: to ask must not have waited for them
        assert [answer.result() for answer in asked] == [(str(sign), 1 << 20)] * 2
