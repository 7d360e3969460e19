"""`replay_` and `fingerprint`.

`replay_` gives the bits of its sweeps applied one by one. The fingerprints of slices add up to the
fingerprint of the whole, and every change of one element changes it.
"""

import itertools
import math
import random

import pytest
import torch

from tests.helpers import bits, normal
from zods.kernels import DISTRIBUTIONS, Sweep, combine_, fingerprint, replay_
from zods.kernels import reference as plain

GOLDEN = 0x9E3779B97F4A7C15
DTYPES = [
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.float64,
]


@pytest.fixture
def reference(monkeypatch):
    """Called, it makes the reference serve for the rest of the test."""
    return lambda: monkeypatch.setattr("zods.kernels.cpu_module", lambda: None)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def some_sweeps(count: int, *, rounding: bool, directions: bool = True) -> list[Sweep]:
    """0 to 5 terms, every second scale 1, every third sweep without `dense`, the rounding seeds
    with a gap.
    """
    draw = random.Random(0)
    return [
        Sweep(
            scale=1.0 if s % 2 else 1 - 0.1 * draw.random(),
            seeds=[draw.getrandbits(64) for _ in range(s * 5 % 6 if directions else 0)],
            coefficients=[draw.gauss(0, 0.1) for _ in range(s * 5 % 6 if directions else 0)],
            dense_coefficient=0.0 if s % 3 == 0 else draw.gauss(0, 0.1),
            rounding_seed=draw.getrandbits(64) if rounding and s != 1 else None,
        )
        for s in range(count)
    ]


def one_by_one(out, sweeps, *, factors=None, dense=None, **common):
    for s, sweep in enumerate(sweeps):
        combine_(out, weight=out, scale=sweep.scale, seeds=sweep.seeds,
                 coefficients=sweep.coefficients,
                 factors=None if factors is None else (factors[0][s], factors[1][s]),
                 dense=dense if sweep.dense_coefficient != 0 else None,
                 dense_coefficient=sweep.dense_coefficient,
                 rounding_seed=sweep.rounding_seed, **common)  # fmt: skip
    return out


# --- replay_ ---


@pytest.mark.parametrize("with_dense", ["none", "another", "out itself"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize(
    ("numel", "offset"), [(1, 2047), (5003, 13), (90_001, 2**34 - 500), (6144, 4096), (0, 13)]
)
def test_replay_gives_the_bits_of_its_sweeps_one_by_one(
    threads, numel, offset, dtype, rounding, distribution, with_dense
):
    start, sweeps = normal(numel, seed=1, dtype=dtype), some_sweeps(9, rounding=rounding)
    common = {"distribution": distribution, "parameter": 7, "offset": offset}
    outs = [start.clone(), start.clone()]
    another = normal(numel, seed=2, dtype=dtype)
    for function, out in zip((replay_, one_by_one), outs, strict=True):
        dense = {"none": None, "another": another, "out itself": out}[with_dense]
        assert function(out, sweeps, dense=dense, **common) is out
    assert torch.equal(bits(outs[0]), bits(outs[1]))
    assert numel == 0 or not torch.equal(outs[0], start)


@pytest.mark.parametrize("directions", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize(
    ("numel", "offset", "columns"),
    [(5003, 13, 7), (90_001, 2**34 - 500, 3000), (1, 0, 1), (0, 13, 7)],
)
def test_replay_of_low_rank_factors_gives_the_bits_of_its_sweeps_one_by_one(
    threads, numel, offset, columns, dtype, rounding, directions
):
    sweeps = some_sweeps(7, rounding=rounding, directions=directions)
    rows = (offset + numel - 1) // columns - offset // columns + 1
    start, dense = normal(numel, seed=1, dtype=dtype), normal(numel, seed=2, dtype=dtype)
    for spare in (0, 2):  # rows of `left` that no element needs
        factors = normal((7, rows + spare, 3), seed=3), normal((7, 3, columns), seed=4)
        common = {
            "distribution": "gaussian",
            "parameter": 7,
            "offset": offset,
            "dense": dense,
            "factors": factors,
        }
        expected = one_by_one(start.clone(), sweeps, **common)
        assert torch.equal(bits(replay_(start.clone(), sweeps, **common)), bits(expected))


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cpp_and_reference_replay_the_same_bits(cpp, reference, distribution, dtype, rounding):
    sweeps, start = some_sweeps(7, rounding=rounding), normal(3001, seed=1, dtype=dtype)
    common = {"distribution": distribution, "parameter": 7, "offset": 2**34 - 500,
              "factors": (normal((7, 302, 2), seed=3), normal((7, 2, 10), seed=4)),
              "dense": normal(3001, seed=2, dtype=dtype)}  # fmt: skip
    out = replay_(start.clone(), sweeps, **common)
    reference()
    assert torch.equal(bits(out), bits(replay_(start.clone(), sweeps, **common)))


def test_a_replay_of_no_sweeps_changes_nothing(cpp, reference):
    start = normal(3001, seed=1, dtype=torch.bfloat16)
    for serve in (lambda: None, reference):
        serve()
        out = start.clone()
        assert replay_(out, [], distribution="gaussian", parameter=0, offset=0) is out
        factors = torch.zeros(0, 1, 2), torch.zeros(0, 2, 3001)
        replay_(out, [], distribution="gaussian", parameter=0, offset=0, factors=factors)
        assert torch.equal(bits(out), bits(start))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_replay_of_slices_equals_that_of_the_whole(distribution):
    sweeps, whole = some_sweeps(5, rounding=True), normal(9001, seed=1, dtype=torch.bfloat16)
    parts = whole.clone()
    replay_(whole, sweeps, distribution=distribution, parameter=7, offset=31)
    for start, stop in ((0, 1), (1, 4000), (4000, 4001), (4001, 9001)):
        replay_(
            parts[start:stop], sweeps, distribution=distribution, parameter=7, offset=31 + start
        )
    assert torch.equal(bits(parts), bits(whole))


def test_dense_is_left_out_where_its_coefficient_is_zero(reference):
    for serve in (lambda: None, reference):
        serve()
        out, dense = torch.ones(5), torch.full((5,), math.inf)
        replay_(
            out,
            [Sweep(2.0, [], []), Sweep(3.0, [], [])],
            distribution="gaussian",
            parameter=0,
            offset=0,
            dense=dense,
        )
        assert out.tolist() == [6.0] * 5
        # where combine_ is given one, 0 times it is added
        combine_(out, weight=out, parameter=0, offset=0, dense=dense)
        assert out.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(4, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"out": torch.zeros(4, 2)[:, 0]}, "out must be contiguous"),
        ({"dense": torch.zeros(5)}, "dense must be like out"),
        ({"distribution": "uniform"}, "distribution must be one of"),
        ({"sweeps": [Sweep(2.0, [], []), Sweep(1.0, [1], [])]}, "one coefficient per seed"),
        ({"sweeps": [Sweep(2.0, [], []), Sweep(1.0, [2**64], [1.0])]}, "seed must be in"),
        ({"sweeps": [Sweep(2.0, [], []), Sweep(1.0, [], [], rounding_seed=-1)]}, "seed must be in"),
        ({"parameter": 2**31}, "parameter must be in"),
        ({"offset": -1}, "offset must be in"),
        (
            {"factors": (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))},
            r"factors must be \(2, 2, Q\) and \(2, Q, columns\)",
        ),
        (
            {"factors": (torch.zeros(2, 1, 2), torch.zeros(2, 2, 2))},
            r"factors must be \(2, 2, Q\) and \(2, Q, columns\)",
        ),
        (
            {"factors": (torch.zeros(2, 2, 3), torch.zeros(2, 2, 2))},
            r"factors must be \(2, 2, Q\) and \(2, Q, columns\)",
        ),
        (
            {"factors": (torch.zeros(2, 2), torch.zeros(2, 2, 2))},
            "left must be a contiguous stack of float32 matrices",
        ),
        (
            {"factors": (torch.zeros(2, 2, 2), torch.zeros(2, 2, 2).mT)},
            "right must be a contiguous stack",
        ),
    ],
)
def test_wrong_use_of_replay_raises_before_anything_is_written(reference, change, message):
    for serve in (lambda: None, reference):
        serve()
        sweeps = [Sweep(2.0, [1], [1.0]), Sweep(1.0, [], [])]
        arguments = {
            "out": torch.zeros(4),
            "sweeps": sweeps,
            "distribution": "gaussian",
            "parameter": 0,
            "offset": 0,
        }
        arguments |= change
        out = arguments.pop("out")
        with pytest.raises(ValueError, match=message):
            replay_(out, **arguments)
        assert not out.any()


# --- fingerprint ---


def documented_sum(tensor: torch.Tensor, offset: int) -> int:
    size, total = tensor.element_size(), 0
    raw = bytes(tensor.flatten().view(torch.uint8).numpy())
    for i in range(tensor.numel()):
        x = (
            int.from_bytes(raw[size * i : size * (i + 1)], "little") + (offset + i + 1) * GOLDEN
        ) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        total += x ^ x >> 31
    return total % 2**64


def values(numel: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Every bit at random, NaNs and infinities too."""
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, (numel,), generator=draw).bool()
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(256, (numel * size,), generator=draw).to(torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fingerprint_is_the_documented_sum(threads, dtype):
    for numel, offset in ((0, 5), (1, 0), (7, 2**62 - 1), (1001, 2**33)):
        tensor = values(numel, dtype)
        expected = documented_sum(tensor, offset)
        assert fingerprint(tensor, offset) == expected
        assert plain.fingerprint(tensor, offset) == expected
    assert fingerprint(tensor.view(7, 143), offset) == expected  # read as flat
    assert fingerprint(torch.empty(0, dtype=dtype)) == 0


def test_the_fingerprint_of_one_zero_is_the_first_number_of_splitmix64():
    """0xE220A8397B1DCDAF is what java.util.SplittableRandom(0) and every port of it begin with."""
    assert fingerprint(torch.zeros(1)) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_and_reference_give_the_same_fingerprint(threads, monkeypatch, dtype):
    monkeypatch.setattr(plain, "_CHUNK", 2**14)
    tensor = values(140_007, dtype)  # enough for two threads
    assert fingerprint(tensor, 77) == plain.fingerprint(tensor, 77)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprints_of_slices_add_up_to_that_of_the_whole(dtype):
    tensor, cuts = values(200_003, dtype), random.Random(0)
    for _ in range(5):
        cut = [0, *sorted(cuts.sample(range(1, len(tensor)), 6)), len(tensor)]
        parts = [fingerprint(tensor[a:b], 99 + a) for a, b in itertools.pairwise(cut)]
        assert sum(parts) % 2**64 == fingerprint(tensor, 99)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bool])
def test_every_flipped_bit_changes_the_fingerprint(dtype):
    tensor = values(33, dtype)
    before, raw = fingerprint(tensor), tensor.view(torch.uint8)
    seen = {before}
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            seen.add(fingerprint(tensor))
            raw[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(raw)
    assert fingerprint(tensor) == before


def test_swapping_two_different_elements_changes_the_fingerprint():
    tensor = torch.arange(40, dtype=torch.float32)
    before = fingerprint(tensor)
    for i in range(40):
        for j in range(i):
            order = list(range(40))
            order[i], order[j] = j, i
            assert fingerprint(tensor[order]) != before


def test_wrong_use_of_fingerprint_raises():
    with pytest.raises(ValueError, match=r"1, 2, 4 or 8 bytes, got torch\.complex128"):
        fingerprint(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="tensor must be contiguous"):
        fingerprint(torch.zeros(4, 2)[:, 0])
    for offset in (-1, 2**62):
        with pytest.raises(ValueError, match="offset must be in"):
            fingerprint(torch.zeros(2), offset)
