"""Parts tokenised by other processes, which end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from hass_core.errors import CorruptFile
from hass_core.features import tokenise
from hass_core.features.tokenise import Part, tokenising
from tests.conftest import byte_tokenizer
from tests.features.conftest import conversation, responses_artifact

NAMES = [f"part-{i:05d}.parquet" for i in range(4)]


@pytest.fixture
def source(store, rows):
    unanswered = conversation("unanswered", answer=" ")
    return store.open(responses_artifact(store, [*rows, unanswered], parts=4))


@pytest.fixture
def parts(source, tiny_target, config):
    def made() -> list[Part]:
        with tokenising(tiny_target.tokenizer, config.features, 31) as parts_of:
            return list(parts_of(NAMES, source.local_path))

    return made


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(tokenise, "MANY_CONVERSATIONS", 1)
    monkeypatch.setattr(tokenise, "spare_processes", lambda tokenizer: 2)
    monkeypatch.setattr(tokenise._Elsewhere, "up", lambda elsewhere: True)  # to be waited for


def test_until_the_processes_are_up_parts_are_tokenised_here(parts, two_processes, monkeypatch):
    monkeypatch.setattr(tokenise._Elsewhere, "up", lambda elsewhere: False)
    monkeypatch.setattr(tokenise, "_encode", unasked)
    assert [part.name for part in parts()] == NAMES


def unasked(*arguments, **settings):
    raise AssertionError("not to be asked")


def listed(parts: list[Part]) -> list:
    return [
        (part.name, [(c.id, c.split, c.token_ids.tolist(), c.loss_mask.tolist()) for c in part.conversations])
        for part in parts
    ]


@pytest.mark.timeout(180)
def test_parts_tokenised_by_other_processes_are_the_same(parts, two_processes, monkeypatch):
    monkeypatch.setattr(tokenise, "MANY_CONVERSATIONS", 100)
    by_thread = parts()
    monkeypatch.setattr(tokenise, "MANY_CONVERSATIONS", 1)
    monkeypatch.setattr(tokenise, "encode_part", unasked)  # here; the processes have their own
    by_processes = parts()
    assert listed(by_processes) == listed(by_thread)
    assert [part.name for part in by_thread] == NAMES
    skipped = [part.skipped for part in by_processes]
    assert skipped == [part.skipped for part in by_thread]
    assert skipped[-1] == [("unanswered", "empty answer")]


@pytest.mark.timeout(180)
def test_a_part_that_cannot_be_read_is_an_error_here(parts, source, two_processes):
    source.local_path(NAMES[2]).write_bytes(b"not Parquet")
    with pytest.raises((CorruptFile, pa.ArrowInvalid)):
        parts()


@pytest.mark.timeout(180)
def test_processes_that_are_killed_leave_their_work_to_a_thread(parts, two_processes, monkeypatch, caplog):
    monkeypatch.setattr(tokenise, "_encode", kill_own_process)
    made = parts()
    assert [part.name for part in made] == NAMES
    assert sum(len(part.conversations) for part in made) == 30
    assert "a process could not tokenise" in caplog.text


def kill_own_process(name: str, path: Path) -> Part:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


PARENT = """
import sys, time
import os
from transformers import PreTrainedTokenizerFast
from hass_core.config import FeaturesConfig
from hass_core.data.processes import tokenizer_processes
from hass_core.features.tokenise import _begin

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
with tokenizer_processes(1, tokenizer, _begin, FeaturesConfig()) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


@pytest.mark.timeout(180)
def test_processes_end_when_their_parent_is_killed(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    script = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.kill()
    waited = time.monotonic() + 30
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < waited
        time.sleep(0.1)


def test_a_process_loads_no_torch():
    loaded = "import sys, hass_core.features.tokenise; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", loaded], check=True)


@pytest.mark.timeout(60)
def test_parts_are_begun_before_they_are_asked_for_and_dropped_when_they_are_not(source, tiny_target, config):
    fetched = []

    def fetch(name):
        fetched.append(name)
        return source.local_path(name)

    with tokenising(tiny_target.tokenizer, config.features, 31) as parts_of:
        parts_of(NAMES, fetch)
        while not fetched:
            time.sleep(0.01)
    assert fetched == NAMES[:1]
