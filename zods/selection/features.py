"""Features of examples: a few numbers each, whose distances approximate the distances of gradients.

Feature k of example i is the derivative of the example's loss along direction k:

    f_ik = <dL_i/dW, Z_k>,   Z_k = U_k V_k^T / sqrt(r)

W is one matrix: the value projection of the last block. L_i is the mean over the example's own
labelled tokens. So the features are a random projection of the gradient of W. The directions are
low-rank and made from seeds. The gradients of W would be large, and are never made.

There are three kinds of such features, and a fourth that is no derivative:

    zo     differences of losses at points along the directions. All blocks but the last run once.
           The last block and the head run on stacks of the points.
    exact  the same derivatives, by automatic differentiation from the losses back to the output of
           W, in one forward
    paper  differences along one direction only (Nguyen et al. 2024, arXiv:2407.19580v1); see
           `zods.selection.baselines`
    hidden_states
           the mean input of the head over the labelled tokens, for comparison: examples that the
           model represents alike need not have similar gradients

Only labelled tokens reach the head. Caller: `zods.selection.sub_batches`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from zods.core.directions import Direction
from zods.data.batch import without_weights
from zods.data.objectives import IGNORE_INDEX, example_losses, logits_of
from zods.params.zero3_adapter import release_gathered
from zods.selection.target_matrix import Target, find_target

logger = logging.getLogger(__name__)

# Elements of the largest tensor when the last block runs on copies of the batch
_STACK_ELEMENTS = 1 << 27
# On a CPU a larger stack is no faster, and does not fit the cache.
_STACK_ELEMENTS_ON_CPU = 1 << 22


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments that switch off the cache of keys and values of a transformer."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    return (
        {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
    )


class FeatureExtractor:
    """Computes the features and losses of the examples of a batch.

    The model may be under DeepSpeed, at any ZeRO stage, offloaded or not. deepspeed_engine: a
    DeepSpeedEngine, or None for a model that is not sharded.
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
        """Find the matrix whose gradients the features project.

        kind: "exact", "zo", "paper" or "hidden_states". rank: rank of the low-rank directions.
        pattern: as in `find_target`. eps, two_sided: of the differences. agree: returns the largest
        of the ranks' values, so that all ranks of a sharded model make the same number of forwards.

        Raises ValueError where `pattern` matches no matrix, and where the model has no head for
        "hidden_states".
        """
        self._model, self._deepspeed = model, deepspeed_engine
        self.target = find_target(model, pattern)
        self._kind = kind
        self._direction = Direction("low_rank", rank) if kind != "paper" else Direction()
        self._eps, self._two_sided, self._agree = eps, two_sided, agree
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = head if isinstance(head, nn.Module) else None
        if kind == "hidden_states" and self._head is None:
            raise ValueError(
                f'selector.features: "hidden_states" are the inputs of a language model\'s head, and '
                f"{type(model).__name__} has no output embeddings. Use exact or zo."
            )
        logger.info("features: %s of %s %s", kind, self.target.name, self.target.shape)

    def __call__(self, batch: dict[str, Any], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Compute (features (B, m) float32, losses (B,) float32) of a batch on the device.

        seeds: seeds of the m directions. Hidden states have no directions, and m is their size. The
        loss of an example without labels is NaN. All ranks of a sharded model must call it
        together. The model keeps its weights and its training mode.
        """
        with self._pass(batch) as pass_:
            if self._kind == "hidden_states":
                return pass_.mean_head_inputs()
            if self._kind == "exact":
                return self._exact(pass_, seeds)
            return self._differences(pass_, seeds)

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """Compute the losses only, (B,) float32."""
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
        """Compute <dL_i/dW, Z_k> = sum over tokens t of (delta_t . U_k) (x_t . V_k).

        x_t is the matrix's input, and delta_t the gradient of its output.
        """
        made: list[Tensor] = []  # the matrix's input and its output, where the graph begins

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
        """Compute (L_i(W + eps Z_k) - L_i(W - eps Z_k)) / (2 eps).

        One-sided differences are (L_i(W + eps Z_k) - L_i(W)) / eps.
        """
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
        """Compute eps x Z_k^T for each of the K directions: (K, B, L, outputs)."""
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
        """The factors of the directions, U (outputs, K r) and V (inputs, K r)."""
        rows = range(self.target.shape[0])
        left, right = self._direction.factors(
            self.target, seeds, [coefficient] * len(seeds), rows, device
        )
        return (right.T, left) if self.target.input_first else (left, right.T)


class _Labelled(NamedTuple):
    """The labelled tokens of a batch.

    positions: index in the flat (B L) of the position that predicts each token. targets: the
    tokens. owners: index of each token's example.
    """

    positions: Tensor
    targets: Tensor
    owners: Tensor


class _Pass:
    """Forwards of a model on one batch, in which the head runs on labelled tokens only."""

    def __init__(
        self, model: nn.Module, target: Target, head: nn.Module | None, batch: dict[str, Any]
    ) -> None:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"a batch to select from needs labels; it has {', '.join(batch)}. Add labels in "
                "collate_fn."
            )
        self._model, self._target, self._head, self._labels = model, target, head, labels
        self._inputs = without_cache(model) | {
            key: value for key, value in without_weights(batch).items() if key != "labels"
        }
        self._before_last: Any = None  # the output of the block before the last
        self._labelled: _Labelled | None = None
        self._head_inputs: Tensor | None = None  # of the labelled tokens, (copies, N, inputs)
        if labels.ndim == 2:  # position t predicts label t + 1
            positions = (
                functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)
            )
            self._labelled = _Labelled(
                positions, labels.flatten()[positions + 1], positions // labels.shape[1]
            )

    @property
    def largest(self) -> int:
        """Elements of the largest tensor of the last block or the head, per copy of the batch."""
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
        """Compute the losses of the examples, (copies, B).

        copies: number of copies of the batch on which the last block and the head run. at_target:
        maps the input and output of the matrix's layer to the output that is used instead. record:
        keep the output of the block before the last, from which later calls start.
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
            self._head_inputs = hidden.reshape(copies, -1, hidden.shape[-1])[
                :, self._labelled.positions
            ]
            return (self._head_inputs, *args[1:])

        with ExitStack() as stack:
            if at_target is not None:
                change = at_target
                hook = self._target.module.register_forward_hook(
                    lambda _, args, output: change(args[0], output)
                )
                stack.callback(hook.remove)
            if self._head is not None:
                stack.callback(self._head.register_forward_pre_hook(keep_labelled).remove)
            stack.enter_context(self._skip_known_blocks(record, copies))
            logits = logits_of(self._model(**self._repeated(self._inputs, copies)))
        if logits is None:
            raise ValueError(
                "the model returns no logits for a batch without labels, so that the losses of "
                "single examples are not known. Return logits from forward."
            )
        with torch.set_grad_enabled(logits.requires_grad):
            if not cut or self._labelled is None:
                labels = self._labels.repeat(copies, *[1] * (self._labels.ndim - 1))
                return example_losses(logits, labels).view(copies, -1)
            return self._losses_of_labelled(self._labelled, logits, copies)

    def _losses_of_labelled(self, labelled: _Labelled, logits: Tensor, copies: int) -> Tensor:
        """Compute the losses of the examples, (copies, B), from logits of the labelled tokens."""
        positions, targets, owners = labelled
        tokens = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.repeat(copies), reduction="none"
        )
        # Each token is copied to its own element before the sum. Adding tokens of an example in
        # place has no fixed order on a GPU.
        by_position = tokens.new_zeros(copies, self._labels.numel()).index_copy(
            1, positions, tokens.view(copies, -1)
        )
        sums = by_position.view(copies, *self._labels.shape).sum(2)
        return sums / torch.bincount(owners, minlength=len(self._labels))

    def per_example(self, products: Tensor) -> Tensor:
        """Sum `products` (B, L, m) over the tokens of each example: (B, m)."""
        # The inputs of the head are labelled tokens only: `products` is (1, N, m).
        if self._target.module is self._head and self._labelled is not None:
            return self._sums_of_labelled(products[0], self._labelled)
        return products.flatten(1, -2).sum(1)

    def mean_head_inputs(self) -> tuple[Tensor, Tensor]:
        """Compute the mean input of the head over each example's labelled tokens, and the losses.

        Returns (B, inputs), (B,). Both are NaN for an example without labels.
        """
        (losses,) = self.losses()
        if self._head_inputs is None or self._labelled is None:
            raise ValueError(
                'selector.features: "hidden_states" need labels of single tokens that the head '
                "predicts. Use exact or zo."
            )
        sums = self._sums_of_labelled(self._head_inputs[0].float(), self._labelled)
        counts = torch.bincount(self._labelled.owners, minlength=len(self._labels))
        return sums / counts[:, None], losses

    def _sums_of_labelled(self, values: Tensor, labelled: _Labelled) -> Tensor:
        """Sum `values` (N, m) of the labelled tokens over the tokens of each example: (B, m)."""
        by_position = values.new_zeros(self._labels.numel(), values.shape[-1])
        by_position[labelled.positions] = values
        return by_position.view(*self._labels.shape, -1).sum(1)

    def _repeated(self, value: Any, copies: int) -> Any:
        """Repeat the tensors whose first dimension is the batch, inside dicts, lists and tuples."""

        def repeat(leaf: Any) -> Any:
            carries = (
                isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[0] == len(self._labels)
            )
            return leaf.repeat(copies, *[1] * (leaf.ndim - 1)) if carries else leaf

        return value if copies == 1 else tree_map(repeat, value)

    @contextmanager
    def _skip_known_blocks(self, record: bool, copies: int) -> Iterator[None]:
        """Skip the blocks before the last where their output is known from an earlier forward.

        record: keep the output for later forwards.
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
