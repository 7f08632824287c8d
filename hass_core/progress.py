"""How a long stage tells how far it is: a callback, so the core knows no progress bar and no workflow engine."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, note); `note` is a short text such as a speed."""


def no_progress(done: int, total: int, note: str = "") -> None:
    """The default: say nothing."""
