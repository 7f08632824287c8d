"""However a step is divided - micro-batches, packs, processes - the weights come out the same."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hass_core.store import Store
from hass_core.training.metrics import read_records
from hass_core.training.train import train_draft
from tests.training.conftest import store_features
from tests.training.test_train import settings

WORKER = """
import os
import sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
PartialState(cpu=True)
from hass_core.store import Store
from hass_core.target_model.loader import freeze
from hass_core.training import loop, train
from tests.conftest import byte_tokenizer, tiny_llama
from tests.training.conftest import store_features
from tests.training.test_division import division

store = Store(sys.argv[1])
target = freeze(tiny_llama(), byte_tokenizer(), name="tiny")
with PartialState().main_process_first():
    features = store_features(store, target)
config = division(1, 2, sys.argv[2])
if os.environ.get("RECOMPUTE"):
    config = config.model_copy(update={"training": config.training.model_copy(update={"recompute": True})})
if os.environ.get("AS_CAPTURED"):  # all that surrounds a CUDA graph, without the graph
    config = config.model_copy(update={"training": config.training.model_copy(update={"compile": True})})
    train.Alignment.compile_parts = lambda alignment: None
    train.can_be_captured = lambda accelerator: True
    loop.Captured = lambda backward: backward
take_step = loop.train_step
def step_or_die(run, batches, step):
    if step == int(os.environ.get("DIES_AT", -1)):
        os._exit(9)
    return take_step(run, batches, step)
loop.train_step = step_or_die
train.train_draft(config, features, store, target)
"""


def division(packs_per_batch: int, accumulation_steps: int, optimizer: str = "adamw"):
    return settings(
        optimizer=optimizer,
        ema_decay=0.9 if optimizer == "muon" else None,
        packs_per_batch=packs_per_batch,
        accumulation_steps=accumulation_steps,
        max_steps=4,
        feature_noise=0.0,
        validate_every_steps=100,
        checkpoint_every_steps=2,
        lr_peak=1e-3,
    )


def trained(root: Path, target, packs_per_batch: int, accumulation_steps: int) -> dict[str, torch.Tensor]:
    store = Store(root)
    artifact = train_draft(division(packs_per_batch, accumulation_steps), store_features(store, target), store, target)
    return load_file(store.open(artifact).local_path("model.safetensors"))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        # Adam divides by the gradient's size, which magnifies the rounding of tiny gradients
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_four_micro_batches_of_one_pack_equal_one_of_four(tmp_path, tiny_target):
    assert_equal(trained(tmp_path / "a", tiny_target, 4, 1), trained(tmp_path / "b", tiny_target, 1, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{}, {"AS_CAPTURED": "1"}, {"RECOMPUTE": "1"}], ids=["DDP", "as captured", "DDP, layers again"]
)
def test_two_processes_equal_one(tmp_path, tiny_target, variables):
    assert two_processes(tmp_path / "two", **variables) == [0, 0]
    (weights,) = (tmp_path / "two" / "draft").glob("*/model.safetensors")
    assert_equal(trained(tmp_path / "one", tiny_target, 4, 1), load_file(weights))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "variables"),
    [("adamw", {}), ("muon", {}), ("adamw", {"RECOMPUTE": "1"})],
    ids=["adamw", "muon", "layers again"],
)
def test_weights_divided_between_two_processes_give_the_losses_of_one(tmp_path, tiny_target, optimizer, variables):
    assert two_processes(tmp_path / "two", optimizer, ACCELERATE_USE_FSDP="true", **variables) == [0, 0]
    (two,) = (tmp_path / "two" / "draft").glob("*/")
    store = Store(tmp_path / "one")
    artifact = train_draft(division(4, 1, optimizer), store_features(store, tiny_target), store, tiny_target)
    one = Path(store.open(artifact).local_path("model.safetensors")).parent
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/tau"):
        assert curve(two, name) == pytest.approx(curve(one, name), abs=1e-4), name
    if optimizer == "adamw":  # Muon computes in bfloat16, where the order of a sum shows
        assert_equal(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))


@pytest.mark.recovery
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
    common |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root), optimizer],
            env=os.environ | common | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    return [worker.wait(timeout=200) for worker in workers]
