"""The steps of a run, with evaluations and checkpoints between them. Caller: `zods.finetune`."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import datasets
from deepspeed.comm.comm import comms_logger
from tqdm import tqdm

from zods.cli.options import RunArguments
from zods.cli.run_folder import RunFolder
from zods.comm.stop_request import StopRequested
from zods.tasks import Task, with_derived
from zods.training.engine import ZerothOrderEngine
from zods.training.first_order import FirstOrderEngine
from zods.training.resume import CHECKPOINTS
from zods.training.step_outputs import StepReport

logger = logging.getLogger(__name__)


def evaluate(
    engine: ZerothOrderEngine | FirstOrderEngine,
    task: Task,
    held_out: datasets.Dataset,
    folder: RunFolder,
    kind: str = "eval",
) -> dict[str, float]:
    """Compute the metrics of held-out data, and add them to metrics.jsonl as a line of `kind`."""
    metrics = with_derived(engine.evaluate(held_out, task.collate_eval, task.measure))
    folder.record(kind, engine.global_steps, **metrics)
    return metrics


def evaluate_unless_done(
    engine: ZerothOrderEngine | FirstOrderEngine,
    task: Task,
    held_out: datasets.Dataset,
    folder: RunFolder,
) -> dict[str, float]:
    """Evaluate, unless an earlier start of the run has evaluated after the same step."""
    done: dict[str, float] = engine.comm.gather_objects(folder.evaluation_at(engine.global_steps))[
        0
    ]
    return done or evaluate(engine, task, held_out, folder)


@dataclass
class Trained:
    """Measurements of the steps: seconds of each, and bytes that all steps sent."""

    seconds: list[float] = field(default_factory=list)
    scalar_bytes: int = 0
    zero3_bytes: int = 0


def train_steps(
    engine: ZerothOrderEngine | FirstOrderEngine,
    run: RunArguments,
    task: Task,
    held_out: datasets.Dataset,
    folder: RunFolder,
) -> Trained:
    """Train to the last step, with evaluations and checkpoints between the steps.

    Raises StopRequested, on all ranks, where one is asked to stop.
    """
    assert engine.training_dataloader is not None
    last = run.max_steps
    if last is None:
        last = run.num_epochs * engine.training_dataloader.steps_per_epoch
    trained = Trained()
    progress = tqdm(
        total=last, initial=engine.global_steps, desc="steps", disable=engine.global_rank != 0
    )
    with progress:
        while engine.global_steps < last:
            step = engine.global_steps
            if run.eval_interval and step and step % run.eval_interval == 0:
                metrics = evaluate_unless_done(engine, task, held_out, folder)
                if engine.global_rank == 0:
                    progress.write(f"step {step}: held out: {_text(metrics)}", file=sys.stderr)
            report = train_one_step(engine, trained, folder)
            if report is not None:
                progress.set_postfix_str(_progress_text(report))
            progress.update(engine.global_steps - step)
            if engine.should_stop and engine.global_steps < last:
                raise StopRequested
            if run.save_interval and engine.global_steps % run.save_interval == 0:
                save(engine, run, folder)
    return trained


def _progress_text(report: StepReport) -> str:
    slope = (
        "" if report.projected_grad is None else f"projected_grad {report.projected_grad:+.2e}, "
    )
    return f"loss {report.loss:.4f}, {slope}{report.seconds:.3f} s/step"


def train_one_step(
    engine: ZerothOrderEngine | FirstOrderEngine, trained: Trained, folder: RunFolder
) -> StepReport | None:
    """Make a step, and add its measurements to `trained` and to metrics.jsonl.

    Returns its report; None where this replica was left out and has made the leader's steps.
    """
    gathered = _logged_bytes()
    engine.train_batch()
    report = engine.last_step
    if report is None:
        return None
    trained.seconds.append(report.seconds)
    trained.scalar_bytes += report.scalar_bytes
    trained.zero3_bytes += _logged_bytes() - gathered
    folder.record(
        "train",
        report.step,
        loss=report.loss,
        projected_grad=report.projected_grad,
        lr=report.lr,
        seconds=round(report.seconds, 6),
        scalar_bytes=report.scalar_bytes,
        skipped=report.skipped,
        **report.measured,
        **_of_selection(engine, report),
    )
    return report


def _of_selection(
    engine: ZerothOrderEngine | FirstOrderEngine, report: StepReport
) -> dict[str, Any]:
    """The time of the choice of examples, and the number of examples chosen from each source."""
    if engine.selection is None:
        return {}
    chosen = engine.selection.report
    by_source = chosen.quotas if chosen is not None and len(chosen.quotas) > 1 else None
    return {
        "selection_seconds": round(report.selection_seconds, 6),
        **({} if by_source is None else {"sources": by_source}),
    }


def save(
    engine: ZerothOrderEngine | FirstOrderEngine, run: RunArguments, folder: RunFolder
) -> None:
    """Save a full checkpoint.

    Where it cannot be written, a run of zeroth-order steps continues, because its log is sufficient
    to resume. Raises OSError in first-order training.
    """
    try:
        engine.save_checkpoint(folder.path / CHECKPOINTS, keep=run.save_total_limit)
    except OSError as error:
        if isinstance(engine, FirstOrderEngine):
            raise
        if engine.global_rank == 0:
            logger.warning(
                "no checkpoint at step %d: %s. The run goes on: its log is whole.",
                engine.global_steps,
                error,
            )


def _text(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _logged_bytes() -> int:
    """Count the bytes of all collectives that DeepSpeed's communication logger has seen.

    The count is 0 where the logger is off.
    """
    sizes = comms_logger.get_raw_data().values()
    return sum(size * record[0] for by_size in sizes for size, record in by_size.items())
