"""Shards as a dataset: bounded, safe among threads, open to other readers; a bad one is named, never read."""

import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from hass_core.config import parse_config
from hass_core.errors import CorruptFile, DraftMismatch
from hass_core.features.extract import extract_features
from hass_core.features.reader import FeatureDataset, _is_finite
from hass_core.features.schema import METADATA_KEY, FeatureInfo, bytes_per_token
from hass_core.features.writer import FeatureWriter
from tests.features.conftest import responses_artifact


def test_features_of_another_target_are_refused(tiny_target, store, config, rows):
    artifact = extract_features(config, responses_artifact(store, rows), store, tiny_target)
    with pytest.raises(DraftMismatch, match=rf"of the target {tiny_target.fingerprint}, this target is 0123"):
        FeatureDataset(store, artifact, target_identity="0123")


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


def test_features_in_an_encoding_of_an_earlier_version_are_refused(tiny_target, store, config, rows):
    def rewritten(path):
        table = pq.read_table(path)
        metadata = table.schema.metadata[METADATA_KEY].replace(b'"bf16"', b'"fp8"')
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: metadata}), path)

    source = store.open(extract_features(config, responses_artifact(store, rows), store, tiny_target))
    folder = store.stage("features", {"of": "an earlier version"})
    with folder.writing("part-00000.parquet") as file:
        file.path.write_bytes(source.local_path("part-00000.parquet").read_bytes())
        rewritten(file.path)
    with pytest.raises(CorruptFile, match=r"another version, and this one does not read encoding = 'fp8'; remove the"):
        FeatureDataset(store, folder.finish({}))


def test_a_row_with_nan_is_named(store):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_identity="t")
    folder = store.stage("features", {"nan": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        writer.add("good", "train", [1, 2], [0, 1], torch.ones(2, 4))
        writer.add("bad", "train", [1, 2], [0, 1], torch.tensor([[1.0] * 4, [1, 2, float("nan"), 4]]))
    dataset = FeatureDataset(store, folder.finish({}), "train")
    assert dataset[0].id == "good"
    with pytest.raises(CorruptFile, match=r"row 1 \(bad\): the features hold NaN"):
        dataset[1]


def test_every_bfloat16_that_is_not_finite_is_seen():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    finite = every.isfinite()
    assert _is_finite(every[finite])
    assert not any(_is_finite(torch.stack([torch.tensor(-1.0).bfloat16(), number])) for number in every[~finite])


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
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
    info = FeatureInfo(hidden_size=256, encoding="bf16", target_identity="t")
    folder = store.stage("features", {"cache": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info, row_group_mb=1) as writer:
        for i in range(64):
            writer.add(f"c{i}", "train", [1] * 200, [1] * 200, torch.full((200, 256), float(i)))
    dataset = FeatureDataset(store, folder.finish({}), cache_bytes=3 << 20)
    assert [int(dataset[i].features[0, 0]) for i in range(64)] == list(range(64))
    assert dataset._group_bytes <= 3 << 20
    assert len(dataset._groups) > 1


def test_validation_has_row_groups_of_its_own(store):
    info = FeatureInfo(hidden_size=8, encoding="bf16", target_identity="t")
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
    info = FeatureInfo(hidden_size=8, encoding="bf16", target_identity="t")
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


def test_stream_gives_what_random_access_gives_and_both_can_run_in_threads(store, monkeypatch):
    info = FeatureInfo(hidden_size=256, encoding="bf16", target_identity="t")
    folder = store.stage("features", {"stream": 1})
    for part in range(3):
        with (
            folder.writing(f"part-{part:05d}.parquet") as file,
            FeatureWriter(file.path, info, row_group_mb=1) as writer,
        ):
            for i in range(30):
                split = "validation" if i % 5 == 0 else "train"
                writer.add(f"{part}-{i}", split, [i] * 100, [1] * 100, torch.full((100, 256), float(part * 30 + i)))
    dataset, read = FeatureDataset(store, folder.finish({}), "train", cache_bytes=1), []
    read_group = dataset._read_group
    monkeypatch.setattr(dataset, "_read_group", lambda *place: (read.append(place), read_group(*place))[1])
    streamed = list(dataset.stream())
    assert len(read) == len(set(read)) == len(dataset.blocks) > 3
    with ThreadPoolExecutor(4) as threads:
        picked = list(threads.map(dataset.__getitem__, range(len(dataset))))
    assert (
        [c.id for c in streamed] == [c.id for c in picked] == [f"{p}-{i}" for p in range(3) for i in range(30) if i % 5]
    )
    for one, other in zip(streamed, picked, strict=True):
        assert torch.equal(one.features, other.features)
        assert one.token_ids.tolist() == other.token_ids.tolist()


def test_a_row_is_read_without_a_copy(store):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_identity="t")
    folder = store.stage("features", {"view": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        writer.add("one", "train", [1, 2], [0, 1], torch.ones(2, 4))
    dataset = FeatureDataset(store, folder.finish({}))
    assert dataset[0].features.data_ptr() == dataset[0].features.data_ptr()


def test_shards_of_two_targets_in_one_stage_are_refused(store):
    folder = store.stage("features", {"two": 1})
    for i in range(2):
        info = FeatureInfo(hidden_size=4, encoding="bf16", target_identity=f"target-{i}")
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


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_shards_open_in_duckdb(tiny_target, store, rows, encoding):
    duckdb = pytest.importorskip("duckdb")
    config = parse_config({"features": {"encoding": encoding}})
    artifact = extract_features(config, responses_artifact(store, rows), store, tiny_target)
    path = store.open(artifact).local_path("part-00000.parquet")
    query = f"select sum(num_tokens), sum(octet_length(features)) from '{path}'"
    tokens = artifact.summary["tokens"]
    assert duckdb.sql(query).fetchall() == [(tokens, tokens * bytes_per_token(encoding, 48))]


def test_answers_are_counted_from_two_columns(store, tiny_target, config, rows, monkeypatch):
    dataset = FeatureDataset(store, extract_features(config, responses_artifact(store, rows), store, tiny_target))
    whole = [dataset[i] for i in range(len(dataset))]
    read, columns = pq.ParquetFile.read_row_group, set()

    def noted(file: pq.ParquetFile, number: int, **options: object) -> object:
        columns.update(options.get("columns") or ["all"])
        return read(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    answers = list(dataset.answers())
    assert columns == {"token_ids", "loss_mask"}
    assert [a.token_ids.tolist() for a in answers] == [c.token_ids.tolist() for c in whole]
    assert [a.loss_mask.tolist() for a in answers] == [c.loss_mask.tolist() for c in whole]
