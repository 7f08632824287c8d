"""What made a result: code commit, versions, device. Stands beside every output, in no key.

Versions of libraries are recorded and decide no digest: a store would lose its answers with every release of
transformers, where nearly none of them changes a token. What a version could change is held by its content instead:
the target's tokenizer and template as they are loaded, prompts as text, answers and conversations as token ids. The
exception is a speed, which is measured again with another torch (evaluation).
"""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hass_core import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "jinja2", "safetensors", "accelerate", "pyarrow", "numpy")


def provenance() -> dict[str, Any]:
    """Time (UTC), code version and commit, package versions, machine."""
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), **_environment()}


@cache
def _environment() -> dict[str, Any]:
    return {
        "hass": __version__,
        "commit": code_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [],
    }


@cache
def code_commit() -> str | None:
    """The checkout's commit, with `+changes` when files differ from it; outside a checkout $HASS_COMMIT, else None."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HASS_COMMIT") or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
