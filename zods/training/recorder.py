"""The records of a run: those that the engine adds to its trajectory log, and those that a resumed
engine takes over from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zods.config.deepspeed_json import FirstOrderConfig, RunConfig
from zods.core.estimators import Term
from zods.data.loader import TrainingLoader
from zods.selection.loaders import SelectingLoader
from zods.training.rank_agreement import code_in_use
from zods.trajectory.log import START, Trajectory
from zods.trajectory.record_parser import record_of
from zods.trajectory.records import Evaluation, Record, RunRecord, Step, StepSize, SubBatch
from zods.trajectory.updates import Change, History

# Keys of the section "zeroth_order" that a measured step size depends on.
MEASURED_FOR = (
    *("eps", "normalize", "num_directions", "examples_per_direction"),
    *("anchor_directions", "anchor_split", "anchor_examples"),
)


class Recorder:
    """The chain of records, on every rank. Rank 0 also has its file, if there is one.

    A record of the configuration or of the form of evaluation is written only if it differs from
    the last one of its kind. So a restart under identical settings leaves the log unchanged.

    step_size: the measured step size in force, or None.
    """

    def __init__(
        self,
        config: RunConfig | FirstOrderConfig,
        world_size: int,
        loader: TrainingLoader | SelectingLoader | None,
        micro_batch: int,
    ) -> None:
        self.trajectory = Trajectory()
        self._config, self._world_size, self._loader, self._micro_batch = (
            config,
            world_size,
            loader,
            micro_batch,
        )
        self._history = History(config.zeroth_order)
        self._run: RunRecord | None = None
        self._evaluation: Evaluation | None = None
        self.step_size: StepSize | None = None
        self._run_is_recorded = False
        # form and number of streams, when they were last checked
        self._evaluated: tuple[str, int, bool] | None = None
        replicas = config.zeroth_order.replicas
        self._code = code_in_use()
        # the leading replica makes the records that are not of a step
        self.follows = replicas is not None and replicas.index > 0
        self._selections = 0

    @property
    def gradient(self) -> tuple[Term, ...]:
        """The terms of the current anchor gradient."""
        return self._history.gradient

    def add(self, record: Record) -> Change | None:
        """Chain a record, begin to write it, and return what it does to the parameters."""
        self.trajectory.add(record)
        self._note(record)
        return (
            None
            if isinstance(record, Step) and record.coefficients is None
            else self.change(record)
        )

    def change(self, record: Record) -> Change | None:
        """Return what a record does to the parameters. Records must come in their order."""
        return self._history.change(record)

    def _note(self, record: Record) -> None:
        if isinstance(record, RunRecord):
            self._run = record
        elif isinstance(record, Evaluation):
            self._evaluation = record
        elif isinstance(record, StepSize):
            self.step_size = record

    def note_code(self, code: Mapping[str, str]) -> None:
        """Add parts of the code that computes, such as the model's, to the record of the run.

        Call it before the log is resumed.
        """
        self._code = {**self._code, **code}

    def record_run(self, step: int) -> None:
        """Record the configuration before a step, if it differs from the one recorded last."""
        if self._run_is_recorded or self.follows:
            return
        self._run_is_recorded = True
        run = self.run_record(step)
        changed = self._run is None or self._run.describes() != run.describes()
        if self._run is not None and any(
            getattr(self._run.section, key) != getattr(run.section, key) for key in MEASURED_FOR
        ):
            self.step_size = None
        if changed or (self._run is not None and self._run.code != run.code):
            self.add(run)
        if changed:
            self._evaluation = None

    def record_evaluation(
        self, step: int, form: str | None, streams: int, from_logits: bool
    ) -> None:
        """After a forward, record the form of evaluation if it differs from the last one."""
        if self.follows or form is None or self._evaluated == (form, streams, from_logits):
            return
        self._evaluated = (form, streams, from_logits)
        if self.chosen_evaluation() != self._evaluated:
            self.add(Evaluation(step, form, streams, from_logits))

    def chosen_evaluation(self) -> tuple[str, int, bool] | None:
        """The form recorded last, if it was chosen under the same conditions."""
        if (
            self._evaluation is None
            or self._run is None
            or self._run.describes() != self.run_record(0).describes()
        ):
            return None
        chosen = self._evaluation
        return chosen.form, chosen.streams, chosen.from_logits

    def run_record(self, step: int) -> RunRecord:
        about = {
            "zero_stage": self._config.zero_stage,
            "micro_batch": self._micro_batch,
            "scheduler": self._config.scheduler,
        }
        batch = self._config.deepspeed["train_batch_size"]
        optimizer = updates = None
        if isinstance(self._config, FirstOrderConfig):
            optimizer, updates = self._config.optimizer, self._config.updates
        return RunRecord(
            step,
            self._config.zeroth_order,
            batch,
            self._world_size,
            about,
            optimizer,
            self._code,
            updates,
        )

    def sub_batch(self) -> SubBatch | None:
        """The sub-batch chosen for this step; None if there is none, or if it is recorded already."""
        loader = self._loader
        if (
            not isinstance(loader, SelectingLoader)
            or loader.selection.selector.step == self._selections
        ):
            return None
        self._selections = loader.selection.selector.step
        candidates = loader.candidates(loader.epoch_and_step)
        ids, weights = loader.selection.chosen
        indices = tuple(candidates.index(i) for i in ids)
        equal = all(weight == 1.0 for weight in weights)
        mean = loader.selection.selector.chosen_mean
        return SubBatch(len(candidates), indices, None if equal else tuple(weights), mean)

    # --- what is taken over -----------------------------------------------------------------------

    def take_over(self, records: Sequence[Record], head: str) -> None:
        """Take over records that are in the log already and have been applied to the parameters."""
        for record in records:
            self._note(record)
        self.trajectory.head = head
        self.note_selections()

    def state_dict(self) -> dict[str, Any]:
        """The head of the chain and the last record of each kind, as JSON."""
        last = {"run": self._run, "evaluation": self._evaluation, "step_size": self.step_size}
        return {
            "head": self.trajectory.head,
            **{key: value and value.to_json() for key, value in last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], gradient: Sequence[Term]) -> None:
        """Restore `state_dict()`. gradient: the terms of the current anchor gradient."""
        self.trajectory.head = state["head"]
        self._run = self._evaluation = self.step_size = None
        for key in ("run", "evaluation", "step_size"):
            if state.get(key) is not None:  # earlier checkpoints have no step_size
                self._note(record_of(state[key]))
        # the configuration with which the log continues
        section = self._config.zeroth_order if self._run is None else self._run.section
        self._history = History(section, gradient)
        self._run_is_recorded, self._evaluated = False, None
        self.note_selections()

    def note_selections(self) -> None:
        """Mark the loader's selections so far as recorded."""
        if isinstance(self._loader, SelectingLoader):
            self._selections = self._loader.selection.selector.step

    @property
    def is_new(self) -> bool:
        return self.trajectory.head == START
