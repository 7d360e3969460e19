"""Bit-exact definition of a direction z, in plain PyTorch on any device.

Every other backend is tested against this file.

z(seed, parameter, index) is a pure function: Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") with the 64-bit seed as its key and (block low, block high, parameter,
stream) as its counter. A block is four 32-bit words. `index` counts the elements of the flat whole
parameter, so that any slice of z can be computed anywhere.

Sixteen consecutive blocks make one group of elements. Element e of group G uses the block
16 G + e % 16. In this layout every lane of a vector register computes elements of its own lane.
With row = e // 16, the element uses of this block:

    stream       group size    part of the block
    gaussian             64    Box-Muller on words (0, 1): row 0 is the cosine, row 1 the sine;
                               on words (2, 3): rows 2 and 3
    rademacher         2048    bit row % 32 of word row // 32; a set bit is -1
    rounding            128    half row % 2 (0: the low half) of word row // 2

The floats have the same bits everywhere, too. They are computed only with operations that IEEE 754
rounds correctly (conversion, addition, product, fused multiply-add, square root), in a fixed order.
No library's logarithm, sine or cosine is used.
"""

import torch
from torch import Tensor

STREAMS = {"gaussian": 0, "rademacher": 1, "rounding": 2}
GROUPS = {"gaussian": 64, "rademacher": 2048, "rounding": 128}
# Elements computed at a time. It bounds the temporaries to some tens of MB, and is a multiple of
# every group.
_CHUNK = 2**20
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants, as int64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _float32s(hexadecimal: str) -> list[float]:
    return [float.fromhex(number) for number in hexadecimal.split()]


# Minimax polynomials (Remez), constant term last. Errors of LOG, SIN and COS: 2.6e-8 relative,
# 2.4e-9 absolute and 2.8e-8 absolute.
LOG = _float32s(  # -2 log(1 + f) / f, sqrt(1/2) <= 1 + f <= sqrt(2)
    "-0x1.654488p-3 0x1.263BA2p-2 -0x1.3238FP-2 0x1.5332A4p-2 -0x1.98B748p-2 0x1.00057p-1 "
    "-0x1.555792p-1 0x1.FFFFF8p-1 -0x1p1"
)
SIN = _float32s(  # sin(pi/4 a) / a as a polynomial in a^2, |a| <= 1
    "-0x1.2D9BB8p-15 0x1.465EC6p-9 -0x1.4ABBBAp-4 0x1.921FB6p-1"
)
COS = _float32s(  # cos(pi/4 a) as a polynomial in a^2, |a| <= 1
    "-0x1.4E5ED6p-12 0x1.03AF5Cp-6 -0x1.3BD392p-2 0x1p0"
)
MINUS_2_LOG_2 = float.fromhex("-0x1.62E43p0")
SQRT_HALF_BITS = 0x3F3504F3


def philox(blocks: Tensor, parameter: int, stream: int, seed: int) -> list[Tensor]:
    """The four words (int64, each in [0, 2^32)) of each block (int64) under the key `seed`."""
    c0, c1 = blocks & _MASK, blocks >> 32 & _MASK
    c2, c3 = torch.full_like(blocks, parameter), torch.full_like(blocks, stream)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        # int64 wraps: these are the 64 bits of the unsigned products.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c, rounded once to float32.

    The arguments are float32 tensors, or numbers that float32 can represent. The product is exact
    in float64. Its sum with c is rounded to odd (53 bits are more than 24 + 2). The later rounding
    to float32 therefore cannot meet a tie that the first rounding created (Boldo and Melquiond
    2008).
    """
    product = a.double() * b
    total = product + c
    virtual = total - product
    # Knuth's TwoSum: the exact error of `total`.
    error = (product - (total - virtual)) + (c - virtual)
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)  # one unit away from zero, or towards it
    inexact = (error > 0) | (error < 0)  # false if an infinity made the error NaN
    bits = torch.where(inexact & (bits & 1 == 0), bits + step, bits)
    return bits.view(torch.float64).float()


def _sqrt(x: Tensor) -> Tensor:
    """The square root, rounded once to float32.

    torch.sqrt in float32 is not correctly rounded on CPUs where a vector library computes it (one
    root in six is off by an ulp). No root of a float32 lies within 2^-50 of a tie, so that a
    float64 root that is off by an ulp still rounds correctly.
    """
    return torch.sqrt(x.double()).float()


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, coefficient)
    return value


def _signed(words: Tensor) -> Tensor:
    """Convert words (int64; the low 32 bits count) to signed 32-bit integers."""
    return (words & _MASK ^ 0x80000000) - 0x80000000


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """r cos(theta) and r sin(theta) with r = sqrt(-2 log u).

    Both are within 1e-6 of the exact values for these words. u = (radius_word + 1/2) / 2^32, so
    that r is at most 6.76. Near 1, u is represented as u - 1: small radii would lose digits
    otherwise. The low 30 bits of angle_word, signed, are theta in [-pi/4, pi/4). Bit 30 reflects
    theta at the diagonal, and bit 31 negates both results.
    """
    distance = fma(_signed(radius_word).float(), 2.0**-32, 2.0**-33)  # u where u <= 1/2, else u - 1
    u = torch.where(distance < 0, distance + 1.0, distance)
    bits = u.view(torch.int32) - SQRT_HALF_BITS
    exponent = bits >> 23  # u = 2^exponent m with sqrt(1/2) <= m < sqrt(2)
    m = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    # exponent 0 means u > 0.7, where `distance` is u - 1.
    f = torch.where(exponent == 0, distance, m - 1.0)
    r = _sqrt(fma(exponent.float(), MINUS_2_LOG_2, f * _polynomial(LOG, f)))
    r = torch.where(angle_word & 0x80000000 != 0, -r, r)

    a = _signed(angle_word << 2).float() * 2.0**-31
    square = a * a
    sine, cosine = _polynomial(SIN, square) * a, _polynomial(COS, square)
    reflected = angle_word & 0x40000000 != 0
    return r * torch.where(reflected, sine, cosine), r * torch.where(reflected, cosine, sine)


def _words(
    stream: str, seed: int, parameter: int, start: int, stop: int, device: torch.device
) -> tuple[list[Tensor], slice]:
    """Compute the words (groups, 16) of the groups that cover the elements [start, stop).

    Returns the words, and the position of [start, stop) in the groups' elements as a slice.
    """
    size = GROUPS[stream]
    first = start // size
    groups = torch.arange(first, -(-stop // size), device=device)
    blocks = 16 * groups[:, None] + torch.arange(16, device=device)
    return philox(blocks, parameter, STREAMS[stream], seed), slice(
        start - first * size, stop - first * size
    )


def _fields(words: list[Tensor], width: int) -> Tensor:
    """Split each word into fields of `width` bits, the lowest first.

    Returns (groups, 4 words, 32 / width fields, 16 lanes), flattened.
    """
    shifts = torch.arange(0, 32, width, device=words[0].device)
    return ((torch.stack(words, 1)[:, :, None, :] >> shifts[:, None]) & (2**width - 1)).flatten()


def _direction(
    seed: int, distribution: str, parameter: int, start: int, stop: int, device: torch.device
) -> Tensor:
    words, inside = _words(distribution, seed, parameter, start, stop, device)
    if distribution == "rademacher":
        return (1 - 2 * _fields(words, 1)[inside]).float()
    rows = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    return torch.stack(rows, 1).flatten()[inside]  # (groups, 4 rows, 16 lanes)


def to_bfloat16(value: Tensor, noise: Tensor | None) -> Tensor:
    """Round float32 to bfloat16, to nearest even or stochastically.

    noise: None: round to nearest even. Otherwise 16 random bits per element: they are added below
    the last kept bit, and the lower bits are then dropped. Beyond the largest finite bfloat16 there
    is no finite upper neighbour, so that values are rounded to nearest even, as are infinities.
    Every NaN becomes 0x7fc0.
    """
    bits = value.view(torch.int32).long() & _MASK
    magnitude = bits & 0x7FFFFFFF
    nearest = 0x7FFF + (bits >> 16 & 1)
    increment = nearest if noise is None else torch.where(magnitude > 0x7F7F0000, nearest, noise)
    rounded = torch.where(magnitude > 0x7F800000, 0x7FC0, (bits + increment) >> 16)
    return rounded.to(torch.int16).view(torch.bfloat16)


def directions(
    out: Tensor, seeds: list[int], distribution: str, parameter: int, offset: int
) -> None:
    """Write z(seeds[k], parameter, offset + i) into out[k, i]."""
    for row, seed in zip(out, seeds, strict=True):
        combine_(
            *(row, None, None, 1.0, [seed], [1.0], distribution, parameter, offset),
            *(None, None, 0.0, None),
        )


def combine_(
    out: Tensor,
    mirror: Tensor | None,
    weight: Tensor | None,
    scale: float,
    seeds: list[int],
    coefficients: list[float],
    distribution: str,
    parameter: int,
    offset: int,
    factors: tuple[Tensor, Tensor] | None,
    dense: Tensor | None,
    dense_coefficient: float,
    rounding_seed: int | None,
) -> None:
    """The reference of `zods.kernels.combine_`.

    The arguments must have been checked. Tensors are flat, and float32 can represent the scalars.
    """
    outputs = [(out, coefficients)]
    if mirror is not None:  # first, because `out` may be `weight`
        outputs.insert(0, (mirror, [*coefficients[:-1], -coefficients[-1]]))
    for begin in range(0, out.numel(), _CHUNK):
        piece = slice(begin, min(begin + _CHUNK, out.numel()))
        start, stop = offset + piece.start, offset + piece.stop
        for to, scalars in outputs:
            value = torch.zeros(stop - start, device=out.device)
            for seed, coefficient in zip(seeds, scalars, strict=True):
                value = fma(
                    _direction(seed, distribution, parameter, start, stop, out.device),
                    coefficient,
                    value,
                )
            if factors is not None:
                left, right = factors
                index = torch.arange(start, stop, device=out.device)
                rows = index // right.shape[1] - offset // right.shape[1]
                for column, row in zip(left.T, right, strict=True):
                    value = fma(column[rows], row[index % right.shape[1]], value)
            if dense is not None:
                value = fma(dense[piece].float(), dense_coefficient, value)
            if weight is not None:
                value = fma(weight[piece].float(), scale, value)
            if to.dtype == torch.float32:
                to[piece] = value
                continue
            noise = None
            if rounding_seed is not None:
                words, inside = _words(
                    "rounding", rounding_seed, parameter, start, stop, out.device
                )
                noise = _fields(words, 16)[inside]
            to[piece] = to_bfloat16(value, noise)


def fingerprint(tensor: Tensor, offset: int) -> int:
    """The reference of `zods.kernels.fingerprint`, for a flat tensor and checked arguments.

    int64 arithmetic wraps, so that sums are modulo 2^64.
    """
    size = tensor.element_size()
    words = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    total = 0
    for begin in range(0, words.numel(), _CHUNK):
        x = words[begin : begin + _CHUNK].long() & (2 ** (8 * size) - 1 if size < 8 else -1)
        x += (
            torch.arange(offset + begin + 1, offset + begin + 1 + x.numel(), device=x.device)
            * _GOLDEN
        )
        for shift, factor in ((30, _MIX[0]), (27, _MIX[1]), (31, 1)):
            x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor
        total += int(x.sum())
    return total % 2**64
