"""The folder that a worker clones the code into, for one run: what a run writes there is gone with it."""

import re
import tempfile
from pathlib import Path

NAME = re.compile(r"tmp[a-z0-9_]{8}prefect")  # tempfile's, with the ending that Prefect's process worker asks for


def is_of_one_run(folder: str | Path) -> bool:
    """Whether a folder lies in one that a worker has made for this run alone, and removes after it."""
    parts = Path(folder).resolve().parts
    temporary = Path(tempfile.gettempdir()).resolve().parts
    made = parts[len(temporary) : len(temporary) + 1]
    return parts[: len(temporary)] == temporary and bool(made) and NAME.fullmatch(made[0]) is not None
