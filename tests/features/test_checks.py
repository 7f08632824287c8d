"""The mask audit shows what is supervised and names the masks that cannot be right."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hass_core.cli.app import app
from hass_core.config import RunConfig
from hass_core.errors import BadInput, NonFinite, StoreError
from hass_core.features.checks import AUDIT, Audit, audit_masks, mask_problem
from hass_core.features.extract import extract_features
from hass_core.features.reader import shard_names
from hass_core.features.schema import FeatureInfo
from hass_core.features.writer import FeatureWriter
from hass_core.store import Store, store_at
from hass_core.target_model.capture import capture_features
from tests.features.conftest import responses_artifact


def stored_audit(store, artifact) -> Audit:
    return Audit.model_validate_json(store.open(artifact).read_text(AUDIT))


def test_extraction_stores_what_is_supervised(tiny_target, store, rows):
    artifact = extract_features(RunConfig(), responses_artifact(store, rows), store, tiny_target)
    audit = stored_audit(store, artifact)
    assert (audit.conversations, audit.tokens) == (artifact.summary["conversations"], artifact.summary["tokens"])
    assert audit.supervised_tokens == artifact.summary["supervised_tokens"]
    assert audit.problem_count == 0
    assert len(audit.samples) == 4
    answers = {row["id"]: [m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in rows}
    for sample in audit.samples:
        supervised = [piece.text for piece in sample.pieces if piece.supervised]
        assert len(supervised) == len(answers[sample.id])
        assert all(text.startswith(answer) for text, answer in zip(supervised, answers[sample.id], strict=True))


def test_masks_that_cannot_be_right_are_named(tiny_target):
    tokenizer = tiny_target.tokenizer
    ids = np.array(tokenizer("aé", add_special_tokens=False)["input_ids"])
    assert len(ids) == 3  # the second letter is two tokens
    assert mask_problem(ids, np.array([0, 1, 1]), tokenizer) is None
    assert mask_problem(ids, np.array([0, 0, 1]), tokenizer) == "the mask begins or ends inside a character"
    assert mask_problem(ids, np.array([0, 0, 0]), tokenizer) == "no token is supervised"
    assert mask_problem(ids, np.array([1, 1, 1]), tokenizer) == "every token is supervised, the prompt too"
    assert mask_problem(ids, np.array([1, 1]), tokenizer) == "3 tokens but 2 mask values"


@pytest.fixture
def broken_stage(store, tiny_target):
    info = FeatureInfo(hidden_size=4, encoding="bf16", target_identity="t")
    folder = store.stage("features", {"broken": 1})
    with folder.writing("part-00000.parquet") as file, FeatureWriter(file.path, info) as writer:
        writer.add("sound", "train", [5, 6], [0, 1], torch.ones(2, 4))
        writer.add("all-one", "train", [5, 6], [1, 1], torch.ones(2, 4))
        file.rows = 2
    return folder.finish({})


def test_doctor_data_shows_samples_and_fails_on_a_bad_mask(broken_stage, tiny_target, tmp_path):
    target = tmp_path / "target"
    tiny_target.model.save_pretrained(target)
    tiny_target.tokenizer.save_pretrained(target)
    ran = CliRunner().invoke(app, ["doctor", "data", broken_stage.url, "--target", str(target)])
    assert ran.exit_code == 1, ran.stderr
    assert "all-one: every token is supervised, the prompt too" in ran.stdout
    assert "conversations" in ran.stdout


def test_doctor_data_needs_no_target_where_the_audit_is_stored(tiny_target, store, rows):
    artifact = extract_features(RunConfig(), responses_artifact(store, rows), store, tiny_target)
    ran = CliRunner().invoke(app, ["doctor", "data", artifact.url, "--target", "nobody/nothing"])
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert "no fault found" in ran.stdout


def test_a_folder_that_is_no_features_stage_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"is no folder of the stage 'features'; give one of the form STORE/features/"):
        store_at(str(tmp_path / "draft" / "abc"), "features")
    with pytest.raises(StoreError, match=r"never finished; run it again"):
        store_at(str(tmp_path / "features" / "abc"), "features")


def test_features_from_before_the_audit_are_audited_when_asked(broken_stage, store: Store, tiny_target):
    folder = store.open(broken_stage)
    audit = audit_masks(folder, shard_names(folder), tiny_target.tokenizer)
    assert (audit.conversations, audit.supervised_tokens, audit.problem_count) == (2, 3, 1)
    assert json.loads(audit.model_dump_json())["supervised_share_percentiles"]["100"] == 1.0


def test_a_target_that_overflows_names_the_conversation(tiny_target, monkeypatch):
    def second_row_spoiled(hidden):
        spoiled = hidden.clone()
        spoiled[1] = float("nan")
        return spoiled

    monkeypatch.setattr(tiny_target.model.model.norm, "forward", second_row_spoiled)
    with pytest.raises(NonFinite, match=r"^conversation second: .*load the target in float32"):
        capture_features(tiny_target, [[5, 6, 7], [8, 9, 10]], ["first", "second"])
