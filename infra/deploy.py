"""Work pools, automations and deployments on the Prefect server of PREFECT_API_URL: `make deploy`.

May be repeated, and a second time changes nothing. What is absent is created; deployments and automations that are ours
follow prefect.yaml and automations.yaml. What an operator set stays: pools with their templates and limits, the
concurrency limit and job variables of a deployment, a paused deployment, a schedule switched off.

Where the workers find the code is the environment's choice when this runs:

    HASS_CODE_REPOSITORY   a git address: each run clones it at $HASS_CODE_COMMIT (default: this checkout's commit)
    HASS_CODE_DIRECTORY    a folder on every worker, such as /app of the image
    neither                this checkout's folder, for workers on this machine

With HASS_NOTIFY_BLOCK=TYPE/NAME, a notification block such as slack-webhook/team, messages are sent through it.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from flows.prefect_server import wait_for_server
from hass_core.errors import ConfigError
from infra.mistakes import in_one_sentence

INFRA = Path(__file__).parent
ROOT = INFRA.parent
POOLS = {"cpu": 1, "gpu": 1}
"""Runs that a new pool allows at once: two on one machine would spoil each other's timings and memory."""
GIT_SECONDS = 60
WHOLE_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a shorter one no server looks up


async def create_pools(client: PrefectClient) -> None:
    """The process pools that are absent; one that is there stays as it is, whatever its type."""
    for name, limit in POOLS.items():
        try:
            await client.read_work_pool(name)
        except ObjectNotFound:
            await client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
            print(f"work pool {name} created, {limit} run at once")


async def put_automations(client: PrefectClient) -> None:
    """Create our automations, or bring them up to date by name; whether one is switched off is the operator's."""
    for definition in yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]:
        actions = [await _resolved(client, action) for action in definition["actions"]]
        if None in actions:
            continue
        wanted = AutomationCore.model_validate({**definition, "actions": actions})
        existing = await client.read_automations_by_name(wanted.name)
        if not existing:
            await client.create_automation(wanted)
            print(f"automation {wanted.name} created")
        for automation in existing:
            kept = wanted.model_copy(update={"enabled": automation.enabled})
            if _core(automation) != _core(kept):
                await client.update_automation(automation.id, kept)
                print(f"automation {wanted.name} updated")


async def _resolved(client: PrefectClient, action: dict[str, Any]) -> dict[str, Any] | None:
    """An action with the ids of what it names; None where it needs a block that the environment does not name."""
    action = dict(action)
    if name := action.pop("deployment", None):
        action |= {"source": "selected", "deployment_id": (await client.read_deployment_by_name(name)).id}
    if variable := action.pop("block", None):
        kind, _, name = os.environ.get(variable, "").partition("/")
        if not kind:
            return None
        try:
            action["block_document_id"] = (await client.read_block_document_by_name(name, kind)).id
        except ObjectNotFound:
            raise ConfigError(f"{variable} = {kind}/{name}: Prefect has no such block; make it in its UI") from None
    return action


def _core(automation: AutomationCore) -> dict[str, Any]:
    """What an automation does, without the ids that the server gave it and its parts."""
    return _without_ids(automation.model_dump(mode="json", include=set(AutomationCore.model_fields)))


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_ids(part) for name, part in value.items() if name not in ("id", "owner_resource")}
    if isinstance(value, list):
        parts = [_without_ids(part) for part in value]
        return sorted(parts) if all(isinstance(part, str) for part in parts) else parts  # sets have no order
    return value


def with_code(definition: dict[str, Any]) -> dict[str, Any]:
    """prefect.yaml with the step that brings the code to a worker."""
    repository, folder = os.environ.get("HASS_CODE_REPOSITORY"), os.environ.get("HASS_CODE_DIRECTORY")
    if repository:
        commit = os.environ.get("HASS_CODE_COMMIT") or _commit()
        check_commit(repository, commit)
        step = {"git_clone": {"repository": repository, "commit_sha": commit}}
    else:
        step = {"set_working_directory": {"directory": folder or str(ROOT)}}
    return {**definition, "pull": [{f"prefect.deployments.steps.{name}": what} for name, what in step.items()]}


def _commit() -> str:
    """This checkout's; that it has changes which no clone will have is told."""
    head = _git("-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        raise ConfigError("HASS_CODE_COMMIT is not set, and this folder is no git checkout that could name one")
    if _git("-C", str(ROOT), "status", "--porcelain", "-uno"):
        print(f"{ROOT} has changes that are in no commit: runs clone {head} without them")
    return head


def check_commit(repository: str, commit: str) -> None:
    """Raise ConfigError where the repository answers and a worker could not fetch this commit from it: its runs would
    crash without a reason. One that does not answer here may answer workers. So too for an address with a key."""
    if re.match(r"https?://[^/]*@", repository):
        raise ConfigError(
            "HASS_CODE_REPOSITORY holds a user or a key, and deployments are recorded; leave it out, and let git on "
            "the workers know it (a credential helper)"
        )
    if _git("ls-remote", repository, "HEAD") is None:
        print(f"HASS_CODE_REPOSITORY = {repository} does not answer here: whether it has {commit} is not known")
        return
    with tempfile.TemporaryDirectory(prefix="hass-") as folder:
        _git("init", "--quiet", folder)
        fetch = ("fetch", "--quiet", "--depth=1", "--filter=tree:0", repository, commit)  # as Prefect's step does
        if not WHOLE_COMMIT.fullmatch(commit) or _git("-C", folder, *fetch) is None:
            raise ConfigError(
                f"{repository} has no commit {commit}, so no worker could clone it: push it first, or name another "
                "one in HASS_CODE_COMMIT, whole"
            )


def _git(*arguments: str) -> str | None:
    """What git prints; None where it fails, or waits for a password that nobody gives."""
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(["git", *arguments], env=environment, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()


def with_limits(definition: dict[str, Any], before: list[DeploymentResponse]) -> dict[str, Any]:
    """prefect.yaml with the limits that an operator set: one left out would be deleted, with the leases of its runs."""
    limits = {(known.name, known.entrypoint): known.global_concurrency_limit for known in before}
    deployments = []
    for deployment in definition["deployments"]:
        if limit := limits.get((deployment["name"], deployment["entrypoint"])):
            deployment = {**deployment, "concurrency_limit": limit.limit}
            print(
                f"{deployment['name']} ({deployment['entrypoint']}) keeps its concurrency limit of {limit.limit}: with "
                "one, Prefect ends runs whose server is away or restarted; a limit of the pool does not"
            )
        deployments.append(deployment)
    return {**definition, "deployments": deployments}


def deploy_all(before: list[DeploymentResponse]) -> None:
    """`prefect deploy --all` with the pull step."""
    definition = with_limits(with_code(yaml.safe_load((ROOT / "prefect.yaml").read_text())), before)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="hass-") as file:
        yaml.safe_dump(definition, file, sort_keys=False)
        file.flush()
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file.name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"prefect deploy --all failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


async def restore(client: PrefectClient, before: DeploymentResponse) -> None:
    """Give a deployment back what its operator had set before `prefect deploy`."""
    after = await client.read_deployment(before.id)
    if before.paused and not after.paused:
        await client.pause_deployment(before.id)
    kept = with_job_variables(before.job_variables or {}, after.job_variables or {})
    if kept != after.job_variables:
        await client.update_deployment(before.id, DeploymentUpdate(job_variables=kept))
    inactive = {schedule.slug for schedule in before.schedules if not schedule.active}
    for schedule in after.schedules:
        if schedule.slug in inactive and schedule.active:
            await client.update_deployment_schedule(before.id, schedule.id, active=False)


def with_job_variables(set_before: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Both, ours where they differ; of the environment each variable by itself."""
    both = set_before | ours
    if "env" in ours and "env" in set_before:
        both["env"] = set_before["env"] | ours["env"]
    return both


async def deploy() -> None:
    """Create what is absent, change what is ours. Raises HassError naming what the server or a block lacks."""
    if not (url := get_current_settings().api.url):
        raise ConfigError(
            "PREFECT_API_URL is not set, and deployments live on a server: make stack or `prefect server "
            "start` starts one, then PREFECT_API_URL=http://127.0.0.1:4200/api make deploy"
        )
    wait_for_server(url)
    async with get_client() as client:
        await create_pools(client)
        before = await client.read_deployments()
        await asyncio.to_thread(deploy_all, before)
        for deployment in before:
            await restore(client, deployment)
        await put_automations(client)
        names = sorted(deployment.name for deployment in await client.read_deployments())
    print(f"{len(names)} deployments are up to date")


if __name__ == "__main__":
    in_one_sentence(lambda: asyncio.run(deploy()))
