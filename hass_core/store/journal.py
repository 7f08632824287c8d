"""Work that survives a crash: one JSON line per finished unit, in a scratch file.

A line without its end was cut off by the crash and is dropped; its unit is done again.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO


class Journal(dict[str, Any]):
    """A dict from unit name to JSON-able result, on disk as well: what is set is written at once, and stays written
    when it is taken out. `synced`: a crash of the machine loses nothing either, which takes a disk's time a unit."""

    def __init__(self, path: Path, synced: bool = False):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            path.write_text(complete, encoding="utf-8")
        super().__init__(json.loads(line) for line in complete.splitlines())
        self._path, self._synced = path, synced
        self._file: BinaryIO | None = None

    def __setitem__(self, unit: str, result: Any) -> None:
        if self._file is None:  # made now, that a refused run leaves nothing behind
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        self._file.write(json.dumps([unit, result]).encode() + b"\n")
        if self._synced:
            os.fsync(self._file.fileno())
        super().__setitem__(unit, result)
