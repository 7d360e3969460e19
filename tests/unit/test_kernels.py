"""The kernels compute what reference.py defines, to the bit, and can always be had."""

import ctypes
import ctypes.util
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import bits, normal
from zods.kernels import DISTRIBUTIONS, combine_, direction, reference

SEEDS, COEFFICIENTS = [1, 2**64 - 1, 0xDEADBEEF12345678], [1e-3, -0.7, 2.0]


def by_reference(numel, dtype, *, weight=None, scale=1.0, seeds=(), coefficients=(),
                 distribution="gaussian", parameter, offset, factors=None, dense=None,
                 dense_coefficient=0.0, rounding_seed=None, mirror=None):  # fmt: skip
    out = torch.empty(numel, dtype=dtype)
    rounded = torch.tensor([scale, dense_coefficient, *coefficients], dtype=torch.float32).tolist()
    reference.combine_(out, mirror, weight, rounded[0], list(seeds), rounded[2:], distribution,
                       parameter, offset, factors, dense, rounded[1], rounding_seed)  # fmt: skip
    return out


# --- the definition ---


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123 1.14
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    c, k = ([int(word, 16) for word in text.split()] for text in (counter, key))
    block = torch.tensor([c[0] | c[1] << 32 if c[1] < 2**31 else (c[0] | c[1] << 32) - 2**64])
    got = reference.philox(block, c[2], c[3], k[0] | k[1] << 32)
    assert [f"{word.item():08x}" for word in got] == words.split()


def test_fma_rounds_once():
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = (
        normal(20000, seed) * 2.0 ** (10 * normal(20000, seed + 9)).round() for seed in (1, 2, 3)
    )
    # Products of two odd multiples of 2^-12 are ties of float32; the sign of a far smaller c must
    # decide them.
    odd = 1 + (2 * torch.arange(512) + 1) * 2.0**-12
    a, b, c = torch.cat([a, odd, odd, odd]), torch.cat([b, odd, odd, -odd]), torch.cat([
        c, *odd.new_tensor([[1e-30], [-1e-30], [1e-30]]).expand(3, 512)])  # fmt: skip
    exact = torch.tensor(
        [fmaf(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    )
    assert torch.equal(bits(reference.fma(a, b, c)), bits(exact))
    # so the cases are hard enough to tell
    assert not torch.equal((a.double() * b + c).float(), exact)
    assert reference.fma(torch.tensor(float("inf")), 1.0, 2.0) == float("inf")


def test_box_muller_is_within_1e_6_of_float64():
    edges = [
        0,
        1,
        2**29,
        2**30 - 1,
        2**30,
        2**31 - 1,
        2**31,
        2**31 + 1,
        3 * 2**30,
        2**32 - 2,
        2**32 - 1,
    ]
    generator = torch.Generator().manual_seed(0)
    word = torch.cat([torch.tensor(edges), torch.randint(2**32, (400,), generator=generator)])
    near_one = 2**32 - 1 - torch.arange(200)  # u close to 1: the smallest radii
    radius_word, angle_word = torch.cartesian_prod(torch.cat([word, near_one]), word).unbind(1)
    x, y = reference.box_muller(radius_word, angle_word)

    u, below_one = (
        (w + 0.5) * 2.0**-32 for w in (radius_word.double(), (2**32 - 1 - radius_word).double())
    )
    r = torch.sqrt(-2 * torch.where(u < 0.5, torch.log(u), torch.log1p(-below_one)))
    low = angle_word & (2**30 - 1)
    angle = (low - (low >> 29) * 2**30).double() * 2.0**-30 * (torch.pi / 2)
    angle = (
        torch.where(angle_word >> 30 & 1 == 1, torch.pi / 2 - angle, angle)
        + (angle_word >> 31).double() * torch.pi
    )
    for z, exact in ((x, r * angle.cos()), (y, r * angle.sin())):
        assert ((z - exact).abs() / exact.abs().clamp(min=1)).max() < 1e-6
        assert ((z - exact).abs() / r).max() < 4e-7  # so small radii are as good
    assert r.max() > 6.7
    assert (x.double() ** 2 + y.double() ** 2).sqrt().max() > 6.7


def test_layouts_are_those_documented():
    """Written out element by element, independently of the reshapes in reference.py."""

    def word(index, group, per_group_row, stream):
        row, lane = index % group // 16, index % 16
        block = torch.tensor([16 * (index // group) + lane])
        return row, [w.item() for w in reference.philox(block, 7, stream, 5)][row // per_group_row]

    at = 3 * 2048 + 100
    z = direction(5000, seed=5, distribution="rademacher", parameter=7, offset=at)
    for i in range(0, 5000, 37):
        row, w = word(at + i, 2048, 32, 1)
        assert z[i] == 1 - 2 * (w >> row % 32 & 1)
    z = direction(300, seed=5, distribution="gaussian", parameter=7, offset=at)
    for i in range(300):
        row, lane = (at + i) % 64 // 16, (at + i) % 16
        w = reference.philox(torch.tensor([16 * ((at + i) // 64) + lane]), 7, 0, 5)
        assert z[i] == reference.box_muller(*w[row // 2 * 2 :][:2])[row % 2]
    # Half an ulp of bfloat16 above 1 rounds up exactly where the noise has its top bit set.
    up = torch.ones(300, dtype=torch.bfloat16)
    combine_(up, weight=up, scale=1 + 2**-8, parameter=7, offset=at, rounding_seed=5)
    for i in range(300):
        row, w = word(at + i, 128, 2, 2)
        assert up[i] == 1 + (w >> 16 * (row % 2) >> 15 & 1) * 2**-7


# --- backends, slices, threads ---


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000, 5003])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cpp_and_reference_give_the_same_bits(cpp, distribution, numel):
    # element 2^34 is where a Gaussian block passes 2^32
    for offset in (
        0,
        13,
        2**32 - 500,
        2**34 - 500,
        2**45 + 2047,
    ):
        for dtype, rounding_seed in (
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.bfloat16, 99),
        ):
            weight, dense = normal(numel, 1, dtype), normal(numel, 2, dtype)
            terms = {"seeds": SEEDS, "coefficients": COEFFICIENTS, "distribution": distribution}
            for arguments in (
                {
                    "weight": weight,
                    "scale": 0.99,
                    "dense": dense,
                    "dense_coefficient": -0.1,
                    **terms,
                },
                {
                    "weight": weight,
                    "seeds": [3],
                    "coefficients": [1e-3],
                    "distribution": distribution,
                },
                {"dense": dense, "dense_coefficient": 3.0},
                terms,
                {},
            ):
                arguments |= {
                    "parameter": 2**31 - 1,
                    "offset": offset,
                    "rounding_seed": rounding_seed,
                }
                expected = by_reference(numel, dtype, **arguments)
                assert torch.equal(
                    bits(combine_(torch.empty(numel, dtype=dtype), **arguments)), bits(expected)
                )
                if arguments.get("weight") is not None:  # in place
                    arguments["weight"] = weight.clone()
                    assert torch.equal(
                        bits(combine_(arguments["weight"], **arguments)), bits(expected)
                    )


@pytest.mark.parametrize(
    ("numel", "columns"), [(0, 7), (5, 7), (1000, 7), (5003, 1), (5003, 3000), (5003, 6000)]
)
def test_cpp_and_reference_add_the_same_low_rank_matrix(cpp, numel, columns):
    for offset in (0, 13, 2**34 - 500):
        rows = (offset + numel) // columns - offset // columns + 1
        factors = normal(rows * 3, 1).view(rows, 3), normal(3 * columns, 2).view(3, columns)
        for dtype, rounding_seed in ((torch.float32, None), (torch.bfloat16, 99)):
            arguments = {"weight": normal(numel, 1, dtype), "scale": 0.99,
                         "dense": normal(numel, 2, dtype), "dense_coefficient": -0.1,
                         "seeds": [4], "coefficients": [0.5], "factors": factors,
                         "parameter": 3, "offset": offset,
                         "rounding_seed": rounding_seed}  # fmt: skip
            expected = by_reference(numel, dtype, **arguments)
            assert torch.equal(
                bits(combine_(torch.empty(numel, dtype=dtype), **arguments)), bits(expected)
            )


def test_factors_are_a_matrix_product_and_the_cut_does_not_show():
    left, right = normal(50 * 3, 1).view(50, 3), normal(3 * 37, 2).view(3, 37)
    whole = combine_(torch.empty(50 * 37), factors=(left, right), parameter=0, offset=0)
    # another order of three products
    torch.testing.assert_close(whole.view(50, 37), left @ right, rtol=1e-5, atol=1e-6)
    for start, stop in ((0, 1), (36, 38), (100, 900), (1849, 1850)):
        rows = left[start // 37 : (stop - 1) // 37 + 1].contiguous()
        part = combine_(torch.empty(stop - start), factors=(rows, right), parameter=0, offset=start)
        assert torch.equal(bits(part), bits(whole[start:stop]))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("seeds", [SEEDS, SEEDS[:1]])
def test_a_mirror_is_the_same_with_the_last_coefficient_negated(distribution, seeds):
    numel, coefficients = 9001, COEFFICIENTS[: len(seeds)]
    mirrored = [*coefficients[:-1], -coefficients[-1]]
    for dtype in (torch.float32, torch.bfloat16):
        arguments = {"weight": normal(numel, 4, dtype), "scale": 0.9, "seeds": seeds,
                     "distribution": distribution, "parameter": 5,
                     "offset": 2**34 - 4000}  # fmt: skip
        expected = [combine_(torch.empty(numel, dtype=dtype), coefficients=c, **arguments)
                    for c in (coefficients, mirrored)]  # fmt: skip
        mirror = torch.empty(numel, dtype=dtype)
        out = combine_(
            torch.empty(numel, dtype=dtype), mirror=mirror, coefficients=coefficients, **arguments
        )
        by_torch = torch.empty(numel, dtype=dtype)
        out_by_torch = by_reference(
            numel, dtype, mirror=by_torch, coefficients=coefficients, **arguments
        )
        assert torch.equal(bits(out), bits(expected[0]))
        assert torch.equal(bits(mirror), bits(expected[1]))
        assert torch.equal(bits(out_by_torch), bits(expected[0]))
        assert torch.equal(bits(by_torch), bits(expected[1]))


def test_cpp_and_reference_agree_over_many_gaussians(cpp):
    z = direction(200_000, seed=11, distribution="gaussian", parameter=2, offset=5)
    expected = by_reference(
        200_000, torch.float32, seeds=[11], coefficients=[1.0], parameter=2, offset=5
    )
    assert torch.equal(bits(z), bits(expected))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_equal_the_whole_for_any_cut(distribution, dtype):
    numel, offset = 9001, 2**34 - 4000
    weight = normal(numel, 4, dtype)
    arguments = {
        "seeds": SEEDS,
        "coefficients": COEFFICIENTS,
        "distribution": distribution,
        "parameter": 5,
        "rounding_seed": 3,
    }
    whole = combine_(torch.empty_like(weight), weight=weight, offset=offset, **arguments)
    cuts = random.Random(0)
    for _ in range(5):
        bounds = [0, *sorted(cuts.sample(range(1, numel), 6)), numel]
        parts = weight.clone()
        for start, stop in itertools.pairwise(bounds):
            combine_(
                parts[start:stop], weight=parts[start:stop], offset=offset + start, **arguments
            )
        assert torch.equal(bits(parts), bits(whole))


def test_reference_chunks_do_not_show(monkeypatch):
    arguments = {
        "seeds": SEEDS,
        "coefficients": COEFFICIENTS,
        "parameter": 5,
        "offset": 77,
        "rounding_seed": 3,
    }
    whole = by_reference(9001, torch.bfloat16, **arguments)
    monkeypatch.setattr(reference, "_CHUNK", 2048)
    assert torch.equal(bits(by_reference(9001, torch.bfloat16, **arguments)), bits(whole))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_thread_count_does_not_matter(distribution):
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(
            direction(200_001, seed=8, distribution=distribution, parameter=1, offset=31)
        )
    torch.set_num_threads(before)
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


def test_z_depends_on_every_bit_of_its_name():
    names = [{"seed": 0, "parameter": 0}] + [
        {"seed": 1 << k, "parameter": 0} for k in (0, 31, 32, 63)
    ]
    names += [{"seed": 0, "parameter": 1 << k} for k in (0, 30)]
    for distribution in DISTRIBUTIONS:
        made = [
            direction(256, distribution=distribution, offset=offset, **n)
            for n in names
            for offset in (0, 2**40)
        ]
        assert len({tuple(z.tolist()) for z in made}) == 2 * len(names)


def test_global_random_state_is_untouched():
    before = torch.get_rng_state(), random.getstate()
    combine_(
        torch.empty(5000, dtype=torch.bfloat16),
        seeds=[1],
        coefficients=[1.0],
        parameter=0,
        offset=0,
        rounding_seed=1,
    )
    by_reference(
        5000, torch.bfloat16, seeds=[1], coefficients=[1.0], parameter=0, offset=0, rounding_seed=1
    )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


# --- rounding to bfloat16 at the edges; wrong use ---


@pytest.mark.parametrize("rounding_seed", [None, 1])
def test_values_bfloat16_cannot_hold_are_passed_through(rounding_seed):
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), largest, -largest, 0.0, -0.0],
        dtype=torch.bfloat16,
    )
    values = values.repeat(300)
    arguments = {"weight": values, "parameter": 0, "offset": 0, "rounding_seed": rounding_seed}
    for result in (
        combine_(torch.empty_like(values), **arguments),
        by_reference(2100, torch.bfloat16, **arguments),
    ):
        torch.testing.assert_close(result, values, rtol=0, atol=0, equal_nan=True)
    # any payload, any sign
    nans = torch.tensor([0x7FFF, -1, 0x7F81] * 300, dtype=torch.int16).view(torch.bfloat16)
    arguments |= {"weight": nans}
    for result in (
        combine_(torch.empty_like(nans), **arguments),
        by_reference(900, torch.bfloat16, **arguments),
    ):
        assert (bits(result) == 0x7FC0).all()
    # Above the largest finite value nearest even decides: below half of the next step it stays,
    # then it is infinite.
    for factor, expected in ((1 + 2**-10, largest), (1 + 2**-8, float("inf"))):
        arguments |= {"weight": torch.full((500,), largest, dtype=torch.bfloat16), "scale": factor}
        for result in (
            combine_(torch.empty_like(values[:500]), **arguments),
            by_reference(500, torch.bfloat16, **arguments),
        ):
            assert set(result.tolist()) == {expected}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(4, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"out": torch.zeros(4, 2)[:, 0]}, "out must be contiguous"),
        ({"weight": torch.zeros(5)}, "weight must be like out"),
        ({"weight": torch.zeros(4, dtype=torch.bfloat16)}, "weight must be like out"),
        ({"dense": torch.zeros(4, device="meta")}, "dense must be like out"),
        ({"distribution": "uniform"}, "distribution must be one of"),
        ({"seeds": [1]}, "one coefficient per seed"),
        ({"seeds": [2**64], "coefficients": [1.0]}, "seed must be in"),
        ({"rounding_seed": -1}, "seed must be in"),
        ({"parameter": 2**31}, "parameter must be in"),
        ({"offset": -1}, "offset must be in"),
        ({"mirror": torch.zeros(5)}, "mirror must be like out"),
        ({"mirror": torch.zeros(4)}, "no coefficient to negate"),
        ({"factors": (torch.zeros(1, 2), torch.zeros(2, 2))}, r"factors must be \(2, Q\)"),
        (
            {"factors": (torch.zeros(2, 2), torch.zeros(2))},
            "right must be a contiguous float32 matrix",
        ),
    ],
)
def test_wrong_use_raises_before_anything_is_written(change, message):
    arguments = {"out": torch.zeros(4), "parameter": 0, "offset": 0} | change
    with pytest.raises(ValueError, match=message):
        combine_(arguments.pop("out"), **arguments)


# --- the build ---

FINGERPRINT = """
import hashlib, sys, warnings
sys.modules["zods.kernels._cpu"] = None  # an ahead-of-time kernel would prevent the build
from zods.kernels import DISTRIBUTIONS, backend, direction
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    made = [direction(3000, seed=4, distribution=d, parameter=1, offset=9) for d in DISTRIBUTIONS]
    name = backend()
digest = hashlib.sha256(b"".join(bytes(z.numpy()) for z in made)).hexdigest()
messages = [str(w.message) for w in caught if "reference serves" in str(w.message)]
print("RESULT", name, digest, len(messages), " ".join(messages).replace(chr(10), " "))
"""


def start(folder: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FINGERPRINT], stdout=subprocess.PIPE, text=True,
        start_new_session=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), **environment},
    )  # fmt: skip


def result(process: subprocess.Popen) -> list[str]:
    output, _ = process.communicate(timeout=300)
    return next(line for line in output.splitlines() if line.startswith("RESULT")).split(
        maxsplit=4
    )[1:]


def fingerprint() -> str:
    made = [direction(3000, seed=4, distribution=d, parameter=1, offset=9) for d in DISTRIBUTIONS]
    return hashlib.sha256(b"".join(bytes(z.numpy()) for z in made)).hexdigest()


@pytest.mark.launched
def test_without_a_compiler_the_reference_serves_with_one_warning_and_the_same_bits(tmp_path):
    name, digest, num_warnings, message = result(start(tmp_path, CXX="/nowhere/c++"))
    assert (name, digest, num_warnings) == ("reference", fingerprint(), "1")
    assert "there is no C++ compiler: '/nowhere/c++'" in message
    assert "slower" in message


@pytest.mark.launched
def test_a_killed_build_does_not_hang_later_ones_and_ranks_that_start_together_compile_once(
    cpp, tmp_path
):
    log, compiler = tmp_path / "log", tmp_path / "c++"
    # Unoptimised, to be quick; the bits must not depend on that either.
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *cpu.cpp*) echo >> {log};; esac\nexec c++ "$@" -O0\n'
    )
    compiler.chmod(0o755)
    killed = start(tmp_path, CXX=str(compiler))
    deadline = time.monotonic() + 300
    while (
        not (log.exists() and list(tmp_path.glob("zods_cpu_*/build-*/lock")))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.glob("zods_cpu_*/build-*/lock"))  # torch's own lock, left behind

    log.unlink()
    for process in [start(tmp_path, CXX=str(compiler)) for _ in range(2)]:
        assert result(process) == ["cpp", fingerprint(), "0"]
    assert log.read_text() == "\n"
    assert {path.name for path in tmp_path.glob("zods_cpu_*/*")} == {"_cpu.so", "building"}
