"""What is tried again: a network's failure, not a refusal. Errors come from a real S3 server and a real HTTP one."""

import errno

import boto3
import httpx
import pytest
import requests
import s3fs
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from prefect import task
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed

from hass_core.errors import StoreError
from hass_core.store import Store
from tasks.progress import say
from tasks.retries import SERVER_FAILED, after_network_failure, is_transient
from tests.flows.stack import free_port
from tests.loopback import Quiet, serving
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY


@pytest.fixture
def server():
    """A server that answers /STATUS with that status; its address."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.send(int(self.path.split("/")[1].partition("?")[0]) if self.path[1:4].isdigit() else 404)

        do_HEAD = do_GET

    with serving(Handler) as address:
        yield address


@pytest.fixture
def forgetful():
    """fsspec keeps clients with the keys they were made with: none is there before the test, none after it."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def failure_of(action) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 which one it is is what the test asks
        action()
    return caught.value


@pytest.mark.parametrize(
    ("key", "secret", "bucket"),
    [("nobody", SECRET_KEY, BUCKET), (ACCESS_KEY, "wrong", BUCKET)],
    ids=["unknown key", "wrong secret"],
)
def test_a_store_that_refuses_is_not_asked_again(s3_store, forgetful, monkeypatch, key, secret, bucket):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    error = failure_of(lambda: Store(f"s3://{bucket}/refused/{key}{secret}").check_writable())
    assert isinstance(error, StoreError)
    assert len(str(error).splitlines()) == 1
    assert not is_transient(error)


def test_a_bucket_that_is_not_there_is_not_asked_for_again(s3_store):
    error = failure_of(lambda: boto3.client("s3").list_objects_v2(Bucket="no-such-bucket"))
    assert "NoSuchBucket" in str(error)
    assert not is_transient(error)


def test_keys_that_are_not_set_are_not_waited_for(s3_store, forgetful, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    error = failure_of(lambda: Store(s3_store.root).check_writable())
    assert "Unable to locate credentials; check" in str(error)
    assert not is_transient(error)


def test_what_is_tried_again_is_told_with_its_address_and_when(s3_store, s3_proxy, forgetful, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address := f"http://127.0.0.1:{free_port()}")
    error, told = failure_of(lambda: Store(s3_store.root).check_writable()), list[str]()
    token = say.set(told.append)
    try:
        for count in (1, 4):
            run = TaskRun(task_key="save", dynamic_key="0", run_count=count)
            assert after_network_failure(task(lambda: None, name="save"), run, Failed(data=error))
        assert not after_network_failure(task(lambda: None, name="save"), run, Failed(data=ValueError()))
    finally:
        say.reset(token)
    assert [line.rpartition("; ")[2] for line in told] == ["save is tried again in 5 s", "save is tried again in 60 s"]
    assert all(line.startswith(f"cannot write to the store {s3_store.root}: ") for line in told)
    assert all(f"AWS_ENDPOINT_URL ({address})" in line for line in told)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(404, "NoSuchBucket", "The specified bucket does not exist"), (403, "AccessDenied", "Access Denied")],
)
def test_a_bucket_that_is_missing_or_another_s_is_told_and_not_asked_for_again(
    s3_store, forgetful, monkeypatch, status, code, words
):
    """As Amazon words it; SeaweedFS makes the buckets that its administrator writes to."""

    class Refusing(Quiet):
        protocol_version = "HTTP/1.1"  # else a client waits for leave to send

        def do_PUT(self) -> None:
            self.body()
            self.send(status, f"<Error><Code>{code}</Code><Message>{words}</Message></Error>")

        do_GET = do_HEAD = do_PUT

    with serving(Refusing) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        error = failure_of(lambda: Store("s3://nothing/here").check_writable())
    assert str(error).startswith(f"cannot write to the store s3://nothing/here: {words}; check the address")
    assert f"AWS_ENDPOINT_URL ({address})" in str(error)
    assert not is_transient(error)


def test_a_store_that_answers_500_is_tried_again(s3_store, s3_proxy):
    s3_proxy.fail("500")
    error = failure_of(s3_store.check_writable)
    assert is_transient(error)


def test_a_model_that_the_hub_does_not_know_is_not_asked_for_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    error = failure_of(lambda: snapshot_download("team/nothing", endpoint=server, cache_dir=tmp_path))
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    assert not is_transient(error)


@pytest.mark.parametrize("client", [httpx, requests])
@pytest.mark.parametrize(("status", "again"), [(401, False), (403, False), (404, False), (429, True), (503, True)])
def test_a_status_tells_a_refusal_from_a_busy_server(server, client, status, again):
    assert is_transient(failure_of(lambda: client.get(f"{server}/{status}").raise_for_status())) == again


def test_a_server_that_is_not_there_is_tried_again():
    assert is_transient(failure_of(lambda: httpx.get("http://127.0.0.1:9/")))


def test_what_s3fs_makes_of_a_server_that_failed_is_worth_another_try():
    """It does not always keep the client's own error as the cause."""
    assert is_transient(OSError(SERVER_FAILED, "Internal Server Error"))
    assert not is_transient(OSError(errno.ENOSPC, "No space left on device"))
