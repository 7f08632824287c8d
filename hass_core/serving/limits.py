"""What a request must pass before it is read: the size of its body, and the key."""

import hmac
import json
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hass_core.serving.protocol import error_body


class BodyLimit:
    """Refuses bodies above `max_bytes` with 413, by their announced length or while they arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        arrived = int(announced) if announced.isdigit() and int(announced) > self._max else 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            return message if arrived <= self._max else {"type": "http.disconnect"}

        async def unless_too_large(message: Message) -> None:
            if arrived <= self._max:
                await send(message)

        if arrived <= self._max:
            with suppress(ClientDisconnect):
                await self._app(scope, counted, unless_too_large)
        if arrived > self._max:
            await refuse(send, 413, f"the body is larger than {self._max} bytes", "invalid_request_error")


class KeyRequired:
    """Refuses requests below /v1 without the key with 401. The comparison takes the same time whatever is sent."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await refuse(send, 401, "give the server's key as Authorization: Bearer KEY", "authentication_error")
                return
        await self._app(scope, receive, send)


async def refuse(send: Send, status: int, message: str, kind: str) -> None:
    """Answer with an error in OpenAI's form."""
    body = json.dumps(error_body(message, kind)).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
