"""However a step is divided - micro-batches, packs, processes - the weights come out the same."""

import os
import signal
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from hass_core.config import RunConfig
from hass_core.store import Store
from hass_core.target_model.loader import freeze
from hass_core.training import loop, step, train
from hass_core.training.checkpoint import checkpoint_name, checkpoints
from hass_core.training.train import draft_folder, train_draft
from tests.conftest import byte_tokenizer, tiny_llama
from tests.processes import start, wait
from tests.training.conftest import read_records, store_features
from tests.training.test_train import settings


def division(packs_per_micro_batch: int, optimizer: str = "adamw", architecture: str = "eagle"):
    return settings(
        architecture,
        optimizer=optimizer,
        ema_decay=0.9 if optimizer == "muon" else None,
        packs_per_step=4,
        packs_per_micro_batch=packs_per_micro_batch,
        max_steps=4,
        validate_every_steps=100,
        checkpoint_every_steps=2,
        lr_peak=1e-3,
    )


def trained(root: Path, target, config: RunConfig) -> Path:
    """The folder of the draft."""
    store = Store(root)
    artifact = train_draft(config, store_features(store, target), store, target)
    return Path(store.open(artifact).local_path("model.safetensors")).parent


@pytest.fixture(scope="module")
def undivided(tmp_path_factory, tiny_target) -> Callable[..., Path]:
    """The folder of the draft that one process trains with whole steps, made once for each pair of arguments."""

    @cache
    def folder(optimizer: str = "adamw", architecture: str = "eagle") -> Path:
        return trained(tmp_path_factory.mktemp("one"), tiny_target, division(4, optimizer, architecture))

    return folder


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        # Adam divides by the gradient's size, which magnifies the rounding of tiny gradients
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def assert_equal_drafts(one: Path, other: Path) -> None:
    assert_equal(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))


@pytest.mark.parametrize(("packs", "architecture"), [(1, "eagle"), (2, "eagle3"), (3, "eagle")])
def test_micro_batches_of_fewer_packs_give_the_result_of_one(tmp_path, tiny_target, undivided, packs, architecture):
    """With noise on the inputs, which belongs to a pack however the step is divided; 3 leaves a smaller last one."""
    divided = trained(tmp_path, tiny_target, division(packs, architecture=architecture))
    assert_equal_drafts(undivided(architecture=architecture), divided)


def test_the_division_of_a_step_is_no_part_of_a_drafts_name(store, tiny_target):
    features = store_features(store, tiny_target)
    one, other = (draft_folder(division(packs), features, store, tiny_target) for packs in (1, 4))
    assert one.digest == other.digest
    bigger = division(1).model_copy(update={"training": settings(packs_per_step=8).training})
    assert draft_folder(bigger, features, store, tiny_target).digest != one.digest


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{}, {"AS_CAPTURED": "1"}, {"RECOMPUTE": "1"}, {"ARCHITECTURE": "eagle3"}],
    ids=["DDP", "as captured", "DDP, layers again", "DDP, a head that is trained"],
)
def test_two_processes_equal_one(tmp_path, undivided, variables):
    assert two_processes(tmp_path, **variables) == [0, 0]
    (two,) = (tmp_path / "draft").glob("*/")
    one = undivided(architecture=variables.get("ARCHITECTURE", "eagle"))
    assert_equal_drafts(one, two)
    for name in ("val/loss", "val/tau", "val/tree_tau"):  # which the two have divided
        assert curve(two, name) == pytest.approx(curve(one, name), abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "variables"),
    [("adamw", {}), ("muon", {}), ("adamw", {"RECOMPUTE": "1"}), ("adamw", {"ARCHITECTURE": "eagle3"})],
    ids=["adamw", "muon", "layers again", "a head that is trained"],
)
def test_weights_divided_between_two_processes_give_the_losses_of_one(tmp_path, undivided, optimizer, variables):
    assert two_processes(tmp_path, optimizer, ACCELERATE_USE_FSDP="true", **variables) == [0, 0]
    (two,) = (tmp_path / "draft").glob("*/")
    one = undivided(optimizer, variables.get("ARCHITECTURE", "eagle"))
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/tau"):
        assert curve(two, name) == pytest.approx(curve(one, name), abs=1e-4), name
    if optimizer == "adamw":  # Muon computes in bfloat16, where the order of a sum shows
        assert_equal_drafts(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_one_process_ends_both_behind_the_same_step(tmp_path, tiny_target, undivided, rank):
    assert two_processes(tmp_path, TERMINATED=rank) == [143, 143]
    store = Store(tmp_path)
    folder = draft_folder(division(1), store_features(store, tiny_target), store, tiny_target)
    assert checkpoints(folder)[-1] == checkpoint_name(3), "the step in which both learnt of it"
    # and one process goes on from what two have made
    two = trained(tmp_path, tiny_target, division(4))
    assert_equal_drafts(two, undivided())
    assert curve(two, "tokens_seen") == curve(undivided(), "tokens_seen")


@pytest.mark.slow
def test_two_processes_do_not_send_each_other_the_embedding(tmp_path):
    assert two_processes(tmp_path / "two", COUNTS_BROADCASTS="1") == [0, 0]


@pytest.mark.slow
def test_divided_training_that_died_continues_from_its_checkpoint(tmp_path):
    divided = {"ACCELERATE_USE_FSDP": "true"}
    assert two_processes(tmp_path / "whole", **divided) == [0, 0]
    assert two_processes(tmp_path / "died", DIES_AT="3", **divided) == [9, 9]
    assert two_processes(tmp_path / "died", **divided) == [0, 0]
    (whole,), (died,) = ((tmp_path / name / "draft").glob("*/") for name in ("whole", "died"))
    assert curve(died, "train/loss") == curve(whole, "train/loss")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, died))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def curve(folder: Path, name: str) -> list[float]:
    return [record[name] for record in read_records(folder / "metrics.jsonl") if name in record]


def two_processes(root: Path, optimizer: str = "adamw", **variables: str) -> list[int]:
    """How two training processes ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"ACCELERATE_USE_CPU": "true", **variables}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    workers = [start(train_as_one_of_two, root, optimizer, **common, **rank) for rank in ranks]
    return [wait(worker) for worker in workers]


def train_as_one_of_two(root: Path, optimizer: str) -> None:
    """In a process of its own, whose environment says what happens to it."""
    torch.set_num_threads(1)
    PartialState(cpu=True)
    store, target = Store(root), freeze(tiny_llama(), byte_tokenizer(), name="tiny")
    with PartialState().main_process_first():
        features = store_features(store, target)
    spoil_steps()
    train_draft(as_told(division(1, optimizer, os.environ.get("ARCHITECTURE", "eagle"))), features, store, target)


def as_told(config: RunConfig) -> RunConfig:
    """With what this process's environment wants of it."""
    changes = {
        name: True for name, told in (("recompute", "RECOMPUTE"), ("compile", "AS_CAPTURED")) if told in os.environ
    }
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def spoil_steps() -> None:
    """Of this process, as its environment wants it."""
    if os.environ.get("AS_CAPTURED"):  # all that surrounds a CUDA graph, without the graph
        step.Alignment.compile_parts = lambda alignment: None
        step.can_be_captured = lambda accelerator: True
        step.GraphPerShape = lambda backward: backward
    take_step, train_all = loop.train_step, loop.train

    def step_or_die(trainer, batches, number, stop):
        if number == int(os.environ.get("DIES_AT", -1)):
            os._exit(9)
        if number == 1 and os.environ.get("TERMINATED") == os.environ["RANK"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(trainer, batches, number, stop)

    def train_without_broadcasts(*given):
        def sent(*what, **options):
            raise AssertionError("buffers are sent")

        torch.distributed._broadcast_coalesced = sent
        return train_all(*given)

    loop.train_step = step_or_die
    if os.environ.get("COUNTS_BROADCASTS"):
        train.train = train_without_broadcasts
