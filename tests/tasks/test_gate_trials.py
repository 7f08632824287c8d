"""The gate on real duels of the tiny target: a draft never takes over from its own copy."""

import json

import pytest

from hass_core.config import EvaluationConfig, PromotionConfig, RunConfig, TreeConfig
from hass_core.evaluation.duel import read_bouts, run_duel
from hass_core.store import Artifact, Store
from tasks.gate import judge
from tests.tasks.conftest import make_draft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TREE = TreeConfig(depth=2, top_k=2, nodes=5)
TRIALS, QUESTIONS = 3, 24


@pytest.fixture
def config(tmp_path) -> RunConfig:
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": n, "turns": [f"What is {n} and {n}?"]} for n in range(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(evaluation=EvaluationConfig(benchmarks=(f"mine={path}",), max_new_tokens=8), tree=TREE)


def copy_of(store: Store, draft: Artifact, number: int) -> Artifact:
    """The same weights as another artifact."""
    source, folder = store.open(draft), store.stage("draft", {"copy": number})
    for name in ("config.json", "model.safetensors"):
        with folder.writing(name) as file:
            file.path.write_bytes(source.local_path(name).read_bytes())
    return folder.finish({})


def test_a_copy_is_promoted_in_none_of_three_trials(config, store, tiny_target):
    draft, rules = make_draft(store, tiny_target), PromotionConfig()
    verdicts = []
    for number in range(TRIALS):
        copy = copy_of(store, draft, number)
        duel = run_duel(config, copy, draft, TREE, rules.rounds, store, tiny_target)
        verdicts.append(judge(read_bouts(store, duel), True, rules))
        assert duel.summary["compilations"] == 0
    assert [str(verdict.gain) for verdict in verdicts if verdict.promoted] == []
