"""Decide on a cache of keys and values for generation, by a comparison on the first prompts.

Evaluations use one `NextTokens` per engine, and training steps on generated texts another one
(`zods.forward.generated_scores`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.data.batch import accepted_arguments
from zods.data.generation import (
    CACHE_ARGUMENTS,
    Cached,
    NextLogits,
    Outputs,
    Prompts,
    Recomputed,
    largest_difference,
)
from zods.forward.trial import failure_of

logger = logging.getLogger(__name__)

COMPARED_PROMPTS = 4
COMPARED_TOKENS = 3


class NextTokens:
    """Computes logits of next tokens, with a cache where it gives the logits of whole forwards.

    Collective: all ranks make the same calls.
    """

    def __init__(self, deepspeed_engine: Any, comm: Communicator) -> None:
        self._deepspeed, self._comm = deepspeed_engine, comm
        self.arguments = accepted_arguments(deepspeed_engine.module)
        self._caches: bool | None = None  # found by the first call

    def __call__(self, outputs: Outputs, prompts: Prompts) -> NextLogits:
        """Begin to continue prompts. The first call compares the two ways, and reports it.

        outputs: maps the inputs of a forward to the model's outputs.
        """
        if self._caches is None:
            misfit: str | None = f"it does not take {' and '.join(sorted(CACHE_ARGUMENTS))}"
            if self.arguments >= CACHE_ARGUMENTS:
                few = prompts.rows(range(min(COMPARED_PROMPTS, len(prompts.input_ids))))
                misfit = self.misfit(
                    lambda: Cached(outputs, few, self.arguments), Recomputed(outputs, few)
                )
            self._caches = misfit is None
            how = "with" if self._caches else f"without ({misfit})"
            logger.info("generation: %s a cache of keys and values", how)
        if self._caches:
            return Cached(outputs, prompts, self.arguments)
        return Recomputed(outputs, prompts)

    def misfit(self, begin: Callable[[], NextLogits], expected: NextLogits) -> str | None:
        """The reason why logits are not the expected ones, up to rounding; None if they are.

        The same answer on all ranks.
        """
        dtype = next(self._deepspeed.module.parameters()).dtype
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        reason = None
        try:
            error = largest_difference(begin(), expected, COMPARED_TOKENS)
            if not error <= tolerance:
                reason = f"its logits are {error:.1e} off those of whole forwards (relative)"
        except Exception as error:  # a model may do anything in a use that it was not written for
            reason = failure_of(error, self._deepspeed)
        (failures,) = self._comm.sum_over_ranks([float(reason is not None)])
        return reason or ("it fails on another rank" if failures else None)
