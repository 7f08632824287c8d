"""How a program of this folder ends after an operator's mistake: in one sentence, with status 2."""

import os
import sys
from collections.abc import Callable

from flows.arguments import complain
from hass_core.errors import INTERRUPTED, ConfigError


def in_one_sentence(work: Callable[[], object]) -> None:
    """Do the work; what an operator can mend is told without a traceback, and the program ends with 2, or 130."""
    try:
        work()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        complain(error)


def needed(variable: str) -> str:
    """The value of an environment variable. Raises ConfigError naming one that is not set."""
    if value := os.environ.get(variable):
        return value
    raise ConfigError(f"{variable} is not set, and this program needs it in its environment")
