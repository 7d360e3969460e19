"""Plain classifiers that use a weight in an unusual way.

The weight is not used by the forward of the module that owns it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from tests.distributed.zoo_models.subject import EXAMPLES, Subject

WIDTH, CLASSES, WORDS, LENGTH = 12, 5, 23, 6


def words(seed: int) -> dict[str, Tensor]:
    """Random words. Every batch is longer than the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (EXAMPLES, LENGTH + seed), generator=generator)
    return {"ids": ids, "labels": torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)}


class Classifier(nn.Module):
    """Embeds words, applies `block` as its subclass defines, and classifies.

    It classifies the mean over the words.
    """

    num_words, width, num_classes = WORDS, WIDTH, CLASSES
    smoothing = 0.0  # label smoothing

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.num_words, self.width)
        self.block = nn.Linear(self.width, self.width)
        self.head = nn.Linear(self.width, self.num_classes)
        self.build()

    def build(self) -> None:
        """Further modules and hooks."""

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.block(x))

    def score(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.score(self.body(self.embed(ids)).mean(1))
        if labels is None:
            return {"logits": logits}
        return {
            "loss": functional.cross_entropy(logits, labels, label_smoothing=self.smoothing),
            "logits": logits,
        }


class Pruned(Classifier):
    """A pre-hook of the block computes its weight from a parameter and a mask."""

    def build(self) -> None:
        prune.l1_unstructured(self.block, "weight", amount=0.4)
        prune.random_unstructured(self.head, "bias", amount=0.4)


class WeightNormHook(Classifier):
    def build(self) -> None:
        weight_norm(self.block)


class SpectralNormHook(Classifier):
    def build(self) -> None:
        spectral_norm(self.block)


class WeightNorm(Classifier):
    def build(self) -> None:
        parametrizations.weight_norm(self.block)


class SpectralNorm(Classifier):
    def build(self) -> None:
        parametrizations.spectral_norm(self.block)


class Orthogonal(Classifier):
    def build(self) -> None:
        parametrizations.orthogonal(self.block, orthogonal_map="cayley")


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class Parametrized(Classifier):
    def build(self) -> None:
        parametrize.register_parametrization(self.block, "weight", Scaled())


class OwnHook(Classifier):
    """LoRA by a forward hook that reads parameters put on its own module."""

    def build(self) -> None:
        self.block.down = nn.Parameter(torch.randn(WIDTH, 3))
        self.block.up = nn.Parameter(torch.randn(3, WIDTH))
        self.block.register_forward_hook(
            lambda module, args, output: output + args[0] @ module.down @ module.up
        )


class OwnPreHook(Classifier):
    """A pre-hook scales the input by a parameter of its own module."""

    def build(self) -> None:
        self.block.gain = nn.Parameter(torch.randn(WIDTH))
        self.block.register_forward_pre_hook(lambda module, args: (args[0] * (1 + module.gain),))


class OthersHook(Classifier):
    """LoRA by a forward hook whose matrices belong to the root."""

    def build(self) -> None:
        self.down = nn.Parameter(torch.randn(WIDTH, 3))
        self.up = nn.Parameter(torch.randn(3, WIDTH))
        self.block.register_forward_hook(
            lambda _, args, output: output + args[0] @ self.down @ self.up
        )


class ModuleHook(Classifier):
    """A forward hook that calls another module."""

    def build(self) -> None:
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH))
        self.block.register_forward_hook(lambda _, args, output: output + self.adapter(args[0]))


class ReadsData(Classifier):
    """The root multiplies by `block.weight.data`; the block is never called."""

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.block.weight.data.T + self.block.bias.data)


class ReadsDetached(Classifier):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + x @ self.block.weight.detach()


class TiedByFunction(Classifier):
    """The head is the embedding's matrix."""

    def build(self) -> None:
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.back = nn.Linear(CLASSES, CLASSES, bias=False)

    def score(self, x: Tensor) -> Tensor:
        return self.back(self.head(x)) + functional.linear(x, self.embed.weight)[:, :CLASSES]


class TiedByAssignment(Classifier):
    def build(self) -> None:
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.block.weight

    def body(self, x: Tensor) -> Tensor:
        return self.again(super().body(x))


class CrossEntropyOf(nn.Module):
    """A loss module that is given the matrix of the head."""

    def forward(
        self, weight: Tensor, x: Tensor, labels: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return functional.cross_entropy(functional.linear(x, weight, bias), labels)


class HandedByPosition(Classifier):
    def build(self) -> None:
        self.loss = CrossEntropyOf()

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head.weight, self.body(self.embed(ids)).mean(1), labels)


class HandedByKeyword(HandedByPosition):
    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        x = self.body(self.embed(ids)).mean(1)
        return self.loss(x=x, labels=labels, weight=self.head.weight, bias=self.head.bias)


class HandedTransformed(Classifier):
    """A matrix goes through another module before it is used.

    DeBERTa's relative embeddings go through a norm in this way.
    """

    def build(self) -> None:
        self.norm = nn.LayerNorm(WIDTH)
        self.table = nn.Embedding(2 * LENGTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return super().body(x + self.norm(self.table.weight)[: x.shape[1]])


class Scorer(nn.Module):
    """A module with a method beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.first = nn.Linear(WIDTH, WIDTH)

    def similarity(self, x: Tensor) -> Tensor:
        return (
            functional.normalize(self.first(x), dim=-1)
            @ functional.normalize(self.weight, dim=-1).T
        )

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class CallsMethod(Classifier):
    def build(self) -> None:
        self.head = Scorer()

    def score(self, x: Tensor) -> Tensor:
        return 5 * self.head.similarity(x)


class ParameterContainers(Classifier):
    """Parameters in a list and in a dict, which have no forward."""

    def build(self) -> None:
        self.matrices = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 4 for _ in range(2)])
        self.vectors = nn.ParameterDict({"gain": torch.randn(WIDTH), "shift": torch.randn(WIDTH)})

    def body(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return super().body(x) * self.vectors["gain"] + self.vectors["shift"]


class PenalizesWeights(Classifier):
    """The loss has a term of all weights of a child."""

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        loss = super().forward(ids, labels)["loss"]
        return loss + 0.01 * sum(
            p.square().sum() for p in (self.block.weight, self.head.weight, self.head.bias)
        )


class Hyper(Classifier):
    """The weights of a product are the output of a module."""

    def build(self) -> None:
        self.maker = nn.Linear(WIDTH, CLASSES * WIDTH)

    def score(self, x: Tensor) -> Tensor:
        return torch.einsum("bcw,bw->bc", self.maker(x).unflatten(1, (CLASSES, WIDTH)), x)


class FunctionalCall(Classifier):
    """Calls a child with its own parameters scaled."""

    def body(self, x: Tensor) -> Tensor:
        scaled = {name: 0.5 * p for name, p in self.block.named_parameters()}
        return torch.tanh(torch.func.functional_call(self.block, scaled, (x,)))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


class CustomFunction(Classifier):
    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(Product.apply(x, self.block.weight) + self.block.bias)


class IndexedTable(Classifier):
    """The root indexes rows of a child's table.

    It also reads its own 0-d and strided parameters.
    """

    def build(self) -> None:
        self.table = nn.Embedding(WORDS, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.mixer = nn.Parameter(torch.randn(WIDTH, WIDTH).T)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(ids) + self.table.weight[ids] * self.scale
        logits = self.score(self.body(x @ self.mixer).mean(1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


READERS: dict[str, Subject] = {
    "pruned": Subject(Pruned, words, sample=True),
    "weight norm by hook": Subject(WeightNormHook, words, svrg=True),
    "spectral norm by hook": Subject(SpectralNormHook, words),
    "weight norm": Subject(WeightNorm, words),
    "spectral norm": Subject(SpectralNorm, words),
    "orthogonal": Subject(Orthogonal, words),
    "parametrized": Subject(Parametrized, words),
    "hook on its own parameters": Subject(OwnHook, words, trained=r"down|up", sample=True),
    "pre-hook on its own parameter": Subject(OwnPreHook, words, trained=r"gain"),
    "hook on the root's parameters": Subject(OthersHook, words),
    "hook that calls a module": Subject(ModuleHook, words),
    "reads .data": Subject(ReadsData, words, sample=True),
    "reads .detach()": Subject(ReadsDetached, words),
    "tied by a function": Subject(TiedByFunction, words),
    "tied by assignment": Subject(TiedByAssignment, words, bf16=True),
    "weight handed by position": Subject(
        HandedByPosition, words, trained=r"head", lr=0.1, sample=True
    ),
    "weight handed by keyword": Subject(HandedByKeyword, words),
    "weight handed through a norm": Subject(HandedTransformed, words, trained=r"table|norm"),
    "a method, not the forward": Subject(CallsMethod, words),
    "lists and dicts of parameters": Subject(ParameterContainers, words),
    "weights in the loss": Subject(PenalizesWeights, words),
    "hypernetwork": Subject(Hyper, words),
    # DeepSpeed's hook reads ds_status of the tensors.
    "functional_call": Subject(FunctionalCall, words, sharded=False),
    "custom function": Subject(CustomFunction, words),
    "0-d, strided and indexed": Subject(IndexedTable, words, sample=True),
}
