"""The champion reaches the engines: exported, checked, pointed to, told."""

import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hass_core.errors import HassError, TrackingError
from hass_core.store import Releases
from tasks import promotion, release, tracking
from tests.tasks.conftest import register_draft


@pytest.fixture
def served(config, saved_target):
    """Settings whose target is a folder, and whose releases go to one engine."""
    target = config.target.model_copy(update={"source": str(saved_target), "dtype": "float32"})
    rules = config.promotion.model_copy(update={"release": ("vllm",)})
    return config.model_copy(update={"target": target, "promotion": rules})


@pytest.fixture
def register(served, store, prompts, tiny_target):
    return partial(register_draft, served, store, prompts, tiny_target)


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch):
    for module in (release, promotion):
        monkeypatch.setattr(module, "create_markdown_artifact", lambda *given, **named: None)
    monkeypatch.setattr(release, "put_release", release.put_release.fn)
    monkeypatch.setattr(release, "notify_servers", release.notify_servers.fn)


def with_rules(config, **rules):
    return config.model_copy(update={"promotion": config.promotion.model_copy(update=rules)})


def test_the_champion_is_released_once(served, register, store):
    version = register(0)
    done = release.release_champion(served)
    assert str(done) == f"version 1 of {version.model} is released for vllm"
    folder = done.release.engines["vllm"]
    assert json.loads(store.fs.cat_file(f"{folder}/config.json"))["hidden_size"] == 48
    assert "README.md" in {path.rpartition("/")[2] for path in store.fs.ls(folder, detail=False)}
    assert tracking.lineage(tracking.connect(served), version)["hass.released"] == "vllm"
    assert release.release_champion(served) is None


def test_without_engines_nothing_is_released(served, register, store):
    register(0)
    assert release.release_champion(with_rules(served, release=())) is None
    assert not store.fs.exists(f"{store.root}/releases")


def test_a_challenger_is_not_released_and_a_rollback_releases_the_former_again(served, register, store):
    first, second = register(0), register(1)
    release.release_champion(served)
    client, current = tracking.connect(served), Releases(store, first.model).current
    assert release.release_champion(served) is None
    tracking.crown(client, second, first)
    release.release_champion(served)
    assert current().version == "2"
    promotion.roll_back.fn(served)
    release.release_champion(served)
    assert current().version == "1"


def test_another_draft_with_the_number_of_the_release_is_released(served, register, store):
    version = register(0)
    release.release_champion(served)
    tracking.connect(served).delete_registered_model(version.model)  # as when a database is lost
    register(1)
    done = release.release_champion(served)
    assert done.release.version == "1"
    assert done.release.draft == tracking.champion(tracking.connect(served), version.model).draft.digest
    assert Releases(store, version.model).current() == done.release


def test_a_command_gets_the_release_and_its_failure_is_told_and_made_good_next_time(served, register, store, tmp_path):
    version = register(0)
    failing = with_rules(served, release_command=f"cat /nowhere-{tmp_path.name}")
    with pytest.raises(
        HassError, match=r"version 1 is released, but promotion.release_command ended with 1: .*nowhere"
    ):
        release.release_champion(failing)
    assert Releases(store, version.model).current().version == "1"
    note = tmp_path / "note.json"
    assert release.release_champion(with_rules(served, release_command=f'printf %s "$HASS_RELEASE" > {note}')).told
    assert json.loads(note.read_text())["version"] == "1"


def test_a_webhook_is_posted_to_and_its_address_stays_secret(served, register, monkeypatch):
    got = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if len(got) == 1 else 204)
            self.end_headers()

        def log_message(self, *given):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    register(0)
    config = with_rules(served, release_webhook="RELEASE_HOOK")
    with pytest.raises(HassError, match="RELEASE_HOOK, which is not set"):
        release.release_champion(config)
    monkeypatch.setenv("RELEASE_HOOK", f"HTTP://127.0.0.1:{server.server_port}/secret-4711?team=a b\n")
    with pytest.raises(HassError, match="the webhook that RELEASE_HOOK names answered 500") as failure:
        release.release_champion(config)
    assert "secret-4711" not in str(failure.value)
    release.release_champion(config)
    assert [post["version"] for post in got] == ["1", "1"]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("address", ["http://secret-4711:port/", "secret-4711", "ftp://secret-4711/"])
def test_a_webhook_that_is_no_address_is_told_without_it(served, register, monkeypatch, address):
    register(0)
    monkeypatch.setenv("RELEASE_HOOK", address)
    with pytest.raises(HassError, match="version 1 is released, but the webhook that RELEASE_HOOK names") as failure:
        release.release_champion(with_rules(served, release_webhook="RELEASE_HOOK"))
    assert "secret-4711" not in str(failure.value)


def test_a_person_can_refuse_a_challenger_but_not_the_champion(served, register, told):
    first, second = register(0), register(1)
    promotion.reject.fn(served, second, "too old a log")
    client = tracking.connect(served)
    refused = tracking.find_version(client, second.model, 2)
    assert refused.withdrawn
    assert refused.alias is None
    assert "too old a log" in client.get_model_version(second.model, "2").description
    assert [event["event"] for event in told] == ["hass.refused"]
    with pytest.raises(TrackingError, match=r"version 1 of .* is the champion; rollback-draft withdraws it"):
        promotion.reject.fn(served, first, "no")
