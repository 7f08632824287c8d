"""How many conversations the user's own files hold, where that is told by counting lines."""

import glob
from collections.abc import Sequence
from pathlib import Path

from hass_core.config import PromptsConfig
from hass_core.data.file_names import LINES, is_readable

BLOCK = 1 << 20
NOT_COUNTED = "not counted: what {} may hold; `hass forecast --conversations` takes the number"


def counted(files: Sequence[str]) -> int | None:
    """Lines of all `files`, with those that folders and patterns lead to; None where one is not a JSONL file on this
    machine: those are not opened.
    """
    paths = [path for file in files for path in _named(file)]
    if not paths or not all(path.suffix in LINES and path.is_file() for path in paths):
        return None
    return sum(map(_lines, paths))


def not_counted(prompts: PromptsConfig, conversations: int | None) -> list[str]:
    """A line where a forecast knows nothing of some of the user's prompts; `conversations`: what the user says."""
    if conversations:
        return []
    unknown = ["prompts.files"] if prompts.files and counted(prompts.files) is None else []
    unknown += ["prompts.datasets"] if prompts.datasets else []
    return [NOT_COUNTED.format(" and ".join(unknown))] if unknown else []


def _named(entry: str) -> list[Path]:
    """The files of an entry, or what it says where that leads to none."""
    said = Path(entry).expanduser()
    found = [Path(match) for match in glob.glob(str(said), recursive=True)] if set("*?[") & set(entry) else [said]
    files = [file for path in found for file in (_inside(path) if path.is_dir() else [path])]
    return files or [said]


def _inside(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if is_readable(str(file.relative_to(folder)))]


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))
