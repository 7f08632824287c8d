"""The device side of local generation: a fixed number of rows, each holding one answer in the making and drawn with
sampling settings of its own.

A step reads nothing back and changes no shape, so on a GPU it is captured once per attended width and replayed.
Shapes: B rows, S slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hass_core import kernels
from hass_core.cuda_graphs import GraphCache
from hass_core.data.engines.base import Request
from hass_core.errors import HassError
from hass_core.sampling import COLDEST, NEVER, as_signed, greedy, nucleus_edge, stream, winner
from hass_core.target_model.compiling import compiled
from hass_core.target_model.kv_cache import FixedShapes
from hass_core.target_model.runner import Runner

MIN_ROWS = 2  # a row alone takes products of another kind, whose last digits differ


class Shaped(NamedTuple):
    """What rows with settings of their own are drawn from."""

    logits: Tensor  # [B, V] float32, divided by the temperature
    lowest: Tensor | None  # [B, 1] only logits from there on count
    cold: Tensor  # [B] rows that take the likeliest


def shape_rows(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, max_top_k: int, use_top_p: bool
) -> Shaped:
    """The processors on logits [B, V], each row with settings [B] of its own.

    top_k 0 and top_p 1 switch a row's filter off. `max_top_k` (0 = none) and `use_top_p` say on the host what the
    rows use at most, so that the common unfiltered case costs nothing.
    """
    cold = temperature < COLDEST
    shaped = logits.float() * torch.where(cold, 1.0, 1 / temperature)[:, None]
    lowest = None
    if max_top_k:
        kth = shaped.topk(max_top_k, dim=-1).values.gather(1, (top_k - 1).clamp(min=0)[:, None])
        lowest = torch.where((top_k > 0)[:, None], kth, NEVER)
    if use_top_p:
        kept = shaped if lowest is None else shaped.masked_fill(shaped < lowest, NEVER)
        share = torch.where(top_p < 1, top_p, 0.0)[:, None]
        nucleus = torch.where(share > 0, nucleus_edge(kept, share), NEVER)
        lowest = nucleus if lowest is None else torch.maximum(lowest, nucleus)
    return Shaped(shaped, lowest, cold)


def draw_rows(shaped: Shaped, streams: Tensor, positions: Tensor) -> Tensor:
    """Token ids [B] drawn at `positions` [B], with the noise of a stream [B, 2] for each row."""
    logits, lowest, cold = shaped
    if kernels.usable(logits):
        from hass_core.kernels.top_k import RowNoise, row_top_k  # Triton is there on a GPU only

        drawn = row_top_k(logits, 1, None, RowNoise(streams, positions, 0, 1.0, 1.0, lowest))[1][:, 0]
        return torch.where(cold, greedy(logits)[0], drawn)
    if lowest is not None:
        logits = logits.masked_fill(logits < lowest, NEVER)
    words = [(low, high) for low, high in streams.cpu().numpy().view(np.uint32).tolist()]
    rows = zip(logits.cpu().numpy(), words, positions.tolist(), cold.tolist(), strict=True)
    drawn = [int(row.argmax()) if is_cold else winner(row, word, place) for row, word, place, is_cold in rows]
    return torch.tensor(drawn, device=logits.device)


@dataclass
class RunningAnswer:
    """An answer in the making."""

    request: Request
    token_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    @property
    def final_length(self) -> int:
        """Tokens of the prompt and the longest possible answer."""
        return len(self.request.prompt_token_ids) + self.request.max_new_tokens


class RunningBatch:
    """KV cache, last tokens and sampling settings of B rows. A row without an answer computes scrap.

    A batch of a size that will be `lasting` compiles its steps.
    """

    def __init__(self, runner: Runner, rows: int, slots: int, lasting: bool = False):
        self.runner, self.rows, self.slots = runner, max(rows, MIN_ROWS), slots
        device = runner.device
        self.cache = runner.new_cache(self.rows, slots)
        self.lengths = self.cache.lengths
        self._lasting = lasting
        self._shape = compiled(shape_rows) if lasting and device.type == "cuda" else shape_rows
        self.tokens = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.streams = torch.zeros(self.rows, 2, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(self.rows, device=device)
        self.top_p = torch.ones(self.rows, device=device)
        self.top_k = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.answers: dict[int, RunningAnswer] = {}  # by row
        self._row_numbers = torch.arange(self.rows, device=device)
        self._graphs = GraphCache.on(device, runner.capturable)

    @property
    def free(self) -> list[int]:
        """Numbers of the rows without an answer."""
        return [row for row in range(self.rows) if row not in self.answers]

    def resized(self, rows: int, slots: int, lasting: bool = False) -> "RunningBatch":
        """The running answers, in order, in a batch of another size; `lasting` when that size stays."""
        kept = sorted(self.answers)
        try:
            other = RunningBatch(self.runner, rows, slots, lasting)
        except torch.OutOfMemoryError as error:
            raise HassError(
                f"the keys and values of {rows} conversations of {slots} tokens do not fit beside those of {self.rows} "
                f"of {self.slots}; lower responses.max_sequences_per_batch: {error}"
            ) from error
        source = torch.tensor(kept, dtype=torch.long, device=self.lengths.device)
        width = min(slots, self.slots)
        for old, new in zip(self.cache.layers, other.cache.layers, strict=True):  # layer by layer: the copy is large
            for i in range(2):
                new[i][: len(kept), :, :width] = old[i][source, :, :width]
        for name in ("lengths", "tokens", "streams", "temperature", "top_p", "top_k"):
            getattr(other, name)[: len(kept)] = getattr(self, name)[source]
        other.answers = {row: self.answers[old] for row, old in enumerate(kept)}
        return other

    @property
    def filters(self) -> tuple[int, bool]:
        """The largest top-k among the running answers, and whether any of them uses top-p."""
        running = [answer.request.sampling for answer in self.answers.values()]
        return max((s.top_k for s in running), default=0), any(s.top_p < 1 for s in running)

    @torch.inference_mode()
    def start(self, requests: Sequence[Request]) -> None:
        """Read the prompts into free rows and draw the first token of each answer."""
        rows = self.free[: len(requests)]
        self.answers |= {row: RunningAnswer(request) for row, request in zip(rows, requests, strict=True)}
        index = torch.tensor(rows, device=self.lengths.device)
        for name, values in _settings(requests).items():
            getattr(self, name)[index] = values.to(index.device)
        prompts = [torch.tensor(request.prompt_token_ids) for request in requests]
        last = self._read(pad_sequence(prompts, batch_first=True).to(index.device), index)
        self.tokens[index] = self._draw(last, index, self.lengths[index], *self.filters)
        for row, token in zip(rows, self.tokens[index].tolist(), strict=True):
            self.answers[row].token_ids.append(token)

    def _read(self, token_ids: Tensor, index: Tensor) -> Tensor:
        """Put the keys and values of right-padded prompts into rows `index`; features of each one's last token."""
        count, width = token_ids.shape
        scratch = self.runner.new_cache(count, width)
        positions = torch.arange(width, device=index.device).expand(count, -1)
        features = self.runner.forward(token_ids, positions, scratch)
        for block, new in zip(self.cache.blocks, scratch.blocks, strict=True):
            block[:, :, index, :, :width] = new
        return features[torch.arange(count, device=index.device), self.lengths[index] - 1]

    @torch.inference_mode()
    def steps(self, count: int, width: int) -> Tensor:
        """`count` more tokens of every row [B, count], attending to the first `width` slots; nothing is read back."""
        drawn = torch.empty(self.rows, count, dtype=torch.long, device=self.tokens.device)
        key = (width, *self.filters)
        for i in range(count):
            if self._graphs is None:
                self._step(*key)
            else:
                self._graphs.run(key, lambda: self._step(*key))
            drawn[:, i] = self.tokens
        return drawn

    def _step(self, width: int, max_top_k: int, use_top_p: bool) -> None:
        fixed = FixedShapes(width, self._lasting)
        features = self.runner.forward(self.tokens[:, None], self.lengths[:, None], self.cache, fixed=fixed)
        drawn = self._draw(features[:, 0], self._row_numbers, self.lengths + 1, max_top_k, use_top_p, self._shape)
        self.tokens.copy_(drawn)
        # a row that has ended goes on until the host looks; it must not run over the end of its slots
        self.lengths.add_(1).clamp_(max=width - 1)

    def _draw(
        self,
        features: Tensor,
        index: Tensor,
        positions: Tensor,
        max_top_k: int,
        use_top_p: bool,
        shape: Callable[..., Shaped] = shape_rows,
    ) -> Tensor:
        """The tokens [B] drawn at `positions` [B] from features [B, H] of rows `index`."""
        settings = (self.temperature[index], self.top_p[index], self.top_k[index])
        shaped = shape(self.runner.logits(features), *settings, max_top_k, use_top_p)
        return draw_rows(shaped, self.streams[index], positions)


def _settings(requests: Sequence[Request]) -> dict[str, Tensor]:
    """Row settings by the name of the tensor that holds them."""
    return {
        "lengths": torch.tensor([len(r.prompt_token_ids) for r in requests]),
        "streams": as_signed([stream(r.seed, 0) for r in requests]),
        "temperature": torch.tensor([r.sampling.temperature for r in requests], dtype=torch.float32),
        "top_p": torch.tensor([r.sampling.top_p for r in requests], dtype=torch.float32),
        "top_k": torch.tensor([r.sampling.top_k for r in requests]),
    }
