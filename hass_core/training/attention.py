"""Attention of an alignment step: one softmax over a causal part and a few diagonal terms.

At step j the query of anchor r sees the keys of the verified features up to r, and one key of its own chain for each of
the steps 2..j. A kernel computes the causal part and its log-sum-exp; the diagonal terms are merged in:

    lse = log(exp(lse_causal) + Σ_i exp(t_i))        t_i = scale · ⟨q, k_i⟩
    out = exp(lse_causal - lse) · out_causal + Σ_i exp(t_i - lse) · v_i

Given the merged out and lse, a flash kernel's backward pass returns the exact gradient of the causal part, because all
it takes from them are the probabilities exp(s - lse) and the row sums of out · dout. So n steps cost n causal passes
and share the keys and values of the first one.

Shapes: N rows, Q queries, A heads, KV key-value heads, d head size, E diagonal terms.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.training.batch import Documents

FLASH_DTYPES = (torch.bfloat16, torch.float16)  # of a GPU's kernel; in others the host looks where conversations lie


class Kernel(Protocol):
    """Causal attention within documents. `out` [A, Q, d], `lse` [A, Q] float32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Documents, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, where: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@torch.compiler.disable()  # the kernels are compiled already
def attend(
    queries: Tensor, keys: Tensor, values: Tensor, own_keys: list[Tensor], own_values: list[Tensor], where: Documents
) -> Tensor:
    """Attended values [A, Q, d].

    `queries` [A, Q, d] see `keys`, `values` [KV, N, d] of their document up to their own row, and at the same row the
    `own_keys`, `own_values` (each [KV, Q, d]) of the chain's earlier steps and of this one.
    """
    kernel = kernel_for(queries)
    scale = 1 / math.sqrt(queries.shape[-1])
    grouped = queries.unflatten(0, (keys.shape[0], -1))  # [KV, A/KV, Q, d]
    terms = [scale * (grouped * key[:, None]).sum(-1, dtype=torch.float32).flatten(0, 1) for key in own_keys]
    out = MergedAttention.apply(kernel, where, scale, queries, keys, values, len(terms), *terms, *own_values)
    assert isinstance(out, Tensor)
    return out


class MergedAttention(torch.autograd.Function):
    """The causal part by a kernel, merged with diagonal terms; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, where: Documents, scale: float, q, k, v, count: int, *own: Tensor) -> Tensor:
        terms, values = own[:count], own[count:]
        out, lse_causal = kernel.forward(q, k, v, where, scale)
        lse = lse_causal
        for term in terms:
            lse = torch.logaddexp(lse, term)
        if terms:
            out = out * (lse_causal - lse).exp()[..., None].to(out.dtype)
        for term, value in zip(terms, values, strict=True):
            out = _add_weighted(out, (term - lse).exp(), value)
        ctx.kernel, ctx.where, ctx.scale, ctx.count = kernel, where, scale, count
        ctx.save_for_backward(q, k, v, out, lse, *own)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *own = ctx.saved_tensors
        terms, values = own[: ctx.count], own[ctx.count :]
        dout = gradients[0].contiguous()
        dq, dk, dv = ctx.kernel.backward(dout, q, k, v, out, lse, ctx.where, ctx.scale)
        row_sum = (dout * out).sum(-1, dtype=torch.float32) if terms else None
        dterms, dvalues = [], []
        for term, value in zip(terms, values, strict=True):
            weight = (term - lse).exp()
            grouped = dout.unflatten(0, (value.shape[0], -1))
            dot = (grouped * value[:, None]).sum(-1, dtype=torch.float32).flatten(0, 1)
            dterms.append(weight * (dot - row_sum))
            dvalues.append((grouped * weight.unflatten(0, (value.shape[0], -1))[..., None].to(dout.dtype)).sum(1))
        return None, None, None, dq, dk, dv, None, *dterms, *dvalues


def _add_weighted(out: Tensor, weight: Tensor, value: Tensor) -> Tensor:
    groups = (value.shape[0], -1)
    added = weight.unflatten(0, groups)[..., None].to(out.dtype) * value[:, None]
    return out + added.flatten(0, 1)


class ByConversation(ABC):
    """Attends within one conversation after the other: no padding, and no score of two of them.

    Shapes of one with L rows: queries, keys and values [1, A, L, d], of which the last rows have queries.
    """

    @abstractmethod
    def one_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attended values [1, A, L, d] and log-sum-exp [1, A, L] of one conversation."""

    @abstractmethod
    def one_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by q, k and v; rows without a query have an infinite `lse`, which makes them weigh nothing."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Documents, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=_precise(q))
        for rows, queries in where.slices():
            shared = _shared(k[:, rows], v[:, rows], heads=len(q))
            part, part_lse = self.one_forward(_square(q[:, queries], rows), *shared, scale)
            count = queries.stop - queries.start
            out[:, queries], lse[:, queries] = part[0, :, -count:], part_lse[0, :, -count:]
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, where: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        groups = (len(k), -1)
        for rows, queries in where.slices():
            own_lse = _square(lse[:, queries, None], rows, fill=math.inf)[..., 0]
            shared = _shared(k[:, rows], v[:, rows], heads=len(q))
            dout_part, q_part, out_part = (_square(x[:, queries], rows) for x in (dout, q, out))
            dq_part, dk_part, dv_part = self.one_backward(dout_part, q_part, *shared, out_part, own_lse, scale)
            dq[:, queries] = dq_part[0, :, queries.start - queries.stop :]
            dk[:, rows], dv[:, rows] = dk_part[0].unflatten(0, groups).sum(1), dv_part[0].unflatten(0, groups).sum(1)
        return dq, dk, dv


class PlainKernel(ByConversation):
    """Scores written out, on any device and in any dtype: the twin that the fast kernels are held against."""

    def one_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, scale)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse

    def one_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = (self._scores(q, k, scale) - lse[..., None]).exp()
        ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
        p, ds = p.to(q.dtype), ds.to(q.dtype)
        return ds @ k, ds.mT @ q, p.mT @ dout

    @staticmethod
    def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        # −inf, not 0: a masked key takes no share of the softmax
        return ((q @ k.mT).to(_precise(q)) * scale).masked_fill(future, -math.inf)


class CpuFlashKernel(ByConversation):
    """PyTorch's flash attention for CPUs."""

    def one_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)

    def one_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, True, scale=scale
        )


class CudaFlashKernel:
    """PyTorch's built-in FlashAttention for sequences of different lengths; bf16 or fp16."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Documents, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), where.cu_seqlens_q, where.cu_seqlens_k,
            where.max_seqlen_q, where.max_seqlen_k, 0.0, True, False, scale=scale,
        )  # fmt: skip
        return out.transpose(0, 1), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, where: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state: there is no dropout
        gradients = torch.ops.aten._flash_attention_backward(
            *(x.transpose(0, 1).contiguous() for x in (dout, q, k, v, out)), lse, where.cu_seqlens_q,
            where.cu_seqlens_k, where.max_seqlen_q, where.max_seqlen_k, 0.0, True, unused, unused, scale=scale,
        )  # fmt: skip
        dq, dk, dv = (gradient.transpose(0, 1) for gradient in gradients)
        return dq, dk, dv


def kernel_for(queries: Tensor) -> Kernel:
    """The fastest kernel that computes in the queries' device and dtype."""
    if queries.device.type == "cuda" and queries.dtype in FLASH_DTYPES:
        return CudaFlashKernel()
    if queries.device.type == "cpu" and queries.dtype in (torch.bfloat16, torch.float32):
        return CpuFlashKernel()
    return PlainKernel()


def _square(x: Tensor, rows: slice, fill: float = 0.0) -> Tensor:
    """[1, A, L, d] from the queries [A, Lq, d] of a conversation, its last rows."""
    missing = rows.stop - rows.start - x.shape[1]
    return F.pad(x, (0, 0, missing, 0), value=fill)[None]


def _shared(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[1, A, L, d] from [KV, L, d]."""
    return (k.repeat_interleave(heads // len(k), 0)[None], v.repeat_interleave(heads // len(v), 0)[None])


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
