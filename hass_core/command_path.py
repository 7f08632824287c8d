"""How to type a command of this installation."""

import shutil
import sys
from pathlib import Path


def command_path(name: str) -> str:
    """The command as this shell finds it: by its name, else where this Python's environment has it."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found and Path(found).resolve() == own.resolve():
        return name
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)
