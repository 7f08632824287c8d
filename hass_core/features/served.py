"""Hidden states from vLLM servers that run its `extract_hidden_states`: a target too large for this machine's GPUs is
served once, and answers as well as gives features.

A request of token ids makes the server write a safetensors file, `hidden_states` [L, n, H] and `token_ids` [L], into
its `shared_storage_path`, which this machine sees as `features.server_folder`. The state after the last layer is the
last of the n and comes before the final norm, which is applied here; the others are those that the draft fuses. What a
server runs cannot be seen from here, so every row is held against the token that the server drew next, and of
every batch one row of each server against the target's own pass: near it, and nearer than to the layers beside.
"""

import asyncio
import fcntl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hass_core.config import FeaturesConfig
from hass_core.data.engines.openai import MAX_ATTEMPTS, WORTH_REPEATING, backoff_seconds, find_models, said_by
from hass_core.data.engines.servers import TIMEOUT_SECONDS, Server, Servers
from hass_core.errors import NonFinite, TargetError
from hass_core.target_model.capture import TokenIds, capture_features
from hass_core.target_model.loader import Target

NEAR_TIE = 1.0  # logits: a server's token may fall short of the best one by so much, its sums are rounded otherwise
FARTHEST = 0.25  # of a row's norm: how far two computations of a hidden state in bfloat16 may lie apart


@dataclass(frozen=True)
class ServedRow:
    """What came for one row, and from whom."""

    features: Tensor  # [L, (1 + n)·H]
    server: str


class ServedStates:
    """Called with rows of token ids and their names, it asks for them and gives a function that waits for the features,
    [L, (1 + n)·H] each with n taps, as they are stored, bfloat16. A context manager.

    That function raises TargetError where a server fails, refuses a row or runs another model, NonFinite naming a row.
    """

    def __init__(self, settings: FeaturesConfig, target: Target, taps: tuple[int, ...] = ()):
        self._settings, self._target, self._taps = settings, target, taps
        self._folder = Path(cast(str, settings.server_folder)).expanduser()
        self._norm = _final_norm(target)
        self._own_pass = threading.Lock()

    def __enter__(self) -> "ServedStates":
        if not self._folder.is_dir():
            raise TargetError(f"features.server_folder: {self._folder} is no folder of this machine")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hidden-states", daemon=True)
        self._thread.start()
        try:
            self._run(self._connect())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __call__(self, token_ids: Sequence[TokenIds], names: Sequence[str]) -> Callable[[], list[Tensor]]:
        rows = list(zip(token_ids, names, strict=True))
        asked = [self._submit(self._row([int(token) for token in ids], name)) for ids, name in rows]

        def wait() -> list[Tensor]:
            found = [row.result() for row in asked]
            by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
            for shortest in {found[i].server: i for i in by_length}.values():
                self._check(found[shortest].features, *rows[shortest])
            return [row.features for row in found]

        return wait

    def _check(self, served: Tensor, token_ids: TokenIds, name: str) -> None:
        """Raise TargetError unless a row's features are those of the target's own pass."""
        near = [k for tap in self._taps for k in (tap - 1, tap, tap + 1) if 0 < k < self._target.num_layers]
        layers = sorted(set(near))
        with self._own_pass:  # writers wait for several batches at once
            (own,) = capture_features(self._target, [token_ids], [name], layers)
        last, *inside = own.float().unflatten(1, (1 + len(layers), -1)).unbind(1)
        by_layer = dict(zip(layers, inside, strict=True))
        theirs = served.float().unflatten(1, (1 + len(self._taps), -1))
        ours = torch.stack([last, *(by_layer[tap] for tap in self._taps)], 1)
        apart = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)
        for number, tap in enumerate(self._taps, 1):  # of a deep target two layers' states may lie within the rounding
            nearest = min(by_layer, key=lambda k: float((theirs[:, number] - by_layer[k]).norm()))
            if nearest != tap:
                raise TargetError(
                    f"conversation {name}: what {self._servers} gave as the states after layer {tap} is nearer to "
                    f"those after layer {nearest} of {self._target.name}; serve those after layers {self._layers}"
                )
        if float(apart.max()) > FARTHEST:
            raise TargetError(
                f"conversation {name}: the features of {self._servers} are not those of {self._target.name}: they lie "
                f"up to {float(apart.max()):.0%} apart, {FARTHEST:.0%} is taken for rounding; serve the same weights, "
                f"and the states after layers {self._layers} alone"
            )

    @property
    def _layers(self) -> list[int]:
        """After which the servers shall write states."""
        return [*self._taps, self._target.num_layers]

    async def _connect(self) -> None:
        urls, model = list(self._settings.server_urls), self._settings.server_model
        self._servers = Servers(urls, self._settings.server_concurrency, asked_by="features")
        self._room = asyncio.Semaphore(self._servers.room)
        await find_models(self._servers, model)

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {cast(Any, asyncio.current_task())}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._servers.close()

    def _submit(self, work: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Any) -> Any:
        return self._submit(work).result()

    async def _row(self, token_ids: list[int], name: str) -> "ServedRow":
        async with self._room:
            reply = await self._asked(token_ids, name)
            return ServedRow(await asyncio.to_thread(self._features, reply, token_ids, name), reply["server"])

    async def _asked(self, token_ids: list[int], name: str) -> dict[str, Any]:
        """A server's reply, after as many attempts as it takes."""
        import httpx

        problem, server = "", None
        for attempt in range(MAX_ATTEMPTS):
            server = self._servers.least_loaded(but=server)
            pause = None
            try:
                reply = await self._posted(server, token_ids)
            except (httpx.RequestError, TimeoutError) as error:
                problem = f"it cannot be reached: {error!r}"
            else:
                if reply.status_code == 200:
                    server.failures = 0
                    return _parsed(reply, server)
                problem = f"it answered {reply.status_code}, {said_by(reply)}{server.hint}"
                if reply.status_code not in WORTH_REPEATING:
                    break
                pause = reply.headers.get("retry-after")
            self._servers.failed(server, problem)
            if attempt + 1 < MAX_ATTEMPTS:
                await asyncio.sleep(backoff_seconds(attempt, pause))
        raise TargetError(
            f"conversation {name}, {len(token_ids)} tokens: no hidden states of the server {server and server.url}: "
            f"{problem}; mend it and run the same command again, finished parts are kept"
        )

    async def _posted(self, server: Server, token_ids: list[int]) -> Any:
        body = {"model": server.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
        server.in_flight += 1
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await server.client.post("/completions", json=body)
        finally:
            server.in_flight -= 1

    @torch.no_grad()
    def _features(self, reply: dict[str, Any], token_ids: list[int], name: str) -> Tensor:
        """A row's features from the file that a reply names, which is removed. Runs in a thread."""
        states = self._read(reply["file"], token_ids, name)
        states = states.to(self._target.device, self._target.dtype)
        features = self._norm(states[:, -1])
        whole = torch.cat([features, states[:, :-1].flatten(1)], 1)
        if not bool(whole.isfinite().all()):
            raise NonFinite(f"conversation {name}: the hidden states of {self._servers} are NaN or infinite")
        logits = features[-1] @ self._target.head.mT
        short = float(logits.max() - logits[reply["token"]])
        if short > NEAR_TIE:
            raise TargetError(
                f"conversation {name}: {self._servers} drew token {reply['token']} next, which the target's head "
                f"gives {short:.1f} less than its best for the state that came back; the servers must run "
                f"{self._target.name} and write the state after its last layer, layer {self._target.num_layers}"
            )
        return whole.to("cpu", torch.bfloat16)

    def _read(self, file: str, token_ids: list[int], name: str) -> Tensor:
        """The states [L, n, H] in a file; only the name counts of what a server says, it lies in the folder of ours."""
        path = self._folder / PurePosixPath(file).name
        lock = path.with_name(path.name + ".lock")
        try:
            if lock.exists():
                with lock.open("rb") as waiting:
                    fcntl.flock(waiting, fcntl.LOCK_SH)  # until it is written
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TargetError(
                f"the server wrote the states of conversation {name} to {file}, but {path} cannot be read: {error}; "
                "features.server_folder must be the folder that the servers know as shared_storage_path"
            ) from None
        path.unlink()
        lock.unlink(missing_ok=True)
        states = found.get("hidden_states")
        wanted = [len(token_ids), len(self._layers), self._target.embedding.shape[1]]
        if states is None or list(states.shape) != wanted:
            shape = "nothing" if states is None else list(states.shape)
            raise TargetError(
                f"conversation {name}: the server wrote {shape} for {wanted}; start it with "
                f'"eagle_aux_hidden_state_layer_ids": {self._layers}'
            )
        if found.get("token_ids", torch.empty(0)).tolist() != token_ids:
            raise TargetError(f"conversation {name}: the server wrote the states of other tokens than it was asked for")
        return states


def _parsed(reply: Any, server: Server) -> dict[str, Any]:
    """The file and the token that a reply names."""
    try:
        found = reply.json()
        file, (token,) = found["kv_transfer_params"]["hidden_states_path"], found["choices"][0]["token_ids"]
        return {"file": str(file), "token": int(token), "server": server.url}
    except (ValueError, LookupError, TypeError):
        raise TargetError(
            f"the server {server.url} gives no hidden states, it said {said_by(reply)}; start vLLM with the "
            "speculative method extract_hidden_states and a connector for hidden states (docs/own-model.md)"
        ) from None


def _final_norm(target: Target) -> nn.Module:
    """The module that makes features of the states after the last layer."""
    norm = getattr(cast(Any, target.model).base_model, "norm", None)
    if not isinstance(norm, nn.Module):
        raise TargetError(f'{target.name} has no final norm to be found; features.engine = "transformers" works')
    return norm
