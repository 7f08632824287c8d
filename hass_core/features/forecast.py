"""How much a features stage will take, from a sample, before any of it is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from hass_core.errors import StoreError
from hass_core.features.encoding import bytes_per_token
from hass_core.features.schema import Encoding
from hass_core.store import Store

OTHER_BYTES_PER_TOKEN = 6  # token ids, mask and the rest, before compression
RESERVE = 1.05


@dataclass(frozen=True)
class Forecast:
    """Expected size of the whole stage."""

    tokens: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.bytes / 1e9:.2f} GB"


def forecast(sample_lengths: Sequence[int], conversations: int, hidden_size: int, encoding: Encoding) -> Forecast:
    """Tokens and bytes of `conversations` conversations, from the lengths in tokens of some of them."""
    mean = sum(sample_lengths) / max(1, len(sample_lengths))
    tokens = round(mean * conversations)
    return Forecast(tokens, round(tokens * (bytes_per_token(encoding, hidden_size) + OTHER_BYTES_PER_TOKEN)))


def refuse_if_too_large(expected: Forecast, store: Store) -> None:
    """Raise StoreError, saying by how much, when a local store has no room for the forecast."""
    free = store.free_bytes()
    if free is None or expected.bytes * RESERVE <= free:
        return
    missing = expected.bytes * RESERVE - free
    raise StoreError(
        f"the features need {expected}, but {store.root} has only {free / 1e9:.2f} GB free: {missing / 1e9:.2f} GB too "
        'little; free space, set features.encoding to "fp8" or "bf16-planes-zstd", or lower responses.max_conversations'
    )
