"""The files of a draft's folder: config.json beside safetensors (one file, or shards and their index) or a plain
`.bin` of tensors, and the lists of tokens that a draft of ours has. Nothing that is read is left out without a word.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hass_core.errors import CorruptFile
from hass_core.json_files import read_object

CONFIG, WEIGHTS, VOCABULARY, RANKS = "config.json", "model.safetensors", "draft_vocab.json", "token_ranks.json"
INDEX, PICKLED, PICKLED_INDEX = f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
A_DRAFT_IS = f"a draft is a folder with {CONFIG} and {WEIGHTS}, its shards or a {PICKLED}"


def read_config(folder: Path) -> dict[str, Any]:
    """A draft's config.json. Raises CorruptFile when it is missing or no JSON object."""
    return read_object(folder / CONFIG, CorruptFile, A_DRAFT_IS)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder under the names they have there, on the CPU.

    Raises CorruptFile when there are none, a file is broken, or shards and their index do not name the same tensors.
    """
    for single, index, read in ((WEIGHTS, INDEX, _safetensors), (PICKLED, PICKLED_INDEX, _pickled)):
        if (folder / index).is_file():
            return _sharded(folder, folder / index, read)
        if (folder / single).is_file():
            _refuse_strays(folder, {single})
            return _not_contradicted(folder, single, read(folder / single))
    raise CorruptFile(f"{folder / WEIGHTS} is missing: {A_DRAFT_IS}")


def read_token_ids(path: Path) -> Tensor | None:
    """The ids [D] of a draft's list of tokens; None where there is no such file. Raises CorruptFile for anything else
    than a list of different ids."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path} is no readable list of token ids: {error}") from None
    if not isinstance(found, list) or not all(type(item) is int and 0 <= item < 2**31 for item in found):
        raise CorruptFile(f"{path} is no list of token ids; train or export the draft again")
    if len(set(found)) != len(found):
        raise CorruptFile(f"{path} names a token twice; train or export the draft again")
    return torch.tensor(found, dtype=torch.long)


def _sharded(folder: Path, index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = read_object(index, CorruptFile, "it tells in which file each tensor is").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptFile(f"{index} has no weight_map that tells in which file each tensor is")
    single = folder / index.name.removesuffix(".index.json")
    if single.is_file() and single.name not in weight_map.values():
        raise CorruptFile(f"{folder} holds both {single.name} and {index.name}; keep the one that is the draft")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CorruptFile(f"{index} names {file!r}, which is outside of its folder")
        found = read(folder / file)
        if other := sorted(name for name in found if weight_map.get(name) != file):
            raise CorruptFile(f"{folder / file} holds {', '.join(other)}, which {index.name} does not place there")
        tensors |= found
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise CorruptFile(f"{index} names {', '.join(missing)}, which its files do not hold")
    _refuse_strays(folder, set(weight_map.values()))
    return tensors


def _not_contradicted(folder: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors. Raises CorruptFile where the folder holds a pickle of others too: which one is the draft?"""
    if name == WEIGHTS and (folder / PICKLED).is_file():
        others = _pickled(folder / PICKLED)
        if tensors.keys() != others.keys() or not all(same_values(tensors[key], others[key]) for key in tensors):
            raise CorruptFile(
                f"{folder} holds both {WEIGHTS} and {PICKLED}, which differ; keep the one that is the draft"
            )
    return tensors


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors hold the same numbers, as far as the coarser of their types tells."""
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    if ours.shape != theirs.shape:
        return False
    return any(torch.equal(ours.to(kind), theirs.to(kind)) for kind in {ours.dtype, theirs.dtype})


def _refuse_strays(folder: Path, taken: set[str]) -> None:
    """Raise CorruptFile for further weights of the same kind that no index names."""
    kind = "model*.safetensors" if any(name.endswith(".safetensors") for name in taken) else "pytorch_model*.bin"
    if strays := sorted(path.name for path in folder.glob(kind) if path.name not in taken):
        raise CorruptFile(f"{folder} holds {', '.join(strays)} beside {', '.join(sorted(taken))} and no index names it")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing: {A_DRAFT_IS}") from None
    except Exception as error:  # safetensors raises its own class, which it does not export as a type
        raise CorruptFile(f"{path} is not a readable safetensors file: {error}; train or export it again") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing: {A_DRAFT_IS}") from None
    except Exception as error:  # a pickle that holds more than tensors, or a broken file
        raise CorruptFile(f"{path} is not a plain file of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise CorruptFile(f"{path} is not a plain file of tensors: it holds one {type(found).__name__}")
    if other := sorted(str(name) for name, value in found.items() if not _is_plain(name, value)):
        raise CorruptFile(f"{path} is not a plain file of tensors: {', '.join(other)} is none")
    return found


def _is_plain(name: Any, value: Any) -> bool:
    """Whether an entry of a pickle is a tensor with numbers in memory, under a name."""
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
