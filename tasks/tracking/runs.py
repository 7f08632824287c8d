"""Parent and child runs: open or continue them, record what a stage made."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.time import get_current_time_millis

from hass_core.config import RunConfig
from hass_core.store import Artifact, Store, digest_of
from hass_core.store.provenance import code_commit
from hass_core.training.metrics import read_metrics
from tasks.tracking.client import connect, experiment_id, tracking_uri
from tasks.tracking.lock import locked
from tasks.tracking.metrics import Follower
from tasks.tracking.names import stage_metrics
from tasks.tracking.outage import outage_in

UNTRACKED = {"name", "store", "tracking", "promotion", "watch", "execution"}  # settings that change no result
RUNNING, FINISHED = "RUNNING", "FINISHED"
WARM_START = "hass.warm_start"  # tag of a parent run: the draft it continues from
PARENT = "mlflow.parentRunId"
FILES_SHOWN = (".json", ".html", ".jsonl")
PARAMS_PER_CALL = 100  # MLflow's limit


def run_digest(config: RunConfig, prompts: Artifact, made_by: Mapping[str, Any]) -> str:
    """Identity of a retraining: its settings, its prompts, and what else decides its results."""
    settings = config.model_dump(mode="json", exclude=UNTRACKED)
    return digest_of({"settings": settings, "prompts": prompts.digest, **made_by})


@contextmanager
def open_retraining(
    config: RunConfig,
    prompts: Artifact,
    tags: Mapping[str, str],
    made_by: Mapping[str, Any] = MappingProxyType({}),
    continues: str | None = None,
) -> Iterator[str]:
    """The parent run's id; a run with the same settings, prompts and `made_by` is continued, or the one named.

    `made_by` holds what decides results besides: target, machine, versions of the steps. On leaving, the run is
    FINISHED, KILLED after Ctrl-C, or FAILED. One that was finished before stays as it is until a stage is added, and is
    FINISHED again if that stage fails. `tags` link it to what started it.
    """
    client = connect(config)
    digest = run_digest(config, prompts, made_by)
    if continues:
        run = client.get_run(continues)
    else:
        run = _find_or_create(client, config, {"hass.run": digest}, f"{config.name}-{digest[:6]}")
    if run.info.status != FINISHED:
        _take_over(client, run, tags)
        _add_parameters(client, run, flatten(config.model_dump(mode="json", exclude=UNTRACKED)))
    with _ending(client, run):
        yield run.info.run_id


def find_recorded(config: RunConfig, artifacts: Iterable[Artifact]) -> str | None:
    """The finished parent run that records just these artifacts, or None."""
    client = connect(config)
    digests = {f"hass.digest.{artifact.stage}": artifact.digest for artifact in artifacts}
    found = _find(client, experiment_id(client, config), digests, f" and attributes.status = '{FINISHED}'")
    return found.info.run_id if found and PARENT not in found.data.tags else None


def recorded_warm_start(
    config: RunConfig, prompts: Artifact, made_by: Mapping[str, Any], continues: str | None
) -> str | None:
    """Which draft the retraining that would be opened began from; None where there is no such retraining yet."""
    client = connect(config)
    identity = {"hass.run": run_digest(config, prompts, made_by)}
    run = client.get_run(continues) if continues else _find(client, experiment_id(client, config), identity)
    return run.data.tags.get(WARM_START) if run else None


def is_recorded(config: RunConfig, run_id: str, artifact: Artifact) -> bool:
    """Whether a run holds this stage's record, whole."""
    tags = connect(config).get_run(run_id).data.tags
    return tags.get(f"hass.digest.{artifact.stage}") == artifact.digest


def tags_of(client: MlflowClient, run_id: str) -> dict[str, str]:
    """A run's tags."""
    return dict(client.get_run(run_id).data.tags)


def is_running(client: MlflowClient, run_id: str) -> bool:
    """Whether a run is under way."""
    return client.get_run(run_id).info.status == RUNNING


def resume(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Take a run over again that a sub-flow has filled and ended, with one's own tags."""
    _take_over(client, client.get_run(run_id), tags)


class StageRun:
    """One stage's child run."""

    def __init__(self, client: MlflowClient, run: Run, parent: str):
        self.client, self.run, self.parent = client, run, parent
        self.id: str = run.info.run_id

    @contextmanager
    def following(self, metrics_file: Path) -> Iterator[None]:
        """Copy a growing metrics.jsonl into the child and the parent run while the block runs."""
        with Follower(self.client, [self.id, self.parent], metrics_file):
            yield

    def record(self, store: Store, artifact: Artifact, inputs: Mapping[str, Artifact]) -> None:
        """Write down a finished stage once: numbers, files people look at, digests, inputs; and end its run.

        Last comes the digest at the parent: where it stands the stage is never opened again.
        """
        self._record_files(store, artifact)
        self.client.update_run(self.id, name=f"{artifact.stage}-{artifact.digest[:6]}")
        self.client.set_tag(self.id, f"hass.url.{artifact.stage}", artifact.url)
        self._record_numbers(self.id, store, artifact, inputs)
        self.client.set_terminated(self.id, FINISHED)
        self._record_numbers(self.parent, store, artifact, inputs)

    def _record_numbers(self, run_id: str, store: Store, artifact: Artifact, inputs: Mapping[str, Artifact]) -> None:
        """Numbers and inputs, and behind them the digest: where it stands they are not written twice."""
        recorded = f"hass.digest.{artifact.stage}"
        if tags_of(self.client, run_id).get(recorded) == artifact.digest:
            return
        _log_numbers(self.client, run_id, stage_metrics(artifact))
        self.client.log_inputs(run_id, [_dataset(store, name, value) for name, value in inputs.items()])
        self.client.set_tag(run_id, recorded, artifact.digest)

    def _record_files(self, store: Store, artifact: Artifact) -> None:
        folder = store.open(artifact)
        manifest = folder.manifest()
        assert manifest is not None
        self.client.log_text(self.id, manifest.model_dump_json(indent=2), f"{artifact.stage}/manifest.json")
        for name in sorted(manifest.files):
            if not name.endswith(FILES_SHOWN):
                continue
            path = folder.local_path(name)
            for run_id in (self.id, self.parent):
                self.client.log_artifact(run_id, str(path), artifact.stage)
            if name == "metrics.jsonl":  # what was missed while MLflow was away
                Follower(self.client, [self.id, self.parent], path).log(read_metrics(path.read_text()))


@contextmanager
def stage_run(config: RunConfig, parent: str, stage: str) -> Iterator[StageRun]:
    """The stage's child run, found again or new, with system metrics while the block runs."""
    client = connect(config)
    run = _find_or_create(client, config, {PARENT: parent, "hass.stage": stage}, stage)
    for opened in (client.get_run(parent), run):
        if opened.info.status != RUNNING:
            _take_over(client, opened, {})
    section = {"evaluation": ("evaluation", "tree"), "draft": ("draft", "pretraining", "training")}.get(stage, (stage,))
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name in section}
    _add_parameters(client, run, flatten(settings))
    monitor = SystemMetricsMonitor(run.info.run_id, resume_logging=True, tracking_uri=tracking_uri(config))
    with _ending(client, run):
        monitor.start()
        try:
            yield StageRun(client, run, parent)
        finally:
            monitor.finish()


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"training": {"passes": 2}}` → `{"training.passes": "2"}`."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _find_or_create(client: MlflowClient, config: RunConfig, identity: Mapping[str, str], name: str) -> Run:
    """The run with these tags; two processes that look for it at once get the same one."""
    experiment = experiment_id(client, config)
    run = _find(client, experiment, identity)
    if run is None:
        with locked(client, f"hass-run-{digest_of({'experiment': experiment, **identity})}"):
            run = _find(client, experiment, identity) or _create(client, experiment, identity, name)
    return run


def _take_over(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    client.update_run(run.info.run_id, status=RUNNING)
    for key, value in tags.items():
        client.set_tag(run.info.run_id, key, value)


def _find(client: MlflowClient, experiment: str, identity: Mapping[str, str], further: str = "") -> Run | None:
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment], condition + further, max_results=1)
    return found[0] if found else None


def _create(client: MlflowClient, experiment: str, identity: Mapping[str, str], name: str) -> Run:
    source = {"mlflow.source.name": "hass", "mlflow.source.git.commit": code_commit() or "unknown"}
    source["mlflow.user"] = _user()
    return client.create_run(experiment, tags={**source, **identity}, run_name=name)


def _user() -> str:
    """Who runs this: the tracking server's user, else the system's."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


@contextmanager
def _ending(client: MlflowClient, before: Run) -> Iterator[None]:
    """Give the run its last status, if it is under way when the block ends. `before`: as it was found."""
    run_id = before.info.run_id

    def end(status: str, end_time: int | None = None) -> None:
        if is_running(client, run_id):
            client.set_terminated(run_id, status, end_time)

    try:
        yield
    except BaseException as error:
        if outage_in(error):
            raise  # it would be asked in vain, for minutes; whoever continues the run takes it over
        if before.info.status == FINISHED:  # what it holds is still true
            end(FINISHED, before.info.end_time)
        else:
            end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    end(FINISHED)


def _add_parameters(client: MlflowClient, run: Run, parameters: Mapping[str, str]) -> None:
    new = [Param(key, value) for key, value in parameters.items() if key not in run.data.params]
    try:
        for start in range(0, len(new), PARAMS_PER_CALL):
            client.log_batch(run.info.run_id, params=new[start : start + PARAMS_PER_CALL])
    except MlflowException:  # MLflow refuses parameters that another process writes at the same moment
        if not parameters.keys() <= client.get_run(run.info.run_id).data.params.keys():
            raise


def _log_numbers(client: MlflowClient, run_id: str, numbers: Mapping[str, float]) -> None:
    now = get_current_time_millis()
    client.log_batch(run_id, metrics=[Metric(name, float(value), now, 0) for name, value in numbers.items()])


def _dataset(store: Store, context: str, artifact: Artifact) -> DatasetInput:
    """A stage as a data set, with the columns of its files and its numbers."""
    dataset = Dataset(
        name=artifact.stage,
        digest=artifact.digest,
        source_type="hass",
        source=artifact.url,
        schema=json.dumps({"mlflow_colspec": _columns(store, artifact)}),
        profile=json.dumps(artifact.summary, default=str),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _columns(store: Store, artifact: Artifact) -> list[dict[str, str]]:
    """Names and types of the columns of a stage's Parquet files, which are all alike; none where it has no such."""
    folder = store.open(artifact)
    manifest = folder.manifest()
    assert manifest is not None
    tables = sorted(name for name, file in manifest.files.items() if name.endswith(".parquet") and file.rows != 0)
    if not tables:
        return []
    with folder.open(tables[0]) as file:
        schema = pq.read_schema(file)
    return [{"name": field.name, "type": str(field.type)} for field in schema]
