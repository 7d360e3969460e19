"""What is said of DeepSpeed's keys is true of the DeepSpeed that is installed: an update that
changes it fails here.
"""

import json

import pytest
import transformers
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.config import DeepSpeedConfig

from zods.config.auto_values import hidden_size_of, resolve_offload_buffers
from zods.config.deepspeed_checks import (
    DEEPSPEED_KEYS,
    MODELS,
    OTHER_SECTIONS,
    REMOVED_KEYS,
    refusal,
)
from zods.config.deepspeed_json import read_config, read_first_order_config
from zods.training.initialize import check_names

MINIMAL = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


class Recording(dict):
    """A dict that notes the keys it is asked for, by whatever method DeepSpeed asks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = ASKED

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self


ASKED: set[str] = set()


def test_the_keys_taken_are_those_that_the_installed_deepspeed_reads():
    ASKED.clear()
    DeepSpeedConfig(Recording(MINIMAL))
    top_level = {key for key in REMOVED_KEYS if "." not in key}
    # asked of the dict before it is copied; and by the engine
    read_elsewhere = {"sequence_parallel_size"}
    assert ASKED - top_level == DEEPSPEED_KEYS - {"amp"} - read_elsewhere


def test_the_keys_removed_are_those_that_the_installed_deepspeed_refuses():
    zero = {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | zero == REMOVED_KEYS


@pytest.mark.parametrize("key", sorted(REMOVED_KEYS))
@pytest.mark.parametrize("value", [{"enabled": False}, {}, -1, True], ids=json.dumps)
def test_a_key_that_deepspeed_removed_is_refused_in_one_line_whatever_its_value(key, value):
    section, _, inner = key.partition(".")
    config = {
        **MINIMAL,
        section: {"stage": 3, inner: value} if inner else value,
        "zeroth_order": {"method": "mezo"},
    }
    if key == "amp" and isinstance(value, dict):
        assert "amp" not in read_config(config, 1).deepspeed, "off, and so left out"
        return
    with pytest.raises(ValueError, match=rf"^{key}[:.]") as caught:
        read_config(config, 1)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "inside", "nearest"),
    [
        ("zero_optimization", {"stage3_max_live_parameter": 5}, "stage3_max_live_parameters"),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {"device": "cpu", "pin_memry": True}},
            "pin_memory",
        ),
        ("bf16", {"enabled": True, "imediate_grad_update": True}, "immediate_grad_update"),
        ("wandb", {"enabled": False, "projekt": "x"}, "project"),
        ("csv_monitor", {"job_nam": "x"}, "job_name"),
        ("comms_logger", {"enable": True}, "enabled"),
        ("aio", {"queue_dept": 8}, "queue_depth"),
        ("flops_profiler", {"profile_steps": 1}, "profile_step"),
        ("activation_checkpointing", {"cpu_checkpoint": True}, "cpu_checkpointing"),
        ("checkpoint", {"tag_validaton": "fail"}, "tag_validation"),
        ("data_types", {"grad_acum_dtype": "fp32"}, "grad_accum_dtype"),
    ],
)
@pytest.mark.parametrize("first_order", [False, True])
def test_an_unknown_key_inside_of_a_section_is_told_with_the_nearest(
    section, inside, nearest, first_order
):
    read = read_first_order_config if first_order else read_config
    kind = {"optimizer": {"type": "AdamW"}} if first_order else {"zeroth_order": {"method": "mezo"}}
    config = {**MINIMAL, section: inside, **kind}
    with pytest.raises(
        ValueError, match=rf"^{section}\.[\w.]+: unknown key.*Did you mean '{nearest}'\?$"
    ):
        read(config, 1)


@pytest.mark.parametrize("section", [*MODELS, *OTHER_SECTIONS])
def test_a_section_of_deepspeed_may_be_empty_but_no_number(section):
    config = {**MINIMAL, "zeroth_order": {"method": "mezo"}}
    if section != "bf16":  # an empty one leaves the dtype open
        read_config({**config, section: {}}, 1)
    with pytest.raises(ValueError, match=f"^{section}: found 3, expected a section"):
        read_config({**config, section: 3}, 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"communication_data_type": "int8"}, "communication_data_type"),
        ({"checkpoint": {"tag_validation": "maybe"}}, "MAYBE"),
        ({"weight_quantization": {"colour": 1}}, "colour"),
        (
            {"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
            "gradient_allreduce_op",
        ),
    ],
    ids=json.dumps,
)
def test_what_only_deepspeed_itself_knows_to_be_wrong_is_told_before_anything_is_loaded(
    wrong, said
):
    assert refusal(MINIMAL) is None
    with pytest.raises(ValueError, match=f"^configuration: DeepSpeed .* refuses it: .*{said}"):
        read_config({**MINIMAL, **wrong, "zeroth_order": {"method": "mezo"}}, 1)


# --- buffers of NVMe offload ---


def offloaded(**keys) -> dict:
    return {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "nvme", "nvme_path": "/drive", **keys},
        }
    }


@pytest.mark.parametrize(
    "keys", [{}, {"buffer_size": "auto", "buffer_count": "auto", "max_in_cpu": "auto"}]
)
def test_buffers_of_which_no_size_is_given_hold_the_largest_shard(keys):
    ds = offloaded(**keys)
    resolve_offload_buffers(ds, [10, 1001, 64], world_size=2)
    assert ds == offloaded(buffer_size=501)


def test_buffers_smaller_than_a_shard_are_refused_with_the_size_needed():
    resolve_offload_buffers(offloaded(buffer_size=501), [1001], world_size=2)
    with pytest.raises(
        ValueError, match=r"offload_param\.buffer_size: found 500, .* 501 elements on 2 ranks"
    ):
        resolve_offload_buffers(offloaded(buffer_size=500), [1001, 3], world_size=2)


def test_buffers_are_left_alone_without_nvme():
    ds = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_size": 1}}}
    resolve_offload_buffers(ds, [1001], world_size=2)
    assert ds["zero_optimization"]["offload_param"]["buffer_size"] == 1


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
def test_offloading_to_nvme_needs_a_folder_with_an_optimizer_too(key, tmp_path):
    zero = {"stage": 3, key: {"device": "nvme"}}
    source = {**MINIMAL, "optimizer": {"type": "AdamW"}, "zero_optimization": zero}
    with pytest.raises(ValueError, match=rf"^zero_optimization\.{key}\.nvme_path: missing"):
        read_first_order_config(source, 1)
    zero[key]["nvme_path"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"^zero_optimization\.{key}\.nvme_path: .*nowhere"):
        check_names(read_first_order_config(source, 1))


def test_the_hidden_size_is_that_of_the_text_part_of_a_model_of_several_parts():
    parts = transformers.LlavaConfig(text_config={"model_type": "llama", "hidden_size": 64})
    assert hidden_size_of(parts) == 64
    assert hidden_size_of(transformers.LlamaConfig(hidden_size=32)) == 32
    assert hidden_size_of(None) is None
