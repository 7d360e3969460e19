"""Minus the scores of texts that a model generates, at the points of a step.

With the stacked form, one forward runs the prompts of all points, and each further forward one new
token of every row of every point. With another form, one point after the other generates its texts.
Both use a cache of keys and values where it fits the model; the stack does not generate without
one. The evaluator calls `GeneratedScores` in place of a form of evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zods.core.points import Point
from zods.data.batch import num_examples, take_rows
from zods.data.generation import Cached, NextLogits, Outputs, Prompts, Recomputed, generate
from zods.data.objectives import losses_of_scores
from zods.data.text_scores import TextObjective, prompts_of
from zods.forward.cached_generation import COMPARED_PROMPTS, NextTokens
from zods.forward.forms import CHECK_DISTANCE, PointLosses
from zods.forward.model_forwards import ModelForwards
from zods.forward.module_runners import StackRunner
from zods.forward.peak_memory import peak_memory
from zods.forward.stream_budget import StreamBudget

logger = logging.getLogger(__name__)


class GeneratedScores:
    """Compute minus the scores of generated texts at points.

    streams_per_forward: how many points one forward evaluates in a stack.
    """

    def __init__(
        self,
        forwards: ModelForwards,
        objective: TextObjective,
        budget: StreamBudget,
        beat: Callable[[], None],
    ) -> None:
        """budget: the memory for the points of one forward. beat: called before each forward, so
        that the watchdog sees that this rank goes on.
        """
        self.streams_per_forward = 2
        self._forwards, self._objective, self._beat = forwards, objective, beat
        self._budget = budget
        self._next_tokens = NextTokens(forwards.deepspeed, forwards.comm)
        self._runner = StackRunner(forwards.perturbed)

    def misfit(self, batch: Any, *, stacked: bool) -> str | None:
        """Find how the model generates, on the first batch; call it before `losses`.

        stacked: whether the form of evaluation is a stack. Returns the reason why texts cannot be
        generated in that form, or None. Collective: None on all ranks, or a reason on all ranks.
        Sets `streams_per_forward` if a stack fits.
        """
        prompts = prompts_of(batch)
        self._check_positions(prompts)
        self._next_tokens(self._outputs_at(None), prompts)
        if not stacked:
            return None
        rows = range(min(COMPARED_PROMPTS, len(prompts.input_ids)))
        misfit = self._stack_misfit(prompts, rows)
        how = "for all points together" if misfit is None else f"one point at a time ({misfit})"
        logger.info("generation in a step: %s", how)
        if misfit is None:
            needed = self._needed(prompts.rows(rows))
            self.streams_per_forward = self._budget.fitting(needed, len(rows))
        return misfit

    def losses(self, points: Sequence[Point | None], batch: Any, *, stacked: bool) -> PointLosses:
        """The losses at the points, each of its rows of a batch; None: the parameters as they are.

        stacked: whether a forward runs the rows of all points; none of them is None then.
        Raises ValueError where the batch has no prompts, or the model too few positions, and
        NotStackable where a later batch does not fit a stack.
        """
        prompts = prompts_of(batch)
        self._check_positions(prompts)
        references = self._objective.references(batch)
        size = num_examples(batch)
        rows = [range(size) if p is None or p.rows is None else p.rows for p in points]
        if stacked:
            at = [point for point in points if point is not None]
            tokens = self._generate_stacked(at, rows, prompts)
        else:
            tokens = [
                self._generate_at(point, prompts.rows(of_point))
                for point, of_point in zip(points, rows, strict=True)
            ]
        found = []
        for of_point, texts in zip(rows, tokens, strict=True):
            scores = self._objective.scores(texts, [references[row] for row in of_point])
            part = take_rows(batch, of_point)
            found.append(losses_of_scores(scores, part, self._forwards.objective.shifted))
        means, of_rows = zip(*found, strict=True)
        return PointLosses(torch.stack(means), of_rows)

    def _generate_at(self, point: Point | None, prompts: Prompts) -> Tensor:
        """Generate tokens (B, T) at a point."""
        return self._generate(self._next_tokens(self._outputs_at(point), prompts))

    def _generate_stacked(
        self, points: Sequence[Point], rows: Sequence[Sequence[int]], prompts: Prompts
    ) -> Sequence[Tensor]:
        """Generate tokens (rows of a point, T) at each point."""
        stack = prompts.rows([row for of_point in rows for row in of_point])
        outputs = self._outputs_in_stack(points, rows)
        tokens = self._generate(Cached(outputs, stack, self._next_tokens.arguments))
        return tokens.split([len(of_point) for of_point in rows])

    def _generate(self, next_logits: NextLogits) -> Tensor:
        return generate(next_logits, self._objective.decoding, self._largest)

    def _largest(self, number: int) -> int:
        """The largest number of all ranks that gather parameters together."""
        if not self._forwards.is_sharded:  # ranks may generate at different numbers of points
            return number
        return int(self._forwards.comm.max_over_ranks(number))

    # --- forwards ---------------------------------------------------------------------------------

    def _outputs_at(self, point: Point | None) -> Outputs:
        """The outputs of forwards at a point."""

        def outputs(inputs: dict[str, Any]) -> Any:
            self._beat()
            return self._forwards.outputs_at(point, inputs)

        return outputs

    def _outputs_in_stack(self, points: Sequence[Point], rows: Sequence[Sequence[int]]) -> Outputs:
        """The outputs of forwards on a stack with some rows of a batch for each point."""

        def outputs(inputs: dict[str, Any]) -> Any:
            self._beat()
            with self._runner.at(points, rows):
                return self._forwards.outputs(inputs)

        return outputs

    def _outputs_one_by_one(
        self, points: Sequence[Point], rows: Sequence[Sequence[int]]
    ) -> Outputs:
        """The logits of the same stack without a cache, from one forward for each point."""

        def outputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            sizes = [len(of_point) for of_point in rows]
            parts = zip(*(tensor.split(sizes) for tensor in inputs.values()), strict=True)
            found = [
                self._outputs_at(point)(dict(zip(inputs, part, strict=True)))["logits"]
                for point, part in zip(points, parts, strict=True)
            ]
            return {"logits": torch.cat(found)}

        return outputs

    # --- what fits the model ----------------------------------------------------------------------

    def _stack_misfit(self, prompts: Prompts, rows: range) -> str | None:
        """Return the reason why a stack with a cache does not give the logits of whole forwards, one
        for each point; None if it does.

        Collective. rows: of the prompts. The points have different numbers of them.
        """
        points, of_points = _points(), [rows, rows[: max(1, len(rows) // 2)]]
        stack = prompts.rows([row for of_point in of_points for row in of_point])
        arguments = self._next_tokens.arguments

        def begin() -> NextLogits:
            few = prompts.rows(rows)
            with self._runner.recording(points[0], len(rows)):
                Cached(self._forwards.outputs, few, arguments)(None)
            return Cached(self._outputs_in_stack(points, of_points), stack, arguments)

        expected = Recomputed(self._outputs_one_by_one(points, of_points), stack)
        return self._next_tokens.misfit(begin, expected)

    def _needed(self, prompts: Prompts) -> float:
        """Return the bytes that texts for one more point take in a stack, with all their tokens.

        Two forwards are measured, of the prompts and of their next tokens. The cache grows by as
        much with each further token. Collective.
        """
        size, length = prompts.input_ids.shape
        peaks = []
        for points in (_points()[:1], _points()):
            rows = [range(size)] * len(points)
            outputs = self._outputs_in_stack(points, rows)
            stack = prompts.rows([*range(size)] * len(points))
            copies = self._forwards.perturbed.scratch_bytes
            with peak_memory(self._forwards.comm.device) as peak:
                next_logits = Cached(outputs, stack, self._next_tokens.arguments)
                next_logits(next_logits(None).argmax(-1))
            # the buffer for copies serves all points
            copies = self._forwards.perturbed.scratch_bytes - copies
            peaks.append((peak.bytes - copies, peak.left - copies))
            del next_logits
        of_one, of_two = peaks
        further = max(0, self._objective.max_new_tokens - 2)
        return of_two[0] - of_one[0] + (of_two[1] - of_one[1]) * further / (length + 1)

    def _check_positions(self, prompts: Prompts) -> None:
        """Raise ValueError where the model has too few positions for prompts and their texts."""
        module = self._forwards.module
        limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        # of prefix or prompt tuning by peft: they stand before the prompt
        adapter = getattr(module, "active_peft_config", None)
        virtual = getattr(adapter, "num_virtual_tokens", None) or 0
        length, new = prompts.input_ids.shape[1], self._objective.max_new_tokens
        if limit is not None and virtual + length + new > limit:
            after = f" after {virtual} virtual tokens" if virtual else ""
            raise ValueError(
                f"zeroth_order.generate.max_new_tokens: found {new}, but a prompt has {length} "
                f"tokens{after} and the model {limit} positions. Give fewer, or truncate the prompts."
            )


def _points() -> list[Point]:
    """Two points that have only their distance in common."""
    return [Point(seed, CHECK_DISTANCE) for seed in (1, 2)]
