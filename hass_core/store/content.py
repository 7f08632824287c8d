"""What a large file's content was found to be, remembered so that it is read once."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hass_core.json_files import write_whole
from hass_core.store.file_cache import sha256_of

SETTLED_SECONDS = 2.0  # a file changed later than this ago may change again under the same stamp


def cache_folder() -> Path:
    """$HASS_CACHE, else ~/.cache/hass: what can be made again."""
    return Path(os.environ.get("HASS_CACHE", Path.home() / ".cache" / "hass"))


def content_of(path: Path) -> str:
    """SHA-256 of a file's content in hex, remembered."""
    return remembered(path, "sha256", sha256_of)


def remembered(path: Path, kind: str, find: Callable[[Path], Any]) -> Any:
    """`find(path)`, a JSON value that depends on the file's content alone, from the cache where the file is unchanged.

    Unchanged is: same place, device, inode, size, and times of the last writing and of the last change of any kind,
    which no copying tool can set back.
    """
    place = (
        path.resolve()
    )  # for the note alone: a link's own name tells what kind of file it is, a hub's blobs have none
    name = hashlib.sha256(f"{kind}:{place}".encode()).hexdigest()[:32]
    note, stamp = cache_folder() / "contents" / f"{name}.json", _stamp(path)
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or cut off by a crash
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return known["found"]
    found = find(path)
    if _stamp(path) == stamp and time.time() - stamp[-1] / 1e9 > SETTLED_SECONDS:
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, {"path": str(place), "stamp": stamp, "found": found})
    return found


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
