"""From logits to a token: the processors that shape a distribution, and the noise that a token is drawn with.

**Processors**, in their order: repetition penalty, temperature, top-k, top-p, min-p. The last three keep the tokens
from some logit on; that logit, the edge, is all that drawing needs of them, and tokens tied with it stay.

**Noise** is Gumbel's and belongs to a place of a text: it is a function of seed, row, position and token, and of
nothing else. A token drawn as argmax (log p + g) is an exact draw from p. Because g depends on the place alone, plain
decoding, a tree, another batch or another device draw the same token from the same p, and a drafter that ranks its
candidates with the same g guesses the draw and not only the distribution (Daliri, Musco, Suresh, arXiv 2408.07978).

The generator is a hash with counters: seed and number give a row 64 bits, a position turns them into its own key, a
token into 32 uniform bits. The exponential variate E = −ln U is resolved to 2⁻³³ near 0, where winners are made, and
g = −ln E. Both logarithms are one polynomial of float32 products and sums that are rounded one by one, so that a CPU
and a GPU agree in every bit: `hass_core.kernels.noise` repeats this arithmetic, and a test holds the two together.

Shapes: B rows, n positions a row, V vocabulary.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hass_core import kernels
from hass_core.config import SamplingConfig

NEVER = float("-inf")
COLDEST = 1e-5  # the least temperature; below it float32 cannot hold both the logits and the noise
LIKELIEST = 64  # tokens looked at first for a nucleus; the search goes on where they do not fill it
BISECTIONS = 24  # resolve a nucleus' edge on a GPU to 30 / 2^24 of a nat
LOG_FLOOR = -30.0  # tokens e^30 times less likely than the best one are never in a nucleus

DRAWS_VERSION = 2
"""What a seed means. 1: a position's coin inverts the cumulative distribution. 2: this noise decides."""

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

# a bijection of 32 bits by two multiplications and three shifts (lowbias32, C. Wellons)
FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B
SQRT_HALF_BITS = 0x3F3504F3  # of the float32 √½: mantissas are taken from [√½, √2)
LN_2 = 0.6931471824645996
# ln(1 + f) ≈ f + f²·Q(f) for 1 + f in [√½, √2), highest power first; relative error below 2e-7
LOG_POLYNOMIAL = (
    -0.10082265734672546,
    0.1618049293756485,
    -0.17243246734142303,
    0.1990688145160675,
    -0.249712273478508,
    0.3333471417427063,
    -0.5000032186508179,
)
MOST_NOISE = 22.9
BLOCK = 16384  # tokens at once: what stands between two steps stays in the processor's cache


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [...] of [..., V], and whether their logits are sound."""
    if kernels.usable(logits):
        log_probability, token_ids = top_tokens(logits, 1)
        return token_ids[..., 0], log_probability[..., 0].isfinite()
    top, token_ids = logits.max(-1)
    return token_ids, top.isfinite()


def probabilities(logits: Tensor, sampling: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The distribution a token is drawn from, float32 [..., V]; `seen` [..., V] marks tokens for the penalty."""
    shaped = logits.float() if seen is None else penalize(logits.float(), seen, sampling)
    if sampling.temperature < COLDEST:
        return torch.zeros_like(shaped).scatter_(-1, shaped.argmax(-1, keepdim=True), 1.0)
    shaped = shaped * (1 / sampling.temperature)
    lowest = edge(shaped, sampling)
    return (shaped if lowest is None else shaped.masked_fill(shaped < lowest, NEVER)).softmax(-1)


def penalize(logits: Tensor, seen: Tensor, sampling: SamplingConfig) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by the penalty (CTRL, arXiv 1909.05858)."""
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def edge(logits: Tensor, sampling: SamplingConfig, sharpness: float = 1.0) -> Tensor | None:
    """The lowest of sharpness · logits that top-k, top-p and min-p keep of [..., V], [..., 1]; None: they are off."""
    if not 0 < sampling.top_k < logits.shape[-1] and sampling.top_p == 1 and sampling.min_p == 0:
        return None
    shaped, found = logits.float() * sharpness, []
    if 0 < sampling.top_k < logits.shape[-1]:
        found.append(shaped.topk(sampling.top_k, dim=-1).values[..., -1:])
    if sampling.top_p < 1:
        kept = shaped.masked_fill(shaped < found[0], NEVER) if found else shaped
        found.append(nucleus_edge(kept, sampling.top_p))
    if sampling.min_p > 0:
        found.append(shaped.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return torch.stack(found).amax(0)


def nucleus_edge(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """The logit [..., 1] of the last of the likeliest tokens of [..., V] whose probability reaches `top_p`, a number or
    [..., 1]; the first always stays."""
    if logits.device.type != "cpu":  # a captured graph cannot look whether it has found enough
        return _bisected_edge(logits, top_p)
    mass, size = logits.logsumexp(-1, keepdim=True), logits.shape[-1]
    count = min(LIKELIEST, size)
    while True:
        ordered = logits.topk(count, dim=-1).values
        probability = (ordered - mass).exp()
        inside = probability.cumsum(-1) - probability < top_p
        if count == size or not bool(inside[..., -1].any()):
            return ordered.gather(-1, inside.sum(-1, keepdim=True).clamp(min=1) - 1)
        count = min(8 * count, size)


def _bisected_edge(logits: Tensor, top_p: float | Tensor) -> Tensor:
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp()
    wanted = top_p * weights.sum(-1, keepdim=True)
    low, high = torch.full_like(wanted, LOG_FLOOR), torch.zeros_like(wanted)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = torch.where(logits - highest >= middle, weights, 0.0).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return highest + low


def top_tokens(logits: Tensor, k: int, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, at most 0, and indices [..., k] of the k likeliest tokens of logits [..., V], best first; with
    `token_ids` [V], those instead of the indices.

    A log-probability is NaN where a logit of its row is NaN or +infinite.
    """
    if kernels.usable(logits):
        from hass_core.kernels.top_k import row_top_k  # Triton is there on a GPU only

        scores, index = row_top_k(logits.flatten(0, -2), k, token_ids)
        return scores.view(*logits.shape[:-1], k), index.view(*logits.shape[:-1], k)
    top, index = logits.topk(k, dim=-1)
    scores = (top.float() - logits.float().logsumexp(-1, keepdim=True)).clamp(max=0)
    return scores, index if token_ids is None else token_ids[index]


def stream(seed: int, row: int) -> tuple[int, int]:
    """The two unsigned 32-bit words that a row's noise hangs on; seed and row count modulo 2^64."""
    mixed = _splitmix(_splitmix(seed) + row)
    return mixed & 0xFFFFFFFF, mixed >> 32


def as_signed(row_streams: list[tuple[int, int]]) -> Tensor:
    """[B, 2] int32 of the words of streams."""
    return torch.from_numpy(np.array(row_streams, np.uint32).view(np.int32))


def gumbel(row_stream: tuple[int, int], position: int, token_ids: Words) -> Floats:
    """The noise [V] of `token_ids` [V], the target's, at one position: from −3.14 to 22.9, finite."""
    place, salt = position_key(row_stream, position)
    noise = np.empty(len(token_ids), np.float32)
    for start in range(0, len(token_ids), BLOCK):
        stop = start + BLOCK
        noise[start:stop] = gumbel_of(mix(mix(token_ids[start:stop] ^ place) + salt))
    return noise


def winner(logits: Floats, row_stream: tuple[int, int], position: int) -> int:
    """argmax (logits + noise) of [V], ties to the lower token; noise is made for those only that can win."""
    best = int(logits.argmax())
    reached = logits[best] + gumbel(row_stream, position, np.array([best], np.uint32))[0]
    able = np.flatnonzero(~(logits < reached - MOST_NOISE)).astype(np.uint32)
    return int(able[(logits[able] + gumbel(row_stream, position, able)).argmax()])


def position_key(row_stream: tuple[int, int], position: int) -> Words:
    """Two words [2]; no two positions of a row have the same first one."""
    first = mix(np.array([(position + row_stream[0]) % (1 << 32)], np.uint32))
    return np.concatenate([first, mix(first + np.uint32(row_stream[1]))])


def mix(x: Words) -> Words:
    """A bijection that mixes the bits of x well; products are modulo 2^32."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(FIRST_FACTOR)
    x ^= x >> 15
    x *= np.uint32(SECOND_FACTOR)
    x ^= x >> 16
    return x


def gumbel_of(bits: Words) -> Floats:
    """−ln(−ln U) of 32 uniform bits.

    The lower 31 bits give w in (0, ½], the distance of U from 0 where the highest bit is set, else from 1. Then E is
    −ln w or −ln(1 − w); the latter is near w, whose digits 1 − w has lost.
    """
    signed = bits.view(np.int32)
    w = (signed & 0x7FFFFFFF).astype(np.float32)
    w += np.float32(0.5)
    w *= np.float32(2.0**-32)
    from_zero = signed >> 31  # all bits set, or none
    side = (from_zero + 1).astype(np.float32)
    sign: Floats = 1 - side - side
    turned: Floats = w * sign
    f, exponent = _split(side + turned)  # w, or 1 − w
    digits, exact = f.view(np.int32), (-w).view(np.int32)
    digits ^= (digits ^ exact) & ~((from_zero | exponent) >> 31)  # −w where it is U's distance from 1, not yet halved
    return -_log(*_split(-_log(f, exponent)))


def _split(x: Floats) -> tuple[Floats, npt.NDArray[np.int32]]:
    """(f, k) with x = (1 + f)·2^k and 1 + f in [√½, √2), for normal x > 0."""
    bits = x.view(np.int32)
    exponent = (bits - np.int32(SQRT_HALF_BITS)) >> 23
    return (bits - (exponent << 23)).view(np.float32) - np.float32(1), exponent


def _log(f: Floats, exponent: npt.NDArray[np.int32]) -> Floats:
    """ln((1 + f)·2^exponent)."""
    total = np.float32(LOG_POLYNOMIAL[0]) * f
    for coefficient in LOG_POLYNOMIAL[1:-1]:
        total += np.float32(coefficient)
        total *= f
    total += np.float32(LOG_POLYNOMIAL[-1])
    total *= f * f
    total += f
    total += exponent.astype(np.float32) * np.float32(LN_2)
    return total


def _splitmix(state: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014)."""
    state = (state + 0x9E3779B97F4A7C15) % (1 << 64)
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    return state ^ (state >> 31)
