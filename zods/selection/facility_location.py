"""Facility location: choose the k candidates that best stand for all items. Pure: no ranks, no
modules.

    F(S) = sum_i (D - min_{j in S} d(i, j)),   F(empty set) = 0,   D at least the largest distance

is monotone and submodular, so greedy choice reaches (1 - 1/e) of the optimum (Nemhauser et al.
1978); with similarities s = D - d it is F(S) = sum_i max_{j in S} s(i, j). Distances are integers
here, of features taken to 16-bit integers, and sums of them are exact: a choice depends neither on
the order of a sum nor on who computes it. Equal gains go to the lowest id.

Lazy evaluation: Minoux 1978. Approximations for comparison are in `zods.selection.baselines`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zods.config.schema import METRICS
from zods.kernels import summed_excess

MAX_CANDIDATES = (1 << 19) - 1  # a gain (43 bits) and an id fit one int64

_LARGEST_FEATURE = (1 << 15) - 1
_LARGEST_DISTANCE = (1 << 24) - 1  # float32 holds integers up to it exactly
_UNIT_LENGTH = 1 << 20  # length of a vector, for the cosine metric
_BLOCK = 1 << 21  # distances made at a time
_CACHE_BYTES = 1 << 29  # all distances are kept where they take no more: 11,585 candidates
_POOL = 16  # candidates out of which several may be picked between two looks at the rest

Index = Tensor | slice
Exchange = Callable[[list[int]], list[list[int]]]


@dataclass(frozen=True)
class Chosen:
    """Candidates in the order of choice.

    ids: never one twice. gains: what each added to F, in the unit of the distances. objective: F.
    weights: how many items each stands for, which are those that are not nearer to another (nor as
    near to an earlier one).
    """

    ids: list[int]
    gains: list[float]
    objective: float
    weights: list[int]


class Problem:
    """Candidates, which are the items too, and their distances as integers. See `from_features`."""

    def __init__(
        self,
        num_candidates: int,
        between: Callable[[Index, Index], Tensor],
        *,
        largest: int,
        unit: float,
        device: torch.device,
    ) -> None:
        """between: (candidates, items) -> their distances, integers in float32, d(i, j) = d(j, i).
        largest: D. unit: what an integer 1 is worth."""
        if num_candidates > MAX_CANDIDATES:
            raise ValueError(
                f"a choice is among at most {MAX_CANDIDATES:,} candidates and items, got "
                f"{num_candidates:,}"
            )
        self.num_candidates = num_candidates
        self.largest, self.unit, self.device = largest, unit, device
        self._between = between
        self._kept: Tensor | None = None

    def distances(self, candidates: Tensor) -> Tensor:
        """(len(candidates), num_candidates), integers in float32; `candidates` are int64 ids."""
        return (
            self._between(candidates, slice(None)) if self._kept is None else self._kept[candidates]
        )

    def gains(self, candidates: Tensor, nearest: Tensor) -> Tensor:
        """What each candidate would add to F, int64.

        nearest: (num_candidates,), each item's distance to those chosen."""
        if self._kept is not None:
            return summed_excess(nearest, self._kept, candidates)
        # made beforehand: small tensors between large ones keep the allocator from using these
        # again
        found = torch.empty_like(candidates)
        size = max(1, _BLOCK // max(1, self.num_candidates))
        for start in range(0, len(candidates), size):
            found[start : start + size] = _gains(
                self.distances(candidates[start : start + size]), nearest
            )
        return found

    def keep_distances(self) -> None:
        """Make all distances once, where they are few enough to keep."""
        if self._kept is not None or not distances_fit(self.num_candidates):
            return
        kept = torch.empty(self.num_candidates, self.num_candidates, device=self.device)
        size = max(1, _BLOCK // max(1, self.num_candidates))
        for start in range(0, self.num_candidates, size):
            block = slice(start, start + size)
            kept[block, start:] = self._between(block, slice(start, None))
            kept[start + size :, block] = kept[block, start + size :].T
        self._kept = kept

    def among(self, ids: Tensor) -> Problem:
        """The problem among these candidates alone. Its ids are indices in `ids`."""

        def between(candidates: Index, items: Index) -> Tensor:
            return self._between(ids[candidates], ids[items])

        return Problem(len(ids), between, largest=self.largest, unit=self.unit, device=self.device)

    def start(self) -> Tensor:
        """Every item's distance when nothing is chosen."""
        return torch.full((self.num_candidates,), float(self.largest), device=self.device)


def _gains(distances: Tensor, nearest: Tensor) -> Tensor:
    return summed_excess(nearest, distances, torch.arange(len(distances), device=distances.device))


# --- problems -------------------------------------------------------------------------------------


def from_features(features: Tensor, metric: str = "l2") -> Problem:
    """Items that are the candidates, at the distance of their features (n, m), of any real dtype.

    metric: one of METRICS; cosine is 1 - cos, and 1 where a vector is 0. D is twice the largest
    norm (cosine: 2). Raises ValueError for features that are not finite, and for an unknown metric.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (n, m), got shape {tuple(features.shape)}")
    odd = int((~features.isfinite()).any(1).sum())
    if odd:
        raise ValueError(
            f"features of {odd} of {len(features)} candidates are not finite. Leave these out."
        )
    largest = float(features.abs().max()) if features.numel() else 0.0
    return from_quantised(quantised(features, largest), largest, metric)


def quantised(features: Tensor, largest: float) -> Tensor:
    """Features as int16; `largest` is the largest magnitude among all that are compared, on
    whatever rank.
    """
    if largest == 0.0:
        return torch.zeros_like(features, dtype=torch.int16)
    return (features.double() / largest * _LARGEST_FEATURE).round().to(torch.int16)


def dequantised(features: Tensor, largest: float) -> Tensor:
    """Invert `quantised`, to within its rounding, in float32."""
    return (features.double() * (largest / _LARGEST_FEATURE)).float()


def distances_fit(n: int) -> bool:
    """Whether the distances of n candidates are kept in memory, once made."""
    return n * n * 4 <= _CACHE_BYTES


def from_quantised(features: Tensor, largest: float, metric: str) -> Problem:
    """Make the problem from the values that `quantised` returned; see `from_features`."""
    if metric not in METRICS:
        raise ValueError(f"metric: found {metric!r}, allowed are {', '.join(METRICS)}.")
    n = len(features)
    values = features.double()
    squares = values.square().sum(1)  # exact, as all below
    unit = largest / _LARGEST_FEATURE
    if metric == "cosine":
        lengths = squares.sqrt().clamp(min=1.0)
        values = (values / lengths[:, None] * _UNIT_LENGTH).round()
        bound, unit = 2.0 * _UNIT_LENGTH**2, _UNIT_LENGTH**-2
    elif metric == "l2":
        bound = 2.0 * math.sqrt(float(squares.max())) if n else 0.0
    else:
        bound = 2.0 * float(values.abs().sum(1).max()) if n else 0.0
        values = values.float() if bound <= _LARGEST_DISTANCE else values
    scale = _scale(bound)
    one = values.new_tensor(float(_UNIT_LENGTH**2))

    def between(candidates: Index, items: Index) -> Tensor:
        rows, columns = values[candidates], values[items]
        if metric == "l1":
            found = torch.cdist(rows, columns, p=1.0)
        elif metric == "l2":
            found = (
                torch.addmm(squares[items], rows, columns.T, alpha=-2.0)
                .add_(squares[candidates, None])
                .sqrt_()
            )
        else:
            found = torch.addmm(one, rows, columns.T, alpha=-1.0).clamp_(min=0.0)
        return found.mul_(scale).floor_().float()

    largest_distance, device = int(bound * scale), features.device
    return Problem(n, between, largest=largest_distance, unit=unit / scale, device=device)


def _scale(largest: float) -> float:
    """A power of two, so that scaling is exact, that takes distances to below 2^24."""
    return 2.0 ** (24 - math.frexp(largest)[1]) if largest else 1.0


# --- choices --------------------------------------------------------------------------------------


def lazy_greedy(
    problem: Problem, k: int, *, own: Tensor | None = None, exchange: Exchange | None = None
) -> Chosen:
    """Choose min(k, n) candidates, each the one that adds most to F at its turn.

    Few of the gains are made: a gain only falls, so an old one bounds a new one.

    own: the candidates that this rank evaluates (default all); exchange: gives every rank's list of
    17 integers, in rank order, for this rank's. All ranks know all distances, together own all
    candidates, and choose the same.
    """
    check_budget(k)
    if exchange is None:
        problem.keep_distances()
    own = torch.arange(problem.num_candidates, device=problem.device) if own is None else own
    num_offered = len(own) if exchange is None else problem.num_candidates
    nearest, ids = problem.start(), list[int]()
    heap = _negated(_packed(problem.gains(own, nearest), own)) if len(own) else []
    heapq.heapify(heap)
    size = _POOL
    while len(ids) < min(k, num_offered):
        # this rank's best, exact now; all else is bounded by the first of the heap
        oldest = own.new_tensor([_id(-heapq.heappop(heap)) for _ in range(min(size, len(heap)))])
        exact = (
            sorted(_negated(_packed(problem.gains(oldest, nearest), oldest))) if len(oldest) else []
        )
        for entry in exact[_POOL:]:
            heapq.heappush(heap, entry)
        mine = [-entry for entry in exact[:_POOL]]
        sent = [-heap[0] if heap else 0, *mine, *[0] * (_POOL - len(mine))]
        rows = [sent] if exchange is None else exchange(sent)
        offered = sorted((packed for row in rows for packed in row[1:] if packed), reverse=True)
        bound = max([row[0] for row in rows] + offered[_POOL : _POOL + 1])
        # picks among the best of all ranks, while nothing else can be better
        pool = own.new_tensor([_id(packed) for packed in offered[:_POOL]])
        distances = problem.distances(pool)
        now, picked = dict(zip(pool.tolist(), offered, strict=False)), set[int]()
        while len(ids) < k and now and max(now.values()) > bound:
            pick = max(now, key=lambda i: now[i])
            picked.add(pick)
            ids.append(pick)
            nearest = torch.minimum(nearest, distances[pool.tolist().index(pick)])
            gains = _packed(_gains(distances, nearest), pool).tolist()
            now = {i: gain for i, gain in zip(pool.tolist(), gains, strict=True) if i not in picked}
        for packed in mine:
            if _id(packed) not in picked:
                heapq.heappush(heap, -now.get(_id(packed), packed))
        size = max(_POOL, size // 2) if picked else 2 * size
    return choice(problem, ids)


def best(problem: Problem, candidates: Tensor, nearest: Tensor) -> int:
    """The candidate that adds most to F, the lowest id of equals. nearest: as in `Problem.gains`."""
    gains = problem.gains(candidates, nearest)
    return _id(int(_packed(gains, candidates).max()))


def choice(problem: Problem, ids: Sequence[int]) -> Chosen:
    """Any candidates, in this order, as a choice: their gains, objective and weights."""
    nearest = problem.start()
    owner = torch.zeros(problem.num_candidates, dtype=torch.int64, device=problem.device)
    candidates = torch.tensor(ids, dtype=torch.int64, device=problem.device)
    gains = []
    for start, block in enumerate(candidates.split(_POOL)) if len(ids) else ():
        for index, distances in enumerate(problem.distances(block), start * _POOL):
            closer = distances < nearest if index else distances <= nearest
            gains.append(int(_gains(distances[None], nearest)))
            nearest = torch.where(closer, distances, nearest)
            owner[closer] = index
    weights = torch.bincount(owner, minlength=len(ids)).tolist() if ids else []
    return Chosen(
        list(ids), [gain * problem.unit for gain in gains], sum(gains) * problem.unit, weights
    )


def _packed(gains: Tensor, ids: Tensor) -> Tensor:
    """Pack (gain, id) into one int64 above 0: larger for a larger gain, then for a lower id."""
    return gains * (MAX_CANDIDATES + 1) + (MAX_CANDIDATES - ids)


def _negated(packed: Tensor) -> list[int]:
    return (-packed).tolist()


def _id(packed: int) -> int:
    return MAX_CANDIDATES - packed % (MAX_CANDIDATES + 1)


def check_budget(k: int) -> None:
    """Raise ValueError where fewer than 0 candidates are to be chosen."""
    if k < 0:
        raise ValueError(f"a budget must be 0 or more, got {k}")
