"""Extraction is stopped, doubled and cut off from its store; every conversation is stored once all the same."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hass_core.config import RunConfig
from hass_core.errors import StoreError
from hass_core.features import extract
from hass_core.features.extract import extract_features
from hass_core.features.reader import FeatureDataset, shard_names
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import freeze
from tests.conftest import byte_tokenizer, tiny_llama
from tests.features.conftest import conversation, responses_artifact
from tests.processes import start, wait

PARTS = 8


def stored_ids(store: Store, features: Artifact) -> Counter[str]:
    folder = store.open(features)
    return Counter(
        name
        for part in shard_names(folder)
        for name in pq.read_table(folder.local_path(part), columns=["id"])["id"].to_pylist()
    )


def once_each(count: int) -> Counter[str]:
    return Counter(f"c{i}" for i in range(count))


def answers(count: int):
    return [conversation(f"c{i}", answer="word " * (i % 7 + 1) + "end") for i in range(count)]


def extract_slowly(root, cache, responses: Artifact, seconds_a_batch: float) -> None:
    """In a process of its own: extract, waiting before each batch."""
    original = extract.Capture

    def slow(*arguments):
        time.sleep(seconds_a_batch)
        return original(*arguments)

    extract.Capture = slow
    target = freeze(tiny_llama(), byte_tokenizer(), name="tiny")
    extract_features(RunConfig(), responses, Store(root, cache=cache), target)


def finished_parts(store: Store, responses: Artifact, target) -> dict[str, int]:
    """Shards that are in place with their record, and when each was written."""
    folder = store.stage("features", extract._key(RunConfig(), responses, target))
    names = [name for name in folder.finished() if name.startswith("part-")]
    return {name: (Path(folder.url) / name).stat().st_mtime_ns for name in names}


def test_kill_9_inside_extraction_loses_only_the_part_under_way(tiny_target, store):
    responses = responses_artifact(store, answers(40), parts=PARTS)
    process = start(extract_slowly, store.root, store.cache, responses, 0.3)
    deadline = time.monotonic() + 120
    while len(finished_parts(store, responses, tiny_target)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = finished_parts(store, responses, tiny_target)
    assert 3 <= len(before) < PARTS
    features = extract_features(RunConfig(), responses, store, tiny_target)
    assert stored_ids(store, features) == once_each(40)
    after = finished_parts(store, responses, tiny_target)
    assert {name: after[name] for name in before} == before  # none was made twice


def test_two_processes_on_the_same_shards_store_each_conversation_once(tiny_target, store):
    responses = responses_artifact(store, answers(40), parts=PARTS)
    both = [start(extract_slowly, store.root, store.cache, responses, seconds) for seconds in (0.02, 0)]
    assert [wait(process) for process in both] == [0, 0]
    features = extract_features(RunConfig(), responses, store, tiny_target)
    assert stored_ids(store, features) == once_each(40)
    assert len(FeatureDataset(store, features)) == 40


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["500", "silent"])
def test_a_store_that_fails_in_the_middle_is_named_and_the_rerun_finishes_the_rest(
    tiny_target, s3_store, s3_proxy, mode
):
    responses = responses_artifact(s3_store, answers(24), parts=4)
    s3_proxy.fail(mode, after_requests=20)
    with pytest.raises(StoreError, match=r"cannot (read from|write to) the store s3://"):
        extract_features(RunConfig(), responses, s3_store, tiny_target)
    s3_proxy.mode = "pass"
    done = s3_store.stage("features", extract._key(RunConfig(), responses, tiny_target)).finished()
    assert len(done) < 4
    features = extract_features(RunConfig(), responses, s3_store, tiny_target)
    assert stored_ids(s3_store, features) == once_each(24)
    records = s3_store.open(features).finished()
    assert {name: records[name].sha256 for name in done} == {name: record.sha256 for name, record in done.items()}
