"""What is known of a target by all who train or keep a draft for it, whether its layers are loaded or not."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hass_core.target_model.identity import TargetIdentity


class KnownTarget(ABC):
    """Embedding, head, words and identity of a target. V vocabulary, H hidden size."""

    name: str
    folder: str
    tokenizer: PreTrainedTokenizerBase
    identity: TargetIdentity
    origin: Mapping[str, str]  # where it can be loaded again: source, and revision if one

    @property
    @abstractmethod
    def config(self) -> PretrainedConfig:
        """Its configuration as stored."""

    @property
    @abstractmethod
    def embedding(self) -> Tensor:
        """Token embeddings [V, H]."""

    @property
    @abstractmethod
    def head(self) -> Tensor:
        """Output projection [V, H]; takes the hidden state after the final norm."""

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def final_norm(self) -> tuple[Tensor, float] | None:
        """Weight [H] and epsilon of the RMSNorm before the head; None where it is not here, or not known to be a plain
        one."""
        return None

    @property
    @abstractmethod
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer."""

    @abstractmethod
    def sampled_fingerprint(self) -> str | None:
        """What drafts trained before identities were kept name their target by; None where the layers are not here."""

    @property
    def fingerprint(self) -> str:
        """The digest of its whole identity."""
        return self.identity.digest

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def record(self) -> dict[str, Any]:
        """What a draft notes of its target; see `differing`."""
        noted = {f"target_{name}": value for name, value in self.origin.items()}
        return {"target": self.name, "target_identity": self.identity.parts(), **noted}

    def differing(self, record: Mapping[str, Any]) -> list[str]:
        """The parts of its identity in which a draft's record tells of another target; [] where it tells nothing.

        End tokens do not count: they decide which text a draft is trained on, not what it guesses. Drafts trained
        before identities were kept tell a sample of the weights and the template.
        """
        differing = self.identity.differing(record.get("target_identity", {}), but=("ends",))
        elder = record.get("target_fingerprint")
        if elder is not None and elder != self.sampled_fingerprint():
            differing.append("weights")
        if record.get("template_hash", self.identity.template) != self.identity.template:
            differing.append("template")
        return differing
