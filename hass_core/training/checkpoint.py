"""Training state in one safetensors file: weights, optimizer, moving average, position, the curves so far.

Everything random in training is a function of the seed and the position, so the position is all the random state
there is. Files appear whole or not at all (store.py); the last few and the best are kept.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hass_core.errors import CorruptFile
from hass_core.store import StageFolder
from hass_core.training.sharding import divided_like, whole
from hass_core.training.step import MovingAverage

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Position:
    """How far training is. `best_*` tell of the best validation so far, `stale` counts those since."""

    step: int = 0
    tokens_seen: int = 0
    best_step: int = 0
    best_tau: float = 0.0
    stale: int = 0

    def validated(self, tau: float) -> "Position":
        """After a validation at this step."""
        if tau > self.best_tau:
            return replace(self, best_step=self.step, best_tau=tau, stale=0)
        return replace(self, stale=self.stale + 1)


def training_state(model: nn.Module, optimizers: list[Optimizer], average: MovingAverage | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whole; all processes take part."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    if average:
        tensors |= {f"average.{name}": value for name, value in average.weights.items()}
    return {name: whole(value.detach()) for name, value in tensors.items()}


def save_checkpoint(folder: StageFolder, state: dict[str, Tensor], at: Position, records: list[dict[str, Any]]) -> None:
    """Write the file of step `at.step`, with the curves up to it."""
    tensors = {name: value.cpu().contiguous() for name, value in state.items()}
    notes = {"training": folder.digest, "position": json.dumps(asdict(at)), "records": json.dumps(records)}
    with folder.writing(checkpoint_name(at.step), step=at.step) as file:
        save_file(tensors, file.path, metadata=notes)


def load_checkpoint(
    folder: StageFolder, name: str, model: nn.Module, optimizers: list[Optimizer], average: MovingAverage | None
) -> tuple[Position, list[dict[str, Any]]]:
    """Put back what `save_checkpoint` wrote: where training was, and its curves. Raises CorruptFile when the file is
    damaged, or of a training by other settings."""
    with safe_open(folder.local_path(name), framework="pt") as file:
        notes = file.metadata()
        if notes.get("training", folder.digest) != folder.digest:
            raise CorruptFile(
                f"{folder.url}/{name} is a checkpoint of another training, {notes['training']}; remove {folder.url}, "
                "then run the stage again"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        position, records = (json.loads(notes[name]) for name in ("position", "records"))
    weights = model.state_dict()
    model.load_state_dict({k: divided_like(v, weights[k]) for k, v in _below("model.", tensors).items()})
    for number, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for key, value in _below(f"optimizer.{number}.", tensors).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = divided_like(value, parameters[int(index)])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if average:
        for key, value in _below("average.", tensors).items():
            average.weights[key].copy_(divided_like(value, average.weights[key]))
    return Position(**position), records


def checkpoint_name(step: int) -> str:
    """The file of the state after optimizer step `step`."""
    return f"{PREFIX}{step:07d}.safetensors"


def checkpoints(folder: StageFolder) -> list[str]:
    """Names of the checkpoints in place, oldest first."""
    return sorted(name for name in folder.finished() if name.startswith(PREFIX))


def remove_old(folder: StageFolder, keep: int, best_step: int) -> None:
    """Keep the last `keep` and the best."""
    for name in checkpoints(folder)[:-keep]:
        if name != checkpoint_name(best_step):
            folder.remove(name)


def load_weights(folder: StageFolder, step: int, model: nn.Module) -> None:
    """The weights to use from the checkpoint of `step`: the moving average where there is one."""
    with safe_open(folder.local_path(checkpoint_name(step)), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    model.load_state_dict(_below("model.", tensors))
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in _below("average.", tensors).items():
            parameters[name].copy_(value)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
