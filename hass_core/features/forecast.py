"""How much a features stage will take, measured on a sample of its conversations, before the rest is computed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from hass_core.errors import StoreError
from hass_core.features.encoding import encode
from hass_core.features.schema import Encoding
from hass_core.store import Store
from hass_core.target_model.capture import TokenIds, batches_for, capture_features
from hass_core.target_model.loader import Target

OTHER_BYTES_PER_TOKEN = 6  # token ids, mask and the rest, before compression
RESERVE = 1.05
TIMED_BATCHES = 2


@dataclass(frozen=True)
class Forecast:
    """Expected size of the work to come."""

    tokens: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.bytes / 1e9:.2f} GB, {self.seconds:,.0f} s"


@dataclass(frozen=True)
class Measured:
    """What one token costs here."""

    bytes_per_token: float
    tokens_per_second: float


def measure(target: Target, sample: Sequence[TokenIds], max_tokens: int, encoding: Encoding) -> Measured:
    """Capture and encode a few batches of the sample's token ids; the first pass, which warms up, is not timed."""
    batches = list(batches_for(target, [len(ids) for ids in sample], max_tokens))[:TIMED_BATCHES]
    size = tokens = 0
    for batch in batches[:1]:
        for row in capture_features(target, [sample[i] for i in batch]):
            size += len(encode(row, encoding))
            tokens += len(row)
    started = time.perf_counter()
    timed = sum(len(row) for batch in batches for row in capture_features(target, [sample[i] for i in batch]))
    return Measured(size / tokens + OTHER_BYTES_PER_TOKEN, timed / (time.perf_counter() - started))


def forecast(sample_lengths: Sequence[int], conversations: int, measured: Measured) -> Forecast:
    """For `conversations` conversations, from the lengths in tokens of some of them and the cost of a token."""
    tokens = round(sum(sample_lengths) / len(sample_lengths) * conversations)
    return Forecast(tokens, round(tokens * measured.bytes_per_token), tokens / measured.tokens_per_second)


def refuse_if_too_large(expected: Forecast, store: Store) -> None:
    """Raise StoreError, saying by how much, when a local store has no room for the forecast."""
    free = store.free_bytes()
    if free is None or expected.bytes * RESERVE <= free:
        return
    missing = expected.bytes * RESERVE - free
    raise StoreError(
        f"the features need {expected}, but {store.root} has only {free / 1e9:.2f} GB free: {missing / 1e9:.2f} GB too "
        'little; free space, set features.encoding to "int8" or "none", or lower responses.max_conversations'
    )
