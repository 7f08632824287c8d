"""The gate's verdict, a person's word, and the alias that follows them."""

from types import SimpleNamespace

import pytest

from flows import decision
from flows.decision import Approval, decide
from hass_core.config import load_config
from hass_core.store import Artifact
from tasks.gate import Verdict
from tasks.tracking import DraftVersion

VERSION = DraftVersion(
    model="draft", version="4", alias="challenger", draft=Artifact(root="/store", stage="draft", digest="d")
)
PASSED = Verdict(promoted=True, reasons=("the gain is +5 %",), challenger="4", champion="3")


@pytest.fixture
def done(monkeypatch):
    """What was done, in order; the gate lets the draft pass."""
    calls = []
    monkeypatch.setattr(decision, "judge_draft", lambda config, version, again: PASSED)
    monkeypatch.setattr(decision, "publish", lambda verdict: calls.append(verdict.outcome))
    monkeypatch.setattr(decision, "reject", lambda config, version, reason: calls.append(f"rejected: {reason}"))
    monkeypatch.setattr(decision, "settle_promotion", lambda config, version, verdict: calls.append("settled") or True)
    monkeypatch.setattr(decision, "deployment", SimpleNamespace(id="of a deployment"))
    monkeypatch.setattr(decision, "read_flow_run_input", lambda key: None)
    return calls


def answering(monkeypatch, **answer):
    asked = []

    def suspend(wait_for_input, key):
        asked.append((key, wait_for_input._description))
        return Approval(**answer)

    monkeypatch.setattr(decision, "suspend_flow_run", suspend)
    return asked


def test_without_approval_the_verdict_decides(done):
    assert decide(load_config("smollm2-cpu"), VERSION) == PASSED
    assert done == ["settled"]


def test_a_person_who_approves_is_shown_the_verdict_and_the_alias_moves(done, monkeypatch):
    asked = answering(monkeypatch, approved=True)
    assert decide(load_config("smollm2-cpu"), VERSION, approval=True).outcome == "promoted"
    assert done == ["waits for approval", "settled"]
    ((key, shown),) = asked
    assert key == "version-4-after-3"
    assert "## Version 4: waits for approval, version 3 stays champion" in shown
    assert "the gain is +5 %" in shown


def test_a_person_who_refuses_keeps_the_champion(done, monkeypatch):
    answering(monkeypatch, approved=False, reason="a load test is in the log")
    verdict = decide(load_config("smollm2-cpu"), VERSION, approval=True)
    assert verdict.outcome == "not promoted"
    assert verdict.reasons[0] == "a load test is in the log"
    assert done == ["waits for approval", "rejected: a load test is in the log"]


def test_in_a_terminal_nobody_can_resume_so_the_draft_waits(done, monkeypatch):
    monkeypatch.setattr(decision, "deployment", SimpleNamespace(id=None))
    assert decide(load_config("smollm2-cpu"), VERSION, approval=True).waits
    assert done == []


def test_when_another_promotion_came_first_the_draft_is_judged_again(done, monkeypatch):
    judged = []
    monkeypatch.setattr(decision, "judge_draft", lambda config, version, again: judged.append(version) or PASSED)
    monkeypatch.setattr(decision, "settle_promotion", lambda config, version, verdict: len(judged) == 2)
    assert decide(load_config("smollm2-cpu"), VERSION) == PASSED
    assert len(judged) == 2


def test_what_does_not_pass_needs_no_person(done, monkeypatch):
    refused = PASSED.model_copy(update={"promoted": False})
    monkeypatch.setattr(decision, "judge_draft", lambda config, version, again: refused)
    assert decide(load_config("smollm2-cpu"), VERSION, approval=True) == refused
    assert done == ["settled"]
