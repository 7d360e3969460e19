"""Fine-tune a transformer from the command line: `deepspeed --module zods.finetune --help`.

This module only composes the parts of the package.
"""

from __future__ import annotations

# first: it remembers the launcher
from zods.comm.stop_request import EXIT_CODE, StopRequest, StopRequested

# isort: split
import logging
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

import zods
from zods.cli.arguments import parse_arguments
from zods.cli.load_model import load_model, save_configuration, save_tokenizer
from zods.cli.merged_config import merged_config
from zods.cli.model_checks import check_causal, check_packing
from zods.cli.options import Arguments, RunArguments
from zods.cli.plots import plot_curves
from zods.cli.prepared_data import PreparedData, prepare_data
from zods.cli.pretrained import (
    Pretrained,
    find_model,
    parameter_sizes,
    read_tokenizer,
    tokenizer_digest,
    weight_files_digest,
)
from zods.cli.run_folder import RunFolder
from zods.cli.summary import summarise, table
from zods.cli.training_loop import evaluate, evaluate_unless_done, save, train_steps
from zods.comm.authenticated import read_token
from zods.comm.communicator import Communicator, RankFailure, is_lost_connection
from zods.comm.process import (
    connect_ranks,
    end_process,
    environment_rank,
    report_failure,
    write_exit_status,
)
from zods.comm.siblings import Siblings
from zods.comm.watchdog import Watchdog
from zods.config.auto_values import (
    hidden_size_of,
    offloads_to_nvme,
    resolve_model_auto,
    resolve_offload_buffers,
)
from zods.config.deepspeed_json import (
    FirstOrderConfig,
    RunConfig,
    read_config,
    read_first_order_config,
)
from zods.config.optional_packages import check_packages
from zods.config.schedules import with_provisional_length
from zods.config.schema import ZerothOrderConfig
from zods.params.swap_files import in_own_folder
from zods.training import first_order_checkpoint
from zods.training.checkpoint_files import latest_tag
from zods.training.description import check_configurations
from zods.training.engine import ZerothOrderEngine
from zods.training.first_order import FirstOrderEngine
from zods.training.host_memory import return_freed_memory
from zods.training.initialize import check_names, steps_per_epoch
from zods.training.rank_agreement import (
    check_code_and_configuration,
    code_in_use,
    code_of_model,
)
from zods.training.resume import CHECKPOINTS, INITIAL, copy_log

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # for the report of a rank that was killed, before this one ends


def main() -> None:
    stop_request = StopRequest()
    stop_request.guard_start()
    siblings = Siblings()
    siblings.watch()
    try:
        arguments = parse_arguments()
    except SystemExit as ended:
        write_exit_status(int(ended.code or 0))
        raise
    rank = environment_rank()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, format="%(name)s: %(message)s"
    )
    try:
        run = start(arguments)
    except Exception as error:
        if isinstance(error, RuntimeError):
            siblings.wait_for_report(REPORT_SECONDS)
        end_process(report_failure(error, "zods.finetune"))
    run[0].stop_on(stop_request)
    stop_request.listen()
    try:
        finished = finetune(arguments, *run)
    except Exception as error:  # e.g. a full disk, ranks that disagree, a failed rank
        if isinstance(error, RuntimeError):
            siblings.wait_for_report(REPORT_SECONDS)
        # All ranks raise the same ValueError of zods, so that one rank prints it.
        if isinstance(error, ValueError) and _is_our_own(error):
            end_process(report_failure(error, "zods.finetune"))
        kind = "" if isinstance(error, (OSError, RuntimeError)) else f"{type(error).__name__}: "
        print(f"zods.finetune: error: rank {rank}: {kind}{error}", file=sys.stderr)
        if not isinstance(error, OSError) and not _is_our_own(error):
            traceback.print_exc()
        end_process(1)
    run[0].close()
    end_process(0 if finished else EXIT_CODE)


def _is_our_own(error: Exception) -> bool:
    """Whether an error's message is sufficient without a traceback.

    That is so for errors that zods raised, and for the failure of another rank, which has reported
    its own error.
    """
    if isinstance(error, RankFailure):
        return error.__cause__ is None
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return is_lost_connection(error) or innermost.f_globals.get("__name__", "").startswith("zods.")


def start(
    arguments: Arguments,
) -> tuple[ZerothOrderEngine | FirstOrderEngine, PreparedData, RunFolder, Any]:
    """Check the input, then load the model.

    Returns (engine, data, run folder, tokenizer).
    """
    comm = connect_ranks()
    watchdog = Watchdog(comm, ZerothOrderConfig().load_timeout)
    watchdog.beat("the start, configuration")
    try:
        with comm.same_on_all_ranks():
            checked = check_input(arguments, comm, watchdog)
        check_code_and_configuration(comm, checked.run, code_in_use())
        comm.check_agreement(
            weight_files_digest(checked.pretrained),
            f"a file of weights in {checked.pretrained.base}",
        )
        check_configurations(comm, checked.pretrained)
        run, folder, fork, data = checked.run, checked.folder, checked.fork, checked.data
        task = data.task
        if run.zero_stage == 3:
            return_freed_memory(comm.device)
        watchdog.beat("the start, loading of the model", run.zeroth_order.load_timeout)
        # config.json keeps the path that was given
        used = replace(run, deepspeed=in_own_folder(run.deepspeed, comm, checked.sizes))
        model, new = load_model(arguments.model, used, task, checked.pretrained)
    finally:
        watchdog.close()  # the engine has its own
    engine: ZerothOrderEngine | FirstOrderEngine
    if isinstance(used, RunConfig):
        engine = zods.initialize(
            model=model,
            config=used.to_dict(),
            training_data=data.train,
            collate_fn=data.collate,
            target_data=data.target,
            tokenizer=checked.tokenizer,
        )[0]
    else:
        engine = FirstOrderEngine(model, used, data.train, data.collate, data.target)
    code = {**code_of_model(engine.module), "tokenizer": tokenizer_digest(checked.tokenizer)}
    engine.recorder.note_code(code)
    first = data.first_batches(8)
    check_causal(engine.evaluate, checked.pretrained, task, first)
    check_packing(engine.evaluate, engine.module, checked.pretrained, first)
    with comm.same_on_all_ranks():
        if fork is not None and comm.rank == 0:
            copy_log(fork.parent.parent, fork if isinstance(run, RunConfig) else None, folder.path)
    folder.follow_cuts(engine.recorder.trajectory)
    engine.resume(
        folder.path,
        checkpoints=None if fork is None else fork.parent,
        new=new,
        must_be_new=arguments.model.resume is None,
    )
    with comm.same_on_all_ranks():
        if comm.rank == 0 and new:
            save_configuration(model, folder.path / INITIAL.parent)
        folder.describe(
            run.to_dict(),
            arguments=arguments.to_dict(),
            seed=run.seed,
            world_size=comm.world_size,
            device=str(comm.device),
            step=engine.global_steps,
            has_begun=has_begun(engine),
        )
    return engine, data, folder, checked.tokenizer


def has_begun(engine: ZerothOrderEngine | FirstOrderEngine) -> bool:
    """Whether the weights have been changed: by a step, or by the refresh of the anchor before it."""
    is_refreshed = isinstance(engine, ZerothOrderEngine) and engine.anchor_step is not None
    return engine.global_steps > 0 or is_refreshed


@dataclass(frozen=True)
class CheckedInput:
    """The input of a run, checked before the model is loaded.

    fork: the checkpoint of another run from which this run starts; None where it starts from the
    pretrained model or continues itself. sizes: the number of elements of each parameter; empty
    unless parameters are offloaded to NVMe.
    """

    run: RunConfig | FirstOrderConfig
    folder: RunFolder
    fork: Path | None
    pretrained: Pretrained
    tokenizer: Any
    data: PreparedData
    sizes: list[int]


def check_input(arguments: Arguments, comm: Communicator, watchdog: Watchdog) -> CheckedInput:
    """Read and check the configuration, the model's files and the data.

    Raises ValueError or OSError.
    """
    merged = merged_config(arguments)
    check_packages(merged, plot=arguments.run.plot, new_adapter=arguments.model.new_adapter)
    read = read_config if arguments.model.optimizer is None else read_first_order_config
    most = arguments.run.max_steps
    known = merged if most is not None else with_provisional_length(merged)
    run: RunConfig | FirstOrderConfig = read(
        known, comm.world_size, total_steps=None if most is None else max(1, most)
    )
    watchdog.beat("the start, checks of the input", run.zeroth_order.load_timeout)
    check_names(run)
    replicas = run.zeroth_order.replicas
    if replicas is not None and comm.rank == 0:
        read_token(replicas.token_file)
    folder = RunFolder(
        arguments.model.output_dir,
        rank=comm.rank,
        resume=arguments.model.resume == "auto",
        has_log=replicas is None or replicas.index == 0,
    )
    fork = (
        None
        if arguments.model.resume in (None, "auto")
        else checkpoint_to_fork(Path(arguments.model.resume), isinstance(run, FirstOrderConfig))
    )
    pretrained = find_model(arguments.model)
    tokenizer = read_tokenizer(arguments.model, pretrained)
    data = prepare_data(arguments, tokenizer, run, pretrained)
    if most is None:
        steps = arguments.run.num_epochs * steps_per_epoch(
            len(data.train), run.deepspeed["train_batch_size"], run.selector
        )
        run = read(merged, comm.world_size, total_steps=max(1, steps))
    hidden_size = hidden_size_of(pretrained.config)
    resolve_model_auto(
        run.deepspeed, hidden_size, overlaps=not get_accelerator().is_synchronized_device()
    )
    sizes: list[int] = []
    if offloads_to_nvme(run.deepspeed):
        sizes = parameter_sizes(pretrained, data.task, arguments.model.trust_remote_code)
        resolve_offload_buffers(run.deepspeed, sizes, comm.world_size)
    return CheckedInput(run, folder, fork, pretrained, tokenizer, data, sizes)


def finetune(
    arguments: Arguments,
    engine: ZerothOrderEngine | FirstOrderEngine,
    data: PreparedData,
    folder: RunFolder,
    tokenizer: Any,
) -> bool:
    """Evaluate, train with evaluations and checkpoints, evaluate again, and report. Returns whether
    the run is finished, and not stopped on request.
    """
    rank = engine.global_rank
    try:
        before, in_context = evaluate_before(engine, data, folder)
        trained = train_steps(engine, arguments.run, data.task, data.held_out, folder)
        after = evaluate_unless_done(engine, data.task, data.held_out, folder)
    except StopRequested:
        save_and_print_how_to_resume(engine, arguments.run, folder)
        return False

    if arguments.run.save_model:
        engine.save_pretrained(folder.path / "model")
        with engine.comm.same_on_all_ranks():
            if rank == 0:
                save_tokenizer(tokenizer, folder.path / "model")
    summary = summarise(
        engine,
        before,
        after,
        in_context,
        seconds=trained.seconds,
        sent=trained.scalar_bytes,
        gathered=trained.zero3_bytes,
    )
    if rank == 0:
        folder.record("summary", engine.global_steps, **summary)
        print(table(summary))
        if arguments.run.plot:
            print(f"curves: {plot_curves(folder.path)}")
    return True


def evaluate_before(
    engine: ZerothOrderEngine | FirstOrderEngine, data: PreparedData, folder: RunFolder
) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics before training: of the held-out prompts alone, and after solved examples.

    Those of a run that has begun are read from its folder, where only rank 0 finds them. Metrics
    that are not known are empty.
    """
    if has_begun(engine):
        found = folder.evaluation_at(0, "in_context")
        if data.in_context is not None and not found and environment_rank() == 0:
            logger.warning(
                "--icl: not evaluated, for it is before the first step, and this run has begun"
            )
        return folder.evaluation_at(0), found
    before, in_context = evaluate(engine, data.task, data.held_out, folder), {}
    if data.in_context is not None:
        in_context = evaluate(engine, data.task, data.in_context, folder, "in_context")
    return before, in_context


def checkpoint_to_fork(run: Path, is_first_order: bool = False) -> Path:
    """The checkpoint in a run's folder, or in a folder of checkpoints, from which a fork starts.

    In first-order training, the newest whole one; otherwise the one that `latest` names. Raises
    FileNotFoundError where there is none.
    """
    folder = run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run
    remedy = "Give the folder of a run with checkpoints, or auto."
    if is_first_order:
        whole = first_order_checkpoint.checkpoints_in(folder)
        if not whole:
            raise FileNotFoundError(
                f"--resume {run}: no whole checkpoint of first-order training in {folder}. {remedy}"
            )
        return whole[0]
    name = Path(latest_tag(folder) or "").name
    if not name:
        raise FileNotFoundError(
            f"--resume {run}: no file `latest` in {folder} that names a checkpoint. {remedy}"
        )
    return folder / name


def save_and_print_how_to_resume(
    engine: ZerothOrderEngine | FirstOrderEngine, run: RunArguments, folder: RunFolder
) -> None:
    """Save after a request to stop, and print how to continue."""
    if engine.global_steps:
        save(engine, run, folder)
    if engine.global_rank == 0:
        print(
            f"stopped after step {engine.global_steps} "
            f"({engine.stop.reason or 'another rank was asked to'}). To go on: the same command "
            "with --resume auto"
        )


if __name__ == "__main__":
    main()
