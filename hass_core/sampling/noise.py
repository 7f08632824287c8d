"""Gumbel noise that belongs to a place of a text: a function of seed, row, position and token, and of nothing else.

A token drawn as argmax (log p + g) is an exact draw from p. Because g depends on the place alone, plain decoding, a
tree, another batch or another device draw the same token from the same p, and a drafter that ranks its candidates with
the same g guesses the draw and not only the distribution (Daliri, Musco, Suresh, arXiv 2408.07978).

The generator is a hash with counters: seed and number give a row 64 bits, a position turns them into its own key, a
token into 32 uniform bits. The exponential variate E = −ln U is resolved to 2⁻³³ near 0, where winners are made, and
g = −ln E. Both logarithms are one polynomial of float32 products and sums that are rounded one by one, so that a CPU
and a GPU agree in every bit: `hass_core.kernels.noise` repeats this arithmetic, and a test holds the two together.

Shapes: B rows, n positions a row, V tokens.
"""

import numpy as np
import numpy.typing as npt

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


def stream(seed: int, row: int) -> tuple[int, int]:
    """The two unsigned 32-bit words that a row's noise hangs on; seed and row count modulo 2^64."""
    mixed = _splitmix(_splitmix(seed) + row)
    return mixed & 0xFFFFFFFF, mixed >> 32


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
