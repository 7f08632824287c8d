"""Random features in a store, for benchmarks."""

import torch

from hass_core.features.schema import Encoding, FeatureInfo
from hass_core.features.writer import FeatureWriter
from hass_core.store import Artifact, Store

TOKENS_PER_CONVERSATION = 300
CONVERSATIONS_PER_SHARD = 256


def random_features(
    store: Store, hidden_size: int, gigabytes: float, encoding: Encoding
) -> tuple[Artifact, int, float]:
    """About `gigabytes` of features as a stage; also its rows, and the gigabytes that they are in bfloat16."""
    conversations = max(1, round(gigabytes * 1e9 / (2 * hidden_size * TOKENS_PER_CONVERSATION)))
    info = FeatureInfo(hidden_size=hidden_size, encoding=encoding, target_identity="bench")
    folder = store.stage("features", info.model_dump())
    features = torch.randn(TOKENS_PER_CONVERSATION, hidden_size).bfloat16()
    ids, mask = list(range(TOKENS_PER_CONVERSATION)), [1] * TOKENS_PER_CONVERSATION
    for start in range(0, conversations, CONVERSATIONS_PER_SHARD):
        with folder.writing(f"part-{start:08d}.parquet") as file, FeatureWriter(file.path, info) as writer:
            for i in range(start, min(conversations, start + CONVERSATIONS_PER_SHARD)):
                writer.add(f"c{i}", "train", ids, mask, features)
    size = conversations * TOKENS_PER_CONVERSATION * hidden_size * 2 / 1e9
    return folder.finish({}), conversations, size
