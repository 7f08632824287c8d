"""The device side of decoding: one memory for B rows, and the cycle over it as a function of fixed shapes.

A cycle drafts a tree from what the last cycle made certain, has the target read it in one pass, follows the draws,
and moves the accepted keys and values into place. Nothing in it looks at the host, so on a GPU the whole cycle is
captured as one CUDA graph per attended width; the host reads one small report a cycle, while the next cycle already
runs. On a CPU the same function runs as it is, over the live slots only.

Shapes: B rows, N tree nodes, R places of a path, H hidden.
"""

import logging
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from hass_core import kernels
from hass_core.config import SamplingConfig
from hass_core.cuda_graphs import captured
from hass_core.decoding.batch import Batch
from hass_core.decoding.draws import Draws
from hass_core.decoding.prefill import last_of, pieces, prefill
from hass_core.decoding.report import RowReport, packed, unpacked
from hass_core.decoding.tree import Tree, TreeShape
from hass_core.decoding.verify import Accepted, accept
from hass_core.target_model.compiling import compiled
from hass_core.target_model.runner import Runner

WIDTH_STEP = 256  # captured graphs attend to a multiple of this many slots

log = logging.getLogger(__name__)


class TreeDrafter(Protocol):
    """Whatever proposes a tree: `Drafter` with a draft model, or a rival without one."""

    shape: TreeShape
    capturable: bool  # `extend` and `grow` can go into a CUDA graph
    scratch_slots: int  # cache slots needed behind the live rows

    def new_cache(self, batch_size: int, max_tokens: int) -> Any:
        """What the drafter remembers of the rows; handed back to it in every call."""
        ...

    def clear(self, cache: Any) -> None:
        """Forget the rows."""
        ...

    def extend(self, cache: Any, features: Tensor, token_ids: Tensor, counts: Tensor) -> Tensor:
        """Take in true features [B, R, H] with their next tokens [B, R], the first `counts` [B] of each row.

        Returns whatever `grow` starts from, behind each row's last live feature.
        """
        ...

    def grow(self, cache: Any, root: Tensor, estimate: Tensor) -> Tree:
        """The tree over root tokens [B], from what `extend` returned."""
        ...


class Session:
    """Memory and graphs for `rows` rows of up to `slots` tokens under one sampling setting; one user at a time."""

    def __init__(self, runner: Runner, drafter: TreeDrafter, sampling: SamplingConfig, rows: int, slots: int):
        self._runner, self._drafter, self.shape = runner, drafter, drafter.shape
        self.rows, self.sampling = rows, sampling
        behind = max(self.shape.nodes, drafter.scratch_slots, self.shape.places) + self.shape.places  # a cycle too many
        self.slots = _rounded(slots + behind)
        self._behind = behind
        device, places = runner.device, self.shape.places
        self._cache = runner.new_cache(rows, self.slots)
        self._draft_cache = drafter.new_cache(rows, self.slots)
        self._draws = Draws(sampling, rows, self.slots, runner.vocab_size, device)
        # what the last cycle made certain: features and the token behind each; the last live one is the root
        self._features = torch.zeros(rows, places, runner.hidden_size, device=device, dtype=runner.dtype)
        self._token_ids = torch.zeros(rows, places, dtype=torch.long, device=device)
        self._counts = torch.zeros(rows, dtype=torch.long, device=device)
        self._open = torch.ones(rows, dtype=torch.long, device=device)
        self._graphs = Graphs() if device.type == "cuda" and runner.capturable and drafter.capturable else None
        if device.type == "cuda" and self._graphs is None:
            log.info("decoding without CUDA graphs: %s or %s cannot be captured", runner, drafter)
        self._settle = compiled(settle) if device.type == "cuda" else settle
        self._ahead = kernels.usable(self._counts)  # the kernels read live slots only, so no width waits for the host
        self._under_way: Launched | None = None
        self.draft_seconds = 0.0

    def holds(self, rows: int, slots: int, sampling: SamplingConfig) -> bool:
        """Whether this session can serve such a call; the seed is not part of it."""
        same = self.sampling.model_copy(update={"seed": 0}) == sampling.model_copy(update={"seed": 0})
        return same and self.rows == rows and self.slots >= slots + self._behind

    @torch.inference_mode()
    def start(self, batch: Batch) -> list[RowReport]:
        """Read the prompts and draw each row's first token."""
        cache, device = self._cache, self._runner.device
        cache.clear()
        cache.width, cache.steady = None, False
        self._drafter.clear(self._draft_cache)
        self._open.fill_(1)
        self._under_way = None
        token_ids = batch.token_ids(device)
        features = prefill(self._runner, token_ids, batch.lengths, cache)
        self._draws.start(token_ids, cache.lengths, batch.seed)
        for start, stop, live in pieces([length - 1 for length in batch.lengths]):
            counts = torch.tensor(live, device=device)
            self._drafter.extend(self._draft_cache, features[:, start:stop], token_ids[:, start + 1 : stop + 1], counts)
        last = last_of(features, cache.lengths)
        root, sound = self._draws.draw(self._runner.logits(last[:, None]), cache.lengths[:, None])
        self._features[:, 0], self._token_ids[:, 0] = last, root[:, 0]
        self._counts.fill_(1)
        self._draws.note(root, self._counts)
        return [RowReport([token], ok, (), ()) for (token,), (ok,) in zip(root.tolist(), sound.tolist(), strict=True)]

    @torch.inference_mode()
    def step(self, open_rows: list[bool]) -> list[RowReport]:
        """One cycle. Rows that are not open stay as they are; their reports mean nothing.

        On a GPU the next cycle is under way before this one's report is read, so a row stops one cycle late.
        """
        if self._graphs is None:
            self._open.copy_(torch.tensor(open_rows))
            return unpacked(self._cycle(int(self._counts.max())).tolist())
        launched = self._under_way or self._launch(self._graphs, open_rows)
        self._under_way = self._launch(self._graphs, open_rows) if self._ahead else None
        rows = launched.rows()
        taken = [len(row.token_ids) * is_open for row, is_open in zip(rows, launched.open_rows, strict=True)]
        self._cache.told(self._cache.host_lengths + taken)
        return rows

    def _launch(self, graphs: "Graphs", open_rows: list[bool]) -> "Launched":
        """Start a cycle."""
        if not all(open_rows):
            self._open.copy_(torch.tensor(open_rows))
        width = self._cache.slots if self._ahead else _rounded(self._cache.longest + self._behind)
        for memory in (self._cache, self._draft_cache):
            memory.width, memory.steady = width, True
        report = graphs.run(width, lambda: self._cycle(self.shape.places))
        self.draft_seconds = 0.0  # within a graph nobody can tell
        return Launched(report, open_rows)

    def _cycle(self, places: int) -> Tensor:
        """The packed report [B, 2 + 3R] of one cycle whose new features fill at most `places` places."""
        runner, cache, counts = self._runner, self._cache, self._counts
        started = time.perf_counter()
        root = self._token_ids.gather(1, (counts.clamp(min=1) - 1)[:, None])[:, 0]
        estimate = self._drafter.extend(
            self._draft_cache, self._features[:, :places], self._token_ids[:, :places], counts
        )
        tree = self._drafter.grow(self._draft_cache, root, estimate)
        self.draft_seconds = time.perf_counter() - started
        positions = cache.lengths[:, None] + tree.depths
        visible = tree.visible if self.shape.nodes > 1 else None
        features = runner.forward(tree.token_ids, positions.clamp(max=runner.context_tokens - 1), cache, visible)
        drawn, sound = self._draws.draw(runner.logits(features), positions + 1, tree)
        settled = self._settle if self._graphs else settle
        accepted, kept, report = settled(tree, drawn, sound, features, self.shape.places)
        self._draws.note(accepted.token_ids, accepted.counts)
        if self.shape.nodes > 1:
            cache.move(accepted.path)
        counts.copy_(accepted.counts * self._open)
        cache.lengthen(counts)
        self._features.copy_(kept)
        self._token_ids.copy_(accepted.token_ids)
        return report


def settle(tree: Tree, drawn: Tensor, sound: Tensor, features: Tensor, places: int) -> tuple[Accepted, Tensor, Tensor]:
    """What stands of a tree after the draws [B, N], the features [B, R, H] along it, and the packed report."""
    accepted = accept(tree, drawn, places)
    kept = features.gather(1, accepted.path[:, :, None].expand(-1, -1, features.shape[2]))
    return accepted, kept, packed(tree, accepted, sound)


class Launched:
    """A cycle that was started, and its report [B, 2 + 3R] on the way to the host."""

    def __init__(self, report: Tensor, open_rows: list[bool]):
        self.open_rows, self._copied = open_rows, None
        if not report.is_cuda:
            self._report = report
            return
        self._report = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        self._report.copy_(report, non_blocking=True)  # queued before the next cycle writes another report
        self._copied = torch.cuda.Event()
        self._copied.record()

    def rows(self) -> list[RowReport]:
        """Wait for the report."""
        if self._copied is not None:
            self._copied.synchronize()
        return unpacked(self._report.tolist())


class Graphs:
    """Captured cycles by attended width. The first cycle of a width runs as it is, which also compiles its kernels."""

    def __init__(self) -> None:
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._warm: set[int] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, width: int, cycle: Any) -> Tensor:
        """The report of one cycle."""
        if width not in self._warm:
            self._warm.add(width)
            return cycle()
        if width not in self._captured:
            torch.cuda.synchronize()
            with captured(self._pool) as graph:
                report = cycle()
            self._captured[width] = (graph, report)
        graph, report = self._captured[width]
        graph.replay()
        return report


def _rounded(slots: int) -> int:
    return -(-slots // WIDTH_STEP) * WIDTH_STEP
