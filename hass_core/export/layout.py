"""The tensors of an EAGLE-style draft: the one table of names and shapes that export, import and the checker share.

Names are flat (`fc.weight`, `layers.0.…`): vLLM and SGLang put `model.` in front themselves.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hass_core.errors import BadInput

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class Layout:
    """Sizes that determine every shape, read from a draft's config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Layout":
        """Raises BadInput naming the missing fields."""
        needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        if missing := [name for name in needed if name not in config]:
            raise BadInput(f"the draft's {CONFIG} lacks {', '.join(missing)}; copy them from the target's {CONFIG}")
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
        )

    def trained(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors every draft must have."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "fc.weight": (hidden, 2 * hidden),
            "layers.0.self_attn.q_proj.weight": (queries, hidden),
            "layers.0.self_attn.k_proj.weight": (keys, hidden),
            "layers.0.self_attn.v_proj.weight": (keys, hidden),
            "layers.0.self_attn.o_proj.weight": (hidden, queries),
            "layers.0.mlp.gate_proj.weight": (inner, hidden),
            "layers.0.mlp.up_proj.weight": (inner, hidden),
            "layers.0.mlp.down_proj.weight": (hidden, inner),
            "layers.0.post_attention_layernorm.weight": (hidden,),
        }

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors some engines want."""
        return {"fc.bias": (self.hidden_size,), "embed_tokens.weight": (self.vocab_size, self.hidden_size)}


def read_config(folder: Path) -> dict[str, Any]:
    """A draft's config.json. Raises BadInput when it is missing or no JSON."""
    path = folder / CONFIG
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} does not exist; a draft is a folder with {CONFIG} and {WEIGHTS}") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a draft's model.safetensors. Raises BadInput when the file is missing or broken."""
    path = folder / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; `hass import` converts a pytorch_model.bin") from None
    except Exception as error:  # safetensors raises its own class, which it does not export as a type
        raise BadInput(f"{path} is not a readable safetensors file: {error}") from error


def check_out(out: Path, source: Path) -> None:
    """Raise BadInput where writing a draft to `out` would overwrite something else, or its own `source`."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; name a folder to write the draft to")
    if out.resolve() == source.resolve():
        raise BadInput(f"{out} is the draft to read; name another folder to write to")
    if out.exists() and not (out / WEIGHTS).is_file() and any(out.iterdir()):
        raise BadInput(f"{out} exists and holds something other than a draft; name another folder")
