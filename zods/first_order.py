"""First-order training by DeepSpeed's own engine behind the face of the zeroth-order one, as far as `zods.finetune` uses it.

For comparison on equal terms: the same data in the same order, the same loss, sub-batches chosen or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from zods import checkpoint
from zods.comm import Communicator
from zods.config import FirstOrderConfig
from zods.data import TrainingLoader
from zods.engine import StepReport
from zods.measuring import Measure, check_own_loss, measure_whole
from zods.objectives import WEIGHTS, num_examples
from zods.selection.batches import SubBatches
from zods.selection.loaders import SelectingLoader, weighted_loss


class FirstOrderEngine:
    """A model under DeepSpeed with its optimizer. The loss is the weighted mean over examples, each the mean over its labels."""

    anchor = None

    def __init__(
        self, model: torch.nn.Module, config: FirstOrderConfig, dataset: Any, collate_fn: Callable | None
    ) -> None:
        """Raises ValueError, the same on all ranks, where model, data and selector do not fit each other."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.deepspeed = deepspeed.initialize(
            model=model, model_parameters=trainable, config=config.deepspeed, dist_init_required=False
        )[0]
        self.module = self.deepspeed.module
        self.comm = Communicator(torch.device(self.deepspeed.device))
        self.config = config
        self.global_steps = 0
        self.last_step: StepReport | None = None
        self.trajectory: Any = None
        self.selection: SubBatches | None = None
        self._loss_checked = False
        micro_batch, accumulation = self.deepspeed.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()
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
                )
                self.training_dataloader = SelectingLoader(self.selection, self.comm, config.seed)
        self._batches: Iterator[Any] = self.training_dataloader.forever()

    @property
    def device(self) -> torch.device:
        return self.comm.device

    @property
    def global_rank(self) -> int:
        return self.comm.rank

    def gradient_accumulation_steps(self) -> int:
        return self.deepspeed.gradient_accumulation_steps()

    def train_batch(self) -> float:
        """One optimizer step; returns the mean loss of what it was made on, over all ranks."""
        self.deepspeed.train()
        began, sent = time.perf_counter(), self.comm.scalar_bytes
        total = 0.0
        for _ in range(self.gradient_accumulation_steps()):
            batch = next(self._batches)
            size = num_examples(batch)
            if self.selection is None and not self._loss_checked:
                check_own_loss(self.deepspeed, batch, self.comm)
                self._loss_checked = True
            loss = weighted_loss(self.deepspeed, {WEIGHTS: torch.full((size,), 1 / size), **batch})
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += float(loss.detach())
        mean = self.comm.sum_over_ranks([total])[0] / self.comm.world_size / self.gradient_accumulation_steps()
        if not math.isfinite(mean):
            ids = "" if self.selection is None else f" Its examples: {self.selection.selected_ids}."
            raise RuntimeError(f"step {self.global_steps}: the loss is not finite. Lower lr, or look at the data.{ids}")
        lr = self.deepspeed.get_lr()[0]
        selecting = 0.0 if self.selection is None else self.selection.take_seconds()
        if self.trajectory is not None and self.selection is not None:
            self.trajectory.append_selection(self.global_steps, self.selection.selected_ids, loss=mean, lr=lr)
        self.global_steps += 1
        seconds, sent = time.perf_counter() - began, self.comm.scalar_bytes - sent
        self.last_step = StepReport(self.global_steps, mean, None, lr, sent, seconds, False, selecting)
        return mean

    def evaluate(self, dataset: Any, collate_fn: Callable, measure: Measure) -> dict[str, float]:
        """Means over a whole dataset; see `ZerothOrderEngine.evaluate`."""
        self.deepspeed.eval()
        micro_batch = self.deepspeed.train_micro_batch_size_per_gpu()

        def outputs_of(inputs: dict[str, Any]) -> Any:
            return self.deepspeed(**inputs)

        return measure_whole(outputs_of, dataset, collate_fn, measure, comm=self.comm, micro_batch=micro_batch)

    def save_checkpoint(self, save_dir: str | Path) -> None:
        """DeepSpeed's own checkpoint, with the loader's place and the selector's state."""
        state = {"global_steps": self.global_steps, "loader": self.training_dataloader.state_dict()}
        self.deepspeed.save_checkpoint(str(save_dir), f"global_step{self.global_steps}", client_state={"zods": state})

    def load_checkpoint(self, load_dir: str | Path) -> None:
        """Raises ValueError, the same on all ranks, where there is no checkpoint or one of another run."""
        folder, client_state = self.deepspeed.load_checkpoint(str(load_dir))
        with self.comm.same_on_all_ranks():
            if folder is None or "zods" not in client_state:
                raise ValueError(
                    f"checkpoint {load_dir}: DeepSpeed finds none of zods.finetune in it. Give a folder of checkpoints."
                )
            state = client_state["zods"]
            self.training_dataloader.load_state_dict(state["loader"])
        self.global_steps = state["global_steps"]
        self._batches = self.training_dataloader.forever()

    def save_pretrained(self, save_dir: str | Path) -> None:
        checkpoint.save_pretrained(self, save_dir)
