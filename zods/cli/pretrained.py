"""The pretrained model of a run. Caller: `zods.finetune`.

The first part checks what the model's files show before anything is loaded. The second part loads
the model, with a new head or adapters where they are needed.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils.peft_utils import find_adapter_config_file

from zods.cli.options import ModelArguments
from zods.config.deepspeed_json import FirstOrderConfig, RunConfig
from zods.tasks import Task
from zods.trajectory.replay import name_in_files

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"  # peft's name for all linear modules except the output layer
# Models that use token types in attention, and have no type vocabulary in the configuration
RELATIVE_SEGMENTS = ("xlnet", "funnel")


@dataclass(frozen=True)
class Pretrained:
    """A model that is not loaded yet.

    Attributes:
        base: name or folder of the weights.
        config: the configuration of these weights, of transformers.
        adapter: folder or name of a PEFT adapter that was trained on these weights; None where
            there is none.
    """

    base: str
    config: Any
    adapter: str | None

    @property
    def num_embeddings(self) -> int | None:
        """The number of tokens that the model embeds; None where its configuration does not say."""
        return getattr(self.config.get_text_config(), "vocab_size", None)

    @property
    def has_token_types(self) -> bool:
        """Whether the model uses `token_type_ids` to tell segments apart.

        GPT-2 and other models accept them too, but embed them as words.
        """
        config = self.config.get_text_config()
        return getattr(config, "type_vocab_size", 0) > 1 or config.model_type in RELATIVE_SEGMENTS

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes of a pretrained head, in the head's order; None without a head."""
        if not self._has_head:
            return None
        return [str(self.config.id2label[i]) for i in sorted(self.config.id2label)]

    @property
    def _has_head(self) -> bool:
        return any("ForSequenceClassification" in name for name in self.config.architectures or ())

    def mismatched_head(self, task: Task, trust_remote_code: bool) -> list[str]:
        """Names of the parameters of a pretrained head that has another number of classes."""
        num_labels = task.model_kwargs().get("num_labels")
        if num_labels is None or not self._has_head or num_labels == self.config.num_labels:
            return []
        shapes = []
        for count in (self.config.num_labels, num_labels):
            config = copy.deepcopy(self.config)
            config.num_labels = count
            with torch.device("meta"):
                model = task.auto_class().from_config(config, trust_remote_code=trust_remote_code)
            shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
        return [name for name, shape in shapes[0].items() if shapes[1].get(name) != shape]


def find_model(arguments: ModelArguments) -> Pretrained:
    """Read the configuration of --model, or of the base model where --model is a PEFT adapter.

    Raises:
        ValueError: one line for any error of transformers or peft.
    """
    name = arguments.model
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"--model {name}: there is no such folder")
    with _errors_in_one_line(f"--model {name}"):
        is_adapter = find_adapter_config_file(name) is not None
    if not is_adapter:
        with _errors_in_one_line(f"--model {name}"):
            config = transformers.AutoConfig.from_pretrained(
                name, trust_remote_code=arguments.trust_remote_code
            )
        _check_files(Path(name))
        return Pretrained(name, config, None)
    if arguments.lora_rank is not None:
        raise ValueError(
            f"--lora_rank: {name} is an adapter, which is trained as it is. Leave --lora_rank out."
        )
    with _errors_in_one_line(f"--model {name}, a PEFT adapter"):
        import peft  # an extra

        base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(
            f"--model {name}: its adapter_config.json names no base model "
            "(base_model_name_or_path)."
        )
    with _errors_in_one_line(
        f"--model {name}: its adapter_config.json names the base model {base}, which cannot be read"
    ):
        config = transformers.AutoConfig.from_pretrained(
            base, trust_remote_code=arguments.trust_remote_code
        )
    _check_files(Path(base))
    return Pretrained(base, config, name)


def read_tokenizer(arguments: ModelArguments, pretrained: Pretrained) -> Any:
    """Read the tokenizer: --tokenizer, or the model's, or its base model's.

    Raises ValueError in one line.
    """
    name = arguments.tokenizer or arguments.model
    folder = Path(name)
    if arguments.tokenizer is None and pretrained.adapter is not None and folder.is_dir():
        name = name if any(folder.glob("tokenizer*")) else pretrained.base
    with _errors_in_one_line(
        f"{'--model' if arguments.tokenizer is None else '--tokenizer'} {name}: no tokenizer can "
        "be read"
    ):
        return transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=arguments.trust_remote_code
        )


def check_kind(pretrained: Pretrained, task: Task) -> None:
    """Raise ValueError where the configuration shows that the model cannot serve the task."""
    auto_class, config = task.auto_class(), pretrained.config
    own_code = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if not own_code and not {type(config), type(config.get_text_config())} & set(
        auto_class._model_mapping.keys()
    ):
        kind = "encoder-decoder " if config.is_encoder_decoder else ""
        raise ValueError(
            f"--model {pretrained.base}: a {kind}model of type {config.model_type}, for which "
            f"transformers has no {auto_class.__name__}, as --task {task.name} needs. Give another "
            "model or another --task."
        )
    masked = (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False
    )
    if task.predicts_next_token and masked and not config.is_encoder_decoder:
        raise ValueError(
            _not_causal(
                pretrained.base, f"a {config.model_type} model with is_decoder false", task.name
            )
        )


def check_adapter(pretrained: Pretrained, task: Task, trust_remote_code: bool) -> None:
    """Raise ValueError where an adapter's files show that it does not fit the task.

    The adapter was then trained for another task type, or its weights have other shapes.
    """
    if pretrained.adapter is None:
        return
    with _errors_in_one_line(f"--model {pretrained.adapter}, a PEFT adapter"):
        import peft

        kind = peft.PeftConfig.from_pretrained(pretrained.adapter).task_type
    needed = "CAUSAL_LM" if task.predicts_next_token else "SEQ_CLS"
    if kind is not None and kind != needed:
        raise ValueError(
            f"--model {pretrained.adapter}: the task_type in its adapter_config.json is "
            f"{getattr(kind, 'value', kind)}, but --task {task.name} needs an adapter of task_type "
            f"{needed}. Give another adapter or another --task."
        )
    path = Path(pretrained.adapter) / "adapter_model.safetensors"
    if not path.is_file():  # from the hub, or in another format: seen when it is loaded
        return
    _check_files(path.parent)
    expected = _shapes(pretrained, task, trust_remote_code)
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, shape in found.items():
        name = name.removeprefix("base_model.model.")
        if expected.get(name, shape) != shape:
            classes = (
                f" of {task.model_kwargs()['num_labels']} classes"
                if not task.predicts_next_token
                else ""
            )
            raise ValueError(
                f"--model {pretrained.adapter}: its {name} has the shape {shape}, but the model "
                f"for --task {task.name}{classes} has {expected[name]}. Give the base model that "
                "the adapter was trained on, and data with as many classes as it was trained for, "
                "or train new adapters with --lora_rank."
            )


def check_causal(
    evaluate: Callable[..., dict[str, float]], pretrained: Pretrained, task: Task, rows: Any
) -> None:
    """Raise ValueError, on all ranks, where later tokens change the model's earlier predictions.

    The configuration does not always show this. The check compares the predictions for two rows
    whose first halves are the same, in one forward.

    Args:
        evaluate: the engine's method `evaluate`.
        rows: prepared training data; the tokens of the two rows are taken from them.
    """
    if not task.predicts_next_token:
        return
    inputs_of = (task.collate([row])["input_ids"] for row in rows.select(range(min(8, len(rows)))))
    tokens = sorted({token for input_ids in inputs_of for token in input_ids[0].tolist()})
    if len(tokens) < 2:
        return
    first = [tokens[i % len(tokens)] for i in range(8)]
    ids = torch.tensor([first, first[:4] + [tokens[(i + 1) % len(tokens)] for i in range(4, 8)]])

    def measure(
        outputs: Any, inputs: dict[str, Tensor], targets: Tensor
    ) -> dict[str, tuple[float, float]]:
        logits = outputs["logits"]
        change = (logits[0] - logits[1]).abs().amax(-1).float()  # (8,)
        # The first halves of a causal model's rows differ by rounding, if at all.
        noise = 1e-4 if logits.dtype == torch.float32 else 1e-2
        return {"leaks": (float(change[:4].max() > noise * change[4:].max()), 1)}

    def collate(rows: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(1)

    if evaluate([0], collate, measure)["leaks"]:
        raise ValueError(
            _not_causal(pretrained.base, "its predictions depend on later tokens", task.name)
        )


def _not_causal(name: str, found: str, task: str) -> str:
    return (
        f"--model {name}: not a causal language model ({found}), so that with --task {task} it "
        f"would see the answer that "
        'it is to predict. Give a causal one (a masked one with "is_decoder": true in its '
        "config.json is), or use --task classification."
    )


def _check_files(folder: Path) -> None:
    """Raise ValueError for a damaged or truncated file of weights.

    Later, only the ranks that read the file would notice the damage.
    """
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or truncated: {error}") from None


@contextmanager
def _errors_in_one_line(where: str) -> Iterator[None]:
    """Turn any error of transformers and peft about a file into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # the libraries raise many unrelated types
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{text[:600]}") from error


# --- loading --------------------------------------------------------------------------------------


def parameter_sizes(pretrained: Pretrained, task: Task, trust_remote_code: bool) -> list[int]:
    """Count the elements of each parameter of the model, without loading its weights."""
    return [
        parameter.numel()
        for parameter in _build_on_meta(pretrained, task, trust_remote_code).parameters()
    ]


def _shapes(
    pretrained: Pretrained, task: Task, trust_remote_code: bool
) -> dict[str, tuple[int, ...]]:
    tensors = _build_on_meta(pretrained, task, trust_remote_code).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _build_on_meta(pretrained: Pretrained, task: Task, trust_remote_code: bool) -> torch.nn.Module:
    """Build the model for the task on the meta device, without its weights."""
    config = copy.deepcopy(pretrained.config)
    for name, value in task.model_kwargs().items():
        setattr(config, name, value)
    with torch.device("meta"):
        return task.auto_class().from_config(config, trust_remote_code=trust_remote_code)


def load_model(
    arguments: ModelArguments, run: RunConfig | FirstOrderConfig, task: Task, pretrained: Pretrained
) -> tuple[torch.nn.Module, list[str]]:
    """Load the pretrained model for the task. In a stage 3 run it is sharded while it is loaded.

    A new head is drawn from the seed.

    Returns the model, and the names of the parameters that are not in the base model's files: those
    of a new head and of adapters.
    """
    transformers.set_seed(run.seed)
    mismatched = pretrained.mismatched_head(task, arguments.trust_remote_code)
    options = task.model_kwargs()
    if mismatched:
        logger.warning(
            "the head of %s is for %d classes, the data have %d: a new head is drawn",
            pretrained.base, pretrained.config.num_labels, options["num_labels"],
        )  # fmt: skip
        # ignore_mismatched_sizes does not work under ZeRO-3 (transformers 5.23: only rank 0 sees
        # the sizes). Instead, the head's weights get names that the model does not have.
        options["key_mapping"] = {f"^{re.escape(name)}$": f"replaced_{name}" for name in mismatched}
    elif pretrained.class_names is not None and task.name == "classification":
        own, data = pretrained.class_names, list(options["id2label"].values())
        # transformers makes these names up where nobody named the classes.
        made_up = all(re.fullmatch(r"LABEL_\d+", name) for name in own)
        if own != data and not made_up:
            logger.warning(
                "the head's classes %s become %s, in this order", ", ".join(own), ", ".join(data)
            )
    # transformers looks for a live HfDeepSpeedConfig object while from_pretrained runs
    sharded = HfDeepSpeedConfig(run.deepspeed) if run.zero_stage == 3 else None
    model, info = task.auto_class().from_pretrained(
        pretrained.base,
        output_loading_info=True,
        dtype=torch.bfloat16
        if run.deepspeed.get("bf16", {}).get("enabled", False)
        else torch.float32,
        trust_remote_code=arguments.trust_remote_code,
        **options,
    )
    del sharded
    new = set(info["missing_keys"])
    if arguments.lora_rank is not None:
        model = _with_new_adapter(arguments, model, task, new)
    elif pretrained.adapter is not None:
        model = _with_adapter(model, pretrained.adapter, new)
    if hasattr(model, "peft_config"):
        new = {
            name
            for name, p in model.named_parameters()
            if p.requires_grad or name_in_files(name) in new
        }
    return model, [name for name, _ in model.named_parameters() if name in new]


def _with_new_adapter(arguments: ModelArguments, model: Any, task: Task, new: set[str]) -> Any:
    """Wrap the model with LoRA adapters.

    A classification head, and the modules with weights that the base model lacks (`new`), are
    trained whole and are saved with the adapter.
    """
    import peft  # an extra
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

    whole = []
    if task.name == "classification":
        base = model.base_model_prefix
        whole = [
            name
            for name, child in model.named_children()
            if name != base and any(True for _ in child.parameters())
        ]
    without_weights = {name.rpartition(".")[0] for name in new}
    whole += sorted(
        name for name in without_weights if name and name.partition(".")[0] not in whole
    )
    names = arguments.lora_target_modules
    targets: Any = None if names is None else list(names)
    if targets == [ALL_LINEAR] or (
        targets is None and model.config.model_type not in DEFAULT_TARGETS
    ):
        targets = ALL_LINEAR
    excluded = whole if targets is not None else None
    if isinstance(targets, list):
        found = [name for name, _ in model.named_modules()]
        missing = [
            target
            for target in targets
            if not any(f".{name}".endswith(f".{target}") for name in found)
        ]
        if missing:
            linear = sorted(
                {
                    n.rpartition(".")[2]
                    for n, m in model.named_modules()
                    if isinstance(m, torch.nn.Linear)
                }
            )
            raise ValueError(
                f"--lora_target_modules: the model has no module {missing[0]!r}; its linear "
                f"modules are {', '.join(linear)}"
            )
    rank = arguments.lora_rank
    assert rank is not None
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        exclude_modules=excluded or None,
        modules_to_save=whole or None,
    )
    return peft.get_peft_model(model, lora)


def _with_adapter(model: Any, adapter: str, new: set[str]) -> Any:
    """Wrap the model with an adapter that was trained before, to continue its training.

    Raises ValueError where the adapter does not fit the model, and where weights that the base
    model lacks (`new`) are not in the adapter either. Such weights would keep their random initial
    values.
    """
    import peft

    with _errors_in_one_line(f"--model {adapter}: the adapter cannot be put into its base model"):
        config = peft.PeftConfig.from_pretrained(adapter)
        config.inference_mode = False
        with _preserve_compilers():
            model = peft.get_peft_model(model, config)
        weights = peft.load_peft_weights(adapter, device="cpu")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    untrained = sorted(
        new - {name_in_files(name.replace(".modules_to_save.default.", ".")) for name in trained}
    )
    if untrained:
        raise ValueError(
            f"--model {adapter}: neither the adapter nor its base model has weights of "
            f"{', '.join(untrained)}, which would be drawn at random, stay frozen and not be "
            "exported. Give an adapter with these modules in its modules_to_save, or its base "
            "model with --lora_rank."
        )
    fits = _errors_in_one_line(
        f"--model {adapter}: the adapter's weights do not fit its base model"
    )
    with fits, deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=0):
        result: Any = peft.set_peft_model_state_dict(model, weights)
    missing = sorted(set(result.missing_keys) & set(trained))
    odd = [*result.unexpected_keys, *missing]
    if odd:
        raise ValueError(
            f"--model {adapter}: the adapter does not fit its base model in this task: {odd[0]} is "
            f"{'in the adapter only' if result.unexpected_keys else 'not in the adapter'}."
        )
    return model


@contextmanager
def _preserve_compilers() -> Iterator[None]:
    """Restore the environment variables CC and CXX after the block.

    PEFT 0.21 sets both to gcc and leaves them so where its CUDA extension for BOFT cannot be built.
    With another compiler, torch would rebuild DeepSpeed's operators, which takes minutes.
    """
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def save_configuration(model: Any, folder: Path) -> None:
    """Save the configuration of a model or adapter that the base's configuration does not describe.

    A replay needs it to write the model or adapter.
    """
    if hasattr(model, "peft_config"):
        base = type(model.get_base_model())  # peft's AutoPeftModel finds the class by this
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        model.peft_config["default"].save_pretrained(folder, auto_mapping_dict=mapping)
    elif getattr(model, "config", None) is not None:
        model.config.save_pretrained(folder)
