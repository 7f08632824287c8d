"""Training speed on made-up conversations: tokens/s, memory, and how near the device's matrix rate that is.

    python -m hass_core.bench.training --shape smollm2-135m --align-steps 3

The last line is one JSON object. FLOPs count only what the method needs: each weight once forward and twice backward
for each anchor and step, the causal half of attention, the head once for the target and twice for each step; nothing
recomputed, no row that is not needed. The conversations have random tokens and features, a prompt of a fifth of their
length and lengths around 330 tokens.

With --twin the plain twin (dense_twin.py) trains on the same conversations, in PyTorch's eager operations; where its
memory does not suffice, on half of them, and so on. The record says how many it took.
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
from hass_core.config import TrainingConfig
from hass_core.draft_config import DraftConfig
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import build_draft
from hass_core.errors import BadInput
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import choose_device, choose_dtype
from hass_core.training.batch import Batch, collate, rounded_up
from hass_core.training.feed import Division, packs_of_pass
from hass_core.training.sharding import make_accelerator
from hass_core.training.step import Trainer, train_step

LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {"hidden": 576, "inner": 1536, "heads": 9, "groups": 3, "head_dim": 64, "vocabulary": 49_152},
    "llama3-8b": {"hidden": 4096, "inner": 14_336, "heads": 32, "groups": 8, "head_dim": 128, "vocabulary": 128_256},
    "llama3-70b": {"hidden": 8192, "inner": 28_672, "heads": 64, "groups": 8, "head_dim": 128, "vocabulary": 128_256},
    "tiny": {"hidden": 64, "inner": 128, "heads": 4, "groups": 2, "head_dim": 16, "vocabulary": 512},
}


STEPS_OF_DATA = 4
LAYERS = 30  # of the target, as far as draft.taps asks
EAGLE = DraftConfig()


@dataclass(frozen=True)
class Talk:
    """A made-up conversation."""

    id: str
    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    features: torch.Tensor
    taps: torch.Tensor | None = None


def bench_training(
    shape: str,
    config: TrainingConfig,
    device: str = "auto",
    conversation_tokens: int = 330,
    draft_vocabulary: int | None = None,
    steps: int = 10,
    twin: bool = False,
    draft: DraftConfig = EAGLE,
) -> dict[str, object]:
    """Train for `steps` timed optimizer steps; the figures as a flat record.

    Raises BadInput for a plain twin of another architecture than eagle.
    """
    if twin and draft.architecture != "eagle":
        raise BadInput('--twin: there is a plain twin of draft.architecture = "eagle" only')
    accelerator = make_accelerator(choose_device(device))
    where = accelerator.device
    trainer = make_trainer(SHAPES[shape], config, accelerator, draft_vocabulary, draft)
    share = Division(config.packs_per_step, config.packs_per_micro_batch, accelerator.num_processes)
    in_step = len(share.own([[]] * config.packs_per_step))
    taps, count = len(trainer.draft.taps), STEPS_OF_DATA * in_step
    talks = make_talks(SHAPES[shape], config, conversation_tokens, share.micro_batch, count, taps)
    batches = [collate(group, config.align_steps) for group in talks]
    tokens_per_batch = share.micro_batch * config.tokens_per_pack
    fed = [rounded_up(batch, tokens_per_batch) for batch in batches] if trainer.captured else batches
    if where.type == "cuda":
        fed = [batch.pin_memory() for batch in fed]
        torch.cuda.reset_peak_memory_stats()
    of_step = [slice(i, i + in_step) for i in range(0, len(fed), in_step)]
    seconds = _seconds(lambda i: train_step(trainer, fed[of_step[i % len(of_step)]], i), 3 * len(of_step), steps, where)
    timed = [batch for i in range(steps) for batch in batches[of_step[i % len(of_step)]]]
    tokens = sum(batch.num_tokens for batch in timed) / steps
    flops = sum(needed_flops(trainer.draft.architecture, trainer.head.size, batch, taps) for batch in timed) / steps
    memory = _memory(where)
    rate = matmul_rate(where)
    record = {
        "shape": shape, "architecture": draft.architecture, "taps": taps,
        "align_steps": config.align_steps, "tokens_per_pack": config.tokens_per_pack,
        "packs_per_step": config.packs_per_step, "packs_per_micro_batch": share.micro_batch,
        "conversation_tokens": conversation_tokens, "draft_vocabulary": trainer.head.size,
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
        vars(trainer).pop("backward")  # and with it the graphs' memory
        plain = bench_twin(trainer, talks[0], steps)
        record |= plain | {
            "times_twin": round(accelerator.num_processes * tokens / seconds / plain["twin_tokens_per_second"], 1)
        }
    return record


def bench_twin(trainer: Trainer, talks: list["Talk"], steps: int) -> dict[str, Any]:
    """Figures of the plain twin on as many of the conversations as its memory allows: all, half of them, a quarter…"""
    where, share = trainer.accelerator.device, 1.0
    while True:
        batch = side_by_side(talks).to(where)
        _memory(where, reset=True)
        try:
            seconds = _seconds(lambda _, batch=batch: _twin_step(trainer, batch), 2, steps, where)
        except torch.OutOfMemoryError:
            share, talks = share / 2, talks[::2]
            if len(talks) == 1:
                raise
            continue
        tokens = sum(len(talk.token_ids) for talk in talks)
        return {
            "twin_tokens_per_second": round(tokens / seconds), "twin_step_ms": round(1e3 * seconds, 2),
            "twin_share_of_batch": share, "twin_conversations": len(talks), "twin_tokens_per_step": tokens,
            **{f"twin_{name}": value for name, value in _memory(where).items()},
        }  # fmt: skip


def _twin_step(trainer: Trainer, batch: PaddedBatch) -> None:
    draft = trainer.draft
    with torch.autocast(batch.features.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
        outputs = dense_outputs(draft, batch, batch.features.to(trainer.dtype), trainer.config.align_steps)
        loss = dense_loss(outputs, batch, trainer.head, trainer.objective)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), trainer.config.clip_norm or math.inf)
    for optimizer in trainer.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def needed_flops(architecture: DraftArchitecture, draft_vocabulary: int, batch: Batch, taps: int = 0) -> float:
    """Multiply-adds count two."""
    a, width = architecture, architecture.hidden_size * (2 if architecture.own_head else 1)  # of the attention's rows
    fusion = 0 if a.own_head else 2 * a.hidden_size**2
    shared = 2 * a.num_key_value_heads * a.head_dim * width
    attention = a.num_attention_heads * a.head_dim * (width + a.hidden_size) + shared
    layer = fusion + attention + 3 * a.hidden_size * a.intermediate_size
    first = fusion + shared  # rows that only are seen
    steps, anchors = len(batch.target_anchors), len(batch.anchors)
    trunk = 6.0 * (steps * anchors * layer + (batch.num_tokens - anchors) * first)
    trunk += 4.0 * batch.num_tokens * taps * a.hidden_size**2  # fused once; what is fused is not trained
    visible = float((batch.position_ids[batch.anchors] + 1).sum())
    scores = 3 * steps * 4.0 * visible * a.num_attention_heads * a.head_dim  # forward, and twice that backward
    by_step = 3 if a.own_head else 2  # forward, and backward by rows, and by the weight that is trained
    head = 2.0 * draft_vocabulary * a.hidden_size * (len(batch.targets) + by_step * int(batch.supervised.sum()))
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


def make_trainer(
    shape: dict[str, int],
    config: TrainingConfig,
    accelerator: Accelerator,
    vocabulary: int | None = None,
    draft: DraftConfig = EAGLE,
) -> Trainer:
    """A trainer of a random draft; `vocabulary`: of so many tokens. Of `draft` the architecture counts."""
    device = accelerator.device
    architecture = DraftArchitecture(
        hidden_size=shape["hidden"], intermediate_size=shape["inner"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"], head_dim=shape["head_dim"], vocab_size=shape["vocabulary"],
        max_position_embeddings=8192, rope_parameters=LLAMA3_ROPE,
    )  # fmt: skip
    embedding = 0.02 * torch.randn(shape["vocabulary"], shape["hidden"], device=device)
    embedding = embedding.to(choose_dtype("auto", device))
    head = DraftHead.from_target(embedding, torch.arange(vocabulary) if vocabulary else None)
    if draft.architecture == "eagle3":
        taps = draft.tapped(LAYERS)
        architecture = Eagle3Architecture.of(architecture, head.size, draft.norm_output, taps, draft.fc_norm)
    return Trainer.of(config, 0, accelerator, build_draft(architecture, embedding), head)


def make_talks(
    shape: dict[str, int], config: TrainingConfig, mean_tokens: int, packs_per_batch: int, count: int, taps: int = 0
) -> list[list[Talk]]:
    """The conversations of `count` micro-batches, with so many states beside the last one."""
    generator = torch.Generator().manual_seed(0)
    wanted = count * packs_per_batch * config.tokens_per_pack
    spread = torch.rand(4 * wanted // mean_tokens + count, generator=generator)
    lengths = ((0.4 + 1.2 * spread) * mean_tokens).long().clamp(8, config.tokens_per_pack)
    if mean_tokens >= config.tokens_per_pack:
        lengths = torch.full_like(lengths, config.tokens_per_pack)
    packs = packs_of_pass(lengths.numpy(), config.tokens_per_pack, 0, 0)[: count * packs_per_batch]
    groups = [packs[i : i + packs_per_batch] for i in range(0, len(packs), packs_per_batch)]
    return [[_talk(shape, int(lengths[i]), generator, taps) for pack in group for i in pack] for group in groups]


def _talk(shape: dict[str, int], length: int, generator: torch.Generator, taps: int) -> Talk:
    token_ids = torch.randint(0, shape["vocabulary"], (length,), generator=generator)
    features = torch.randn(length, shape["hidden"], generator=generator).bfloat16()
    states = torch.randn(length, taps * shape["hidden"], generator=generator).bfloat16() if taps else None
    return Talk("made-up", token_ids, torch.arange(length) >= length // 5, features, states)


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
    draft: DraftConfig,
) -> None:
    """Measure and print the record, once for all processes."""
    record = bench_training(shape, config, device, conversation_tokens, draft_vocabulary, steps, twin, draft)
    if Accelerator().is_main_process:
        print(json.dumps(record))


if __name__ == "__main__":
    main(["bench", "train", *sys.argv[1:]])
