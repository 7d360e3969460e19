"""Read the DeepSpeed JSON with its section "zeroth_order".

`read_config` splits one file into DeepSpeed's part and the part of zods. It refuses a configuration
that the two cannot run together, before anything is loaded. All mistakes of a file are reported at
once. The file is read as DeepSpeed reads it (hjson: `#` and `//` comments are allowed). Callers:
the command line and `zods.training`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson
import torch

from zods.config.auto_values import resolve_batch, resolve_precision, unresolved
from zods.config.config_errors import Mistakes, collected
from zods.config.deepspeed_checks import (
    key_mistakes,
    offload_mistakes,
    refusal,
    section_mistakes,
    unsupported,
)
from zods.config.schedules import ZerothOrderOptimizer, resolve_scheduler
from zods.config.schema import (
    SVRG_ONLY,
    LossMean,
    MixtureConfig,
    ZerothOrderConfig,
    check_group_size,
    parse_section,
    read_section,
)
from zods.config.section import SECTION
from zods.config.selector_section import SelectorConfig, check_selector
from zods.files import check_regular

MOST_KEYS = 1000  # of a configuration: each unknown key is a line of the error


@dataclass(frozen=True)
class RunConfig:
    """One configuration file, split into its parts.

    deepspeed: the configuration for `deepspeed.initialize`, without "zeroth_order" and "scheduler",
    with the batch sizes resolved.
    scheduler: the section "scheduler", or None. zods builds the scheduler on its own step size.
    zeroth_order: the section "zeroth_order".
    """

    deepspeed: dict[str, Any]
    scheduler: dict[str, Any] | None
    zeroth_order: ZerothOrderConfig

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def seed(self) -> int:
        return self.zeroth_order.seed

    @property
    def selector(self) -> SelectorConfig | None:
        return self.zeroth_order.selector

    def to_dict(self) -> dict[str, Any]:
        whole = {**self.deepspeed, "scheduler": self.scheduler}
        section = self.zeroth_order.to_dict()
        if not self.zeroth_order.is_svrg:
            section = {key: value for key, value in section.items() if key not in SVRG_ONLY}
        return {**whole, SECTION: section}


# of the section "zeroth_order"
FIRST_ORDER_KEYS = (
    *("selector", "seed", "loss_mean", "hang_timeout", "load_timeout"),
    *("group_by_length", "mixture", "dataloader_num_workers"),
)


@dataclass(frozen=True)
class FirstOrderConfig:
    """The configuration of a run with DeepSpeed's own optimizer.

    deepspeed: the configuration for `deepspeed.initialize`. seed: the seed of the data order.
    The other fields are as in the section "zeroth_order".
    """

    deepspeed: dict[str, Any]
    selector: SelectorConfig | None
    seed: int
    loss_mean: LossMean = "tokens"
    hang_timeout: float = 600.0
    load_timeout: float = 3600.0
    group_by_length: bool = False
    mixture: MixtureConfig | None = None
    dataloader_num_workers: int = 0

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def scheduler(self) -> dict[str, Any] | None:
        return self.deepspeed.get("scheduler")

    @property
    def optimizer(self) -> dict[str, Any]:
        return self.deepspeed["optimizer"]

    @property
    def updates(self) -> dict[str, Any]:
        """DeepSpeed's keys beside the optimizer that change the updates: "gradient_clipping", and
        the sections of the precisions that are enabled.
        """
        sections = {
            key: self.deepspeed.get(key) or {} for key in ("fp16", "bf16", "torch_autocast")
        }
        sections["bf16"] = sections["bf16"] or self.deepspeed.get("bfloat16") or {}
        return {
            "gradient_clipping": float(self.deepspeed.get("gradient_clipping") or 0.0),
            **{key: section for key, section in sections.items() if section.get("enabled", False)},
        }

    @property
    def zeroth_order(self) -> ZerothOrderConfig:
        """A section "zeroth_order" with the keys that hold for first-order training, too.

        Its other keys have no effect. The section `optimizer` has the step size.
        """
        held = {key: getattr(self, key) for key in FIRST_ORDER_KEYS}
        return ZerothOrderConfig(method="mezo", **held)

    def to_dict(self) -> dict[str, Any]:
        section = self.zeroth_order.to_dict()
        return {**self.deepspeed, SECTION: {key: section[key] for key in FIRST_ORDER_KEYS}}


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Raise ValueError where the sections are so large that they are no configuration."""
    if sum(sizes) > MOST_KEYS:
        raise ValueError(
            f"{name}: {sum(sizes)} keys, at most {MOST_KEYS} are read, with those of all sections. "
            "Give a DeepSpeed JSON, e.g. one of ds_configs/."
        )


def load_json(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a configuration from a path or a mapping, as a plain dict.

    Raises FileNotFoundError, or ValueError where the file is not JSON or has a key twice, or where
    there are more than MOST_KEYS keys.
    """
    twice: list[str] = []
    sizes: list[int] = []

    def section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        sizes.append(len(pairs))
        twice.extend(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        return dict(pairs)

    if isinstance(source, Mapping):
        try:
            loaded = json.loads(json.dumps(source), object_pairs_hook=section)
        except RecursionError as error:
            raise ValueError(f"configuration: sections inside each other: {error}") from error
        _check_sizes("configuration", sizes)
        return loaded
    path = Path(source)
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"configuration file {path}: not found. Give a DeepSpeed JSON, e.g. one of ds_configs/."
        )

    try:
        loaded = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=section)
    # ValueError: text that is not JSON, and numbers of too many digits; OverflowError: 1e999
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"configuration file {path}: not valid JSON: {error}") from error
    _check_sizes(f"configuration file {path}", sizes)
    if twice:
        raise ValueError(
            f"configuration file {path}: {', '.join(sorted(twice))} given twice. Keep one of each."
        )
    if not isinstance(loaded, dict):
        raise ValueError(
            f"configuration file {path}: expected {{...}}, found {type(loaded).__name__}."
        )
    return loaded


def read_config(
    source: str | Path | Mapping[str, Any], world_size: int, total_steps: int | None = None
) -> RunConfig:
    """Read, check and split a configuration.

    source: path of a DeepSpeed JSON, or its content. world_size: number of ranks, for the batch
    sizes. total_steps: number of steps of the run, where it is known, for a scheduler that asks for
    it with "auto".
    Raises FileNotFoundError, or ValueError with one line per mistake: the key, what was found and
    what is allowed.
    """
    whole = load_json(source)
    found: list[str] = []
    section = None
    if SECTION in whole:
        section = read_section(whole.pop(SECTION), found)
    else:
        found.append(
            f'configuration: no section "{SECTION}". Add one, e.g. "{SECTION}": {{"method": "mezo"}}, or '
            "call deepspeed.initialize for first-order training."
        )
    if whole.get("gradient_clipping") == "auto":
        whole["gradient_clipping"] = 0.0  # there is no gradient
    found += resolve_precision(whole)
    found += unsupported(whole)
    whole.pop("optimizer", None)
    scheduler = whole.pop("scheduler", None)
    lr_is_known = section is not None and not any(
        message.startswith(f"{SECTION}.lr:") for message in found
    )
    if scheduler is not None and section is not None and lr_is_known:
        bare = ZerothOrderOptimizer([torch.nn.Parameter(torch.zeros(1))], lr=section.peak_lr)
        measured = ' ("auto", of which the schedule is a factor)' if section.lr == "auto" else ""
        scheduler, wrong = resolve_scheduler(
            scheduler, section.peak_lr, f"{SECTION}.lr{measured}", bare, total_steps
        )
        found += wrong
    _check_deepspeed(whole, world_size, found)
    _check_batch_size(whole, section, found)
    if found or section is None:
        raise Mistakes(found)
    return RunConfig(deepspeed=whole, scheduler=scheduler, zeroth_order=section)


def _check_deepspeed(whole: dict[str, Any], world_size: int, found: list[str]) -> None:
    """Resolve DeepSpeed's part in place, and append its mistakes to `found`, one for each key."""
    messages = [*key_mistakes(whole), *section_mistakes(whole), *offload_mistakes(whole)]
    with collected(messages):
        resolve_batch(whole, world_size)
    messages += unresolved(whole)
    for message in messages:
        key = message.split(": ")[0]
        if not any(other.split(": ")[0] == key for other in found):
            found.append(message)
    refused = None if found else refusal(whole)
    if refused is not None:
        found.append(refused)


def _check_batch_size(
    whole: dict[str, Any], section: ZerothOrderConfig | None, found: list[str]
) -> None:
    """Append the mistakes of the selector and of the groups of examples for this batch size, where
    all could be read.
    """
    batch = whole.get("train_batch_size")
    if section is None or type(batch) is not int:
        return
    with collected(found):
        check_group_size(section, batch)
    if section.selector is not None:
        with collected(found):
            check_selector(section.selector, f"{SECTION}.selector", batch)


def read_first_order_config(
    source: str | Path | Mapping[str, Any], world_size: int, total_steps: int | None = None
) -> FirstOrderConfig:
    """Read, check and split a configuration with a section "optimizer".

    Arguments and errors are as in `read_config`. The section "zeroth_order" may hold only the
    keys FIRST_ORDER_KEYS.
    """
    whole = load_json(source)
    found: list[str] = []
    values = whole.pop(SECTION, {})
    section = None
    if not isinstance(values, Mapping):
        found.append(f"{SECTION}: found {values!r}, expected a section {{...}}.")
    else:
        extra = sorted(set(values) - set(FIRST_ORDER_KEYS))
        found += [
            f"{SECTION}.{key}: belongs to zeroth-order steps. With an optimizer leave it out."
            for key in extra
        ]
        with collected(found):
            section = parse_section(
                {"method": "mezo", **{key: values[key] for key in values if key not in extra}}
            )
    found += resolve_precision(whole)
    optimizer = whole.get("optimizer")
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("type"), str):
        found.append(
            f'optimizer: found {optimizer!r}, expected {{"type": NAME, "params": {{...}}}}.'
        )
    params = optimizer.get("params", {}) if isinstance(optimizer, Mapping) else {}
    lr = params.get("lr") if isinstance(params, Mapping) else None
    if whole.get("scheduler") is None:
        whole.pop("scheduler", None)  # DeepSpeed refuses null
    elif isinstance(lr, (int, float)):
        bare = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        whole["scheduler"], wrong = resolve_scheduler(
            whole["scheduler"], lr, "optimizer.params.lr", bare, total_steps
        )
        found += wrong
    _check_deepspeed(whole, world_size, found)
    _check_batch_size(whole, section, found)
    if found or section is None:
        raise Mistakes(found)
    return FirstOrderConfig(whole, **{key: getattr(section, key) for key in FIRST_ORDER_KEYS})
