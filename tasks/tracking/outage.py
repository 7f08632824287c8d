"""MLflow is away: told at once with its address, asked again for some minutes, and then one sentence. One too where
it lets nobody in, or where another program answers in its place.

MLflow's client asks again by itself, but says nothing while it does, and ends with pages of traceback.
"""

import logging
import re
import sys
import time
from collections.abc import Sequence

from mlflow.exceptions import MlflowException

from hass_core.errors import TrackingError

REQUESTS = logging.getLogger("urllib3.connectionpool")
QUIET_SECONDS = 60.0
GIVEN_UP = re.compile(r"API request to (?P<scheme>https?://)(?P<host>[^/\s]+)\S* failed with (timeout )?exception")
STATUS = re.compile(r"API request to endpoint \S+ failed with error code (?P<status>\d+)")
FULL = "database or disk is full"  # SQLite's words
OF_ANOTHER = ("API request to endpoint was successful but the response body was not", "INTERNAL_ERROR: Response: ")
ASKED_AGAIN = ("Retrying (", "Retry: ")  # how urllib3 begins its notes on a request that it repeats


def log_outages(address: str) -> None:
    """From now on, tell once a minute that MLflow at `address` does not answer while requests to it are repeated."""
    for former in [known for known in REQUESTS.filters if isinstance(known, _OutageFilter)]:
        REQUESTS.removeFilter(former)
    REQUESTS.addFilter(_OutageFilter(address))
    REQUESTS.setLevel(logging.DEBUG)  # after a status such as 503 urllib3 notes it no louder; the filter drops the rest


def outage_in(error: BaseException) -> TrackingError | None:
    """One sentence for an error that MLflow's client raises when it has given up asking, or when the disk of its own
    database is full; None for any other."""
    if isinstance(error, MlflowException) and FULL in str(error):
        return TrackingError(
            "the disk with MLflow's database is full: make room and run it again; what is done is kept"
        )
    found = GIVEN_UP.match(str(error)) if isinstance(error, MlflowException) else None
    if found is None:
        return None
    address = found["scheme"] + found["host"].rpartition("@")[2]
    return TrackingError(
        f"MLflow at {address} does not answer: start it or change tracking.uri or MLFLOW_TRACKING_URI; what is done is "
        "kept"
    )


def refusal_in(error: MlflowException, address: str) -> TrackingError:
    """One sentence for MLflow's first answer, where that is an error and no outage."""
    text = str(error)
    found = STATUS.match(text)
    if (found and found["status"] in ("401", "403")) or text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
        return TrackingError(
            f"MLflow at {address} refuses this machine: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, as that server's operator has told"
        )
    if found or text.startswith(OF_ANOTHER):
        why = f"status {found['status']}" if found else "its answer is another program's"
        return TrackingError(
            f"what answers at {address} is no MLflow server ({why}): tracking.uri and MLFLOW_TRACKING_URI are to be as "
            "http://HOST:5000"
        )
    return TrackingError(f"cannot use MLflow at {address}: {text}; start it or change tracking.uri")


def outage_or(error: Exception) -> Exception:
    """The sentence where the error says that MLflow has not answered, else the error itself."""
    return outage_in(error) or error


class _OutageFilter(logging.Filter):
    """Turns urllib3's notes on repeated requests to MLflow into one sentence, and drops those of no interest."""

    def __init__(self, address: str):
        super().__init__()
        self._address, self._logged_at = address, -QUIET_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith(ASKED_AGAIN) or not _is_for_mlflow(record.args):
            return record.levelno >= logging.WARNING
        now = time.monotonic()
        if now - self._logged_at < QUIET_SECONDS:
            return False
        self._logged_at = now
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args = "MLflow at %s does not answer; it is asked again for some minutes", (self._address,)
        if not _is_heard():
            print(record.getMessage(), file=sys.stderr)
        return True


def _is_heard() -> bool:
    """Whether a handler shows the notes; urllib3 has one that shows nothing and keeps Python's own from it."""
    loggers = (REQUESTS, logging.getLogger("urllib3"), logging.getLogger())
    return any(not isinstance(handler, logging.NullHandler) for logger in loggers for handler in logger.handlers)


def _is_for_mlflow(arguments: object) -> bool:
    """The last argument of urllib3's note is the path."""
    return isinstance(arguments, Sequence) and bool(arguments) and "/mlflow" in str(arguments[-1])
