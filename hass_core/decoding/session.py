"""The device side of decoding: one memory for B rows, and the cycle over it as a function of fixed shapes.

A cycle drafts a tree from what the last cycle made certain, has the target read it in one pass, follows the draws,
and moves the accepted keys and values into their slots. Nothing in it looks at the host, so on a GPU the whole cycle
is captured as one CUDA graph per attended width; the host reads one small report a cycle, while the next cycle already
runs. On a CPU the same function runs as it is, over the live slots only.

Shapes: B rows, N tree nodes, R nodes of a tree's longest path, L prompt tokens, H hidden.
"""

import logging
import time

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hass_core import kernels
from hass_core.config import SamplingConfig
from hass_core.cuda_graphs import GraphCache
from hass_core.decoding.drafter import TreeDrafter, last_of
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.tree import Accepted, RowReport, Tree, accept, pack_report, unpack_report
from hass_core.target_model.compiling import compiled
from hass_core.target_model.kv_cache import FixedShapes, KVCache
from hass_core.target_model.runner import Runner
from hass_core.target_model.taps import Taps

WIDTH_STEP = 256  # captured graphs attend to a multiple of this many slots
TOKENS_PER_PIECE = 512  # of a prompt that is read at once: keeps its attention mask small

log = logging.getLogger(__name__)


class Session:
    """Memory and graphs for `rows` rows of up to `slots` tokens under one sampling setting; one user at a time."""

    def __init__(
        self,
        runner: Runner,
        drafter: TreeDrafter,
        sampling: SamplingConfig,
        rows: int,
        slots: int,
        sampler: type[Sampler] = Sampler,
    ):
        self._runner, self._drafter, self.shape = runner, drafter, drafter.shape
        self.rows, self.sampling = rows, sampling
        device, longest = runner.device, self.shape.longest_path
        self._spare = max(self.shape.nodes, drafter.scratch_slots, longest) + longest  # a tree, and a cycle too many
        self.slots = _rounded(slots + self._spare)
        self._cache = runner.new_cache(rows, self.slots)
        self._draft_cache = drafter.new_cache(rows, self.slots)
        self._sampler = sampler(sampling, rows, runner.vocab_size, device)
        # what the last cycle made certain: features and the token after each; the last live one is the root
        self._features = torch.zeros(rows, longest, runner.hidden_size, device=device, dtype=runner.dtype)
        self._token_ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
        self._counts = torch.zeros(rows, dtype=torch.long, device=device)
        self._open = torch.ones(rows, dtype=torch.long, device=device)
        capturable = runner.capturable and drafter.capturable and self._sampler.capturable
        self._graphs = GraphCache.on(device, capturable)
        if device.type == "cuda" and self._graphs is None:
            log.info("decoding without CUDA graphs: %s or %s cannot be captured", runner, drafter)
        self._settle = compiled(settle) if device.type == "cuda" else settle
        self._ahead = kernels.usable(self._counts)  # the kernels read live slots only, so no width waits for the host
        self._under_way: Launched | None = None
        self.draft_seconds = 0.0

    def holds(self, rows: int, slots: int, sampling: SamplingConfig) -> bool:
        """Whether this session can serve such a call; the seed is not part of it."""
        same = self.sampling.model_copy(update={"seed": 0}) == sampling.model_copy(update={"seed": 0})
        return same and self.rows == rows and self.slots >= slots + self._spare

    @torch.inference_mode()
    def start(self, prompts: list[list[int]], seed: int) -> list[RowReport]:
        """Read the prompts and draw each row's first token."""
        cache, device = self._cache, self._runner.device
        cache.clear()
        self._open.fill_(1)
        self._under_way = None
        lengths = [len(prompt) for prompt in prompts]
        token_ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
        features, drafted_from = prefill(self._runner, token_ids, lengths, cache, self._drafter)
        self._sampler.start(token_ids, cache.lengths, seed)
        self._read_prompts(token_ids, drafted_from, lengths)
        last = last_of(features, cache.lengths)
        root, sound = self._sampler.draw(self._runner.logits(last[:, None]), cache.lengths[:, None])
        self._features[:, 0], self._token_ids[:, 0] = last_of(drafted_from, cache.lengths), root[:, 0]
        self._counts.fill_(1)
        self._sampler.remember(root, self._counts)
        return [RowReport([token], ok, (), ()) for (token,), (ok,) in zip(root.tolist(), sound.tolist(), strict=True)]

    def _read_prompts(self, token_ids: Tensor, features: Tensor, lengths: list[int]) -> None:
        """Hand the drafter prompts [B, L] of these lengths with their features [B, L, H], or the ends that it reads."""
        most = self._drafter.prompt_tokens or max(lengths)
        left_out = [max(0, length - most) for length in lengths]
        skipped = torch.tensor(left_out, device=token_ids.device)
        if any(left_out):
            kept = (skipped[:, None] + torch.arange(most, device=token_ids.device)).clamp(max=max(lengths) - 1)
            token_ids = token_ids.gather(1, kept)
            features = features.gather(1, kept[:, :, None].expand(-1, -1, features.shape[2]))
        self._drafter.start(self._draft_cache, token_ids[:, 0], skipped)
        for start, stop, live in pieces([min(length, most) - 1 for length in lengths]):
            counts = torch.tensor(live, device=token_ids.device)
            rows, following = features[:, start:stop], token_ids[:, start + 1 : stop + 1]
            self._drafter.extend(self._draft_cache, rows, following, counts)

    @torch.inference_mode()
    def step(self, open_rows: list[bool]) -> list[RowReport]:
        """One cycle. Rows that are not open stay as they are; their reports mean nothing.

        On a GPU the next cycle is under way before this one's report is read, so a row stops one cycle late.
        """
        if self._graphs is None:
            self._open.copy_(torch.tensor(open_rows))
            return unpack_report(self._cycle(int(self._counts.max())).tolist())
        launched = self._under_way or self._launch(self._graphs, open_rows)
        self._under_way = self._launch(self._graphs, open_rows) if self._ahead else None
        rows = launched.rows()
        self._cache.host_advance(
            [len(row.token_ids) * is_open for row, is_open in zip(rows, launched.open_rows, strict=True)]
        )
        return rows

    def _launch(self, graphs: GraphCache, open_rows: list[bool]) -> "Launched":
        """Start a cycle."""
        if not all(open_rows):
            self._open.copy_(torch.tensor(open_rows))
        width = self._cache.slots if self._ahead else _rounded(self._cache.longest + self._spare)
        report = graphs.run(width, lambda: self._cycle(self.shape.longest_path, FixedShapes(width)))
        self.draft_seconds = 0.0  # within a graph nobody can tell
        return Launched(report, open_rows)

    def _cycle(self, new: int, fixed: FixedShapes | None = None) -> Tensor:
        """The packed report [B, 2 + 3R] of one cycle; the last one made at most `new` tokens of a row certain."""
        # draft: take in what became certain, grow a tree after its last token
        started = time.perf_counter()
        runner, cache, counts = self._runner, self._cache, self._counts
        root = self._token_ids.gather(1, (counts.clamp(min=1) - 1)[:, None])[:, 0]
        estimate = self._drafter.extend(
            self._draft_cache, self._features[:, :new], self._token_ids[:, :new], counts, fixed
        )
        tree = self._drafter.grow(self._draft_cache, root, estimate, self._sampler, fixed)
        self.draft_seconds = time.perf_counter() - started

        # verify: one pass of the target over all nodes, one draw at each
        positions = cache.lengths[:, None] + tree.depths
        mask = tree.visible if self.shape.nodes > 1 else None
        within = positions.clamp(max=runner.context_tokens - 1)
        taps = Taps(self._drafter.taps) if self._drafter.taps else None
        features = runner.forward(tree.token_ids, within, cache, mask, fixed, taps)
        drawn, sound = self._sampler.draw(runner.logits(features), positions + 1, tree)

        # accept: the path along which the draws are the tree's own tokens
        follow = self._settle if fixed else settle
        states = taps.joined() if taps else features
        accepted, kept, report = follow(tree, drawn, sound, states, self.shape.longest_path)
        self._sampler.remember(accepted.token_ids, accepted.counts)
        if self.shape.nodes > 1:
            cache.move(accepted.path)
        counts.copy_(accepted.counts * self._open)
        cache.lengthen(counts, fixed)
        self._features.copy_(self._drafter.features_from(kept) if taps else kept)
        self._token_ids.copy_(accepted.token_ids)
        return report


def settle(tree: Tree, drawn: Tensor, sound: Tensor, features: Tensor, longest: int) -> tuple[Accepted, Tensor, Tensor]:
    """What stands of a tree after the draws [B, N], the features [B, R, ·] along it, and the packed report."""
    accepted = accept(tree, drawn, longest)
    kept = features.gather(1, accepted.path[:, :, None].expand(-1, -1, features.shape[2]))
    return accepted, kept, pack_report(tree, accepted, sound)


def prefill(
    runner: Runner, token_ids: Tensor, lengths: list[int], cache: KVCache, drafter: TreeDrafter | None = None
) -> tuple[Tensor, Tensor]:
    """Features [B, L, H] of right-padded prompts [B, L], and those that the drafter takes, which are the same unless it
    fuses states inside the target; the cache then holds `lengths` tokens a row."""
    features, fused = [], []
    for start, stop, live in pieces(lengths):
        position_ids = torch.arange(start, stop, device=token_ids.device).expand(len(lengths), -1)
        taps = Taps(drafter.taps) if drafter and drafter.taps else None
        features.append(runner.forward(token_ids[:, start:stop], position_ids, cache, taps=taps))
        if drafter and taps:
            fused.append(drafter.features_from(taps.joined()))
        cache.advance(live)
    whole = torch.cat(features, 1)
    return whole, torch.cat(fused, 1) if fused else whole


def pieces(lengths: list[int]) -> list[tuple[int, int, list[int]]]:
    """(start, stop, live tokens of each row) for rows of `lengths` tokens."""
    cuts = range(0, max(lengths), TOKENS_PER_PIECE)  # none for rows of no tokens
    return [
        (start, stop, [max(0, min(length, stop) - start) for length in lengths])
        for start, stop in ((cut, min(cut + TOKENS_PER_PIECE, max(lengths))) for cut in cuts)
    ]


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
        return unpack_report(self._report.tolist())


def _rounded(slots: int) -> int:
    return -(-slots // WIDTH_STEP) * WIDTH_STEP
