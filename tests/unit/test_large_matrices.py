"""A large matrix at a point is never copied whole where rows or blocks of it serve, and gives the
same values.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.unit.perturbed import output_at, perturbed_forward
from zods.core.directions import Direction
from zods.core.points import Point
from zods.forward import large_matrices
from zods.forward.module_runners import StackRunner
from zods.forward.peak_memory import peak_memory
from zods.params.shards import ShardedParameters

ROWS, WIDTH, EPS = 4096, 32, 1e-2
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_matrices_are_large(monkeypatch):
    monkeypatch.setattr(large_matrices, "LARGE_BYTES", ROWS * WIDTH * 2)
    # several blocks, the last one shorter
    monkeypatch.setattr(large_matrices, "BLOCK_BYTES", 1000 * WIDTH * 4)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma has."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 0.5


class Language(nn.Module):
    """An embedding and a head over a vocabulary, tied or not, with or without a bias."""

    def __init__(
        self, embedding: type[nn.Embedding] = nn.Embedding, tied: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.embed = embedding(ROWS, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(self.embed(ids))))


class ReadsAllRows(nn.Embedding):
    """Looks rows up, and uses the matrix in another way too."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) - self.weight.mean(0)


class Normalised(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, functional.normalize(self.weight, dim=-1))


MODELS = {
    "tied": Language,
    "tied, scaled embedding": lambda: Language(Scaled),
    "untied, head with a bias": lambda: Language(tied=False, bias=True),
    "an embedding that reads all rows": lambda: Language(ReadsAllRows),
    "an embedding that is normalised": lambda: Language(Normalised),
}


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def ids(seed: int = 0) -> Tensor:
    found = torch.randint(0, ROWS, (3, 7), generator=torch.Generator().manual_seed(seed))
    found[0, :3] = torch.arange(5, 8)  # rows beside each other, and twice the same
    found[1, :3] = torch.arange(5, 8)
    return found


def perturbed(name: str, dtype: torch.dtype, distribution: str, point: Point, x: Tensor) -> Tensor:
    """The output of a model whose parameters are changed in place."""
    changed = model(name, dtype)
    direction = Direction(distribution)
    for shard in ShardedParameters(changed, rank=0):
        data = shard.param.data
        direction.combine_(
            data, shard, weight=data, seeds=[point.seed], coefficients=[point.coefficient]
        )
    return changed(x)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "low_rank"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_parts_of_a_large_matrix_have_the_values_of_the_whole_copy(name, dtype, distribution):
    """In one forward, and for a pair in a stack. Tolerance: a product in blocks adds in another
    order, which is one or two units in the last place; low-rank stacks compute in another way
    altogether and are compared elsewhere."""
    module, x, point = model(name, dtype), ids(), Point(7, EPS)
    forward_at = perturbed_forward(module, distribution, observe=False)
    with forward_at.observing():
        module(x)
    expected = [perturbed(name, dtype, distribution, p, x) for p in (point, Point(7, -EPS))]
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(output_at(forward_at, module, x, point), expected[0], **tolerance)
    if distribution != "low_rank":
        stack = StackRunner(forward_at)
        with stack.recording(point, len(x)):
            module(x)
        with stack.at([point, Point(7, -EPS)], [range(len(x))] * 2):
            stacked = module(x.repeat(2, 1)).chunk(2)
        for found, right in zip(stacked, expected, strict=True):
            torch.testing.assert_close(found, right, **tolerance)


def bytes_of_a_pair(name: str, x: Tensor) -> int:
    """The bytes that a stacked pair of points takes beyond two plain forwards."""
    module = model(name)
    forward_at = perturbed_forward(module, observe=False)
    stack = StackRunner(forward_at)
    points = [Point(7, EPS), Point(7, -EPS)]
    with torch.no_grad():
        with forward_at.observing():
            module(x)
        with stack.recording(points[0], len(x)):
            module(x)
        forward_at.perturber.scratch.__init__()  # as at the first step
        with peak_memory(torch.device("cpu")) as plain:
            module(x.repeat(2, 1))
        with peak_memory(torch.device("cpu")) as at_points, stack.at(points, [range(len(x))] * 2):
            module(x.repeat(2, 1))
    return at_points.bytes - plain.bytes


@pytest.mark.parametrize("name", ["tied", "tied, scaled embedding", "untied, head with a bias"])
def test_a_pair_of_points_takes_less_memory_than_one_copy_of_the_largest_matrix(name):
    assert bytes_of_a_pair(name, ids()) < ROWS * WIDTH * 4


def test_a_batch_that_uses_most_rows_has_the_whole_copied():
    module, x = model("tied, scaled embedding"), torch.arange(ROWS).view(4, -1)
    forward_at = perturbed_forward(module, observe=False)
    with torch.no_grad(), forward_at.observing():
        module(x)
    found = output_at(forward_at, module, x, Point(3, EPS))
    with torch.no_grad():
        torch.testing.assert_close(
            found,
            perturbed("tied, scaled embedding", torch.float32, "gaussian", Point(3, EPS), x),
            rtol=1e-5,
            atol=1e-5,
        )
