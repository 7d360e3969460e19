"""Small classifiers, each with one thing that a stack of batches, or forwards in lockstep, could
get wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.distributed.zoo import zoo_model
from tests.distributed.zoo_models import readers

WIDTH, CLASSES, WORDS = 8, 5, 40


class Classifier(readers.Classifier):
    """Embeds words, does what its subclass does to (B, L, WIDTH), and classifies the mean over
    words.
    """

    num_words, width, num_classes = WORDS, WIDTH, CLASSES

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()


class TwoPlaces(Classifier):
    """A weight is its module's, another module's, and read by the root."""

    def build(self) -> None:
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.block.weight

    def body(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.block(x))) + x @ self.block.weight


class ReadsTransposed(Classifier):
    """The root reads a weight that is another module's, by an attribute and not by a function."""

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.block(x)) @ self.block.weight.T + x @ self.block.weight.mT


class Table(nn.Module):
    """Gives a part of its parameter itself, as learned positional tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, : x.shape[1]]


class GivesItsParameter(Classifier):
    def build(self) -> None:
        self.table = Table()

    def body(self, x: Tensor) -> Tensor:
        table = self.table(x)
        return super().body(x) * table + table


class Chunked(Classifier):
    """As many calls as the batch is long."""

    def body(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.block(part)) for part in x.split(4, 1)], 1)


class PositionsInARow(Classifier):
    """(1, L), as BERT's."""

    def build(self) -> None:
        self.positions = nn.Embedding(32, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return super().body(x + self.positions(torch.arange(x.shape[1])[None]))


class PositionsAlone(PositionsInARow):
    """(L,), where L may be the stack's number of rows."""

    def body(self, x: Tensor) -> Tensor:
        return Classifier.body(self, x + self.positions(torch.arange(x.shape[1])))


class Returns(nn.Module):
    """Owns a parameter; returns a tuple or a dict, with more than one tensor and what is none."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.as_dict = as_dict

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, shift: float = 0.0, name: str = ""
    ) -> Any:
        y = self.linear(x) * self.scale + shift
        y = y if mask is None else y * mask
        return (
            {"y": y, "none": None, "means": y.mean(-1)}
            if self.as_dict
            else (y, None, [y.mean(-1)], name)
        )


class TupleOutput(Classifier):
    def build(self) -> None:
        self.inner = Returns(as_dict=False)

    def body(self, x: Tensor) -> Tensor:
        y, _, (means,), _ = self.inner(x)
        return super().body(y + means[..., None])


class DictOutput(Classifier):
    def build(self) -> None:
        self.inner = Returns(as_dict=True)

    def body(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return super().body(found["y"] + found["means"][..., None])


class Keywords(TupleOutput):
    """Inputs by name: one with the batch, one broadcast over it, a number, a string; a plain
    Linear's by name too.
    """

    def body(self, x: Tensor) -> Tensor:
        y, *_ = self.inner(x=x, mask=(x > 0).any(-1, keepdim=True), shift=0.5, name="a")
        return torch.tanh(self.block(input=y))


class WholeMean(nn.Module):
    """A number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).mean()


class ExampleMean(WholeMean):
    """A mean over the batch, in a row of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).mean(0, keepdim=True)


class ScalarOutput(Classifier):
    def build(self) -> None:
        self.inner = WholeMean()

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + self.inner(x)


class RowOutput(ScalarOutput):
    def build(self) -> None:
        self.inner = ExampleMean()


class MixesExamples(Classifier):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x - 0.1 * x.mean(0))


class WordsFirst(Classifier):
    """(L, B, WIDTH), as torch's attention by default."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x.transpose(0, 1)).transpose(0, 1)


class Doubles(Classifier):
    """The batch and its mirror image in one call, one after the other."""

    def body(self, x: Tensor) -> Tensor:
        once, mirrored = super().body(torch.cat([x, x.flip(1)])).chunk(2)
        return once + mirrored.square()


class Recurrent(Classifier):
    """Its state is (layers, B, WIDTH)."""

    def build(self) -> None:
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        y, (state, _) = self.lstm(x)
        return super().body(y + state[-1][:, None])


class Smoothed(Classifier):
    """A loss that its logits and labels do not give."""

    smoothing = 0.1


class InAutocast(Smoothed):
    """Lower precision in a part, entered after the first module and left before the last; in
    lockstep for its loss.
    """

    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.block(x)
        return x.float()


class CountsByMask(nn.Module):
    """Its own loss counts the words of the mask; on a batch without padding that is the plain cross
    entropy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = zoo_model("llama")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        if labels is None:
            return {"logits": logits}
        labels = labels.masked_fill(attention_mask == 0, -100)[:, 1:]
        return {
            "logits": logits,
            "loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()),
        }


class SmoothedOnOneRank(Classifier):
    """What one rank finds out counts for all."""

    def build(self) -> None:
        self.smoothing = 0.1 * torch.distributed.get_rank()


class Routed(Classifier):
    """Which module is called depends on the parameters."""

    def build(self) -> None:
        self.other = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.gate.weight)

    def body(self, x: Tensor) -> Tensor:
        opened = self.gate(x.new_ones(x.shape[0], 1)).mean() > 0
        return torch.tanh((self.other if opened else self.block)(x))


def words(size: int = 2, length: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (size, length), generator=generator)
    return {"ids": ids, "labels": torch.randint(0, CLASSES, (size,), generator=generator)}
