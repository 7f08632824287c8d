"""Where every stage keeps its output: one root (folder or s3://), one folder per stage and digest.

    ROOT/<stage>/<digest>/part-00000.parquet …        the files
    ROOT/<stage>/<digest>/_records/<file>.json        one record per finished file: bytes, sha256, rows
    ROOT/<stage>/<digest>/manifest.json               written last: its presence means the stage is complete
    ROOT/<stage>/<digest>/used                        empty; as old as the last training that began to read the stage

The digest is computed from everything that determines the output (settings, inputs, code version), so the same
work is found again and different work never mixes. A file is written to local scratch, put in place in one atomic
operation, and only then recorded: a crash at any moment leaves finished files usable and unfinished ones invisible.
Of two processes writing the same file, the last one's file and record stand; a finished stage never changes.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from hass_core.errors import BadInput, CorruptFile, HassError, StoreError
from hass_core.store.artifacts import Artifact, FileRecord, Manifest, digest_of
from hass_core.store.content import cache_folder
from hass_core.store.file_cache import FileCache, sha256_of
from hass_core.store.places import endpoint, file_system, full_disk_named
from hass_core.store.provenance import provenance
from hass_core.store.records import listed, record_texts
from hass_core.store.scratch import clear, finishing, publishing, remove_abandoned, temporary_folder

MANIFEST = "manifest.json"
RECORDS = "_records"
ORIGIN = "origin.txt"  # beside cached copies: the address of the stage that they are of
USED = "used"
SCRATCH = "scratch"
CACHE_GB = 50.0
REMOTE_READ = {"block_size": 1 << 18, "cache_type": "readahead"}
PROBE_SECONDS = 45.0
UPLOAD_PATIENCE_SECONDS = 300.0  # beyond a megabyte a second; the client waits for ever on a server that fell silent
PART_BYTES = 32 << 20  # of a file on S3 that has more than two parts, ten of which are sent at once


class Store:
    """The root folder, local or on any fsspec file system (s3:// takes its credentials from the environment).

    `cache` (default $HASS_CACHE or ~/.cache/hass) holds copies of remote files, at most $HASS_CACHE_GB of them, and
    unfinished work for remote stores.
    """

    def __init__(self, root: str | Path, cache: Path | None = None, cache_gb: float | None = None):
        text = str(root)
        if "://" not in text:
            text = str(Path(text).expanduser().resolve())
        self.root = text.rstrip("/")
        self.fs, self._base = file_system(text)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.is_s3 = self.root.startswith("s3://")
        self.cache = cache or cache_folder()
        gigabytes = float(os.environ.get("HASS_CACHE_GB", CACHE_GB)) if cache_gb is None else cache_gb
        self.files = FileCache(self.cache / "files" / digest_of(self.root), int(gigabytes * 1e9))

    def check_writable(self) -> None:
        """Raise StoreError unless a file can be written, read and removed: a key may have the right to one alone."""
        probe = f"{self._base}/.probe-{uuid4().hex}"
        limit = {"timeout": PROBE_SECONDS} if self.is_s3 else {}  # who waits is told soon of a server that is silent
        with self.named_failures("write to"):
            if self.is_local:
                self.fs.makedirs(self._base, exist_ok=True)
            self.fs.pipe_file(probe, b"ok", **limit)
        try:
            with self.named_failures("read from"):
                self.fs.cat_file(probe, **limit)
        finally:
            with self.named_failures("remove from"):
                self.fs.rm_file(probe, **limit)

    def stage(self, stage: str, key: Mapping[str, Any]) -> "StageFolder":
        """The folder for one stage's work; `key` holds all that determines its output.

        What a killed process left half-written there is removed.
        """
        folder = StageFolder(self, stage, digest_of({"stage": stage, **key}), dict(key))
        remove_abandoned(folder.scratch_path)
        return folder

    def open(self, artifact: Artifact) -> "StageFolder":
        """The folder of a finished stage. Raises StoreError when it is gone or unfinished."""
        folder = StageFolder(self, artifact.stage, artifact.digest, {})
        if folder.manifest() is None:
            raise StoreError(f"{folder.url} has no {MANIFEST}: the stage was removed or never finished; run it again")
        return folder

    def artifact(self, stage: str, digest: str) -> Artifact | None:
        """The finished stage with this digest, or None."""
        return StageFolder(self, stage, digest, {}).artifact()

    def free_bytes(self) -> int | None:
        """Free space of a local store; None where the store has no limit to ask for."""
        if not self.is_local:
            return None
        path = Path(self._base)
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    @contextmanager
    def named_failures(self, what: str) -> Iterator[None]:
        """Turn a failure to `what` ("write to", "read from", "remove from") the store into a StoreError."""
        try:
            with full_disk_named(self.root if self.is_local else self.cache):
                yield
        except HassError:
            raise
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise
            check = "path and its permissions" if self.is_local else f"address, the credentials and {endpoint()}"
            silent = "it does not answer" if isinstance(error, TimeoutError) else type(error).__name__
            reason = f"{error}".rstrip(".") or silent
            raise StoreError(f"cannot {what} the store {self.root}: {reason}; check the {check}") from error


def store_at(url: str, stage: str) -> tuple[Store, Artifact]:
    """The store and the finished stage behind a folder's address, STORE/STAGE/DIGEST.

    Raises BadInput when the address has another form, StoreError when nothing finished is there.
    """
    root, found, digest = ("", "", *url.rstrip("/").rsplit("/", 2))[-3:]
    if found != stage or not root:
        raise BadInput(f"{url} is no folder of the stage {stage!r}; give one of the form STORE/{stage}/DIGEST")
    store = Store(root)
    artifact = Artifact(stage=stage, digest=digest, root=store.root)
    store.open(artifact)
    return store, artifact


def origin_of(folder: Path, stage: str) -> str | None:
    """The address of the finished stage whose files `folder` holds: its own in a store on disk, another's in a cache.

    None for a folder from elsewhere.
    """
    folder = folder.resolve()
    if folder.parent.name != stage:
        return None
    if (folder / MANIFEST).is_file():
        return str(folder)
    return (folder / ORIGIN).read_text(encoding="utf-8") if (folder / ORIGIN).is_file() else None


class StageFolder:
    """One stage's folder. See the module's docstring for what is on disk."""

    def __init__(self, store: Store, stage: str, digest: str, key: dict[str, Any]):
        for part in (stage, digest):
            _check_name(part)
        self.store, self.stage, self.digest, self.key = store, stage, digest, key
        self._final: Manifest | None = None  # a finished stage never changes
        self.url = f"{store.root}/{stage}/{digest}"
        self._base = f"{store._base}/{stage}/{digest}"
        cache = store.cache / "work" / digest_of(store.root) / stage / digest
        self.scratch_path = (Path(self._base) if store.is_local else cache) / SCRATCH

    def artifact(self) -> Artifact | None:
        """The finished stage, or None while it is unfinished. Raises CorruptFile where one of its files is gone."""
        if (manifest := self.manifest()) is None:
            return None
        self._check_there(manifest)
        return Artifact(stage=self.stage, digest=self.digest, root=self.store.root, summary=manifest.summary)

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the stage is unfinished."""
        text = self._read(MANIFEST)
        if text is None:
            return None
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise CorruptFile(self._corrupt(MANIFEST, "not a manifest")) from error
        if (manifest.stage, manifest.digest) != (self.stage, self.digest):
            raise CorruptFile(self._corrupt(MANIFEST, f"of {manifest.stage}/{manifest.digest}: a copied folder"))
        self._final = manifest
        return manifest

    def _check_there(self, manifest: Manifest) -> None:
        for record, _ in self._lacking(manifest):
            raise CorruptFile(self._corrupt(record.name, "missing or truncated"))

    def _lacking(self, manifest: Manifest) -> list[tuple[FileRecord, int | None]]:
        """Files of the manifest that a listing tells other sizes of, with these; None where they are missing."""
        self.store.fs.invalidate_cache()
        with self.store.named_failures("read from"):
            sizes = {name: info["size"] for name, info in listed(self.store.fs, self._base).items()}
        found = ((record, sizes.get(name)) for name, record in manifest.files.items())
        return [(record, size) for record, size in found if size != record.bytes]

    def finished(self) -> dict[str, FileRecord]:
        """Records of the files in place with the recorded size, by name."""
        self.store.fs.invalidate_cache()
        with self.store.named_failures("read from"):
            sizes = {name: info["size"] for name, info in listed(self.store.fs, self._base).items()}
            texts = record_texts(self.store.fs, f"{self._base}/{RECORDS}")
        records = [self._parsed(text, f"{RECORDS}/{name}") for name, text in texts.items()]
        return {record.name: record for record in records if sizes.get(record.name) == record.bytes}

    @contextmanager
    def writing(self, name: str, **notes: Any) -> Iterator["Writing"]:
        """Write one file: yields an object whose `path` is a local file to fill; publishes it on a clean exit.

        After any exception nothing is visible in the store. Set `rows` on the yielded object to record a row count.
        Raises StoreError when the disk is full or the store refuses.
        """
        _check_name(name)
        with self._temporary() as folder:
            writing = Writing(folder / name)
            with full_disk_named(self.scratch_path):
                yield writing
            record = FileRecord(
                name=name,
                bytes=writing.path.stat().st_size,
                sha256=sha256_of(writing.path),
                rows=writing.rows,
                notes=notes,
            )
            with self.store.named_failures("write to"), publishing(self.scratch_path, name):
                if self._read(MANIFEST) is None:  # else another process has finished the stage meanwhile
                    self._publish(folder, writing.path, record)

    def write_text(self, name: str, text: str, **notes: Any) -> None:
        """Publish a small text file."""
        with self.writing(name, **notes) as file:
            file.path.write_text(text, encoding="utf-8")

    def finish(self, summary: Mapping[str, Any]) -> Artifact:
        """Write the manifest: from now on the stage is complete. If another process was first, its manifest stands."""
        manifest = Manifest(
            stage=self.stage,
            digest=self.digest,
            key=self.key,
            files=self.finished(),
            summary=dict(summary),
            provenance=provenance(),
        )
        with self._temporary() as folder, self.store.named_failures("write to"), finishing(self.scratch_path):
            if self._read(MANIFEST) is None:
                self._put_text(folder, MANIFEST, manifest.model_dump_json(indent=2))
        clear(self.scratch_path)
        artifact = self.artifact()
        assert artifact is not None
        return artifact

    def local_path(self, name: str, rows_checked: bool = False) -> Path:
        """A local path with the file's verified content: the file itself in a local store, else a cached copy.

        Raises CorruptFile when the size or checksum differs from the record. `rows_checked`: the caller checks what it
        reads by checksums of its own, so a large local file need not be hashed first.
        """
        record = self.record(name)
        if not self.store.is_local:
            return self._cached(record)
        path = Path(self._base) / name
        if not path.exists() or path.stat().st_size != record.bytes:
            raise CorruptFile(self._corrupt(name, "missing or truncated"))
        if not rows_checked and sha256_of(path) != record.sha256:
            raise CorruptFile(self._corrupt(name, "the checksum differs"))
        return path

    def note_use(self) -> None:
        """Count as new again from now on, for those who look for what nobody needs (housekeeping.py)."""
        with self.store.named_failures("write to"):
            self.store.fs.pipe_file(f"{self._base}/{USED}", b"")

    def note_origin(self) -> None:
        """Have it told beside the cached copies of a remote stage's files where they came from; see `origin_of`."""
        if not self.store.is_local:
            url = self.url
            self.store.files.put(f"{self.stage}/{self.digest}/{ORIGIN}", lambda path: _write_text(path, url))

    def problems(self) -> list[str]:
        """What the files of a finished stage lack, from one listing: none is opened. [] where nothing does."""
        manifest = self.manifest()
        return [
            f"{record.name} is missing"
            if size is None
            else f"{record.name} has {size:,} bytes instead of {record.bytes:,}"
            for record, size in (self._lacking(manifest) if manifest else ())
        ]

    def open(self, name: str) -> BinaryIO:
        """A finished file for random access without fetching it whole. Its content is not verified."""
        record = self.record(name)
        with self.store.named_failures("read from"):
            try:
                file = self.store.fs.open(f"{self._base}/{name}", "rb", **({} if self.store.is_local else REMOTE_READ))
            except FileNotFoundError:
                raise CorruptFile(self._corrupt(name, "missing or truncated")) from None
            if file.seek(0, os.SEEK_END) != record.bytes:
                raise CorruptFile(self._corrupt(name, "missing or truncated"))
            file.seek(0)
            return file

    def record(self, name: str) -> FileRecord:
        """The record of one finished file. Raises StoreError when there is none."""
        if self._final and name in self._final.files:
            return self._final.files[name]
        path = f"{RECORDS}/{name}.json"
        text = self._read(path)
        if text is None:
            raise StoreError(f"{self.url} holds no file {name}; run the stage {self.stage!r} again")
        return self._parsed(text, path)

    def read_text(self, name: str) -> str:
        """Content of a small text file of this stage."""
        return self.local_path(name).read_text(encoding="utf-8")

    def copied(self, folder: Path, wanted: Callable[[str], bool]) -> Path:
        """Copy the stage's files that are wanted, verified, into a new local folder; returns it."""
        manifest = self.manifest()
        assert manifest is not None
        folder.mkdir(parents=True)
        for name in filter(wanted, manifest.files):
            shutil.copyfile(self.local_path(name), folder / name)
        return folder

    def remove(self, name: str) -> None:
        """Remove a file and its record (an old checkpoint, say); the record first."""
        for path in (f"{RECORDS}/{name}.json", name):
            with self.store.named_failures("write to"), suppress(FileNotFoundError):
                self.store.fs.rm_file(f"{self._base}/{path}")

    def scratch(self) -> Path:
        """A local folder for unfinished work; it survives a crash and is removed when the stage finishes."""
        with self.store.named_failures("write to"):
            self.scratch_path.mkdir(parents=True, exist_ok=True)
        return self.scratch_path

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        with ExitStack() as stack:
            with self.store.named_failures("write to"):
                folder = stack.enter_context(temporary_folder(self.scratch_path))
            yield folder

    def _cached(self, record: FileRecord) -> Path:
        def download(path: Path) -> None:
            try:
                self.store.fs.get_file(f"{self._base}/{record.name}", str(path))
            except FileNotFoundError:
                raise CorruptFile(self._corrupt(record.name, "missing or truncated")) from None

        with self.store.named_failures("read from"):
            try:
                return self.store.files.get(f"{self.stage}/{self.digest}/{record.name}", record.sha256, download)
            except ValueError as error:
                raise CorruptFile(self._corrupt(record.name, str(error))) from None

    def _read(self, name: str) -> str | None:
        with self.store.named_failures("read from"):
            try:
                return self.store.fs.cat_file(f"{self._base}/{name}").decode()
            except FileNotFoundError:
                return None

    def _publish(self, folder: Path, source: Path, record: FileRecord) -> None:
        """Put the file in place, then its record, until the two belong together.

        Those of one machine that write the same file take turns. On S3 the file carries its checksum, so that a process
        that was overtaken between file and record by one elsewhere sees it, and goes again.
        """
        options = {"Metadata": {"sha256": record.sha256}} if self.store.is_s3 else {}
        while True:
            self._put(source, record.name, **options)
            self._put_text(folder, f"{RECORDS}/{record.name}.json", record.model_dump_json())
            if not self.store.is_s3:
                return
            if self.store.fs.metadata(f"{self._base}/{record.name}", refresh=True).get("sha256") == record.sha256:
                return

    def _put(self, source: Path, name: str, **options: Any) -> None:
        path = f"{self._base}/{name}"
        if not self.store.is_local:
            patience = UPLOAD_PATIENCE_SECONDS + source.stat().st_size / 1e6
            parts = {"chunksize": PART_BYTES} if self.store.is_s3 else {}
            self.store.fs.put_file(str(source), path, timeout=patience, **parts, **options)  # appears when complete
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sync(source)
        os.replace(source, target)
        _sync(target.parent)

    def _put_text(self, folder: Path, name: str, text: str) -> None:
        path = folder / f"{Path(name).name}.text"
        path.write_text(text, encoding="utf-8")
        self._put(path, name)

    def _parsed(self, text: str, path: str) -> FileRecord:
        try:
            return FileRecord.model_validate_json(text)
        except ValidationError as error:
            raise CorruptFile(self._corrupt(path, "not a record")) from error

    def _corrupt(self, name: str, what: str) -> str:
        return f"{self.url}/{name}: {what}; remove {self.url} and run the stage {self.stage!r} again"


class Writing:
    """A file being written: fill `path`, optionally set `rows`."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: int | None = None


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name) or name in (MANIFEST, SCRATCH):
        raise StoreError(f"{name!r} is not a plain file name")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Have the file's content, or the folder's entries, on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
