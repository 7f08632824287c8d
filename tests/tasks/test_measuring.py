"""Whom a challenger is measured against, and by whom."""

import json
import shutil

import pytest

from hass_core.config import SamplingConfig
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder
from hass_core.errors import BadInput
from hass_core.progress import no_progress
from hass_core.target_model.loader import Target, freeze
from hass_core.target_model.runner import make_runner
from tasks import measuring, resources, tracking, warm_start
from tasks.tracking import open_retraining
from tests.conftest import byte_tokenizer, tiny_llama
from tests.evaluation.engine_server import Engine, running
from tests.tasks.conftest import crowned, make_draft, make_evaluation


@pytest.fixture
def versions(config, store, prompts, tiny_target, monkeypatch):
    """The champion and a challenger, both with an evaluation."""
    for module in (measuring, resources):
        monkeypatch.setattr(module, "target_of", lambda config: tiny_target)
    tags = {"hass.digest.evaluation": make_evaluation(store, (0.6, 0.5)).digest}
    with open_retraining(config, prompts, {}) as run_id:
        drafts = [make_draft(store, tiny_target, seed) for seed in (0, 1)]
        made = [tracking.register(config, run_id, draft, store, tiny_target, tags) for draft in drafts]
    return [crowned(config, version) for version in made]


def test_a_champion_whose_draft_is_gone_counts_as_none(config, versions, prompts, monkeypatch):
    champion, challenger = versions
    shutil.rmtree(champion.draft.url)
    rules = config.promotion.model_copy(update={"beat_plain": False})
    alone = config.model_copy(update={"promotion": rules})
    verdict = measuring.measured_verdict(alone, challenger, champion, no_progress)
    assert verdict.promoted
    gone = f"the store {config.store} does not hold the draft of version 1: it counts as none"
    assert verdict.reasons == (gone,)
    monkeypatch.setattr(warm_start, "made_by", lambda config: {})
    draft = config.draft.model_copy(update={"warm_start": "champion"})
    continuing = config.model_copy(update={"draft": draft})
    assert warm_start.resolve_warm_start.fn(continuing, prompts, None)[0].draft.warm_start is None


def served_by(target: Target, share: float) -> Engine:
    """An engine with this target."""
    decoder = PlainDecoder(make_runner(target))

    def answer(asked):
        prompt = encode_prompt(target.tokenizer, asked["messages"])
        sampling = SamplingConfig(temperature=asked["temperature"])
        (made,) = decoder.generate([prompt], sampling, asked["max_tokens"], StopRule.of(target))
        return len(prompt), made.token_ids

    return Engine((share, share / 2), answering=answer)


def test_servers_judge_the_target_of_the_settings_and_no_other(config, versions, tiny_target, tmp_path):
    champion, challenger = versions
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(3)))
    other = freeze(tiny_llama(seed=1), byte_tokenizer(), name="other")
    asked = config.evaluation.model_copy(update={"benchmarks": (f"mine={path}",), "max_new_tokens": 8})

    def judged(new: Engine, old: Engine):
        rules = {"judge": "server", "challenger_url": new.url, "champion_url": old.url}
        promotion = config.promotion.model_copy(update=rules)
        settings = config.model_copy(update={"promotion": promotion, "evaluation": asked})
        return measuring.measured_verdict(settings, challenger, champion, no_progress)

    with running(served_by(tiny_target, 0.6)) as new, running(served_by(tiny_target, 0.4)) as old:
        assert f"in the servers {new.url} and {old.url}, which counted τ 1.90 and 1.60" in judged(new, old).measured
        with running(served_by(other, 0.9)) as wrong:
            with pytest.raises(BadInput, match=f"{wrong.url} serves another model than tiny"):
                judged(wrong, old)
            with pytest.raises(BadInput, match=f"{wrong.url} serves another model than tiny"):
                judged(new, wrong)
