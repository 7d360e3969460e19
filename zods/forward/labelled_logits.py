"""Find whether a model computes its logits at given positions alone, and evaluate with it.

The logits of a batch often take more memory than all else of a forward, and a loss reads those
before its labels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.data.batch import accepted_arguments
from zods.data.labelled_positions import (
    POSITIONS_OF_LOGITS,
    labelled_part,
    positions_before_labels,
)
from zods.data.objectives import logits_of
from zods.forward.trial import failure_of

Outputs = Callable[[Any], Any]


class LogitsTrial:
    """Compares a model's logits in other calls with those of a whole forward."""

    def __init__(self, deepspeed_engine: Any, comm: Communicator) -> None:
        self._deepspeed, self._comm = deepspeed_engine, comm
        self._arguments = accepted_arguments(deepspeed_engine.module)

    def gives(self, expected: torch.Tensor, outputs: Outputs, inputs: Any) -> bool:
        """Whether a forward gives the expected logits, up to rounding, on all ranks. Collective."""
        differs, tolerance = True, 1e-5 if expected.dtype == torch.float32 else 1e-2
        try:
            found = logits_of(outputs(inputs))
            if found is not None and found.shape == expected.shape:
                error = (found.float() - expected.float()).norm()
                differs = not error <= tolerance * expected.float().norm()
        except Exception as error:  # a model may take a number of positions alone, or need labels
            failure_of(error, self._deepspeed)
        return not self._comm.sum_over_ranks([float(differs)])[0]

    def takes_positions(
        self, whole: torch.Tensor, outputs: Outputs, inputs: dict[str, Any]
    ) -> bool:
        """Whether the model gives logits at positions alone. Collective.

        whole: (B, L, V), the logits of the inputs. With virtual tokens (prompt tuning) L is not
        the length of the rows, and positions are not used.
        """
        rows = inputs.get("input_ids")
        has_others = rows is not None and rows.shape[:2] != whole.shape[:2]
        if POSITIONS_OF_LOGITS not in self._arguments or whole.ndim != 3 or has_others:
            return False
        positions = torch.arange(0, whole.shape[1], 2, device=whole.device)
        at_positions = {**inputs, POSITIONS_OF_LOGITS: positions}
        return self.gives(whole[:, positions], outputs, at_positions)


class LabelledLogits:
    """Computes logits for labels: at the positions before them alone, where the model can.

    Evaluations use one per engine. Collective: all ranks make the same calls.
    """

    def __init__(self, deepspeed_engine: Any, comm: Communicator) -> None:
        self._trial = LogitsTrial(deepspeed_engine, comm)
        self._takes_positions: bool | None = None  # found by the first call

    def __call__(
        self, outputs: Outputs, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, n, V), and the labels (B, n) of these positions.

        outputs: maps the inputs of a forward to the model's outputs. inputs: tensors with a row for
        each sequence. labels: (B, L), aligned so
        that position t predicts label t + 1; so are the returned ones. The first call compares the
        two ways.
        """
        if self._takes_positions is None:
            # one row, so that the logits of two forwards take little memory
            row = {key: value[:1] for key, value in inputs.items()}
            whole = outputs(row)["logits"]
            self._takes_positions = self._trial.takes_positions(whole, outputs, row)
        positions = positions_before_labels(labels) if self._takes_positions else None
        if positions is None:
            return outputs(inputs)["logits"], labels
        logits = outputs({**inputs, POSITIONS_OF_LOGITS: positions})["logits"]
        return logits, labelled_part({"labels": labels}, positions)["labels"]
