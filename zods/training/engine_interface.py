"""The interface of DeepSpeed's engine outside a step: sizes and counters, metrics, the module and
its weights. `ZerothOrderEngine` inherits it.

DeepSpeed's engine inherits `torch.nn.Module`, so training loops use it as the model. For that
reason an attribute that this class lacks is looked up in the module.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.comm.stop_request import StopRequest, StopRequested
from zods.comm.watchdog import Watchdog
from zods.config.deepspeed_json import RunConfig
from zods.core.annealing import Annealing
from zods.forward.cached_generation import NextTokens
from zods.forward.dataset_metrics import Measure, measure_whole
from zods.forward.evaluator import Evaluator
from zods.forward.labelled_logits import LabelledLogits
from zods.params.zero3_adapter import bytes_of, is_sharded
from zods.training import checkpoint
from zods.training.export import save_16bit_model, save_pretrained, whole_state
from zods.training.replicas import Replicas
from zods.training.state import StepInFlight
from zods.training.step_outputs import StepReport
from zods.training.stop_poll import StopPoll
from zods.training.training_run import TrainingRun

logger = logging.getLogger(__name__)

_DTYPES_OF_A_RUN = (
    'the dtype of a run is that of its "bf16" section and of the model given to zods.initialize'
)


class EngineInterface:
    """Attributes and methods under DeepSpeed's names."""

    module: torch.nn.Module
    deepspeed: Any
    config: RunConfig
    comm: Communicator
    optimizer: torch.optim.Optimizer
    run: TrainingRun
    stop: StopRequest
    should_stop: bool
    replicas: Replicas | None
    last_step: StepReport | None
    _in_flight: StepInFlight | None
    _evaluator: Evaluator
    _next_tokens: NextTokens
    _labelled_logits: LabelledLogits
    _watchdog: Watchdog

    def flush(self) -> None:
        """Apply deferred updates, so that all stored parameters are up to date.

        Call it before you read parameters yourself. The engine's own methods call it where they
        need it.
        """
        self.run.flush()

    def __getattr__(self, name: str) -> Any:
        """The module's attribute of this name, where the engine has none."""
        module = self.__dict__.get("module")
        if module is not None and not name.startswith("__"):
            with contextlib.suppress(AttributeError):
                return getattr(module, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}, nor has its module")

    # --- counters ---------------------------------------------------------------------------------

    @property
    def global_steps(self) -> int:
        return self.run.state.global_steps

    @property
    def global_samples(self) -> int:
        return self.run.state.global_samples

    @property
    def micro_steps(self) -> int:
        """Calls of `step()` so far, one per micro-batch."""
        of_step = 0 if self._in_flight is None else self._in_flight.micro_steps
        return self.global_steps * self.gradient_accumulation_steps() + of_step

    @property
    def skipped_steps(self) -> int:
        return self.run.state.skipped_steps

    @property
    def anchor_step(self) -> int | None:
        """The step of the anchor's last refresh; None where one is due before the next step."""
        return self.run.state.anchor_step

    @property
    def annealing(self) -> Annealing:
        return self.run.state.annealing

    # --- ranks, sizes, settings -------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.comm.device

    @property
    def global_rank(self) -> int:
        return self.comm.rank

    @property
    def local_rank(self) -> int:
        return self.deepspeed.local_rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    @property
    def dp_world_size(self) -> int:
        return self.comm.world_size

    def train_batch_size(self) -> int:
        return self.config.deepspeed["train_batch_size"]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.deepspeed["train_micro_batch_size_per_gpu"]

    def gradient_accumulation_steps(self) -> int:
        return self.config.deepspeed["gradient_accumulation_steps"]

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def zero_optimization_stage(self) -> int:
        return self.config.zero_stage

    def zero_optimization(self) -> bool:
        return self.config.zero_stage > 0

    def bfloat16_enabled(self) -> bool:
        return bool(self.config.deepspeed.get("bf16", {}).get("enabled", False))

    def fp16_enabled(self) -> bool:
        return False

    def steps_per_print(self) -> int:
        return self.deepspeed.steps_per_print()

    def get_global_grad_norm(self) -> None:
        """Return None, as DeepSpeed's engine does before its first step: there is no gradient.

        `last_step.projected_grad` has the measured projected gradient.
        """

    def was_step_applied(self) -> bool:
        """Whether the last step changed the parameters; one with a non-finite loss is skipped."""
        return self.last_step is not None and not self.last_step.skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: there are no gradients. A DeepSpeed loop runs unchanged."""

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do nothing: only the last micro-batch of a step communicates."""
        yield

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Log that nothing is compiled: a step changes weights while modules run, which Dynamo
        cannot trace.
        """
        logger.info(
            "engine.compile(): the model is not compiled: a step changes weights while modules run"
        )

    # --- losses and metrics at the parameters -----------------------------------------------------

    @torch.no_grad()
    def eval_batch(self, data_iter: Iterator[Any]) -> float:
        """Mean loss at the parameters over `gradient_accumulation_steps` micro-batches of all
        ranks.
        """
        self.flush()
        batches = (next(data_iter) for _ in range(self.gradient_accumulation_steps()))
        with self._watched_evaluation() as beat:
            return self._evaluator.mean_loss(beat(batch) for batch in batches)

    @torch.no_grad()
    def evaluate(
        self,
        dataset: Any,
        collate_fn: Callable[[list], tuple[Any, Any]],
        measure: Measure,
    ) -> dict[str, float]:
        """Means over a whole dataset at the parameters, every example counted once, over all ranks.

        collate_fn: rows -> (model inputs, targets). The inputs may be a
        `zods.data.evaluation.SeveralForwards`. measure: (outputs, inputs, targets) -> name: (sum,
        count). Raises StopRequested, on all ranks, where one is asked to stop meanwhile.
        """
        self.flush()
        with self._watched_evaluation() as beat, self._polled() as poll:

            def outputs_of(batch: Any) -> Any:
                poll()
                return self._evaluator.outputs(beat(batch))

            return measure_whole(
                outputs_of,
                dataset,
                collate_fn,
                measure,
                comm=self.comm,
                micro_batch=self.train_micro_batch_size_per_gpu(),
                next_tokens=self._next_tokens,
                labelled_logits=self._labelled_logits,
            )

    @contextlib.contextmanager
    def _polled(self) -> Iterator[Callable[[], None]]:
        """Let requests to stop end a pass over a dataset. Yields a function to call before each of
        its micro-batches.

        Where several replicas train together, a request waits for the next step: with its losses
        the others learn who leaves.
        """
        if self.replicas is not None:
            yield lambda: None
            return
        try:
            yield StopPoll(self.comm, lambda: self.stop.reason is not None)
        except StopRequested:
            self.should_stop = True
            raise

    @contextlib.contextmanager
    def _watched_evaluation(self) -> Iterator[Callable[[Any], Any]]:
        """Watch this rank while it evaluates. Yields a function that each batch passes through."""

        def beat(batch: Any) -> Any:
            self._watchdog.beat(f"step {self.global_steps}, evaluation")
            return batch

        beat(None)
        try:
            yield beat
        finally:
            self._watchdog.rest()

    # --- the module and its weights ---------------------------------------------------------------

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """The module's parameters, up to date. At stage 3 they are sharded: read them under
        `deepspeed.zero.GatheredParameters`.
        """
        self.flush()
        return self.module.parameters(recurse)

    def named_parameters(
        self, *args: Any, **kwargs: Any
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The module's `named_parameters`, up to date."""
        self.flush()
        return self.module.named_parameters(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The module's state dict, with whole tensors in host memory, on rank 0; an empty dict on
        the other ranks.

        All ranks call it together. The host memory of rank 0 must hold the model.
        """
        self.flush()
        return whole_state(self.deepspeed, self.comm)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "engine.load_state_dict(): a run's weights change by its steps only, as its log says. "
            "Load weights into the model before zods.initialize, or a checkpoint of zods by "
            "engine.load_checkpoint."
        )

    def save_16bit_model(self, save_dir: Any, save_filename: str = "pytorch_model.bin") -> bool:
        """Write `state_dict()` by torch.save, in the dtype of the run, as DeepSpeed's method of
        this name does.
        """
        self.flush()
        save_16bit_model(self.deepspeed, self.comm, Path(save_dir) / save_filename)
        return True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's `generate` at the current parameters.

        At stage 3 all ranks generate until the last rank is done, because each gather needs all.
        """
        self.flush()
        self.module.eval()
        if self.comm.world_size > 1 and any(map(is_sharded, self.module.parameters())):
            kwargs = {"synced_gpus": True, **kwargs}
        with torch.no_grad():
            return self.module.generate(*args, **kwargs)  # type: ignore[operator]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the engine. Raises ValueError unless it has this device and dtype already."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = self.comm.device
        if device is not None and (
            device.type != here.type or device.index not in (None, here.index)
        ):
            raise ValueError(
                f"engine.to({device}): the engine is on {here}, where the launcher put this rank. "
                "Leave the call out, and move batches to engine.device."
            )
        odd = next(
            (
                p.dtype
                for p in self.module.parameters()
                if p.is_floating_point() and p.dtype != dtype
            ),
            None,
        )
        if dtype is not None and odd is not None:
            raise ValueError(f"engine.to({dtype}): found parameters of {odd}; {_DTYPES_OF_A_RUN}.")
        return self

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def float(self) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def cuda(self, device: Any = None) -> Any:
        return self.to(
            "cuda"
            if device is None
            else torch.device("cuda", device)
            if isinstance(device, int)
            else device
        )

    def cpu(self) -> Any:
        return self.to("cpu")

    # --- save, load, export -----------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        keep: int | None = None,
    ) -> Path:
        """Write a checkpoint, with the keywords of DeepSpeed's method; see
        `zods.training.checkpoint.save_checkpoint`.

        exclude_frozen_parameters: ignored; a checkpoint of zods never has frozen parameters.
        """
        self.flush()
        with self._watchdog.watching(
            f"step {self.global_steps}, checkpoint", num_bytes=checkpoint.bytes_per_rank(self.run)
        ):
            return checkpoint.save_checkpoint(
                self.run, save_dir, tag, client_state or {}, keep, save_latest=save_latest
            )

    def save_pretrained(self, save_dir: str | Path) -> None:
        """Export the whole model as a folder that `from_pretrained` reads; see
        `zods.training.export`.
        """
        self.flush()
        with self._watchdog.watching("the export", num_bytes=bytes_of(self.module.parameters())):
            save_pretrained(self.deepspeed, self.comm, save_dir)
