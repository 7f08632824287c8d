"""Extraction stores what the target computes, once, where there is room; and its checks and its benchmark."""

import errno
import json
import os

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hass_core.bench.features import bench_features
from hass_core.cli.app import app
from hass_core.config import parse_config
from hass_core.errors import HassError, NonFinite, StoreError
from hass_core.features.checks import validate_features
from hass_core.features.extract import (
    Measured,
    _Extraction,
    extract_features,
    forecast,
    measure,
    refuse_if_too_large,
    states_of,
)
from hass_core.features.reader import FeatureDataset
from hass_core.features.schema import FeatureInfo
from hass_core.features.tokenise import split_of
from hass_core.features.writer import FeatureWriter
from hass_core.target_model.capture import batches_by_tokens, capture_features
from tests.features.conftest import conversation, responses_artifact


def test_extraction_stores_what_the_target_computes(tiny_target, store, config, rows):
    artifact = extract_features(config, responses_artifact(store, rows, parts=3), store, tiny_target)
    dataset = FeatureDataset(store, artifact, target_identity=tiny_target.fingerprint)
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
    with pytest.raises(StoreError, match=r"only 1\.0 TB free: 7\d\d GB too little"):
        refuse_if_too_large(expected, store)


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
    with states_of(config.features, tiny_target) as states:
        measured = measure(tiny_target, sample, 64, "bf16", states)
    assert measured.bytes_per_token == 2 * 48 + 6
    assert measured.tokens_per_second > 0
    assert notes[0][2].startswith(f"expecting {artifact.summary['tokens']:,} tokens")
    assert notes[-1][:2] == (30, 30)


def test_a_disk_that_fills_up_while_features_are_written_is_named(tiny_target, store, config, rows, monkeypatch):
    def full(self, *row):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    responses = responses_artifact(store, rows, parts=2)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "_flush", full)
        with pytest.raises(StoreError, match=r"the disk of .* is full; free space and run the same command again"):
            extract_features(config, responses, store, tiny_target)
    assert extract_features(config, responses, store, tiny_target).summary["conversations"] == 30


def test_validation_names_every_bad_row_and_counts_the_rest(store):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_identity="t")
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
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_identity="t")
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
    ran = CliRunner().invoke(app, ["bench", "features", *options], catch_exceptions=False)
    record = json.loads(ran.stdout.splitlines()[-1])
    assert record["rows"] == 26
    assert record["disk"].count(":") == 1
    assert record["read_gb_per_second"] > 0 < record["write_gb_per_second"]
