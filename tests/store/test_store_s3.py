"""The store on S3, against a real server: faults of the network and of processes lose nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hass_core.errors import CorruptFile, StoreError
from hass_core.store import Store
from tasks.retries import is_transient
from tests.s3_server import BUCKET, WRITER, WRITER_SECRET

pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow
KEY = {"purpose": "test"}


@pytest.fixture
def store(s3_store):
    return s3_store


@pytest.fixture
def proxy(s3_proxy):
    return s3_proxy


def elsewhere(store: Store, tmp_path: Path) -> Store:
    """The same store seen from another machine: another cache."""
    return Store(store.root, cache=tmp_path / "elsewhere")


def test_a_stage_is_written_here_and_read_elsewhere(store, tmp_path):
    store.check_writable()
    folder = store.stage("demo", KEY)
    with folder.writing("part.parquet", note="n") as file:
        pq.write_table(pa.table({"x": list(range(1000))}), file.path)
        file.rows = 1000
    assert set(folder.finished()) == {"part.parquet"}
    assert folder.artifact() is None
    artifact = folder.finish({"rows": 1000})
    other = elsewhere(store, tmp_path).open(artifact)
    assert pq.read_table(other.local_path("part.parquet")).num_rows == 1000
    with other.open("part.parquet") as file:
        assert pq.ParquetFile(file).metadata.num_rows == 1000
    assert other.record("part.parquet").notes == {"note": "n"}
    assert not folder.scratch_path.exists()


def test_a_single_500_is_ridden_out(store, proxy):
    folder = store.stage("demo", KEY)
    proxy.fail("500", after_requests=1, times=1)
    folder.write_text("a.txt", "text")
    assert folder.read_text("a.txt") == "text"
    assert proxy.faults == 0


@pytest.mark.parametrize("mode", ["500", "silent"])
@pytest.mark.parametrize("after_requests", [0, 1, 2])
def test_a_failing_server_is_named_and_a_rerun_finishes_the_rest(store, proxy, mode, after_requests):
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "first")
    proxy.fail(mode, after_requests)
    with pytest.raises(StoreError, match=r"cannot (write to|read from) the store s3://drafts.*AWS_ENDPOINT_URL"):
        folder.write_text("b.txt", "second")
    proxy.mode = "pass"
    again = store.stage("demo", KEY)
    assert "a.txt" in again.finished()
    assert "b.txt" not in again.finished()
    again.write_text("b.txt", "second")
    again.finish({})
    assert again.read_text("a.txt") + again.read_text("b.txt") == "firstsecond"


def test_a_server_that_is_silent_is_told_soon(store, proxy, monkeypatch, tmp_path):
    monkeypatch.delitem(fsspec.config.conf, "s3")  # the short patience of the other tests
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    monkeypatch.setattr("hass_core.store.store.PROBE_SECONDS", 2.0)
    type(store.fs).clear_instance_cache()
    patient = Store(f"{store.root}/patient", cache=tmp_path / "patient")
    assert patient.fs.config_kwargs["read_timeout"] <= 30
    patient.check_writable()
    proxy.fail("silent")
    began = time.monotonic()
    with pytest.raises(
        StoreError, match=r"cannot write to the store .*: it does not answer; check the address"
    ) as told:
        patient.check_writable()
    assert time.monotonic() - began < 20
    assert is_transient(told.value), "so the task is tried again, and says so"
    type(store.fs).clear_instance_cache()


def test_an_exception_inside_writing_leaves_no_object(store):
    def half_then_fail():
        with store.stage("demo", KEY).writing("part.parquet") as file:
            writer = pq.ParquetWriter(file.path, pa.schema([("x", pa.int64())]))
            writer.write_table(pa.table({"x": [1]}))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_then_fail()
    assert store.fs.find(store.root) == []


UPLOADER = """
import os, sys
from pathlib import Path
import fsspec
from hass_core.store import Store
folder = Store(sys.argv[1], cache=Path(sys.argv[2])).stage("demo", {"purpose": "test"})
with folder.writing("a.txt") as file:
    file.path.write_text("complete")
put = folder.store.fs.put_file
def stopped(source, path, **options):  # holds before the record
    if "_records" in path:
        print("between", flush=True)
        sys.stdin.read()
    put(source, path, **options)
folder.store.fs.put_file = stopped
with folder.writing("b.txt") as file:
    file.path.write_text("half known")
"""


def test_a_kill_between_a_file_and_its_record_leaves_the_file_unlisted(store):
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, store.root, str(store.cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "between\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = store.stage("demo", KEY)
    assert set(folder.finished()) == {"a.txt"}
    assert not list(folder.scratch_path.glob("writing-*"))
    folder.write_text("b.txt", "whole")
    folder.finish({})
    assert folder.read_text("b.txt") == "whole"


def test_a_writer_overtaken_between_file_and_record_goes_again(store, tmp_path):
    mine, other = store.stage("demo", KEY), elsewhere(store, tmp_path).stage("demo", KEY)
    put_text = mine._put_text

    def overtaken(*arguments: object) -> None:
        mine._put_text = put_text
        other.write_text("part", "theirs, longer")
        put_text(*arguments)

    mine._put_text = overtaken
    mine.write_text("part", "mine")
    assert elsewhere(store, tmp_path).stage("demo", KEY).read_text("part") == "mine"


def test_an_altered_or_missing_object_is_named(store, tmp_path):
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "text")
    store.fs.pipe_file(f"{folder.url}/a.txt", b"tixt")
    with pytest.raises(CorruptFile, match=r"a\.txt: the checksum differs"):
        folder.local_path("a.txt")
    store.fs.rm_file(f"{folder.url}/a.txt")
    with pytest.raises(CorruptFile, match=r"a\.txt: missing"):
        folder.local_path("a.txt")
    assert not [path for path in store.files.folder.rglob("*") if path.is_file()]


def test_local_copies_stay_within_the_bound_and_the_least_used_go(store):
    folder = store.stage("demo", KEY)
    for name in "abcd":
        with folder.writing(name) as file:
            file.path.write_bytes(os.urandom(400_000))
    for name in "ababcad":
        folder.local_path(name)
    kept = {path.name for path in store.files.folder.rglob("*") if path.is_file()}
    assert kept == {"a", "d"}


def test_a_copy_damaged_on_disk_is_fetched_again(store):
    folder = store.stage("demo", KEY)
    folder.write_text("a.txt", "text")
    path = folder.local_path("a.txt")
    path.write_text("tixt")
    assert Store(store.root, cache=store.cache).stage("demo", KEY).read_text("a.txt") == "text"


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_ENDPOINT_URL", "http://[::1]:9")]
)
def test_wrong_credentials_and_a_wrong_address_are_told(store, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    type(store.fs).clear_instance_cache()
    wrong = Store(f"s3://{BUCKET}/y", cache=store.cache)
    type(store.fs).clear_instance_cache()
    with pytest.raises(StoreError, match=r"cannot write to the store s3://drafts/y: .*credentials and AWS_ENDPOINT"):
        wrong.check_writable()


def test_a_key_that_may_only_write_is_told_before_any_work(store, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", WRITER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRITER_SECRET)
    type(store.fs).clear_instance_cache()
    refused = Store(f"s3://{BUCKET}/z", cache=store.cache)
    type(store.fs).clear_instance_cache()
    with pytest.raises(StoreError, match=r"cannot read from the store s3://drafts/z: .*credentials and AWS_ENDPOINT"):
        refused.check_writable()
    left = [path for path in store.fs.find(f"{BUCKET}/z") if ".probe" in path]
    assert left == [], "and what was written to try it is removed"


def test_files_of_one_stage_are_uploaded_at_the_same_time(store):
    together, put = threading.Barrier(6), store.fs.put_file

    def put_file(source: str, path: str, **options: object) -> None:
        if "_records" not in path:
            together.wait(timeout=60)  # passes only when six uploads are under way
        put(source, path, **options)

    store.fs.put_file = put_file
    folder = store.stage("demo", KEY)
    try:
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(lambda i: folder.write_text(f"part-{i}", f"{i}"), range(6)))
    finally:
        del store.fs.put_file
    folder.finish({})
    assert [folder.read_text(f"part-{i}") for i in range(6)] == list("012345")


def test_a_stage_is_not_finished_while_a_file_is_put_in_place(store):
    folder, order, put = store.stage("demo", KEY), [], store.fs.put_file
    folder.write_text("a", "a")
    begun = threading.Event()

    def put_file(source: str, path: str, **options: object) -> None:
        if path.endswith("/b"):
            begun.set()
            time.sleep(1)
        order.append(path.rpartition("/")[2])
        put(source, path, **options)

    store.fs.put_file = put_file
    try:
        with ThreadPoolExecutor(2) as threads:
            writing = threads.submit(folder.write_text, "b", "b")
            begun.wait()
            threads.submit(folder.finish, {}).result()
            writing.result()
    finally:
        del store.fs.put_file
    assert order == ["b", "b.json", "manifest.json"]


def test_a_large_file_goes_up_in_parts_and_keeps_its_checksum(store, tmp_path, monkeypatch):
    patient = {"config_kwargs": {"read_timeout": 60}, "use_listings_cache": False}
    monkeypatch.setitem(fsspec.config.conf, "s3", patient)  # twelve megabytes take more than a second here
    store = elsewhere(store, tmp_path)
    monkeypatch.setattr("hass_core.store.store.PART_BYTES", 5 << 20)
    folder, parts = store.stage("demo", KEY), []
    call = type(store.fs)._call_s3

    async def counted(fs: object, method: str, *arguments: object, **options: object) -> object:
        parts.append(method)
        return await call(fs, method, *arguments, **options)

    monkeypatch.setattr(type(store.fs), "_call_s3", counted)
    data = os.urandom(12 << 20)
    with folder.writing("large") as file:
        file.path.write_bytes(data)
    assert parts.count("upload_part") == 3
    assert folder.local_path("large").read_bytes() == data


def test_records_of_many_files_are_read_in_one_call_the_next_time(store, monkeypatch):
    monkeypatch.setattr("hass_core.store.records.ROLLED_UP", 8)
    folder = store.stage("demo", KEY)
    for i in range(8):
        folder.write_text(f"part-{i}", f"{i}")
    first, read = folder.finished(), []
    cat = store.fs.cat
    monkeypatch.setattr(store.fs, "cat", lambda paths, **options: read.extend(paths) or cat(paths, **options))
    assert folder.finished() == first
    assert read == []
    folder.write_text("part-3", "changed")
    assert folder.finished()["part-3"].bytes == len("changed")
    assert [path.rpartition("/")[2] for path in read] == ["part-3.json"]
    store.fs.pipe_file(f"{folder.url}/_records.json", b"{broken")
    assert len(folder.finished()) == 8


def test_what_a_finished_stage_lacks_is_told_by_a_listing(store):
    folder = store.stage("demo", KEY)
    for name in "abc":
        folder.write_text(name, "text")
    folder.finish({})
    assert folder.problems() == []
    store.fs.rm_file(f"{folder.url}/a")
    store.fs.pipe_file(f"{folder.url}/b", b"longer text")
    assert folder.problems() == ["a is missing", "b has 11 bytes instead of 4"]
