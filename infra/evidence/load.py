"""How the pipeline behaves under load: queued runs, many shards at once, a tracking store with a long history, a store
with many results, and many clients of `hass serve`.

    python -m infra.evidence.load OUT.json [--deployed 50] [--shards 200] [--runs 2000] [--folders 10000] [--clients 64]

Starts servers and a worker of its own on loopback and stops them; MLflow is SQLite, and the store a disk and an S3
server, in a temporary folder. While runs are queued and shards are mapped, a probe asks the server every half second
what the UI asks it; while clients are answered, another asks for /health.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from hass_core.config import RunConfig, parse_config
from hass_core.store import Artifact, Store, digest_of
from hass_core.store.housekeeping import entries, removable
from hass_core.store.provenance import provenance
from hass_core.store.store import MANIFEST
from tasks import tracking
from tasks.tracking.registry import version_of
from tests.flows.stack import ROOT, Stack, answers, end, free_port, wait_for
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, seaweedfs

AT_ONCE = 4  # flow processes, each of which takes a core while it starts
STAGES = ("prompts", "responses", "features", "draft", "evaluation")
TAGS = {"hass.commit": "0" * 40}
SHARD_SECONDS = 2.0
PARTS = {"deployed": 50, "shards": 200, "runs": 2000, "folders": 10_000, "clients": 64}


def deployed_runs(stack: Stack, count: int) -> dict[str, Any]:
    """Queue `count` runs of a small flow at once and wait for the last."""
    stack.prefect("deploy", f"{ROOT}/infra/evidence/small_flow.py:small", "-n", "load", "-p", "cpu")
    stack.prefect("work-pool", "set-concurrency-limit", "cpu", str(AT_ONCE))
    deployment = httpx.get(f"{stack.api}/deployments/name/small/load").raise_for_status().json()["id"]
    with probed(stack) as answers, httpx.Client(timeout=60) as client:
        started = time.perf_counter()
        url = f"{stack.api}/deployments/{deployment}/create_flow_run"
        refused = sum(_queue(client, url, number) for number in range(count))
        queued = time.perf_counter() - started
        wait_for(lambda: completed(stack) == count, "all runs", 900)
        total = time.perf_counter() - started
    runs = stack.flow_runs()
    return {
        "runs": len(runs),
        "at_once": AT_ONCE,
        "refused_and_asked_again": refused,
        "seconds_to_queue_all": queued,
        "seconds_to_finish_all": total,
        "seconds_in_flow_max": max(run["total_run_time"] for run in runs),
        "seconds_to_import_retrain": best(
            lambda: subprocess.run([sys.executable, "-c", "import flows.retrain"], cwd=ROOT)
        ),
        "ui_answers": answers,
    }


def _queue(client: httpx.Client, url: str, number: int) -> int:
    """Queue one run as Prefect's client does: again when the server is busy (503). How often it was refused."""
    body = {"parameters": {"number": number}, "state": {"type": "SCHEDULED"}, "idempotency_key": f"load-{number}"}
    refused = 0
    while (answer := client.post(url, json=body)).status_code == 503:
        refused += 1
        time.sleep(1)
    answer.raise_for_status()
    return refused


def completed(stack: Stack) -> int:
    """Number of runs that have ended well."""
    body = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    answer = httpx.post(f"{stack.api}/flow_runs/count", json=body, timeout=60)
    return answer.json() if answer.is_success else 0


def mapped_shards(stack: Stack, count: int) -> dict[str, Any]:
    """`count` shards at once, mapped as the features stage maps them."""
    command = [sys.executable, "-m", "infra.evidence.small_flow", str(count), str(SHARD_SECONDS)]
    with probed(stack) as answers:
        done = subprocess.run(command, cwd=ROOT, env=stack.environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    seconds = float(done.stdout.rpartition("seconds=")[2])
    return {"shards": count, "seconds_of_a_shard": SHARD_SECONDS, "seconds_in_all": seconds, "ui_answers": answers}


@contextmanager
def probed(stack: Stack) -> Iterator[dict[str, float]]:
    """Ask for the newest runs all through the block; the times are in the yielded dict after it."""
    times: list[float] = []
    refused: list[bool] = []
    end = threading.Event()

    def ask() -> None:
        while not end.wait(0.5):
            started = time.perf_counter()
            answer = httpx.post(f"{stack.api}/flow_runs/filter", json={"limit": 50}, timeout=60)
            times.append(time.perf_counter() - started)
            refused.append(answer.status_code == 503)

    probe = threading.Thread(target=ask)
    probe.start()
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        end.set()
        probe.join()
        found |= {"count": len(times), "median_seconds": statistics.median(times), "max_seconds": max(times)}
        found["refused"] = sum(refused)


def tracking_history(folder: Path, runs: int) -> dict[str, Any]:
    """Times of what a flow asks of MLflow, in an empty store and after `runs` runs."""
    own = {"uri": f"sqlite:///{folder}/mlflow.db", "registered_model": "load"}  # never a server of the environment's
    config = parse_config({"store": str(folder / "store"), "tracking": own})
    client = tracking.connect(config)
    new = _times(config, client, "new")
    started = time.perf_counter()
    for number in range(0, runs, 1 + len(STAGES)):
        _retraining(config, client, number)
    filled = time.perf_counter() - started
    count = client.search_model_versions("name = 'load'", max_results=10_000)
    return {
        "runs": runs,
        "versions": len(count),
        "seconds_to_fill": filled,
        "empty": new,
        "full": _times(config, client, "old"),
    }


def _retraining(config: RunConfig, client: MlflowClient, number: int) -> None:
    """One retraining as our tracking writes it: parent, a run per stage, a version with aliases."""
    with tracking.open_retraining(config, _artifact("prompts", f"{number}"), TAGS) as run_id:
        experiment = client.get_run(run_id).info.experiment_id
        for stage in STAGES:
            tags = {"mlflow.parentRunId": run_id, "hass.stage": stage}
            child = client.create_run(experiment, tags=tags, run_name=stage).info.run_id
            params = [Param(f"{stage}.setting-{n}", str(n)) for n in range(20)]
            metrics = [Metric(f"{stage}/loss", 1 / step, 0, step) for step in range(1, 51)]
            client.log_batch(child, metrics=metrics, params=params)
            client.set_terminated(child)
    if number == 0:
        client.create_registered_model("load")
    draft = _artifact("draft", f"{number}")
    tags = {"hass.digest.draft": draft.digest, "hass.draft.artifact": draft.model_dump_json()}
    version = client.create_model_version("load", f"file://{config.store}", run_id, tags=tags)
    client.set_registered_model_alias("load", "champion" if number == 0 else "challenger", version.version)


def _times(config: RunConfig, client: MlflowClient, name: str) -> dict[str, float]:
    """Seconds of each request, the best of three."""
    prompts, draft = _artifact("prompts", f"{name}-prompts"), _artifact("draft", "0")
    with tracking.open_retraining(config, prompts, {}) as run_id:
        pass
    experiment = client.get_run(run_id).info.experiment_id
    newest = {"max_results": 100, "order_by": ["attributes.start_time DESC"]}
    return {
        "connect": best(lambda: tracking.connect(config)),
        "find_the_run_again": best(lambda: _entered(tracking.open_retraining(config, prompts, {}))),
        "a_stage": best(lambda: _entered(tracking.stage_run(config, run_id, "prompts"))),
        "champion": best(lambda: tracking.champion(client, "load")),
        "version_of_a_draft": best(lambda: version_of(client, "load", draft)),
        "first_page_of_the_ui": best(lambda: client.search_runs([experiment], **newest)),
        "models_page_of_the_ui": best(lambda: client.search_registered_models(max_results=25)),
    }


def store_folders(home: Path, count: int) -> dict[str, Any]:
    """Times of what is asked of a store with so many results, on a disk and on an S3 server."""
    found: dict[str, Any] = {"folders": count, "disk": _store_times(Store(home / "many"), count)}
    (home / "weed").mkdir()
    with seaweedfs(home / "weed") as port:
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        store = Store(f"s3://{BUCKET}/store", cache=home / "cache")
        store.fs.mkdir(BUCKET)
        found["s3"] = _store_times(store, count)
    return found


def _store_times(store: Store, count: int) -> dict[str, float]:
    """Seconds of each request; the results are made from one, by its manifest alone."""
    one = store.stage("draft", {"of": "load"}).finish({"steps": 1})
    base = store.fs._strip_protocol(store.root)
    text = store.fs.cat_file(f"{base}/draft/{one.digest}/{MANIFEST}").decode()
    digests = [digest_of(number) for number in range(count - 1)]
    files = {f"{base}/draft/{digest}/{MANIFEST}": text.replace(one.digest, digest).encode() for digest in digests}
    for path in files if store.is_local else ():
        store.fs.makedirs(path.rpartition("/")[0])
    started = time.perf_counter()
    store.fs.pipe(files)
    filled = time.perf_counter() - started
    held = entries(store, STAGES)
    return {
        "seconds_to_fill": filled,
        "hass_store_ls": best(lambda: entries(store, STAGES)),
        "what_prune_removes": best(lambda: removable(store, held, 3)),
        "find_a_result": best(lambda: store.artifact("draft", digests[-1])),
        "begin_a_stage": best(lambda: store.stage("draft", {"of": "load"}).artifact()),
    }


def served_clients(home: Path, count: int, new_tokens: int = 32) -> dict[str, Any]:
    """So many clients ask `hass serve` (SmolLM2-135M-Instruct, plain decoding) at once, each for one answer."""
    port, answered = free_port(), list[float]()
    command = [sys.executable, "-m", "hass_core.cli", "serve", "--port", str(port)]
    with (home / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    url, healthy = f"http://127.0.0.1:{port}", threading.Event()
    try:
        wait_for(lambda: answers(f"{url}/health"), "hass serve", 300)
        model = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
        health = threading.Thread(target=_ask_health, args=(url, healthy, answered))
        health.start()
        started = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            done = list(pool.map(lambda number: _ask(url, model, number, new_tokens), range(count)))
        total = time.perf_counter() - started
        healthy.set()
        health.join()
    finally:
        end(server)
    seconds = sorted(took for _, took, _ in done)
    tokens = sum(made for _, _, made in done)
    return {
        "clients": count,
        "statuses": {
            str(status): sum(told == status for told, _, _ in done) for status in {told for told, _, _ in done}
        },
        "tokens": tokens,
        "tokens_per_second": tokens / total,
        "seconds_in_all": total,
        "seconds_of_an_answer_median": statistics.median(seconds),
        "seconds_of_an_answer_max": seconds[-1],
        "seconds_of_health_max": max(answered),
    }


def _ask(url: str, model: str, number: int, new_tokens: int) -> tuple[int, float, int]:
    """(status, seconds, tokens made) of one client's answer."""
    body = {"messages": [{"role": "user", "content": f"Count from {number}."}], "max_tokens": new_tokens}
    started = time.perf_counter()
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": model, **body}, timeout=600)
    made = answer.json()["usage"]["completion_tokens"] if answer.is_success else 0
    return answer.status_code, time.perf_counter() - started, made


def _ask_health(url: str, stopped: threading.Event, times: list[float]) -> None:
    while not stopped.wait(0.5):
        times.append(timed(lambda: httpx.get(f"{url}/health", timeout=60)))


def _entered(manager: Any) -> None:
    with manager:
        pass


def _artifact(stage: str, digest: str) -> Artifact:
    return Artifact(stage=stage, digest=digest, root="/nowhere")


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls."""
    return min(timed(work) for _ in range(3))


def main() -> None:
    """Measure what was asked for, and write it with commit and machine."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("out", type=Path)
    for name, count in PARTS.items():
        options.add_argument(f"--{name}", type=int, default=count, help="0 = leave this part out")
    asked = options.parse_args()
    found: dict[str, Any] = {"provenance": provenance(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="hass-load-") as name:
        home = Path(name)
        if asked.runs:
            found["tracking"] = tracking_history(home, asked.runs)
        if asked.folders:
            found["store"] = store_folders(home, asked.folders)
        if asked.clients:
            found["served"] = served_clients(home, asked.clients)
        if asked.deployed or asked.shards:
            stack = Stack(home)
            try:
                if asked.deployed:
                    found["deployed"] = deployed_runs(stack, asked.deployed)
                if asked.shards:
                    found["mapped"] = mapped_shards(stack, asked.shards)
            finally:
                stack.stop()
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(asked.out.read_text())


if __name__ == "__main__":
    main()
