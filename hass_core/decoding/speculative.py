"""Speculative decoding with a tree of drafts: draft, verify, commit, and again.

One cycle: the drafter turns the features of the tokens just accepted into a tree over the root (the token drawn last);
one forward pass of the target reads the whole tree; `accept` walks it; the accepted path's keys and values move to
where plain decoding would have put them. The next cycle's draft input is the accepted path's own features.

Shapes: B batch, N tree nodes, R = depth + 1 places of a path, H hidden.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.batch import Batch
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.generation import CycleTrace, Generation, Step, Timing
from hass_core.decoding.plain import timed
from hass_core.decoding.prefill import last_of, prefill
from hass_core.decoding.stop import StopRule
from hass_core.decoding.tree import Tree, TreeShape, attention_mask
from hass_core.decoding.verify import Accepted, accept
from hass_core.errors import DraftMismatch
from hass_core.model.checkpoint import Draft
from hass_core.target.kv_cache import KVCache
from hass_core.target.runner import Runner


@dataclass(frozen=True)
class Committed:
    """What the target has just made certain: draft rows not yet in the drafter's cache."""

    features: Tensor  # [B, R, H]
    token_ids: Tensor  # [B, R] the token behind each feature; the last live one is the root
    counts: list[int]  # live ones of each row

    def root(self) -> Tensor:
        """[B]"""
        last = torch.tensor(self.counts, device=self.token_ids.device).clamp(min=1) - 1
        return self.token_ids.gather(1, last[:, None])[:, 0]


class TreeDrafter(Protocol):
    """Whatever proposes a tree: `Drafter` with a draft model, or a rival without one."""

    shape: TreeShape

    def new_cache(self, batch_size: int, max_tokens: int) -> Any:
        """What the drafter remembers of the rows; handed back to it in every call."""
        ...

    def extend(self, cache: Any, features: Tensor, token_ids: Tensor, counts: list[int]) -> Tensor:
        """Take in what the target has made certain; see `Drafter.extend`."""
        ...

    def grow(self, cache: Any, root: Tensor, estimate: Tensor) -> Tree:
        """The tree over root tokens [B], from what `extend` returned."""
        ...


class TreeDecoder:
    """Verification of any drafter's trees; see `hass_core.decoding.generation.Decoder`."""

    def __init__(self, runner: Runner, drafter: TreeDrafter, name: str):
        self.name = name
        self._runner = runner
        self.shape = drafter.shape
        self._drafter = drafter

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        batch = self._batch([prompt_token_ids], sampling, max_new_tokens, stop, None)
        for taken, timing in self._run(batch):
            answer = batch.answers[0]
            trace = batch.traces[0][-1] if batch.traces[0] else CycleTrace(0, 0)
            yield Step(answer.token_ids[-taken[0] :], trace, timing, answer.finished)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        batch = self._batch(prompts, sampling, max_new_tokens, stop, seed)
        timings = [timing for _, timing in self._run(batch)]
        return timed(batch.generations(), timings)

    def _batch(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None,
    ) -> Batch:
        return Batch(self._runner, prompts, sampling, max_new_tokens, stop, seed, self.shape.depth)

    def _run(self, batch: Batch) -> Iterator[tuple[list[int], Timing]]:
        """Yields after the prefill and after each cycle how many tokens each row took."""
        rows, slots = len(batch.lengths), batch.max_tokens + self.shape.nodes
        started = time.perf_counter()
        with torch.inference_mode():
            cache = self._runner.new_cache(rows, slots)
            draft_cache = self._drafter.new_cache(rows, slots)
            committed, taken = self._prefill(batch, cache)
        now = time.perf_counter()
        yield taken, Timing(verify_seconds=now - started, total_seconds=now - started)
        while batch.active:
            started = time.perf_counter()
            with torch.inference_mode():
                root = committed.root()
                estimate = self._drafter.extend(draft_cache, committed.features, committed.token_ids, committed.counts)
                tree = self._drafter.grow(draft_cache, root, estimate)
                drafted = time.perf_counter()
                committed, taken = self._verify(batch, cache, tree)
            now = time.perf_counter()
            yield taken, Timing(drafted - started, now - drafted, now - started)

    def _prefill(self, batch: Batch, cache: KVCache) -> tuple[Committed, list[int]]:
        """Read the prompts and draw each row's first token."""
        features = prefill(self._runner, batch.token_ids, batch.lengths, cache)
        last = last_of(features, cache.lengths)[:, None]
        root, sound = batch.draw(self._runner.logits(last), cache.lengths[:, None])
        batch.note(root, torch.ones_like(cache.lengths))
        taken = batch.take(root.tolist(), sound[:, 0].tolist())
        following = batch.token_ids.roll(-1, 1).scatter(1, cache.lengths[:, None] - 1, root)
        return Committed(features, following, list(batch.lengths)), taken

    def _verify(self, batch: Batch, cache: KVCache, tree: Tree) -> tuple[Committed, list[int]]:
        """One pass of the target over the tree [B, N]; commits the accepted path."""
        runner = self._runner
        mask = attention_mask(tree.visible, cache.lengths, cache.longest + self.shape.nodes)
        positions = cache.lengths[:, None] + tree.depths
        features = runner.forward(tree.token_ids, positions.clamp(max=runner.context_tokens - 1), cache, mask)
        drawn, sound = batch.draw(runner.logits(features), positions + 1, tree)
        accepted = accept(tree, drawn, self.shape.depth)
        counts = accepted.counts.tolist()
        traces = [_trace(self.shape.depth, *row) for row in zip(*_for_trace(tree, accepted), strict=True)]
        emitted = [ids[:count] for ids, count in zip(accepted.token_ids.tolist(), counts, strict=True)]
        open_rows = [answer.finished is None for answer in batch.answers]
        batch.note(accepted.token_ids, accepted.counts)
        taken = batch.take(emitted, accepted.all_on_path(sound).tolist(), traces)
        counts = [count if is_open else 0 for count, is_open in zip(counts, open_rows, strict=True)]
        kept = features.gather(1, accepted.path[:, :, None].expand(-1, -1, features.shape[2]))
        cache.keep(accepted.path, counts)
        return Committed(kept, accepted.token_ids, counts), taken


class SpeculativeDecoder(TreeDecoder):
    """HASS, EAGLE-2 and EAGLE: a draft model's trees. Raises DraftMismatch when draft and target differ in size."""

    def __init__(self, runner: Runner, draft: Draft, tree: TreeConfig, name: str = "hass"):
        _check_sizes(runner, draft)
        super().__init__(runner, Drafter(draft, TreeShape.of(tree, draft.head.size)), name)


def _for_trace(tree: Tree, accepted: Accepted) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Counts, ranks and numbers of children along the path, on the host."""
    nodes = torch.arange(1, tree.parents.shape[1], device=tree.parents.device)
    children = torch.zeros_like(tree.parents)
    children.scatter_add_(1, tree.parents[:, 1:], torch.ones_like(nodes).expand(len(children), -1))
    return (
        accepted.counts.tolist(),
        tree.ranks.gather(1, accepted.path).tolist(),
        children.gather(1, accepted.path).tolist(),
    )


def _trace(depth: int, count: int, ranks: list[int], children: list[int]) -> CycleTrace:
    return CycleTrace(count - 1, depth, tuple(ranks[1:count]), tuple(children[:count]))


def _check_sizes(runner: Runner, draft: Draft) -> None:
    architecture = draft.model.architecture
    for name, ours in (("hidden_size", architecture.hidden_size), ("vocab_size", architecture.vocab_size)):
        theirs = getattr(runner, name)
        if ours != theirs:
            raise DraftMismatch(
                f"the draft has {name} {ours}, the target has {theirs}; use the target it was trained for"
            )
