"""What the store knows of its content: records of files, manifests of stages, and references to hand around."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel


class FileRecord(BaseModel, frozen=True):
    """What is known of one finished file."""

    name: str
    bytes: int
    sha256: str
    rows: int | None = None
    notes: dict[str, Any] = {}


class Manifest(BaseModel, frozen=True):
    """The content of one finished stage."""

    stage: str
    digest: str
    key: dict[str, Any]
    files: dict[str, FileRecord]
    summary: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


class Artifact(BaseModel, frozen=True):
    """A reference to one finished stage: small enough to hand from task to task."""

    stage: str
    digest: str
    root: str
    summary: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"{self.root}/{self.stage}/{self.digest}"


def digest_of(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
