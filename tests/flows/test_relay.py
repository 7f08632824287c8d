"""A retraining stage by stage on other workers: who waits for them loads nothing."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from prefect.states import Completed, Failed

from flows import relay
from flows.parameters import RunParameters
from hass_core.errors import ConfigError, HassError
from tasks import deployment
from tests.flows.stack import ROOT

RUN = RunParameters.model_validate({"training": {"passes": 2}, "deployments": {"draft": "train-draft/gpu"}})


@pytest.fixture
def asked(monkeypatch):
    """The deployments asked for, in order; the last one says that nothing was new."""
    calls = []

    def run_deployment(name, parameters, as_subflow):
        calls.append((name, parameters))
        ended = Failed(name="Crashed") if name == "broken/gpu" else Completed(name="Nothing new", message="as before")
        return SimpleNamespace(name="busy-bee", state=ended)

    monkeypatch.setattr(deployment, "run_deployment", run_deployment)
    return calls


def test_each_deployment_gets_the_settings_and_runs_its_stages_itself(asked):
    ended = relay.relay.fn(RUN)
    assert (ended.name, ended.message) == ("Nothing new", "as before")
    assert [name for name, _ in asked] == list(relay.GPU)
    for _, parameters in asked:
        inner = RunParameters.model_validate(parameters["run"])
        assert inner.deployments == {}
        assert inner.config() == RUN.config()


def test_what_does_not_complete_ends_it_and_is_named(asked):
    with pytest.raises(HassError, match=r"broken/gpu ran as flow run 'busy-bee' and ended as Crashed"):
        relay.relay.fn(RUN, ("generate-data/gpu", "broken/gpu", "retrain/gpu"))
    assert [name for name, _ in asked] == ["generate-data/gpu", "broken/gpu"]


def test_a_wrong_setting_is_told_before_anything_starts(asked):
    with pytest.raises(ConfigError, match="no such setting"):
        relay.relay.fn(RunParameters.model_validate({"overrides": ["training.pases=2"]}))
    assert asked == []


def test_the_one_who_waits_does_not_even_load_torch():
    told = (
        "import sys, flows.relay; print([name for name in ('torch', 'transformers', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
