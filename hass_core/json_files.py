"""Small JSON files: others' read, with a sentence for each way in which they can be wrong, own ones written whole."""

import json
import os
from pathlib import Path
from typing import Any

from hass_core.errors import HassError


def read_object(path: Path, wrong: type[HassError], expected: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `wrong`, saying what is `expected`, where it is missing or anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise wrong(f"{path} is missing: {expected}") from None
    except OSError as error:
        raise wrong(f"{path} cannot be read ({error.strerror}): {expected}") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise wrong(f"{path} is not valid JSON ({error}): {expected}") from None
    if not isinstance(found, dict):
        raise wrong(f"{path} holds no JSON object: {expected}")
    return found


def write_whole(path: Path, content: Any) -> None:
    """Write a JSON value; whoever reads the file meanwhile sees all of it or what was there before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)
