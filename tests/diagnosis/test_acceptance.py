"""Each cause planted in a draft that is else sound: named first, with the τ it costs."""

import io
import json
import shutil

import pytest
from rich.console import Console

from hass_core.cli.acceptance_report import show_diagnosis
from hass_core.config import SamplingConfig
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder
from hass_core.diagnosis import chain
from hass_core.diagnosis.acceptance import diagnose
from hass_core.diagnosis.causes import Cause, category_cause, context_cause, depth_cause
from hass_core.diagnosis.chain import Cycle, chain_cycles
from hass_core.diagnosis.variants import Settings, as_asked
from hass_core.draft_model.checkpoint import draft_info, load_draft, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.target_model.identity import template_digest
from hass_core.target_model.runner import make_runner
from tests.conftest import CHAT_TEMPLATE
from tests.oracles.fitted import fitted_draft

SETTINGS = Settings(max_new_tokens=32)
TEXTS = ("Tides?", "What is 2 + 3?", "Name a colour.", "Rain on a roof", "Why is it dark?", "List three rivers")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [Question("mine", str(i), "abc"[i % 3], ({"role": "user", "content": t},)) for i, t in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def answers(tiny_target, questions):
    prompts = [encode_prompt(tiny_target.tokenizer, q.messages) for q in questions]
    answered = PlainDecoder(make_runner(tiny_target)).generate(prompts, SamplingConfig(), 40, StopRule())
    return prompts, [answer.token_ids for answer in answered]


@pytest.fixture(scope="module")
def sound(tiny_target, answers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft") / "sound"
    model = fitted_draft(tiny_target, *answers, steps=150)
    save_draft(folder, model, DraftHead.from_target(tiny_target.head), draft_info(tiny_target))
    return folder


@pytest.fixture(scope="module")
def healthy(sound, tiny_target, questions):
    return diagnose(sound, tiny_target, questions, SETTINGS)


@pytest.fixture
def planted(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "planted")


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["hass"] |= changes.pop("hass", {})
    path.write_text(json.dumps(config | changes))


def cause(diagnosis, name) -> Cause:
    (found,) = [c for c in diagnosis.causes if c.name == name]
    return found


def test_a_sound_draft_is_blamed_for_nothing_but_its_own_quality(healthy):
    assert healthy.tau > 1.5, "the fixture must accept something"
    assert {c.name for c in healthy.causes} <= {"depth", "first position", "domain", "context", "sampling"}


def test_wrong_rope_costs_the_tau_it_takes(planted, healthy, tiny_target, questions):
    edit(planted, rope_theta=2.0)
    found = diagnose(planted, tiny_target, questions, SETTINGS)
    rope = cause(found, "rope")
    assert rope.loss == pytest.approx(healthy.tau - found.tau)
    assert rope.loss > 0.02
    assert "'rope_theta': 2.0" in rope.what
    assert "config.json" in rope.mend


def test_a_trimmed_vocabulary_costs_the_tau_it_takes(planted, healthy, tiny_target, questions, answers):
    said = [token for answer in answers[1] for token in answer]
    kept = sorted(set(range(tiny_target.head.shape[0])) - set(sorted(set(said), key=said.count)[-8:]))
    (planted / "draft_vocab.json").write_text(json.dumps(kept))
    edit(planted, hass={"draft_vocab_size": len(kept)})
    found = diagnose(planted, tiny_target, questions, SETTINGS)
    vocabulary = cause(found, "vocabulary")
    assert vocabulary.loss == pytest.approx(healthy.tau - found.tau)
    assert vocabulary.loss > 0.2
    assert vocabulary.matters
    assert f"{len(kept)} of 259 tokens" in vocabulary.what


def test_another_template_is_named_first_and_weighed_once_it_is_given(planted, tiny_target, questions):
    template = CHAT_TEMPLATE.replace("assistant", "robot")
    edit(planted, hass={"target_identity": {"template": template_digest(template)}})
    unknown = diagnose(planted, tiny_target, questions, SETTINGS).causes[0]
    assert (unknown.name, unknown.loss, unknown.matters) == ("template", None, True)
    given = Settings(max_new_tokens=32, trained_template=template)
    weighed = cause(diagnose(planted, tiny_target, questions, given), "template")
    assert weighed.loss is not None
    assert weighed.within is not None
    with pytest.raises(BadInput, match="--trained-template has the hash"):
        diagnose(planted, tiny_target, questions, Settings(max_new_tokens=32, trained_template="other"))


def test_a_draft_of_another_target_is_named(planted, tiny_target, questions):
    edit(planted, hass={"target_fingerprint": "0123", "target": "elsewhere"})
    first = diagnose(planted, tiny_target, questions, SETTINGS).causes[0]
    assert first.what.startswith("the draft was trained for elsewhere, which differs from tiny in its weights")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_how_many_questions_are_answered_at_once_changes_no_greedy_cycle(
    sound, tiny_target, questions, temperature, monkeypatch
):
    draft, asked = load_draft(sound, tiny_target), as_asked(tiny_target.tokenizer, questions)
    heard: list[int] = []
    whole = chain_cycles(tiny_target, draft, asked, temperature, 32, heard.append)
    assert whole == chain_cycles(tiny_target, draft, asked, temperature, 32, heard.append), "the coins stay"
    assert {cycle.question for cycle in whole} == set(range(len(questions)))
    monkeypatch.setattr(chain, "ROWS", 4)
    parts = chain_cycles(tiny_target, draft, asked, temperature, 32, heard.append)
    assert heard == [6, 6, 4, 6]
    assert temperature or parts == whole


def test_progress_counts_questions_and_names_what_is_measured(sound, tiny_target, questions):
    heard: list[tuple[int, int, str]] = []
    diagnose(sound, tiny_target, questions, SETTINGS, lambda *told: heard.append(told))
    assert heard[0] == (0, 42, "as served, 0 of 6")
    assert heard[1] == (6, 42, "as served, 6 of 6")
    assert heard[-1] == (42, 42, "sampling, 6 of 6")


def test_no_question_is_an_error(sound, tiny_target):
    with pytest.raises(BadInput, match="no question to ask"):
        diagnose(sound, tiny_target, [], SETTINGS)


def cycles(*groups: tuple[str, int, int, int]) -> list[Cycle]:
    return [Cycle(0, name, context, accepted) for name, context, accepted, count in groups for _ in range(count)]


def test_cycles_beyond_the_training_length_cost_what_they_take_from_the_mean():
    measured = cycles(("a", 100, 3, 30), ("a", 300, 1, 30))
    found = context_cause(measured, trained_tokens=200)
    assert found is not None
    assert found.loss == pytest.approx(4 - 3)
    assert "30 of 60 cycles lie beyond the 200 tokens" in found.what
    assert "1-128 tokens 4.00, 257-512 tokens 2.00" in found.what
    assert context_cause(measured, trained_tokens=400) is None
    unknown = context_cause(measured, trained_tokens=None)
    assert unknown is not None
    assert not unknown.matters


def test_the_weakest_category_costs_what_it_takes_from_the_mean():
    found = category_cause(cycles(("prose", 9, 3, 30), ("code", 9, 0, 30)))
    assert found is not None
    assert found.loss == pytest.approx(4 - 2.5)
    assert "'code'" in found.mend
    assert category_cause(cycles(("prose", 9, 3, 30))) is None


def test_depth_costs_what_deeper_places_lose_against_the_first():
    found = depth_cause(cycles(("a", 9, 1, 50), ("a", 9, 0, 50)))
    assert found.loss == pytest.approx((0.5 + 0.25 + 0.125 + 0.0625) - 0.5)
    assert found.what == "right drafts at depth 1 to 2, of those tried: 50%, 0%; no cycle got deeper"


def test_the_terminal_shows_cost_and_remedy_of_what_matters(healthy):
    out = io.StringIO()
    show_diagnosis(Console(file=out, width=200), healthy)
    text = out.getvalue()
    assert f"τ {healthy.tau:.2f} of at most 5 (a chain of 4), 6 questions, {healthy.cycles} cycles" in text
    assert "first position  costs" in text
    assert "To mend: the rest is the draft's own quality" in text


def test_the_drafts_own_record_of_its_longest_conversation_is_used(planted, tiny_target, questions):
    config = json.loads((planted / "config.json").read_text())
    config["hass"]["trained_tokens"] = 20  # shorter than every prompt
    (planted / "config.json").write_text(json.dumps(config))
    found = diagnose(planted, tiny_target, questions[:2], SETTINGS)
    assert any("beyond the 20 tokens trained on" in cause.what for cause in found.causes)
