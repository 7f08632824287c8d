"""Training by processes that this one starts: the same draft, their progress, mistakes and end passed on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hass_core.config import RunConfig
from hass_core.errors import BadInput, HassError, StoreError
from hass_core.features.extract import MADE_WITH, extract_features
from hass_core.store import Artifact, Store
from hass_core.target_model.embeddings import MadeWith
from hass_core.target_model.loader import load_target
from hass_core.training.checkpoint import checkpoints
from hass_core.training.launch import _failure, train_on_all
from hass_core.training.train import draft_folder, train_draft
from tests.conftest import byte_tokenizer, tiny_llama
from tests.features.conftest import conversation, responses_artifact
from tests.training.test_division import assert_equal
from tests.training.test_train import settings

PARENT = """
import sys
from pathlib import Path
from hass_core.config import parse_config
from hass_core.store import Store
from hass_core.target_model.loader import load_target
from hass_core.training.launch import train_on_all
import json
config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
store = Store(config.store)
features = store.artifact("features", sys.argv[2])
train_on_all(config, features, store, load_target(config.target), lambda *at: print(at[0], flush=True))
"""


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> tuple[RunConfig, Artifact, Store]:
    """Settings for two processes, a stored target and its features."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_llama().save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    config = settings(packs_per_step=4, max_steps=4, validate_every_steps=100, checkpoint_every_steps=2)
    target = config.target.model_copy(update={"source": str(tmp_path / "target"), "device": "cpu", "dtype": "float32"})
    two = config.execution.model_copy(update={"gpus": 2})
    config = config.model_copy(update={"target": target, "execution": two, "store": str(tmp_path / "store")})
    store = Store(config.store)
    rows = [conversation(f"c{i}", answer="word " * (i % 7 + 4) + "end") for i in range(24)]
    features = extract_features(config, responses_artifact(store, rows), store, load_target(config.target))
    return config, features, store


@pytest.mark.slow
def test_two_launched_processes_train_the_draft_of_one(prepared, tmp_path):
    config, features, store = prepared
    made_with = MadeWith.model_validate_json(store.open(features).read_text(MADE_WITH))
    assert made_with == MadeWith.of(load_target(config.target))
    seen: list[tuple[int, int, str]] = []
    two = train_on_all(config, features, store, load_target(config.target), lambda *at: seen.append(at))
    assert seen[-1][:2] == (4, 4)
    assert "tokens/s" in seen[-1][2]
    assert train_on_all(config, features, store, load_target(config.target)) == two
    weights = load_file(store.open(two).local_path("model.safetensors"))
    store.fs.rm(f"{store.root}/draft", recursive=True)
    one = train_draft(config, features, store, load_target(config.target))
    assert one.digest == two.digest
    assert_equal(load_file(store.open(one).local_path("model.safetensors")), weights)


@pytest.mark.slow
def test_two_hosts_that_share_a_store_train_the_draft_of_one_process(prepared, tmp_path):
    """Each host runs the stage with its own configuration of accelerate, which names its rank."""
    config, features, store = prepared
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hosts = []
    for rank in range(2):
        (tmp_path / f"host{rank}.yaml").write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\n"
            f"machine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\nmixed_precision: 'no'\n"
        )
        own = {"gpus": 1, "accelerate": str(tmp_path / f"host{rank}.yaml")}
        execution = config.execution.model_copy(update=own)
        (tmp_path / f"host{rank}.json").write_text(config.model_copy(update={"execution": execution}).model_dump_json())
        command = [sys.executable, "-c", PARENT, tmp_path / f"host{rank}.json", features.digest]
        hosts.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]))
    for host in hosts:
        _, errors = host.communicate(timeout=600)
        assert host.returncode == 0, errors[-2000:]
    folder = draft_folder(config, features, store, load_target(config.target))
    weights = load_file(folder.local_path("model.safetensors"))
    store.fs.rm(f"{store.root}/draft", recursive=True)
    one = train_draft(config, features, store, load_target(config.target))
    assert_equal(load_file(store.open(one).local_path("model.safetensors")), weights)


@pytest.mark.slow
def test_the_death_of_the_parent_ends_the_processes_with_their_state_saved(prepared, tmp_path):
    config, features, store = prepared
    training = config.training.model_copy(update={"max_steps": 100_000, "passes": 1000, "log_every_steps": 1})
    config = config.model_copy(update={"training": training.model_copy(update={"checkpoint_every_steps": 10_000})})
    (tmp_path / "settings.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", PARENT, tmp_path / "settings.json", features.digest]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as parent:
        assert parent.stdout
        assert int(parent.stdout.readline()) >= 1
        parent.send_signal(signal.SIGKILL)
    folder = draft_folder(config, features, store, load_target(config.target))
    deadline = time.monotonic() + 60
    while not checkpoints(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert checkpoints(folder)
    while running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not running(tmp_path)


def running(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            found += [entry.name] if any(word.startswith(str(folder)) for word in words) else []
    return found


def test_a_step_that_cannot_be_divided_is_refused_before_anything_starts(prepared):
    config, features, store = prepared
    three = config.model_copy(update={"execution": config.execution.model_copy(update={"gpus": 3})})
    with pytest.raises(BadInput, match="cannot be divided evenly among 3 processes"):
        train_on_all(three, features, store, load_target(config.target))


@pytest.mark.slow
def test_a_mistake_that_the_processes_meet_is_told_as_in_one(prepared):
    config, features, store = prepared
    whole = load_target(config.target)
    (Path(config.target.source) / "model.safetensors").unlink()
    with pytest.raises(HassError, match="has no safetensors; convert it, or train with the whole target"):
        train_on_all(config, features, store, whole)


def test_a_failure_tells_the_mistake_or_the_end_of_the_log(tmp_path):
    (tmp_path / "log").write_text("a\n\nb\nRuntimeError: NCCL\n")
    assert str(_failure(tmp_path, 1)).startswith(
        "training by several processes ended with exit status 1: a / b / RuntimeError: NCCL (all of it in"
    )
    (tmp_path / "problem.json").write_text('{"kind": "StoreError", "message": "the disk is full"}')
    assert isinstance(_failure(tmp_path, 2), StoreError)
