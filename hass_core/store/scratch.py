"""Temporary folders of which one can tell whether their process still lives.

A process holds a file lock on the folder it works in; the kernel drops the lock when the process ends, by kill -9 too.
A folder without a lock is abandoned and can be removed.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "writing-"
PUBLISHING, NAMES = "publishing", "names"  # folders of a stage's scratch that are only there to be locked


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold `folder` (made if missing) for this thread alone, or beside others that share it; the rest of this machine
    waits."""
    handle = _lock(folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def publishing(scratch: Path, name: str) -> Iterator[None]:
    """Put a file of this name in place: beside those of other names, one after the other with those of its own, and
    never while the stage is being finished."""
    own = scratch / PUBLISHING / NAMES / name
    with locked(scratch / PUBLISHING, shared=True), locked(own):
        yield
        with suppress(FileNotFoundError):  # the stage was finished before, and all of its scratch is gone
            own.rmdir()


@contextmanager
def finishing(scratch: Path) -> Iterator[None]:
    """Finish the stage, while nobody puts a file in place."""
    with locked(scratch / PUBLISHING):
        yield


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed on the way out; abandoned ones beside it are removed on the way in."""
    with locked(parent):
        _remove_abandoned(parent)
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        handle = _lock(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders in `parent` whose process has ended."""
    if parent.is_dir():
        with locked(parent):
            _remove_abandoned(parent)


def clear(parent: Path) -> None:
    """Remove all that is in `parent`, and `parent`, except temporary folders in use by another process."""
    with locked(parent):
        _remove_abandoned(parent)
        for path in parent.iterdir():
            if path.is_dir() and not path.name.startswith(PREFIX):
                shutil.rmtree(path, ignore_errors=True)
            elif not path.is_dir():
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another process is still writing
            parent.rmdir()


def _lock(folder: Path, kind: int = fcntl.LOCK_EX) -> int:
    """An open handle that holds the lock. Starts again when the folder was removed while waiting for it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, kind)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        os.close(handle)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner removed it since it was listed
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its process lives
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)
