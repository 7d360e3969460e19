"""Fine-tune a transformer from the command line: `deepspeed --module zods.finetune --help`. Composition only."""

from __future__ import annotations

import argparse
import logging
import math
import os
import resource
import statistics
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import comms_logger
from tqdm import tqdm
from transformers.integrations import HfDeepSpeedConfig

import zods
from zods.arguments import merged_config, parse_arguments
from zods.comm import Communicator, end_process
from zods.config import FirstOrderConfig, RunConfig, read_config, read_first_order_config, resolve_model_auto
from zods.engine import ZerothOrderEngine
from zods.extras import check_packages
from zods.first_order import FirstOrderEngine
from zods.initialization import check_folders
from zods.report import plot_curves
from zods.resuming import CHECKPOINTS, INITIAL, copy_log
from zods.runs import RunFolder
from zods.selection.batches import sources_of
from zods.stopping import StopRequest
from zods.tasks import Task, build_task, load_examples, split_held_out
from zods.trajectory.replay import name_in_files

logger = logging.getLogger(__name__)


def main() -> None:
    arguments = parse_arguments()
    stop_request = StopRequest()
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(name)s: %(message)s")
    try:
        run = start(arguments)
    except (ValueError, OSError) as error:  # bad input: the same on all ranks, so one of them says it
        if rank == 0:
            print(f"zods.finetune: error: {error}", file=sys.stderr)
        end_process(2)
    run[0].stop = stop_request
    stop_request.listen()
    try:
        finetune(arguments, *run)
    except (OSError, RuntimeError) as error:  # a full disk, ranks that disagree, another rank that is gone
        print(f"zods.finetune: error: rank {rank}: {error}", file=sys.stderr)
        if not isinstance(error, OSError) and not _is_our_own(error):
            traceback.print_exc()
        end_process(1)
    run[0].close()
    end_process(0)


def _is_our_own(error: RuntimeError) -> bool:
    """Whether the message tells all: it was raised here, or another rank is gone and that one has said why."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return innermost.f_globals.get("__name__", "").startswith("zods.") or "peer" in str(error)


def start(
    arguments: argparse.Namespace,
) -> tuple[ZerothOrderEngine | FirstOrderEngine, Task, datasets.Dataset, RunFolder, Any]:
    """Check the input, then load: (engine, task, held-out data, run folder, tokenizer)."""
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    comm = Communicator(torch.device(get_accelerator().current_device_name()))
    with comm.same_on_all_ranks():
        merged = merged_config(arguments)
        check_packages(merged, plot=arguments.plot, lora=arguments.lora_rank is not None)
        run: RunConfig | FirstOrderConfig
        if arguments.optimizer is None:
            run = read_config(merged, comm.world_size)
            check_folders(run)
        else:
            run = read_first_order_config(merged, comm.world_size)
        folder = RunFolder(arguments.output_dir, rank=comm.rank, resume=arguments.resume == "auto")
        fork = None if arguments.resume in (None, "auto") else latest_checkpoint(Path(arguments.resume))
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            arguments.tokenizer or arguments.model, trust_remote_code=arguments.trust_remote_code
        )
        task, train, held_out = prepare_data(arguments, tokenizer, run)
        model_config = transformers.AutoConfig.from_pretrained(
            arguments.model, trust_remote_code=arguments.trust_remote_code
        )
    resolve_model_auto(run.deepspeed, getattr(model_config.get_text_config(), "hidden_size", None))
    model, new = load_model(arguments, run, task)
    engine: ZerothOrderEngine | FirstOrderEngine
    if isinstance(run, RunConfig):
        engine = zods.initialize(model=model, config=run.to_dict(), training_data=train, collate_fn=task.collate)[0]
    else:
        engine = FirstOrderEngine(model, run, train, task.collate)
    with comm.same_on_all_ranks():
        if fork is not None and comm.rank == 0:
            copy_log(fork.parent.parent, fork if isinstance(run, RunConfig) else None, folder.path)
    engine.resume(folder.path, checkpoints=None if fork is None else fork.parent, new=new)
    if comm.rank == 0 and new:
        save_configuration(model, folder.path / INITIAL.parent)
    folder.describe(
        run.to_dict(), seed=run.seed, world_size=comm.world_size, device=str(comm.device), step=engine.global_steps
    )
    return engine, task, held_out, folder, tokenizer


def finetune(
    arguments: argparse.Namespace,
    engine: ZerothOrderEngine | FirstOrderEngine,
    task: Task,
    held_out: datasets.Dataset,
    folder: RunFolder,
    tokenizer: Any,
) -> None:
    """One run: evaluate, train with evaluations and checkpoints, evaluate, report."""
    rank = engine.global_rank
    before = folder.first_evaluation() if engine.global_steps else evaluate(engine, task, held_out, folder)
    trained = train_steps(engine, arguments, task, held_out, folder)
    if engine.should_stop:
        stop(engine, arguments, folder)
        return
    after = evaluate(engine, task, held_out, folder)

    if arguments.save_model:
        engine.save_pretrained(folder.path / "model")
        if rank == 0:
            tokenizer.save_pretrained(folder.path / "model")
    summary = summarise(engine, before, after, trained)
    if rank == 0:
        folder.record("summary", engine.global_steps, **summary)
        print(table(summary))
        if arguments.plot:
            print(f"curves: {plot_curves(folder.path)}")


def latest_checkpoint(run: Path) -> Path:
    """That of a run's folder, or of its folder of checkpoints. Raises FileNotFoundError."""
    folder = run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run
    latest = folder / "latest"
    if not latest.is_file():
        raise FileNotFoundError(
            f"--resume {run}: no file `latest` in {folder}. Give the folder of a run with checkpoints, or auto."
        )
    return folder / Path(latest.read_text(errors="replace").strip()).name


def prepare_data(
    arguments: argparse.Namespace, tokenizer: Any, run: RunConfig | FirstOrderConfig
) -> tuple[Task, datasets.Dataset, datasets.Dataset]:
    """The task, its training data (with the column of the sources, where one is named) and its held-out data, tokenised and
    checked."""
    seed = run.seed
    hub = {"dataset_name": arguments.dataset_name, "dataset_config": arguments.dataset_config}
    local = {"column_names": arguments.column_names}
    most, most_held_out = arguments.max_train_examples, arguments.max_eval_examples
    if arguments.train_file is not None:
        train = load_examples(file=arguments.train_file, **local, max_examples=most, seed=seed)
    else:
        train = load_examples(**hub, split=arguments.train_split, max_examples=most, seed=seed)
    if arguments.validation_file is not None:
        held_out = load_examples(file=arguments.validation_file, **local, max_examples=most_held_out, seed=seed)
    elif arguments.validation_split is not None:
        held_out = load_examples(**hub, split=arguments.validation_split, max_examples=most_held_out, seed=seed)
    else:
        train, held_out = split_held_out(train, arguments.held_out, seed)
    task = build_task(
        arguments.task,
        tokenizer,
        train,
        text_column=arguments.text_column,
        text_pair_column=arguments.text_pair_column,
        label_column=arguments.label_column,
        template=None if arguments.template is None else arguments.template.replace(r"\n", "\n"),
        label_words=arguments.label_words,
        prompt_column=arguments.prompt_column,
        response_column=arguments.response_column,
        max_length=arguments.max_length,
    )
    column = None if run.selector is None else run.selector.source_column
    sources = None if column is None else sources_of(train, column, "selector")
    train, held_out = task.prepare(train), task.prepare(held_out)
    if column is not None:
        train = train.add_column(column, sources)
    return task, train, held_out


def load_model(
    arguments: argparse.Namespace, run: RunConfig | FirstOrderConfig, task: Task
) -> tuple[torch.nn.Module, list[str]]:
    """The pretrained model, sharded while it is loaded where the run is stage 3; a new head follows from the seed.

    Also the names of the parameters that are not in its files: a new head, adapters.
    """
    transformers.set_seed(run.seed)
    # transformers looks for a living HfDeepSpeedConfig while from_pretrained runs
    sharded = HfDeepSpeedConfig(run.deepspeed) if run.zero_stage == 3 else None
    model, info = task.auto_class().from_pretrained(
        arguments.model,
        output_loading_info=True,
        dtype=torch.bfloat16 if run.deepspeed.get("bf16", {}).get("enabled", False) else torch.float32,
        trust_remote_code=arguments.trust_remote_code,
        **task.model_kwargs(),
    )
    del sharded
    new = set(info["missing_keys"])
    if arguments.lora_rank is not None:
        import peft  # an extra

        head = ["classifier", "score"] if task.name == "classification" else None
        lora = peft.LoraConfig(r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank, modules_to_save=head)
        model = peft.get_peft_model(model, lora)
        new = {name for name, p in model.named_parameters() if p.requires_grad or name_in_files(name) in new}
    return model, [name for name, _ in model.named_parameters() if name in new]


def save_configuration(model: Any, folder: Path) -> None:
    """What a replay needs to write a model or adapter that the base's own configuration does not describe."""
    if hasattr(model, "peft_config"):
        base = type(model.get_base_model())  # by which peft's AutoPeftModel finds it
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        model.peft_config["default"].save_pretrained(folder, auto_mapping_dict=mapping)
    elif getattr(model, "config", None) is not None:
        model.config.save_pretrained(folder)


def evaluate(
    engine: ZerothOrderEngine | FirstOrderEngine, task: Task, held_out: datasets.Dataset, folder: RunFolder
) -> dict[str, float]:
    metrics = engine.evaluate(held_out, task.collate_eval, task.measure)
    folder.record("eval", engine.global_steps, **metrics)
    return metrics


@dataclass
class Trained:
    """Seconds of each step, and what was sent in them."""

    seconds: list[float] = field(default_factory=list)
    scalar_bytes: int = 0
    zero3_bytes: int = 0


def train_steps(
    engine: ZerothOrderEngine | FirstOrderEngine,
    arguments: argparse.Namespace,
    task: Task,
    held_out: datasets.Dataset,
    folder: RunFolder,
) -> Trained:
    """Train to the last step, evaluating and saving on the way."""
    assert engine.training_dataloader is not None
    last = arguments.max_steps or arguments.num_epochs * engine.training_dataloader.steps_per_epoch
    trained = Trained()
    progress = tqdm(total=last, initial=engine.global_steps, desc="steps", disable=engine.global_rank != 0)
    while engine.global_steps < last:
        gathered = _logged_bytes()
        engine.train_batch()
        report = engine.last_step
        assert report is not None
        trained.seconds.append(report.seconds)
        trained.scalar_bytes += report.scalar_bytes
        trained.zero3_bytes += _logged_bytes() - gathered
        folder.record(
            "train",
            report.step,
            loss=report.loss,
            projected_grad=report.projected_grad,
            lr=report.lr,
            seconds=report.seconds,
            scalar_bytes=report.scalar_bytes,
            skipped=report.skipped,
            **({} if engine.selection is None else {"selection_seconds": report.selection_seconds}),
        )
        slope = "" if report.projected_grad is None else f"projected_grad {report.projected_grad:+.2e}, "
        progress.set_postfix_str(f"loss {report.loss:.4f}, {slope}{report.seconds:.3f} s/step")
        progress.update()
        if arguments.eval_interval and engine.global_steps % arguments.eval_interval == 0 and report.step < last:
            metrics = evaluate(engine, task, held_out, folder)
            if engine.global_rank == 0:
                progress.write(f"step {engine.global_steps}: held out: {_text(metrics)}", file=sys.stderr)
        if arguments.save_interval and engine.global_steps % arguments.save_interval == 0:
            save(engine, arguments, folder)
        if engine.should_stop:
            break
    progress.close()
    return trained


def save(engine: ZerothOrderEngine | FirstOrderEngine, arguments: argparse.Namespace, folder: RunFolder) -> None:
    """A full checkpoint; where it cannot be written, the log of zeroth-order steps has all that is needed, and the run goes
    on."""
    try:
        engine.save_checkpoint(folder.path / CHECKPOINTS, keep=arguments.save_total_limit)
    except OSError as error:
        if isinstance(engine, FirstOrderEngine):
            raise
        if engine.global_rank == 0:
            logger.warning(
                "no checkpoint at step %d: %s. The run goes on: its log is whole.", engine.global_steps, error
            )


def stop(engine: ZerothOrderEngine | FirstOrderEngine, arguments: argparse.Namespace, folder: RunFolder) -> None:
    """The run was asked to end before its last step: save, and say how it goes on."""
    save(engine, arguments, folder)
    if engine.global_rank == 0:
        print(
            f"stopped after step {engine.global_steps} ({engine.stop.reason or 'another rank was asked to'}). To go on: the "
            "same command with --resume auto"
        )


def summarise(
    engine: ZerothOrderEngine | FirstOrderEngine, before: dict[str, float], after: dict[str, float], trained: Trained
) -> dict[str, Any]:
    """What the run ends with, as a flat dict; all ranks call it."""
    steps = max(len(trained.seconds), 1)
    peaks = engine.comm.gather_scalars([float(_peak_memory_bytes(engine.device))])
    return {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "steps": engine.global_steps,
        "step_seconds_median": statistics.median(trained.seconds) if trained.seconds else None,
        "train_seconds": sum(trained.seconds),
        "zods_bytes_per_step": trained.scalar_bytes / steps,
        "anchor_gather_bytes_per_step": engine.comm.gather_bytes / steps,
        "zero3_bytes_per_step": trained.zero3_bytes / steps if comms_logger.enabled else None,
        "peak_memory_bytes": [int(row[0]) for row in peaks],
        "anchor_device_bytes": engine.anchor.device_bytes if engine.anchor else 0,
        "anchor_offloaded_bytes": engine.anchor.offloaded_bytes if engine.anchor else 0,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as a short table for people."""
    mib = 1 << 20
    seconds, zero3 = summary["step_seconds_median"], summary["zero3_bytes_per_step"]
    rows = [
        ("held-out accuracy", f"{summary.get('accuracy_before', math.nan):.3f} -> {summary['accuracy_after']:.3f}"),
        ("held-out loss", f"{summary.get('loss_before', math.nan):.3f} -> {summary['loss_after']:.3f}"),
        ("steps", f"{summary['steps']} in {summary['train_seconds']:.0f} s (anchor refreshes in them)"),
        ("time per step (median)", "-" if seconds is None else f"{seconds * 1e3:.0f} ms"),
        ("sent per step and rank by zods", f"{summary['zods_bytes_per_step']:.0f} bytes"),
        ("  gathered of the anchor point", f"{summary['anchor_gather_bytes_per_step'] / mib:.1f} MiB"),
        ("  gathered by ZeRO-3", "not counted (enable comms_logger)" if zero3 is None else f"{zero3 / mib:.1f} MiB"),
        ("peak memory per rank", ", ".join(f"{b / mib:.0f} MiB" for b in summary["peak_memory_bytes"])),
        ("anchor per rank, on the device", f"{summary['anchor_device_bytes'] / mib:.1f} MiB"),
        ("anchor per rank, offloaded", f"{summary['anchor_offloaded_bytes'] / mib:.1f} MiB"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _text(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _logged_bytes() -> int:
    """Bytes of all collectives that DeepSpeed's communication logger has seen, 0 where it is off."""
    sizes = comms_logger.get_raw_data().values()
    return sum(size * record[0] for by_size in sizes for size, record in by_size.items())


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()


if __name__ == "__main__":
    main()
