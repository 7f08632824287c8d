"""Measure decoding: plain and speculative, beside transformers' own generate and the limit the memory sets.

    python -m hass_core.bench.decoding DIR --plan

answers the packaged held-out prompts and prints one JSON line last.
"""

import sys
import time
from pathlib import Path

import torch
from pydantic import BaseModel

from hass_core.cli import main
from hass_core.config import SamplingConfig, TargetConfig, TreeConfig
from hass_core.data.holdout import heldout_prompts
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import Generation, StopRule
from hass_core.decoding.decoder import Decoder, PlainDecoder, SpeculativeDecoder
from hass_core.decoding.planner import make_plan
from hass_core.draft_model.checkpoint import Draft, load_draft
from hass_core.errors import BadInput
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import make_runner

PLANNED_ON = 8  # prompts


class DecodeBench(BaseModel, frozen=True):
    """Speeds in tokens per second over all rows, times in milliseconds."""

    target: str
    device: str
    dtype: str
    threads: int
    rows: int
    plain_tokens_per_second: float
    plain_token_ms: float
    transformers_tokens_per_second: float
    limit_tokens_per_second: float  # one row: every weight read once a token
    share_of_limit: float  # plain, one row
    tree: TreeConfig | None = None
    speculative_tokens_per_second: float | None = None
    tau: float | None = None
    cycle_ms: float | None = None  # median; the three parts are means
    draft_ms: float | None = None  # CPU only: a GPU runs the cycle as one graph
    verify_ms: float | None = None
    overhead_ms: float | None = None
    cycle_ratio: float | None = None  # cycle over plain token
    same_tokens: bool | None = None  # greedy, as plain


def bench_decode(
    target: Target,
    prompts: list[list[int]],
    draft: Draft | None = None,
    tree: TreeConfig | None = None,
    max_new_tokens: int = 128,
    rows: int = 1,
) -> DecodeBench:
    """Answer `prompts` greedily, `rows` at a time, without stopping at end tokens. The first batch is run twice."""
    transformers_speed = _transformers_speed(target, prompts[0], max_new_tokens)
    runner = make_runner(target)
    plain = _timed(PlainDecoder(runner), prompts, max_new_tokens, rows)
    token_ms = 1000 * _seconds_per_cycle(plain)
    limit = bandwidth_bytes_per_second(target.device) / bytes_per_token(target)
    record = DecodeBench(
        target=target.name,
        device=torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else "cpu",
        dtype=str(target.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rows=rows,
        plain_tokens_per_second=round(_speed(plain, rows), 2),
        plain_token_ms=round(token_ms, 4),
        transformers_tokens_per_second=round(transformers_speed, 2),
        limit_tokens_per_second=round(limit, 1),
        share_of_limit=round(1000 / token_ms / limit, 4),
    )
    if draft is None:
        return record
    tree = tree or TreeConfig()
    drafted = _timed(SpeculativeDecoder(runner, draft, tree), prompts, max_new_tokens, rows)
    return record.model_copy(update=_speculative(drafted, plain, tree, token_ms, rows))


def bytes_per_token(target: Target) -> int:
    """Weights read for one token: all but the input embedding, unless the head is the same matrix."""
    total = sum(parameter.nbytes for parameter in target.model.parameters())
    shared = target.embedding.data_ptr() == target.head.data_ptr()
    return total if shared else total - target.embedding.nbytes


def _speculative(
    drafted: list[Generation], plain: list[Generation], tree: TreeConfig, token_ms: float, rows: int
) -> dict[str, object]:
    cycles = [cycle for generation in drafted for cycle in generation.cycles]
    timings = [timing for generation in drafted[::rows] for timing in generation.timings]
    cycle_ms = 1000 * _seconds_per_cycle(drafted)
    draft_ms, verify_ms, whole_ms = (
        1000 * sum(getattr(t, name) for t in timings) / len(timings)
        for name in ("draft_seconds", "verify_seconds", "total_seconds")
    )
    overhead_ms = whole_ms - draft_ms - verify_ms
    parts = {"draft_ms": round(draft_ms, 4), "verify_ms": round(verify_ms, 4), "overhead_ms": round(overhead_ms, 4)}
    as_one = not any(timing.draft_seconds for timing in timings)  # a GPU's graph
    return {
        "tree": tree,
        "speculative_tokens_per_second": round(_speed(drafted, rows), 2),
        "tau": round(1 + sum(cycle.accepted for cycle in cycles) / len(cycles), 4),
        "cycle_ms": round(cycle_ms, 4),
        **({} if as_one else parts),
        "cycle_ratio": round(cycle_ms / token_ms, 4),
        "same_tokens": [g.token_ids for g in drafted] == [g.token_ids for g in plain],
    }


def _timed(decoder: Decoder, prompts: list[list[int]], max_new_tokens: int, rows: int) -> list[Generation]:
    batches = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    sampling, stop = SamplingConfig(), StopRule()
    for _ in range(2):  # on a GPU the first run of a width compiles, the second captures
        decoder.generate(batches[0], sampling, max_new_tokens, stop)
    return [g for batch in batches for g in decoder.generate(batch, sampling, max_new_tokens, stop)]


def _speed(generations: list[Generation], rows: int) -> float:
    """Tokens per second after the first one of each row."""
    seconds = sum(generation.decode_seconds for generation in generations[::rows])
    return sum(len(generation.token_ids) - 1 for generation in generations) / seconds


def _seconds_per_cycle(generations: list[Generation]) -> float:
    times = sorted(timing.total_seconds for generation in generations for timing in generation.timings)
    return times[len(times) // 2]


def _transformers_speed(target: Target, prompt: list[int], max_new_tokens: int) -> float:
    """transformers' generate, one row, greedy."""
    token_ids = torch.tensor([prompt], device=target.device)
    options = {"do_sample": False, "min_new_tokens": max_new_tokens, "max_new_tokens": max_new_tokens}
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        target.model.generate(token_ids, attention_mask=torch.ones_like(token_ids), **options)  # pyright: ignore
        best = min(best, time.perf_counter() - started)
    return max_new_tokens / best


def _prompts(target: Target, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """`count` held-out prompts to measure on, and a few others to plan on. Raises BadInput when there are too few."""
    encoded = [encode_prompt(target.tokenizer, record.messages[:1]) for record in heldout_prompts()]
    planned = min(count, PLANNED_ON)
    if count + planned > len(encoded):
        most = len(encoded) - PLANNED_ON
        raise BadInput(f"--rows or --questions asks for {count} prompts, and {most} are packaged; ask for fewer")
    spread = encoded[:: max(1, len(encoded) // (count + planned))]
    others = spread[1 : 2 * planned : 2]
    return [prompt for prompt in spread if prompt not in others][:count], others


def bandwidth_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        started = time.perf_counter()
        goal.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    target_config: TargetConfig,
    tree: TreeConfig,
    draft_folder: Path | None,
    plan: bool,
    rows: int,
    questions: int,
    max_new_tokens: int,
) -> None:
    """Measure and print the record, after the plan where one was asked for."""
    target = load_target(target_config)
    measured, others = _prompts(target, max(questions, rows))
    draft = load_draft(draft_folder, target) if draft_folder else None
    if draft and plan:
        found = make_plan(make_runner(target), draft.set_by(tree), others, StopRule(), rows)
        print(found.model_dump_json(indent=1))
        draft, tree = (draft, found.tree()) if found.pays else (None, tree)
    print(bench_decode(target, measured, draft, tree, max_new_tokens, rows).model_dump_json())


if __name__ == "__main__":
    main(["bench", "decode", *sys.argv[1:]])
