"""A few numbers for each example of a batch, whose distances are those of the examples' gradients.

Feature k of example i is the derivative of its loss, the mean over its own labelled tokens, along
direction k of one matrix: the value projection of the last block. So the features are a random
projection of the gradient of that matrix.

zo     by differences of losses at points along the directions: one forward, in which all but the last block and the head run
       once, and the last block and the head on stacks of the points
exact  the same derivatives by automatic differentiation from the losses back to the output of that matrix, in one forward
paper  by differences along one direction alone (Nguyen et al. 2024, arXiv:2407.19580v1); see
       `zods.selection.baselines`

Only labelled tokens reach the head. Directions are low-rank, U V^T / sqrt(r), from seeds: the
matrix's gradients, which would be large, are never made.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from zods.core.directions import Direction
from zods.data.objectives import IGNORE_INDEX, example_losses, logits_of
from zods.params.zero3_adapter import release_gathered

logger = logging.getLogger(__name__)

# the value projection, by the names of models; the last ones make queries and keys, too
VALUE_PROJECTIONS = (
    "v_proj",
    "value",
    "v_lin",
    "qkv_proj",
    "query_key_value",
    "Wqkv",
    "c_attn",
)
_STACK_ELEMENTS = (
    1 << 27
)  # elements of the largest tensor when the last block runs on copies of the batch
# larger ones are no faster there, and cost memory that is not in its cache
_STACK_ELEMENTS_ON_CPU = 1 << 22


@dataclass(frozen=True)
class Target:
    """The matrix whose gradients are compared. ordinal: its place in `named_parameters()`. shape:
    of the whole.

    input_first: the matrix is (inputs, outputs), as in transformers' Conv1D. blocks: those of the
    model, in order; none where the matrix is in none. block: the place of the one that holds it.
    """

    name: str
    module: nn.Module
    ordinal: int
    shape: tuple[int, ...]
    input_first: bool
    blocks: tuple[nn.Module, ...]
    block: int


def find_target(model: nn.Module, pattern: str | None = None) -> Target:
    """The last matrix of a linear layer whose parameter's name `pattern` (a regular expression) is
    found in.

    None: the value projection of the last block; where an adapter (LoRA) is trained on it, the
    adapter's second matrix, since the gradient of the first is 0 at the start. Raises ValueError
    where there is none, naming some that there are.
    """
    modules = dict(model.named_modules())
    found: dict[str, Target] = {}
    for ordinal, (name, parameter) in enumerate(model.named_parameters()):
        owner = modules[name.rpartition(".")[0]]
        input_first = type(owner).__name__ == "Conv1D"
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if len(shape) == 2 and (input_first or isinstance(owner, nn.Linear)):
            found[name] = Target(name, owner, ordinal, shape, input_first, *_blocks(model, name))
    if pattern is not None:
        try:
            matching = [target for name, target in found.items() if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(
                f"selector.pattern: {pattern!r} is not a regular expression: {error}"
            ) from None
    else:
        in_blocks = {name: target for name, target in found.items() if target.blocks}
        matching = next(
            filter(None, (_value_projections(in_blocks, kind) for kind in VALUE_PROJECTIONS)), []
        )
    if not matching:
        what = (
            "no value projection is known"
            if pattern is None
            else f"no linear layer's parameter matches {pattern!r}"
        )
        raise ValueError(
            f"selector.pattern: {what}. Give a regular expression that is found in one of: "
            f"{', '.join(list(found)[-8:])}."
        )
    return matching[-1]


def _value_projections(targets: dict[str, Target], kind: str) -> list[Target]:
    """Return the value projections of this name; if the last one has an adapter, the adapter alone."""
    named = re.compile(rf"\.{kind}\.(base_layer\.)?weight$")
    plain = [target for name, target in targets.items() if named.search(name)]
    if not plain:
        return []
    layer = re.sub(r"(base_layer\.)?weight$", "", plain[-1].name)
    adapters = [t for name, t in targets.items() if name.startswith(f"{layer}lora_B.")]
    return [
        target for target in adapters if next(target.module.parameters()).requires_grad
    ] or plain


def _blocks(model: nn.Module, name: str) -> tuple[tuple[nn.Module, ...], int]:
    """The outermost list of modules around a parameter, and the place in it of the one that holds
    the parameter.
    """
    parts = name.split(".")
    for depth in range(1, len(parts)):
        around = model.get_submodule(".".join(parts[:depth]))
        if isinstance(around, nn.ModuleList):
            return tuple(around), int(parts[depth])
    return (), 0


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the keywords by which a transformer's forward keeps no keys and values for generation."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    return (
        {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
    )


class FeatureExtractor:
    """Features of the examples of a batch, on a model that may be under DeepSpeed (any ZeRO stage,
    offloaded or not).

    deepspeed_engine: a DeepSpeedEngine, or None for a model that is not sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        deepspeed_engine: Any = None,
        *,
        kind: str = "exact",
        rank: int,
        pattern: str | None = None,
        eps: float = 1e-3,
        two_sided: bool = True,
        agree: Callable[[int], int] = int,
    ) -> None:
        """agree: the largest of the ranks' values, so that all ranks of a sharded model make as
        many forwards.
        """
        self._model, self._deepspeed = model, deepspeed_engine
        self.target = find_target(model, pattern)
        self._kind = kind
        self._direction = Direction("low_rank", rank) if kind != "paper" else Direction()
        self._eps, self._two_sided, self._agree = eps, two_sided, agree
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = head if isinstance(head, nn.Module) else None
        logger.info("features: %s of %s %s", kind, self.target.name, self.target.shape)

    def __call__(self, batch: dict[str, Any], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(features (B, m) float32, losses (B,) float32) of a batch on the device; the loss of an
        example without labels is NaN. seeds: of the m directions.

        All ranks of a sharded model call it together. The model is left in the mode it was in,
        nothing of it is changed.
        """
        with self._pass(batch) as pass_:
            return (
                self._exact(pass_, seeds)
                if self._kind == "exact"
                else self._differences(pass_, seeds)
            )

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """The losses alone, (B,) float32."""
        with self._pass(batch) as pass_:
            return pass_.losses()[0]

    @contextmanager
    def _pass(self, batch: dict[str, Any]) -> Iterator[_Pass]:
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            with torch.no_grad():
                yield _Pass(self._model, self.target, self._head, batch)
        finally:
            for module in training:
                module.training = True
            if self._deepspeed is not None:
                release_gathered(self._deepspeed)

    def _exact(self, pass_: _Pass, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """<dL_i/dW, Z_k> = sum over tokens t of (delta_t .

        U_k) (x_t . V_k), delta the gradient of the matrix's output.
        """
        made: list[
            Tensor
        ] = []  # the input of the matrix and its output, from which the graph begins

        def begin_graph(inputs: Tensor, outputs: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            made[:] = inputs.detach(), outputs.detach().requires_grad_()
            return made[1]

        losses = pass_.losses(begin_graph)[0]
        with torch.enable_grad():
            counted = losses[losses.detach().isfinite()].sum()
        (delta,) = (
            torch.autograd.grad(counted, made[1])
            if counted.requires_grad
            else (torch.zeros_like(made[1]),)
        )
        inputs, factors = made[0].float(), self._factors(seeds, 1.0, delta.device)
        products = (delta.float() @ factors[0]) * (inputs @ factors[1])  # (B, L, m r)
        return pass_.per_example(products.unflatten(-1, (len(seeds), -1)).sum(-1)), losses.detach()

    def _differences(self, pass_: _Pass, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(L_i(W + eps Z_k) - L_i(W - eps Z_k)) / (2 eps), or with L_i(W) in place of the second."""
        (losses,) = pass_.losses(record=True)
        signs = (1.0, -1.0) if self._two_sided else (1.0,)
        elements = _STACK_ELEMENTS_ON_CPU if losses.device.type == "cpu" else _STACK_ELEMENTS
        per_run = max(1, elements // (self._agree(pass_.largest) * len(signs)))
        features = []
        for start in range(0, len(seeds), per_run):
            some = seeds[start : start + per_run]
            copies = len(some) * len(signs)

            def perturb(
                inputs: Tensor, outputs: Tensor, some: Sequence[int] = some, copies: int = copies
            ) -> Tensor:
                # (directions, B, L, outputs)
                moved = self._moved(inputs[: len(inputs) // copies], some)
                both = torch.cat([sign * moved for sign in signs]).flatten(0, 1)
                return (outputs + both).to(outputs.dtype)

            found = pass_.losses(perturb, copies=copies).view(len(signs), len(some), -1)
            apart = (found[0] - found[1]) / 2 if self._two_sided else found[0] - losses
            features.append(apart.T / self._eps)
        return torch.cat(features, 1), losses

    def _moved(self, inputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """eps x Z_k^T for each direction: (K, B, L, outputs)."""
        if not self._direction.has_factors(self.target):
            z = self._direction.combine_(
                torch.empty(self.target.shape, device=inputs.device),
                self.target,
                seeds=seeds,
                coefficients=[self._eps],
            )
            return (inputs.float() @ (z if self.target.input_first else z.T))[None]
        outer, inner = self._factors(seeds, self._eps, inputs.device)
        projected = (inputs.float() @ inner).unflatten(-1, (len(seeds), -1))  # (B, L, K, r)
        return torch.einsum("...kr,okr->k...o", projected, outer.unflatten(-1, (len(seeds), -1)))

    def _factors(
        self, seeds: Sequence[int], coefficient: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(U (outputs, K r), V (inputs, K r)): the directions as seen from the layer's outputs and
        inputs.
        """
        rows = range(self.target.shape[0])
        left, right = self._direction.factors(
            self.target, seeds, [coefficient] * len(seeds), rows, device
        )
        return (right.T, left) if self.target.input_first else (left, right.T)


class _Labelled(NamedTuple):
    """The labelled tokens of a batch. positions: of what predicts them, in (B L). owners: their
    examples.
    """

    positions: Tensor
    targets: Tensor
    owners: Tensor


class _Pass:
    """Forwards of a model on one batch, whose head sees labelled tokens only."""

    def __init__(
        self, model: nn.Module, target: Target, head: nn.Module | None, batch: dict[str, Any]
    ) -> None:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(f"a batch to select from needs labels; it has {', '.join(batch)}.")
        self._model, self._target, self._head, self._labels = model, target, head, labels
        self._inputs = without_cache(model) | {
            key: value for key, value in batch.items() if key != "labels"
        }
        self._before_last: Any = None  # the output of the block before the last
        self._labelled: _Labelled | None = None
        if labels.ndim == 2:  # position t predicts label t + 1
            positions = (
                functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)
            )
            self._labelled = _Labelled(
                positions, labels.flatten()[positions + 1], positions // labels.shape[1]
            )

    @property
    def largest(self) -> int:
        """Elements of the larger of the logits and the hidden states of the last block, per copy of
        the batch.
        """
        vocabulary = getattr(self._head, "out_features", 1)
        labelled = 1 if self._labelled is None else len(self._labelled.positions)
        tokens = max(value.numel() for value in self._inputs.values() if isinstance(value, Tensor))
        return max(labelled * vocabulary, tokens * 4 * max(self._target.shape))

    def losses(
        self,
        at_target: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        copies: int = 1,
        record: bool = False,
    ) -> Tensor:
        """The losses of the examples, (copies, B): the last block and the head run on so many
        copies of the batch.

        at_target: (input, output of the matrix's layer) -> the output to go on with. record: keep
        what the block before the last returns; later calls begin with it.
        """
        cut: list[bool] = []

        def keep_labelled(_: nn.Module, args: tuple) -> tuple | None:
            hidden = args[0]
            if self._labelled is None or hidden.shape[:-1] != (
                copies * len(self._labels),
                self._labels.shape[1],
            ):
                return None
            cut.append(True)
            return (
                hidden.reshape(copies, -1, hidden.shape[-1])[:, self._labelled.positions],
                *args[1:],
            )

        with ExitStack() as stack:
            if at_target is not None:
                change = at_target
                hook = self._target.module.register_forward_hook(
                    lambda _, args, output: change(args[0], output)
                )
                stack.callback(hook.remove)
            if self._head is not None:
                stack.callback(self._head.register_forward_pre_hook(keep_labelled).remove)
            stack.enter_context(self._beginning_at_last_block(record, copies))
            logits = logits_of(self._model(**self._repeated(self._inputs, copies)))
        if logits is None:
            raise ValueError(
                "the model gives no logits without labels, so the losses of single examples are "
                "not known."
            )
        with torch.set_grad_enabled(logits.requires_grad):
            if not cut or self._labelled is None:
                labels = self._labels.repeat(copies, *[1] * (self._labels.ndim - 1))
                return example_losses(logits, labels).view(copies, -1)
            positions, targets, owners = self._labelled
            tokens = functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.repeat(copies), reduction="none"
            )
            # one place for each token, not one sum for each example: adding in place has no fixed
            # order on a GPU
            placed = tokens.new_zeros(copies, self._labels.numel()).index_copy(
                1, positions, tokens.view(copies, -1)
            )
            sums = placed.view(copies, *self._labels.shape).sum(2)
            return sums / torch.bincount(owners, minlength=len(self._labels))

    def per_example(self, products: Tensor) -> Tensor:
        """(B, m): the sums over each example's tokens of what was made of the matrix's inputs, (B,
        L, m).
        """
        # its inputs are labelled tokens, (1, N, m)
        if self._target.module is self._head and self._labelled is not None:
            placed = products.new_zeros(self._labels.numel(), products.shape[-1])
            placed[self._labelled.positions] = products[0]
            return placed.view(*self._labels.shape, -1).sum(1)
        return products.flatten(1, -2).sum(1)

    def _repeated(self, value: Any, copies: int) -> Any:
        """Tensors that carry the batch, as many times; dicts, lists and tuples are followed."""

        def repeat(leaf: Any) -> Any:
            carries = (
                isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[0] == len(self._labels)
            )
            return leaf.repeat(copies, *[1] * (leaf.ndim - 1)) if carries else leaf

        return value if copies == 1 else tree_map(repeat, value)

    @contextmanager
    def _beginning_at_last_block(self, record: bool, copies: int) -> Iterator[None]:
        """Blocks before the last do nothing where it is known what they give; else that is kept,
        with `record`.
        """
        prefix = self._target.blocks[: self._target.block]
        if not prefix or (self._before_last is None and not record):
            yield
            return
        if record:
            hook = prefix[-1].register_forward_hook(
                lambda _, __, output: setattr(self, "_before_last", output)
            )
            try:
                yield
            finally:
                hook.remove()
            return
        forwards = [block.__dict__.get("forward") for block in prefix]
        known = self._repeated(self._before_last, copies)
        for block in prefix:
            block.forward = lambda *_, **__: known
        try:
            yield
        finally:
            for block, forward in zip(prefix, forwards, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
