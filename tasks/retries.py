"""Which failures are worth another try: the network's, and a server's that is busy. A refusal is not: asked again it
refuses again, and neither is a user's mistake or a full disk."""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from prefect.client.schemas import State, TaskRun
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import Task

TRANSIENT = (ConnectionError, TimeoutError)
TRANSIENT_MODULES = ("botocore.", "aiobotocore.", "aiohttp.", "httpx.", "httpcore.", "requests.", "urllib3.")
TRY_AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


def is_transient(error: BaseException | None) -> bool:
    """True when the error, or one it was raised from, is about a connection, and no server refused what was asked."""
    causes = list(_causes(error))
    refused = any(_is_refusal(status) for cause in causes if (status := _status(cause)) is not None)
    return not refused and any(_is_of_the_network(cause) for cause in causes)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, TRANSIENT) or f"{type(error).__module__}.".startswith(TRANSIENT_MODULES)


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
    """Prefect's `retry_condition_fn`; the state of a task that raised holds the exception. One that took too long is
    not tried again."""
    error = state.data
    return isinstance(error, BaseException) and not isinstance(error, TaskRunTimeoutError) and is_transient(error)


NETWORK_RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": [5, 15, 30, 60],
    "retry_condition_fn": after_network_failure,
}
"""Options of a task that talks to a store or a server: about two minutes of patience."""

LONGEST_SECONDS = 7 * 86_400.0
"""What has run for a week hangs: it fails, so that next week's run finds the way free."""
SHORT_SECONDS = 6 * 3600.0
"""The same for what looks something up or moves an alias; it may have to load the target first."""
LONG: dict[str, Any] = NETWORK_RETRIES | {"timeout_seconds": LONGEST_SECONDS}
SHORT: dict[str, Any] = NETWORK_RETRIES | {"timeout_seconds": SHORT_SECONDS}
