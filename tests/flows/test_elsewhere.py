"""A stage on another worker: a sub-flow of its own deployment, found again by the flow that asked for it."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from flows.parameters import RunParameters
from hass_core.errors import HassError
from tasks import deployment, elsewhere


def test_the_sub_flow_gets_the_same_settings_and_runs_its_stages_itself():
    run = RunParameters.model_validate({"training": {"passes": 2}, "deployments": {"draft": "train-draft/gpu"}})
    inner = RunParameters.model_validate(run.for_sub_flow("run-id"))
    assert inner.continues == "run-id"
    assert inner.deployments == {}
    assert inner.config() == run.config()


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="deployments"):
        RunParameters.model_validate({"deployments": {"drafft": "train-draft/gpu"}})


def test_a_sub_flow_that_fails_is_named(monkeypatch):
    state = SimpleNamespace(name="Crashed", is_completed=lambda: False)
    monkeypatch.setattr(
        deployment, "run_deployment", lambda *given, **named: SimpleNamespace(name="busy-bee", state=state)
    )
    monkeypatch.setattr(elsewhere.tracking, "connect", lambda config: None)
    monkeypatch.setattr(elsewhere.tracking, "is_running", lambda client, run_id: True)
    config = RunParameters.model_validate({}).config()
    with pytest.raises(HassError, match=r"train-draft/gpu ran as flow run 'busy-bee' and ended as Crashed"):
        elsewhere.run_elsewhere("draft", "train-draft/gpu", {}, config, "run")
