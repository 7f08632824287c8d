"""The interface of an engine: requests go in through a queue, completions come out in the order they end."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from hass_core.config import SamplingShare
from hass_core.data.rendering import Message


@dataclass(frozen=True)
class Request:
    """One answer to be generated."""

    key: str
    prompt_token_ids: list[int]
    sampling: SamplingShare
    max_new_tokens: int
    seed: int  # drives this request's random numbers alone, whatever else is in the batch
    messages: tuple[Message, ...] = ()  # the same prompt as messages, for servers that apply the template themselves
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """What came of one request; `error` is a short reason when nothing came, `detail` what a server said of it."""

    key: str
    token_ids: list[int]  # ends with the end-of-turn token if and only if `finished`
    finished: bool
    error: str | None = None
    detail: str | None = None


class RequestQueue:
    """Requests still to be started: a lazy source, and in front of it the next turns of running conversations."""

    def __init__(self, source: Iterable[Request]):
        self._source = iter(source)
        self._first: deque[Request] = deque()

    def put_first(self, request: Request) -> None:
        """Let a request be the next one taken."""
        self._first.append(request)

    def take(self, count: int) -> list[Request]:
        """Up to `count` requests; an empty list when none is left for now."""
        taken: list[Request] = []
        while len(taken) < count:
            request = self._first.popleft() if self._first else next(self._source, None)
            if request is None:
                break
            taken.append(request)
        return taken


class Engine(Protocol):
    """Generates answers."""

    def complete(self, queue: RequestQueue) -> Iterator[Completion]:
        """Answer everything in the queue, and what is put into it while iterating. Ends when nothing is running."""
        ...
