"""What a later stage would refuse is told before the first one begins, and the store stays empty."""

import json

import pytest

from hass_core import stages
from hass_core.config import parse_config
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_info, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import BadInput, ConfigError, ContextTooLong, CorruptFile, DraftMismatch, TargetError
from hass_core.target_model.loader import freeze
from hass_core.training.launch import train_on_all
from tests.conftest import byte_tokenizer, tiny_llama

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.fixture
def refused(store, tiny_target, monkeypatch):
    """Run up to a stage by settings that cannot be: what is told, and that nothing was begun."""

    def sentence(last, kind, target=tiny_target, **settings) -> str:
        monkeypatch.setattr(stages, "load_target", lambda config: target)
        with pytest.raises(kind) as told:
            stages.run_until(last, parse_config({"store": store.root, **settings}))
        assert not store.fs.ls(store._base)
        return str(told.value)

    return sentence


@pytest.fixture
def biased(tiny_target, tmp_path):
    """A draft with biases on q, k and v."""
    shape = DraftArchitecture.from_target_config(tiny_target.model.config).model_copy(update={"qkv_bias": True})
    model, head = DraftModel(shape, tiny_target.embedding), DraftHead.from_target(tiny_target.head)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.1)
    save_draft(tmp_path / "biased", model, head, draft_info(tiny_target))
    return tmp_path / "biased"


@pytest.mark.parametrize("last", ["draft", "evaluation"])
def test_a_warm_start_that_is_none(refused, tmp_path, last):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    draft = {"warm_start": str(tmp_path / "other")}
    assert "model.safetensors is missing" in refused(last, CorruptFile, draft=draft)


def test_a_warm_start_of_another_family(refused, biased):
    draft = {"warm_start": str(biased), "family": "llama"}
    assert 'is not of draft.family = "llama"' in refused("draft", DraftMismatch, draft=draft)


def test_a_family_that_this_target_cannot_have(refused):
    partial = freeze(tiny_llama(rope_parameters=PARTIAL), byte_tokenizer(), "partial")
    assert "partial_rotary_factor" in refused("draft", TargetError, partial, draft={"family": "target"})


def test_questions_that_cannot_be_asked(refused, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"id": "a", "prompt": "long " * 200}))
    asked = {"benchmarks": [str(file)], "max_new_tokens": 8}
    assert "more than the" in refused("evaluation", ContextTooLong, evaluation=asked)
    file.write_text("{")
    assert "asked.jsonl" in refused("evaluation", BadInput, evaluation=asked)
    asked = {"methods": ["plain", "eagle2"]}
    assert "eagle2 needs a draft of its own" in refused("evaluation", ConfigError, evaluation=asked)


def test_without_a_flow_a_draft_is_trained_by_as_many_processes_as_in_one():
    assert stages.WORK["draft"] is train_on_all  # which execution.gpus is for: tests/training/test_launch.py
