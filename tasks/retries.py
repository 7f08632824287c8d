"""Which failures are worth another try: the network's. A user's mistake or a full disk is not."""

from typing import Any

from prefect.client.schemas import State, TaskRun
from prefect.tasks import Task

TRANSIENT = (ConnectionError, TimeoutError)
TRANSIENT_MODULES = ("botocore.", "aiobotocore.", "aiohttp.", "httpx.", "httpcore.", "requests.", "urllib3.")


def is_transient(error: BaseException | None) -> bool:
    """True when the error, or one it was raised from, is about a connection."""
    while error is not None:
        if isinstance(error, TRANSIENT) or f"{type(error).__module__}.".startswith(TRANSIENT_MODULES):
            return True
        error = error.__cause__
    return False


def after_network_failure(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Prefect's `retry_condition_fn`; the state of a task that raised holds the exception."""
    return isinstance(state.data, BaseException) and is_transient(state.data)


NETWORK_RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": [5, 15, 30, 60],
    "retry_condition_fn": after_network_failure,
}
"""Options of a task that talks to a store or a server: about two minutes of patience."""
