"""Small classifiers, each with a property that a form of evaluation could get wrong.

The forms are a stack of batches, and forwards in lockstep.
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
    """Embeds words, runs its subclass's `body` on (B, L, WIDTH), and classifies.

    It classifies the mean over the words.
    """

    num_words, width, num_classes = WORDS, WIDTH, CLASSES

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()


class TwoPlaces(Classifier):
    """A weight of one module is also a weight of another module, and is read by the root."""

    def build(self) -> None:
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.block.weight

    def body(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.block(x))) + x @ self.block.weight


class ReadsTransposed(Classifier):
    """The root reads a module's weight by an attribute (`.T`) and not by a function."""

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.block(x)) @ self.block.weight.T + x @ self.block.weight.mT


class Table(nn.Module):
    """Returns a part of its own parameter, as learned positional tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, : x.shape[1]]


class GivesItsParameter(Classifier):
    """Multiplies by a table whose module returns its own parameter."""

    def build(self) -> None:
        self.table = Table()

    def body(self, x: Tensor) -> Tensor:
        table = self.table(x)
        return super().body(x) * table + table


class Chunked(Classifier):
    """Calls a module as many times as the batch is long."""

    def body(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.block(part)) for part in x.split(4, 1)], 1)


class PositionsInARow(Classifier):
    """Has position ids of shape (1, L), as BERT does."""

    def build(self) -> None:
        self.positions = nn.Embedding(32, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return super().body(x + self.positions(torch.arange(x.shape[1])[None]))


class PositionsAlone(PositionsInARow):
    """Has position ids of shape (L,). L may be equal to the stack's number of rows."""

    def body(self, x: Tensor) -> Tensor:
        return Classifier.body(self, x + self.positions(torch.arange(x.shape[1])))


class Returns(nn.Module):
    """Owns a parameter, and returns a tuple or a dict.

    The output has several tensors, and objects that are not tensors.
    """

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
    """Is called with keywords: a batch, a tensor broadcast over it, a number and a string.

    A plain Linear is called with a keyword, too.
    """

    def body(self, x: Tensor) -> Tensor:
        y, *_ = self.inner(x=x, mask=(x > 0).any(-1, keepdim=True), shift=0.5, name="a")
        return torch.tanh(self.block(input=y))


class WholeMean(nn.Module):
    """Returns one number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).mean()


class ExampleMean(WholeMean):
    """Returns a mean over the batch, as a row."""

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
    """The result of an example depends on the other examples of the batch."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x - 0.1 * x.mean(0))


class WordsFirst(Classifier):
    """Runs on (L, B, WIDTH), as torch's attention does by default."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x.transpose(0, 1)).transpose(0, 1)


class Doubles(Classifier):
    """Runs on the batch and its mirror image in one call, one after the other."""

    def body(self, x: Tensor) -> Tensor:
        once, mirrored = super().body(torch.cat([x, x.flip(1)])).chunk(2)
        return once + mirrored.square()


class Recurrent(Classifier):
    """Has a state of shape (layers, B, WIDTH)."""

    def build(self) -> None:
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        y, (state, _) = self.lstm(x)
        return super().body(y + state[-1][:, None])


class Smoothed(Classifier):
    """Has a loss that its logits and labels do not determine."""

    smoothing = 0.1


class InAutocast(Smoothed):
    """Runs a part in lower precision, from after the first module until before the last.

    It is evaluated in lockstep because of its loss.
    """

    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.block(x)
        return x.float()


class CountsByMask(nn.Module):
    """Has a loss that averages over the words of the mask.

    On a batch without padding that is the plain cross entropy.
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
    """Only the loss of rank 1 is not the plain cross entropy. All ranks have to act on it."""

    def build(self) -> None:
        self.smoothing = 0.1 * torch.distributed.get_rank()


class Routed(Classifier):
    """Calls one of two modules. The parameters decide which one."""

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
