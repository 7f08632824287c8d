"""The gate, people where they are asked, the alias: what a retraining and promote-draft have in common."""

from functools import partial
from typing import cast

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput, delete_flow_run_input, keyset_from_paused_state, read_flow_run_input
from prefect.runtime import deployment
from prefect.states import Suspended
from pydantic import Field

from hass_core.config import RunConfig
from tasks.gate import Verdict
from tasks.promotion import judge_draft, publish, reject, settle_promotion
from tasks.stage_lines import told
from tasks.tracking import DraftVersion


class Approval(RunInput):
    """A person's word on a draft that passed the gate."""

    approved: bool = Field(description="Put this draft in use")
    reason: str = Field(default="a person refused it", min_length=1, description="Why not, for the record")


def decide(config: RunConfig, version: DraftVersion, *, again: bool = False, approval: bool = False) -> Verdict:
    """Judge a registered draft and move the alias as the verdict says; with `approval` a person has the last word.

    The flow run of a deployment is suspended until then: its process ends, and when it is resumed it finds again what
    was measured. In a terminal the draft is left to promote-draft and reject-draft.
    """
    while True:
        verdict = told("gate", partial(judge_draft, config, version, again), lambda verdict: verdict.outcome)
        if approval and verdict.promoted and verdict.champion != version.version:
            waiting = verdict.model_copy(update={"waits": True})
            if deployment.id is None:
                return waiting
            answer = _asked(version, waiting)
            if not answer.approved:
                reject(config, version, answer.reason)
                return verdict.refused(answer.reason)
        if settle_promotion(config, version, verdict):
            return verdict


def _asked(version: DraftVersion, waiting: Verdict) -> Approval:
    """The answer of the person who resumes this flow run; until there is one it is suspended here instead."""
    publish(waiting)
    key = f"version-{version.version}-after-{waiting.champion or 'none'}"  # another champion is another question
    inputs = keyset_from_paused_state(Suspended(pause_key=key))
    if read_flow_run_input(inputs["response"]) is not None:
        return cast(Approval, Approval.load(inputs))  # in a flow that is not async no coroutine
    for part in (inputs["schema"], inputs["description"]):  # asked before a crash: Prefect refuses a second one
        if read_flow_run_input(part) is not None:
            delete_flow_run_input(part)
    form = Approval.with_initial_data(description=waiting.markdown())
    return suspend_flow_run(wait_for_input=form, key=key)
