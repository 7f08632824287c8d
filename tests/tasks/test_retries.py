"""What is tried again: a network's failure, not a refusal. Errors come from a real S3 server and a real HTTP one."""

import boto3
import httpx
import pytest
import requests
import s3fs
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hass_core.errors import StoreError
from hass_core.store import Store
from tasks.retries import is_transient
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
