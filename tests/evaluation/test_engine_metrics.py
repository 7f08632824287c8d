"""Engines' pages of metrics, and two servers as judges."""

import pytest

from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.engine_metrics import Acceptance, parse_acceptance, read_acceptance
from hass_core.evaluation.server import Server
from hass_core.evaluation.server_duel import contest
from hass_core.serving.metrics import Metrics

from .engine_server import Engine, running

DRAFTED, ACCEPTED = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total"
QUESTIONS = [Question("b", f"q{n}", "any", ({"role": "user", "content": "Why?"},)) for n in range(3)]


def test_vllms_counters_give_tau_by_position():
    engine = Engine((0.6, 0.3))
    engine.serve(200)
    read = parse_acceptance(engine.page(), "here")
    assert read == Acceptance(drafts=200, by_position=(120, 60, 0))
    assert read.tau == pytest.approx(1.9)


def test_a_reading_counts_from_the_one_before_and_from_zero_after_a_restart():
    engine = Engine((0.5, 0.0))
    engine.serve(100)
    before = parse_acceptance(engine.page(), "here")
    engine.shares = (0.8, 0.4)
    engine.serve(100)
    later = parse_acceptance(engine.page(), "here")
    assert later.since(before).tau == pytest.approx(2.2)
    again = Engine((0.1, 0.0))
    again.serve(50)
    assert parse_acceptance(again.page(), "here").since(later).tau == pytest.approx(1.1)


def test_a_restart_is_seen_although_more_was_drafted_since():
    good, bad = Engine((0.7, 0.3)), Engine((0.1, 0.0))
    good.serve(1000)
    bad.serve(1100)
    before = parse_acceptance(good.page(), "here")
    assert parse_acceptance(bad.page(), "here").since(before).tau == pytest.approx(1.1)


@pytest.mark.parametrize("value", ["NaN", "+Inf"])
def test_counts_that_are_no_numbers_are_refused(value):
    with pytest.raises(BadInput, match=r"here counts (nan|inf) drafts and 5 accepted tokens: no numbers"):
        parse_acceptance(f'{DRAFTED} {value}\n{ACCEPTED}{{position="0"}} 5\n', "here")


@pytest.mark.parametrize("labels", [None, "", '{position="first"}'])
def test_drafts_without_what_was_accepted_of_them_are_refused(labels):
    accepted = "" if labels is None else f"{ACCEPTED}{labels} 5\n"
    with pytest.raises(BadInput, match=f"here counts drafts, but not {ACCEPTED}"):
        parse_acceptance(f"{DRAFTED} 9\n{accepted}", "here")


def test_two_models_on_one_page_are_refused():
    engine = Engine((0.6, 0.3))
    engine.serve(100)
    other = engine.page().replace('"tiny"', '"other"')
    with pytest.raises(BadInput, match=r"here counts drafts of several models \(other, tiny\): pick one"):
        parse_acceptance(engine.page() + other, "here")


def test_sglangs_gauge_is_tau():
    text = '# TYPE sglang:spec_accept_length gauge\nsglang:spec_accept_length{model_name="m",tp_rank="0"} 2.75\n'
    assert parse_acceptance(text, "here").tau == 2.75


def test_the_projects_own_server_is_read_too():
    assert parse_acceptance(Metrics(lambda: 0, lambda: 0).text().decode(), "here").tau is None


def test_a_page_without_such_counts_is_named():
    with pytest.raises(BadInput, match="http://x/metrics counts no speculative decoding"):
        parse_acceptance("# TYPE up gauge\nup 1\n", "http://x/metrics")
    with running(Engine((0, 0))) as engine, pytest.raises(BadInput, match="is no Prometheus page"):
        read_acceptance(f"{engine.url}/v1/models")


def test_two_servers_answer_in_turns_and_tell_what_they_accepted():
    with running(Engine((0.7, 0.4), 0.01)) as fast, running(Engine((0.5, 0.1), 0.03)) as slow:
        fast.serve(1000)  # traffic before the contest does not count
        samplings = (SamplingConfig(), SamplingConfig(temperature=1.0))
        settings = EvaluationConfig(max_new_tokens=8)
        found = contest(Server(fast.url), Server(f"{slow.url}/v1"), QUESTIONS, samplings, 2, settings)
    assert [(b.round, b.challenger.temperature, b.challenger.question) for b in found.bouts] == [
        (lap, t, f"q{q}") for lap in (0, 1) for t in (0.0, 1.0) for q in range(3)
    ]
    assert found.challenger.drafts == 1200
    assert found.challenger.by_position == (pytest.approx(840), pytest.approx(480), 0)
    assert found.champion.tau == pytest.approx(1.6)
    assert all(bout.challenger.seconds >= 0.01 and bout.opponent.seconds >= 0.03 for bout in found.bouts)


def test_a_server_without_a_draft_is_no_side():
    class Undrafted(Engine):
        def serve(self, drafts: float = 0) -> None:
            pass

    with (
        running(Engine((0.7, 0.4))) as drafted,
        running(Undrafted((0, 0))) as bare,
        pytest.raises(BadInput, match=r"the champion's server .* drafted nothing"),
    ):
        contest(Server(drafted.url), Server(bare.url), QUESTIONS, (SamplingConfig(),), 2, EvaluationConfig())


def test_a_server_that_answers_with_no_token_is_no_side():
    refused = pytest.raises(BadInput, match="answered question q0 with no token")
    with running(Engine((0.7, 0.4), answering=lambda asked: (5, []))) as mute, refused:
        contest(Server(mute.url), Server(mute.url), QUESTIONS, (SamplingConfig(),), 2, EvaluationConfig())
