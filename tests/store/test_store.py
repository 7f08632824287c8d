"""The store under faults: nothing lost, nothing half-visible, and the message names the place."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hass_core.errors import CorruptFile, StoreError
from hass_core.store import Artifact, FileRecord, StageFolder, Store, digest_of
from hass_core.store.artifacts import Manifest
from hass_core.store.housekeeping import entries

KEY = {"purpose": "test"}

WRITER = """
import os, sys, time
from pathlib import Path
from hass_core.store import Store
folder = Store(sys.argv[1], cache=Path(sys.argv[2])).stage("demo", {"purpose": "test"})
with folder.writing("a.txt") as file:
    file.path.write_text("complete")
with folder.writing("b.txt") as file:
    file.path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def visible(store: Store) -> set[str]:
    """Files a reader finds, scratch left out."""
    root = Path(store.root)
    return {path.name for path in root.rglob("*") if path.is_file() and "scratch" not in path.parts}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_finished_stage_is_found_again_with_its_files_and_summary(store):
    folder = store.stage("demo", KEY)
    assert folder.artifact() is None
    with folder.writing("part.txt", source="here") as file:
        file.path.write_text("content")
        file.rows = 7
    artifact = folder.finish({"conversations": 7})
    again = Store(store.root).stage("demo", dict(KEY))
    assert again.artifact() == artifact
    assert artifact.summary == {"conversations": 7}
    assert again.read_text("part.txt") == "content"
    assert (again.record("part.txt").rows, again.record("part.txt").notes) == (7, {"source": "here"})
    assert not (Path(store.root) / "demo" / artifact.digest / "scratch").exists()


def test_kill_in_the_middle_of_writing_loses_only_the_unfinished_file(store):
    process = start(WRITER, store.root, store.cache)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    scratch = store.stage("demo", KEY).scratch()
    assert len(list(scratch.glob("writing-*/b.txt"))) == 1, "a living process keeps its folder"
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = store.stage("demo", KEY)
    assert set(folder.finished()) == {"a.txt"}
    assert "b.txt" not in visible(store)
    assert not list(scratch.glob("writing-*")), "what the killed process left is removed"
    folder.write_text("b.txt", "whole")
    assert set(folder.finish({}).model_dump()) == set(Artifact.model_fields)
    assert folder.read_text("a.txt") + folder.read_text("b.txt") == "completewhole"


def test_an_exception_inside_writing_publishes_nothing(store):
    folder = store.stage("demo", KEY)

    def half_then_fail():
        with folder.writing("a.txt") as file:
            file.path.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_then_fail()
    assert folder.finished() == {}
    assert visible(store) == set()
    assert not list(folder.scratch().iterdir())


def test_a_network_error_inside_writing_is_not_blamed_on_the_store(store):
    with pytest.raises(ConnectionError, match="the engine"), store.stage("demo", KEY).writing("a.txt"):
        raise ConnectionError("the engine is gone")


def test_a_disk_filling_up_is_named_and_the_finished_files_stay(small_disk, tmp_path):
    store = Store(small_disk / "store", cache=tmp_path / "cache")
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "complete")
    with pytest.raises(StoreError, match=r"the disk of .*small.* is full; free space"), folder.writing("b") as file:
        file.path.write_bytes(os.urandom(2 << 20))
    assert set(folder.finished()) == {"a.txt"}
    folder.write_text("b", "fits, since the half file is gone")
    assert set(folder.finished()) == {"a.txt", "b"}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: pq.write_table(pa.table({"x": os.urandom(3 << 20).hex().split("0")}), path),
        lambda path: save_file({"w": torch.zeros(1 << 20)}, path),
    ],
    ids=["parquet", "safetensors"],
)
def test_every_writer_names_a_full_disk(small_disk, tmp_path, write):
    folder = Store(small_disk / "store", cache=tmp_path / "cache").stage("demo", KEY)
    with pytest.raises(StoreError, match="is full"), folder.writing("x") as file:
        write(file.path)


def test_a_store_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match=r"cannot write to the store .*file/store.*check the path"):
        store.check_writable()
    with pytest.raises(StoreError, match="cannot write to the store"):
        store.stage("demo", KEY).write_text("a.txt", "text")


def test_a_read_only_store_can_be_read_but_not_written(small_disk, tmp_path):
    store = Store(small_disk / "store", cache=tmp_path / "cache")
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "text")
    artifact = folder.finish({})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert store.open(artifact).read_text("a.txt") == "text"
    assert store.stage("demo", KEY).artifact() == artifact
    with pytest.raises(StoreError, match="Read-only file system"):
        store.check_writable()
    with pytest.raises(StoreError, match="Read-only file system"):
        store.stage("demo", {"other": 1}).write_text("a.txt", "text")


@pytest.mark.parametrize(("damaged", "what"), [(b"tex", "missing or truncated"), (b"tixt", "the checksum differs")])
def test_a_damaged_file_is_named(store, damaged, what):
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "text")
    (Path(store.root) / "demo" / folder.digest / "a.txt").write_bytes(damaged)
    with pytest.raises(CorruptFile, match=rf"demo/{folder.digest}/a\.txt: {what}; remove .* run the stage 'demo'"):
        folder.local_path("a.txt")


def test_a_missing_or_truncated_file_of_an_unfinished_stage_is_written_again(store):
    folder = store.stage("demo", KEY)
    for name in ("a.txt", "b.txt", "c.txt"):
        folder.write_text(name, "text")
    base = Path(store.root) / "demo" / folder.digest
    (base / "a.txt").unlink()
    (base / "b.txt").write_text("t")
    assert set(folder.finished()) == {"c.txt"}


@pytest.mark.parametrize("place", ["manifest.json", "_records/a.txt.json"])
def test_a_broken_record_is_named(store, place):
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "text")
    if place == "manifest.json":  # which then holds the records, too
        folder.finish({})
    (Path(store.root) / "demo" / folder.digest / place).write_text("{")
    with pytest.raises(CorruptFile, match=place):
        store.stage("demo", KEY).artifact() or store.stage("demo", KEY).local_path("a.txt")


def test_a_finished_stage_is_not_taken_for_done_without_its_files(store):
    folder = store.stage("draft", {"n": 1})
    folder.write_text("model.safetensors", "weights")
    artifact = folder.finish({})
    assert folder.artifact() == artifact
    path = Path(artifact.url) / "model.safetensors"
    path.write_text("weigh")
    with pytest.raises(CorruptFile, match=r"model\.safetensors: missing or truncated; remove .* 'draft' again"):
        folder.artifact()
    path.unlink()
    with pytest.raises(CorruptFile, match="missing or truncated"):
        store.artifact("draft", artifact.digest)


def test_a_copied_folder_is_not_taken_for_another_stage(store):
    folder = store.stage("draft", {"n": 1})
    folder.write_text("model.safetensors", "weights")
    other = store.stage("draft", {"n": 2})
    shutil.copytree(folder.finish({}).url, other.url)
    with pytest.raises(CorruptFile, match=rf"manifest\.json: of draft/{folder.digest}: a copied folder"):
        other.artifact()


def test_removing_a_stage_is_told_when_it_is_opened(store):
    with pytest.raises(StoreError, match=r"demo/0123 has no manifest\.json: the stage was removed"):
        store.open(Artifact(stage="demo", digest="0123", root=store.root))
    with pytest.raises(StoreError, match=r"holds no file b\.txt; run the stage 'demo' again"):
        store.stage("demo", KEY).record("b.txt")


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/", "..", ".", "", "a\\b", "x/", "_records", "manifest.json", "scratch", "a\0", "a\n"]
)
def test_names_that_leave_the_folder_or_collide_are_refused(store, name):
    with pytest.raises(StoreError, match="is not a plain file name"), store.stage("demo", KEY).writing(name):
        raise AssertionError("must not be reached")


def test_the_digest_depends_on_content_and_not_on_order_or_process(store):
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1}) == "8baa73198470c7bb"
    assert len({digest_of(v) for v in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": [1]}, {"b": 1})}) == 5
    assert store.stage("demo", KEY).digest != store.stage("other", KEY).digest


RACER = """
import os, random, sys, time
from pathlib import Path
from hass_core.store import StageFolder, Store

put = StageFolder._put

def slow_put(self, *arguments, **options):  # widens the gap between a file and its record
    time.sleep(random.random() / 200)
    put(self, *arguments, **options)

StageFolder._put = slow_put
folder = Store(sys.argv[1], cache=Path(sys.argv[2])).stage("demo", {"purpose": "test"})
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    with folder.writing(f"part-{i % 4}") as file:
        file.path.write_bytes(os.urandom(1000 + ord(os.urandom(1))))
"""


def test_two_processes_writing_the_same_files_leave_each_file_with_its_record(store):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, store.root, str(store.cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert [racer.wait(60) for racer in racers] == [0, 0]
    folder = store.stage("demo", KEY)
    assert set(folder.finished()) == {f"part-{i}" for i in range(4)}
    for name in folder.finished():
        folder.local_path(name)
    folder.finish({})
    assert not folder.scratch_path.exists()


def test_a_slow_worker_neither_changes_nor_breaks_a_stage_that_another_has_finished(store):
    slow = store.stage("demo", KEY)
    with slow.writing("a.txt") as file:
        fast = store.stage("demo", KEY)
        fast.write_text("a.txt", "first")
        first = fast.finish({"by": "fast"})
        file.path.write_text("second")
    assert slow.finish({"by": "slow"}) == first
    assert slow.read_text("a.txt") == "first"
    assert json.loads((Path(store.root) / "demo" / first.digest / "manifest.json").read_text())["summary"] == {
        "by": "fast"
    }


def test_threads_can_write_at_once(store):
    folder = store.stage("demo", KEY)

    def write(i: int) -> None:
        with folder.writing(f"part-{i}") as file:
            time.sleep(0.05)
            file.path.write_text(str(i))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [folder.read_text(f"part-{i}") for i in range(8)] == [str(i) for i in range(8)]


def test_a_removed_file_is_gone_with_its_record(store):
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "text")
    folder.remove("a.txt")
    folder.remove("a.txt")
    assert folder.finished() == {}
    assert visible(store) == set()


def test_free_space_is_that_of_the_disk(small_disk):
    assert 0 < (Store(small_disk / "not" / "there").free_bytes() or 0) <= 1 << 20


def test_many_threads_may_ask_at_once_whether_the_store_can_be_written(store):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: store.check_writable(), range(200)))
    assert not list(Path(store.root).iterdir())


def test_a_store_of_ten_terabytes_is_listed_checked_and_continued_without_reading_it(tmp_path):
    """Files without content, of the sizes that features of a 70B target have: 6,700 of 1.5 GB."""
    store = Store(tmp_path / "store")
    for digest, files, finished in (("a" * 16, 6_000, True), ("b" * 16, 700, False)):
        base = Path(store.root) / "features" / digest
        (base / "_records").mkdir(parents=True)
        records = [
            FileRecord(name=f"part-{i:05d}.parquet", bytes=1_500_000_000, sha256="0" * 64, rows=512)
            for i in range(files)
        ]
        for record in records:
            with (base / record.name).open("wb") as file:
                file.truncate(record.bytes)
            (base / "_records" / f"{record.name}.json").write_text(record.model_dump_json())
        if finished:
            named = {record.name: record for record in records}
            manifest = Manifest(stage="features", digest=digest, key={"responses": "c" * 16}, files=named)
            (base / "manifest.json").write_text(manifest.model_dump_json())
    whole, begun = sorted(entries(store, ["features"]), key=lambda entry: entry.digest)
    assert (whole.bytes + begun.bytes) // 10**12 == 10
    assert (whole.finished, begun.finished) == (True, False)
    done = store.open(Artifact(stage="features", digest="a" * 16, root=store.root))
    assert done.problems() == []
    assert len(StageFolder(store, "features", "b" * 16, {}).finished()) == 700
