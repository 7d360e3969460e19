"""Forwards of modules that multiply by one matrix, without a whole perturbed copy of the matrix.

`multiply_in_blocks` copies some rows of a large matrix at a time. `run_low_rank` runs one forward
at the center, and adds the low-rank direction to the output:

    x (W + c U V^T)^T = x W^T + c (x V) U^T

Called by `zods.forward.module_runners`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zods.core.directions import Direction
from zods.core.points import Center
from zods.forward import low_rank
from zods.forward.large_matrices import blocks
from zods.forward.parameter_copies import Centers, Perturber
from zods.forward.parameter_usage import Perturbable
from zods.kernels import grouped_products

Pair = tuple[int, ...]  # a stream and its mirror, or one stream


def plain_product(
    module: torch.nn.Module,
    held: Sequence[Perturbable],
    args: tuple,
    kwargs: dict[str, Any],
) -> low_rank.MatrixProduct | None:
    """Return how a call of a module multiplies its one input by its weight, or None if the call may
    do anything else.

    held: the perturbed parameters that the module uses. Where gradients are enabled, the result is
    None, because autograd needs the module's own forward.
    """
    product = low_rank.product_of(module)
    own = {id(p) for name, p in module._parameters.items() if name in ("weight", "bias")}
    alone = id(module._parameters.get("weight")) in own and all(id(p.param) in own for p in held)
    plain = alone and not torch.is_grad_enabled()
    return product if plain and len(args) == 1 and not kwargs else None


def multiply_in_blocks(
    perturber: Perturber,
    module: Any,
    weight: Perturbable,
    gathered: Sequence[Perturbable],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    pair: Pair,
    centers: Centers,
) -> None:
    """Write a linear module's outputs for the streams of a pair, one block of output columns at a
    time.

    Each block needs a copy of only some rows of the weight. gathered: all perturbed parameters of
    the module. inputs, outputs: one tensor per stream.
    """
    others = [p for p in gathered if p is not weight]
    parts = [(slice(rows.start, rows.stop), rows) for rows in blocks(weight.param.data)]
    with perturber.scratch.scope():
        largest = weight.param.data[parts[0][0]]
        perturber.reserve([largest, *(p.param.data for p in others)], len(pair))
        copies = perturber.copies(others, pair, centers)
        for part, rows in parts:
            with perturber.scratch.scope():
                made = [perturber.empty_like(weight.param.data[part]) for _ in pair]
                perturber.perturb_(made, weight, perturber.points[pair[0]], centers, rows)
                for x, output, matrix, of_stream in zip(inputs, outputs, made, copies, strict=True):
                    with perturber.placed(of_stream):
                        bias = None if module.bias is None else module.bias[part]
                        columns = output.view(-1, output.shape[-1])[:, part]
                        low_rank.linear_(columns, x, matrix, bias)


def run_low_rank(
    perturber: Perturber,
    module: Any,
    held: Mapping[Any, Perturbable],
    product: low_rank.MatrixProduct,
    original: Callable,
    x: torch.Tensor,
    pairs: Sequence[Pair],
    rows: Sequence[int],
) -> torch.Tensor:
    """Run a matrix module once for the streams that have the same center, then add the perturbation
    of each stream.

    held: the module's perturbed parameters. x: the stack of all streams' inputs. rows: the number
    of rows of each stream.
    """
    bounds = [0, *itertools.accumulate(rows)]
    centers: Centers = {}
    stored = {param: param.data for param in held}
    starts: list[dict[Any, Center]] = [
        {
            param: perturber.center(p, stored[param], perturber.points[pair[0]], centers)
            for param, p in held.items()
        }
        for pair in pairs
    ]
    outputs, begin = [], 0
    for i, pair in enumerate(pairs):
        same = i + 1 < len(starts) and all(
            starts[i + 1][k].weight is starts[i][k].weight for k in held
        )
        if not same:
            end = bounds[pair[-1] + 1]
            elsewhere = [
                (p, starts[i][k].weight)
                for k, p in held.items()
                if starts[i][k].weight is not stored[k]
            ]
            with perturber.placed(elsewhere):
                outputs.append(original(x[begin:end]))
            begin = end
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    of_centers = itertools.groupby(
        range(len(pairs)), key=lambda i: perturber.points[pairs[i][0]].center
    )
    for _, of_center in of_centers:
        same_center = list(of_center)
        _add_perturbations(
            perturber, module, held, product, output, x,
            [pairs[i] for i in same_center], bounds, starts[same_center[0]],
        )  # fmt: skip
    return output


def _add_perturbations(
    perturber: Perturber,
    module: Any,
    held: Mapping[Any, Perturbable],
    product: low_rank.MatrixProduct,
    output: torch.Tensor,
    x: torch.Tensor,
    pairs: Sequence[Pair],
    bounds: Sequence[int],
    start: Mapping[Any, Center],
) -> None:
    """Add the perturbations of the matrix and of the bias to the outputs of pairs with one center.

    output: computed with the weights of the center; changed in place. bounds: the first row of each
    stream in `x` and in `output`. start: the center.
    """
    points = [perturber.points[pair[0]] for pair in pairs]
    seeds, coefficients = [p.seed for p in points], [p.coefficient for p in points]
    direction, device = perturber.direction, x.device
    weight, bias = held.get(module.weight), getattr(module, "bias", None)
    scale, drift, factors, biases = 1.0, None, None, None
    if weight is not None:
        center, rows = start[module.weight], range(weight.shape[0])
        scale = center.scale
        if center.seeds:
            drift = direction.factors(weight, center.seeds, center.coefficients, rows, device)
        factors = direction.factor_stack(weight, seeds, coefficients, rows, device)
    if bias in held:
        of_pairs = torch.tensor(coefficients, device=device).view(-1, 1)
        biases = direction.stack(held[bias], seeds, device) * of_pairs
    added = OutputPerturbations(
        *(scale, drift, factors, biases),
        bias_drift=None if bias is None else _bias_drift(direction, bias, held, start, scale),
    )
    rows_of_pairs = [(bounds[pair[0]], bounds[pair[-1] + 1]) for pair in pairs]
    mirrored = [len(pair) > 1 for pair in pairs]
    sizes = {end - begin for begin, end in rows_of_pairs}
    part = slice(rows_of_pairs[0][0], rows_of_pairs[-1][1])
    # On a CPU, torch's product of thin matrices in a batch is slow, above all in bfloat16.
    if device.type != "cpu" and len(set(mirrored)) == len(sizes) == 1:
        added.add_together(output[part], x[part], product, len(pairs), mirrored[0])
    else:
        number_of_rows = [end - begin for begin, end in rows_of_pairs]
        added.add_each(output[part], x[part], product, number_of_rows, mirrored)


@dataclass(frozen=True)
class OutputPerturbations:
    """What is added to the outputs of pairs with one center, in float32.

    scale: of the output. drift: factors of the center's own terms. factors: (K, rows, r) and
    (K, r, columns), of each pair's perturbation of the matrix. biases: (K, outputs), each pair's
    perturbation of the bias. bias_drift: (outputs,), see `_bias_drift`.
    """

    scale: float
    drift: tuple[torch.Tensor, torch.Tensor] | None
    factors: tuple[torch.Tensor, torch.Tensor] | None
    biases: torch.Tensor | None
    bias_drift: torch.Tensor | None

    def add_each(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        product: low_rank.MatrixProduct,
        rows: Sequence[int],
        mirrored: Sequence[bool],
    ) -> None:
        """Add to the outputs of all pairs. rows, mirrored: the number of rows of each pair, and
        whether the second half of them is the mirror's.
        """
        outputs = out.view(-1, out.shape[-1])
        tokens = len(outputs) // max(len(x), 1)  # of a row
        bounds = [tokens * row for row in itertools.accumulate(rows, initial=0)]
        common = []
        if self.drift is not None:
            common.append(low_rank.projected(product, x, *self.drift))
        if self.bias_drift is not None:
            ones = torch.ones(len(outputs), 1, device=x.device)
            common.append((ones, self.bias_drift[None]))
        inner, outer = low_rank.projected_each(product, x, self.factors, self.biases, bounds)
        if any(mirrored):
            streams = [
                (sign, tokens * rows_of_pair // (2 if has_mirror else 1))
                for rows_of_pair, has_mirror in zip(rows, mirrored, strict=True)
                for sign in ((1.0, -1.0) if has_mirror else (1.0,))
            ]
            inner *= _signs_of_rows(tuple(streams), x.device)
        grouped_products.add_products_(
            *(outputs, inner, outer, bounds),
            scale=self.scale,
            common=None if not common else _joined(common),
        )

    def add_together(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        product: low_rank.MatrixProduct,
        pairs: int,
        mirrored: bool,
    ) -> None:
        """Add to the outputs of all pairs, which have the same number of rows, in one product.

        The factors are rounded to the dtype of the output.
        """
        outputs = out.view(pairs, -1, out.shape[-1])
        ones = torch.ones(outputs.shape[1], 1, device=x.device)
        matrices = []
        if self.drift is not None:
            inner, outer = low_rank.projected(product, x, *self.drift)
            matrices.append((inner.view(pairs, outputs.shape[1], -1), outer.expand(pairs, -1, -1)))
        if self.bias_drift is not None:
            matrices.append((ones.expand(pairs, -1, -1), self.bias_drift.expand(pairs, 1, -1)))
        signs = ones.clone()
        if mirrored:
            signs[len(ones) // 2 :] = -1.0
        if self.factors is not None:
            inner, outer = low_rank.projected_together(product, x, *self.factors)
            matrices.append((inner * signs, outer))
        if self.biases is not None:
            matrices.append((signs.expand(pairs, -1, -1), self.biases[:, None]))
        inner, outer = (
            torch.cat(side, 2 - k) for k, side in enumerate(zip(*matrices, strict=True))
        )
        outputs.baddbmm_(inner.to(out.dtype), outer.to(out.dtype), beta=self.scale)


@functools.lru_cache(maxsize=8)  # in a forward, most modules have the same streams
def _signs_of_rows(streams: tuple[tuple[float, int], ...], device: torch.device) -> torch.Tensor:
    """Each stream's sign for each of its rows, (rows, 1). streams: (sign, number of rows) of each."""
    signs = torch.tensor([sign for sign, _ in streams], dtype=torch.float32, device=device)
    lengths = torch.tensor([length for _, length in streams], device=device)
    rows = sum(length for _, length in streams)
    return signs.repeat_interleave(lengths, output_size=rows)[:, None]


def _joined(
    products: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product is the sum of the products."""
    inner, outer = zip(*products, strict=True)
    return torch.cat(inner, 1), torch.cat(outer)


def _bias_drift(
    direction: Direction,
    bias: Any,
    held: Mapping[Any, Perturbable],
    start: Mapping[Any, Center],
    scale: float,
) -> torch.Tensor | None:
    """The bias at the center, less `scale` times the bias that was added to the output, in float32;
    None if this is 0.
    """
    parameter, center = held.get(bias), start.get(bias, Center(bias.data))
    if center.scale == scale and not center.seeds:
        return None
    used = center.weight.float()
    if parameter is None:
        return (1.0 - scale) * used
    return direction.combine_(
        torch.empty_like(used),
        parameter,
        weight=used,
        scale=center.scale - scale,
        seeds=center.seeds,
        coefficients=center.coefficients,
    )
