"""Features survive the way to disk and back, and a broken or foreign shard is named, never read."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hass_core.config import parse_config
from hass_core.data.responses import RESPONSES_SCHEMA
from hass_core.errors import CorruptFile, DraftMismatch, HassError, NonFinite, StoreError
from hass_core.features.encoding import bytes_per_token, decode, encode
from hass_core.features.extract import extract_features, split_of
from hass_core.features.forecast import forecast, refuse_if_too_large
from hass_core.features.reader import FeatureDataset
from hass_core.features.schema import FeatureInfo
from hass_core.features.writer import FeatureWriter
from hass_core.target.capture import batches_by_tokens, capture_features

LOSSLESS = ("bf16", "bf16-planes-zstd")
LOSSY = ("fp8", "int8")


def responses_artifact(store, rows, parts=1):
    folder = store.stage("responses", {"rows": len(rows), "parts": parts})
    size = -(-len(rows) // parts)
    for i in range(parts):
        part = rows[i * size : (i + 1) * size]
        with folder.writing(f"part-{i:05d}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(part, RESPONSES_SCHEMA), file.path)
            file.rows = len(part)
    return folder.finish({})


def conversation(name, question="What is it?", answer="It is a test.", **other):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = {"id": name, "category": "c", "source": "s", "messages": messages, "answer_token_ids": [[]]}
    return row | {"finished": True, "num_new_tokens": 3, "temperature": 0.0} | other


@pytest.fixture
def config():
    return parse_config({"features": {"validation_fraction": 0.2}})


@pytest.fixture
def rows():
    return [conversation(f"c{i}", answer="word " * (i % 7 + 1) + "end") for i in range(30)]


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
    import hass_core.features.extract as stage

    real = stage._extract_part

    def stop_at_third(config, source, name, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(name)
        real(config, source, name, *rest)

    monkeypatch.setattr(stage, "_extract_part", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        extract_features(config, responses, store, tiny_target)
    monkeypatch.setattr(stage, "_extract_part", lambda c, s, name, *rest: (seen.append(name), real(c, s, name, *rest)))
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
        features = table["features"][4].as_py()
        place = bytes(data).find(features)
        data[place + 10] ^= 0xFF
        path.write_bytes(data)

    artifact = damaged(store, tiny_target, config, rows, flip)
    dataset = FeatureDataset(store, artifact)
    with pytest.raises(CorruptFile, match=r"part-00000\.parquet, row group 0, row 4 .*checksum"):
        dataset[4]
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
    expected = forecast([100, 300], 1_000_000, 4096, "bf16")
    assert expected.tokens == 200_000_000
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
