"""Columns and file metadata of a feature shard. The only place that names them.

One row is one conversation. `features` holds num_tokens × hidden_size numbers, the target's hidden state after its
final norm, in the encoding that the metadata names; `checksum` that of those bytes.
"""

from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from hass_core import __version__

Encoding = Literal["bf16", "int8", "none"]

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),  # train or validation
        ("num_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),  # 1 = the token belongs to an answer, its end token included
        ("checksum", pa.uint32()),
        ("features", pa.large_binary()),
    ]
)
SKIPPED = pa.schema([("id", pa.string()), ("reason", pa.string())])
METADATA_KEY = b"hass"


class FeatureInfo(BaseModel):
    """What a shard's numbers mean; stands in the Parquet schema's metadata."""

    model_config = ConfigDict(frozen=True)
    hidden_size: int
    encoding: Encoding
    target_fingerprint: str
    template_hash: str
    code_version: str = __version__

    def schema(self) -> pa.Schema:
        """The columns with this information attached."""
        return COLUMNS.with_metadata({METADATA_KEY: self.model_dump_json().encode()})

    @classmethod
    def of(cls, schema: pa.Schema) -> "FeatureInfo":
        """Read the information back. Raises KeyError when the file is no feature shard."""
        return cls.model_validate_json((schema.metadata or {})[METADATA_KEY])
