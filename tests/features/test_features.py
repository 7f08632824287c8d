"""Features survive the way to disk and back, and a broken or foreign shard is named, never read."""

import errno
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hass_core.config import parse_config
from hass_core.errors import CorruptFile, DraftMismatch, HassError, NonFinite, StoreError
from hass_core.features import tokenised
from hass_core.features.bench import bench_features
from hass_core.features.encoding import bytes_per_token, checksum, decode, encode
from hass_core.features.extract import _Extraction, extract_features
from hass_core.features.forecast import Measured, forecast, measure, refuse_if_too_large
from hass_core.features.reader import FeatureDataset
from hass_core.features.schema import FeatureInfo
from hass_core.features.tokenised import Part, parts_ahead, split_of
from hass_core.features.validate import validate_features
from hass_core.features.writer import FeatureWriter
from hass_core.target.capture import batches_by_tokens, capture_features
from tests.features.conftest import conversation, responses_artifact

LOSSLESS = ("bf16", "bf16-planes-zstd")
LOSSY = ("fp8", "int8")


@pytest.fixture
def config():
    return parse_config({"features": {"validation_fraction": 0.2}})


@given(
    tokens=st.integers(1, 40),
    hidden=st.sampled_from([2, 16, 48]),
    encoding=st.sampled_from(LOSSLESS),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_bf16_encodings_return_every_bit(tokens, hidden, encoding, seed):
    torch.manual_seed(seed)
    features = (torch.randn(tokens, hidden) * 10 ** torch.randn(hidden)).bfloat16()
    data = pa.py_buffer(encode(features, encoding))
    assert torch.equal(decode(data, tokens, hidden, encoding), features)


@pytest.mark.parametrize(("encoding", "error"), [("fp8", 0.07), ("int8", 0.02)])
def test_small_encodings_halve_the_space_and_stay_close(encoding, error):
    features = torch.randn(100, 64).bfloat16()
    data = encode(features, encoding)
    assert len(data) == 100 * bytes_per_token(encoding, 64) < 0.52 * len(encode(features, "bf16"))
    back = decode(pa.py_buffer(data), 100, 64, encoding)
    assert (back.float() - features.float()).norm() / features.float().norm() < error


def test_extraction_stores_what_the_target_computes(tiny_target, store, config, rows):
    artifact = extract_features(config, responses_artifact(store, rows, parts=3), store, tiny_target)
    dataset = FeatureDataset(store, artifact, target_fingerprint=tiny_target.fingerprint)
    assert len(dataset) == artifact.summary["conversations"] == 30
    for i in (0, 11, 29):
        row = dataset[i]
        with torch.no_grad():
            hidden = tiny_target.model(row.token_ids[None], output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row.features, hidden.bfloat16(), rtol=0.02, atol=0.02)
        text = tiny_target.tokenizer.decode(row.token_ids[row.loss_mask])
        assert text.startswith("word ")
        assert text.endswith("end<|im_end|>")


def test_padding_does_not_change_a_feature(tiny_target):
    rows = [[1, 5, 9], list(range(3, 60)), [7] * 20]
    together = capture_features(tiny_target, rows)
    for ids, features in zip(rows, together, strict=True):
        torch.testing.assert_close(features, capture_features(tiny_target, [ids])[0], rtol=0.01, atol=0.01)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(50, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = list(batches_by_tokens(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


def test_splits_are_disjoint_complete_and_stable(tiny_target, store, config, rows):
    artifact = extract_features(config, responses_artifact(store, rows), store, tiny_target)
    train, validation, both = (FeatureDataset(store, artifact, split) for split in ("train", "validation", None))
    names = [{d[i].id for i in range(len(d))} for d in (train, validation, both)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == names[2] == {row["id"] for row in rows}
    assert names[1] == {row["id"] for row in rows if split_of(row["id"], 0.2) == "validation"} != set()


def test_a_finished_stage_is_reused_and_a_half_done_one_continued(tiny_target, store, config, rows, monkeypatch):
    responses = responses_artifact(store, rows, parts=3)
    seen = []
    real = _Extraction._capture

    def stop_at_third(run, part, writing):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(part.name)
        return real(run, part, writing)

    monkeypatch.setattr(_Extraction, "_capture", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        extract_features(config, responses, store, tiny_target)
    monkeypatch.setattr(_Extraction, "_capture", lambda run, part, w: (seen.append(part.name), real(run, part, w))[1])
    extract_features(config, responses, store, tiny_target)
    assert seen == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert extract_features(config, responses, store, tiny_target).summary["conversations"] == 30
    assert len(seen) == 3


def test_conversations_without_an_answer_are_skipped_and_counted(tiny_target, store, config, rows):
    no_answer = conversation("none") | {"messages": [{"role": "user", "content": "Hello"}], "answer_token_ids": []}
    long = conversation("long", question="q" * 3000)
    artifact = extract_features(config, responses_artifact(store, [*rows, no_answer, long]), store, tiny_target)
    assert (artifact.summary["conversations"], artifact.summary["skipped"]) == (30, 2)
    skipped = pq.read_table(store.open(artifact).local_path("skipped.parquet")).to_pylist()
    assert {row["id"]: row["reason"] for row in skipped} == {
        "none": "no assistant turn",
        "long": "no answer within max_tokens_per_conversation",
    }


def test_nothing_but_skipped_conversations_is_an_error(tiny_target, store, config):
    row = conversation("none") | {"messages": [{"role": "user", "content": "Hello"}], "answer_token_ids": []}
    with pytest.raises(HassError, match="no conversation gave features"):
        extract_features(config, responses_artifact(store, [row]), store, tiny_target)


def test_features_of_another_target_are_refused(tiny_target, store, config, rows):
    artifact = extract_features(config, responses_artifact(store, rows), store, tiny_target)
    with pytest.raises(DraftMismatch, match=rf"of the target {tiny_target.fingerprint}, this target is 0123"):
        FeatureDataset(store, artifact, target_fingerprint="0123")


def damaged(store, tiny_target, config, rows, damage):
    artifact = extract_features(config, responses_artifact(store, rows), store, tiny_target)
    path = store.open(artifact).local_path("part-00000.parquet")
    damage(path)
    return artifact


def test_a_truncated_shard_is_named(tiny_target, store, config, rows):
    artifact = damaged(store, tiny_target, config, rows, lambda path: path.write_bytes(path.read_bytes()[:-50]))
    with pytest.raises(CorruptFile, match=r"part-00000\.parquet: missing or truncated"):
        FeatureDataset(store, artifact)


def test_a_shard_with_changed_bytes_names_its_row(tiny_target, store, config, rows):
    def flip(path):
        data = bytearray(path.read_bytes())
        table = pq.read_table(path)
        features = table["features"][0].as_py()  # other rows may hold the same, this is the first
        place = bytes(data).find(features)
        data[place + 10] ^= 0xFF
        path.write_bytes(data)

    artifact = damaged(store, tiny_target, config, rows, flip)
    dataset = FeatureDataset(store, artifact)
    with pytest.raises(CorruptFile, match=r"part-00000\.parquet, row group 0, row 0 .*checksum"):
        dataset[0]
    assert dataset[3].features.isfinite().all()


def test_a_row_with_nan_is_named(store):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"nan": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        writer.add("good", "train", [1, 2], [0, 1], torch.ones(2, 4))
        writer.add("bad", "train", [1, 2], [0, 1], torch.tensor([[1.0] * 4, [1, 2, float("nan"), 4]]))
    dataset = FeatureDataset(store, folder.finish({}), "train")
    assert dataset[0].id == "good"
    with pytest.raises(CorruptFile, match=r"row 1 \(bad\): the features hold NaN"):
        dataset[1]


def test_a_target_that_overflows_is_caught_before_anything_is_stored(tiny_target, store, config, rows):
    norm = tiny_target.model.model.norm.weight
    before = norm.clone()
    norm.fill_(float("inf"))
    try:
        with pytest.raises(NonFinite, match="load the target in float32"):
            extract_features(config, responses_artifact(store, rows), store, tiny_target)
    finally:
        norm.copy_(before)
    assert not list(store.fs.glob(f"{store.root}/features/*/part-*"))


def test_a_store_without_room_is_refused_with_the_missing_amount(store, monkeypatch):
    expected = forecast([100, 300], 1_000_000, Measured(8192, tokens_per_second=40_000))
    assert (expected.tokens, expected.seconds) == (200_000_000, 5000)
    assert 1.6e12 < expected.bytes < 1.7e12
    monkeypatch.setattr(store, "free_bytes", lambda: 10**12)
    with pytest.raises(StoreError, match=r"1000\.00 GB free: 7\d\d\.\d\d GB too little"):
        refuse_if_too_large(expected, store)


@pytest.mark.parametrize("encoding", LOSSLESS + LOSSY)
def test_shards_open_in_plain_pyarrow_and_datasets(tiny_target, store, rows, encoding, tmp_path):
    config = parse_config({"features": {"encoding": encoding}})
    artifact = extract_features(config, responses_artifact(store, rows), store, tiny_target)
    path = store.open(artifact).local_path("part-00000.parquet")
    table = pq.read_table(path)
    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))
    assert dataset["id"][:] == table["id"].to_pylist()
    assert sum(dataset["num_tokens"]) == artifact.summary["tokens"]
    loaded = FeatureDataset(store, artifact)
    assert loaded.info.encoding == encoding
    assert loaded[0].features.shape == (loaded.lengths[0], 48)


def test_the_cache_of_row_groups_stays_bounded(store):
    info = FeatureInfo(hidden_size=256, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"cache": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info, row_group_mb=1) as writer:
        for i in range(64):
            writer.add(f"c{i}", "train", [1] * 200, [1] * 200, torch.full((200, 256), float(i)))
    dataset = FeatureDataset(store, folder.finish({}), cache_bytes=3 << 20)
    assert [int(dataset[i].features[0, 0]) for i in range(64)] == list(range(64))
    assert dataset._group_bytes <= 3 << 20
    assert len(dataset._groups) > 1


def test_validation_has_row_groups_of_its_own(store):
    info = FeatureInfo(hidden_size=8, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"splits": 1})
    splits = ["validation" if i % 5 == 0 else "train" for i in range(40)]
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        for i, split in enumerate(splits):
            writer.add(f"c{i}", split, [1] * 3, [1] * 3, torch.full((3, 8), float(i)))
    artifact = folder.finish({})
    for split in ("train", "validation"):
        dataset = FeatureDataset(store, artifact, split)
        assert [dataset[i].id for i in range(len(dataset))] == [f"c{i}" for i in range(40) if splits[i] == split]
        assert len(dataset._groups) == 1
    assert FeatureDataset(store, artifact).blocks.tolist() == [0, 8]


def test_threads_read_a_row_group_once(store, monkeypatch):
    info = FeatureInfo(hidden_size=8, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"threads": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        for i in range(16):
            writer.add(f"c{i}", "train", [1] * 3, [1] * 3, torch.full((3, 8), float(i)))
    dataset, read, real = FeatureDataset(store, folder.finish({})), [], FeatureDataset._read_group

    def slowly(own, name, number):
        read.append((name, number))
        time.sleep(0.2)
        return real(own, name, number)

    monkeypatch.setattr(FeatureDataset, "_read_group", slowly)
    assert dataset.blocks.tolist() == [0]
    dataset.warm(range(16))
    with ThreadPoolExecutor(4) as threads:
        assert [c.id for c in threads.map(dataset.__getitem__, range(16))] == [f"c{i}" for i in range(16)]
    assert len(read) == 1


def test_another_cache_size_or_batch_size_gives_the_same_stage(tiny_target, store, rows):
    responses = responses_artifact(store, rows)
    first = extract_features(parse_config({}), responses, store, tiny_target)
    assert (
        extract_features(parse_config({"features": {"max_tokens_per_batch": 64}}), responses, store, tiny_target)
        == first
    )


def test_the_forecast_is_near_what_is_then_stored(tiny_target, store, config, rows):
    notes = []
    artifact = extract_features(
        config, responses_artifact(store, rows, 3), store, tiny_target, lambda *told: notes.append(told)
    )
    sample = [list(range(3, 3 + n)) for n in (10, 20, 30)]
    measured = measure(tiny_target, sample, 64, "bf16")
    assert measured.bytes_per_token == 2 * 48 + 6
    assert measured.tokens_per_second > 0
    assert notes[0][2].startswith(f"expecting {artifact.summary['tokens']:,} tokens")
    assert notes[-1][:2] == (30, 30)


def test_stream_gives_what_random_access_gives_and_both_can_run_in_threads(store):
    info = FeatureInfo(hidden_size=256, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"stream": 1})
    for part in range(3):
        with (
            folder.writing(f"part-{part:05d}.parquet") as file,
            FeatureWriter(file.path, info, row_group_mb=1) as writer,
        ):
            for i in range(30):
                split = "validation" if i % 5 == 0 else "train"
                writer.add(f"{part}-{i}", split, [i] * 100, [1] * 100, torch.full((100, 256), float(part * 30 + i)))
    dataset = FeatureDataset(store, folder.finish({}), "train", cache_bytes=2 << 20)
    streamed = list(dataset.stream())
    with ThreadPoolExecutor(4) as threads:
        picked = list(threads.map(dataset.__getitem__, range(len(dataset))))
    assert (
        [c.id for c in streamed] == [c.id for c in picked] == [f"{p}-{i}" for p in range(3) for i in range(30) if i % 5]
    )
    for one, other in zip(streamed, picked, strict=True):
        assert torch.equal(one.features, other.features)
        assert one.token_ids.tolist() == other.token_ids.tolist()


def test_a_row_is_read_without_a_copy(store):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"view": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        writer.add("one", "train", [1, 2], [0, 1], torch.ones(2, 4))
    dataset = FeatureDataset(store, folder.finish({}))
    assert dataset[0].features.data_ptr() == dataset[0].features.data_ptr()


def test_shards_of_two_targets_in_one_stage_are_refused(store):
    folder = store.stage("features", {"two": 1})
    for i in range(2):
        info = FeatureInfo(hidden_size=4, encoding="bf16", target_fingerprint=f"target-{i}", template_hash="h")
        with folder.writing(f"part-{i:05d}.parquet") as file, FeatureWriter(file.path, info) as writer:
            writer.add("one", "train", [1], [1], torch.ones(1, 4))
    with pytest.raises(CorruptFile, match=r"disagree about their target or encoding: .*target-0.* and .*target-1"):
        FeatureDataset(store, folder.finish({}))


def test_a_parquet_file_of_something_else_is_refused(store):
    folder = store.stage("features", {"else": 1})
    with folder.writing("part-00000.parquet") as file:
        pq.write_table(pa.table({"x": [1]}), file.path)
    with pytest.raises(CorruptFile, match=r"part-00000\.parquet is no feature shard"):
        FeatureDataset(store, folder.finish({}))
    other = store.stage("features", {"else": 2})
    other.write_text("part-00000.parquet", "not Parquet at all")
    with pytest.raises(CorruptFile, match=r"part-00000\.parquet is not readable Parquet"):
        FeatureDataset(store, other.finish({}))
    with pytest.raises(CorruptFile, match=r"holds no part-\*\.parquet"):
        FeatureDataset(store, store.stage("features", {"else": 3}).finish({}))


def test_a_disk_that_fills_up_while_features_are_written_is_named(tiny_target, store, config, rows, monkeypatch):
    def full(self, *row):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    responses = responses_artifact(store, rows, parts=2)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "_flush", full)
        with pytest.raises(StoreError, match=r"the disk of .* is full; free space and run the same command again"):
            extract_features(config, responses, store, tiny_target)
    assert extract_features(config, responses, store, tiny_target).summary["conversations"] == 30


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_shards_open_in_duckdb(tiny_target, store, rows, encoding):
    duckdb = pytest.importorskip("duckdb")
    config = parse_config({"features": {"encoding": encoding}})
    artifact = extract_features(config, responses_artifact(store, rows), store, tiny_target)
    path = store.open(artifact).local_path("part-00000.parquet")
    query = f"select sum(num_tokens), sum(octet_length(features)) from '{path}'"
    tokens = artifact.summary["tokens"]
    assert duckdb.sql(query).fetchall() == [(tokens, tokens * bytes_per_token(encoding, 48))]


def test_validation_names_every_bad_row_and_counts_the_rest(store):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"bad": 2})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        writer.add("good", "train", [1, 2], [0, 1], torch.ones(2, 4))
        writer.add("infinite", "train", [1, 2], [0, 1], torch.full((2, 4), float("-inf")))
        writer.add("unsupervised", "train", [1, 2], [0, 0], torch.ones(2, 4))
        writer.add("good", "train", [1, 2], [0, 1], torch.ones(2, 4))
    report = validate_features(store, folder.finish({}))
    assert (report.conversations, report.tokens, report.supervised_fraction) == (4, 4, 0.5)
    assert [problem.partition("(")[2].partition(")")[0] for problem in report.problems[:2]] == [
        "infinite",
        "unsupervised",
    ]
    assert report.problems[2].endswith("the id good stands there twice")


def test_a_mask_that_supervises_everything_is_reported(store):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_fingerprint="t", template_hash="h")
    folder = store.stage("features", {"mask": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        writer.add("one", "train", [1, 2], [1, 1], torch.ones(2, 4))
    assert "100.0% of the tokens are supervised" in validate_features(store, folder.finish({})).problems[0]


def test_the_benchmark_measures_writing_reading_and_the_target(tiny_target, tmp_path):
    speed = bench_features(gigabytes=0.001, folder=tmp_path, target=tiny_target)
    assert 0.0009 < speed.gigabytes < 0.0011
    assert min(speed.write_gb_per_second, speed.read_gb_per_second, speed.read_again_gb_per_second) > 0
    assert (speed.prefill_tokens_per_second or 0) > 0 < (speed.capture_tokens_per_second or 0)
    assert not list(tmp_path.iterdir())


def test_the_benchmark_prints_one_json_line_last(tmp_path):
    options = ["--gigabytes", "0.001", "--hidden-size", "64", "--folder", str(tmp_path)]
    command = [str(Path(sys.executable).with_name("hass")), "bench", "features", *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(ran.stdout.splitlines()[-1])
    assert record["rows"] == 26
    assert record["disk"].count(":") == 1
    assert record["read_gb_per_second"] > 0 < record["write_gb_per_second"]


@given(st.data(), st.integers(1, 20_000))
@settings(max_examples=60, deadline=None)
def test_the_checksum_sees_changed_moved_and_missing_bytes(data, size):
    content = np.random.default_rng(size).bytes(size)
    place = data.draw(st.integers(0, size - 1))
    other = data.draw(st.integers(1, 255))
    changed = content[:place] + bytes([content[place] ^ other]) + content[place + 1 :]
    assert checksum(changed) != checksum(content) == checksum(pa.py_buffer(content))
    assert checksum(content[:-1]) != checksum(content)
    assert checksum(content + b"\0") != checksum(content)
    for width in (8, 4096):  # words and blocks that changed places
        if len(moved := content[width : 2 * width] + content[:width] + content[2 * width :]) > 2 * width:
            assert checksum(moved) != checksum(content)


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
