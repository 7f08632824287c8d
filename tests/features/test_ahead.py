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
from hass_core.features import ahead
from hass_core.features.ahead import tokenising
from hass_core.features.tokenised import Part
from hass_core.features.tokenising_process import START, TokenisingProcess
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
    monkeypatch.setattr(ahead, "MANY_CONVERSATIONS", 1)
    monkeypatch.setattr(ahead, "CORES_FOR_OTHERS", 0)
    monkeypatch.setattr(ahead, "CORES_PER_PROCESS", 1)
    monkeypatch.setattr(ahead, "MOST_PROCESSES", 2)
    monkeypatch.setattr(TokenisingProcess, "ready", lambda process: True)  # to be waited for


def test_until_the_processes_are_up_parts_are_tokenised_here(parts, two_processes, monkeypatch):
    monkeypatch.setattr(TokenisingProcess, "ready", lambda process: False)
    monkeypatch.setattr(TokenisingProcess, "encode", unasked)
    assert [part.name for part in parts()] == NAMES


@pytest.mark.timeout(60)
def test_a_process_says_when_it_is_ready(tmp_path, config):
    byte_tokenizer().save_pretrained(tmp_path)
    with TokenisingProcess(str(tmp_path), config.features) as process:
        while not process.ready():
            time.sleep(0.05)
        assert process.encode("part", tmp_path / "nowhere") is None
        assert process.alive


def unasked(*arguments, **settings):
    raise AssertionError("not to be asked")


def listed(parts: list[Part]) -> list:
    return [
        (part.name, [(c.id, c.split, c.token_ids.tolist(), c.loss_mask.tolist()) for c in part.conversations])
        for part in parts
    ]


@pytest.mark.timeout(180)
def test_parts_tokenised_by_other_processes_are_the_same(parts, two_processes, monkeypatch):
    monkeypatch.setattr(ahead, "MANY_CONVERSATIONS", 100)
    by_thread = parts()
    monkeypatch.setattr(ahead, "MANY_CONVERSATIONS", 1)
    monkeypatch.setattr(ahead, "encode_part", unasked)
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
    original = TokenisingProcess.encode

    def killed(process, name, path):
        if name == NAMES[1]:
            os.kill(process.pid, signal.SIGKILL)
        return original(process, name, path)

    monkeypatch.setattr(TokenisingProcess, "encode", killed)
    made = parts()
    assert [part.name for part in made] == NAMES
    assert sum(len(part.conversations) for part in made) == 30
    assert caplog.text.count("a process that tokenised has ended") == 1


PARENT = """
import sys, time
from hass_core.config import FeaturesConfig
from hass_core.features.tokenising_process import TokenisingProcess

with TokenisingProcess(sys.argv[1], FeaturesConfig()) as one, TokenisingProcess(sys.argv[1], FeaturesConfig()) as two:
    one.encode("part", "nowhere"), two.encode("part", "nowhere")
    print(one.pid, two.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.timeout(180)
def test_processes_end_when_their_parent_is_killed(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    script = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    waited = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < waited
        time.sleep(0.1)


@pytest.mark.timeout(60)
def test_a_process_loads_no_torch_whatever_asks_for_it():
    asking = START.replace("main()", "import torch")
    ran = subprocess.run([sys.executable, "-c", asking], capture_output=True, text=True, check=False)
    assert "import of torch halted" in ran.stderr


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
