"""Python's garbage collector beside the million objects that torch, transformers, MLflow and Prefect make on import.

All of them stay until the process ends, and yet each full collection looks through them: eight times while they are
imported, which is a quarter of those seconds, and a third of a second whenever a stage gives its memory back.
"""

import atexit
import gc

IMPORTING = (100_000, 50, 100)  # of gc.set_threshold: no full collection before all is imported
_threshold = gc.get_threshold()


def importing() -> None:
    """Collect rarely from now on, until `imported` is called."""
    gc.set_threshold(*IMPORTING)


def imported() -> None:
    """Collect as before `importing`, and no more among what is there now. A second call changes nothing."""
    if gc.get_threshold() == IMPORTING:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton's bindings print all they hold as leaked
        gc.set_threshold(*_threshold)
