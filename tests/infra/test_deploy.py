"""Where workers get the code: told as it is deployed, not by runs that crash."""

import subprocess
from pathlib import Path

import pytest

from hass_core.errors import ConfigError
from infra import deploy


def git(*arguments: str | Path) -> str:
    somebody = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *somebody, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout with one commit that is pushed to `remote.git`."""
    folder = tmp_path / "checkout"
    git("init", "-q", "--bare", tmp_path / "remote.git")
    git("clone", "-q", tmp_path / "remote.git", folder)
    (folder / "file").write_text("as committed")
    git("-C", folder, "add", "file")
    git("-C", folder, "commit", "-qm", "first")
    git("-C", folder, "push", "-q", "origin", "HEAD:main")
    monkeypatch.setattr(deploy, "ROOT", folder)
    monkeypatch.delenv("HASS_CODE_COMMIT", raising=False)
    monkeypatch.setenv("HASS_CODE_REPOSITORY", (tmp_path / "remote.git").as_uri())
    return folder


def cloned_commit() -> str:
    (step,) = deploy.with_code({})["pull"]
    return step["prefect.deployments.steps.git_clone"]["commit_sha"]


def test_the_checkout_s_commit_is_cloned_and_what_it_lacks_is_told(checkout, capsys):
    head = git("-C", checkout, "rev-parse", "HEAD")
    assert cloned_commit() == head
    assert capsys.readouterr().out == ""
    (checkout / "file").write_text("changed")
    assert cloned_commit() == head
    assert f"has changes that are in no commit: runs clone {head} without them" in capsys.readouterr().out


def test_a_commit_that_was_not_pushed_is_refused(checkout):
    pushed = git("-C", checkout, "rev-parse", "HEAD")
    git("-C", checkout, "commit", "-q", "--allow-empty", "-m", "second")
    with pytest.raises(ConfigError, match="no worker could clone it: push it first"):
        cloned_commit()
    deploy.check_commit(str(checkout), git("-C", checkout, "rev-parse", "HEAD"))
    deploy.check_commit(str(checkout), pushed)


@pytest.mark.parametrize("commit", ["main", "0123abc", "0" * 40])
def test_so_is_a_name_that_leads_to_no_commit(checkout, monkeypatch, commit):
    monkeypatch.setenv("HASS_CODE_COMMIT", commit)
    with pytest.raises(ConfigError, match=f"has no commit {commit}, "):
        cloned_commit()


def test_a_repository_that_does_not_answer_here_may_answer_workers(checkout, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HASS_CODE_REPOSITORY", (tmp_path / "away.git").as_uri())
    assert cloned_commit() == git("-C", checkout, "rev-parse", "HEAD")
    assert "does not answer here" in capsys.readouterr().out


@pytest.mark.parametrize("user", ["me:secret", "secret"])
def test_an_address_with_a_key_is_refused_and_not_shown(checkout, monkeypatch, user):
    monkeypatch.setenv("HASS_CODE_REPOSITORY", f"https://{user}@host.example/hass.git")
    with pytest.raises(ConfigError, match="deployments are recorded") as caught:
        cloned_commit()
    assert "secret" not in str(caught.value)
