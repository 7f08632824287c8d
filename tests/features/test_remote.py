"""Features in an S3 store: row groups come by range, are kept, and are checked."""

import threading
import time
from pathlib import Path

import pytest
import torch

from hass_core.bench.feature_store import bench_store
from hass_core.errors import BadInput, CorruptFile, StoreError
from hass_core.features import remote
from hass_core.features.reader import FeatureDataset
from hass_core.features.schema import FeatureInfo
from hass_core.features.writer import FeatureWriter
from hass_core.store import Artifact, Store

pytestmark = pytest.mark.slow
ROWS, TOKENS, HIDDEN = 40, 150, 256  # four or five row groups of a megabyte in each of two shards


@pytest.fixture
def artifact(s3_store: Store) -> Artifact:
    info = FeatureInfo(hidden_size=HIDDEN, encoding="bf16", target_identity="t")
    folder = s3_store.stage("features", {"remote": 1})
    for part in range(2):
        with folder.writing(f"part-{part:05d}.parquet") as file, FeatureWriter(file.path, info, 1) as writer:
            for i in range(ROWS * part, ROWS * (part + 1)):
                features = torch.full((TOKENS, HIDDEN), float(i))
                writer.add(f"c{i}", "train", list(range(TOKENS)), [1] * TOKENS, features)
    return folder.finish({})


def other_machine(store: Store, tmp_path: Path, gigabytes: float = 1.0) -> Store:
    return Store(store.root, cache=tmp_path / "elsewhere", cache_gb=gigabytes)


def copies(store: Store) -> list[Path]:
    return sorted(path for path in store.files.folder.rglob("*.arrow"))


def wait_for_copies(store: Store, count: int) -> None:
    """They are written behind."""
    deadline = time.monotonic() + 20
    while len(copies(store)) < count:
        assert time.monotonic() < deadline, copies(store)
        time.sleep(0.01)


def test_rows_are_those_that_were_written_and_only_their_row_groups_come(s3_store, artifact, tmp_path):
    store = other_machine(s3_store, tmp_path)
    dataset = FeatureDataset(store, artifact)
    assert int(dataset[ROWS].features[0, 0]) == ROWS
    wait_for_copies(store, 1)
    for i in torch.randperm(2 * ROWS).tolist():
        conversation = dataset[i]
        assert conversation.id == f"c{i}"
        assert conversation.token_ids.tolist() == list(range(TOKENS))
        assert (conversation.features == float(i)).all()
    assert list(store.files.folder.rglob("*.parquet")) == []


def test_copies_of_an_earlier_process_are_used_where_they_are_whole(s3_store, s3_proxy, artifact, tmp_path):
    store = other_machine(s3_store, tmp_path)
    dataset = FeatureDataset(store, artifact)
    for i, first in enumerate(dataset.blocks):
        dataset.warm([first])
        wait_for_copies(store, i + 1)
    again = FeatureDataset(store, artifact, cache_bytes=1)
    s3_proxy.fail("500")
    assert all((again[i].features == float(i)).all() for i in range(2 * ROWS))
    short = copies(store)[0]
    short.write_bytes(short.read_bytes()[:-5000])
    with pytest.raises(StoreError, match="cannot read from the store"):
        again[0]
    s3_proxy.mode = "pass"
    assert (again[0].features == 0.0).all()


def test_a_damaged_copy_is_found_and_forgotten(s3_store, artifact, tmp_path):
    store = other_machine(s3_store, tmp_path)
    FeatureDataset(store, artifact).warm([0])
    wait_for_copies(store, 1)
    (copy,) = copies(store)
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    rows = range(int(FeatureDataset(store, artifact).blocks[1]))
    with pytest.raises(CorruptFile, match="the checksum of the features differs"):
        [FeatureDataset(store, artifact)[i] for i in rows]
    again = FeatureDataset(store, artifact)
    assert all((again[i].features == float(i)).all() for i in rows)


def test_copies_stay_within_the_caches_bound_and_a_slow_disk_holds_nothing_up(
    s3_store, artifact, tmp_path, monkeypatch
):
    store = other_machine(s3_store, tmp_path, gigabytes=0.004)
    dataset = FeatureDataset(store, artifact, cache_bytes=1)
    for _ in range(2):
        for first in dataset.blocks:
            dataset.warm([first])
            time.sleep(0.05)
    wait_for_copies(store, 2)
    assert sum(path.stat().st_size for path in copies(store)) <= 4e6
    stopped, write = threading.Event(), remote._write
    monkeypatch.setattr(remote, "_write", lambda *given: stopped.wait(60) and write(*given))
    other = FeatureDataset(other_machine(s3_store, tmp_path / "slow"), artifact, cache_bytes=1)
    assert all((other[i].features == float(i)).all() for i in range(2 * ROWS))
    stopped.set()


def test_a_server_that_fails_is_named_and_the_data_comes_when_it_is_back(s3_store, s3_proxy, artifact, tmp_path):
    dataset = FeatureDataset(other_machine(s3_store, tmp_path), artifact)
    s3_proxy.fail("500")
    with pytest.raises(StoreError, match=r"cannot read from the store s3://"):
        dataset[0]
    s3_proxy.mode = "pass"
    assert (dataset[0].features == 0.0).all()


def test_a_missing_and_an_altered_object_are_named(s3_store, artifact, tmp_path):
    dataset = FeatureDataset(other_machine(s3_store, tmp_path), artifact)
    name = f"{s3_store.open(artifact).url}/part-00001.parquet"
    content = bytearray(s3_store.fs.cat_file(name))
    content[len(content) // 3] ^= 1
    s3_store.fs.pipe_file(name, bytes(content))
    with pytest.raises(CorruptFile, match=r"part-00001\.parquet, row group \d, row \d+ \(c\d+\): the checksum"):
        [dataset[i] for i in range(ROWS, 2 * ROWS)]
    fresh = FeatureDataset(other_machine(s3_store, tmp_path / "third"), artifact)
    s3_store.fs.rm_file(name)
    with pytest.raises(CorruptFile, match=r"part-00001\.parquet: missing"):
        fresh[ROWS]


def test_the_benchmark_reads_what_it_wrote_and_leaves_nothing(s3_store):
    speed = bench_store(s3_store.root, hidden_size=64, gigabytes=0.02)
    assert speed.gigabytes == pytest.approx(0.02, rel=0.05)
    assert min(speed.write_gb_per_second, speed.link_gb_per_second, speed.read_gb_per_second) > 0
    s3_store.fs.invalidate_cache()
    left = s3_store.fs.find(s3_store.root.removeprefix("s3://"))  # this server shows the empty folder above it
    assert [path for path in left if "/hass-bench-" in path] == []


def test_the_benchmark_of_a_store_elsewhere_refuses_this_disk(tmp_path):
    with pytest.raises(BadInput, match="--folder"):
        bench_store(str(tmp_path))
