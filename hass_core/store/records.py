"""Reading the records of a stage with many files in a few calls.

On S3 an object tells its version (ETag) when it is listed. Whoever had to read many records one by one puts all of them
into one object with their versions; the next one reads that, and by themselves only records of other versions. Nothing
rests on the object: it may be missing, old or broken.
"""

import json
from contextlib import suppress
from typing import Any, cast

from fsspec import AbstractFileSystem

ROLLED_UP = 256  # so many records read one by one are put together


def record_texts(fs: AbstractFileSystem, folder: str) -> dict[str, str]:
    """The content of all files in a folder of records, by name."""
    together = f"{folder}.json"
    versions = {name: info.get("ETag") for name, info in listed(fs, folder).items()}
    copies = _copies(fs, together) if any(versions.values()) else {}
    known = {name: text for name, (version, text) in copies.items() if versions.get(name, "") == version}
    paths = {f"{folder}/{name}": name for name in versions.keys() - known.keys()}
    found: dict[str, bytes] = cast(Any, fs).cat(list(paths), on_error="omit") if paths else {}
    read = {paths[path]: text.decode() for path, text in found.items()}
    texts = dict(sorted((known | read).items()))
    if len(read) >= ROLLED_UP and all(versions.values()):
        with suppress(Exception):  # who may not write reads them one by one again
            fs.pipe_file(together, json.dumps({name: (versions[name], text) for name, text in texts.items()}).encode())
    return texts


def listed(fs: AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """What a listing says of the files in a folder, by name; empty when there is no folder."""
    try:
        found = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return {}
    return {item["name"].rpartition("/")[2]: item for item in found if item["type"] == "file"}


def _copies(fs: AbstractFileSystem, path: str) -> dict[str, tuple[str, str]]:
    """Version and text of records by name, as somebody put them together."""
    try:
        return {name: (version, text) for name, (version, text) in json.loads(fs.cat_file(path)).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
