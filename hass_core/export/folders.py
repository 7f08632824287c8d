"""Where a draft is written to: a new folder, or one that an export or import of before may be replaced in.

Loads no torch: the command line asks before anything is read.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hass_core.errors import BadInput
from hass_core.store import MANIFEST

CONFIG = "config.json"
WRITTEN = {
    *(CONFIG, "model.safetensors", "README.md", "token_map.pt"),
    *("draft_vocab.json", "token_ranks.json"),
}
EXPORTED, IMPORTED = "export_identity", "imported"  # what the `hass` section of such a folder's config.json holds


def check_out(out: Path, source: Path) -> None:
    """Raise BadInput where writing a draft to `out` would overwrite something else, or its own `source`."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; name a folder to write the draft to")
    place, read = out.resolve(), source.resolve()
    if place in (read, *read.parents):
        raise BadInput(f"{out} is or holds the draft to read; name another folder to write to")
    if stage := next((folder for folder in (place, *place.parents) if (folder / MANIFEST).is_file()), None):
        raise BadInput(f"{out} is in {stage}, a finished stage of a store, which never changes; name another folder")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if there and not _was_written_here(out):
        raise BadInput(f"{out} exists and holds something other than a former export or import; name another folder")
    if more := sorted(there - WRITTEN):
        raise BadInput(f"{out} holds {', '.join(more)} beside a former export or import; name another folder")


def _was_written_here(folder: Path) -> bool:
    try:
        section = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["hass"]
        return EXPORTED in section or IMPORTED in section
    except (OSError, ValueError, TypeError, KeyError):  # no draft's config.json, or not one of ours
        return False


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block ends well, and is gone otherwise."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        partial = Path(scratch) / out.name
        partial.mkdir()
        yield partial
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
