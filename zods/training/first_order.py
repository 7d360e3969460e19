"""First-order training by DeepSpeed's own engine, with the part of the zeroth-order engine's
interface that `zods.finetune` uses.

It is there for comparison: the same data in the same order, the same loss, with or without a
selector.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from zods.comm.communicator import Communicator
from zods.comm.stop_request import StopRequest
from zods.config.deepspeed_json import FirstOrderConfig
from zods.data.batch import WEIGHTS
from zods.data.loader import TrainingLoader
from zods.data.objectives import Objective, loss_count
from zods.files import rename, sync
from zods.forward.dataset_metrics import Measure, check_own_loss, measure_whole
from zods.selection.loaders import SelectingLoader, weighted_loss
from zods.selection.sub_batches import SubBatches
from zods.training import export
from zods.training.log_checks import check_not_lost
from zods.training.recorder import Recorder
from zods.training.resume import CHECKPOINTS, LOG_NAME, check_new, open_log
from zods.training.step_outputs import StepReport
from zods.trajectory.log import Log, parse_log
from zods.trajectory.records import Header, Step

# classes of objects in a checkpoint of DeepSpeed 0.19.8, besides those that torch allows
CLASSES_IN_CHECKPOINTS = [LossScaler, ZeroStageEnum, fragment_address]


class FirstOrderEngine:
    """A model under DeepSpeed with its optimizer.

    The loss of a step is the objective of `zods.data.objectives`.
    """

    anchor = None

    def __init__(
        self,
        model: torch.nn.Module,
        config: FirstOrderConfig,
        dataset: Any,
        collate_fn: Callable | None,
    ) -> None:
        """Raises ValueError, the same on all ranks, where model, data and selector do not fit
        together.
        """
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.deepspeed = deepspeed.initialize(
            model=model,
            model_parameters=trainable,
            config=config.deepspeed,
            dist_init_required=False,
        )[0]
        self.module = self.deepspeed.module
        self.comm = Communicator(torch.device(self.deepspeed.device))
        self.config = config
        self.global_steps = 0
        self.last_step: StepReport | None = None
        self.stop = StopRequest()
        self.should_stop = False
        self.selection: SubBatches | None = None
        self._loss_checked = False
        micro_batch, accumulation = (
            self.deepspeed.train_micro_batch_size_per_gpu(),
            self.gradient_accumulation_steps(),
        )
        with self.comm.same_on_all_ranks():
            if config.selector is None:
                self.training_dataloader: TrainingLoader | SelectingLoader = TrainingLoader(
                    dataset,
                    micro_batch=micro_batch,
                    accumulation=accumulation,
                    rank=self.comm.rank,
                    world_size=self.comm.world_size,
                    seed=config.seed,
                    collate_fn=collate_fn,
                )
            else:
                self.selection = SubBatches(
                    dataset,
                    collate_fn,
                    config.selector,
                    deepspeed_engine=self.deepspeed,
                    comm=self.comm,
                    seed=config.seed,
                    path="selector",
                    loss_mean=config.loss_mean,
                )
                self.training_dataloader = SelectingLoader(self.selection, self.comm, config.seed)
        self._batches: Iterator[Any] = self.training_dataloader.forever()
        self.recorder = Recorder(
            config, self.comm.world_size, self.training_dataloader, micro_batch
        )

    def stop_on(self, request: StopRequest) -> None:
        """See `ZerothOrderEngine.stop_on`."""
        self.stop = request

    def close(self) -> None:
        """Do nothing: DeepSpeed's engine has no watchdog."""

    @property
    def device(self) -> torch.device:
        return self.comm.device

    @property
    def global_rank(self) -> int:
        return self.comm.rank

    def gradient_accumulation_steps(self) -> int:
        return self.deepspeed.gradient_accumulation_steps()

    def train_batch(self) -> float:
        """Make one optimizer step. Returns the mean loss of its examples, over all ranks."""
        self.deepspeed.train()
        began, sent = time.perf_counter(), self.comm.scalar_bytes
        # read before the step: DeepSpeed's step advances the schedule
        lr = self.deepspeed.get_lr()[0]
        total = 0.0
        for batch in self._weighted_batches():
            loss = weighted_loss(self.deepspeed, batch, self.config.loss_mean)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += float(loss.detach())
        total, asked = self.comm.sum_over_ranks([total, float(self.stop.reason is not None)])
        self.should_stop = asked > 0
        mean = total / self.comm.world_size / self.gradient_accumulation_steps()
        if not math.isfinite(mean):
            ids = "" if self.selection is None else f" Its examples: {self.selection.selected_ids}."
            raise RuntimeError(
                f"step {self.global_steps}: the loss is not finite. Lower lr, or look at the "
                f"data.{ids}"
            )
        selecting = 0.0 if self.selection is None else self.selection.take_seconds()
        epoch_and_step, sub_batch = (
            self.training_dataloader.epoch_and_step,
            self.recorder.sub_batch(),
        )
        self.recorder.add(Step(self.global_steps, mean, lr, None, epoch_and_step, sub_batch))
        self.recorder.trajectory.wait()
        self.global_steps += 1
        seconds, sent = time.perf_counter() - began, self.comm.scalar_bytes - sent
        self.last_step = StepReport(
            self.global_steps, mean, None, lr, sent, seconds, False, selecting
        )
        return mean

    def _weighted_batches(self) -> list[dict[str, Any]]:
        """This rank's micro-batches of a step, with weights.

        DeepSpeed takes the mean of the losses over micro-batches and ranks. The weights make that
        the mean over the global batch. Raises RuntimeError on all ranks where no label counts.
        """
        batches = [next(self._batches) for _ in range(self.gradient_accumulation_steps())]
        if self.selection is not None:
            return batches
        if not self._loss_checked:
            check_own_loss(self.deepspeed, batches[0], self.comm)
            self._loss_checked = True
        objective = Objective(self.config.loss_mean)
        (count,) = self.comm.sum_over_ranks(
            [sum(float(loss_count(batch, objective)) for batch in batches)]
        )
        if not count:
            raise RuntimeError(
                f"step {self.global_steps}: no example has a label that counts. Look at the data."
            )
        weight = self.comm.world_size * len(batches) / count
        return [
            {**batch, WEIGHTS: torch.full((len(batch["labels"]),), weight)} for batch in batches
        ]

    def evaluate(self, dataset: Any, collate_fn: Callable, measure: Measure) -> dict[str, float]:
        """Means over a whole dataset; see `ZerothOrderEngine.evaluate`."""
        self.deepspeed.eval()
        micro_batch = self.deepspeed.train_micro_batch_size_per_gpu()

        def outputs_of(inputs: dict[str, Any]) -> Any:
            return self.deepspeed(**inputs)

        return measure_whole(
            outputs_of, dataset, collate_fn, measure, comm=self.comm, micro_batch=micro_batch
        )

    def resume(
        self,
        folder: Path,
        *,
        checkpoints: Path | None = None,
        new: Collection[str] = (),
        must_be_new: bool = False,
    ) -> None:
        """Log steps and sub-batches in `folder`. If there is a checkpoint of DeepSpeed, load the
        last one first.

        new: unused; a checkpoint of DeepSpeed holds all weights. must_be_new: refuse a log that has
        content.
        """
        checkpoints = folder / CHECKPOINTS if checkpoints is None else checkpoints
        file, data = open_log(self.comm, folder)
        if must_be_new:
            check_new(self.comm, folder / LOG_NAME, data)
        with self.comm.same_on_all_ranks():
            check_not_lost(folder / LOG_NAME, data, checkpoints)
            log = parse_log(data, folder / LOG_NAME) if b"\n" in data else None
            found = (checkpoints / "latest").is_file()
            if found and log is not None:
                self._check_same_objective(log)
        if found:
            self.load_checkpoint(checkpoints)
        with self.comm.same_on_all_ranks():
            kept = (
                []
                if log is None
                else [record for record in log.records if record.step < self.global_steps]
            )
            goes_on = log is not None and bool(kept)
            if file is not None:
                file.cut(log.ends[len(kept)] if log is not None and goes_on else 0)
        self.recorder.trajectory.file = file
        if log is not None and goes_on:
            self.recorder.take_over(kept, log.heads[len(kept)])
        else:
            self.recorder.trajectory.add(Header(type(self.module).__name__, ()))
        self.recorder.record_run(self.global_steps)

    def _check_same_objective(self, log: Log) -> None:
        """Raise ValueError where the log's steps were made on another mean of the loss."""
        run = log.run_at_end()
        if run is not None and run.section.loss_mean != self.config.loss_mean:
            raise ValueError(
                f"{log.path}: made with zeroth_order.loss_mean = {run.section.loss_mean}, this run "
                f"has {self.config.loss_mean}. Resume with the same."
            )

    def save_checkpoint(self, save_dir: str | Path, keep: int | None = None) -> None:
        """Save a checkpoint of DeepSpeed, with the position in the data and the selector's state.

        keep: number of checkpoints that stay, the last ones; None keeps all.
        """
        state = {"global_steps": self.global_steps, "loader": self.training_dataloader.state_dict()}
        tag = f"global_step{self.global_steps}"
        self.deepspeed.save_checkpoint(str(save_dir), tag, client_state={"zods": state})
        if keep is not None and self.comm.rank == 0:
            tags = [p for p in Path(save_dir).iterdir() if re.fullmatch(r"global_step\d+", p.name)]
            for old in sorted(tags, key=lambda p: int(p.name.removeprefix("global_step")))[:-keep]:
                if old.name != tag:
                    # renamed first: an interrupted removal leaves no half checkpoint
                    removed = old.with_name(f".{old.name}.removed")
                    shutil.rmtree(removed, ignore_errors=True)
                    rename(old, removed)
                    sync(old.parent)
                    shutil.rmtree(removed, ignore_errors=True)

    def load_checkpoint(self, load_dir: str | Path) -> None:
        """Load the checkpoint that `latest` names, without running code that its files name.

        Raises ValueError or OSError, the same on all ranks and before anything is changed, where
        there is no checkpoint, or where a file of it is truncated or holds more than data.
        """
        with self.comm.same_on_all_ranks():
            files = _files_of_latest(Path(load_dir))
            with _only_data():
                for path in files[self.comm.rank :: self.comm.world_size]:
                    _check_only_data(path)
        with _only_data():
            _, client_state = self.deepspeed.load_checkpoint(str(load_dir), files[0].parent.name)
        with self.comm.same_on_all_ranks():
            if "zods" not in client_state:
                raise ValueError(
                    f"checkpoint {load_dir}: zods.finetune did not write it. Give the folder of "
                    "one that it wrote."
                )
            state = client_state["zods"]
            self.training_dataloader.load_state_dict(state["loader"])
        self.global_steps = state["global_steps"]
        self._batches = self.training_dataloader.forever()

    def save_pretrained(self, save_dir: str | Path) -> None:
        export.save_pretrained(self.deepspeed, self.comm, save_dir)


def _files_of_latest(load_dir: Path) -> list[Path]:
    latest = load_dir / "latest"
    tag = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    files = sorted((load_dir / tag).glob("*.pt")) if tag else []
    if not files:
        raise ValueError(
            f"checkpoint {load_dir}: DeepSpeed finds none in it. Give a folder of checkpoints."
        )
    return files


@contextmanager
def _only_data() -> Iterator[None]:
    """Keep torch.load from running code that a file names, also where DeepSpeed calls it with
    weights_only=False.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(CLASSES_IN_CHECKPOINTS):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _check_only_data(path: Path) -> None:
    """Raise ValueError unless torch can load the file without running code.

    The data of tensors are not read.
    """
    with open(path, "rb") as file:
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # what is not a pickle or zip file raises nearly any kind
            code = re.search(r"GLOBAL (\S+)", str(error))
            wrong = (
                f"it names the code {code[1]}, which no checkpoint needs; it was not run"
                if code
                else "damaged"
            )
            raise ValueError(
                f"checkpoint {path}: {wrong}. Load a checkpoint that zods.finetune wrote."
            ) from error
