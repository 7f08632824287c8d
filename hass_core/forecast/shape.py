"""A target's sizes, out of its config.json alone, and what follows: parameters of target and draft, caches."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hass_core.draft_config import DraftConfig
from hass_core.errors import BadInput
from hass_core.json_files import read_object
from hass_core.presets import recorded_shapes
from hass_core.target_model.hub import hub_file

BYTES = 2  # of a number in bfloat16


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder; H hidden, I inner, V vocabulary."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int  # heads of keys and values
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding
    qkv_bias: bool = False
    head_rows: int = 0  # of the draft's own head, which an eagle3 draft trains
    taps: int = 0  # states inside the target that the draft fuses

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> "Shape":
        """Of a config.json's content. Raises KeyError for one that is no dense decoder's."""
        text = config.get("text_config") or config
        heads = text["num_attention_heads"]
        return cls(
            hidden=text["hidden_size"],
            inner=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            groups=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocabulary=text["vocab_size"],
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            qkv_bias=text.get("model_type") == "qwen2",
        )

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention matrices."""
        return self.head_dim * (2 * self.heads + 2 * self.groups) * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of a layer's matrices."""
        return self.attention + 3 * self.hidden * self.inner

    @property
    def ends(self) -> int:
        """Parameters of embedding and head, which a draft shares with its target."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def target(self) -> int:
        """Parameters of the target, without its norms and biases, which are less than a thousandth."""
        return self.layers * self.layer + self.ends

    def drafted_by(self, draft: DraftConfig) -> "Shape":
        """With the draft's own head, where the settings ask for an architecture that has one."""
        rows = min(draft.vocab_size or self.vocabulary, self.vocabulary)
        if draft.architecture == "eagle":
            return self
        return replace(self, head_rows=rows, taps=len(draft.tapped(self.layers)))

    @property
    def fusion(self) -> int:
        """Parameters by which a draft's layer takes an embedding beside the feature: a layer before it, or attention
        matrices of twice the width."""
        rows = self.head_dim * (self.heads + 2 * self.groups) if self.head_rows else 2 * self.hidden
        return rows * self.hidden

    @property
    def draft(self) -> int:
        """Trained parameters of a draft: a layer of the target's sizes, the fusion of embedding and feature, and either
        biases and the norm before the MLP, or four norms and a head."""
        if self.head_rows:
            return self.layer + self.fusion + (4 + self.head_rows + self.taps * self.hidden) * self.hidden
        biases = self.head_dim * (self.heads + 2 * self.groups) if self.qkv_bias else 0
        return self.layer + self.fusion + self.hidden + biases

    @property
    def weight_bytes(self) -> int:
        """Of the target in 16 bits."""
        return BYTES * self.target

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * BYTES * self.layers * self.groups * self.head_dim


def shape_of(source: str) -> Shape:
    """The shape of a preset's target, of a folder, or of a model that the hub's cache holds; nothing is fetched.

    Raises BadInput where there is no config.json to read it from.
    """
    if source in (recorded := recorded_shapes()):
        return Shape.of_config(recorded[source]["config"])
    file = _config_file(source)
    if file is None:
        raise BadInput(
            f"the sizes of the target {source!r} are not known here: fetch its config.json "
            f"(hf download {source} config.json), or give a folder that holds it"
        )
    try:
        return Shape.of_config(read_object(file, BadInput, "the target's sizes stand in it"))
    except KeyError as error:
        raise BadInput(f"{file} has no {error.args[0]}: only dense decoders can be forecast") from None


def _config_file(source: str) -> Path | None:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    return hub_file(source, "config.json")
