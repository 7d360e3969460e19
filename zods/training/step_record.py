"""Combine the reduced losses of a step into its record: the estimate's coefficients and the step
size.
"""

from __future__ import annotations

from zods.core.update_rule import StepRule
from zods.training.loss_exchange import ReducedLosses
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Step


def combine(run: TrainingRun, rule: StepRule, reduced: ReducedLosses) -> tuple[Step, float]:
    """Make the record of the next step. Returns it with the mean projected gradient around the
    parameters.
    """
    zo, weight, step = run.config.zeroth_order, run.anchor_weight, run.state.global_steps
    terms, projected_grad, products = rule.estimate(step, reduced.differences, weight)
    coefficients = tuple(term.coefficient for term in terms)
    epoch_and_step = None if run.loader is None else run.loader.epoch_and_step
    logged = reduced.loss if coefficients else None
    lr, sub_batch = run.lrs()[0], run.recorder.sub_batch()
    normalizes = zo.normalize and bool(coefficients)
    rms = run.scale_with(coefficients, weight).rms if normalizes else None
    measured = zo.anchor_weight == "auto" and bool(coefficients)
    record = Step(
        *(step, logged, lr, coefficients, epoch_and_step, sub_batch),
        rms=rms,
        weight=weight,
        products=products if measured else None,
        in_16_bits=rule.logs_16_bits,
    )
    return record, projected_grad
