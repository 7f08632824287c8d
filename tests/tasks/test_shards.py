"""Shards mapped over threads and over a Ray cluster give what one process gives; a killed worker loses none."""

import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prefect import task
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner
from prefect.testing.utilities import prefect_test_harness

from hass_core.config import RunConfig, parse_config
from hass_core.errors import BadInput, StoreError
from hass_core.features import extract
from hass_core.store import Artifact, Store
from tasks.resources import store_of, target_of
from tasks.shards import mapped, runner_of
from tasks.stages import extract_part
from tests.features.conftest import conversation, responses_artifact

PARTS, CONVERSATIONS = 8, 40

pytestmark = pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs'")  # these tasks have no flow around them


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    """A temporary server and database."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def rows():
    return [conversation(f"c{i}", answer="word " * (i % 7 + 1) + "end") for i in range(CONVERSATIONS)]


def settings(folder: Path, saved_target: Path, store: str, **execution) -> RunConfig:
    target = {"source": str(saved_target), "dtype": "float32"}
    return parse_config({"store": str(folder / store), "target": target, "execution": execution})


def checksums(store: Store, features: Artifact) -> dict[str, str]:
    return {name: record.sha256 for name, record in store.open(features).finished().items()}


def spread_features(config: RunConfig, rows, task=extract_part, **more) -> tuple[Store, Artifact]:
    """Extract features as the stage does for several workers."""
    store = store_of(config)
    responses = responses_artifact(store, rows, parts=PARTS)
    spread = mapped(task, config.execution, config=config, responses=responses, **more)
    return store, extract.extract_features(config, responses, store, target_of(config), spread=spread)


def serial_features(config: RunConfig, rows) -> tuple[Store, Artifact]:
    store = store_of(config)
    responses = responses_artifact(store, rows, parts=PARTS)
    return store, extract.extract_features(config, responses, store, target_of(config))


def test_two_threads_store_the_same_files_as_one_process(tmp_path, saved_target, rows):
    _, serial = one = serial_features(settings(tmp_path, saved_target, "one"), rows)
    _, threads = two = spread_features(settings(tmp_path, saved_target, "two", workers=2), rows)
    assert threads.digest == serial.digest  # who did the work is no part of the key
    assert checksums(*two) == checksums(*one)
    assert {**threads.summary, "tokens_per_second": 0} == {**serial.summary, "tokens_per_second": 0}


def test_mapped_shards_report_progress_in_conversations_and_leave_finished_ones_alone(tmp_path, saved_target, rows):
    config = settings(tmp_path, saved_target, "store", workers=2)
    store, target = store_of(config), target_of(config)
    responses = responses_artifact(store, rows, parts=PARTS)
    for name in ("part-00000.parquet", "part-00005.parquet"):
        assert extract.extract_part(config, responses, store, target, name) == name
    seen, given = [], []
    spread = mapped(extract_part, config.execution, config=config, responses=responses)

    def recorded(names):
        given.extend(names)
        return spread(names)

    extract.extract_features(config, responses, store, target, lambda *call: seen.append(call), recorded)
    assert len(given) == PARTS - 2
    assert [done for done, _, _ in seen[1:]] == [15, 20, 25, 30, 35, 40]  # the first call tells the forecast
    extract.extract_features(config, responses, store, target, spread=lambda names: pytest.fail("it is finished"))


def test_the_first_failure_ends_the_stage_and_the_finished_shards_stay(tmp_path, saved_target, rows):
    config = settings(tmp_path, saved_target, "store", workers=2)
    with pytest.raises(StoreError, match="no room for part-00003"):
        spread_features(config, rows, task=failing_part, log=tmp_path)
    assert "part-00007.parquet" not in started(tmp_path)
    store, features = spread_features(config, rows)
    assert stored_ids(store, features) == once_each()


@task(name="failing-part")
def failing_part(config: RunConfig, responses: Artifact, log: Path, name: str) -> str:
    """Fails at one shard."""
    (log / f"{name}@{os.getpid()}").touch()
    if name == "part-00003.parquet":
        raise StoreError(f"no room for {name}")
    return extract.extract_part(config, responses, store_of(config), target_of(config), name)


@pytest.mark.slow
def test_several_gpus_get_a_process_each(tmp_path, saved_target, monkeypatch):
    threads = runner_of(settings(tmp_path, saved_target, "store", workers=4).execution)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    processes = runner_of(settings(tmp_path, saved_target, "store", workers=4).execution)
    assert isinstance(threads, ThreadPoolTaskRunner)
    assert isinstance(processes, ProcessPoolTaskRunner)
    with processes:
        seen = [processes.submit(visible_gpu, {"log": tmp_path, "name": str(n)}) for n in range(4)]
        assert {future.result() for future in seen} == {"0", "1"}


@task(name="visible-gpu")
def visible_gpu(log: Path, name: str) -> str:
    """The only GPU that this process sees; waits until there are two such processes."""
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    (log / f"gpu-{gpu}").touch()
    deadline = time.monotonic() + 120
    while len(list(log.glob("gpu-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return gpu


def test_ray_that_is_not_installed_is_named_with_its_remedy(tmp_path, saved_target, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(BadInput, match=r'needs Ray; run `pip install "hass-pipeline\[ray\]"`'):
        runner_of(settings(tmp_path, saved_target, "store", runner="ray").execution)


@pytest.mark.slow
def test_a_ray_cluster_stores_the_same_files_and_kill_9_of_a_worker_loses_no_shard(tmp_path, saved_target, rows):
    pytest.importorskip("prefect_ray")
    one = serial_features(settings(tmp_path, saved_target, "one"), rows)
    config = settings(tmp_path, saved_target, "ray", workers=2, runner="ray")
    store, features = spread_features(config, rows, task=deadly_part, log=tmp_path)
    assert checksums(store, features) == checksums(*one)
    assert stored_ids(store, features) == once_each()
    attempts = started(tmp_path)
    assert attempts.pop("part-00002.parquet") == 2  # killed, and done again
    assert set(attempts.values()) == {1}


@task(name="deadly-part")
def deadly_part(config: RunConfig, responses: Artifact, log: Path, name: str) -> str:
    """Extracts its shard; the first process that has written a certain one is killed before it can tell."""
    first = not list(log.glob(f"{name}@*"))
    (log / f"{name}@{os.getpid()}").touch()
    extract.extract_part(config, responses, store_of(config), target_of(config), name)
    if name == "part-00002.parquet" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def started(log: Path) -> Counter[str]:
    """How many processes began each shard."""
    return Counter(path.name.split("@")[0] for path in log.glob("part-*@*"))


def stored_ids(store: Store, features: Artifact) -> Counter[str]:
    folder = store.open(features)
    parts = [name for name in folder.finished() if name.startswith("part-")]
    return Counter(n for p in parts for n in pq.read_table(folder.local_path(p), columns=["id"])["id"].to_pylist())


def once_each() -> Counter[str]:
    return Counter(f"c{i}" for i in range(CONVERSATIONS))
