"""What a request must pass before it is read: the size of its body, the time it takes to arrive, and the key."""

import asyncio
import hmac
import json
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hass_core.serving.protocol import error_body


class BodyLimit:
    """Refuses bodies above `max_bytes` with 413, by their announced length or while they arrive, and those that have
    not arrived after `max_seconds` with 408."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float):
        self._app, self._max_bytes, self._max_seconds = app, max_bytes, max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, self._max_bytes, self._max_seconds)

        async def unless_refused(message: Message) -> None:
            if body.refusal is None:
                await send(message)

        if body.refusal is None:
            with suppress(ClientDisconnect):
                await self._app(scope, body.receive, unless_refused)
        if body.refusal is not None:
            await refuse(send, *body.refusal, "invalid_request_error")


class _Body:
    """One body while it arrives. `refusal` is status and sentence, once there is reason for it."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, max_seconds: float):
        self._receive, self._max_bytes, self._max_seconds = receive, max_bytes, max_seconds
        self._ends = asyncio.get_running_loop().time() + max_seconds
        self._arrived, self._complete = 0, False
        self.refusal: tuple[int, str] | None = None
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > max_bytes:
            self._refuse_size()

    async def receive(self) -> Message:
        """The next piece; the client counts as gone once the body is refused."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._ends):
                message = await self._receive()
        except TimeoutError:
            self.refusal = 408, f"the body has not arrived within {self._max_seconds:g} seconds"
            return {"type": "http.disconnect"}
        self._arrived += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._arrived > self._max_bytes:
            self._refuse_size()
        return {"type": "http.disconnect"} if self.refusal else message

    def _refuse_size(self) -> None:
        self.refusal = 413, f"the body is larger than {self._max_bytes} bytes"


class KeyRequired:
    """Refuses requests without the key with 401, except for /health. The comparison takes the same time whatever is
    sent."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await refuse(send, 401, "give the server's key as Authorization: Bearer KEY", "authentication_error")
                return
        await self._app(scope, receive, send)


async def refuse(send: Send, status: int, message: str, kind: str) -> None:
    """Answer with an error in OpenAI's form."""
    body = json.dumps(error_body(message, kind)).encode()
    headers: list[Any] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the body may still be on its way
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
