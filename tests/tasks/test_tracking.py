"""The MLflow record: one parent and one child per stage, whatever happens in between."""

import functools
import itertools
import json
import multiprocessing
import socket
import threading
from contextlib import suppress

import pytest
from mlflow import MlflowClient

from hass_core.config import parse_config
from hass_core.errors import ConfigError, TrackingError
from hass_core.store import Artifact
from hass_core.training.metrics import read_metrics
from tasks.tracking import client as client_module
from tasks.tracking import connect, find_recorded, is_recorded, open_retraining, stage_run
from tasks.tracking.client import experiment_id, tracking_uri
from tasks.tracking.metrics import Follower
from tasks.tracking.names import stage_metrics
from tests.tasks.conftest import metrics_text


def all_runs(config):
    client = connect(config)
    return client.search_runs([experiment_id(client, config)], order_by=["start_time ASC"])


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
def test_credentials_go_to_no_server_that_settings_alone_name(monkeypatch, name):
    elsewhere = parse_config({"tracking": {"uri": "http://evil.example:5000"}})
    monkeypatch.setattr(client_module, "_client", None)  # nothing is sent
    monkeypatch.setenv(name, "secret")
    with pytest.raises(TrackingError, match=r"name the host in HASS_TRUSTED_HOSTS on this machine"):
        connect(elsewhere)
    for variable, value in (
        ("HASS_TRUSTED_HOSTS", "evil.example"),
        ("MLFLOW_TRACKING_URI", "http://evil.example:5000"),
    ):
        monkeypatch.setenv(variable, value)
        with pytest.raises(TypeError):  # it would connect now
            connect(elsewhere)
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    "form",
    [
        *("http://{}", "HTTP://{}", " http://{}", "Http://{}/", "https://{}", "HTTPS://me@{}"),
        *("postgresql://{}/mlflow", "PostgreSQL+psycopg2://hass@{}/mlflow", "postgresql://localhost/mlflow?host={}"),
    ],
)
def test_nothing_at_all_is_sent_there_however_the_address_is_written(monkeypatch, form):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD"):
        monkeypatch.setenv(name, "secret")
    with socket.create_server(("0.0.0.0", 0)) as listener:  # on loopback, by an address that is not a loopback one
        listener.setblocking(False)
        uri = form.format(f"0.0.0.0:{listener.getsockname()[1]}")
        with pytest.raises(TrackingError, match="HASS_TRUSTED_HOSTS"):
            connect(parse_config({"tracking": {"uri": uri}}))
        with pytest.raises(BlockingIOError):
            listener.accept()


def record_once(config, store, prompts, draft):
    with open_retraining(config, prompts, {"prefect.flow_run_id": "1"}) as run_id:
        with stage_run(config, run_id, "prompts") as run:
            run.record(store, prompts, {})
        with stage_run(config, run_id, "draft") as run:
            run.record(store, draft, {"prompts": prompts})
    return run_id


def test_a_retraining_is_one_parent_with_a_child_per_stage(config, store, prompts, draft):
    run_id = record_once(config, store, prompts, draft)
    runs = all_runs(config)
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == run_id]
    assert sorted(run.data.tags["hass.stage"] for run in children) == ["draft", "prompts"]


def test_the_record_holds_settings_numbers_digests_inputs_and_code(config, store, prompts, draft):
    run_id = record_once(config, store, prompts, draft)
    client = connect(config)
    parent = client.get_run(run_id)
    assert parent.data.params["training.align_steps"] == "3"
    assert parent.data.metrics["prompts/prompts"] == 12
    assert parent.data.metrics["train/loss"] == pytest.approx(1 / 30)
    assert parent.data.tags["hass.digest.draft"] == draft.digest
    assert parent.data.tags["prefect.flow_run_id"] == "1"
    assert len(parent.data.tags["mlflow.source.git.commit"]) >= 40
    child = next(run for run in all_runs(config) if run.data.tags.get("hass.stage") == "draft")
    (given,) = (item.dataset for item in child.inputs.dataset_inputs)
    assert given.digest == prompts.digest
    columns = [{"name": "id", "type": "string"}, {"name": "category", "type": "string"}]
    assert json.loads(given.schema) == {"mlflow_colspec": columns}
    assert json.loads(given.profile)["prompts"] == 12
    assert parent.data.tags["mlflow.user"]
    assert {file.path for file in client.list_artifacts(run_id, "draft")} == {
        "draft/config.json",
        "draft/metrics.jsonl",
    }


def test_a_stage_is_named_by_what_it_made_and_says_so(config, store, prompts, draft):
    run_id = record_once(config, store, prompts, draft)
    child = next(run for run in all_runs(config) if run.data.tags.get("hass.stage") == "draft")
    assert child.info.run_name == f"draft-{draft.digest[:6]}"
    assert child.data.tags["hass.url.draft"] == draft.url
    for run in (child, connect(config).get_run(run_id)):
        assert run.data.metrics["draft/best_tau"] == 1.5
        assert "draft/val/tau" not in run.data.metrics


def test_counts_with_open_names_and_doubles_are_no_metrics():
    summary = {"prompts": 3, "from_a file": 2, "skipped/too long": 1, "note": "text", "loss": 2.0, "val/loss": 3.0}
    artifact = Artifact(stage="prompts", digest="1", root="/nowhere", summary=summary)
    assert stage_metrics(artifact) == {"prompts/prompts": 3.0}


def test_the_same_retraining_again_adds_no_run_and_no_value(config, store, prompts, draft):
    first = record_once(config, store, prompts, draft)
    assert record_once(config, store, prompts, draft) == first
    assert len(all_runs(config)) == 3
    client = connect(config)
    assert [m.step for m in client.get_metric_history(first, "train/loss")] == [10, 20, 30]
    assert len(client.get_metric_history(first, "draft/steps")) == 1


def test_another_setting_or_other_prompts_are_another_retraining(config, store, prompts, draft):
    first = record_once(config, store, prompts, draft)
    changed = parse_config({**config.model_dump(mode="json"), "seed": 7})
    assert record_once(changed, store, prompts, draft) != first
    other = store.stage("prompts", {"of": "other"}).finish({"prompts": 3})
    assert record_once(config, store, other, draft) != first


def test_where_it_is_recorded_is_not_part_of_a_retraining(config, store, prompts, draft):
    first = record_once(config, store, prompts, draft)
    renamed = parse_config({**config.model_dump(mode="json"), "name": "other"})
    assert record_once(renamed, store, prompts, draft) == first


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")])
def test_an_interrupted_run_says_so_and_is_continued(config, store, prompts, draft, error, status):
    with pytest.raises(error), open_retraining(config, prompts, {}) as interrupted:
        raise error
    assert connect(config).get_run(interrupted).info.status == status
    assert record_once(config, store, prompts, draft) == interrupted
    assert connect(config).get_run(interrupted).info.status == "FINISHED"


class Died(BaseException):
    """What ends a process at once: nothing is written after it."""


def die_after(monkeypatch, writes: int) -> None:
    """Let the main thread write to MLflow so many times; it dies before the next write, and can do nothing after."""
    left = writes

    def counted(method):
        @functools.wraps(method)
        def call(*arguments, **named):
            nonlocal left
            if threading.current_thread() is threading.main_thread():
                left -= 1
                if left < 0:
                    raise Died
            return method(*arguments, **named)

        return call

    for name in ("create_run", "update_run", "set_tag", "log_batch", "log_inputs", "log_artifact", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))


def record_prompts(config, store, prompts) -> None:
    """As the flow does it: what is recorded is not opened again."""
    with open_retraining(config, prompts, {}) as run_id:
        if not is_recorded(config, run_id, prompts):
            with stage_run(config, run_id, "prompts") as run:
                run.record(store, prompts, {})


def test_a_process_killed_between_any_two_writes_leaves_a_record_that_the_next_one_completes(
    config, store, prompts, monkeypatch
):
    for writes in itertools.count(1):
        asked = parse_config({**config.model_dump(mode="json"), "seed": writes})
        died = True
        with monkeypatch.context() as dying, suppress(Died):
            die_after(dying, writes)
            record_prompts(asked, store, prompts)
            died = False
        if not died:
            break
        record_prompts(asked, store, prompts)
        parent, child = sorted(all_runs(asked)[-2:], key=lambda run: "hass.stage" in run.data.tags)
        for run in (parent, child):
            assert run.info.status == "FINISHED", writes
            assert run.data.tags["hass.digest.prompts"] == prompts.digest
            assert len(connect(asked).get_metric_history(run.info.run_id, "prompts/prompts")) >= 1
        assert len(all_runs(asked)) == 2 * writes
    assert writes > 8


def test_two_processes_that_open_a_retraining_at_once_share_one_run(config, prompts):
    connect(config)
    barrier, ids = threading.Barrier(4), []

    def open_it():
        barrier.wait()
        with open_retraining(config, prompts, {}) as run_id:
            ids.append(run_id)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(all_runs(config)) == 1


def connect_when_all_are_there(barrier, config) -> None:
    barrier.wait()
    connect(config)


@pytest.mark.slow
def test_processes_that_are_the_first_to_come_make_the_database_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    context = multiprocessing.get_context("spawn")  # a process of its own, as a second terminal is
    config = parse_config({"store": str(tmp_path / "new" / "store")})
    barrier = context.Barrier(3)
    first = [context.Process(target=connect_when_all_are_there, args=(barrier, config)) for _ in range(3)]
    for process in first:
        process.start()
    for process in first:
        process.join()
    assert [process.exitcode for process in first] == [0, 0, 0]


def test_curves_arrive_while_the_training_runs(config, prompts, tmp_path):
    file = tmp_path / "metrics.jsonl"
    client = connect(config)
    with open_retraining(config, prompts, {}) as run_id, stage_run(config, run_id, "draft") as run:
        with run.following(file):
            file.write_text(metrics_text(range(1, 4)) + '{"step": 4, "tra')  # the last line is still being written
            for _ in range(100):
                if len(client.get_metric_history(run.id, "train/loss")) == 3:
                    break
                threading.Event().wait(0.1)
            assert [m.step for m in client.get_metric_history(run.id, "train/loss")] == [1, 2, 3]
            file.write_text(metrics_text(range(1, 6)))
        assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == [1, 2, 3, 4, 5]


def test_steps_repeated_after_a_crash_stand_once(config, prompts, tmp_path):
    client = connect(config)
    with open_retraining(config, prompts, {}) as run_id:
        for steps in (range(1, 8), range(5, 12)):  # the second process continues from a checkpoint at step 4
            Follower(client, [run_id], tmp_path / "unused").log(read_metrics(metrics_text(steps)))
        assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == list(range(1, 12))


def test_the_default_is_sqlite_beside_the_store(store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(parse_config({"store": store.root})) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_run_has_a_page_where_there_is_a_server(config, monkeypatch):
    assert client_module.run_url(config, "abc") is None
    server = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "https://me:pw@host/ml"})})
    monkeypatch.setattr(client_module, "connect", lambda config: None)
    monkeypatch.setattr(client_module, "experiment_id", lambda client, config: "7")
    assert (
        client_module.run_url(server, "abc") == "https://host/ml/#/experiments/7/runs/abc?workflowType=machine_learning"
    )
    page = "#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=retrainings"
    assert client_module.ui_command(server) == f"https://host/ml/{page}"
    assert client_module.ui_command(config).endswith(f"/mlflow.db, then http://127.0.0.1:5000/{page}")


def test_an_experiment_that_was_deleted_is_told_before_any_work(config):
    client = connect(config)
    deleted = experiment_id(client, config)
    client.delete_experiment(deleted)
    with pytest.raises(TrackingError, match=f"was deleted in MLflow: restore it with .* --experiment-id {deleted}`"):
        connect(config)
    client.restore_experiment(deleted)
    assert experiment_id(connect(config), config) == deleted


@pytest.mark.parametrize("name", ["", "x" * 251])
def test_an_experiment_s_name_that_no_database_takes_is_refused_with_the_settings(name):
    with pytest.raises(ConfigError, match=r"tracking\.experiment"):
        parse_config({"tracking": {"experiment": name}})


def test_the_experiment_has_a_saved_view_also_one_that_was_there_before(config):
    there_before = f"{config.tracking.experiment}-before"
    client = connect(config)
    client.create_experiment(there_before)
    connect(config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": there_before})}))
    for name in (config.tracking.experiment, there_before):
        view = json.loads(client.get_experiment_by_name(name).tags["mlflow.sharedViewState.retrainings"])
        assert "metrics.`evaluation/tau_macro`" in json.loads(view["state"])["selectedColumns"]


def test_an_unreachable_server_is_named_without_its_password(store, monkeypatch):
    config = parse_config({"store": store.root})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"^MLflow at http://127\.0\.0\.1:9 does not answer") as raised:
        connect(config)
    assert "hunter2" not in str(raised.value)


def snapshot(config):
    return [run.to_dictionary() for run in all_runs(config)]


def test_a_finished_retraining_that_is_opened_again_stays_as_it_is(config, store, prompts, draft):
    run_id = record_once(config, store, prompts, draft)
    before = snapshot(config)
    with open_retraining(config, prompts, {"prefect.flow_run_id": "2"}) as again:
        assert again == run_id
    with pytest.raises(ValueError, match="broken"), open_retraining(config, prompts, {}):
        raise ValueError("broken")
    assert snapshot(config) == before


def test_a_stage_added_to_a_finished_retraining_that_fails_leaves_it_finished(config, store, prompts, draft):
    run_id = record_once(config, store, prompts, draft)
    client = connect(config)
    before = client.get_run(run_id).info
    with (
        pytest.raises(ValueError, match="broken"),
        open_retraining(config, prompts, {}),
        stage_run(config, run_id, "evaluation"),
    ):
        raise ValueError("broken")
    after = client.get_run(run_id).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)
    assert [run.info.status for run in all_runs(config) if run.data.tags.get("hass.stage") == "evaluation"] == [
        "FAILED"
    ]


def test_another_target_or_machine_is_another_retraining(config, prompts):
    ids = []
    for made_by in ({"target": "a"}, {"target": "b"}, {"target": "a"}):
        with open_retraining(config, prompts, {}, made_by) as run_id:
            ids.append(run_id)
    assert ids[0] == ids[2] != ids[1]


def test_a_record_is_found_by_its_stages_once_it_is_finished(config, store, prompts, draft):
    with open_retraining(config, prompts, {}) as run_id:
        with stage_run(config, run_id, "prompts") as run:
            run.record(store, prompts, {})
        with stage_run(config, run_id, "draft") as run:
            run.record(store, draft, {"prompts": prompts})
        assert find_recorded(config, [prompts, draft]) is None
    assert find_recorded(config, [prompts, draft]) == run_id
    assert find_recorded(config, [prompts, draft.model_copy(update={"digest": "0" * 16})]) is None
