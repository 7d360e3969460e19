"""Plain torch models of usual layers, and unusual losses and batches.

The layers are experts, recurrent ones, attention, convolutions, graphs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.distributed.zoo_models.readers import CLASSES, WIDTH, Classifier, words
from tests.distributed.zoo_models.subject import EXAMPLES, Subject


class Experts(nn.Module):
    """Experts in a ModuleList. An expert without words is not called.

    Which experts get words depends on the batch and on the weights.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, number)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(number)])

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            (rows,) = (chosen == k).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, torch.tanh(expert(x[rows])) * weight[rows, None])
        return out


class Routed(Classifier):
    """A mixture of experts, gathered as one module.

    ZeRO-3 needs all ranks to call the same modules.
    """

    number = 12

    def build(self) -> None:
        self.mixture = Experts(self.number)
        set_z3_leaf_modules(self, [Experts])

    def body(self, x: Tensor) -> Tensor:
        return self.mixture(super().body(x).flatten(0, 1)).view_as(x)


class RoutedToFewer(Routed):
    """A mixture whose experts are all called on the first batch only.

    So another form of evaluation may be chosen on that batch.
    """

    number = 8


class StackedExperts(Classifier):
    """Experts as one parameter of three dimensions, of which each word's part is gathered."""

    def build(self) -> None:
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def body(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return super().body(torch.einsum("blij,blj->bli", self.experts[chosen], x))


class SharedBlock(Classifier):
    """The same block several times, and under two names."""

    def build(self) -> None:
        self.alias = self.block
        self.norm = nn.LayerNorm(WIDTH)

    def body(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.block(self.norm(x)))
        return x + self.alias(x)


class Checkpointed(Classifier):
    """Activation checkpointing in both of its modes."""

    def build(self) -> None:
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        x = checkpoint(super().body, x, use_reentrant=False)
        return checkpoint(self.second, x, use_reentrant=True)


class Counts(Classifier):
    """Buffers that the forward writes: a counter, and a table that the first call makes."""

    def build(self) -> None:
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("positions", None, persistent=False)

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.positions is None or self.positions.shape[0] < x.shape[1]:
            steps = torch.arange(x.shape[1], dtype=x.dtype)
            self.positions = torch.sin(steps[:, None] / (1 + torch.arange(WIDTH)))
        return super().body(x + self.positions[: x.shape[1]])


class Twice(Classifier):
    """Two forwards of the root's parts, and a frozen teacher. The loss is over all three."""

    def build(self) -> None:
        self.teacher = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(ids)
        first, second = self.body(x), self.body(x.flip(1) * 0.5)
        loss = functional.cross_entropy(self.score(first.mean(1)), labels)
        return {
            "loss": loss
            + functional.mse_loss(second, self.teacher(x))
            + functional.mse_loss(first, second)
        }


class Repeated(nn.Module):
    """Adaptive computation: a layer is repeated until a second one ends the loop for the batch."""

    limit = 0.86

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.halt = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + torch.tanh(self.layer(x))
            if float(self.halt(x).square().mean()) > self.limit:
                break
        return x


class StopsEarly(Classifier):
    """A layer that runs a number of times that depends on the weights.

    It is gathered once for all its runs.
    """

    def build(self) -> None:
        self.repeated = Repeated()
        set_z3_leaf_modules(self, [Repeated])

    def body(self, x: Tensor) -> Tensor:
        return self.repeated(super().body(x))


class Ragged(Classifier):
    """A block that is given a list of tensors of different lengths."""

    def build(self) -> None:
        self.block = OverList()

    def body(self, x: Tensor) -> Tensor:
        return torch.stack(self.block([row[: 2 + k % 3] for k, row in enumerate(x)]))[:, None]


class OverList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, rows: list[Tensor]) -> list[Tensor]:
        return [torch.tanh(row @ self.weight).mean(0) for row in rows]


class Vectorized(Classifier):
    """Calls a child through vmap."""

    def body(self, x: Tensor) -> Tensor:
        return torch.vmap(super().body)(x)


class ForwardMode(Classifier):
    """Takes a derivative of a child in forward mode."""

    def body(self, x: Tensor) -> Tensor:
        value, slope = torch.func.jvp(super().body, (x,), (torch.ones_like(x),))
        return value + slope


class OneByOne(Classifier):
    """Gives the block one example at a time, without a batch dimension."""

    def body(self, x: Tensor) -> Tensor:
        return torch.stack([super(OneByOne, self).body(row) for row in x])


class TwoEmbeddings(Classifier):
    """Bags of words in one flat list, and a bilinear form."""

    def build(self) -> None:
        self.bag = nn.EmbeddingBag(23, WIDTH, mode="sum")
        self.form = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        bags = self.bag(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1]))
        logits = self.head(torch.tanh(self.form(bags, self.body(self.embed(ids)).mean(1))))
        return functional.cross_entropy(logits, labels)


class LogitsOnly(Classifier):
    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return {"logits": self.score(self.body(self.embed(ids)).mean(1))}


class Result(NamedTuple):
    loss: Tensor
    hidden: list[Tensor]


class TupleOut(Classifier):
    """Positions as inputs, a named tuple as output, and a block that returns a tuple."""

    def build(self) -> None:
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, bidirectional=True)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        states, (last, _) = self.lstm(self.embed(ids).transpose(0, 1))
        x = self.body(self.down(states)).mean(0) + last[-1]
        return Result(functional.cross_entropy(self.score(x), labels), [states])


class OneDict(Classifier):
    """A model whose only input is a dict."""

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return super().forward(batch["ids"], batch["labels"])["loss"]


class ClassWeights(Classifier):
    """A loss with a weight for each class."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(ids)["logits"]
        if labels is None:
            return {"logits": logits}
        weights = torch.tensor([1.0, 20.0, 0.1, 5.0, 1.0], dtype=logits.dtype)
        return {"loss": functional.cross_entropy(logits, labels, weight=weights), "logits": logits}


def one_class_first(seed: int) -> dict[str, Tensor]:
    """Batches of which the first has only examples of class 0.

    So class weights have no effect on it.
    """
    batch = words(seed)
    return {**batch, "labels": torch.zeros_like(batch["labels"]) if seed == 0 else batch["labels"]}


class Energy(nn.Module):
    """A model of forces, which are the gradient of an energy inside the forward.

    The loss is over energy and forces.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
        )

    def forward(self, places: Tensor, energies: Tensor, forces: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            energy = self.net(places).sum((1, 2))  # (B,)
            (slope,) = torch.autograd.grad(energy.sum(), places, create_graph=self.training)
        loss = functional.mse_loss(energy, energies) + 3 * functional.mse_loss(-slope, forces)
        return {"loss": loss.detach(), "energy": energy.detach()}


class Graph(nn.Module):
    """Message passing over the nodes of all graphs together."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(2 * WIDTH, WIDTH)
        self.update = nn.GRUCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, nodes: Tensor, edges: Tensor, target: Tensor) -> Tensor:
        size, number, _ = nodes.shape
        offset = number * torch.arange(size)[:, None]
        source, goal = ((edges[:, k] + offset).flatten() for k in (0, 1))
        state = nodes.flatten(0, 1)
        for _ in range(2):
            sent = torch.tanh(self.message(torch.cat([state[source], state[goal]], -1)))
            state = self.update(torch.zeros_like(state).index_add_(0, goal, sent), state)
        return functional.mse_loss(self.head(state).view(size, number).sum(1), target)


class Attentive(Classifier):
    """torch's attention, with queries of the root, on words in the first dimension."""

    def build(self) -> None:
        self.queries = nn.Parameter(torch.randn(3, 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 3, add_bias_kv=True)

    def body(self, x: Tensor) -> Tensor:
        words_first = super().body(x).transpose(0, 1)
        found, _ = self.attention(self.queries.expand(-1, x.shape[0], -1), words_first, words_first)
        return found.transpose(0, 1)


class Encoder(Classifier):
    """torch's encoder, which takes a fused path in evaluation mode."""

    def build(self) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 24, batch_first=True, norm_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def body(self, x: Tensor) -> Tensor:
        return self.encoder(super().body(x))


class Translator(Classifier):
    """torch's encoder and decoder, words first, with a causal mask."""

    def build(self) -> None:
        self.transformer = nn.Transformer(WIDTH, 3, 1, 1, 24)

    def body(self, x: Tensor) -> Tensor:
        source, goal = x.transpose(0, 1), super().body(x).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(goal))
        return self.transformer(source, goal, tgt_mask=mask).transpose(0, 1)


class Gated(Classifier):
    def build(self) -> None:
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        return super().body(self.gru(x)[0])


class Convolutional(nn.Module):
    """Convolutions of several kinds, batch and group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=4),
            nn.GroupNorm(2, 8),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.features(image))
        return functional.cross_entropy(logits, labels), logits


def images(seed: int, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)
    return {"image": torch.randn(EXAMPLES, 3, size, size, generator=generator), "labels": labels}


def molecules(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"places": (EXAMPLES, 5, 3), "energies": (EXAMPLES,), "forces": (EXAMPLES, 5, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def graphs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, 5, (EXAMPLES, 2, 9), generator=generator)
    nodes = torch.randn(EXAMPLES, 5, WIDTH, generator=generator)
    return {"nodes": nodes, "edges": edges, "target": torch.randn(EXAMPLES, generator=generator)}


def positional(seed: int) -> tuple[Tensor, ...]:
    return tuple(words(seed).values())


def in_a_dict(seed: int) -> tuple[dict[str, Tensor]]:
    return (words(seed),)


PLAIN: dict[str, Subject] = {
    "experts in a list": Subject(Routed, words, sample=True),
    "fewer experts in a list": Subject(RoutedToFewer, words),
    "experts in one parameter": Subject(StackedExperts, words),
    "one block several times": Subject(SharedBlock, words),
    "checkpointed": Subject(Checkpointed, words),
    "buffers that are written": Subject(Counts, words),
    "two forwards and a teacher": Subject(Twice, words),
    "as often as the weights say": Subject(StopsEarly, words, sample=True),
    "a list of tensors": Subject(Ragged, words),
    "vmap": Subject(Vectorized, words, sharded=False),
    "derivative in forward mode": Subject(ForwardMode, words, sharded=False),
    "one example at a time": Subject(OneByOne, words),
    "bags and a bilinear form": Subject(TwoEmbeddings, words),
    "logits alone": Subject(LogitsOnly, words),
    "LSTM, positional inputs": Subject(TupleOut, positional, sample=True),
    "one dict as input": Subject(OneDict, in_a_dict),
    "class weights": Subject(ClassWeights, one_class_first, sample=True),
    "gradient inside the forward": Subject(Energy, molecules, sample=True, svrg=True),
    "graph": Subject(Graph, graphs),
    "MultiheadAttention": Subject(Attentive, words),
    "TransformerEncoder": Subject(Encoder, words, sample=True),
    "Transformer": Subject(Translator, words),
    "GRU": Subject(Gated, words),
    "convolutions": Subject(Convolutional, images),
}
