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
from hass_core.training.train import train_draft
from tests.training.conftest import store_features
from tests.training.test_train import settings

WORKER = """
import sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
PartialState(cpu=True)
from hass_core.store import Store
from hass_core.target.loader import freeze
from hass_core.training.train import train_draft
from tests.conftest import byte_tokenizer, tiny_llama
from tests.training.conftest import store_features
from tests.training.test_division import division

store = Store(sys.argv[1])
target = freeze(tiny_llama(), byte_tokenizer(), name="tiny")
with PartialState().main_process_first():
    features = store_features(store, target)
train_draft(division(2, 1), features, store, target)
"""


def division(packs_per_batch: int, accumulation_steps: int):
    return settings(
        packs_per_batch=packs_per_batch,
        accumulation_steps=accumulation_steps,
        max_steps=4,
        feature_noise=0.0,
        validate_every_steps=100,
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
def test_two_processes_equal_one(tmp_path, tiny_target):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "two")],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    (weights,) = (tmp_path / "two" / "draft").glob("*/model.safetensors")
    assert_equal(trained(tmp_path / "one", tiny_target, 4, 1), load_file(weights))
