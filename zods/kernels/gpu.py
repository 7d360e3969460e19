"""combine_ for GPU tensors, in Triton: the bits of reference.py, in one pass over memory.

reference.py documents the layouts of the streams and the meaning of every constant. A program
computes one tile of 2048 elements, a multiple of every stream's group. Tiles lie on a grid of the
whole parameter, and the ends of the slice are masked. Each Philox block is therefore computed once
for all elements that use it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zods.kernels import reference

TILE = tl.constexpr(2048)
GAUSSIAN_STREAM, RADEMACHER_STREAM, ROUNDING_STREAM = (
    tl.constexpr(reference.STREAMS[name]) for name in ("gaussian", "rademacher", "rounding")
)
LOG, SIN, COS = (tl.constexpr(tuple(c)) for c in (reference.LOG, reference.SIN, reference.COS))
MINUS_2_LOG_2 = tl.constexpr(reference.MINUS_2_LOG_2)
SQRT_HALF_BITS = tl.constexpr(reference.SQRT_HALF_BITS)


@triton.jit
def _philox(block, parameter, stream: tl.constexpr, seed):
    """Compute the four words (uint32) of each block (int64)."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = parameter.to(tl.uint32), stream
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _polynomial(coefficients: tl.constexpr, x):
    value = tl.full(x.shape, coefficients[0], tl.float32)
    for i in tl.static_range(1, len(coefficients.value)):
        value = tl.fma(value, x, coefficients[i])
    return value


@triton.jit
def _box_muller(radius_word, angle_word):
    distance = tl.fma(radius_word.to(tl.int32, bitcast=True).to(tl.float32), 2.0**-32, 2.0**-33)
    u = tl.where(distance < 0, distance + 1.0, distance)
    bits = u.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    exponent = bits >> 23
    m = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, distance, m - 1.0)
    r = tl.sqrt_rn(tl.fma(exponent.to(tl.float32), MINUS_2_LOG_2, f * _polynomial(LOG, f)))
    r = (r.to(tl.uint32, bitcast=True) | (angle_word & 0x80000000)).to(tl.float32, bitcast=True)

    a = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    square = a * a
    sine, cosine = _polynomial(SIN, square) * a, _polynomial(COS, square)
    reflected = (angle_word & 0x40000000) != 0
    return r * tl.where(reflected, sine, cosine), r * tl.where(reflected, cosine, sine)


@triton.jit
def _stack(row0, row1, row2, row3):
    """Stack four rows (16 lanes of each group, flat) to (groups, 4, 16)."""
    # (groups * 16, 2, 2): the last index is the low bit of the row number.
    rows = tl.join(tl.join(row0, row2), tl.join(row1, row3))
    return tl.permute(tl.reshape(rows, [row0.shape[0] // 16, 16, 4]), [0, 2, 1])


@triton.jit
def _fields(tile, parameter, stream: tl.constexpr, seed, width: tl.constexpr):
    """Split the tile's words into fields of `width` bits, in the layout of reference.py."""
    blocks: tl.constexpr = TILE * width // 128
    w0, w1, w2, w3 = _philox(tile * blocks + tl.arange(0, blocks), parameter, stream, seed)
    shifts = (tl.arange(0, 32 // width) * width).to(tl.uint32)
    fields = _stack(w0, w1, w2, w3)[:, :, None, :] >> shifts[None, None, :, None]
    return tl.reshape(fields & (2**width - 1), [TILE])


@triton.jit
def _direction(tile, parameter, seed, rademacher: tl.constexpr):
    if rademacher:
        return tl.where(_fields(tile, parameter, RADEMACHER_STREAM, seed, 1) == 0, 1.0, -1.0)
    blocks: tl.constexpr = TILE // 4
    w0, w1, w2, w3 = _philox(tile * blocks + tl.arange(0, blocks), parameter, GAUSSIAN_STREAM, seed)
    x0, y0 = _box_muller(w0, w1)
    x1, y1 = _box_muller(w2, w3)
    return tl.reshape(_stack(x0, y0, x1, y1), [TILE])


@triton.jit
def _load(tensor, at, inside):
    """Load elements as float32. bfloat16 tensors are passed as int16."""
    value = tl.load(tensor + at, inside)
    if tensor.dtype.element_ty == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _store(tensor, at, inside, value, noise):
    if tensor.dtype.element_ty == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        increment = 0x7FFF + (bits >> 16 & 1)  # to nearest even
        if noise is not None:
            increment = tl.where(magnitude > 0x7F7F0000, increment, noise)
        value = tl.where(magnitude > 0x7F800000, 0x7FC0, (bits + increment) >> 16).to(tl.int16)
    tl.store(tensor + at, value, inside)


# Numbers that differ between parameters and calls are not specialized: each would compile another
# kernel. `offset` and `numel` are: if they are multiples of 16, loads and stores are vectorised.
@triton.jit(do_not_specialize=["parameter", "num_terms", "num_factors", "num_columns"])
def _combine(out, mirror, weight, scale, rounding_seed, seeds, coefficients, num_terms, parameter,
             offset, numel, left, right, num_factors, num_columns, dense, dense_coefficient,
             rademacher: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64) + offset // TILE
    start = tile * TILE
    element = tl.arange(0, TILE)
    at = start - offset + element
    inside = (at >= 0) & (at < numel)

    value = tl.zeros([TILE], tl.float32)
    mirrored = value
    for k in range(num_terms):
        z = _direction(tile, parameter, tl.load(seeds + k), rademacher)
        coefficient = tl.load(coefficients + k)
        value = tl.fma(z, coefficient, value)
        if mirror is not None:
            mirrored = tl.fma(z, tl.where(k == num_terms - 1, -coefficient, coefficient), mirrored)
    if left is not None:
        columns = num_columns.to(tl.int64)
        # Counted from the start of the tile's first row: a small number, so that the division is
        # cheap.
        column = start % columns + element
        row = column // columns
        column -= row * columns
        row += start // columns - offset // columns
        for q in range(num_factors):
            scales = tl.load(left + row * num_factors + q, inside)
            values = tl.load(right + columns * q + column, inside)
            value = tl.fma(scales, values, value)
            if mirror is not None:
                mirrored = tl.fma(scales, values, mirrored)
    if dense is not None:
        values = _load(dense, at, inside)
        value = tl.fma(values, dense_coefficient, value)
        if mirror is not None:
            mirrored = tl.fma(values, dense_coefficient, mirrored)
    if weight is not None:
        values = _load(weight, at, inside)
        value = tl.fma(values, scale, value)
        if mirror is not None:
            mirrored = tl.fma(values, scale, mirrored)

    noise = None
    if rounding_seed is not None:
        noise = _fields(tile, parameter, ROUNDING_STREAM, tl.load(rounding_seed), 16)
    if mirror is not None:
        _store(mirror, at, inside, mirrored, noise)
    _store(out, at, inside, value, noise)


@triton.jit(do_not_specialize=["parameter"])
def _directions(out, seeds, parameter, offset, numel, rademacher: tl.constexpr):
    # seeds are on the first axis, which may be longer than 65,535
    k = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64) + offset // TILE
    at = tile * TILE - offset + tl.arange(0, TILE)
    z = _direction(tile, parameter, tl.load(seeds + k), rademacher)
    tl.store(out + k * numel + at, tl.fma(z, 1.0, 0.0), (at >= 0) & (at < numel))


def directions(
    out: Tensor, seeds: list[int], distribution: str, parameter: int, offset: int
) -> None:
    """Write z(seeds[k], parameter, offset + i) into out[k, i]; out: (seeds, numel) float32."""
    if out.numel() == 0:
        return
    numel = out.shape[1]
    keys = torch.tensor(seeds, dtype=torch.uint64).view(torch.int64)
    num_tiles = (offset + numel - 1) // TILE.value - offset // TILE.value + 1
    with torch.cuda.device_of(out):
        _directions[(len(seeds), num_tiles)](
            out, keys.to(out.device, non_blocking=True), parameter, offset, numel,
            distribution == "rademacher", enable_fp_fusion=False,
        )  # fmt: skip


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
    """Run `reference.combine_` as a kernel on the current stream of out's device."""
    if out.numel() == 0:
        return

    def bits(tensor: Tensor | None) -> Tensor | None:
        return (
            tensor.view(torch.int16)
            if tensor is not None and tensor.dtype == torch.bfloat16
            else tensor
        )

    # The host tensors are not pinned: `to` copies them before it returns, without a wait for the
    # stream.
    keys = torch.tensor([rounding_seed or 0, *seeds], dtype=torch.uint64).view(torch.int64)
    keys = keys.to(out.device, non_blocking=True)
    scalars = torch.tensor(coefficients, dtype=torch.float32).to(out.device, non_blocking=True)
    left, right = factors or (None, None)
    num_factors, num_columns = (0, 1) if right is None else right.shape
    num_tiles = (offset + out.numel() - 1) // TILE.value - offset // TILE.value + 1
    # Triton launches on the current device. For a CPU tensor the context manager does nothing.
    with torch.cuda.device_of(out):
        # enable_fp_fusion=False: only an explicit fma is fused, no a * b + c.
        _combine[(num_tiles,)](
            bits(out), bits(mirror), bits(weight), scale, None if rounding_seed is None else keys,
            keys[1:], scalars, len(seeds), parameter, offset, out.numel(), left, right, num_factors,
            num_columns, bits(dense), dense_coefficient, distribution == "rademacher",
            enable_fp_fusion=False,
        )  # fmt: skip
