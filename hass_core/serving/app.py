"""The HTTP side: routes, streaming, errors in OpenAI's form."""

import asyncio
import difflib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from hass_core.errors import HassError, NonFinite
from hass_core.serving.limits import BodyLimit, KeyRequired
from hass_core.serving.protocol import Answered, ChatRequest, CompletionRequest, GenerationRequest, error_body
from hass_core.serving.service import Piece, Service
from hass_core.serving.worker import Busy, Unavailable

Pieces = AsyncGenerator[Piece, None]
LOOK_SECONDS = 0.5  # how often a waiting request looks whether its client is still there
RETRY = {"Retry-After": "5"}  # seconds
NO_OBJECT = ("missing", "model_type", "model_attributes_type", "dict_type")  # none, another value, or one sent as text
FIELDS = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()


def make_app(service: Service, key: str | None = None, hosts: list[str] | None = None) -> FastAPI:
    """The application. `key` is asked of every request but /health; `hosts` are the Host headers taken, None = any."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="HASS draft server", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if key:
        app.add_middleware(KeyRequired, key=key)
    app.add_middleware(BodyLimit, max_bytes=service.limits.max_body_bytes, max_seconds=service.limits.max_body_seconds)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    _add_errors(app, service)
    _add_pages(app, service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _respond(service, body, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _respond(service, body, request)

    return app


def _add_pages(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if service.failure:
            return JSONResponse({"status": service.failure}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": service.model, "object": "model", "created": started, "owned_by": "hass"}
        return {"object": "list", "data": [entry]}


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        service.metrics.request("refused")
        wrong = dict(_field_and_reason(problem) for problem in error.errors())
        text = "; ".join(f"{field}: {what}" if field else what for field, what in wrong.items())
        return JSONResponse(error_body(text, "invalid_request_error", next(iter(wrong)) or None), 400)

    @app.exception_handler(HassError)
    async def refused(request: Request, error: HassError) -> Response:
        if isinstance(error, NonFinite):
            return JSONResponse(error_body(str(error), "server_error"), 500)
        service.metrics.request("refused")
        return JSONResponse(error_body(str(error), "invalid_request_error"), 400)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        service.metrics.request("refused")
        text = f"{service.limits.max_waiting} requests are in line already; try again later"
        return JSONResponse(error_body(text, "rate_limit_error"), 429, headers=RETRY)

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return JSONResponse(error_body(str(error), "server_error"), 503, headers=RETRY)

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code, error.headers)


def _field_and_reason(problem: dict[str, Any]) -> tuple[str, str]:
    """(field, what is wrong with it) of one of pydantic's findings."""
    field = ".".join(str(part) for part in problem["loc"][1:])
    if not field and problem["type"] in NO_OBJECT:
        return "", "the body must be a JSON object, sent with Content-Type: application/json"
    if problem["type"] == "json_invalid":
        return "", f"the body is not valid JSON: {problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        *_, name = problem["loc"]
        if name in FIELDS:  # of the other endpoint
            return field, "not supported here; leave it out"
        near = difflib.get_close_matches(str(name), FIELDS, n=1)
        return field, "this server knows no such field" + (f"; did you mean {near[0]}?" if near else "")
    return field, problem["msg"].removeprefix("Value error, ")


async def _respond(service: Service, body: GenerationRequest, request: Request) -> Response:
    prompt = service.prompt_of(body)
    answered = Answered("chat" if isinstance(body, ChatRequest) else "text", service.model, len(prompt))
    pieces = service.answer(body, prompt)
    first = await _unless_gone(anext(pieces), request)  # errors come before the first token, with their status
    if first is None:
        await pieces.aclose()
        return Response(status_code=499)
    if body.stream:
        stream = _events(pieces, first, answered, body.stream_options.include_usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    return await _whole(pieces, first, answered, request)


async def _whole(pieces: Pieces, first: Piece, answered: Answered, request: Request) -> Response:
    """The answer in one piece; a client that leaves ends it."""
    text, piece = first.text, first
    async with aclosing(pieces):
        while piece.finished is None:
            found = await _unless_gone(anext(pieces), request)
            if found is None:
                return Response(status_code=499)
            piece = found
            text += piece.text
    return JSONResponse(answered.whole(text, piece.finished, piece.new_tokens))


async def _events(pieces: Pieces, first: Piece, answered: Answered, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. When the client leaves, this generator is closed, and with it the request."""
    async with aclosing(pieces):
        piece = first
        yield _event(answered.chunk(piece.text, piece.finished, first=True))
        try:
            async for piece in pieces:
                if piece.text or piece.finished:
                    yield _event(answered.chunk(piece.text, piece.finished, first=False))
        except (HassError, Unavailable) as error:
            yield _event(error_body(str(error), "server_error"))
        if include_usage:
            yield _event(answered.usage_chunk(piece.new_tokens))
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _unless_gone(coming: Any, request: Request) -> Piece | None:
    """The next piece, or None when the client has left meanwhile."""
    task = asyncio.ensure_future(coming)
    try:
        while not await request.is_disconnected():
            if (await asyncio.wait({task}, timeout=LOOK_SECONDS))[0]:
                return task.result()
        return None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
