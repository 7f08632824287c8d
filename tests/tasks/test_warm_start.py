"""`draft.warm_start = "champion"`: which draft that is, and that a retraining keeps to its choice."""

from functools import partial
from pathlib import Path

import pytest

from hass_core.draft_model.eagle3 import TAP_LAYERS
from tasks import tracking, warm_start
from tasks.tracking import open_retraining
from tests.tasks.conftest import register_draft

MADE_BY = {"target": "this"}


@pytest.fixture
def continuing(config, monkeypatch, tiny_target):
    monkeypatch.setattr("tasks.resources.target_of", lambda config: tiny_target)
    monkeypatch.setattr(warm_start, "made_by", lambda config: MADE_BY)
    return config.model_copy(update={"draft": config.draft.model_copy(update={"warm_start": "champion"})})


@pytest.fixture
def register(config, store, prompts, tiny_target):
    return partial(register_draft, config, store, prompts, tiny_target)


def begin(config, prompts):
    """Resolve, and open the retraining as a flow does; the digest of the draft it starts from."""
    resolved, tags = warm_start.resolve_warm_start.fn(config, prompts, None)
    with open_retraining(config, prompts, tags, MADE_BY):
        pass
    return resolved.draft.warm_start and Path(resolved.draft.warm_start).name


def test_the_champion_is_the_start_of_a_new_retraining(continuing, register, prompts):
    champion = register(0)
    register(1)
    assert begin(continuing, prompts) == champion.draft.digest
    other = continuing.draft.model_copy(update={"architecture": "eagle3"})
    assert begin(continuing.model_copy(update={"draft": other}), prompts) is None


@pytest.mark.parametrize(
    ("told", "taps"),
    [
        ({"eagle_config": {"use_aux_hidden_state": False}}, "last"),
        ({"eagle_config": {TAP_LAYERS: [0]}, TAP_LAYERS: [1]}, (1,)),
    ],
    ids=["last", "one inside"],
)
def test_a_champion_over_other_states_of_the_target_is_no_start(continuing, register, prompts, monkeypatch, told, taps):
    champion = register(0)
    monkeypatch.setattr(warm_start, "read_config", lambda folder: told)
    for wanted in ("last", (1,)):
        draft = continuing.draft.model_copy(update={"architecture": "eagle3", "taps": wanted})
        found = begin(continuing.model_copy(update={"draft": draft}), prompts)
        assert found == (champion.draft.digest if wanted == taps else None)


def test_a_repeat_starts_from_the_same_draft_though_the_champion_is_another_now(continuing, register, prompts, store):
    first, second = register(0), register(1)
    assert begin(continuing, prompts) == first.draft.digest
    tracking.crown(tracking.connect(continuing), second, first)
    assert begin(continuing, prompts) == first.draft.digest
    newer = store.stage("prompts", {"of": "next week"}).finish({})
    assert begin(continuing, newer) == second.draft.digest


def test_without_a_champion_of_this_target_the_draft_starts_anew(continuing, register, prompts):
    assert begin(continuing, prompts) is None
    champion = register(0)
    client = tracking.connect(continuing)
    client.set_model_version_tag(champion.model, champion.version, "hass.target", "another")
    longer = continuing.model_copy(update={"training": continuing.training.model_copy(update={"passes": 3})})
    assert begin(longer, prompts) is None
