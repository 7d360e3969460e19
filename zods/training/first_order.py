"""First-order training by DeepSpeed's own engine, with the part of the zeroth-order engine's
interface that `zods.finetune` uses.

It is there for comparison: the same data in the same order, the same loss, with or without a
selector.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from zods.comm.communicator import Communicator
from zods.comm.stop_request import StopRequest, StopRequested
from zods.comm.watchdog import Watchdog
from zods.config.deepspeed_json import FirstOrderConfig
from zods.data.batch import WEIGHTS
from zods.data.loader import TrainingLoader
from zods.data.objectives import Objective, loss_count
from zods.forward.cached_generation import NextTokens
from zods.forward.dataset_metrics import Measure, check_own_loss, measure_whole
from zods.forward.labelled_logits import LabelledLogits
from zods.params.swap_files import check_reads
from zods.params.zero3_adapter import bytes_of, optimizer_is_partly_on_nvme
from zods.selection.loaders import SelectingLoader, weighted_loss
from zods.selection.sub_batches import SubBatches
from zods.training import export
from zods.training.description import configuration_of, num_digested
from zods.training.first_order_checkpoint import (
    checkpoints_in,
    folder_of_step,
    full_disk_as_os_error,
    last_good,
    only_data,
    remove_old,
    seal,
    unseal,
    zods_state,
)
from zods.training.log_checks import (
    check_new,
    check_not_lost,
    check_same_model,
    check_same_optimizer,
    warn_of_changes,
)
from zods.training.rank_agreement import describe_data
from zods.training.recorder import Recorder
from zods.training.resume import CHECKPOINTS, LOG_NAME, open_log
from zods.training.step_outputs import StepReport
from zods.training.stop_poll import StopPoll
from zods.training.training_data import make_training_loader
from zods.trajectory.log import LogFile, parse_log
from zods.trajectory.records import Header, Step

logger = logging.getLogger(__name__)

PARTLY_ON_NVME = (
    "zero_optimization.offload_optimizer.device: nvme: a sub-group of the parameters has less than "
    "1 MiB on this rank, or than aio.block_size. DeepSpeed 0.19.8 does not restore such a sub-group "
    "from a checkpoint: it would keep the base weights"
)


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
        target_data: Any = None,
    ) -> None:
        """target_data: as in `zods.initialize`.

        Raises ValueError, the same on all ranks, where model, data and selector do not fit
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
        check_reads(list(self.module.parameters()))
        self._partly_on_nvme = optimizer_is_partly_on_nvme(self.deepspeed.optimizer)
        self.comm = Communicator(torch.device(self.deepspeed.device))
        self.config = config
        self.global_steps = 0
        self.last_step: StepReport | None = None
        self.stop = StopRequest()
        self.should_stop = False
        self._loss_checked = False
        if self._partly_on_nvme and self.comm.rank == 0:
            logger.warning("%s. This run cannot be resumed. Give device cpu.", PARTLY_ON_NVME)
        self._next_tokens = NextTokens(self.deepspeed, self.comm)
        self._labelled_logits = LabelledLogits(self.deepspeed, self.comm)
        with self.comm.same_on_all_ranks():
            loader = self._make_loader(dataset, collate_fn, target_data)
        self.training_dataloader = loader
        self.selection = loader.selection if isinstance(loader, SelectingLoader) else None
        self._batches: Iterator[Any] = loader.forever()
        section = config.zeroth_order
        self._watchdog = Watchdog(self.comm, section.hang_timeout)
        self._load_timeout = section.load_timeout
        self.recorder = Recorder(
            config,
            self.comm.world_size,
            loader,
            self.deepspeed.train_micro_batch_size_per_gpu(),
        )

    def _make_loader(
        self, dataset: Any, collate_fn: Callable | None, target_data: Any
    ) -> TrainingLoader | SelectingLoader:
        config = self.config
        if config.selector is None:
            return make_training_loader(
                *(config.zeroth_order, self.comm, dataset, collate_fn),
                micro_batch=self.deepspeed.train_micro_batch_size_per_gpu(),
                accumulation=self.gradient_accumulation_steps(),
            )
        selection = SubBatches(
            dataset,
            collate_fn,
            config.selector,
            deepspeed_engine=self.deepspeed,
            comm=self.comm,
            seed=config.seed,
            path="selector",
            loss_mean=config.loss_mean,
            target_data=target_data,
        )
        return SelectingLoader(selection, self.comm, config.seed)

    def stop_on(self, request: StopRequest) -> None:
        """See `ZerothOrderEngine.stop_on`."""
        self.stop = request

    def close(self) -> None:
        """Stop the watchdog and the workers of the loader. Call it before any rank ends."""
        self._watchdog.close()
        self._batches = self.training_dataloader.forever()

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
        with self._watchdog.watching(f"step {self.global_steps}"):
            return self._train_batch()

    def _train_batch(self) -> float:
        self.deepspeed.train()
        began, sent = time.perf_counter(), self.comm.scalar_bytes
        # read before the step: DeepSpeed's step advances the schedule
        lr = self.deepspeed.get_lr()[0]
        total = 0.0
        for batch in self._weighted_batches():
            self._watchdog.beat(f"step {self.global_steps}")
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
        poll = StopPoll(self.comm, lambda: self.stop.reason is not None)

        what = f"step {self.global_steps}, evaluation"

        def outputs_of(inputs: dict[str, Any]) -> Any:
            poll()
            self._watchdog.beat(what)
            return self.deepspeed(**inputs)

        try:
            with self._watchdog.watching(what):
                return measure_whole(
                    outputs_of,
                    dataset,
                    collate_fn,
                    measure,
                    comm=self.comm,
                    micro_batch=micro_batch,
                    next_tokens=self._next_tokens,
                    labelled_logits=self._labelled_logits,
                )
        except StopRequested:
            self.should_stop = True
            raise

    def resume(
        self,
        folder: Path,
        *,
        checkpoints: Path | None = None,
        new: Collection[str] = (),
        must_be_new: bool = False,
    ) -> None:
        """Log steps and sub-batches in `folder`. If there are checkpoints of DeepSpeed, load the
        last whole one first.

        new: unused; a checkpoint of DeepSpeed holds all weights. must_be_new: refuse a log that has
        content.
        """
        checkpoints = folder / CHECKPOINTS if checkpoints is None else checkpoints
        file, data = open_log(self.comm, folder)
        try:
            if must_be_new:
                check_new(self.comm, folder / LOG_NAME, data)
            with self._watchdog.watching("the start, resume", limit=self._load_timeout):
                self._continue_log(file, data, folder / LOG_NAME, checkpoints)
        except Exception:
            if file is not None:
                file.close()  # unlocks the log, so that the caller can try again
            raise

    def _continue_log(
        self, file: LogFile | None, data: bytes, path: Path, checkpoints: Path
    ) -> None:
        """Load the last whole checkpoint that belongs to the log, and continue the log after it.

        data: the log's content.
        """
        with self.comm.same_on_all_ranks():
            check_not_lost(path, data, checkpoints)
            log = parse_log(data, path) if b"\n" in data else None
        header = self._header(None if log is None else log.header)
        kept = 0  # records of the log that the checkpoint stands for
        if log is not None:
            with self.comm.same_on_all_ranks():
                found = bool(checkpoints_in(checkpoints))
                if found:
                    check_same_model(log.header, header, log.path)
                    check_same_optimizer(log, self.config)
            if found:
                if self.comm.rank == 0:
                    warn_of_changes(log, self.recorder.run_record(0))
                folder, kept = last_good(checkpoints, self.comm, log)
                self._load(folder)
            elif log.num_steps and self.comm.rank == 0:
                logger.warning(
                    "%s: %d steps, but no whole checkpoint in %s: the run starts again from step 0",
                    log.path,
                    log.num_steps,
                    checkpoints,
                )
        with self.comm.same_on_all_ranks():
            if file is not None:
                self.recorder.trajectory.before_cut(self.global_steps if kept else -1)
                file.cut(log.ends[kept] if log is not None and kept else 0)
        self.recorder.trajectory.file = file
        if log is not None and kept:
            self.recorder.take_over(log.records[:kept], log.heads[kept])
        else:
            self.recorder.trajectory.add(header)
        self.recorder.record_run(self.global_steps)
        with self.comm.same_on_all_ranks():
            self.recorder.trajectory.wait()

    def _header(self, logged: Header | None) -> Header:
        """The log's header. It has no parameters: the steps cannot be replayed.

        logged: the header of the log that the run continues, if any.
        """
        data = describe_data(self.training_dataloader, self.comm, num_digested(logged))
        config = configuration_of(self.module)
        return Header(type(self.module).__name__, (), data=data, config=config)

    def save_checkpoint(self, save_dir: str | Path, keep: int | None = None) -> None:
        """Save a checkpoint of DeepSpeed, with the position in the data and the selector's state.

        keep: number of checkpoints that stay, the last ones; None keeps all.
        """
        state = {"global_steps": self.global_steps, "loader": self.training_dataloader.state_dict()}
        folder = folder_of_step(Path(save_dir), self.global_steps)
        # float32 weights and two moments of each parameter, and its 16-bit weights
        num_bytes = 4 * bytes_of(self.module.parameters())
        with self._watchdog.watching(f"step {self.global_steps}, checkpoint", num_bytes=num_bytes):
            unseal(folder, self.comm)
            with full_disk_as_os_error(folder):
                self.deepspeed.save_checkpoint(
                    str(save_dir), folder.name, client_state={"zods": state}, save_latest=False
                )
            seal(folder, self.comm, self.recorder.trajectory.head)
            with self.comm.same_on_all_ranks():
                if keep is not None and self.comm.rank == 0:
                    remove_old(folder, keep)

    def load_checkpoint(self, load_dir: str | Path) -> None:
        """Load the last whole checkpoint in a folder, without running code that its files name.

        A checkpoint that is damaged is left out with a warning, and an older one is used. Raises
        ValueError or OSError, the same on all ranks and before anything is changed, where no
        checkpoint is good, or where they are of another number of ranks.
        """
        self._load(last_good(Path(load_dir), self.comm)[0])

    def _load(self, folder: Path) -> None:
        """Load a checkpoint whose files have been checked."""
        with self.comm.same_on_all_ranks():
            if self._partly_on_nvme:
                raise ValueError(
                    f"checkpoint {folder}: not loaded: {PARTLY_ON_NVME}. Start a new run with "
                    "device cpu."
                )
        with only_data():
            _, client_state = self.deepspeed.load_checkpoint(str(folder.parent), folder.name)
        with self.comm.same_on_all_ranks():
            state = zods_state(client_state, folder)
            self.training_dataloader.load_state_dict(state["loader"])
        self.global_steps = state["global_steps"]
        self._batches = self.training_dataloader.forever()

    def save_pretrained(self, save_dir: str | Path) -> None:
        with self._watchdog.watching("the export", num_bytes=bytes_of(self.module.parameters())):
            export.save_pretrained(self.deepspeed, self.comm, save_dir)
