"""Answers from servers that speak the OpenAI chat protocol: vLLM, SGLang, TGI and others.

Many requests are in flight at once, within a bound. What is worth repeating (busy, rate limit, server error, lost
connection) is repeated with growing pauses, as long as the server asks for when it says so; so is, fewer times, a reply
that is no answer. Anything else becomes an error on that one conversation. Where the first requests all fail alike, or
later ones in a row by the server's fault, the run stops: the rest would fail too.
"""

import asyncio
import random
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

from transformers import PreTrainedTokenizerBase

from hass_core.config import ResponsesConfig
from hass_core.data.engines.base import Completion, Request, RequestQueue
from hass_core.data.engines.replies import OddReply, Reply, models_in, quoted, read_reply, says, without_refused
from hass_core.data.engines.servers import TIMEOUT_SECONDS, Server, Servers
from hass_core.data.messages import as_sent
from hass_core.data.rendering import SkippedConversation, decode, special_token_ids
from hass_core.data.templates import answer_tokens
from hass_core.errors import ConfigError, TargetError

MAX_ATTEMPTS = 6
ODD_ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 60.0
BUSY = {408, 409, 425, 429}
WORTH_REPEATING = BUSY | {500, 502, 503, 504}
REFUSALS = {400, 422}
OF_ONE_CONVERSATION = {f"server answered {status}" for status in (400, 413, 422)}  # too long for the server, say
ALIKE = 8  # so many equal failures in a row stop the run


class OpenAIEngine:
    """Requests to one server or to several with the same model."""

    def __init__(self, settings: ResponsesConfig, tokenizer: PreTrainedTokenizerBase):
        if not settings.server_url:
            raise ConfigError("responses.server_url is empty; give the server's address, ending in /v1")
        self._urls = [settings.server_url, *settings.more_servers]
        self._model = settings.server_model
        self._concurrency = settings.server_concurrency
        self._tokenizer = tokenizer

    def complete(self, queue: RequestQueue) -> Iterator[Completion]:
        """See `Engine`. Raises TargetError when no server can be reached, or they fail again and again."""
        with asyncio.Runner() as runner:
            self._servers = Servers(self._urls, self._concurrency)
            try:
                runner.run(find_models(self._servers, self._model))
                with closing(self._completions(runner, queue)) as completions:
                    yield from self._unless_failing(completions)
            finally:
                runner.run(self._servers.close())

    def _unless_failing(self, completions: Iterator[Completion]) -> Iterator[Completion]:
        """Hold failures of the server back until there is an answer, so that a run that stops leaves them to the next.

        Raises TargetError when `ALIKE` in a row are alike. Once the server has answered, a refusal of one conversation
        says nothing of the next.
        """
        held: list[Completion] = []
        answered = False
        for completion in completions:
            if completion.detail is None:  # an answer, or a conversation at fault and not the server
                answered = True
            elif not (answered and completion.error in OF_ONE_CONVERSATION):
                held.append(completion)
                if len(held) >= ALIKE and len({failure.error for failure in held[-ALIKE:]}) == 1:
                    raise self._failure(completion, answered)
                continue
            if completion.detail is None:
                yield from held
                held = []
            yield completion
        yield from held

    def _failure(self, last: Completion, answered: bool) -> TargetError:
        failed = f"{ALIKE} × {last.error} (it said: {last.detail})"
        if answered:
            return TargetError(
                f"the server {self._servers} answers no more: {failed}{self._hint()}; check it and run the same "
                "command again, finished answers are kept"
            )
        return TargetError(
            f"no prompt was answered: {failed}, and nothing else from {self._servers}{self._hint()}; check the server "
            "and the responses settings"
        )

    def _hint(self) -> str:
        return "".join(server.hint for server in self._servers.alive)

    def _completions(self, runner: asyncio.Runner, queue: RequestQueue) -> Generator[Completion]:
        """Keep `concurrency` requests in flight at each server; yield what has arrived between two waits."""
        running: set[asyncio.Task[Completion]] = set()

        async def turn() -> set[asyncio.Task[Completion]]:
            for request in queue.take(max(0, self._servers.room - len(running))):
                running.add(asyncio.ensure_future(self._answer(request)))
            if not running:
                return set()
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            return done

        try:
            while done := runner.run(turn()):
                for task in done:
                    running.discard(task)
                    yield task.result()
        finally:
            runner.run(_abandon(running))

    async def _answer(self, request: Request) -> Completion:
        """One answer, or the error that remained after all attempts, each at the server with least to do and, after a
        failure, at another one. Raises TargetError when the last server is gone."""
        error, said, server, attempt, odd = "", "", None, 0, 0
        while attempt < MAX_ATTEMPTS:
            server = self._servers.least_loaded(but=server if error or attempt else None)
            reply = await self._posted(server, request, last=attempt == MAX_ATTEMPTS - 1)
            if reply is None:  # the connection was lost
                attempt += server in self._servers.alive  # else it is asked of the others as if for the first time
                await asyncio.sleep(backoff_seconds(attempt, None))
                continue
            try:
                found = read_reply(reply.content) if reply.status_code == 200 else None
            except OddReply as problem:
                error, said, found, odd = problem.reason, problem.said, None, odd + 1
            else:
                if found is not None:
                    server.failures = 0
                    return self._completion(request, found)
                error, said = f"server answered {reply.status_code}", said_by(reply)
            attempt += 1
            if (
                error in OF_ONE_CONVERSATION
                or odd >= ODD_ATTEMPTS
                or not self._is_worth_repeating(server, reply, error)
            ):
                break
            await asyncio.sleep(backoff_seconds(attempt - 1, reply.headers.get("retry-after")))
        return Completion(request.key, [], finished=False, error=error, detail=said)

    def _is_worth_repeating(self, server: Server, reply: Any, error: str) -> bool:
        """Count a server's failure, which being busy is not. What one refuses, a wrong key say, another may not."""
        if reply.status_code not in BUSY:
            self._servers.failed(server, error)
        return reply.status_code in WORTH_REPEATING | {200} or len(self._servers.alive) > 1

    async def _posted(self, server: Server, request: Request, last: bool) -> Any:
        """The reply (httpx.Response); None when the connection was lost. Raises TargetError where it is lost for the
        `last` time at the last server."""
        import httpx

        body = {key: value for key, value in _body(server.model, request).items() if key not in server.unknown}
        if "max_tokens" in server.unknown:
            body["max_completion_tokens"] = request.max_new_tokens
        server.in_flight += 1
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                reply = await server.client.post("/chat/completions", json=body)
        except (httpx.RequestError, TimeoutError) as error:
            self._servers.failed(server, repr(error))
            if last and not self._servers.drop(server, repr(error)):
                raise TargetError(
                    f"the server {server.url} cannot be reached: {error!r}; start it and run the same command "
                    "again, finished answers are kept"
                ) from error
            return None
        finally:
            server.in_flight -= 1
        known = without_refused(body, reply.text) if reply.status_code in REFUSALS else None
        if known is not None:
            server.unknown |= body.keys() - known.keys()
            return await self._posted(server, request, last)
        return reply

    def _completion(self, request: Request, reply: Reply) -> Completion:
        """The server's own token ids where it gives them whole, else the tokenizer's cut of the text."""
        finished, ids = reply.finished, reply.token_ids
        if reply.problem:
            return Completion(request.key, [], finished, error=reply.problem)
        if self._are_of(ids, reply):
            return Completion(request.key, ids, finished)
        answer = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning}
        try:
            ids = answer_tokens(self._tokenizer, [*request.messages, answer], finished, request.tools)
            return Completion(request.key, ids, finished)
        except SkippedConversation as problem:
            return Completion(request.key, [], finished, error=problem.reason)

    def _are_of(self, ids: list[int], reply: Reply) -> bool:
        """Whether token ids are those of a reply's text and end, by the target's own tokenizer."""
        if not ids or max(ids) >= len(self._tokenizer):
            return False
        ends = ids[-1] in special_token_ids(self._tokenizer)
        return ends == reply.finished and says(decode(self._tokenizer, ids[:-1] if ends else ids), reply)


async def find_models(servers: Servers, model: str | None) -> None:
    """Fill in what each server is asked for: `model`, else the one it has. One that lists no models is dropped, unless
    it is the last. Raises TargetError."""
    for server in list(servers.alive):
        try:
            server.model = model or await _served_model(server, servers.model_setting)
        except TargetError as error:
            if not servers.drop(server, str(error)):
                raise
    servers.check_models()


async def _served_model(server: Server, setting: str) -> str:
    """The one model the server offers: a first request that shows whether it is there. Raises TargetError."""
    import httpx

    problem = ""
    for attempt in range(ODD_ATTEMPTS):
        try:
            reply = await server.client.get("/models")
        except (httpx.RequestError, httpx.InvalidURL) as error:
            problem = f"{error!r}"
            break
        names = models_in(reply.content) if reply.status_code == 200 else []
        if len(names) > 1:
            raise TargetError(
                f"the server {server.url} has the models {', '.join(names)}; say in {setting} which is the target"
            )
        if names:
            return names[0]
        problem = f"status {reply.status_code}, it said {said_by(reply)}"
        if reply.status_code != 200 and reply.status_code not in WORTH_REPEATING:
            break
        await asyncio.sleep(backoff_seconds(attempt, reply.headers.get("retry-after")))
    raise TargetError(
        f"the server {server.url} does not list its models: {problem}{server.hint}; check that it runs, or set "
        f"{setting}"
    )


async def _abandon(tasks: set[asyncio.Task[Completion]]) -> None:
    """End requests whose answers nobody waits for any more; that they fail as well is no news."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def said_by(reply: Any) -> str:
    """What a reply (httpx.Response) without an answer says, quoted."""
    moved = reply.headers.get("location") if reply.is_redirect else None
    return repr(f"moved to {moved}") if moved else quoted(reply.content)


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
