"""The servers that an engine asks: which has least to do, and which is dropped because it answers no more."""

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from hass_core.errors import TargetError
from hass_core.trusted_hosts import VARIABLE, is_trusted

TIMEOUT_SECONDS = 600.0  # for a whole reply, also of a server that sends a byte now and then
FAILURES_IN_A_ROW = 8  # of one server, behind which the others get its work
KEY = "OPENAI_API_KEY"

log = logging.getLogger(__name__)


@dataclass
class Server:
    """One server; a key, if it wants one, comes from the environment variable OPENAI_API_KEY."""

    url: str
    client: Any  # httpx.AsyncClient
    withheld: bool  # the key, since the host is not trusted
    model: str = ""
    unknown: set[str] = field(default_factory=set)  # fields that it refuses
    in_flight: int = 0
    failures: int = 0  # since it last answered

    @classmethod
    def at(cls, url: str, concurrency: int) -> "Server":
        """The server at an address. Redirections are not followed: a key would go where nobody looked."""
        import httpx  # here, because the core works without it

        url = url.rstrip("/")
        trusted = is_trusted(url)
        key = os.environ.get(KEY)
        client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key and trusted else {},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            timeout=httpx.Timeout(TIMEOUT_SECONDS, connect=10.0),
        )
        return cls(url, client, withheld=bool(key) and not trusted)

    @property
    def hint(self) -> str:
        """That a key was kept back, which may be why a server refuses."""
        host = self.url.partition("://")[2].partition("/")[0]
        return f"; {KEY} was not sent, for {VARIABLE} does not name {host}" if self.withheld else ""


class Servers:
    """Servers of the same model. The last one is never dropped: what it lacks is told by the requests that fail."""

    def __init__(self, urls: list[str], concurrency: int, asked_by: str = "responses"):
        self.model_setting = f"{asked_by}.server_model"
        self.known = [Server.at(url, concurrency) for url in dict.fromkeys(urls)]
        self.alive = list(self.known)
        self._concurrency = concurrency

    @property
    def room(self) -> int:
        """Requests that may be in flight."""
        return self._concurrency * len(self.alive)

    def least_loaded(self, but: Server | None = None) -> Server:
        """The server with the fewest requests in flight; not `but` where there is another."""
        others = [server for server in self.alive if server is not but]
        return min(others or self.alive, key=lambda server: server.in_flight)

    def failed(self, server: Server, why: str) -> None:
        """Count a failure; a server that does nothing else is dropped, and named."""
        server.failures += 1
        if server.failures >= FAILURES_IN_A_ROW:
            self.drop(server, why)

    def drop(self, server: Server, why: str) -> bool:
        """Give a server no more work, unless it is the last one. False where it is."""
        if server in self.alive and len(self.alive) > 1:
            self.alive.remove(server)
            log.warning("the server %s is dropped, %d are left: %s", server.url, len(self.alive), why)
        return server not in self.alive

    def check_models(self) -> None:
        """Raise TargetError where servers have different models."""
        names = {server.model: server.url for server in self.alive}
        if len(names) > 1:
            told = ", ".join(f"{url} has {name}" for name, url in names.items())
            raise TargetError(f"the servers have different models: {told}; say in {self.model_setting} which it is")

    def __str__(self) -> str:
        return " and ".join(server.url for server in self.alive)

    async def close(self) -> None:
        """End all connections."""
        for server in self.known:
            await server.client.aclose()
