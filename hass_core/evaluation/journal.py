"""Work that survives a crash: one JSON line per finished unit, in a scratch file.

A line without its end was cut off by the crash and is dropped; its unit is measured again.
"""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A dict from unit name to JSON-able result, on disk."""

    def __init__(self, path: Path):
        self._path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            path.write_text(complete, encoding="utf-8")
        self._results: dict[str, Any] = dict(json.loads(line) for line in complete.splitlines())

    def __contains__(self, unit: str) -> bool:
        return unit in self._results

    def __getitem__(self, unit: str) -> Any:
        return self._results[unit]

    def __setitem__(self, unit: str, result: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)  # now, that a refused run leaves nothing behind
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([unit, result]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._results[unit] = result
