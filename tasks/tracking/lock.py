"""One process at a time, across machines: the registry lets only one caller create a name, so a name is the lock.

It is the name of a prompt: MLflow lists those elsewhere, so that people see their models alone.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from hass_core.errors import TrackingError

STALE_SECONDS = 60  # held for moments only: an older lock belongs to a process that died
WAIT_SECONDS = 2 * STALE_SECONDS


@contextmanager
def locked(client: MlflowClient, name: str) -> Iterator[None]:
    """Hold the lock `name` during the block. Raises TrackingError when it stays taken."""
    name = re.sub(r"[^\w.-]", "-", name) + ".lock"
    deadline = time.monotonic() + WAIT_SECONDS
    while not _take(client, name):
        if time.monotonic() > deadline:
            raise TrackingError(f"another process keeps the lock {name}, a prompt in MLflow; delete it there")
        time.sleep(0.1)
    try:
        yield
    finally:
        client.delete_prompt(name)


def _take(client: MlflowClient, name: str) -> bool:
    try:
        client.create_prompt(name, "A lock; it is held for a moment")
        return True
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):  # taken, just released
            raise
    _remove_stale(client, name)
    return False


def _remove_stale(client: MlflowClient, name: str) -> None:
    try:
        held = client.get_prompt(name)  # None: released meanwhile
        if held and time.time() - (held.creation_timestamp or 0) / 1000 > STALE_SECONDS:
            client.delete_prompt(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # released meanwhile
            raise
