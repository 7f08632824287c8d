"""Where a store lies: the file system behind its address, and what is told when that is full."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.config import conf

from hass_core.errors import StoreError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
S3_PATIENCE: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 30}
"""Seconds until a server that takes a connection and says nothing is asked again. How often that is, is left to the
clients: their rounds outlast a store that is away for a while."""


def file_system(address: str) -> tuple[Any, str]:
    """The file system and the path in it of a store's address. Raises StoreError for an address that names no place."""
    scheme, remote, place = address.partition("://")
    if remote and not place.strip("/"):
        raise StoreError(f"the store {address} names no place; give it as {scheme}://BUCKET/PREFIX")
    try:
        return fsspec.core.url_to_fs(address.rstrip("/"), **(s3_options() if scheme == "s3" else {}))
    except (ValueError, ImportError) as error:  # no such scheme, or its package is missing
        raise StoreError(f"the store {address} cannot be used: {error}; give a folder or s3://BUCKET/PREFIX") from error


def s3_options() -> dict[str, Any]:
    """What a file system on S3 is made with, unless fsspec's configuration says otherwise."""
    if "config_kwargs" in conf.get("s3", {}):
        return {}
    return {"config_kwargs": dict(S3_PATIENCE)}


def endpoint() -> str:
    """AWS_ENDPOINT_URL and what it says, for a sentence about a server on S3 that is away or refuses."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f"AWS_ENDPOINT_URL ({url or 'not set: Amazon is asked'})"


@contextmanager
def full_disk_named(place: str | Path) -> Iterator[None]:
    """Turn a write error for want of space into a StoreError that names the place."""
    try:
        yield
    except Exception as error:
        # safetensors raises its own class, with the system's words
        if getattr(error, "errno", None) in DISK_FULL or os.strerror(errno.ENOSPC) in str(error):
            raise StoreError(f"the disk of {place} is full; free space and run the same command again") from error
        raise
