"""Find the pretrained model of a run and its tokenizer, without loading any weights.

Callers: `zods.finetune`, `zods.cli.model_checks` and `zods.cli.load_model`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.utils.peft_utils import find_adapter_config_file

from zods.cli.options import ModelArguments
from zods.config.optional_packages import LORA, missing_package
from zods.files import check_regular
from zods.tasks import Task
from zods.training.first_order_checkpoint import flaw_of_pickle

PICKLES = ("pytorch_model*.bin", "adapter_model.bin")  # names of files of weights
SAMPLED_BYTES = 2**16  # at each end of a file of weights
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
        """Whether the model uses `token_type_ids` to distinguish segments.

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
        raise ValueError(
            f"--model {name}: there is no such folder. Give an existing folder, or a name on the "
            "hub."
        )
    with errors_in_one_line(f"--model {name}"):
        is_adapter = find_adapter_config_file(name) is not None
    if not is_adapter:
        with errors_in_one_line(f"--model {name}"):
            config = transformers.AutoConfig.from_pretrained(
                name, trust_remote_code=arguments.trust_remote_code
            )
        check_weight_files(Path(name))
        return Pretrained(name, config, None)
    if option := arguments.new_adapter:
        raise ValueError(
            f"{option}: {name} is an adapter, which is trained as it is. Leave {option} out."
        )
    if missing := missing_package(f"--model {name}, a PEFT adapter", *LORA):
        raise ValueError(missing)
    with errors_in_one_line(f"--model {name}, a PEFT adapter"):
        import peft  # an extra

        base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(
            f"--model {name}: its adapter_config.json names no base model "
            "(base_model_name_or_path)."
        )
    with errors_in_one_line(
        f"--model {name}: its adapter_config.json names the base model {base}, which cannot be read"
    ):
        config = transformers.AutoConfig.from_pretrained(
            base, trust_remote_code=arguments.trust_remote_code
        )
    check_weight_files(Path(base))
    return Pretrained(base, config, name)


def read_tokenizer(arguments: ModelArguments, pretrained: Pretrained) -> Any:
    """Read the tokenizer: --tokenizer, or the model's, or its base model's.

    Raises ValueError in one line.
    """
    name = arguments.tokenizer or arguments.model
    folder = Path(name)
    if arguments.tokenizer is None and pretrained.adapter is not None and folder.is_dir():
        name = name if any(folder.glob("tokenizer*")) else pretrained.base
    with errors_in_one_line(
        f"{'--model' if arguments.tokenizer is None else '--tokenizer'} {name}: no tokenizer can "
        "be read"
    ):
        return transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=arguments.trust_remote_code
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of how texts become tokens: 16 hexadecimal digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = tokenizer.get_vocab()
    else:
        rules = json.loads(backend.to_str())
        rules["truncation"] = rules["padding"] = None  # set by each call
    content = json.dumps([rules, tokenizer.chat_template], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def parameter_sizes(pretrained: Pretrained, task: Task, trust_remote_code: bool) -> list[int]:
    """Count the elements of each parameter of the model, without loading its weights."""
    return [
        parameter.numel()
        for parameter in _build_on_meta(pretrained, task, trust_remote_code).parameters()
    ]


def parameter_shapes(
    pretrained: Pretrained, task: Task, trust_remote_code: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters and buffers of the model for the task, by name."""
    tensors = _build_on_meta(pretrained, task, trust_remote_code).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _build_on_meta(pretrained: Pretrained, task: Task, trust_remote_code: bool) -> torch.nn.Module:
    """Build the model for the task on the meta device, without its weights."""
    config = copy.deepcopy(pretrained.config)
    for name, value in task.model_kwargs().items():
        setattr(config, name, value)
    with torch.device("meta"):
        return task.auto_class().from_config(config, trust_remote_code=trust_remote_code)


def check_weight_files(folder: Path) -> None:
    """Raise ValueError for a damaged or truncated file of weights, and for a pickle that holds more
    than data.

    The check is made before loading, when all ranks read the files. Later, only the ranks that read
    the file would raise an error.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    patterns = PICKLES if folder.is_dir() and not files else ()  # else they are not read
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        check_regular(path)
        if flaw := flaw_of_pickle(path):
            raise ValueError(
                f"{path}: {flaw}. Copy or download the file again, or give another model."
            )
    for path in files:
        check_regular(path)
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path}: damaged or truncated: {error}. Copy or download the file again."
            ) from None


def weight_files_digest(pretrained: Pretrained) -> bytes:
    """A digest of the local files of weights: their names, sizes, first and last bytes.

    Ranks compare it before they load the weights, which are compared whole later.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in (pretrained.base, pretrained.adapter):
        folder = Path(name or "")
        patterns = ("*.safetensors", *PICKLES) if name and folder.is_dir() else ()
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for start in (0, max(0, size - SAMPLED_BYTES)):
                    file.seek(start)
                    digest.update(file.read(SAMPLED_BYTES))
    return digest.digest()


def check_generation_config(folder: Path) -> None:
    """Raise ValueError, before the weights are loaded, where transformers cannot use the
    generation_config.json of a model that generates.

    transformers leaves out a file that is not JSON, and raises TypeError where it is no object.
    """
    path = folder / "generation_config.json"
    if path.exists():
        check_regular(path)
        with errors_in_one_line(f"{path}: cannot be read"), suppress(OSError):
            transformers.GenerationConfig.from_pretrained(folder)


@contextmanager
def errors_in_one_line(where: str) -> Iterator[None]:
    """Convert any error of transformers or peft inside the block to a ValueError of one line.

    where: the start of the message.
    """
    try:
        yield
    except Exception as error:  # the libraries raise many unrelated types
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{text[:600]}") from error
