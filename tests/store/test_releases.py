"""Releases: the current one is whole, or it is the former one."""

import pytest

from hass_core.errors import CorruptFile, StoreError
from hass_core.store import Releases


def folder(tmp_path, name: str, text: str):
    made = tmp_path / name
    made.mkdir()
    (made / "config.json").write_text(text)
    (made / "model.safetensors").write_bytes(text.encode() * 100)
    return made


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def any_store(request):
    return request.getfixturevalue("store" if request.param == "local" else "s3_store")


def test_a_release_is_whole_before_it_is_current(any_store, tmp_path):
    releases = Releases(any_store, "draft")
    assert releases.current() is None
    release = releases.publish("1", {"vllm": folder(tmp_path, "a", "one"), "eagle": folder(tmp_path, "b", "other")})
    assert releases.current() == release
    with any_store.fs.open(f"{release.engines['vllm']}/model.safetensors") as file:
        assert file.read() == b"one" * 100


def test_a_release_that_breaks_off_leaves_the_former_one_current(any_store, tmp_path, monkeypatch):
    releases = Releases(any_store, "draft")
    former = releases.publish("1", {"vllm": folder(tmp_path, "a", "one")})
    write = Releases._write

    def failing(self, name, content):
        if name.startswith("2/vllm/model"):
            raise StoreError("the network is gone")
        write(self, name, content)

    monkeypatch.setattr(Releases, "_write", failing)
    with pytest.raises(StoreError, match="gone"):
        releases.publish("2", {"vllm": folder(tmp_path, "b", "two")})
    assert releases.current() == former


def test_what_arrives_broken_is_not_released(store, tmp_path, monkeypatch):
    releases = Releases(store, "draft")
    write = Releases._write
    monkeypatch.setattr(Releases, "_write", lambda self, name, content: write(self, name, content[:5]))
    with pytest.raises(CorruptFile, match=r"1/vllm/config.json is not what was written"):
        releases.publish("1", {"vllm": folder(tmp_path, "a", "a longer text")})
    assert releases.current() is None


def test_a_former_release_becomes_current_again(store, tmp_path):
    releases = Releases(store, "draft")
    one, two = folder(tmp_path, "a", "one"), folder(tmp_path, "b", "two")
    first = releases.publish("1", {"vllm": one})
    releases.publish("2", {"vllm": two})
    assert releases.publish("1", {"vllm": one}) == first == releases.current()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe"])
def test_a_record_that_is_none_is_refused(store, tmp_path, content):
    releases = Releases(store, "draft")
    releases.publish("1", {"vllm": folder(tmp_path, "a", "one")})
    releases._write("current", content)
    with pytest.raises(CorruptFile, match="current is not a release; remove it"):
        releases.current()
