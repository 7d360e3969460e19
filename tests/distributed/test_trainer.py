"""`zods.integrations.hf`: the steps of ZOTrainer, and what it leaves to transformers' Trainer."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    OPTForCausalLM,
    TrainerCallback,
    default_data_collator,
    get_scheduler,
)

import zods
from tests.distributed.command_line import MODEL, labelled_rows, write_rows
from tests.distributed.models import opt_data, sha256, state, tiny_opt, whole
from tests.distributed.ranks import launch, run_ranks
from zods.data.loader import TrainingLoader
from zods.integrations.hf import PRIVATE, MicroBatches, ZOTrainer, ZOTrainingArguments

STEPS = 8
PER_EPOCH = 6  # steps of `opt_data()`, which has 24 examples
SCRIPTS = Path(__file__).parent / "scripts"
# a configuration by the name of what it tries, each for one number of ranks
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 0, lr measured": (1, {"zero_optimization": {"stage": 0}, "zeroth_order": {}}),
    "stage 3, bf16, SVRG": (
        2,
        {
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True},
            "zeroth_order": {
                "method": "mezo_svrg",
                "lr": 1e-3,
                "anchor_interval": 3,
                "anchor_directions": 2,
            },
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"},
            },
        },
    ),
    "stage 0, by length, workers": (
        2,
        {
            "zero_optimization": {"stage": 0},
            "zeroth_order": {"lr": 1e-3, "group_by_length": True, "dataloader_num_workers": 1},
        },
    ),
    "stage 3, sub-batches": (
        1,
        {
            "zero_optimization": {"stage": 3},
            "zeroth_order": {"lr": 1e-3, "selector": {"candidates": 8, "strategy": "random"}},
        },
    ),
}


class Logs(TrainerCallback):
    """The logs of a run."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.logs if key in row]


def arguments(folder: Path, config: dict[str, Any], **others: Any) -> ZOTrainingArguments:
    """Arguments for steps of 4 examples on one or two ranks."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2 // torch.distributed.get_world_size(),
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "warmup_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return ZOTrainingArguments(output_dir=str(folder), deepspeed=config, **{**defaults, **others})


def trainer_of(args: ZOTrainingArguments, model: Any = None, **others: Any) -> ZOTrainer:
    return ZOTrainer(model=model or tiny_opt(), args=args, train_dataset=opt_data(), **others)


# --- the steps ------------------------------------------------------------------------------------


def rank_of_same_steps(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    logs = Logs()
    args = arguments(folder, config)
    trainer = trainer_of(args, eval_dataset=opt_data(6), callbacks=[logs])
    trainer.evaluate()  # has no effect on the steps
    trainer.train()
    own = {
        **json.loads(json.dumps(config)),
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
    }
    if "scheduler" in own:
        own["scheduler"]["params"] = {"total_num_steps": STEPS, "warmup_num_steps": 2}
    engine, _, loader, _ = zods.initialize(
        model=tiny_opt(),
        config=own,
        training_data=opt_data(),
        collate_fn=default_data_collator,
        lr_scheduler=None
        if "scheduler" in own
        else lambda optimizer: get_scheduler("linear", optimizer, 2, STEPS),
    )
    reports, batches = [], loader.forever()
    for _ in range(STEPS):
        engine.train_batch(batches)
        reports.append(engine.last_step)
    return {
        "states": [state(trainer.deepspeed), state(engine)],
        "losses": [logs.column("loss"), [float(numpy.float32(r.loss)) for r in reports]],
        "lr": [logs.column("learning_rate"), [r.lr for r in reports]],
        "projected_grad": [logs.column("projected_grad"), [r.projected_grad for r in reports]],
        "keys": sorted({key for row in logs.logs for key in row}),
        "epochs": logs.column("epoch")[-1],
    }


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_makes_the_steps_of_zods_initialize_to_the_bit(tmp_path: Path, case: str):
    ranks, config = CASES[case]
    found = run_ranks(ranks, rank_of_same_steps, tmp_path, config)
    for rank in found:
        for pair in ("states", "losses", "lr", "projected_grad"):
            assert rank[pair][0] == rank[pair][1], pair
        assert len(rank["losses"][0]) == STEPS
        assert rank["losses"] == found[0]["losses"], "a log's loss is the mean over all ranks"
        assert len(set(rank["losses"][0])) > 4, "the weights move"
        assert "grad_norm" not in rank["keys"]


def rank_of_resumed_run(folder: Path, config: dict[str, Any], saved: int) -> list[Any]:
    """The states and losses of an uninterrupted run, and of one resumed at step `saved`."""
    found = []
    for resumed in (False, True):
        logs = Logs()
        args = arguments(folder, config, save_strategy="steps", save_steps=saved)
        trainer = trainer_of(args, callbacks=[logs])
        checkpoint = str(folder / f"checkpoint-{saved}")
        trainer.train(resume_from_checkpoint=checkpoint if resumed else None)
        losses = logs.column("loss")[-(STEPS - saved) :]
        found.append((state(trainer.deepspeed), losses, trainer.state.epoch))
        if resumed:
            assert len(logs.column("loss")) == STEPS - saved
    return found


@pytest.mark.parametrize(
    ("case", "saved"),
    [("stage 3, bf16, SVRG", 4), ("stage 0, lr measured", PER_EPOCH), ("stage 3, sub-batches", 5)],
)
def test_a_run_resumed_from_a_checkpoint_continues_to_the_same_bits(
    tmp_path: Path, case: str, saved: int
):
    """It is resumed within an epoch, at its end, and within steps of one selection."""
    ranks, config = CASES[case]
    for whole_run, resumed in run_ranks(ranks, rank_of_resumed_run, tmp_path, config, saved):
        assert resumed == whole_run


def rank_of_two_trainings(folder: Path) -> list[str]:
    """The digests of two calls of train, and of two trainers, the second with the weights of the
    first.
    """
    config = {"zero_optimization": {"stage": 3}, "zeroth_order": {"lr": 1e-3}}
    found, weights = [], list(tiny_opt().parameters())
    trainer = trainer_of(arguments(folder, config, max_steps=3))
    next(iter(trainer.get_train_dataloader()))  # a look at the data has no effect
    for _ in range(2):
        trainer.train()
        found.append(sha256(whole(trainer.deepspeed)))
    trainer.deepspeed.close()
    for _ in range(2):
        model = tiny_opt()
        for param, value in zip(model.parameters(), weights, strict=True):
            param.data.copy_(value)
        trainer = trainer_of(arguments(folder, config, max_steps=3), model)
        trainer.train()
        weights = list(whole(trainer.deepspeed).values())
        found.append(sha256(whole(trainer.deepspeed)))
        trainer.deepspeed.close()
    return found


def test_each_call_of_train_begins_a_run_on_the_weights_that_it_finds(tmp_path: Path):
    ((first, second, first_alone, second_alone),) = run_ranks(1, rank_of_two_trainings, tmp_path)
    assert (first, second) == (first_alone, second_alone)
    assert first != second


# --- the order of the data ------------------------------------------------------------------------


def loader_of(size: int = 12) -> TrainingLoader:
    rows = list(range(size))
    return TrainingLoader(
        rows, micro_batch=2, accumulation=1, rank=0, world_size=1, seed=3, collate_fn=list
    )


def test_micro_batches_by_position_are_those_of_the_loader_epoch_after_epoch():
    batches, expected = MicroBatches(loader_of()), loader_of().forever()
    found = [batches[position] for _ in range(2) for position in range(len(batches))]
    assert found == [batch for _, batch in zip(range(12), expected, strict=False)]


def test_an_epoch_that_ends_early_is_followed_by_the_next_one():
    batches, expected = MicroBatches(loader_of()), loader_of()
    assert [batches[0], batches[1]] == [batch for _, batch in zip(range(2), expected, strict=False)]
    expected.go_to((1, 0))
    assert batches[0] == next(iter(expected))


def test_a_position_at_which_the_loader_does_not_stand_is_refused():
    batches = MicroBatches(loader_of())
    with pytest.raises(ValueError, match=r"asks for micro-batch 3 .* stands at 0"):
        batches[3]


# --- what the Trainer does with it ----------------------------------------------------------------


class Scripted:
    """A metric whose value at each evaluation is given."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.shapes: list[Any] = []

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"score": self.values.pop(0)}


def rank_of_best_model(folder: Path) -> dict[str, Any]:
    """Evaluate every 2 steps, with the best score at step 4, and stop at step 8."""
    metric = Scripted(0.1, 0.9, 0.2, 0.3, 0.0)
    args = arguments(
        folder,
        CASES["stage 3, bf16, SVRG"][1],
        max_steps=20,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer = trainer_of(
        args,
        eval_dataset=opt_data(7),  # an odd number on two ranks
        compute_metrics=metric,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    after = whole(trainer.deepspeed)
    predicted = trainer.predict(opt_data(7))
    trainer.save_model(str(folder / "saved"))
    return {
        "steps": trainer.state.global_step,
        "best": trainer.state.best_model_checkpoint,
        "weights": sha256(after),
        "shapes": metric.shapes,
        "predictions": predicted.predictions,
        "score": predicted.metrics["test_score"],
    }


@pytest.fixture(scope="module")
def best_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("best")
    return folder, run_ranks(2, rank_of_best_model, folder)


def loaded(folder: Path) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_early_stopping_ends_the_run_and_the_best_model_is_loaded_on_all_ranks(best_model):
    folder, ranks = best_model
    for rank in ranks:
        assert rank["steps"] == 8
        assert rank["best"] == str(folder / "checkpoint-4")
        best = loaded(folder / "checkpoint-4")
        assert rank["weights"] == sha256(dict(best.named_parameters()))


def test_save_total_limit_keeps_the_best_and_the_newest_checkpoint(best_model):
    folder, _ = best_model
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-8",
    ]


def test_metrics_and_predictions_cover_every_example_once_in_order(best_model):
    folder, ranks = best_model
    batch = default_data_collator(opt_data(7))
    with torch.no_grad():
        expected = loaded(folder / "checkpoint-4")(**batch).logits
    for rank in ranks:
        assert set(rank["shapes"]) == {((7, 8, 37), (7, 8))}
        # logits of batches of other sizes, in bf16
        torch.testing.assert_close(
            torch.from_numpy(rank["predictions"]), expected.float(), rtol=0.05, atol=0.05
        )
        assert rank["score"] == 0.0


def test_a_saved_model_is_a_folder_that_from_pretrained_reads(best_model):
    folder, ranks = best_model
    saved = loaded(folder / "saved")
    assert ranks[0]["weights"] == sha256(dict(saved.named_parameters()))
    assert next(saved.parameters()).dtype == torch.bfloat16


def rank_of_only_evaluation(folder: Path) -> tuple[float, int]:
    """Evaluate by a trainer without training data, as `--do_eval` alone does."""
    config = CASES["stage 3, bf16, SVRG"][1]
    trainer = ZOTrainer(model=tiny_opt(), args=arguments(folder, config), eval_dataset=opt_data(6))
    return trainer.evaluate()["eval_loss"], trainer.deepspeed.global_steps


def test_a_trainer_without_training_data_evaluates(tmp_path: Path):
    ((loss, steps),) = run_ranks(1, rank_of_only_evaluation, tmp_path)
    with torch.no_grad():
        expected = tiny_opt().bfloat16()(**default_data_collator(opt_data(6))).loss
    assert loss == pytest.approx(float(expected), abs=1e-2)
    assert steps == 0


# --- adapters -------------------------------------------------------------------------------------


def lora() -> peft.PeftModel:
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_opt(), config)


def rank_of_lora(folder: Path) -> dict[str, Any]:
    config = {"zero_optimization": {"stage": 3}, "zeroth_order": {"lr": 1e-2}}
    found = {}
    for name, resumed in (("run", None), ("resumed", str(folder / "checkpoint-4"))):
        args = arguments(
            folder,
            config,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="score",
        )
        metric = Scripted(0.9, 0.1)  # the best model is that of step 4
        trainer = trainer_of(args, lora(), eval_dataset=opt_data(4), compute_metrics=metric)
        if resumed is not None:
            trainer.compute_metrics = Scripted(0.1)
        trainer.train(resume_from_checkpoint=resumed)
        found[name] = trainer.deepspeed.trajectory.head
    trainer.save_model(str(folder / "saved"))
    values = {name: value.cpu() for name, value in whole(trainer.deepspeed).items()}
    return {**found, "weights": {name: v.numpy() for name, v in values.items() if "lora" in name}}


def test_an_adapter_is_trained_resumed_and_saved_as_a_folder_of_peft(tmp_path: Path):
    (found,) = run_ranks(1, rank_of_lora, tmp_path)
    assert found["run"] == found["resumed"]
    assert not list((tmp_path / "saved").glob("model*"))
    saved = safetensors.torch.load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(saved) == len(found["weights"]) == 8
    for name, value in saved.items():
        key = name.replace(".weight", ".default.weight")
        assert torch.equal(value, torch.from_numpy(found["weights"][key]))
    peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "saved")


# --- reports --------------------------------------------------------------------------------------


def rank_of_reports(folder: Path) -> list[dict[str, float]]:
    """The log history of a trainer that reports to tensorboard."""
    config = CASES["stage 3, bf16, SVRG"][1]
    args = arguments(folder, config, report_to="tensorboard", eval_strategy="steps", eval_steps=4)
    trainer = trainer_of(args, eval_dataset=opt_data(6))
    trainer.train()
    return trainer.state.log_history


@pytest.mark.slow  # the logs themselves are compared by default
def test_tensorboard_gets_every_logged_quantity_of_every_step(tmp_path: Path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = run_ranks(2, rank_of_reports, tmp_path)[0]
    (events,) = tmp_path.rglob("events.out.tfevents.*")  # rank 0 alone writes
    written = reading.EventAccumulator(str(events)).Reload()
    for key in ("loss", "learning_rate", "projected_grad", "eval_loss"):
        tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
        expected = [(row["step"], numpy.float32(row[key])) for row in history if key in row]
        assert len(expected) == (2 if key == "eval_loss" else STEPS)
        found = written.Scalars(tag)
        assert [(event.step, numpy.float32(event.value)) for event in found] == expected, key


# --- the arguments --------------------------------------------------------------------------------


def error_of(make: Callable[[], Any]) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return "nothing"


class OwnLoss(ZOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def rank_of_refusals(folder: Path) -> dict[str, str]:
    config = {"zero_optimization": {"stage": 0}, "zeroth_order": {"lr": 1e-3}}

    def args(more: dict[str, Any] | None = None, **others: Any) -> ZOTrainingArguments:
        return arguments(folder, {**config, **(more or {})}, **others)

    def trainer(kind: type = ZOTrainer, **others: Any) -> Any:
        return kind(**{"model": tiny_opt(), "args": args(), **others})

    sgd = torch.optim.SGD(tiny_opt().parameters(), lr=1.0)
    plain = transformers.TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    refused = {
        "no json": lambda: ZOTrainingArguments(output_dir=str(folder)),
        "no section": lambda: arguments(folder, {"zero_optimization": {"stage": 0}}),
        "unknown key": lambda: args({"zeroth_order": {"epss": 1.0}}),
        "stage 2": lambda: args({"zero_optimization": {"stage": 2}}),
        "clipping": lambda: args({"gradient_clipping": 1.0}),
        "batch": lambda: args({"train_batch_size": 6}),
        "lr": lambda: args(learning_rate=0.5),
        "bf16": lambda: args({"bf16": {"enabled": False}}, bf16=True, use_cpu=True),
        "fp16": lambda: args(fp16=True),
        "smoothing": lambda: args(label_smoothing_factor=0.1),
        "neftune": lambda: args(neftune_noise_alpha=5.0),
        "auto batch": lambda: args(auto_find_batch_size=True),
        "sampling": lambda: args(train_sampling_strategy="sequential"),
        "replicas": lambda: args({"zeroth_order": {"replicas": {"store": "localhost:1"}}}),
        "other arguments": lambda: trainer(args=plain),
        "optimizer": lambda: trainer(optimizers=(sgd, None)),
        "loss function": lambda: trainer(compute_loss_func=lambda *args, **kwargs: 0.0),
        "loss method": lambda: trainer(OwnLoss),
        "search": lambda: trainer().hyperparameter_search(),
        "stream": lambda: trainer(train_dataset=iter(opt_data())).train(),
    }
    return {name: error_of(make) for name, make in refused.items()}


EXPECTED = {
    "no json": ["deepspeed: missing", '"zeroth_order"'],
    "no section": ["zeroth_order: found None", "method"],
    "unknown key": ["zeroth_order.epss", "Did you mean 'eps'"],
    "stage 2": ["zero_optimization.stage: found 2"],
    "clipping": ["gradient_clipping: found 1.0", "remove it"],
    "batch": ["train_batch_size: found 6", "is 4", '"auto"'],
    "lr": ["zeroth_order.lr: found 0.001", "learning_rate is 0.5"],
    "bf16": ["bf16.enabled: found False", "bf16 is True"],
    "fp16": ["fp16: not supported", "bf16"],
    "smoothing": ["label_smoothing_factor: found 0.1"],
    "neftune": ["neftune_noise_alpha: found 5.0"],
    "auto batch": ["auto_find_batch_size: must be false"],
    "sampling": ["train_sampling_strategy: found 'sequential'", '"group_by_length"'],
    "replicas": ["zeroth_order.replicas: not supported", "zods.initialize"],
    "other arguments": ["args: found TrainingArguments", "ZOTrainingArguments"],
    "optimizer": ["optimizers: must be left out", "lr_scheduler_type"],
    "loss function": ["compute_loss_func", "wrap the model"],
    "loss method": ["compute_loss", "wrap the model"],
    "search": ["hyperparameter_search: not supported", "each trial"],
    "stream": ["training_data: found list_iterator", "map-style"],
}


def test_arguments_that_a_step_cannot_follow_are_refused_with_a_remedy(tmp_path: Path):
    (found,) = run_ranks(1, rank_of_refusals, tmp_path)
    assert set(found) == set(EXPECTED)
    for name, parts in EXPECTED.items():
        for part in parts:
            assert part in found[name], f"{name}: {found[name]}"


def rank_of_filled_values(folder: Path) -> list[dict[str, Any]]:
    auto = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        "auto",
    )
    config = {
        **auto,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "zeroth_order": {"lr": "auto"},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    found = []
    for given in (config, str(folder / "config.json"), json.dumps(config)):
        args = arguments(folder, given, learning_rate=0.5, weight_decay=0.25, seed=9)
        trainer = trainer_of(args)
        trainer.get_train_dataloader()
        engine = trainer.deepspeed
        found.append(engine.config.to_dict())
        engine.close()
    found.append({"measured": arguments(folder, config).learning_rate})
    return found


def test_the_auto_values_of_the_json_are_those_of_the_arguments(tmp_path: Path):
    """A JSON is a dict, a file or its text. max_grad_norm has its default, 1.0."""
    ((config, *others, measured),) = run_ranks(1, rank_of_filled_values, tmp_path)
    assert others == [config, config]
    assert config["train_batch_size"] == 4
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["bf16"] == {"enabled": False}
    assert config["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.5,
        "warmup_num_steps": 2,
        "total_num_steps": STEPS,
    }
    section = config["zeroth_order"]
    assert (section["lr"], section["weight_decay"], section["seed"]) == (0.5, 0.25, 9)
    assert measured == {"measured": None}, "without a learning_rate it is measured"


@pytest.mark.parametrize("name", PRIVATE)
def test_the_private_methods_that_the_mixin_relies_on_are_as_they_were_read(name: str):
    parameters = inspect.signature(getattr(transformers.Trainer, name)).parameters
    assert tuple(parameters) == PRIVATE[name], f"Trainer.{name} changed: read it again"


# --- scripts written for Trainer ------------------------------------------------------------------

OLD = "from transformers import Trainer, TrainingArguments"
NEW = "from zods.integrations.hf import ZOTrainer as Trainer, ZOTrainingArguments as TrainingArguments"


def changed_script(name: str, folder: Path) -> Path:
    """A copy of the script with another import."""
    text = (SCRIPTS / name).read_text()
    assert text.count(OLD) == 1
    (folder / name).write_text(text.replace(OLD, NEW))
    return folder / name


def script_options(folder: Path, model: Path, rows: str, **others: Any) -> list[str]:
    options = {
        "model_name_or_path": model,
        "train_file": folder / rows,
        "validation_file": folder / rows,
        "cache_dir": folder / "cache",
        "output_dir": folder / "output",
        "do_train": True,
        "do_eval": True,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "report_to": "none",
        **others,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def small_bert(folder: Path) -> Path:
    """A saved BERT without a trained head, with the quickstart's tokenizer."""
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer), intermediate_size=24, max_position_embeddings=32, **shape
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_script_like_run_glue_runs_through_the_launcher_with_one_import_changed(tmp_path: Path):
    rows = [{"sentence": row["text"], "label": row["label"]} for row in labelled_rows()]
    write_rows(tmp_path / "rows.json", rows)
    config = {"zero_optimization": {"stage": 3}, "zeroth_order": {"method": "mezo_svrg"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = script_options(
        tmp_path,
        small_bert(tmp_path / "bert"),
        "rows.json",
        deepspeed=tmp_path / "config.json",
        do_predict=True,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        eval_strategy="steps",
        eval_steps=2,
    )
    code, output = launch(changed_script("run_classification.py", tmp_path), *options)
    assert code == 0, output[-4000:]
    results = json.loads((tmp_path / "output" / "all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    assert len(results["classes"]) == 24
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "output").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    batch: dict[str, Tensor] = tokenizer(
        [row["sentence"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        classes = saved(**batch).logits.argmax(1)
    right = [row["label"] == ("code", "text")[c] for row, c in zip(rows, classes, strict=True)]
    assert results["eval_accuracy"] == pytest.approx(sum(right) / 24, abs=1 / 24)


def rank_of_script(script: Path, options: list[str]) -> None:
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


def test_a_script_like_run_clm_trains_a_language_model_with_one_import_changed(tmp_path: Path):
    (tmp_path / "rows.txt").write_text("def value(x):\n    return x + 1\n" * 40)
    config = {"zero_optimization": {"stage": 0}, "zeroth_order": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = script_options(tmp_path, MODEL, "rows.txt", deepspeed=tmp_path / "config.json")
    run_ranks(1, rank_of_script, changed_script("run_language_model.py", tmp_path), options)
    results = json.loads((tmp_path / "output" / "all_results.json").read_text())
    assert results["perplexity"] > 1
    history = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    assert history["global_step"] == 3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert saved.num_parameters() == AutoModelForCausalLM.from_pretrained(MODEL).num_parameters()
    assert AutoConfig.from_pretrained(tmp_path / "output/checkpoint-2").vocab_size == 2048
