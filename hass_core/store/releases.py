"""Drafts in use, where the engines find them.

    ROOT/releases/NAME/VERSION/ENGINE/…          the folder that the engine loads
    ROOT/releases/NAME/VERSION/ENGINE.json       its files with their checksums, written when all of them are there
    ROOT/releases/NAME/current                   JSON: which version is in use; written last, in one atomic operation

A version's files never change: releasing it once more checks them and writes what is missing or broken.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from hass_core.errors import CorruptFile
from hass_core.store.file_cache import sha256_of
from hass_core.store.store import Store

FOLDER, CURRENT = "releases", "current"


class Release(BaseModel, frozen=True):
    """What `current` says."""

    name: str
    version: str
    engines: dict[str, str]  # engine → address of its folder
    draft: str = ""  # digest of what was exported; a registry that was lost begins its numbers anew


class _Files(BaseModel):
    """Checksums (SHA-256) of one engine's files."""

    sha256: dict[str, str]


class Releases:
    """The releases of one registered model."""

    def __init__(self, store: Store, name: str):
        self._store, self._name = store, name
        self.url = f"{store.root}/{FOLDER}/{name}"
        self._base = store.fs._strip_protocol(self.url)

    def current(self) -> Release | None:
        """The release in use. Raises CorruptFile when `current` is no such record."""
        text = self._bytes(CURRENT)
        try:
            return None if text is None else Release.model_validate_json(text)
        except ValidationError as error:
            raise CorruptFile(f"{self.url}/{CURRENT} is not a release; remove it and release again") from error

    def publish(self, version: str, folders: Mapping[str, Path], draft: str = "") -> Release:
        """Put local folders by engine in place, check what arrived, and point `current` at them.

        Until the last moment the former release is the current one, whatever fails. Raises StoreError, or CorruptFile
        when what the store gives back is not what was written.
        """
        for engine, folder in folders.items():
            self._put_folder(f"{version}/{engine}", folder)
        engines = {engine: f"{self.url}/{version}/{engine}" for engine in folders}
        release = Release(name=self._name, version=version, engines=engines, draft=draft)
        self._write(CURRENT, release.model_dump_json(indent=2).encode())
        return release

    def _put_folder(self, name: str, folder: Path) -> None:
        sums = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        for file, expected in sums.items():
            if self._sum(f"{name}/{file}") != expected:
                self._write(f"{name}/{file}", (folder / file).read_bytes())
            if self._sum(f"{name}/{file}") != expected:
                raise CorruptFile(f"{self.url}/{name}/{file} is not what was written there; release again")
        self._write(f"{name}.json", _Files(sha256=sums).model_dump_json(indent=2).encode())

    def _sum(self, name: str) -> str | None:
        content = self._bytes(name)
        return None if content is None else hashlib.sha256(content).hexdigest()

    def _bytes(self, name: str) -> bytes | None:
        self._store.fs.invalidate_cache()
        with self._store.named_failures("read from"):
            try:
                return self._store.fs.cat_file(f"{self._base}/{name}")
            except FileNotFoundError:
                return None

    def _write(self, name: str, content: bytes) -> None:
        """In one atomic operation, as an object store has it anyway."""
        path = f"{self._base}/{name}"
        with self._store.named_failures("write to"):
            if not self._store.is_local:
                self._store.fs.pipe_file(path, content)
                return
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid4().hex}")
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
