"""transformers' Trainer with zeroth-order steps: `ZOTrainer` and `ZOTrainingArguments`.

The Trainer keeps its loop, callbacks, logs, evaluation and checkpoint folders. This module gives
the loop an engine of `zods.initialize` where it would have one of DeepSpeed. The engine has the
interface of DeepSpeed's, so that most of the Trainer's code for DeepSpeed runs as it is.

Besides methods that transformers documents for subclasses, the mix-in overrides or calls private
ones (`PRIVATE`, read in transformers 5.23). A test compares their signatures with the installed
ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from zods.config.section import SECTION
from zods.config.selector_section import parse_selector
from zods.data.loader import EpochLoader
from zods.data.stream import StreamLoader, is_stream
from zods.integrations.hf_arguments import ZOTrainingArguments
from zods.training.engine import ZerothOrderEngine
from zods.training.export import runs_alone
from zods.training.initialize import initialize, steps_per_epoch

__all__ = ["ZOTrainer", "ZOTrainerMixin", "ZOTrainingArguments"]

# {private method of Trainer that the mix-in overrides or calls: its parameters}
PRIVATE = {
    "_prepare_for_training": ("self", "max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_wrap_model": ("self", "model", "training", "dataloader"),
    "_clip_grad_norm": ("self", "model"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_load_best_model": ("self",),
    "_get_collator_with_removed_columns": ("self", "data_collator", "description"),
    "_save": ("self", "output_dir", "state_dict"),
}

_Base: Any = object  # has no types: the class after the mix-in is Trainer or a subclass


class MicroBatches(Dataset):
    """The micro-batches of an engine's loader, by their position in the epoch.

    The Trainer skips the first batches of an epoch when it resumes, by sampling later positions.
    The loader itself continues where the checkpoint was written, so the two agree.
    """

    def __init__(self, loader: EpochLoader) -> None:
        self.loader = loader
        self._batches: Any = None

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, position: int) -> Any:
        """Return the next micro-batch, which must be the one at `position`.

        Raises ValueError where the loader stands elsewhere.
        """
        loader = self.loader
        if position == 0:
            if loader.position not in (0, len(loader)):  # the Trainer ended an epoch early
                loader.go_to((loader.epoch + 1, 0))
            self._batches = None
        if position != loader.position % len(loader):
            raise ValueError(
                f"training data: the Trainer asks for micro-batch {position} of the epoch, but the "
                f"engine's loader stands at {loader.position}. Resume with the batch size and the "
                "data that the checkpoint was made with."
            )
        if self._batches is None:
            self._batches = iter(loader)
        return next(self._batches)


class StreamedMicroBatches(Dataset):
    """The micro-batches of a run on a stream, by their position in the run.

    With this length, the Trainer takes the whole run for one epoch, whatever the stream's length is.
    When it resumes, it skips the positions of the steps that were made.
    """

    def __init__(self, loader: StreamLoader, num_steps: int) -> None:
        self.num_examples = num_steps * loader.batch_size
        self._size = num_steps * loader.accumulation
        self._batches = loader.forever()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, position: int) -> Any:
        return next(self._batches)


def _only_row(rows: list[Any]) -> Any:
    (row,) = rows
    return row


class ZOTrainerMixin(_Base):
    """Zeroth-order steps for a subclass of transformers' Trainer, before which it is named:

        class MyTrainer(ZOTrainerMixin, SFTTrainer): ...

    The engine is made when training, an evaluation or a save first needs it, and by each call of
    `train`. It is `trainer.deepspeed` and `trainer.model_wrapped`.

    The order of the training examples is that of zods, a function of the seed and the epoch alone:
    `get_train_dataloader` yields from the engine's own loader, and `zods.initialize` gets
    `train_dataset` and `data_collator`. So a run makes the same steps, to the bit, as a loop over
    `zods.initialize` with the same configuration, for any number of ranks, and the anchor of
    MeZO-SVRG passes over the same examples. The tail of an epoch that does not fill a batch is
    dropped. An IterableDataset is read in its own order, see `zods.data.stream`; all ranks need the
    same one, not split among them. Evaluation data keep the Trainer's loaders.

    A step's loss is the one that the model's forward returns. So `compute_loss` must not be
    overridden, and `compute_loss_func` must not be given. In training the model stays in eval mode.

    Logs have the step's loss, mean over all ranks, "learning_rate" as it was used, and
    "projected_grad".
    """

    deepspeed: ZerothOrderEngine | None  # under the Trainer's own name
    _total_steps = 0  # of the schedule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As of the Trainer. Raises ValueError for arguments that a step cannot follow."""
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, ZOTrainingArguments):
            raise ValueError(
                f"args: found {type(self.args).__name__}, expected ZOTrainingArguments of "
                "zods.integrations.hf."
            )
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                "optimizers: must be left out; a zeroth-order step has no optimizer states. For a "
                "schedule set lr_scheduler_type, or override create_scheduler."
            )
        own = type(self).__mro__[: type(self).__mro__.index(ZOTrainerMixin)]
        if self.compute_loss_func is not None or any("compute_loss" in vars(c) for c in own):
            raise ValueError(
                "compute_loss, compute_loss_func: found another loss. A step uses the losses that "
                "the model's forward returns at several points: wrap the model so that its forward "
                "returns this loss."
            )
        # a step's mean is the engine's; an evaluation's is over each batch
        self.model_accepts_loss_kwargs = False

    # --- the engine -------------------------------------------------------------------------------

    def _engine(self) -> ZerothOrderEngine:
        """The engine, made now if there is none."""
        if self.deepspeed is None:
            self.deepspeed = self.model_wrapped = self._new_engine()
        return self.deepspeed

    def _new_engine(self) -> ZerothOrderEngine:
        args = self.args
        if self.train_dataset is None:  # only evaluates
            config = args.configuration(1)
            config.pop("scheduler", None)
            config[SECTION] = {"method": "mezo", "lr": 0.0}
            return initialize(model=self.model, config=config)[0]
        steps = 0
        if is_stream(self.train_dataset):
            if args.max_steps <= 0:
                raise ValueError(
                    "max_steps: missing. A run on an IterableDataset needs a number of steps."
                )
        elif hasattr(self.train_dataset, "__len__"):  # initialize refuses others
            config = args.configuration(1)
            selector = config[SECTION].get("selector")
            steps = steps_per_epoch(
                len(self.train_dataset),
                config["train_batch_size"],
                None if selector is None else parse_selector(selector, f"{SECTION}.selector"),
            )
        self._total_steps = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
        )
        config = args.configuration(self._total_steps)
        return initialize(
            model=self.model,
            config=config,
            training_data=self.train_dataset,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "training"),
            lr_scheduler=None if "scheduler" in config else self._new_scheduler(),
            tokenizer=self.processing_class,
        )[0]

    def _new_scheduler(self) -> Callable[[torch.optim.Optimizer], Any]:
        self.lr_scheduler = None

        def scheduler(optimizer: torch.optim.Optimizer) -> Any:
            return self.create_scheduler(self._total_steps, optimizer)

        return scheduler

    # --- training ---------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer. The steps and the order of the examples begin anew."""
        if self.deepspeed is not None:
            self.deepspeed.flush()
            self.deepspeed.close()
            self.deepspeed = None
            self.model_wrapped = self.model
        return super().train(*args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError: the configuration of a trial would be that of the first one."""
        raise ValueError(
            "hyperparameter_search: not supported by ZOTrainer, whose DeepSpeed JSON is read once. "
            "Start a run for each trial."
        )

    def get_train_dataloader(self) -> DataLoader:
        """The engine's own loader; see the class. Its position moves with the training."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        loader = self._engine().training_dataloader
        assert loader is not None
        data = (
            StreamedMicroBatches(loader, self._total_steps)
            if isinstance(loader, StreamLoader)
            else MicroBatches(loader)
        )
        return DataLoader(data, batch_size=1, collate_fn=_only_row, generator=torch.Generator())

    def num_examples(self, dataloader: DataLoader) -> int:
        """The number of examples, not of micro-batches."""
        data = getattr(dataloader, "dataset", None)
        if isinstance(data, MicroBatches):
            return len(data.loader.dataset)
        if isinstance(data, StreamedMicroBatches):
            return data.num_examples
        return super().num_examples(dataloader)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[ZerothOrderEngine, DataLoader]:
        """Give the loop the engine in place of the wrapped model, its optimizer and its schedule."""
        engine = self._engine()
        assert max_steps == self._total_steps, (max_steps, self._total_steps)
        self.optimizer = DeepSpeedOptimizerWrapper(engine.optimizer)
        self.lr_scheduler = DeepSpeedSchedulerWrapper(engine.lr_scheduler, self.optimizer)
        if resume_from_checkpoint is not None:
            folder, _ = engine.load_checkpoint(resume_from_checkpoint)
            if folder is None:
                raise ValueError(
                    f"resume_from_checkpoint: {resume_from_checkpoint} has no state of an engine. "
                    "Give a folder checkpoint-N that ZOTrainer wrote without save_only_model."
                )
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return engine, train_dataloader

    def training_step(
        self, model: ZerothOrderEngine, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Make the three calls of a zeroth-order step.

        inputs: a micro-batch of the engine's loader. num_items_in_batch: ignored; the engine counts.
        Returns the loss of the whole step with its last micro-batch, and 0 with the others: the
        loop adds them up.
        """
        model.train()
        is_last = model.is_gradient_accumulation_boundary()
        model.backward(model(inputs))
        model.step()
        report = model.last_step
        loss = 0.0 if report is None or not is_last else report.loss
        return torch.tensor(loss, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As of the Trainer, with the figures of the last step."""
        report = None if self.deepspeed is None else self.deepspeed.last_step
        if "loss" in logs and report is not None:
            assert report.projected_grad is not None
            logs |= {"learning_rate": report.lr, "projected_grad": report.projected_grad}
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: ZerothOrderEngine) -> None:
        """Return None: there is no gradient."""

    def _get_grad_norm(self, model: ZerothOrderEngine, grad_norm: Any = None) -> None:
        """Return None: there is no gradient."""

    # --- evaluation -------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer, with the engine's forward at the parameters."""
        self._engine()
        return super().evaluation_loop(*args, **kwargs)

    def _wrap_model(
        self, model: torch.nn.Module, training: bool = True, dataloader: Any = None
    ) -> Any:
        """The engine, in place of the model."""
        return self._engine()

    # --- save, load -------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model as a folder that `from_pretrained` reads. All ranks call it.

        The host memory of rank 0 must hold the model.
        """
        engine = self._engine()
        state = engine.state_dict()
        prompts = getattr(self.model, "prompt_encoder", None)
        with runs_alone(prompts), engine.comm.same_on_all_ranks():
            self._save(output_dir or self.args.output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint. The engine's steps stay counted."""
        self._engine().load_checkpoint(self.state.best_model_checkpoint, load_module_only=True)


class ZOTrainer(ZOTrainerMixin, Trainer):  # type: ignore[misc]  # transformers has few types
    """transformers' `Trainer` with zeroth-order steps; see `ZOTrainerMixin`.

    It takes the arguments of `Trainer`, with `ZOTrainingArguments` as `args`. Callbacks,
    `compute_metrics`, reports, `save_total_limit`, `load_best_model_at_end`,
    `resume_from_checkpoint` and `push_to_hub` are transformers' own.
    """
