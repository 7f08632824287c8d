"""The server around the application: one connection after the other is kept from waiting for ever for its request."""

import asyncio
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for a request's first line and headers


class PromptProtocol(H11Protocol):
    """HTTP as uvicorn speaks it; a connection whose request's head does not come in time is closed.

    uvicorn itself times only how long a connection may be silent between two requests.
    """

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

    def _watch(self) -> None:
        """Start the clock where a head is awaited, or has half arrived; stop it where it is there."""
        awaited = self.conn.their_state is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if not awaited:
            self._rest()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _rest(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def make_server(app: ASGIApp, **where: Any) -> uvicorn.Server:
    """A server for `app`; `where` is uvicorn's host and port, or nothing where it is run on sockets of its own."""
    return uvicorn.Server(uvicorn.Config(app, http=PromptProtocol, log_level="warning", **where))
