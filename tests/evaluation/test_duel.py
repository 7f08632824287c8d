"""Two drafts face to face on the tiny target."""

import pytest

from hass_core.config import RunConfig, SamplingConfig
from hass_core.errors import DraftMismatch
from hass_core.evaluation import duel as module
from hass_core.evaluation.duel import default_sampling, read_bouts, run_duel
from hass_core.evaluation.measure import Examiner
from hass_core.target_model.loader import freeze
from tests.conftest import byte_tokenizer, tiny_llama

from .conftest import TREE, random_draft


@pytest.fixture
def config(settings):
    return RunConfig(evaluation=settings, tree=TREE)


@pytest.fixture
def drafts(store, tiny_target, tmp_path):
    """Two finished draft stages."""
    made = []
    for seed in (0, 1):
        source = random_draft(tiny_target, tmp_path / f"draft-{seed}", seed)
        folder = store.stage("draft", {"seed": seed})
        for path in source.iterdir():
            with folder.writing(path.name) as file:
                file.path.write_bytes(path.read_bytes())
        made.append(folder.finish({}))
    return made


def test_both_sides_answer_every_question_at_both_temperatures_in_every_round(config, drafts, store, tiny_target):
    found = run_duel(config, drafts[0], drafts[1], TREE, 2, store, tiny_target)
    bouts = read_bouts(store, found)
    met = [(bout.round, bout.challenger.temperature, bout.challenger.question) for bout in bouts]
    assert met == [(lap, t, f"mine/{q}") for lap in (0, 1) for t in (0.0, 1.0) for q in (1, 2, 3)]
    assert all(bout.challenger.token_ids == bout.opponent.token_ids for bout in bouts), "the target's own tokens"
    assert found.summary == {"bouts": 12, "rounds": 2, "questions": 3, "compilations": 0}


def test_rounds_draw_other_texts_where_tokens_are_drawn(config, drafts, store, tiny_target):
    bouts = read_bouts(store, run_duel(config, *drafts, TREE, 2, store, tiny_target))
    first, second = ([b.challenger.token_ids for b in bouts if b.round == lap] for lap in (0, 1))
    assert first[:3] == second[:3]
    assert first[3:] != second[3:]


def test_plain_decoding_can_be_the_opponent(config, drafts, store, tiny_target):
    bouts = read_bouts(store, run_duel(config, drafts[0], None, TREE, 1, store, tiny_target))
    assert all(sum(bout.opponent.accepted) == 0 for bout in bouts)


def test_a_stopped_duel_continues_with_the_next_bout(config, drafts, store, tiny_target, monkeypatch):
    measure, asked = Examiner.measure, []

    def counting(self, question, sampling, lap):
        if len(asked) == 2:
            asked.append("stop")
            raise KeyboardInterrupt
        asked.append(question.id)
        return measure(self, question, sampling, lap)

    monkeypatch.setattr(Examiner, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        run_duel(config, *drafts, TREE, 1, store, tiny_target)
    run_duel(config, *drafts, TREE, 1, store, tiny_target)
    assert asked == ["mine/1", "mine/2", "stop", "mine/3", "mine/1", "mine/2", "mine/3"]


def test_an_answer_during_which_something_compiles_is_asked_again(config, drafts, store, tiny_target, monkeypatch):
    import torch

    generate, slow = module.SpeculativeDecoder.generate, []

    def compiling(self, prompts, sampling, max_new_tokens, stop, seed=None):
        if seed is not None and not slow:  # the first timed answer
            slow.append(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)))
        return generate(self, prompts, sampling, max_new_tokens, stop, seed)

    monkeypatch.setattr(module.SpeculativeDecoder, "generate", compiling)
    found = run_duel(config, *drafts, TREE, 1, store, tiny_target)
    assert slow
    assert found.summary["compilations"] == 0


def test_a_target_recommends_its_sampling_or_draws_at_one(tiny_target, monkeypatch):
    assert default_sampling(tiny_target) == SamplingConfig(temperature=1.0)
    monkeypatch.setattr(tiny_target.model.generation_config, "temperature", 0.2)
    monkeypatch.setattr(tiny_target.model.generation_config, "top_p", 0.9)
    assert default_sampling(tiny_target) == SamplingConfig(temperature=0.2, top_p=0.9)


def test_a_draft_of_another_target_can_be_an_opponent_where_its_sizes_agree(
    config, drafts, store, tiny_target, tmp_path
):
    other = freeze(tiny_llama(seed=9), byte_tokenizer(), name="other")
    wider = freeze(tiny_llama(hidden_size=64), byte_tokenizer(), name="wider")
    assert module.loads(store.open(drafts[1]), other)
    assert not module.loads(store.open(drafts[1]), wider)
    source = random_draft(other, tmp_path / "new", 3)
    folder = store.stage("draft", {"seed": "of the other target"})
    for path in source.iterdir():
        with folder.writing(path.name) as file:
            file.path.write_bytes(path.read_bytes())
    new = folder.finish({})
    bouts = read_bouts(store, run_duel(config, new, drafts[1], TREE, 1, store, other))
    assert all(bout.challenger.token_ids == bout.opponent.token_ids for bout in bouts)
    with pytest.raises(DraftMismatch, match="was trained for tiny"):
        run_duel(config, drafts[1], new, TREE, 1, store, other)
