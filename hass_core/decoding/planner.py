"""Choose the tree by measuring: what a cycle costs on this machine, and what this draft's trees are worth.

Worth: the given prompts are decoded once with the largest tree, and for every cycle it is noted which nodes were
accepted and where each stood in the order of scores. The best N-1 nodes of a pool contain the best N'-1, so one run
tells how many tokens any smaller tree of the same draft would have gained. (Narrower and shallower trees and smaller
vocabularies are judged by leaving out nodes; their frontier could have differed slightly.)
Cost: the time of verifying N nodes, of drafting D levels of K nodes, and what a level saves with fewer tokens to score.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.answers import Generation, Step, StopRule
from hass_core.decoding.decoder import Decoder, PlainDecoder, SpeculativeDecoder, TreeDecoder
from hass_core.decoding.draft_runner import DraftRunner
from hass_core.decoding.drafter import Drafter, NoDraft, TreeDrafter
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.session import Session
from hass_core.decoding.tree import Tree, TreeShape, ancestors
from hass_core.draft_model.checkpoint import Draft
from hass_core.target_model.kv_cache import FixedShapes
from hass_core.target_model.runner import Runner

GREEDY, HOT = SamplingConfig(), SamplingConfig(temperature=1.0)
LARGEST = TreeConfig(kind="dynamic", depth=6, top_k=8, nodes=60)
TOP_KS = (1, 2, 4, 8)
NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 60)
# a GPU compiles and captures every size that is timed, and rounds rows up to its tiles anyway
GPU_TOP_KS, GPU_NODES = (1, 4, 8), (2, 8, 16, 32, 60)
VOCABULARIES = (16_384, 8_192, 4_096)
VOCABULARY_LEVELS, VOCABULARY_TOP_K = 4, 4
CONTEXT_TOKENS = 128  # of the rows that cycles are timed over
WARM_CYCLES = 3  # on a GPU: compile, capture, first replay


class Choice(BaseModel, frozen=True):
    """One tree and what it is expected to give."""

    depth: int
    top_k: int
    nodes: int
    vocabulary: int | None = None  # tokens drafted from; all where None
    tau: float  # tokens a cycle
    cycle_ms: float
    tokens_per_second: float


class Plan(BaseModel, frozen=True):
    """The best tree on this machine for `rows` rows at once, and the best of every size."""

    device: str
    dtype: str
    rows: int
    temperature: float = 0.0
    plain_tokens_per_second: float
    eight_bits: bool = False  # of the draft's weights
    prompt_tokens: int | None = None  # of a prompt that the draft reads
    best: Choice
    curve: list[Choice]

    @property
    def pays(self) -> bool:
        """Whether the best tree beats plain decoding."""
        return self.best.tokens_per_second > self.plain_tokens_per_second

    def tree(self) -> TreeConfig:
        """The choice as a setting."""
        best = self.best
        return TreeConfig(
            kind="chain" if best.top_k == 1 else "dynamic",
            depth=best.depth,
            top_k=best.top_k,
            nodes=best.nodes,
            vocabulary=best.vocabulary,
            eight_bits=self.eight_bits,
            prompt_tokens=self.prompt_tokens,
        )


def choose_decoder(
    runner: Runner, draft: Draft, prompts: list[list[int]], stop: StopRule
) -> "tuple[PlannedDecoder, list[Plan]]":
    """The decoder to use for one row at a time, and the measurements it rests on: greedily and at temperature 1.

    `prompts` (token ids) should resemble what will be decoded. Outputs are the same whichever is chosen.
    """
    costs = measure_costs(runner, draft, 1, HOT)  # greedy cycles cost a little less, with a draft and without
    plans = [make_plan(runner, draft, prompts, stop, sampling=s, costs=costs) for s in (GREEDY, HOT)]
    return PlannedDecoder(runner, draft, plans), plans


class PlannedDecoder:
    """Decodes each call as the plan for its temperature says; see `hass_core.decoding.decoder.Decoder`.

    A draft gains less the higher the temperature: a call follows the plan for the nearest one above, and is decoded
    plainly above them all.
    """

    name = "planned"

    def __init__(self, runner: Runner, draft: Draft, plans: Sequence[Plan]):
        self._above = plain = PlainDecoder(runner)
        self._decoders = [
            (plan.temperature, SpeculativeDecoder(runner, draft, plan.tree()) if plan.pays else plain) for plan in plans
        ]

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        return self.at(sampling.temperature).stream(prompt_token_ids, sampling, max_new_tokens, stop)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        return self.at(sampling.temperature).generate(prompts, sampling, max_new_tokens, stop, seed)

    def at(self, temperature: float) -> Decoder:
        """The decoder for a temperature."""
        fitting = [(known, decoder) for known, decoder in self._decoders if known >= temperature]
        return min(fitting, key=lambda pair: pair[0])[1] if fitting else self._above


def make_plan(
    runner: Runner,
    draft: Draft,
    prompts: list[list[int]],
    stop: StopRule,
    rows: int = 1,
    max_new_tokens: int = 64,
    sampling: SamplingConfig = GREEDY,
    costs: "Costs | None" = None,
) -> Plan:
    """Measure and choose for one `sampling`. `prompts` should resemble what will be decoded; a handful suffices.

    The draft is measured as it is, in 8 bits where it says so.
    """
    records = observe(runner, draft, prompts, stop, max_new_tokens, sampling)
    costs = costs or measure_costs(runner, draft, rows, sampling)
    shapes = candidates(draft.head.size)
    choices = [_choice(records, costs, *shape, v, rows) for shape in shapes for v in (None, *costs.saved)]
    by_size = {n: max((c for c in choices if c.nodes == n), key=_speed) for n in sorted({c.nodes for c in choices})}
    return Plan(
        device=torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else "cpu",
        dtype=str(runner.dtype).removeprefix("torch."),
        rows=rows,
        temperature=sampling.temperature,
        plain_tokens_per_second=rows / costs.plain,
        eight_bits=draft.eight_bits,
        prompt_tokens=draft.prompt_tokens,
        best=max(choices, key=_speed),
        curve=list(by_size.values()),
    )


def candidates(draft_vocab_size: int) -> list[tuple[int, int, int]]:
    """(depth, top_k, nodes) of all trees considered."""
    found = set()
    for top_k in TOP_KS:
        for depth in range(1, LARGEST.depth + 1):
            for nodes in NODES:
                kind = "chain" if top_k == 1 else "dynamic"
                shape = TreeShape.of(TreeConfig(kind=kind, depth=depth, top_k=top_k, nodes=nodes), draft_vocab_size)
                found.add((shape.depth, shape.top_k, shape.nodes))
    return sorted(found)


@dataclass(frozen=True)
class Record:
    """One cycle with the largest tree: its nodes by falling score, and the accepted ones among them."""

    nodes: list[tuple[int, int, int]]  # depth; on the path from the root, the highest rank and the rarest token's
    accepted: list[int]  # indices into `nodes`, root downwards

    def gained(self, depth: int, top_k: int, nodes: int, vocabulary: int | None = None) -> int:
        """Tokens the cycle would have given with a smaller tree: accepted drafts and the new root."""
        most = vocabulary or math.inf
        fits = [d <= depth and rank < top_k and rarest < most for d, rank, rarest in self.nodes]
        gained = 1
        for index in self.accepted:
            if not fits[index] or sum(fits[:index]) >= nodes - 1:
                break
            gained += 1
        return gained


class Observer:
    """A drafter that keeps the trees it grows with their scores; see `hass_core.decoding.drafter.TreeDrafter`."""

    capturable = False

    def __init__(self, drafter: Drafter):
        self._drafter, self.shape, self.scratch_slots = drafter, drafter.shape, drafter.scratch_slots
        self.new_cache, self.start, self.extend = drafter.new_cache, drafter.start, drafter.extend
        self.taps, self.features_from = drafter.taps, drafter.features_from
        self.prompt_tokens = drafter.prompt_tokens
        self.trees: list[Tree] = []

    def grow(
        self, cache: Any, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: FixedShapes | None = None
    ) -> Tree:
        tree = self._drafter.grow(cache, root, estimate, sampler, fixed)
        self.trees.append(tree.to(torch.device("cpu")))
        return tree


def observe(
    runner: Runner,
    draft: Draft,
    prompts: list[list[int]],
    stop: StopRule,
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
) -> list[Record]:
    """Decode under `sampling` with the largest tree and note every cycle up to the answers' ends."""
    observer = Observer(Drafter(draft, TreeShape.of(LARGEST, draft.head.size)))
    frequency_rank = torch.full((runner.vocab_size,), runner.vocab_size)
    if draft.ranks is not None:
        frequency_rank[draft.ranks] = torch.arange(len(draft.ranks))
    decoder = TreeDecoder(runner, observer, name="observer")
    records: list[Record] = []
    for prompt in prompts:
        observer.trees.clear()
        (generation,) = decoder.generate([prompt], sampling, max_new_tokens, stop)
        for tree, cycle in zip(observer.trees, generation.cycles, strict=True):
            records.append(_record(tree, frequency_rank[tree.token_ids[0]].tolist(), cycle.ranks))
    return records


def _record(tree: Tree, frequency_ranks: list[int], accepted_ranks: tuple[int, ...]) -> Record:
    """`frequency_ranks`: of each node's token, how many are more frequent."""
    parents, depths, ranks = (part[0].tolist() for part in (tree.parents, tree.depths, tree.ranks))
    worst, rarest = [0] * len(parents), [0] * len(parents)
    for node in range(1, len(parents)):  # parents come before children
        worst[node] = max(worst[parents[node]], ranks[node])
        rarest[node] = max(rarest[parents[node]], frequency_ranks[node])
    order = tree.order[0].tolist()
    index = {node: i for i, node in enumerate(order)}
    current, accepted = 0, []
    for rank in accepted_ranks:
        current = next(n for n in range(1, len(parents)) if parents[n] == current and ranks[n] == rank)
        accepted.append(index[current])
    return Record([(depths[node], worst[node], rarest[node]) for node in order], accepted)


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine: plain token, verification by nodes, drafting by top_k, and what a level saves."""

    plain: float
    verify: dict[int, float]
    draft: dict[int, tuple[float, float]]  # top_k → (first level, each further level)
    saved: dict[int, float] = field(default_factory=dict)  # vocabulary → a level, beside the full one

    def cycle(self, depth: int, top_k: int, nodes: int, vocabulary: int | None = None) -> float:
        """A whole cycle; sizes between the measured ones are interpolated."""
        first, further = self.draft[min((k for k in self.draft if k >= top_k), default=max(self.draft))]
        saved = self.saved[vocabulary] if vocabulary else 0.0
        return self._verify(nodes) + max(0.0, first - saved) + max(0.0, further - saved) * (depth - 1)

    def _verify(self, nodes: int) -> float:
        below = max((n for n in self.verify if n <= nodes), default=min(self.verify))
        above = min((n for n in self.verify if n >= nodes), default=max(self.verify))
        if above == below:
            return self.verify[below]
        share = (nodes - below) / (above - below)
        return self.verify[below] * (1 - share) + self.verify[above] * share


def measure_costs(runner: Runner, draft: Draft, rows: int, sampling: SamplingConfig = GREEDY) -> Costs:
    """Time verification by size, and drafting by width and by vocabulary, as whole cycles less their verification."""
    top_ks, sizes = (GPU_TOP_KS, GPU_NODES) if runner.device.type == "cuda" else (TOP_KS, NODES)
    timed = partial(cycle_seconds, runner, rows=rows, sampling=sampling)
    verify = {nodes: timed(FixedTree(nodes)) for nodes in sizes}
    plain, shared = timed(NoDraft()), DraftRunner(draft.model, draft.eight_bits)

    def drafted(own: Draft, depth: int, top_k: int) -> float:
        return timed(Drafter(own, TreeShape(depth, top_k, nodes=2, static=False), shared))

    drafting = {}
    for top_k in (k for k in top_ks if k <= draft.head.size):
        first, four = (max(0.0, drafted(draft, depth, top_k) - verify[2]) for depth in (1, 4))
        drafting[top_k] = first, max(0.0, four - first) / 3
    return Costs(plain, verify, drafting, _saved(draft, drafted))


def _saved(draft: Draft, drafted: Callable[[Draft, int, int], float]) -> dict[int, float]:
    """A level's head reads its rows once, however many nodes it scores: one width tells what fewer rows save."""
    if draft.ranks is None:
        return {}
    sizes = [size for size in VOCABULARIES if size < min(draft.head.size, len(draft.ranks) + 1)]
    levels, top_k = VOCABULARY_LEVELS, min(VOCABULARY_TOP_K, draft.head.size)
    whole = drafted(draft, levels, top_k) if sizes else 0.0
    return {size: (whole - drafted(draft.narrowed(size), levels, top_k)) / levels for size in sizes}


def _choice(
    records: list[Record], costs: Costs, depth: int, top_k: int, nodes: int, vocabulary: int | None, rows: int
) -> Choice:
    gained = sum(record.gained(depth, top_k, nodes, vocabulary) for record in records)
    tau = gained / len(records) if records else 1.0  # every answer ended with its first token: no tree gains any
    seconds = costs.cycle(depth, top_k, nodes, vocabulary)
    return Choice(
        depth=depth,
        top_k=top_k,
        nodes=nodes,
        vocabulary=vocabulary,
        tau=round(tau, 4),
        cycle_ms=round(1000 * seconds, 4),
        tokens_per_second=round(rows * tau / seconds, 2),
    )


def _speed(choice: Choice) -> float:
    return choice.tokens_per_second


class FixedTree(NoDraft):
    """Proposes the same star of N nodes for nothing: what remains of a cycle is the verification."""

    scratch_slots = 0

    def __init__(self, nodes: int):
        self.shape = TreeShape(depth=1, top_k=nodes, nodes=nodes, static=True)

    def grow(
        self, cache: Any, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: FixedShapes | None = None
    ) -> Tree:
        node = torch.arange(self.shape.nodes, device=root.device).expand(len(root), -1)
        parents = torch.zeros_like(node)
        token_ids = torch.where(node == 0, root[:, None], node)  # siblings must differ, or several would be accepted
        return Tree(token_ids, parents, node.clamp(max=1), parents, ancestors(parents, 1), node[:, 1:])


def cycle_seconds(
    runner: Runner,
    drafter: TreeDrafter,
    rows: int = 1,
    cycles: int = 8,
    context: int = CONTEXT_TOKENS,
    sampling: SamplingConfig = GREEDY,
) -> float:
    """Median time of a cycle of `drafter` over `rows` rows of `context` tokens under `sampling`."""
    capacity = (WARM_CYCLES + cycles) * (drafter.shape.depth + 1) + 1
    context = min(context, runner.context_tokens - capacity - 1)
    prompts = [[(7 * i + row) % runner.vocab_size for i in range(context)] for row in range(rows)]
    session = Session(runner, drafter, sampling, rows, context + capacity)
    session.start(prompts, seed=0)
    times = []
    for _ in range(WARM_CYCLES + cycles):
        started = time.perf_counter()
        session.step([True] * rows)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_CYCLES:])
