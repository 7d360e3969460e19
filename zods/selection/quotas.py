"""Quotas of the sources, and the division of the chosen examples among ranks and micro-batches.

The functions are pure and compute in integers, so that every rank has the same result. Callers:
`zods.selection.selector` and `zods.selection.sub_batches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zods.core.shares import largest_remainder


def quotas_of(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """The number of examples of each source to choose from a candidate batch.

    The sum is `budget`, or the number of all candidates if it is smaller. Sources below the mean
    size are kept whole, and the others share the rest in proportion to their sizes (Nguyen et al.
    2024, section 4). Where the small sources would use up the budget, no source is kept whole, and
    all share the budget in proportion.

    sizes: number of candidates of each source. Sources are taken in the order of their names.

    >>> quotas_of({"code": 2, "math": 6, "web": 10}, budget=8)
    {'code': 2, 'math': 2, 'web': 4}
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
    """Cap the requested quotas at the sizes of the sources.

    The sources that have more candidates than their quota share the missing examples, in proportion
    to their remaining candidates.
    """
    names = sorted(sizes)
    quotas = {name: min(asked.get(name, 0), sizes[name]) for name in names}
    lacking = min(sum(asked.values()), sum(sizes.values())) - sum(quotas.values())
    left = [sizes[name] - quotas[name] for name in names]
    return {
        name: quotas[name] + more
        for name, more in zip(names, largest_remainder(left, lacking), strict=True)
    }


def deal(
    num_tokens: Sequence[int], num_ranks: int, accumulation: int, rows: int
) -> list[list[list[int]]]:
    """Divide examples into micro-batches: [rank][micro-batch] -> indices of examples.

    Examples of similar length go into the same micro-batch, and ranks get similar numbers of
    tokens, so that there is little padding and no rank waits long for another. The examples are
    sorted by length and cut into `accumulation` groups. Each group is dealt out to the ranks in
    turn, forth and back. A micro-batch is empty only where there are too few examples.

    rows: examples of a micro-batch over all ranks.
    """
    longest_first = sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i))
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for step in range(accumulation):
        group = longest_first[step * rows : (step + 1) * rows]
        for rank in range(num_ranks):
            turns = range(0, len(group), num_ranks)
            indices = [
                start + (rank if k % 2 == 0 else num_ranks - 1 - rank)
                for k, start in enumerate(turns)
            ]
            dealt[rank].append([group[index] for index in indices if index < len(group)])
    return dealt
