"""How many bytes a feature takes; apart from what encodes it, so that a forecast needs no torch."""

from typing import Literal

Encoding = Literal["bf16", "int8", "none"]


def bytes_per_token(encoding: Encoding, hidden_size: int, states: int = 1) -> int:
    """Bytes of one token's features, before compression: of `states` states of `hidden_size` numbers."""
    if encoding == "none":
        return 0
    return states * (2 * hidden_size if encoding == "bf16" else hidden_size + 2)
