"""Small drafts, random conversations, and the slow twins the fast code is held against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.layers import DraftModel
from hass_core.features.schema import FeatureInfo
from hass_core.features.writer import FeatureWriter
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import Target
from hass_core.training.metrics import read_metrics

VOCABULARY, HIDDEN = 97, 32


@dataclass(frozen=True)
class Talk:
    """A conversation as the features reader hands it out."""

    id: str
    token_ids: Tensor
    loss_mask: Tensor
    features: Tensor
    taps: Tensor | None = None


def make_talk(name: str, length: int, prompt: int, seed: int = 0, hidden: int = HIDDEN) -> Talk:
    """Random tokens and features; the first `prompt` tokens are the user's."""
    generator = torch.Generator().manual_seed(seed)
    return Talk(
        id=name,
        token_ids=torch.randint(0, VOCABULARY, (length,), generator=generator),
        loss_mask=torch.arange(length) >= prompt,
        features=torch.randn(length, hidden, generator=generator),
    )


def make_draft(seed: int = 0, **overrides: object) -> DraftModel:
    """A random draft with grouped queries; weights large enough that attention matters."""
    settings: dict[str, object] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    torch.manual_seed(seed)
    draft = DraftModel(DraftArchitecture(**(settings | overrides)), torch.randn(VOCABULARY, HIDDEN))  # pyright: ignore
    for parameter in draft.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.7 / parameter.shape[1] ** 0.5)
    return draft


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete records of a metrics.jsonl that may be under way."""
    return read_metrics(path.read_text()) if path.exists() else []


@pytest.fixture
def talks() -> list[Talk]:
    lengths = ((19, 5), (7, 2), (30, 11), (12, 1))
    return [make_talk(f"talk-{i}", length, prompt, seed=i) for i, (length, prompt) in enumerate(lengths)]


def store_features(store: Store, target: Target, conversations: int = 24, seed: int = 0) -> Artifact:
    """A finished features stage: random conversations through the tiny target."""
    info = FeatureInfo(
        hidden_size=target.head.shape[1],
        encoding="bf16",
        target_identity=target.fingerprint,
    )
    folder = store.stage("features", {"seed": seed, "conversations": conversations})
    generator = torch.Generator().manual_seed(seed)
    with folder.writing("part-00000.parquet") as file:
        with FeatureWriter(file.path, info) as writer:
            for i in range(conversations):
                length = int(torch.randint(20, 50, (1,), generator=generator))
                token_ids = torch.randint(3, target.head.shape[0], (length,), generator=generator)
                with torch.no_grad():
                    features = target.model.model(token_ids[None]).last_hidden_state[0]
                mask = [int(t >= 8) for t in range(length)]
                split = "validation" if i % 6 == 5 else "train"
                writer.add(f"talk-{i}", split, token_ids.tolist(), mask, features)
        file.rows = conversations
    return folder.finish({})
