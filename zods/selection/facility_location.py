"""Facility location: choose the k candidates that best represent all candidates.

    F(S) = sum_i (D - min_{j in S} d(i, j)),   F(empty set) = 0,   D at least the largest distance

With similarities s = D - d this is F(S) = sum_i max_{j in S} s(i, j). F is monotone and submodular,
so that a greedy choice reaches (1 - 1/e) of the optimum (Nemhauser et al. 1978). Gains are
evaluated lazily (Minoux 1978).

Features are quantised to 16-bit integers, and distances are integers, so that sums of distances are
exact. A choice depends neither on the order of a sum nor on the rank that computes it. Of
candidates with equal gains, the lowest id is chosen.

The module is pure: it knows no ranks and no modules. Callers: `zods.selection.selector`, and
`zods.selection.baselines`, which has approximations for comparison.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zods.config.selector_section import METRICS
from zods.kernels import summed_excess

MAX_CANDIDATES = (1 << 19) - 1  # a gain (43 bits) and an id fit one int64

_LARGEST_FEATURE = (1 << 15) - 1
_LARGEST_DISTANCE = (1 << 24) - 1  # float32 holds integers up to it exactly
_UNIT_LENGTH = 1 << 20  # length of a vector, for the cosine metric
_BLOCK = 1 << 21  # distances that are computed at a time
_CACHE_BYTES = 1 << 29  # all distances are kept up to this size: 11,585 candidates
_POOL = 16  # candidates of which several may be picked before the heap is looked at again

Index = Tensor | slice
Exchange = Callable[[list[int]], list[list[int]]]


@dataclass(frozen=True)
class Chosen:
    """Candidates in the order of choice.

    ids: the candidates, each once. gains: increase of F by each candidate, in the unit of the
    distances. objective: F. weights: number of items that each candidate represents. An item is
    represented by the nearest chosen candidate, and by the earliest of equally near ones.
    """

    ids: list[int]
    gains: list[float]
    objective: float
    weights: list[int]


class Problem:
    """Candidates and their distances as integers. The candidates are also the items.

    See `from_features`.
    """

    def __init__(
        self,
        num_candidates: int,
        between: Callable[[Index, Index], Tensor],
        *,
        largest: int,
        unit: float,
        device: torch.device,
    ) -> None:
        """Check the number of candidates.

        between: maps (candidates, items) to their distances: integers in float32, symmetric.
        largest: D. unit: distance of the integer 1 in the unit of the features.

        Raises ValueError for more than MAX_CANDIDATES candidates.
        """
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
        """Distances of candidates to all items: (len(candidates), num_candidates).

        The distances are integers in float32. candidates: ids, int64.
        """
        return (
            self._between(candidates, slice(None)) if self._kept is None else self._kept[candidates]
        )

    def gains(self, candidates: Tensor, nearest: Tensor) -> Tensor:
        """The increase of F by each candidate, int64.

        nearest: (num_candidates,), each item's distance to the nearest chosen candidate.
        """
        if self._kept is not None:
            return summed_excess(nearest, self._kept, candidates)
        # The result is allocated first: small tensors between large ones keep the allocator from
        # reusing the memory of the large ones.
        found = torch.empty_like(candidates)
        size = max(1, _BLOCK // max(1, self.num_candidates))
        for start in range(0, len(candidates), size):
            found[start : start + size] = _gains(
                self.distances(candidates[start : start + size]), nearest
            )
        return found

    def keep_distances(self) -> None:
        """Compute all distances once and keep them, where they fit (`distances_fit`)."""
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
        """The problem restricted to these candidates. Its ids are indices in `ids`."""

        def between(candidates: Index, items: Index) -> Tensor:
            return self._between(ids[candidates], ids[items])

        return Problem(len(ids), between, largest=self.largest, unit=self.unit, device=self.device)

    def start(self) -> Tensor:
        """Each item's distance when no candidate is chosen: D."""
        return torch.full((self.num_candidates,), float(self.largest), device=self.device)


def _gains(distances: Tensor, nearest: Tensor) -> Tensor:
    return summed_excess(nearest, distances, torch.arange(len(distances), device=distances.device))


# --- problems -------------------------------------------------------------------------------------


def from_features(features: Tensor, metric: str = "l2") -> Problem:
    """Make the problem from features (n, m) of any real dtype.

    metric: one of METRICS; cosine is 1 - cos, and 1 where a vector is 0. D is twice the largest
    norm (cosine: 2).

    Raises ValueError for features that are not finite, and for an unknown metric.
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
    """Round features to int16.

    largest: the largest magnitude among all features that are compared, on all ranks.
    """
    if largest == 0.0:
        return torch.zeros_like(features, dtype=torch.int16)
    return (features.double() / largest * _LARGEST_FEATURE).round().to(torch.int16)


def dequantised(features: Tensor, largest: float) -> Tensor:
    """Invert `quantised` up to its rounding, in float32."""
    return (features.double() * (largest / _LARGEST_FEATURE)).float()


def distances_fit(n: int) -> bool:
    """Whether the distances of n candidates are few enough to be kept in memory."""
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
    """The power of two that scales distances to below 2^24. Such a scaling is exact."""
    return 2.0 ** (24 - math.frexp(largest)[1]) if largest else 1.0


# --- choices --------------------------------------------------------------------------------------


def lazy_greedy(
    problem: Problem, k: int, *, own: Tensor | None = None, exchange: Exchange | None = None
) -> Chosen:
    """Choose min(k, n) candidates, one after the other, each with the largest gain.

    Few gains are evaluated: a candidate's gain only falls, so that an old gain bounds the new one.

    own: the candidates that this rank evaluates; None: all. exchange: sends this rank's list of 17
    integers, and returns the lists of all ranks in rank order. All ranks know all distances.
    Together they own all candidates, and they choose the same.
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
        # The gains of this rank's best candidates are evaluated now. The first entry of the heap
        # bounds the gains of all others.
        stale = own.new_tensor([_id(-heapq.heappop(heap)) for _ in range(min(size, len(heap)))])
        exact = (
            sorted(_negated(_packed(problem.gains(stale, nearest), stale))) if len(stale) else []
        )
        for entry in exact[_POOL:]:
            heapq.heappush(heap, entry)
        mine = [-entry for entry in exact[:_POOL]]
        sent = [-heap[0] if heap else 0, *mine, *[0] * (_POOL - len(mine))]
        rows = [sent] if exchange is None else exchange(sent)
        offered = sorted((packed for row in rows for packed in row[1:] if packed), reverse=True)
        bound = max([row[0] for row in rows] + offered[_POOL : _POOL + 1])
        # Pick among the best candidates of all ranks, as long as no other can have a larger gain.
        pool = own.new_tensor([_id(packed) for packed in offered[:_POOL]])
        distances = problem.distances(pool)
        gain_of, picked = dict(zip(pool.tolist(), offered, strict=False)), set[int]()
        while len(ids) < k and gain_of and max(gain_of.values()) > bound:
            pick = max(gain_of, key=lambda i: gain_of[i])
            picked.add(pick)
            ids.append(pick)
            nearest = torch.minimum(nearest, distances[pool.tolist().index(pick)])
            gains = _packed(_gains(distances, nearest), pool).tolist()
            gain_of = {
                i: gain for i, gain in zip(pool.tolist(), gains, strict=True) if i not in picked
            }
        for packed in mine:
            if _id(packed) not in picked:
                heapq.heappush(heap, -gain_of.get(_id(packed), packed))
        size = max(_POOL, size // 2) if picked else 2 * size
    return choice(problem, ids)


def best(problem: Problem, candidates: Tensor, nearest: Tensor) -> int:
    """The candidate with the largest gain; of equals the lowest id.

    nearest: as in `Problem.gains`.
    """
    gains = problem.gains(candidates, nearest)
    return _id(int(_packed(gains, candidates).max()))


def choice(problem: Problem, ids: Sequence[int]) -> Chosen:
    """Compute gains, objective and weights of given candidates, chosen in this order."""
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
    """Raise ValueError where the number of candidates to choose is negative."""
    if k < 0:
        raise ValueError(f"a budget must be 0 or more, got {k}")
