"""Training speed on made-up conversations: tokens/s, memory, and how near the device's matrix rate that is.

    python -m hass_core.bench.training --shape smollm2-135m --align-steps 3

The last line is one JSON object. FLOPs count only what the method needs: each weight once forward and twice backward
for each anchor and step, the causal half of attention, the head once for the target and twice for each step; nothing
recomputed, no row that is not needed. The conversations have random tokens and features, a prompt of a fifth of their
length and lengths around 330 tokens.

With --twin the plain twin (twin.py) trains on the same conversations, in PyTorch's eager operations; where its memory
does not suffice, on half as many packs to a step, and so on. The record says how many it took.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from hass_core.bench.dense_twin import PaddedBatch, dense_loss, dense_outputs, side_by_side
from hass_core.cli import main
from hass_core.config import TrainingConfig, TreeConfig
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import choose_device, choose_dtype
from hass_core.training.alignment import Alignment
from hass_core.training.batch import Batch, collate
from hass_core.training.loop import Run, train_step
from hass_core.training.optim import make_optimizers
from hass_core.training.packing import packs_of_pass
from hass_core.training.padding import padded, shape_step
from hass_core.training.sharding import can_be_captured, distribute

LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {"hidden": 576, "inner": 1536, "heads": 9, "groups": 3, "head_dim": 64, "vocabulary": 49_152},
    "llama3-8b": {"hidden": 4096, "inner": 14_336, "heads": 32, "groups": 8, "head_dim": 128, "vocabulary": 128_256},
    "tiny": {"hidden": 64, "inner": 128, "heads": 4, "groups": 2, "head_dim": 16, "vocabulary": 512},
}


STEPS_OF_DATA = 4


@dataclass(frozen=True)
class Talk:
    """A made-up conversation."""

    id: str
    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    features: torch.Tensor


def bench_training(
    shape: str,
    config: TrainingConfig,
    device: str = "auto",
    conversation_tokens: int = 330,
    draft_vocabulary: int | None = None,
    steps: int = 10,
    twin: bool = False,
) -> dict[str, object]:
    """Train for `steps` timed optimizer steps; the figures as a flat record."""
    accelerator = Accelerator(cpu=choose_device(device).type == "cpu")
    where = accelerator.device
    accumulation_steps = config.accumulation_steps
    run = _make_run(SHAPES[shape], config, accelerator, draft_vocabulary)
    talks = _talks(SHAPES[shape], config, conversation_tokens, count=STEPS_OF_DATA * accumulation_steps)
    batches = [collate(group, config.align_steps) for group in talks]
    fed = [padded(batch, shape_step(config)) for batch in batches] if run.captured else batches
    if where.type == "cuda":
        fed = [batch.pin_memory() for batch in fed]
        torch.cuda.reset_peak_memory_stats()
    of_step = [slice(i, i + accumulation_steps) for i in range(0, len(fed), accumulation_steps)]
    seconds = _seconds(lambda i: train_step(run, fed[of_step[i % len(of_step)]], i), 3 * len(of_step), steps, where)
    timed = [batch for i in range(steps) for batch in batches[of_step[i % len(of_step)]]]
    tokens = sum(batch.num_tokens for batch in timed) / steps
    flops = sum(needed_flops(run.alignment.draft.architecture, run.head.size, batch) for batch in timed) / steps
    memory = _memory(where)
    rate = matmul_rate(where)
    record = {
        "shape": shape, "align_steps": config.align_steps, "tokens_per_pack": config.tokens_per_pack,
        "packs_per_batch": config.packs_per_batch, "accumulation_steps": accumulation_steps,
        "conversation_tokens": conversation_tokens, "draft_vocabulary": run.head.size,
        "optimizer": config.optimizer, "compiled": config.compile, "recompute": config.recompute,
        "processes": accelerator.num_processes,
        "tokens_per_second": round(accelerator.num_processes * tokens / seconds), "step_ms": round(1e3 * seconds, 2),
        "tokens_per_step": round(tokens), "supervised_per_step": sum(len(b.targets) for b in timed) // steps,
        "needed_tflop_per_step": flops / 1e12, "achieved_tflops": round(flops / seconds / 1e12, 2),
        "matmul_tflops": round(rate / 1e12, 2), "fraction_of_matmul_rate": round(flops / seconds / rate, 4),
        **memory,
        "device": torch.cuda.get_device_name() if where.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        **provenance(),
    }  # fmt: skip
    if twin:
        del fed
        run.backward = None  # pyright: ignore[reportAttributeAccessIssue]  # and with it the graphs' memory
        plain = bench_twin(run, talks[0], steps)
        record |= plain | {
            "times_twin": round(accelerator.num_processes * tokens / seconds / plain["twin_tokens_per_second"], 1)
        }
    return record


def bench_twin(run: Run, talks: list["Talk"], steps: int) -> dict[str, Any]:
    """Figures of the plain twin on as many of the conversations as its memory allows: all, half of them, a quarter…"""
    where, packs = run.accelerator.device, run.config.packs_per_batch
    while True:
        batch = side_by_side(talks).to(where)
        _memory(where, reset=True)
        try:
            seconds = _seconds(lambda _, batch=batch: _twin_step(run, batch), 2, steps, where)
        except torch.OutOfMemoryError:
            packs, talks = packs / 2, talks[::2]
            if len(talks) == 1:
                raise
            continue
        tokens = sum(len(talk.token_ids) for talk in talks)
        return {
            "twin_tokens_per_second": round(tokens / seconds), "twin_step_ms": round(1e3 * seconds, 2),
            "twin_packs_per_batch": packs, "twin_conversations": len(talks), "twin_tokens_per_step": tokens,
            **{f"twin_{name}": value for name, value in _memory(where).items()},
        }  # fmt: skip


def _twin_step(run: Run, batch: PaddedBatch) -> None:
    draft = run.alignment.draft
    with torch.autocast(batch.features.device.type, run.dtype, enabled=run.dtype != torch.float32):
        outputs = dense_outputs(draft, batch, batch.features.to(run.dtype), run.config.align_steps)
        loss = dense_loss(outputs, batch, run.head, run.objective)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), run.config.clip_norm or math.inf)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def needed_flops(architecture: DraftArchitecture, draft_vocabulary: int, batch: Batch) -> float:
    """Multiply-adds count two."""
    a = architecture
    attention = a.head_dim * (2 * a.num_attention_heads + 2 * a.num_key_value_heads) * a.hidden_size
    layer = 2 * a.hidden_size**2 + attention + 3 * a.hidden_size * a.intermediate_size
    first = 2 * a.hidden_size**2 + 2 * a.num_key_value_heads * a.head_dim * a.hidden_size  # rows that only are seen
    steps, anchors = len(batch.target_anchors), len(batch.anchors)
    trunk = 6.0 * (steps * anchors * layer + (batch.num_tokens - anchors) * first)
    visible = float((batch.position_ids[batch.anchors] + 1).sum())
    scores = 3 * steps * 4.0 * visible * a.num_attention_heads * a.head_dim  # forward, and twice that backward
    head = 2.0 * draft_vocabulary * a.hidden_size * (len(batch.targets) + 2 * int(batch.supervised.sum()))
    return trunk + scores + head


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 matrix product on this device, random values."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(choose_dtype("auto", device)) for _ in range(2))
    for _ in range(3):
        torch.matmul(a, b)
    _wait(device)
    start = time.perf_counter()
    for _ in range(10):
        torch.matmul(a, b)
    _wait(device)
    return 10 * 2.0 * size**3 / (time.perf_counter() - start)


def _make_run(shape: dict[str, int], config: TrainingConfig, accelerator: Accelerator, vocabulary: int | None) -> Run:
    device = accelerator.device
    dtype = choose_dtype("auto", device)
    architecture = DraftArchitecture(
        hidden_size=shape["hidden"], intermediate_size=shape["inner"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"], head_dim=shape["head_dim"], vocab_size=shape["vocabulary"],
        max_position_embeddings=8192, rope_parameters=LLAMA3_ROPE,
    )  # fmt: skip
    embedding = (0.02 * torch.randn(shape["vocabulary"], shape["hidden"], device=device)).to(dtype)
    draft = DraftModel(architecture, embedding)
    alignment = Alignment(draft, config.align_steps, recompute=config.recompute)
    if config.compile:
        alignment.compile_parts()
    captured = config.compile and can_be_captured(accelerator)
    wrapped = distribute(alignment, accelerator, captured)
    head = DraftHead.from_target(embedding, torch.arange(vocabulary) if vocabulary else None)
    return Run(
        config=config, seed=0, accelerator=accelerator, alignment=alignment, wrapped=wrapped,
        head=head, optimizers=make_optimizers(draft, config), average=None, held=[], answers=[],
        tree=TreeConfig(), dtype=dtype, folder=None, metrics=None,  # pyright: ignore
        packs_per_step=config.packs_per_batch, packs_per_pass=1,
        captured=captured,
    )  # fmt: skip


def _talks(shape: dict[str, int], config: TrainingConfig, mean_tokens: int, count: int) -> list[list[Talk]]:
    """The conversations of `count` micro-batches."""
    generator = torch.Generator().manual_seed(0)
    wanted = count * config.packs_per_batch * config.tokens_per_pack
    spread = torch.rand(4 * wanted // mean_tokens + count, generator=generator)
    lengths = ((0.4 + 1.2 * spread) * mean_tokens).long().clamp(8, config.tokens_per_pack)
    if mean_tokens >= config.tokens_per_pack:
        lengths = torch.full_like(lengths, config.tokens_per_pack)
    packs = packs_of_pass(lengths.numpy(), config.tokens_per_pack, 0, 0)[: count * config.packs_per_batch]
    groups = [packs[i : i + config.packs_per_batch] for i in range(0, len(packs), config.packs_per_batch)]
    return [[_talk(shape, int(lengths[i]), generator) for pack in group for i in pack] for group in groups]


def _talk(shape: dict[str, int], length: int, generator: torch.Generator) -> Talk:
    token_ids = torch.randint(0, shape["vocabulary"], (length,), generator=generator)
    features = torch.randn(length, shape["hidden"], generator=generator).bfloat16()
    return Talk("made-up", token_ids, torch.arange(length) >= length // 5, features)


def _seconds(step: Callable[[int], object], warm_up: int, steps: int, device: torch.device) -> float:
    """Seconds of a step, after some that are not counted; a shape is captured when it comes a second time."""
    for i in range(warm_up):
        step(i)
    _wait(device)
    start = time.perf_counter()
    for i in range(steps):
        step(i)
    _wait(device)
    return (time.perf_counter() - start) / steps


def _memory(device: torch.device, reset: bool = False) -> dict[str, float | None]:
    """The most that tensors took, and what PyTorch holds for them, since the last reset, which this may be."""
    if device.type != "cuda":
        return {"peak_gib": None, "reserved_gib": None}
    most = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    if reset:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {name: round(size / 2**30, 2) for name, size in most.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(
    shape: str,
    config: TrainingConfig,
    device: str,
    conversation_tokens: int,
    draft_vocabulary: int | None,
    steps: int,
    twin: bool,
) -> None:
    """Measure and print the record, once for all processes."""
    record = bench_training(shape, config, device, conversation_tokens, draft_vocabulary, steps, twin)
    if Accelerator().is_main_process:
        print(json.dumps(record))


if __name__ == "__main__":
    main(["bench", "train", *sys.argv[1:]])
