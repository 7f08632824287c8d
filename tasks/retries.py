"""Which failures are worth another try: the network's, and a server's that is busy. A refusal is not: asked again it
refuses again, and neither is a user's mistake or a full disk."""

import errno
from http import HTTPStatus
from typing import Any

from prefect.client.schemas import State, TaskRun
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import Task

from hass_core.errors import causes_of, sentence_of
from tasks.prefect_outage import prefect_outage_in
from tasks.progress import say

TRANSIENT = (ConnectionError, TimeoutError)
TRANSIENT_MODULES = ("aiohttp.", "httpx.", "httpcore.", "requests.", "urllib3.")
OF_S3 = ("botocore.", "aiobotocore.")  # whose errors are also about keys that are not set and the like
TRANSIENT_OF_S3 = {"HTTPClientError", "ConnectionError", "ClientError", "IncompleteReadError"}
SERVER_FAILED = getattr(errno, "EREMOTEIO", 121)  # what s3fs makes of a status 500; macOS has no name for it
TRY_AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


def is_transient(error: BaseException | None) -> bool:
    """True when the error, or one it was raised from, is about a connection, and no server refused what was asked."""
    causes = list(causes_of(error))
    refused = any(_is_refusal(status) for cause in causes if (status := _status(cause)) is not None)
    return not refused and any(_is_of_the_network(cause) for cause in causes)


def _is_of_the_network(error: BaseException) -> bool:
    module = f"{type(error).__module__}."
    if module.startswith(OF_S3):
        return not TRANSIENT_OF_S3.isdisjoint(kind.__name__ for kind in type(error).__mro__)
    failed = isinstance(error, OSError) and error.errno == SERVER_FAILED
    return failed or isinstance(error, TRANSIENT) or module.startswith(TRANSIENT_MODULES)


def _is_refusal(status: int) -> bool:
    """A wrong key, a bucket or a model that is not there: any status of the 400s but those that ask for patience."""
    return 400 <= status < 500 and status not in TRY_AGAIN


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of botocore, httpx, requests or aiohttp carries."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(response, "status_code", getattr(error, "status", None))
    return status if isinstance(status, int) else None


def after_network_failure(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Prefect's `retry_condition_fn`, asked while a try is left; the state of a task that raised holds the exception.

    One that took too long is not tried again. That and when it is tried again is told, also who waits at a terminal.
    """
    error = state.data
    if not isinstance(error, BaseException) or isinstance(error, TaskRunTimeoutError) or not is_transient(error):
        return False
    pause = PAUSES_SECONDS[min(run.run_count, len(PAUSES_SECONDS)) - 1]
    told = sentence_of(prefect_outage_in(error) or error) or f"{type(error).__name__}: {error}"
    say.get()(f"{told}; {task.name} is tried again in {pause} s")
    return True


PAUSES_SECONDS = [5, 15, 30, 60]
NETWORK_RETRIES: dict[str, Any] = {
    "retries": len(PAUSES_SECONDS),
    "retry_delay_seconds": PAUSES_SECONDS,
    "retry_condition_fn": after_network_failure,
}
"""Options of a task that talks to a store or a server: about two minutes of patience."""

LONGEST_SECONDS = 7 * 86_400.0
"""What has run for a week hangs: it fails, so that next week's run finds the way free."""
SHORT_SECONDS = 6 * 3600.0
"""The same for what looks something up or moves an alias; it may have to load the target first."""
LONG: dict[str, Any] = NETWORK_RETRIES | {"timeout_seconds": LONGEST_SECONDS}
SHORT: dict[str, Any] = NETWORK_RETRIES | {"timeout_seconds": SHORT_SECONDS}
