"""An evaluation that asks serving engines too: what it reports of them, and what it refuses to."""

import threading

import pytest

from hass_core.config import SamplingConfig, TargetConfig
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder
from hass_core.errors import BadInput
from hass_core.evaluation import evaluate
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.evaluation.engine_metrics import read_engine
from hass_core.evaluation.evaluate import PAGE, REPORT, evaluate_folder
from hass_core.evaluation.in_engine import InEngine, RunningServers, StartedVllm
from hass_core.evaluation.report import Report
from hass_core.evaluation.served import _turns, _units
from hass_core.evaluation.server import Server
from hass_core.evaluation.terminal import terminal
from hass_core.serving.metrics import Metrics
from hass_core.target_model.runner import make_runner

from .conftest import TREE
from .engine_server import Engine, running

DRAFTED = (0.5, 0.25)


@pytest.fixture
def answering(tiny_target):
    """The tiny target's own answers, as an engine that serves it would give them."""
    decoder = PlainDecoder(make_runner(tiny_target))

    def answer(asked):
        prompt = encode_prompt(tiny_target.tokenizer, asked["messages"])
        sampling = SamplingConfig(temperature=asked["temperature"])
        (made,) = decoder.generate([prompt], sampling, asked["max_tokens"], StopRule.of(tiny_target))
        return len(prompt), made.token_ids

    return answer


@pytest.fixture
def measured(monkeypatch, tiny_target, draft_dir, settings, tmp_path):
    """The evaluation of the random draft, with these servers."""
    monkeypatch.setattr(evaluate, "load_target", lambda config: tiny_target)

    def run(drafted: Engine, plain: Engine | None = None, rows=(1, 4), named=("plain", "hass"), **changes) -> Report:
        servers = RunningServers(Server(drafted.url), Server(plain.url) if plain else None)
        small = {"max_new_tokens": 8, "lossless_questions": 1, "bootstrap_resamples": 100}
        chosen = settings.model_copy(update=small | changes)
        return evaluate_folder(
            draft_dir, TargetConfig(), chosen, TREE, tmp_path / "out", named, engine=InEngine(servers, rows)
        )

    return run


def test_the_engine_stands_beside_our_own_decoders_by_temperature_and_rows(measured, answering, tmp_path, capsys):
    with running(Engine(DRAFTED, 0.001, answering)) as drafted, running(Engine(None, 0.004, answering)) as plain:
        report = measured(drafted, plain, temperatures=(0.0, 1.0))
    kinds = [(s.temperature, s.rows, s.chain) for s in report.served]
    assert kinds == [(t, rows, chain) for t in (0.0, 1.0) for rows in (1, 4) for chain in (3, 0)]
    for with_draft, without in zip(report.served[::2], report.served[1::2], strict=True):
        assert with_draft.tau.value == pytest.approx(1.75)
        assert [round(share.value, 2) for share in with_draft.acceptance_by_depth] == [0.5, 0.25, 0]
        assert with_draft.speedup.low <= with_draft.speedup.value <= with_draft.speedup.high
        assert (without.tau, without.requests) == (None, with_draft.requests)
    assert [s.requests for s in report.served[:4:2]] == [4, 8]  # four turns; two groups of four
    assert Report.model_validate_json((tmp_path / "out" / REPORT).read_text()) == report
    page = (tmp_path / "out" / PAGE).read_text()
    assert "Here and in the engine" in page
    assert "vLLM, chain of 3" in page
    assert "here, HASS" in page
    assert drafted.url in page
    assert terminal(report)


def test_a_later_turn_is_asked_behind_our_own_answer_and_all_settings_of_sampling_are_sent(
    measured, answering, tiny_target, settings
):
    with running(Engine(DRAFTED, answering=answering)) as drafted:
        measured(drafted, rows=(1,), temperatures=(0.7,))
    second = next(asked for asked in drafted.asked if len(asked["messages"]) == 3)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][2]["content"] == "Now shorter."
    # an engine fills in the target's generation_config.json where a request says nothing
    sent = {name: second[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    assert sent == {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert "seed" not in second


def test_a_server_without_a_draft_is_refused(measured, answering):
    with running(Engine(None, answering=answering)) as bare, pytest.raises(BadInput, match="drafted nothing"):
        measured(bare)


def test_a_plain_server_that_drafts_is_refused(measured, answering):
    with (
        running(Engine(DRAFTED, answering=answering)) as drafted,
        running(Engine(DRAFTED, answering=answering)) as plain,
        pytest.raises(BadInput, match=f"{plain.url} drafts, so it cannot be the plain one"),
    ):
        measured(drafted, plain)


@pytest.mark.parametrize(
    ("says", "told"),
    [("True", "is the one for CPUs, .* figures would be wrong: leave --temperatures at 0"), (None, "has no vLLM that")],
)
def test_a_vllm_that_draws_wrongly_or_is_none_is_refused_before_anything_is_measured(
    tiny_target, settings, tmp_path, says, told
):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {says}\n" if says else "#!/bin/sh\necho No module >&2\nexit 1\n")
    python.chmod(0o755)
    (question, *_) = load_benchmarks(settings)
    started = StartedVllm(str(python), "", (3,))
    with pytest.raises(BadInput, match=told):
        started.check(tiny_target, question, (0.0, 0.7))
    started.check(tiny_target, question, (0.0,))  # greedy answers are right there


def test_our_own_plain_answers_are_the_history_whether_plain_was_named_or_not(measured, answering):
    with running(Engine(DRAFTED, answering=answering)) as drafted:
        assert measured(drafted, rows=(1,), named=("hass",)).served


def test_a_server_of_another_model_is_refused(measured, answering):
    def other(asked):
        prompt, ids = answering(asked)
        return prompt, [(token + 1) % 200 for token in ids]

    with (
        running(Engine(DRAFTED, answering=other)) as engine,
        pytest.raises(BadInput, match="serves another model"),
    ):
        measured(engine)


def test_a_server_with_another_chat_template_is_refused(measured, answering):
    def other(asked):
        prompt, ids = answering(asked)
        return prompt + 2, ids

    with (
        running(Engine(DRAFTED, answering=other)) as engine,
        pytest.raises(BadInput, match="or chat template"),
    ):
        measured(engine)


def test_other_traffic_meanwhile_is_refused(measured, answering):
    """Somebody asks the server too, beside every question once they have begun: one alone may come between two."""
    theirs = 5

    def intruded(asked):
        if asked["max_tokens"] != theirs and len(engine.asked) >= 3:
            threading.Timer(0, lambda: Server(engine.url).answer(asked["messages"], SamplingConfig(), theirs)).start()
        return answering(asked)

    with (
        running(Engine(DRAFTED, 0.1, intruded)) as engine,
        pytest.raises(BadInput, match=r"its counters grew by \d+ and \d+: it serves others too"),
    ):
        measured(engine)


def test_answers_that_are_never_counted_are_refused(answering, monkeypatch):
    monkeypatch.setattr("hass_core.evaluation.server.COUNTING_SECONDS", 0.1)
    with running(Engine(DRAFTED, answering=answering)) as engine, running(Engine(DRAFTED)) as other:
        server, elsewhere = Server(engine.url), Server(other.url)
        answer = server.answer([{"role": "user", "content": "Hi"}], SamplingConfig(), 4)
        with pytest.raises(BadInput, match="counters grew by 0 and 0"):
            elsewhere.reading_after(elsewhere.reading(), [answer])


def test_a_short_benchmark_fills_two_groups_at_least(tiny_target, settings):
    from hass_core.evaluation.benchmarks import load_benchmarks
    from hass_core.evaluation.metrics import Measurement

    questions = load_benchmarks(settings)
    own = [
        Measurement(
            benchmark=q.benchmark, question=q.id, category="", temperature=0, method="plain", prompt_tokens=1,
            new_tokens=1, seconds=1, decode_seconds=1, accepted=[], drafted_depth=[], token_ids=ids,
        )
        for q, ids in zip(questions, [[[65], [66]], [[67]], [[68]]], strict=True)
    ]  # fmt: skip
    turns = _turns(questions, own, 0.0, tiny_target)
    assert [len(unit.turns) for unit in _units(turns, 1)] == [2, 1, 1]
    assert [len(unit.turns) for unit in _units(turns, 3)] == [3, 3]
    assert [len(unit.turns) for unit in _units(turns, 16)] == [16, 16]


def test_sglangs_verifications_give_tau_from_what_was_generated(tmp_path):
    page = (
        "# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs 0\n"
        "# TYPE sglang:num_requests counter\nsglang:num_requests_total 10\n"
        "# TYPE sglang:generation_tokens counter\nsglang:generation_tokens_total 310\n"
        "# TYPE sglang:spec_verify_calls counter\nsglang:spec_verify_calls_total 100\n"
        "# TYPE sglang:spec_accept_length gauge\nsglang:spec_accept_length 9\n"
    )
    engine = Engine(DRAFTED)
    engine.page = lambda: page
    with running(engine):
        read = read_engine(f"{engine.url}/metrics")
    assert (read.engine, read.requests, read.tokens) == ("SGLang", 10, 310)
    assert read.acceptance.tau == pytest.approx(3.0)  # 300 tokens behind the first ones, 100 verifications
    assert read.acceptance.since(None).tau == pytest.approx(3.0)


def test_the_projects_own_server_is_an_engine_too():
    engine = Engine(DRAFTED)
    engine.page = lambda: Metrics(lambda: 0, lambda: 0).text().decode()
    with running(engine):
        read = read_engine(f"{engine.url}/metrics")
    assert (read.engine, read.requests, read.tokens) == ("hass serve", 0, 0)
