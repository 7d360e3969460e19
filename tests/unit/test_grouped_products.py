"""Products of groups of rows: what they compute, alone and in any groups, with and without the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import normal
from zods.kernels import grouped_products
from zods.kernels.grouped_products import add_products_, project_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# groups of different sizes, one of them empty; more columns than the kernel handles at a time
BOUNDS, COLUMNS, INNER, COMMON = [0, 5, 5, 6, 13], 2051, 3, 2
ROWS, GROUPS = BOUNDS[-1], len(BOUNDS) - 1


@pytest.fixture(params=[True, False], ids=["kernel", "without the kernel"])
def with_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(grouped_products, "cpu_module", lambda: None)
    return request.param


def group_of_rows() -> Tensor:
    return torch.arange(GROUPS).repeat_interleave(torch.tensor(BOUNDS).diff())


@pytest.mark.parametrize("columns", [1, 63, 64, COLUMNS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_is_multiplied_by_the_factors_of_its_group(with_kernel, dtype, columns):
    x = normal((ROWS, columns), 0, dtype)
    factors = normal((GROUPS, INNER, columns), 1)
    inner = torch.full((ROWS, INNER + 1), 7.0)
    project_(inner, x, factors, BOUNDS)
    expected = torch.einsum("rc,rqc->rq", x.double(), factors.double()[group_of_rows()])
    # float32 sums of `columns` products of some units, whose errors add up like a random walk
    assert (inner[:, :INNER] - expected).abs().max() < 16 * 2.0**-23 * columns**0.5
    assert (inner[:, INNER:] == 7.0).all()


@pytest.mark.parametrize("with_common", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_the_product_of_its_group_added(with_kernel, dtype, with_common):
    out, inner = normal((ROWS, COLUMNS), 0, dtype), normal((ROWS, INNER), 1)
    outer = normal((GROUPS, INNER, COLUMNS), 2)
    common = (normal((ROWS, COMMON), 3), normal((COMMON, COLUMNS), 4)) if with_common else None
    expected = 0.9 * out.double()
    expected += torch.einsum("rq,rqc->rc", inner.double(), outer.double()[group_of_rows()])
    if common is not None:
        expected += common[0].double() @ common[1].double()
    add_products_(out, inner, outer, BOUNDS, scale=0.9, common=common)
    unit = torch.finfo(dtype).eps
    assert ((out - expected).abs() <= unit / 2 * expected.abs() + 1e-5).all()


def test_many_factors_are_multiplied_in_the_dtype_of_the_rows(with_kernel):
    x, factors = normal((ROWS, 64), 0, torch.bfloat16), normal((GROUPS, 9, 64), 1)
    inner = project_(torch.empty(ROWS, 9), x, factors, BOUNDS)
    expected = torch.einsum("rc,rqc->rq", x.double(), factors.double()[group_of_rows()])
    # factors and sums of about 8 are rounded to bfloat16
    assert (inner - expected).abs().max() < 4 * 2.0**-8 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_does_not_round_the_sums(with_kernel, dtype):
    out, inner = torch.zeros(ROWS, 8, dtype=dtype), torch.full((ROWS, 2), 1 + 2.0**-10)
    with torch.autocast("cpu", torch.bfloat16):
        add_products_(out, inner, torch.ones(GROUPS, 2, 8), BOUNDS)
        project_(inner, torch.full((ROWS, 1), 1 + 2.0**-10), torch.ones(GROUPS, 1, 1), BOUNDS)
    assert (out == 2 + 2.0**-9).all()
    assert (inner == 1 + 2.0**-10).all()


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_other_rows_and_the_threads(dtype, threads, monkeypatch):
    monkeypatch.setattr(grouped_products, "_threads", lambda products: threads)
    x, factors = normal((ROWS, COLUMNS), 0, dtype), normal((GROUPS, INNER, COLUMNS), 1)
    inner = project_(torch.empty(ROWS, INNER), x, factors, BOUNDS)
    out = add_products_(x.clone(), inner, factors, BOUNDS)
    for g in range(GROUPS):
        for row in range(BOUNDS[g], BOUNDS[g + 1]):
            alone, of_group = x[row : row + 1].clone(), factors[g : g + 1]
            found = project_(torch.empty(1, INNER), alone, of_group, [0, 1])
            assert found.equal(inner[row : row + 1])
            add_products_(alone, found, of_group, [0, 1])
            assert alone.equal(out[row : row + 1])


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.empty(ROWS, 8, 1)},
        {"inner": torch.empty(ROWS, 1)},
        {"inner": torch.empty(ROWS, 2, dtype=torch.float64)},
        {"x": torch.empty(ROWS - 1, 8)},
        {"x": torch.empty(8, ROWS).T},
        {"factors": torch.empty(GROUPS, 2, 9)},
        {"bounds": BOUNDS[:-1]},
        {"bounds": [0, 6, 5, 6, 13]},
        {"bounds": [*BOUNDS[:-1], 14]},
    ],
)
def test_what_does_not_fit_is_refused(change):
    given = {
        "inner": torch.empty(ROWS, 2),
        "x": torch.empty(ROWS, 8),
        "factors": torch.empty(GROUPS, 2, 8),
        "bounds": BOUNDS,
    } | change
    with pytest.raises(ValueError, match=r"got|must be"):
        project_(given["inner"], given["x"], given["factors"], given["bounds"])
    with pytest.raises(ValueError, match=r"got|must be"):
        add_products_(given["x"], given["inner"], given["factors"], given["bounds"])
