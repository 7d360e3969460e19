"""Quotas of the sources, and the division of the chosen examples among ranks and micro-batches.

Pure, in integers: the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def quotas_of(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return how many examples of each source are chosen from a candidate batch, `budget` in all
    (or all there are).

    Sources below the mean size are kept whole, the others share what is left in proportion to their
    sizes (Nguyen et al. 2024, section 4). Where those to be kept would leave nothing, none is kept
    whole: all share the budget in proportion.

    sizes: the candidates of each source. Sources are taken in the order of their names.
    """
    names = sorted(sizes)
    total = sum(sizes.values())
    if total <= budget:
        return {name: sizes[name] for name in names}
    kept = {name: sizes[name] for name in names if sizes[name] * len(sizes) < total}
    if sum(kept.values()) >= budget:
        kept = {}
    others = [name for name in names if name not in kept]
    shares = largest_remainder([sizes[name] for name in others], budget - sum(kept.values()))
    return {name: {**kept, **dict(zip(others, shares, strict=True))}[name] for name in names}


def capped_quotas(asked: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """The quotas asked for, where a source has as many; what others lack is shared by those that
    have more, in proportion to what they have left."""
    names = sorted(sizes)
    quotas = {name: min(asked.get(name, 0), sizes[name]) for name in names}
    lacking = min(sum(asked.values()), sum(sizes.values())) - sum(quotas.values())
    left = [sizes[name] - quotas[name] for name in names]
    return {
        name: quotas[name] + more
        for name, more in zip(names, largest_remainder(left, lacking), strict=True)
    }


def largest_remainder(sizes: Sequence[int], budget: int) -> list[int]:
    """`budget`, at most the sum of `sizes`, shared in proportion to them: whole parts, then one
    each to the largest remainders (the earlier of equals). No share exceeds its size."""
    total = max(1, sum(sizes))
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(budget * sizes[i] % total), i))
    for i in by_remainder[: budget - sum(shares)]:
        shares[i] += 1
    return shares


def deal(
    num_tokens: Sequence[int], num_ranks: int, accumulation: int, micro_batch: int
) -> list[list[list[int]]]:
    """Examples, by their indices, as micro-batches: [rank][micro-batch] -> indices. Balanced by
    tokens.

    Those of like length go together, so that there is little padding and no rank waits for another
    in a forward: sorted by length, cut into `accumulation` groups, each dealt out to the ranks in
    turn, forth and back. A micro-batch is empty only where there are too few examples.
    """
    longest_first = sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i))
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    size = num_ranks * micro_batch
    for step in range(accumulation):
        group = longest_first[step * size : (step + 1) * size]
        for rank in range(num_ranks):
            turns = range(0, len(group), num_ranks)
            indices = [
                start + (rank if k % 2 == 0 else num_ranks - 1 - rank)
                for k, start in enumerate(turns)
            ]
            dealt[rank].append([group[index] for index in indices if index < len(group)])
    return dealt
