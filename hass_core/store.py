"""Where every stage keeps its output: one root (folder or s3://), one folder per stage and digest.

    ROOT/<stage>/<digest>/part-00000.parquet …        the files
    ROOT/<stage>/<digest>/_records/<file>.json        one record per finished file: bytes, sha256, rows
    ROOT/<stage>/<digest>/manifest.json               written last: its presence means the stage is complete

The digest is computed from everything that determines the output (settings, inputs, code version), so the same
work is found again and different work never mixes. A file is written to local scratch, checked, put in place in one
atomic operation, and only then recorded: a crash at any moment leaves finished files usable and unfinished ones
invisible. Two processes writing the same file put the same bytes in place.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from hass_core.errors import CorruptFile, StoreError
from hass_core.provenance import provenance

MANIFEST = "manifest.json"
RECORDS = "_records"


class FileRecord(BaseModel):
    """What is known of one finished file."""

    model_config = ConfigDict(frozen=True)
    name: str
    bytes: int
    sha256: str
    rows: int | None = None
    notes: dict[str, Any] = {}


class Manifest(BaseModel):
    """The content of one finished stage."""

    model_config = ConfigDict(frozen=True)
    stage: str
    digest: str
    key: dict[str, Any]
    files: dict[str, FileRecord]
    summary: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


class Artifact(BaseModel):
    """A reference to one finished stage: small enough to hand from task to task."""

    model_config = ConfigDict(frozen=True)
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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """The root folder, local or on any fsspec file system (s3:// takes its credentials from the environment)."""

    def __init__(self, root: str | Path, cache: Path | None = None):
        text = str(root)
        if "://" not in text:
            text = str(Path(text).expanduser().resolve())
        self.root = text.rstrip("/")
        self.fs, self._base = fsspec.core.url_to_fs(self.root)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.cache = cache or Path(os.environ.get("HASS_CACHE", Path.home() / ".cache" / "hass"))

    def check_writable(self) -> None:
        """Raise StoreError unless a file can be written, read back and removed."""
        probe = f"{self._base}/.probe-{os.getpid()}"
        with self._named_failures("write to"):
            self.fs.makedirs(self._base, exist_ok=True)
            self.fs.pipe_file(probe, b"ok")
            self.fs.rm_file(probe)

    def stage(self, stage: str, key: Mapping[str, Any]) -> "StageFolder":
        """The folder for one stage's work; `key` holds all that determines its output."""
        return StageFolder(self, stage, digest_of({"stage": stage, **key}), dict(key))

    def open(self, artifact: Artifact) -> "StageFolder":
        """The folder of a finished stage. Raises StoreError when it is gone or unfinished."""
        folder = StageFolder(self, artifact.stage, artifact.digest, {})
        if folder.manifest() is None:
            raise StoreError(f"{folder.url} has no {MANIFEST}: the stage was removed or never finished; run it again")
        return folder

    def free_bytes(self) -> int | None:
        """Free space of a local store; None where the store has no limit to ask for."""
        if not self.is_local:
            return None
        path = Path(self._base)
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    @contextmanager
    def _named_failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StoreError(
                    f"the disk of {self.root} is full; free space and run the same command again"
                ) from error
            raise StoreError(
                f"cannot {what} the store {self.root}: {error}; check the path and its permissions"
            ) from error


class StageFolder:
    """One stage's folder. See the module's docstring for what is on disk."""

    def __init__(self, store: Store, stage: str, digest: str, key: dict[str, Any]):
        for part in (stage, digest):
            _check_name(part)
        self.store, self.stage, self.digest, self.key = store, stage, digest, key
        self.url = f"{store.root}/{stage}/{digest}"
        self._base = f"{store._base}/{stage}/{digest}"

    def artifact(self) -> Artifact | None:
        """The finished stage, or None while it is unfinished."""
        manifest = self.manifest()
        return manifest and Artifact(
            stage=self.stage, digest=self.digest, root=self.store.root, summary=manifest.summary
        )

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the stage is unfinished."""
        text = self._read(MANIFEST)
        return None if text is None else Manifest.model_validate_json(text)

    def finished(self) -> dict[str, FileRecord]:
        """Records of the files already in place, by name."""
        pattern = f"{self._base}/{RECORDS}/*.json"
        self.store.fs.invalidate_cache()
        records = [
            FileRecord.model_validate_json(self.store.fs.cat_file(p)) for p in sorted(self.store.fs.glob(pattern))
        ]
        return {record.name: record for record in records}

    @contextmanager
    def writing(self, name: str, **notes: Any) -> Iterator["Writing"]:
        """Write one file: yields an object whose `path` is a local file to fill; publishes it on a clean exit.

        After any exception nothing is visible in the store. Set `rows` on the yielded object to record a row count.
        Raises StoreError when the disk is full or the store refuses.
        """
        _check_name(name)
        scratch = Path(tempfile.mkdtemp(prefix="writing-", dir=self.scratch()))
        writing = Writing(scratch / name)
        try:
            with self.store._named_failures("write to"):
                yield writing
                record = FileRecord(
                    name=name,
                    bytes=writing.path.stat().st_size,
                    sha256=sha256_of(writing.path),
                    rows=writing.rows,
                    notes=notes,
                )
                self._put(writing.path, name)
                self._put_text(f"{RECORDS}/{name}.json", record.model_dump_json())
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def write_text(self, name: str, text: str, **notes: Any) -> None:
        """Publish a small text file."""
        with self.writing(name, **notes) as file:
            file.path.write_text(text, encoding="utf-8")

    def finish(self, summary: Mapping[str, Any]) -> Artifact:
        """Write the manifest: from now on the stage is complete."""
        manifest = Manifest(
            stage=self.stage,
            digest=self.digest,
            key=self.key,
            files=self.finished(),
            summary=dict(summary),
            provenance=provenance(),
        )
        with self.store._named_failures("write to"):
            self._put_text(MANIFEST, manifest.model_dump_json(indent=2))
        shutil.rmtree(self.scratch(), ignore_errors=True)
        return Artifact(stage=self.stage, digest=self.digest, root=self.store.root, summary=dict(summary))

    def local_path(self, name: str) -> Path:
        """A local path with the file's verified content: the file itself in a local store, else a cached copy.

        Raises CorruptFile when the size or checksum differs from the record.
        """
        record = self.record(name)
        if self.store.is_local:
            path = Path(self._base) / name
            if not path.exists() or path.stat().st_size != record.bytes:
                raise CorruptFile(self._corrupt(name, "missing or truncated"))
            return path
        path = self.store.cache / self.stage / self.digest / name
        if not path.exists() or path.stat().st_size != record.bytes:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{name}.{os.getpid()}.partial")
            with self.store._named_failures("read from"):
                self.store.fs.get_file(f"{self._base}/{name}", str(partial))
            if sha256_of(partial) != record.sha256:
                partial.unlink()
                raise CorruptFile(self._corrupt(name, "the checksum differs"))
            os.replace(partial, path)
        return path

    def verify(self, name: str) -> None:
        """Compare a file's bytes with its recorded checksum. Raises CorruptFile."""
        if sha256_of(self.local_path(name)) != self.record(name).sha256:
            raise CorruptFile(self._corrupt(name, "the checksum differs"))

    def record(self, name: str) -> FileRecord:
        """The record of one finished file. Raises StoreError when there is none."""
        text = self._read(f"{RECORDS}/{name}.json")
        if text is None:
            raise StoreError(f"{self.url} holds no file {name}; run the stage {self.stage!r} again")
        return FileRecord.model_validate_json(text)

    def read_text(self, name: str) -> str:
        """Content of a small text file of this stage."""
        return self.local_path(name).read_text(encoding="utf-8")

    def remove(self, name: str) -> None:
        """Remove a file and its record (an old checkpoint, say); the record first."""
        for path in (f"{RECORDS}/{name}.json", name):
            if self.store.fs.exists(f"{self._base}/{path}"):
                self.store.fs.rm_file(f"{self._base}/{path}")

    def scratch(self) -> Path:
        """A local folder for unfinished work; it survives a crash and is removed when the stage finishes."""
        local = Path(self._base) if self.store.is_local else self.store.cache / self.stage / self.digest
        with self.store._named_failures("write to"):
            (local / "scratch").mkdir(parents=True, exist_ok=True)
        return local / "scratch"

    def _read(self, name: str) -> str | None:
        with self.store._named_failures("read from"):
            try:
                return self.store.fs.cat_file(f"{self._base}/{name}").decode()
            except FileNotFoundError:
                return None

    def _put(self, source: Path, name: str) -> None:
        target = f"{self._base}/{name}"
        if self.store.is_local:
            with source.open("rb") as file:
                os.fsync(file.fileno())
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        else:
            self.store.fs.put_file(str(source), target)  # an object appears only when its upload has completed

    def _put_text(self, name: str, text: str) -> None:
        with tempfile.NamedTemporaryFile(
            "w", dir=self.scratch(), suffix=".json", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        try:
            self._put(Path(file.name), name)
        finally:
            Path(file.name).unlink(missing_ok=True)

    def _corrupt(self, name: str, what: str) -> str:
        return f"{self.url}/{name}: {what}; remove {self.url} and run the stage {self.stage!r} again"


class Writing:
    """A file being written: fill `path`, optionally set `rows`."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: int | None = None


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if len(parts) != 1 or name in (".", "..") or "\\" in name or "\0" in name:
        raise StoreError(f"{name!r} is not a plain file name")
