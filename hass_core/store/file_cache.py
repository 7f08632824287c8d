"""Local copies of files from a remote store, within a bound: the least recently used go first."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial"
PARTIAL_SECONDS = 3600  # a download older than this without progress was abandoned


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileCache:
    """A folder of copies. `limit_bytes` bounds their sum; a single larger file is kept while it is the newest."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._checked: set[tuple[str, str]] = set()

    def get(self, key: str, sha256: str, download: Callable[[Path], None]) -> Path:
        """The copy named `key` whose content has this checksum; `download` fills a local path when there is none.

        A copy made by an earlier process is hashed once. Raises ValueError when the download's checksum differs.
        """
        path = self.folder / key
        known = (key, sha256) in self._checked and path.exists()
        if not known and not (path.exists() and sha256_of(path) == sha256):
            self._fetch(path, sha256, download)
        self._checked.add((key, sha256))
        os.utime(path)
        return path

    def existing(self, key: str) -> Path | None:
        """The copy named `key`, whose content the caller trusts or checks, if there is one."""
        path = self.folder / key
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """Have the copy named `key`: what `write` makes of a local path."""
        self._fetch(self.folder / key, None, write)

    def _fetch(self, path: Path, sha256: str | None, download: Callable[[Path], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
        try:
            download(partial)
            if sha256 is not None and sha256_of(partial) != sha256:
                raise ValueError("the checksum differs")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._evict(keep=path)

    def _evict(self, keep: Path) -> None:
        files = [(path, path.stat()) for path in self.folder.rglob("*") if path.is_file()]
        total = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda item: item[1].st_mtime):
            if total <= self.limit_bytes:
                return
            in_progress = path.suffix == PARTIAL and time.time() - stat.st_mtime < PARTIAL_SECONDS
            if path != keep and not in_progress:
                path.unlink(missing_ok=True)  # whoever has it open reads on
                total -= stat.st_size
