"""How a flow ends: its result for who called it, and a sentence for people on the run's page and in its log."""

from typing import TypeVar, cast

from prefect.states import Completed

Done = TypeVar("Done")


def completed(done: Done, message: str, name: str | None = None) -> Done:
    """To be returned by a flow: Prefect takes it for the run's last state, and gives the caller `done`."""
    return cast(Done, Completed(name=name, message=message, data=done))
