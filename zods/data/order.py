"""The order of the training examples: which examples make up each step of an epoch.

The order is a function of the seed, the epoch and the data. It does not depend on the number of
ranks, and it has no state, so that a run resumes at any step. `zods.data.loader` divides a step's
examples among the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from zods.core.directions import derive_seed
from zods.core.shares import largest_remainder

GROUPED_BATCHES = 50  # batches among which examples are exchanged, as in transformers


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sampling of examples by weights of their sources.

    names: of the sources. members: the indices of each source's examples, ascending, int64.
    weights: of the sources; their sum is 1.
    """

    names: tuple[str, ...]
    members: tuple[Tensor, ...]
    weights: tuple[Fraction, ...]

    @classmethod
    def of(cls, sources: Sequence[str], weights: Mapping[str, float], path: str) -> Mixture:
        """A mixture of examples with these sources.

        sources: of each example. weights: of each source, in any unit. path: of the weights in
        messages. Raises ValueError where a source has no weight, or a weight no example.
        """
        found = sorted(set(sources))
        if found != sorted(weights):
            raise ValueError(
                f"{path}: found weights of {', '.join(sorted(weights))}, but the examples' sources "
                f"are {', '.join(found)}. Give each of them a weight, and remove the examples of a "
                "source that is not wanted."
            )
        number_of = {name: number for number, name in enumerate(found)}
        numbers = torch.tensor([number_of[source] for source in sources])
        exact = [Fraction(str(weights[name])) for name in found]  # 0.1 is a tenth
        return cls(
            tuple(found),
            tuple((numbers == number).nonzero()[:, 0] for number in range(len(found))),
            tuple(weight / sum(exact) for weight in exact),
        )

    def draw(self, number: int, seed: int, epoch: int = 0) -> Tensor:
        """The example indices of an epoch of `number` draws, in random order, (number,) int64.

        Each source gets its share of the draws. Its examples are drawn without replacement until
        all were drawn, then again in another order. The next epoch goes on where this one ends.
        """
        counts = largest_remainder(self.weights, number)
        drawn = [
            self._draw_from(source, epoch * count, count, seed)
            for source, count in enumerate(counts)
        ]
        return torch.cat(drawn)[_permutation(number, derive_seed(seed, "mixture", epoch))]

    def _draw_from(self, source: int, start: int, count: int, seed: int) -> Tensor:
        """Draws number `start` to `start + count` of one source."""
        members = self.members[source]
        size = len(members)
        passes = range(start // size, -(-(start + count) // size))
        orders = [
            members[_permutation(size, derive_seed(seed, "mixture", number, 1 + source))]
            for number in passes
        ]
        first = start - passes.start * size
        return torch.cat([members[:0], *orders])[first : first + count]

    @property
    def effective_size(self) -> int:
        """Number of examples E from which plain draws without replacement vary as little as those
        of this mixture.

        m draws have m w of the P examples of a source with weight w. Where the examples of all
        sources have the variance v, the variance of the mean of the draws is

            sum over sources of w^2 (1 / (m w) - 1 / P) v = (1 / m - 1 / E) v,    1 / E = sum w^2 / P

        E is the number of all examples where the weights are the sizes of the sources.
        """
        parts = zip(self.weights, self.members, strict=True)
        return round(1 / sum(weight**2 / len(of) for weight, of in parts))

    def passes(self, number: int) -> dict[str, float]:
        """How often the examples of each source were drawn on average in `number` draws."""
        parts = zip(self.names, self.weights, self.members, strict=True)
        return {name: float(number * weight / len(of)) for name, weight, of in parts}


def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed % 2**63))


def epoch_order(
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    lengths: Tensor | None = None,
    mixture: Mixture | None = None,
) -> Tensor:
    """The example indices of each step of an epoch, (steps, batch_size) int64.

    All `size` examples are shuffled. The tail that does not fill a batch is dropped. lengths: of
    the examples, (size,); a batch then has examples of similar length. mixture: the examples are
    drawn from it instead, as many as fill the same number of batches.
    """
    number = size // batch_size * batch_size
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    shuffled = torch.randperm(size, generator=generator)[:number]
    order = shuffled if mixture is None else mixture.draw(number, seed, epoch)
    batches = order.view(-1, batch_size)
    return batches if lengths is None else _grouped_by_length(batches, lengths, generator)


def _grouped_by_length(batches: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Exchange examples among GROUPED_BATCHES batches, so that each has similar lengths.

    The batches of the result are in random order: a training that sees the short examples first
    would see another task first.
    """
    batch_size = batches.shape[1]
    groups = batches.flatten().split(GROUPED_BATCHES * batch_size)
    by_length = [group[lengths[group].argsort(stable=True)] for group in groups]
    grouped = torch.cat(by_length).view(-1, batch_size)
    return grouped[torch.randperm(len(grouped), generator=generator)]


def anchor_order(
    size: int,
    *,
    examples: int | None,
    shuffled: bool,
    seed: int,
    mixture: Mixture | None = None,
) -> Tensor:
    """The example indices of a refresh, int64.

    examples: number of examples that are drawn at random; None takes all. shuffled: whether the
    order is random also where all are taken. seed: of the order. mixture: the examples are drawn
    from it, so that the mean over a refresh is the mean that the steps estimate.
    """
    number = size if examples is None else min(examples, size)
    if mixture is not None:
        return mixture.draw(number, seed)
    if number == size and not shuffled:
        return torch.arange(size)
    return _permutation(size, seed)[:number]
