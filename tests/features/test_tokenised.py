"""Parts tokenised by other processes, which end with their parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from hass_core.errors import CorruptFile
from hass_core.features import tokenised
from hass_core.features.tokenised import Part, parts_ahead
from tests.features.conftest import responses_artifact


@pytest.mark.timeout(180)
def test_parts_tokenised_by_other_processes_are_the_same(tiny_target, store, config, rows, monkeypatch):
    responses = responses_artifact(store, rows, parts=4)
    source, names = store.open(responses), [f"part-{i:05d}.parquet" for i in range(4)]

    def parts() -> list[Part]:
        return list(parts_ahead(names, source.local_path, tiny_target.tokenizer, config.features, len(rows)))

    by_thread = parts()
    monkeypatch.setattr(tokenised, "MANY_CONVERSATIONS", 1)
    monkeypatch.setattr(tokenised, "CORES_PER_PROCESS", 1)
    monkeypatch.setattr(tokenised, "MOST_PROCESSES", 1)
    monkeypatch.setattr(tokenised._Started, "ready", lambda started: bool([future.result() for future in started.up]))
    monkeypatch.setattr(tokenised, "encode_part", None)  # of this process, which is not to be asked
    assert parts() == by_thread
    assert [part.name for part in by_thread] == names
    source.local_path(names[2]).write_bytes(b"not Parquet")
    with pytest.raises((CorruptFile, pa.ArrowInvalid)):
        parts()


PARENT = """
import multiprocessing, sys, time
from hass_core.features.tokenised import _started
from tests.conftest import byte_tokenizer

if __name__ == "__main__":
    with _started(2, byte_tokenizer()) as started:
        assert [future.result() for future in started.up] == [0, 0]
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


@pytest.mark.timeout(180)
def test_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=variables) as parent:
        assert parent.stdout
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert children
        parent.kill()
    waited = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < waited
        time.sleep(0.1)
