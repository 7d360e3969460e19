"""Checks of models and adapters, most of them before a model is loaded.

A model's configuration gives its classes, its token types, whether it is causal, and the base of
an adapter.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tiny_tasks import REVIEWS, TEXTS, make_task, make_tokenizer

from zods.cli import adapters
from zods.cli.data_options import DataArguments, TaskArguments
from zods.cli.load_model import load_model
from zods.cli.model_checks import check_adapter, check_causal, check_kind, check_shapes
from zods.cli.option_values import Names
from zods.cli.options import (
    Arguments,
    ModelArguments,
    OverrideArguments,
    RunArguments,
    SelectionArguments,
)
from zods.cli.prepared_data import prepare_data
from zods.cli.pretrained import (
    Pretrained,
    check_generation_config,
    check_weight_files,
    find_model,
)
from zods.config.schema import ZerothOrderConfig

SMALL = {
    "vocab_size": 450, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "n_embd": 16,
    "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "emb_dim": 16, "embedding_size": 16,
    "num_key_value_heads": 2, "d_kv": 8, "d_ff": 16, "num_layers": 1,
}  # fmt: skip


def small(config_class, **settings):
    """The configuration of a tiny model, with the sizes of SMALL that its type knows."""
    known = config_class().to_dict().keys() | set(config_class.attribute_map)
    return config_class(**{key: value for key, value in SMALL.items() if key in known} | settings)


def options(model, **given):
    return ModelArguments(model=str(model), output_dir="unused", **given)


class OneProcess:
    """A substitute for the engine, with the method that `check_causal` calls."""

    def __init__(self, model):
        self.model = model.eval()

    @torch.no_grad()
    def evaluate(self, dataset, collate, measure):
        inputs, targets = collate(dataset)
        return {
            name: total / n
            for name, (total, n) in measure(self.model(**inputs), inputs, targets).items()
        }


@pytest.mark.parametrize(
    ("config_class", "has_types"),
    [
        (hf.BertConfig, True),
        (hf.ElectraConfig, True),
        (hf.XLNetConfig, True),
        (hf.RobertaConfig, True),
        (hf.DebertaV2Config, False),
        (hf.DistilBertConfig, False),
        (hf.GPT2Config, False),
        (hf.LlamaConfig, False),
        (hf.CTRLConfig, False),
        (hf.XLMConfig, False),
    ],
)
def test_token_types_go_to_models_that_do_not_embed_them_as_words(config_class, has_types):
    config = small(config_class)
    assert Pretrained("x", config, None).has_token_types == (
        has_types and getattr(config, "type_vocab_size", 2) > 1
    )
    model = hf.AutoModel.from_config(config).eval()
    ids = torch.arange(5, 13)[None]
    if not Pretrained("x", config, None).has_token_types:
        return
    with torch.no_grad():  # the types are used, and not embedded as words
        zero, one = (
            model(input_ids=ids, token_type_ids=torch.full_like(ids, kind))[0] for kind in (0, 1)
        )
        plain = model(input_ids=ids)[0]
    assert torch.allclose(zero, plain, atol=1e-6)
    # XLNet compares the types of two tokens, so the same type everywhere changes nothing
    assert config_class is hf.XLNetConfig or not torch.allclose(one, zero, atol=1e-6)


def test_token_types_go_to_funnel_whose_configuration_has_no_type_vocab_size():
    assert Pretrained("x", hf.FunnelConfig(), None).has_token_types


def test_class_names_are_those_of_the_models_head_in_its_order():
    names = {0: "c", 1: "b", 2: "a"}
    head = {"architectures": ["BertForSequenceClassification"]}

    def found(**settings):
        return Pretrained("x", small(hf.BertConfig, **settings), None).class_names

    assert found(**head, id2label=names) == ["c", "b", "a"]
    assert found(**head, num_labels=12) == [f"LABEL_{i}" for i in range(12)]
    assert found(architectures=["BertForMaskedLM"], id2label=names) is None
    assert found() is None


@pytest.mark.parametrize(
    ("config_class", "head"),
    [
        (hf.LlamaConfig, {"score.weight"}),
        (hf.BertConfig, {"classifier.weight", "classifier.bias"}),
        (hf.RobertaConfig, {"classifier.out_proj.weight", "classifier.out_proj.bias"}),
        (hf.DistilBertConfig, {"classifier.weight", "classifier.bias"}),
    ],
)
def test_the_parameters_of_a_head_for_another_number_of_classes_are_found_without_loading(
    config_class, head
):
    task = make_task("classification", "bert")
    for count in (2, 5):
        config = small(config_class, num_labels=count, architectures=["XForSequenceClassification"])
        assert set(Pretrained("x", config, None).mismatched_head(task, False)) == (
            head if count == 5 else set()
        )
    config.architectures = ["XForMaskedLM"]
    assert Pretrained("x", config, None).mismatched_head(task, False) == []


@pytest.mark.parametrize(
    "config_class", [hf.BertConfig, hf.ElectraConfig, hf.XLMRobertaConfig, hf.RoFormerConfig]
)
@pytest.mark.parametrize("name", ["prompted", "instruction"])
def test_a_masked_model_is_refused_for_a_causal_task_before_it_is_loaded(config_class, name):
    with pytest.raises(
        ValueError,
        match=rf"--model m: not a causal .*{config_class.model_type}.*--task {name}.*is_decoder",
    ):
        check_kind(Pretrained("m", small(config_class), None), make_task(name))
    check_kind(Pretrained("m", small(config_class, is_decoder=True), None), make_task(name))
    check_kind(Pretrained("m", small(config_class), None), make_task("classification", "bert"))


@pytest.mark.parametrize(
    ("config_class", "settings", "causal"),
    [
        (hf.LlamaConfig, {}, True),
        (hf.GPT2Config, {}, True),
        (hf.BertConfig, {"is_decoder": True}, True),
        (hf.MambaConfig, {}, True),
        (hf.BertConfig, {}, False),
        (hf.XLNetConfig, {}, False),
        (hf.XLMConfig, {}, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_causal_where_later_tokens_do_not_change_earlier_predictions(
    config_class, settings, causal, dtype
):
    torch.manual_seed(0)
    config = small(config_class, **settings)
    config.initializer_range = config.init_std = 0.1
    task = make_task("prompted")
    engine = OneProcess(hf.AutoModelForCausalLM.from_config(config).to(dtype))
    batches = [task.collate([row]) for row in task.prepare(REVIEWS)]
    arguments = (engine.evaluate, Pretrained("m", config, None), task, batches)
    if causal:
        check_causal(*arguments)
    else:
        with pytest.raises(
            ValueError,
            match=r"--model m: not a causal language model \(its predictions depend on later",
        ):
            check_causal(*arguments)


def test_an_encoder_decoder_is_refused_with_an_error_of_one_line():
    with pytest.raises(
        ValueError, match=r"encoder-decoder model of type t5, .*no AutoModelForCausalLM"
    ) as caught:
        check_kind(Pretrained("m", small(hf.T5Config), None), make_task("instruction"))
    assert "\n" not in str(caught.value)


def test_an_adapter_names_its_base_and_cannot_get_a_new_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    small(hf.LlamaConfig).save_pretrained(tmp_path / "base")
    peft.LoraConfig(base_model_name_or_path=str(tmp_path / "base")).save_pretrained(
        tmp_path / "adapter"
    )
    found = find_model(options(tmp_path / "adapter"))
    assert (found.base, found.adapter) == (str(tmp_path / "base"), str(tmp_path / "adapter"))
    assert found.config.model_type == "llama"
    with pytest.raises(ValueError, match=r"--lora_rank: .*adapter is an adapter"):
        find_model(options(tmp_path / "adapter", lora_rank=2))


@pytest.mark.parametrize("base", ["/gone/away", None])
def test_an_adapter_whose_base_cannot_be_read_is_an_error_of_one_line_that_names_both(
    tmp_path, base
):
    peft = pytest.importorskip("peft")
    peft.LoraConfig(base_model_name_or_path=base).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: its adapter_config.json names .*{base or 'no base model'}"
    ) as caught:
        find_model(options(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["{", json.dumps({"model_type": "no such type"}), json.dumps({"hidden_size": 3})]
)
def test_a_configuration_that_cannot_be_read_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"--model {tmp_path}: ") as caught:
        find_model(options(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "is_refused"), [('["x"]', True), ('"x"', True), ("no JSON", False), ("{}", False)]
)
def test_a_generation_config_that_transformers_cannot_use_is_named(tmp_path, content, is_refused):
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    if is_refused:
        with pytest.raises(ValueError, match=f"^{path}: cannot be read: [^\\n]+$"):
            check_generation_config(tmp_path)
    else:
        check_generation_config(tmp_path)


def test_a_truncated_file_of_weights_is_named_before_the_model_is_loaded(tmp_path):
    hf.LlamaForCausalLM(small(hf.LlamaConfig)).save_pretrained(tmp_path)
    find_model(options(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or truncated"):
        find_model(options(tmp_path))


@pytest.mark.parametrize(
    "config_class", [hf.LlamaConfig, hf.Olmo2Config, hf.Phi3Config, hf.DistilBertConfig]
)
def test_adapters_are_added_to_every_type_of_model_and_the_whole_head_is_trained(config_class):
    pytest.importorskip("peft")
    task = make_task("classification", "bert")
    arguments = options("m", lora_rank=2)
    if config_class is hf.Phi3Config or config_class is hf.Olmo2Config:
        task = make_task("instruction")
    model = task.auto_class().from_config(small(config_class, pad_token_id=0))
    model = adapters.with_new_adapter(arguments, model, task, set())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert not any(
        "lora_" in name and ("classifier" in name or "score" in name) for name in trained
    )
    if task.name == "classification":
        assert any(
            ("classifier" in name or "score" in name) and "modules_to_save" in name
            for name in trained
        )


def test_adapters_are_added_to_the_named_modules_and_an_unknown_name_is_an_error():
    pytest.importorskip("peft")
    task = make_task("instruction")

    def trained(*names):
        model = task.auto_class().from_config(small(hf.LlamaConfig))
        model = adapters.with_new_adapter(
            options("m", lora_rank=2, lora_target_modules=Names(",".join(names))),
            model,
            task,
            set(),
        )
        return {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}

    assert trained("o_proj", "up_proj") == {"o_proj", "up_proj"}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert trained("all-linear") == linear
    with pytest.raises(ValueError, match=r"no module 'o_prj'; its linear modules are .*o_proj"):
        trained("up_proj", "o_prj")


def save_adapter(folder, task, *, classes=2, task_type=None, modules_to_save=None, settings=None):
    """Save a base model without a head, and an adapter on it, in `folder`.

    settings: the configuration of peft (default: LoRA on q_proj). Returns the result of
    `find_model`.
    """
    peft = pytest.importorskip("peft")
    config = small(hf.LlamaConfig, pad_token_id=0)
    hf.AutoModel.from_config(config).save_pretrained(folder / "base")
    config.num_labels = classes
    model = task.auto_class().from_config(config)
    if settings is None:
        settings = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=modules_to_save, task_type=task_type
        )
    peft.get_peft_model(model, settings).save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    described = {**json.loads(path.read_text()), "base_model_name_or_path": str(folder / "base")}
    path.write_text(json.dumps(described))
    return find_model(options(folder / "adapter"))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_an_adapter_with_a_head_for_another_number_of_classes_is_refused_before_the_model_is_loaded(
    tmp_path, task_type
):
    task = make_task("classification", "bert")
    found = save_adapter(tmp_path, task, classes=5, task_type=task_type, modules_to_save=["score"])
    with pytest.raises(
        ValueError,
        match=r"adapter: its score.weight has the shape \(5, 16\), .*2 classes has \(2, 16\)",
    ):
        check_adapter(found, task, False)
    (tmp_path / "fits").mkdir()
    check_adapter(
        save_adapter(tmp_path / "fits", task, task_type=task_type, modules_to_save=["score"]),
        task,
        False,
    )


@pytest.mark.parametrize(
    ("trained", "task_type", "wanted"),
    [("instruction", "CAUSAL_LM", "classification"), ("classification", "SEQ_CLS", "instruction")],
)
def test_an_adapter_for_another_kind_of_task_is_refused_before_the_model_is_loaded(
    tmp_path, trained, task_type, wanted
):
    tasks = {
        name: make_task(name, "bert" if name == "classification" else "llama")
        for name in (trained, wanted)
    }
    found = save_adapter(tmp_path, tasks[trained], task_type=task_type)
    with pytest.raises(ValueError, match=rf"is {task_type}, but --task {wanted} needs") as caught:
        check_adapter(found, tasks[wanted], False)
    assert "\n" not in str(caught.value)
    check_adapter(found, tasks[trained], False)


def test_an_adapter_without_the_head_that_its_base_lacks_is_refused(tmp_path):
    task = make_task("classification", "bert")
    for modules_to_save in (None, ["score"]):
        folder = tmp_path / str(modules_to_save)
        folder.mkdir()
        found = save_adapter(folder, task, modules_to_save=modules_to_save)
        check_adapter(found, task, False)
        model, info = task.auto_class().from_pretrained(
            found.base, output_loading_info=True, **task.model_kwargs()
        )
        if modules_to_save is not None:
            adapters.with_trained_adapter(model, found.adapter, set(info["missing_keys"]))
            continue
        with pytest.raises(
            ValueError, match=r"neither the adapter nor its base .* score.weight.*--lora_rank"
        ):
            adapters.with_trained_adapter(model, found.adapter, set(info["missing_keys"]))


def test_an_adapter_for_a_base_of_another_width_is_refused_with_an_error_of_one_line(tmp_path):
    task = make_task("classification", "bert")
    found = save_adapter(tmp_path, task)
    wider = task.auto_class().from_config(small(hf.LlamaConfig, hidden_size=32, pad_token_id=0))
    with pytest.raises(
        ValueError, match=r"adapter's weights do not fit its base model: RuntimeError"
    ) as caught:
        adapters.with_trained_adapter(wider, found.adapter, set())
    assert "\n" not in str(caught.value)


def prepared_for(config, tokenizer, folder):
    """(task, training rows) that the command line prepares for a model of this configuration."""
    labels = ["dull", "fine"]
    rows = [{"text": text, "label": labels[i % 2]} for i, text in enumerate(TEXTS)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = str(folder / "data.jsonl")
    data = DataArguments(train_file=file, validation_file=file)
    task = TaskArguments(max_length=32)
    groups = (SelectionArguments(), data, task, RunArguments(), OverrideArguments())
    arguments = Arguments(options("m"), *groups)
    run = SimpleNamespace(seed=0, selector=None, zeroth_order=ZerothOrderConfig())
    data = prepare_data(arguments, tokenizer, run, Pretrained("m", config, None))
    return data.task, list(data.train)


def test_data_prepared_for_a_pretrained_head_have_label_ids_in_its_order(tmp_path):
    names = {0: "fine", 1: "dull"}
    config = small(hf.BertConfig, id2label=names, architectures=["BertForSequenceClassification"])
    task, rows = prepared_for(config, make_tokenizer("bert"), tmp_path)
    assert task.model_kwargs()["id2label"] == names
    assert [row["answer"] for row in rows] == [1, 0, 1, 0]


def test_data_prepared_for_a_model_have_token_types_only_where_it_embeds_them(tmp_path):
    tokenizer = make_tokenizer("bert")  # this tokenizer gives token types
    assert "token_type_ids" in prepared_for(small(hf.BertConfig), tokenizer, tmp_path)[1][0]
    assert "token_type_ids" not in prepared_for(small(hf.GPT2Config), tokenizer, tmp_path)[1][0]


def test_data_prepared_for_a_model_are_padded_with_a_token_that_it_embeds(tmp_path):
    tokenizer = make_tokenizer("llama")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    task, rows = prepared_for(small(hf.LlamaConfig, vocab_size=size), tokenizer, tmp_path)
    batch = task.collate(rows)
    assert not batch["attention_mask"].all()
    assert batch["input_ids"].max() < size


@pytest.mark.parametrize("name", ["classification", "prompted"])
def test_weights_of_another_size_than_the_configuration_says_are_named_before_loading(
    tmp_path, name
):
    hf.LlamaForCausalLM(small(hf.LlamaConfig)).save_pretrained(tmp_path)
    task = make_task(name)
    found = find_model(options(tmp_path))
    check_shapes(found, task, False)
    found.config.intermediate_size *= 2
    odd = r"mlp\.\w+\.weight has the shape \(\d+, \d+\), but \(\d+, \d+\) by the config\.json"
    with pytest.raises(ValueError, match=odd):
        check_shapes(found, task, False)
    found.config.quantization_config = {"quant_method": "fp8"}
    check_shapes(found, task, False)


def test_a_new_head_follows_from_the_seed_also_where_the_seed_has_more_than_32_bits(tmp_path):
    hf.LlamaModel(small(hf.LlamaConfig)).save_pretrained(tmp_path)
    task = make_task("classification")
    arguments = ModelArguments(model=str(tmp_path), output_dir="")

    def head(seed: int) -> torch.Tensor:
        run: Any = SimpleNamespace(seed=seed, zero_stage=0, deepspeed={})
        return load_model(arguments, run, task, find_model(arguments))[0].score.weight

    assert torch.equal(head(2**40), head(2**40))
    assert not torch.equal(head(2**40), head(1))


def test_loading_an_adapter_leaves_the_compiler_variables_as_they_are(tmp_path, monkeypatch):
    """peft sets CC and CXX to gcc when it builds the extension of BOFT.

    With them, DeepSpeed would build its operators again.
    """
    peft = pytest.importorskip("peft")
    task = make_task("classification", "bert")
    settings = peft.BOFTConfig(
        boft_block_size=4, target_modules=["q_proj"], modules_to_save=["score"]
    )
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("CXX", "c++")
    found = save_adapter(tmp_path, task, settings=settings)
    monkeypatch.setenv("CC", "cc")  # saving the adapter has changed them
    monkeypatch.delenv("CXX")
    model, info = task.auto_class().from_pretrained(
        found.base, output_loading_info=True, **task.model_kwargs()
    )
    adapters.with_trained_adapter(model, found.adapter, set(info["missing_keys"]))
    assert (os.environ.get("CC"), os.environ.get("CXX")) == ("cc", None)


def test_an_adapter_without_peft_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"a PEFT adapter: needs the package peft.*zods\[lora\]"):
        find_model(options(tmp_path))


class Harmful:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("none", None),
        ("code", r"it names the code \S+, which no tensor needs; it was not run"),
        ("cut", "damaged or truncated"),
        ("text", "damaged or truncated"),
        ("empty", "damaged or truncated"),
        ("pipe", "it is a named pipe"),
        ("unused", None),
    ],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_weights_in_a_pickle_are_data_or_an_error_of_one_line_and_no_code_runs(
    tmp_path, name, damage, said
):
    path, mark = tmp_path / name, tmp_path / "mark"
    content = {"weight": torch.ones(1000), **({"x": Harmful(mark)} if damage == "code" else {})}
    torch.save(content, path)
    if damage == "cut":
        os.truncate(path, 1000)
    elif damage in ("text", "unused"):
        path.write_text("version https://git-lfs.github.com/spec/v1")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    if damage == "unused":  # transformers and peft prefer safetensors
        save_file({"weight": torch.ones(3)}, path.with_suffix(".safetensors"))
    if said is None:
        check_weight_files(tmp_path)
    else:
        with pytest.raises((ValueError, OSError), match=rf"{name}: {said}") as told:
            check_weight_files(tmp_path)
        assert "\n" not in str(told.value)
    assert not mark.exists()
