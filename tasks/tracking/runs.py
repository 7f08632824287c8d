"""Parent and child runs: open or continue them, record what a stage made."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.time import get_current_time_millis

from hass_core.config import RunConfig
from hass_core.store import Artifact, Store, digest_of
from hass_core.store.provenance import code_commit
from tasks.tracking.client import connect, experiment_id, tracking_uri
from tasks.tracking.lock import locked
from tasks.tracking.metrics import Follower, read_metrics
from tasks.tracking.names import stage_metrics

UNTRACKED = {"name", "store", "tracking", "promotion", "execution"}  # settings that change no result
FILES_SHOWN = (".json", ".md", ".png", ".jsonl")
PARAMS_PER_CALL = 100  # MLflow's limit


def run_digest(config: RunConfig, prompts: Artifact) -> str:
    """Identity of a retraining: its settings and its prompts."""
    return digest_of({"settings": config.model_dump(mode="json", exclude=UNTRACKED), "prompts": prompts.digest})


@contextmanager
def open_retraining(config: RunConfig, prompts: Artifact, tags: Mapping[str, str]) -> Iterator[str]:
    """The parent run's id; a run with the same settings and prompts is continued.

    On leaving, the run is FINISHED, KILLED after Ctrl-C, or FAILED. `tags` link it to what started it.
    """
    client = connect(config)
    digest = run_digest(config, prompts)
    run = _find_or_create(client, config, {"hass.run": digest}, f"{config.name}-{digest[:6]}", tags)
    _add_parameters(client, run, flatten(config.model_dump(mode="json", exclude=UNTRACKED)))
    with _ending(client, run.info.run_id):
        yield run.info.run_id


def resume(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Take a run over again that a sub-flow has filled and ended; its tags, those of `tags` put in."""
    client.update_run(run_id, status="RUNNING")
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    return dict(client.get_run(run_id).data.tags)


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
        """Write down a finished stage once: numbers, files people look at, digests, inputs."""
        stage = artifact.stage
        if self.run.data.tags.get(f"hass.digest.{stage}") == artifact.digest:
            return
        self._record_files(store, artifact)
        self.client.update_run(self.id, name=f"{stage}-{artifact.digest[:6]}")
        self.client.set_tag(self.id, f"hass.url.{stage}", artifact.url)
        for run_id in (self.parent, self.id):
            _log_numbers(self.client, run_id, stage_metrics(artifact))
            self.client.log_inputs(run_id, [_dataset(name, value) for name, value in inputs.items()])
            self.client.set_tag(run_id, f"hass.digest.{stage}", artifact.digest)  # last: its presence ends the record

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
    identity = {"mlflow.parentRunId": parent, "hass.stage": stage}
    run = _find_or_create(client, config, identity, stage, {})
    section = {"evaluation": ("evaluation", "tree"), "draft": ("draft", "pretraining", "training")}.get(stage, (stage,))
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name in section}
    _add_parameters(client, run, flatten(settings))
    monitor = SystemMetricsMonitor(run.info.run_id, resume_logging=True, tracking_uri=tracking_uri(config))
    with _ending(client, run.info.run_id):
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


def _find_or_create(
    client: MlflowClient, config: RunConfig, identity: Mapping[str, str], name: str, tags: Mapping[str, str]
) -> Run:
    """The run with these tags; two processes that look for it at once get the same one."""
    experiment = experiment_id(client, config)
    run = _find(client, experiment, identity)
    if run is None:
        with locked(client, f"hass-run-{digest_of({'experiment': experiment, **identity})}"):
            run = _find(client, experiment, identity) or _create(client, experiment, identity, name)
    client.update_run(run.info.run_id, status="RUNNING")
    for key, value in tags.items():
        client.set_tag(run.info.run_id, key, value)
    return run


def _find(client: MlflowClient, experiment: str, identity: Mapping[str, str]) -> Run | None:
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment], condition, max_results=1)
    return found[0] if found else None


def _create(client: MlflowClient, experiment: str, identity: Mapping[str, str], name: str) -> Run:
    source = {"mlflow.source.name": "hass", "mlflow.source.git.commit": code_commit() or "unknown"}
    return client.create_run(experiment, tags={**source, **identity}, run_name=name)


@contextmanager
def _ending(client: MlflowClient, run_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        client.set_terminated(run_id, "KILLED")
        raise
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


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


def _dataset(context: str, artifact: Artifact) -> DatasetInput:
    dataset = Dataset(name=artifact.stage, digest=artifact.digest, source_type="hass", source=artifact.url)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
