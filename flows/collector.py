"""Python's garbage collector beside the million objects that torch, transformers, MLflow and Prefect make on import.

All of them stay until the process ends, and yet each full collection looks through them: eight times while they are
imported, which is a quarter of those seconds, and a third of a second whenever a stage gives its memory back.
"""

import atexit
import gc

IMPORTING = (100_000, 50, 100)  # of gc.set_threshold: no full collection before all is imported
_before: tuple[int, int, int] | None = None  # the threshold, while it is another one


def importing() -> None:
    """Collect rarely from now on, until `imported` is called."""
    global _before
    if _before is None:
        _before = gc.get_threshold()
        gc.set_threshold(*IMPORTING)


def imported() -> None:
    """Collect as before `importing`, and no more among what is there now. A second call changes nothing."""
    global _before
    if _before is not None:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton's bindings print all they hold as leaked
        gc.set_threshold(*_before)
        _before = None
