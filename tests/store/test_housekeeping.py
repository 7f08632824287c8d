"""Pruning a store: what champions, their ancestors and the newest runs need stays."""

import json
import os
import re
import time

import pytest
from typer.testing import CliRunner

from hass_core.cli.app import app
from hass_core.errors import CorruptFile, StoreError
from hass_core.store import Artifact, Store
from hass_core.store.housekeeping import entries, note_registered, removable, remove

STAGES = ("prompts", "responses", "features", "draft", "evaluation")
DAY = 86_400


def chain(store: Store, run: int, days_ago: int) -> list[Artifact]:
    """The stages of one run, each made of the one before."""
    made: list[Artifact] = []
    for stage in STAGES:
        key = {"run": run, **({made[-1].stage: made[-1].digest} if made else {})}
        folder = store.stage(stage, key)
        folder.write_text("data", "x" * 1000)
        made.append(folder.finish({}))
        age(store, made[-1], days_ago, STAGES.index(stage))
    return made


def age(store: Store, artifact: Artifact, days: int, later: int = 0) -> None:
    when = time.time() - days * DAY + later
    for folder, _, files in os.walk(f"{store.root}/{artifact.stage}/{artifact.digest}"):
        for file in files:
            os.utime(os.path.join(folder, file), (when, when))


def going(store: Store, newest: int) -> set[str]:
    return {entry.name for entry in removable(store, entries(store, STAGES), newest)}


def named(*artifacts: Artifact) -> set[str]:
    return {f"{artifact.stage}/{artifact.digest}" for artifact in artifacts}


def test_the_newest_runs_stay_whole_and_older_ones_go(store):
    old, middle, new = (chain(store, run, days) for run, days in enumerate((30, 20, 10)))
    assert going(store, newest=2) == named(*old)
    assert going(store, newest=1) == named(*old, *middle)
    assert new


def test_a_registered_draft_keeps_what_it_came_from_but_its_features(store):
    old = chain(store, 0, 30)
    note_registered(store, "draft-x", "1", old)
    chain(store, 1, 10)
    assert going(store, newest=1) == named(old[2])


def test_what_is_younger_than_a_day_stays(store):
    chain(store, 0, 0)
    assert going(store, newest=0) == set()


def test_what_somebody_began_to_read_within_a_day_stays_with_what_it_came_from(store):
    old = chain(store, 0, 30)
    chain(store, 1, 10)
    store.open(old[2]).note_use()
    assert going(store, newest=1) == named(*old[3:])
    assert store.open(old[2]).problems() == []
    age(store, old[2], 2)
    assert going(store, newest=1) == named(*old)


def test_nothing_goes_while_something_is_being_made(store):
    chain(store, 0, 30)
    store.stage("draft", {"under": "way"}).write_text("step.json", "1")
    with pytest.raises(StoreError, match="is being made, it seems"):
        going(store, newest=0)


def test_an_unfinished_stage_is_never_removed(store):
    store.stage("draft", {"under": "way"}).write_text("step.json", "1")
    (entry,) = entries(store, STAGES)
    age(store, Artifact(stage="draft", digest=entry.digest, root=store.root), 30)
    assert going(store, newest=0) == set()


def test_a_broken_note_stops_the_pruning(store):
    chain(store, 0, 30)
    note_registered(store, "draft-x", "1", [])
    store.fs.pipe_file(f"{store.root}/registered/draft-x/1.json", b"{}")
    with pytest.raises(StoreError, match="mend it before you prune"):
        going(store, newest=0)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_a_broken_manifest_is_named(store, content):
    made = chain(store, 0, 30)
    store.fs.pipe_file(f"{made[2].url}/manifest.json", content)
    with pytest.raises(CorruptFile, match=rf"features/{made[2].digest}/manifest.json: not a manifest; remove"):
        going(store, newest=0)


def test_what_is_removed_is_made_again_when_wanted(store):
    old = chain(store, 0, 30)
    for entry in removable(store, entries(store, STAGES), 0):
        remove(store, entry)
    assert entries(store, STAGES) == []
    assert chain(store, 0, 0) == old


def test_the_command_says_what_would_go_before_anything_goes(store):
    old = chain(store, 0, 30)
    chain(store, 1, 10)
    run, options = CliRunner(), ["-s", f"store={store.root}"]
    told = run.invoke(app, ["store", "prune", "--keep", "1", *options])
    assert re.search(r"5 stages with [1-9]\S* k?B would go; --yes removes them", told.output)
    assert store.artifact("draft", old[3].digest)
    assert "5 stages removed" in run.invoke(app, ["store", "prune", "--keep", "1", "--yes", *options]).output
    assert store.artifact("draft", old[3].digest) is None
    assert "evaluation      1" in run.invoke(app, ["store", "size", *options]).output
    assert run.invoke(app, ["store", "ls", *options]).output.count("evaluation") == 1


def test_the_commands_answer_programs_and_need_no_target(store):
    old = chain(store, 0, 30)
    run, options = CliRunner(), ["--json", "-s", f"store={store.root}", "-s", "target.source=/no/such/model"]
    for yes in ([], ["--yes"]):
        told = run.invoke(app, ["store", "prune", "--keep", "0", *yes, *options])
        assert {entry["digest"] for entry in json.loads(told.stdout)} == {made.digest for made in old}
    assert json.loads(run.invoke(app, ["store", "ls", *options]).stdout) == []
