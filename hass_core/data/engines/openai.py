"""Answers from any server that speaks the OpenAI chat protocol: vLLM, SGLang, TGI and others.

Many requests are in flight at once, within a bound. What is worth repeating (busy, rate limit, server error, lost
connection) is repeated with growing pauses, as long as the server asks for when it says so; so is, fewer times, a reply
that is no answer. Anything else becomes an error on that one conversation. Where the first requests all fail alike, the
run stops: the rest would fail too.
"""

import asyncio
import os
import random
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from hass_core.config import ResponsesConfig
from hass_core.data.engines.base import Completion, Request, RequestQueue
from hass_core.data.engines.replies import OddReply, Reply, model_in, quoted, read_reply, without_refused
from hass_core.data.messages import as_sent
from hass_core.data.rendering import SkippedConversation, special_token_ids
from hass_core.data.templates import answer_tokens
from hass_core.errors import ConfigError, TargetError
from hass_core.trusted_hosts import VARIABLE, is_trusted

MAX_ATTEMPTS = 6
ODD_ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 60.0
TIMEOUT_SECONDS = 600.0
WORTH_REPEATING = {408, 409, 425, 429, 500, 502, 503, 504}
REFUSALS = {400, 422}
ALIKE = 8  # so many equal failures before any answer stop the run
KEY = "OPENAI_API_KEY"


class OpenAIEngine:
    """Requests to one server; a key, if it wants one, comes from the environment variable OPENAI_API_KEY."""

    def __init__(self, settings: ResponsesConfig, tokenizer: PreTrainedTokenizerBase):
        if not settings.server_url:
            raise ConfigError("responses.server_url is empty; give the server's address, ending in /v1")
        self._url = settings.server_url.rstrip("/")
        self._model = settings.server_model
        self._concurrency = settings.server_concurrency
        self._tokenizer = tokenizer
        self._unknown: set[str] = set()  # fields that this server refuses
        self._withheld = bool(os.environ.get(KEY)) and not is_trusted(self._url)

    def complete(self, queue: RequestQueue) -> Iterator[Completion]:
        """See `Engine`. Raises TargetError when the server cannot be reached, or fails on all the first requests."""
        with asyncio.Runner() as runner:
            client = self._client()
            try:
                model = self._model or runner.run(self._served_model(client))
                yield from self._unless_all_fail(self._completions(runner, client, model, queue))
            finally:
                runner.run(client.aclose())

    def _client(self) -> Any:
        import httpx  # here, because the core works without it

        key = None if self._withheld else os.environ.get(KEY)
        limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        return httpx.AsyncClient(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=limits,
            timeout=httpx.Timeout(TIMEOUT_SECONDS, connect=10.0),
        )

    async def _served_model(self, client: Any) -> str:
        """The one model the server offers: a first request that shows whether it is there."""
        import httpx

        problem = ""
        for attempt in range(ODD_ATTEMPTS):
            try:
                reply = await client.get("/models")
            except (httpx.RequestError, httpx.InvalidURL) as error:
                problem = f"{error!r}"
                break
            name = model_in(reply.content) if reply.status_code == 200 else None
            if name:
                return name
            problem = f"status {reply.status_code}, it said {quoted(reply.content)}"
            if reply.status_code != 200 and reply.status_code not in WORTH_REPEATING:
                break
            await asyncio.sleep(backoff_seconds(attempt, reply.headers.get("retry-after")))
        raise TargetError(
            f"the server {self._url} does not list its models: {problem}{self._hint()}; check that it runs, or set "
            "responses.server_model"
        )

    def _unless_all_fail(self, completions: Iterator[Completion]) -> Iterator[Completion]:
        """Hold failures back until there is an answer. Raises TargetError when the first ones are all alike."""
        held: list[Completion] = []
        for completion in completions:
            if completion.detail is None:  # an answer, or a conversation at fault and not the server
                yield from held
                yield completion
                yield from completions
                return
            held.append(completion)
            if len(held) == ALIKE and len({failure.error for failure in held}) == 1:
                raise TargetError(
                    f"no prompt was answered: {ALIKE} × {completion.error} (it said: {completion.detail}), and nothing "
                    f"else from {self._url}{self._hint()}; check the server and the responses settings"
                )
        yield from held

    def _hint(self) -> str:
        """That a key was kept back, which may be why a server refuses."""
        host = self._url.partition("://")[2].partition("/")[0]
        return f"; {KEY} was not sent, for {VARIABLE} does not name {host}" if self._withheld else ""

    def _completions(
        self, runner: asyncio.Runner, client: Any, model: str, queue: RequestQueue
    ) -> Iterator[Completion]:
        """Keep `concurrency` requests in flight; yield what has arrived between two waits."""
        running: set[asyncio.Task[Completion]] = set()

        async def turn() -> set[asyncio.Task[Completion]]:
            for request in queue.take(self._concurrency - len(running)):
                running.add(asyncio.ensure_future(self._answer(client, model, request)))
            if not running:
                return set()
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            return done

        while done := runner.run(turn()):
            running -= done
            for task in done:
                yield task.result()

    async def _answer(self, client: Any, model: str, request: Request) -> Completion:
        """One answer, or the error that remained after all attempts. Raises TargetError when the server is gone."""
        error, said = "", ""
        for attempt in range(MAX_ATTEMPTS):
            status, data, retry_after = await self._posted(client, model, request, attempt)
            if status == 200:
                try:
                    return self._completion(request, read_reply(data))
                except OddReply as odd:
                    error, said = odd.reason, odd.said
                    if attempt >= ODD_ATTEMPTS - 1:
                        break
            elif status is not None:
                error, said = f"server answered {status}", quoted(data)
                if status not in WORTH_REPEATING or attempt == MAX_ATTEMPTS - 1:
                    break
            await asyncio.sleep(backoff_seconds(attempt, retry_after))
        return Completion(request.key, [], finished=False, error=error, detail=said)

    async def _posted(
        self, client: Any, model: str, request: Request, attempt: int
    ) -> tuple[int | None, bytes, str | None]:
        """Status, body and Retry-After of a reply; no status when the connection was lost. Raises TargetError."""
        import httpx

        body = {key: value for key, value in _body(model, request).items() if key not in self._unknown}
        if "max_tokens" in self._unknown:
            body["max_completion_tokens"] = request.max_new_tokens
        try:
            reply = await client.post("/chat/completions", json=body)
        except httpx.RequestError as error:
            if attempt == MAX_ATTEMPTS - 1:
                raise TargetError(
                    f"the server {self._url} cannot be reached: {error!r}; start it and run the same command "
                    "again, finished answers are kept"
                ) from error
            return None, b"", None
        known = without_refused(body, reply.text) if reply.status_code in REFUSALS else None
        if known is not None:
            self._unknown |= body.keys() - known.keys()
            return await self._posted(client, model, request, attempt)
        return reply.status_code, reply.content, reply.headers.get("retry-after")

    def _completion(self, request: Request, reply: Reply) -> Completion:
        """The server's own token ids where it gives them whole, else the tokenizer's cut of the text."""
        finished, ids = reply.finished, reply.token_ids
        if reply.problem:
            return Completion(request.key, [], finished, error=reply.problem)
        vocabulary = len(self._tokenizer)
        if ids and max(ids) < vocabulary and (ids[-1] in special_token_ids(self._tokenizer)) == finished:
            return Completion(request.key, ids, finished)
        answer = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning}
        try:
            ids = answer_tokens(self._tokenizer, [*request.messages, answer], finished, request.tools)
            return Completion(request.key, ids, finished)
        except SkippedConversation as problem:
            return Completion(request.key, [], finished, error=problem.reason)


def backoff_seconds(attempt: int, retry_after: str | None) -> float:
    """Seconds before the next attempt: what the server asks for, else doubling, partly random against stampedes."""
    if retry_after is not None and retry_after.strip().replace(".", "", 1).isdecimal():
        return min(float(retry_after), MAX_PAUSE_SECONDS)
    return min(FIRST_PAUSE_SECONDS * 2**attempt, MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0)


def _body(model: str, request: Request) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": as_sent(request.messages),
        "max_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request.seed % 2**31,
        "return_token_ids": True,  # vLLM; other servers ignore it
    }
    tools = {"tools": list(request.tools)} if request.tools else {}
    return body | tools | ({"top_k": sampling.top_k} if sampling.top_k else {})
