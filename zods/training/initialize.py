"""`zods.initialize`: DeepSpeed's signature and 4-tuple, for a zeroth-order engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from zods.comm.communicator import Communicator
from zods.comm.process import connect_ranks
from zods.comm.watchdog import Watchdog
from zods.config.auto_values import hidden_size_of, resolve_model_auto, resolve_offload_buffers
from zods.config.deepspeed_json import FirstOrderConfig, RunConfig, read_config
from zods.config.optional_packages import check_packages
from zods.config.schedules import ZerothOrderOptimizer, build_scheduler, step_mistake
from zods.config.schema import ZerothOrderConfig
from zods.config.section import SECTION
from zods.config.selector_section import SelectorConfig, check_selector
from zods.data.batch import accepted_arguments
from zods.data.columns import sources_of
from zods.data.loader import TrainingLoader, check_dataset
from zods.data.scores import find_score
from zods.data.stream import is_stream
from zods.data.text_scores import TextObjective, find_text_score
from zods.forward.fused_norms import find_fused_norms
from zods.forward.wrapping import has_moved_hooks
from zods.kernels import backend
from zods.params.anchor_stores import check_nvme
from zods.params.shards import ShardedParameters
from zods.params.swap_files import check_reads, in_own_folder, lock_folder
from zods.params.zero3_adapter import is_sharded
from zods.selection.loaders import SelectingLoader
from zods.selection.selector import NEEDS
from zods.selection.sub_batches import SubBatches, check_target_data
from zods.selection.target_matrix import find_target
from zods.training.description import check_configurations
from zods.training.engine import ZerothOrderEngine
from zods.training.host_memory import return_freed_memory
from zods.training.model_setup import (
    lay_out_parameters,
    parameters_to_train,
    scalars_as_vectors,
    without_compile,
)
from zods.training.rank_agreement import check_ranks_agree, code_of_model
from zods.training.training_data import check_streamed, make_training_loader
from zods.training.training_run import TrainingRun

logger = logging.getLogger(__name__)

SELECTOR = f"{SECTION}.selector"
# A change of a weight in a step. MeZO's step sizes, which multiply the estimate, are below it.
SMALL_CHANGE = 1e-5


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: torch.utils.data.Dataset | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    target_data: torch.utils.data.Dataset | None = None,
    tokenizer: Any = None,
) -> tuple[ZerothOrderEngine, ZerothOrderOptimizer, TrainingLoader | SelectingLoader | None, Any]:
    """Make a zeroth-order engine from a model: `deepspeed.initialize` for a configuration with a
    section "zeroth_order".

    model: any module whose forward returns a loss, an output with `loss`, or one with `logits` for
    a batch with `labels`. It may be made under `deepspeed.zero.Init`. torch.compile is removed from
    it. model_parameters: the parameters to train, also as groups (default: all that require a
    gradient); see `zods.training.model_setup.parameters_to_train`. training_data: a map-style
    dataset, or a stream (torch's or datasets' IterableDataset, see `zods.data.stream`). "mezo_svrg"
    needs a map-style dataset for the full-batch gradient of its anchor; "anneal" and "selector" need
    one, too. An lr of "auto", the default, needs either. lr_scheduler: a scheduler on the returned
    optimizer, or a function that makes one from it. config: path or dict (default:
    `args.deepspeed_config`). target_data: a map-style dataset whose rows `collate_fn` takes, too;
    the examples that the selector's strategy "target" needs. tokenizer: decodes generated texts,
    where the section has "generate".
    optimizer, mpu and mesh_param must be None.

    Returns (engine, optimizer, training_dataloader, lr_scheduler). Raises ValueError or OSError on
    bad input, the same on all ranks.
    """
    comm = connect_ranks(distributed_port=distributed_port, dist_init_required=dist_init_required)
    with comm.same_on_all_ranks():
        model = _checked_model(model, optimizer=optimizer, mpu=mpu, mesh_param=mesh_param)
        run = _read_run(args, config, config_params, comm.world_size)
        zo = run.zeroth_order
        if zo.comm == "mpi":
            comm.use_mpi()
        if hasattr(lr_scheduler, "step"):
            _check_step(lr_scheduler)
        if is_stream(training_data):
            check_streamed(zo)
        _check_selector(run, model, training_data, target_data)
        training_loader = _training_loader(run, comm, training_data, collate_fn, target_data)
        wanted = parameters_to_train(
            model, model_parameters, lr=zo.lr, weight_decay=zo.weight_decay
        )
        lay_out_parameters(model)
        resolve_by_model(run, model, comm.world_size)
        fused_norms = find_fused_norms(model, zo.fused_norm, comm.device)
        texts = _text_objective(zo, model, tokenizer)
    code = {**code_of_model(model), **fused_norms.code}
    watchdog = Watchdog(comm, run.zeroth_order.hang_timeout)
    watchdog.beat("the start, comparison and sharding of the model", run.zeroth_order.load_timeout)
    check_ranks_agree(comm, run, model, code, training_loader)
    check_configurations(comm, model)
    engine = _sharded(run, model, comm)
    check_reads(list(engine.module.parameters()))
    parameters = ShardedParameters(engine.module, rank=comm.rank, model_parameters=wanted)
    loader: TrainingLoader | SelectingLoader | None = training_loader
    if zo.selector is not None:
        assert training_loader is not None
        loader = _selecting_loader(run, comm, engine, training_loader, target_data)
    zo_optimizer = ZerothOrderOptimizer([p.param for p in parameters], lr=zo.peak_lr)
    with comm.same_on_all_ranks():
        scheduler = _scheduler(run, zo_optimizer, lr_scheduler)
    training_run = TrainingRun.build(
        run, engine, comm, parameters, zo_optimizer, scheduler, loader, watchdog
    )
    zo_engine = ZerothOrderEngine(training_run, fused_norms, texts)
    zo_engine.recorder.note_code(code)
    watchdog.rest()
    if comm.rank == 0:
        _log_start(zo, comm.world_size, parameters)
    return zo_engine, zo_optimizer, loader, scheduler


def _read_run(args: Any, config: Any, config_params: Any, world_size: int) -> RunConfig:
    """Read the configuration: `config`, `config_params` or `args.deepspeed_config`.

    Raises ValueError where it is missing or wrong, where it needs a package that is not installed,
    and where this rank cannot use one of its folders; OSError where its file cannot be read.
    """
    source = config if config is not None else config_params
    if source is None:
        source = getattr(args, "deepspeed_config", None)
    if source is None:
        raise ValueError("config: missing. Give a path or dict, or args with deepspeed_config.")
    run = read_config(source, world_size)
    check_packages(run.deepspeed)
    check_names(run)
    return run


def _checked_model(model: torch.nn.Module | None, **others: Any) -> torch.nn.Module:
    """Return the model without torch.compile.

    Raises ValueError where it is missing or another engine uses it, and where one of `others`, the
    arguments for first-order training, is given.
    """
    if model is None:
        raise ValueError("model: missing. Give a torch.nn.Module.")
    # closing the other engine would take the hooks out of this engine's forwards
    if has_moved_hooks(model):
        raise ValueError(
            "model: another zods engine runs the hooks of its modules. Call close() of that "
            "engine first."
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name}: must be None; a zeroth-order step has no optimizer states and shards by "
                "ZeRO-3 only."
            )
    return without_compile(model)


def _log_start(zo: ZerothOrderConfig, world_size: int, parameters: ShardedParameters) -> None:
    """Log what is trained, and warn of a very small step and of directions whose rank is reduced.

    The directions of a matrix whose smaller side is below `direction.rank` have the rank of that
    side.
    """
    logger.info(
        "zods: %s on %d ranks, %d trainable elements, kernels: %s",
        zo.method,
        world_size,
        parameters.numel,
        backend(),
    )
    if zo.normalize and zo.lr != "auto" and 0.0 < zo.lr < SMALL_CHANGE:
        logger.warning(
            "zeroth_order.lr is %g, and with normalize that is the change of a weight in a step. If "
            "it is meant for the estimate itself, as in MeZO's code, set normalize to false.",
            zo.lr,
        )
    direction = zo.direction
    small = [p for p in parameters if len(p.shape) == 2 and min(p.shape) < direction.rank]
    if direction.distribution == "low_rank" and small:
        named = ", ".join(f"{p.name} ({min(p.shape)})" for p in small[:5])
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        logger.warning(
            "direction.rank %d is reduced to the smaller side of %s%s", direction.rank, named, more
        )


def steps_per_epoch(num_examples: int, batch_size: int, selector: SelectorConfig | None) -> int:
    """The number of steps of a pass over the training data, as the loaders count them.

    batch_size: the train_batch_size.
    """
    if selector is not None:
        return num_examples // selector.candidates * selector.interval
    return num_examples // batch_size


def check_names(run: RunConfig | FirstOrderConfig) -> None:
    """Raise ValueError where this rank cannot use a folder for NVMe offload, or import the
    objective.
    """
    zo = run.zeroth_order
    if zo.generate is not None:
        find_text_score(zo.objective)
    elif zo.objective != "loss":
        find_score(zo.objective)
    for key in ("offload_param", "offload_optimizer"):
        offload = run.deepspeed.get("zero_optimization", {}).get(key) or {}
        if offload.get("device") == "nvme":
            check_nvme(offload["nvme_path"], f"zero_optimization.{key}.nvme_path")
    if zo.anchor.nvme_path is not None:
        check_nvme(zo.anchor.nvme_path, "zeroth_order.anchor.nvme_path")


def _text_objective(
    zo: ZerothOrderConfig, model: torch.nn.Module, tokenizer: Any
) -> TextObjective | None:
    """The score of generated texts; None where the objective is computed from logits.

    Raises ValueError where the model or the tokenizer cannot generate text.
    """
    if zo.generate is None:
        return None
    if getattr(tokenizer, "eos_token_id", None) is None:
        found = "missing" if tokenizer is None else f"{type(tokenizer).__name__} without eos_token"
        raise ValueError(
            f"tokenizer: {found}; {SECTION}.generate decodes texts up to the end of sequence. Give "
            "a tokenizer of transformers with an eos_token to zods.initialize."
        )
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    generates = getattr(model, "can_generate", lambda: True)()
    takes = accepted_arguments(model)
    if is_pair or not generates or not takes >= {"input_ids", "attention_mask"}:
        raise ValueError(
            f"{SECTION}.generate: needs a causal language model that takes input_ids and "
            f"attention_mask; found {type(model).__name__}. Remove generate, and use an objective of "
            "logits."
        )
    return TextObjective(find_text_score(zo.objective), tokenizer, zo.generate.max_new_tokens)


def _training_loader(
    run: RunConfig,
    comm: Communicator,
    training_data: Any,
    collate_fn: Callable | None,
    target_data: Any,
) -> TrainingLoader | None:
    zo = run.zeroth_order
    if training_data is None:
        if zo.is_svrg:
            raise ValueError(
                'training_data: missing; method "mezo_svrg" takes its anchor over the '
                "training set. Give a "
                'map-style dataset to zods.initialize, or use method "mezo".'
            )
        if zo.replicas is not None:
            raise ValueError("training_data: missing; zeroth_order.replicas share its batches.")
        if zo.anneal is not None:
            raise ValueError(
                "training_data: missing; zeroth_order.anneal compares the losses of its epochs."
            )
        if zo.lr == "auto":
            raise ValueError(
                'training_data: missing; with zeroth_order.lr "auto" the step size is measured on '
                "some of its examples. Give a dataset to zods.initialize, or a number for lr."
            )
        return None
    return make_training_loader(
        *(zo, comm, training_data, collate_fn),
        micro_batch=run.deepspeed["train_micro_batch_size_per_gpu"],
        accumulation=run.deepspeed["gradient_accumulation_steps"],
        target_data=target_data,
    )


def _check_selector(
    run: RunConfig, model: torch.nn.Module, training_data: Any, target_data: Any
) -> None:
    """Raise ValueError where the model or the data does not fit the selector's configuration."""
    selector = run.zeroth_order.selector
    if selector is None:
        if target_data is not None:
            raise ValueError(f"target_data: given without {SELECTOR}, which chooses by it.")
        return
    if training_data is None:
        raise ValueError(
            f"training_data: missing; {SELECTOR} chooses from it. Give a map-style dataset to "
            "zods.initialize."
        )
    size = check_dataset(training_data, "training_data")
    check_selector(selector, SELECTOR, run.deepspeed["train_batch_size"], size)
    check_target_data(selector, target_data, SELECTOR)
    sources_of(training_data, selector.source_column, SELECTOR)
    if NEEDS[selector.strategy] != "nothing":
        find_target(model, selector.pattern)


def _selecting_loader(
    run: RunConfig,
    comm: Communicator,
    deepspeed_engine: Any,
    loader: TrainingLoader,
    target_data: Any,
) -> SelectingLoader:
    """A loader that chooses from the data of `loader`."""
    assert run.zeroth_order.selector is not None
    with comm.same_on_all_ranks():
        selection = SubBatches(
            loader.dataset,
            loader.collate_fn,
            run.zeroth_order.selector,
            deepspeed_engine=deepspeed_engine,
            comm=comm,
            seed=run.zeroth_order.seed,
            path=SELECTOR,
            loss_mean=run.zeroth_order.averages,
            target_data=target_data,
        )
    return SelectingLoader(selection, comm, run.zeroth_order.seed, loader.examples)


def _sharded(run: RunConfig, model: torch.nn.Module, comm: Communicator) -> Any:
    """Shard the model and give it to DeepSpeed; returns DeepSpeed's engine.

    Replicated bf16 is cast here, because DeepSpeed's stage 0 keeps fp32 master weights. A model not
    made under zero.Init is sharded here, because DeepSpeed 0.19.8, on an accelerator without fp16,
    writes fp32 parameters to NVMe as bf16 when it is given a dtype, as its engine does.
    """
    config = dict(run.deepspeed)
    bf16 = config.get("bf16", {}).get("enabled", False)
    is_new = not any(map(is_sharded, model.parameters()))
    if is_new:
        config = in_own_folder(config, comm, [p.numel() for p in model.parameters()])
    else:
        with comm.same_on_all_ranks():
            lock_folder(config, comm.rank)
    with scalars_as_vectors(model):
        if run.zero_stage == 3:
            return_freed_memory(comm.device)
        if bf16 and is_new:
            model.bfloat16()
        if run.zero_stage == 0 and bf16:
            del config["bf16"]
        if run.zero_stage == 3 and is_new:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        return deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]


def _scheduler(run: RunConfig, optimizer: ZerothOrderOptimizer, client: Any) -> Any:
    """The client's scheduler, else the configuration's; it sets the zeroth-order step size."""
    if client is None:
        return None if run.scheduler is None else build_scheduler(run.scheduler, optimizer)
    scheduler = client if hasattr(client, "step") else client(optimizer)
    _check_step(scheduler)
    return scheduler


def _check_step(scheduler: Any) -> None:
    """Raise ValueError where the engine could not call the client's `scheduler.step()`."""
    mistake = step_mistake(scheduler, "lr_scheduler")
    if mistake is not None:
        raise ValueError(mistake)


def resolve_by_model(run: RunConfig, model: torch.nn.Module, world_size: int) -> None:
    """Set the values of DeepSpeed's part of the configuration that depend on the model, in place.

    Raises ValueError where a value does not fit the model.
    """
    overlaps = not get_accelerator().is_synchronized_device()
    resolve_model_auto(
        run.deepspeed, hidden_size_of(getattr(model, "config", None)), overlaps=overlaps
    )
    zero = run.deepspeed.get("zero_optimization", {})
    if zero.get("stage3_prefetch_bucket_size") == 0 and any(
        type(m).__name__ == "ParamWrapper" for m in model.modules()
    ):
        # PEFT's adapter of a single parameter changes which module owns it while a forward runs.
        # Without prefetching, DeepSpeed 0.19.8 ends such a forward with "tracing error".
        del zero["stage3_prefetch_bucket_size"]
    numels = [getattr(p, "ds_numel", p.numel()) for p in model.parameters()]
    resolve_offload_buffers(run.deepspeed, numels, world_size)
