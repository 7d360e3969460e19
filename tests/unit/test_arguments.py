"""The command line of zods.finetune: its options, and files that hold the options of a run."""

import json
import os
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from tests.disks import within
from zods.cli.arguments import parse_arguments
from zods.cli.merged_config import merged_config
from zods.cli.option_values import NumberOrAuto, NumberOrName
from zods.cli.options import BATCH_OVERRIDES, OverrideArguments
from zods.config.deepspeed_json import read_config
from zods.config.schedules import ZerothOrderOptimizer, build_scheduler
from zods.config.schema import ZerothOrderConfig

REQUIRED = ["--model", "m", "--output_dir", "o", "--train_file", "t"]


@pytest.mark.parametrize(
    "options",
    [
        ["--deepspeed_config", "c.json"],
        ["--deepspeed", "c.json"],
        ["--deepspeed", "--deepspeed_config", "c.json"],
        ["--deepspeed_config", "c.json", "--deepspeed"],
        ["--deepspeed", "c.json", "--deepspeed_config", "c.json"],
        ["--local_rank=1", "--deepspeed", "c.json"],
        ["--local_rank", "0", "--deepspeed", "c.json"],
    ],
)
def test_the_configuration_is_given_by_the_options_of_deepspeed_scripts(options):
    assert parse_arguments([*options, *REQUIRED]).model.deepspeed_config == "c.json"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required: --deepspeed_config"),
        (["--deepspeed"], "required: --deepspeed_config"),
        (["--deepspeed", "a.json", "--deepspeed_config", "b.json"], "give one of the two"),
    ],
)
def test_a_command_without_a_configuration_or_with_two_is_refused(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([*options, *REQUIRED])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.yam"], "unrecognized arguments: run.yam"),
        (["--max_len", "5"], "unrecognized arguments: --max_len 5"),
        (["--lr", "fast"], "argument --lr: found 'fast', expected a number or auto"),
        (["--eps", "large"], "argument --eps: invalid float value: 'large'"),
        (["--lora_rank", "0"], "error: --lora_rank: found 0, must be 1 or more"),
        (["--task", "none"], "argument --task: found 'none', allowed are classification, prompted"),
        (["--task", "stt2"], "Did you mean 'sst2'?"),
        (["--mixture_weights", "a=1,a=2"], "found 'a=1,a=2', expected each source once"),
        (["--mixture_weights", "a,b"], "found 'a,b', expected each source once"),
        (["--task", "custom"], "--task custom and --task_file go together"),
        (["--task_file", "t.yaml"], "--task_file belongs to a task that brings its own data"),
        (["--data_dir", "d"], "--data_dir belongs to a task that brings its own data"),
        (["--task", "rte", "--text_column", "a"], "--text_column: --task rte names its own col"),
        (["--task", "rte", "--dataset_name", "a"], "--dataset_name: --task rte names its own data"),
        (
            ["--task", "rte", "--classification_head", "--scoring", "sum"],
            "--scoring and --classification_head exclude each other",
        ),
        (["--scoring", "best"], "argument --scoring: invalid choice: 'best'"),
        (["--shots", "0"], "--shots: found 0, must be 1 or more"),
        (["--icl", "0"], "--icl: found 0, must be 1 or more"),
        (["--max_steps", "-1"], "--max_steps: found -1, must be 0 or more"),
        (["--select", "8/4"], "argument --select: found '8/4', expected K/N"),
        (["--held_out", "few"], "argument --held_out: invalid"),
        (["--optimizer", "adamw", "--eps", "1"], "--eps belongs to zeroth-order steps"),
    ],
)
def test_a_wrong_option_is_named(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([*options, *REQUIRED, "--deepspeed_config", "c.json"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def types_of(annotation: Any) -> set[Any]:
    """The types of an annotation.

    A Literal of strings counts as str, because the section of the configuration checks the value.
    """
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return {str if get_origin(kind) is Literal else kind for kind in kinds} - {NoneType}


def test_options_have_the_types_of_the_keys_that_they_override():
    keys, options = get_type_hints(ZerothOrderConfig), get_type_hints(OverrideArguments)
    for name in options.keys() - {"direction", *BATCH_OVERRIDES}:
        given, expected = types_of(options[name]), types_of(keys[name])
        if given == {NumberOrName}:
            given = types_of(get_type_hints(NumberOrName.value.fget)["return"]) & (expected | {str})
        if given == {NumberOrAuto}:
            given = types_of(get_type_hints(NumberOrAuto)["value"])
        assert given == expected, name


def test_values_of_the_command_line_are_parsed():
    words = [
        "--select",
        "8/32",
        "--held_out",
        "5",
        "--column_names",
        "a, b",
        "--plot",
        "--deepspeed",
        "c.json",
    ]
    arguments = parse_arguments([*words, *REQUIRED])
    assert (arguments.selection.select.chosen, arguments.selection.select.candidates) == (8, 32)
    assert type(arguments.data.held_out.value) is int
    assert arguments.data.column_names == ("a", "b")
    assert (arguments.run.plot, arguments.run.save_model) == (True, False)
    evaluated = parse_arguments(
        ["--icl", "4", "--max_steps", "0", "--deepspeed", "c.json", *REQUIRED]
    )
    assert (evaluated.data.icl, evaluated.run.max_steps) == (4, 0)
    default = parse_arguments(["--deepspeed", "c.json", *REQUIRED]).data.held_out.value
    assert default == 0.1


def merged(tmp_path, section, *words):
    """The section "zeroth_order" of a run with a JSON that has this section."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"train_batch_size": 4, "zeroth_order": section}))
    return merged_config(parse_arguments(["--deepspeed", str(path), *words]))["zeroth_order"]


def test_weights_and_the_column_of_their_sources_make_a_mixture(tmp_path):
    mixture = {"source_column": "kind", "weights": {"code": 2.0, "a=b": 0.5}}
    weights = ["--mixture_weights", "code=2, a=b=0.5"]
    found = merged(tmp_path, {}, *REQUIRED, *weights, "--source_column", "kind")
    assert (found["mixture"], found.get("selector")) == (mixture, None)
    written = {"mixture": {"source_column": "kind", "weights": {"code": 1}}}
    assert merged(tmp_path, written, *REQUIRED, *weights)["mixture"] == mixture
    own = ["--model", "m", "--output_dir", "o", "--task", "mathinstruct", *weights]
    assert merged(tmp_path, {}, *own)["mixture"]["source_column"] == "source"
    with pytest.raises(ValueError, match=r"--mixture_weights: given without --source_column"):
        merged(tmp_path, {}, *REQUIRED, *weights)


@pytest.mark.parametrize(
    ("written", "words", "scheduled"),
    [
        ({}, [], True),
        ({"zeroth_order": {"lr": "auto"}}, [], True),
        ({"zeroth_order": {"lr": 1e-3}}, ["--lr", "auto"], True),
        ({}, ["--lr", "1e-3"], False),
        ({"zeroth_order": {"lr": 1e-3}}, [], False),
        ({"scheduler": None}, [], False),
        ({"zeroth_order": {"anneal": {"alpha": 2.0, "threshold": 0.1}}}, [], False),
        ({}, ["--optimizer", "adamw", "--lr", "1e-3"], False),
    ],
)
def test_a_measured_step_size_decays_where_no_schedule_is_written(
    written, words, scheduled, tmp_path
):
    path = write(tmp_path, "config.json", {"train_batch_size": 4, **written})
    config = merged_config(parse_arguments(["--deepspeed", str(path), *REQUIRED, *words]))
    if "optimizer" in config:
        assert "scheduler" not in config
        return
    read = read_config(config, 1, total_steps=10)
    assert read_config(read.to_dict(), 1).scheduler == read.scheduler, "null stays null"
    assert (read.scheduler is not None) == scheduled
    if not scheduled:
        return
    optimizer = ZerothOrderOptimizer([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(read.scheduler, optimizer)
    sizes = []
    for _ in range(10):
        sizes.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert sizes == pytest.approx([1, 1, 1, *(k / 8 for k in range(7, 0, -1))])


def test_options_of_the_loader_hold_with_an_optimizer_too(tmp_path):
    words = ["--optimizer", "adamw", "--lr", "1e-3", "--group_by_length"]
    found = merged(tmp_path, {}, *REQUIRED, *words, "--dataloader_num_workers", "2")
    assert found == {"group_by_length": True, "dataloader_num_workers": 2}


def test_a_declared_task_needs_no_data_and_selects_by_its_source(tmp_path):
    config = tmp_path / "c.json"
    config.write_text('{"train_batch_size": 4, "zeroth_order": {"lr": 1}}')
    words = ["--deepspeed", str(config), "--model", "m", "--output_dir", "o", "--select", "2/4"]
    task = parse_arguments([*words, "--task", "mathinstruct"])
    assert task.task.task.is_declared
    selector = merged_config(task)["zeroth_order"]["selector"]
    assert selector == {"candidates": 4, "source_column": "source"}
    given = parse_arguments([*words, "--task", "mathinstruct", "--source_column", "a"])
    assert merged_config(given)["zeroth_order"]["selector"]["source_column"] == "a"


# --- files ----------------------------------------------------------------------------------------

RUN = {
    "deepspeed_config": "c.json",
    "model": "m",
    "output_dir": "-o",
    "dataset_name": "d",
    "dataset_config": "2024",
    "held_out": 20,
    "task": "prompted",
    "template": "{text}\\nIs {label}",
    "label_words": ["no", "yes"],
    "select": "8/32",
    "save_model": True,
    "plot": False,
    "max_steps": None,
    "max_train_examples": 7,
    "lr": 1e-5,
    "seed": 3,
}
YAML = r"""
deepspeed_config: c.json
model: m
output_dir: -o
dataset_name: d
dataset_config: "2024"
held_out: 20
task: prompted
template: '{text}\nIs {label}'  # escapes are read as on the command line
label_words: ["no", "yes"]
select: 8/32
save_model: true
plot: false
max_steps:
max_train_examples: 7
lr: 1e-5  # YAML reads 1e-5 as a string
seed: 3
"""
COMMAND_LINE = [
    "--deepspeed_config", "c.json", "--model", "m", "--output_dir=-o",
    "--dataset_name", "d", "--dataset_config", "2024", "--held_out", "20",
    "--task", "prompted", "--template", r"{text}\nIs {label}", "--label_words", "no,yes",
    "--select", "8/32", "--save_model", "--max_train_examples", "7", "--lr", "1e-5", "--seed", "3",
]  # fmt: skip


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(list(words))
    assert caught.value.code == 2
    return capsys.readouterr().err.partition("zods.finetune: error: ")[2].rstrip("\n")


@pytest.mark.parametrize(
    ("name", "content"), [("run.yaml", YAML), ("run.yml", YAML), ("run.json", RUN)]
)
def test_a_file_gives_the_same_arguments_as_a_command_line(name, content, tmp_path):
    assert parse_arguments([write(tmp_path, name, content)]) == parse_arguments(COMMAND_LINE)


def test_the_recorded_arguments_of_a_run_can_be_given_as_a_file(tmp_path):
    arguments = parse_arguments([write(tmp_path, "run.yaml", YAML)])
    assert parse_arguments([write(tmp_path, "recorded.json", arguments.to_dict())]) == arguments


@pytest.mark.parametrize("launcher", [["--local_rank=1"], ["--local_rank", "1"]])
def test_a_file_may_follow_the_option_that_the_launcher_adds(launcher, tmp_path):
    assert parse_arguments([*launcher, write(tmp_path, "run.yaml", YAML)]) == parse_arguments(
        COMMAND_LINE
    )


def test_options_override_the_file(tmp_path):
    path = write(tmp_path, "run.yaml", YAML)
    changes = [
        "--lr",
        "0.5",
        "--save_model",
        "false",
        "--plot",
        "--label_words",
        "a,b",
        "--seed",
        "-1",
    ]
    assert parse_arguments([path, *changes]) == parse_arguments([*COMMAND_LINE, *changes])


@pytest.mark.parametrize("key", ["deepspeed", "deepspeed_config"])
@pytest.mark.parametrize("option", ["--deepspeed", "--deepspeed_config"])
def test_both_names_of_the_configuration_work_in_a_file_and_override_it(key, option, tmp_path):
    path = write(tmp_path, "run.yaml", f"{key}: a.json\nmodel: m\noutput_dir: o\ntrain_file: t\n")
    assert parse_arguments([path]).model.deepspeed_config == "a.json"
    assert parse_arguments([path, "--deepspeed"]).model.deepspeed_config == "a.json"
    assert parse_arguments([path, option, "b.json"]).model.deepspeed_config == "b.json"


def test_overrides_in_a_file_reach_the_configuration(tmp_path):
    config = {
        "train_batch_size": 4,
        "zeroth_order": {"method": "mezo_svrg", "lr": 1.0, "anchor_interval": 2},
    }
    run = {
        "model": "m",
        "output_dir": "o",
        "train_file": "t",
        "lr": 0.25,
        "method": "mezo",
        "strategy": "longest",
    }
    run |= {"deepspeed": write(tmp_path, "c.json", config), "select": "2/6"}
    assert merged_config(parse_arguments([write(tmp_path, "run.json", run)])) == {
        "train_batch_size": 2,
        "zeroth_order": {
            "lr": 0.25,
            "method": "mezo",
            "selector": {"candidates": 6, "strategy": "longest"},
        },
    }


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_all_mistakes_of_a_file_are_reported_at_once(name, tmp_path, capsys):
    wrong = {
        "max_step": 5,
        "lr": "fast",
        "eps": True,
        "max_length": 0,
        "task": "prompting",
        "select": "9/3",
        "dataset_config": 2024,
        "label_words": [False, "yes"],
        "column_names": ["a,b"],
        "template": ["{text}", "{label}"],
        "plot": "perhaps",
        "save_model": 2,
        "num_epochs": 1.5,
        "local_rank": 0,
    }
    path = write(tmp_path, name, wrong)  # JSON is valid YAML, too
    first, *lines = error_of(capsys, path, "--model", "m").split("\n  ")
    assert first == f"{path}: 14 mistakes:"
    messages = dict(line.split(": ", 1) for line in lines)
    assert messages.keys() == wrong.keys()
    assert messages["max_step"] == "unknown key. Did you mean 'max_steps'?"
    assert messages["lr"] == "found 'fast', expected a number or auto"
    assert messages["eps"] == "found True (bool), expected a number"
    assert messages["max_length"] == "found 0, must be 1 or more"
    assert messages["task"].startswith("found 'prompting', allowed are classification, ")
    assert messages["task"].endswith("Did you mean 'prompted'?")
    assert messages["select"] == "found '9/3', expected K/N with 0 < K <= N, as in 64/128"
    assert messages["dataset_config"] == "found 2024 (int), expected a text (in quotes)"
    assert messages["label_words"].startswith("found False, expected names")
    assert messages["column_names"].startswith("found 'a,b', expected names without commas")
    assert messages["template"].startswith("found ['{text}', '{label}'] (list), expected a text")
    assert messages["plot"].startswith("Truthy value expected: got perhaps")
    assert messages["save_model"] == "found 2 (int), expected true or false"
    assert messages["num_epochs"] == "invalid int value: '1.5'"


def test_one_mistake_of_a_file_is_reported_in_one_line(tmp_path, capsys):
    path = write(tmp_path, "run.yaml", "modle: m\n")
    assert error_of(capsys, path) == f"{path}: modle: unknown key. Did you mean 'model'?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.yaml", "lr: 1\nmodel: m\nlr: 2\n", "run.yaml: lr given twice"),
        ("run.json", '{"lr": 1, "model": "m", "lr": 2}', "run.json: lr given twice"),
        ("run.yaml", "lr: [1", "run.yaml: not valid YAML"),
        ("run.json", '{"lr": ', "run.json: not valid JSON"),
        ("run.yaml", "- lr", "run.yaml: expected options as keys (lr: 2e-3), found list"),
        ("run.yaml", "", "run.yaml: expected options as keys (lr: 2e-3), found NoneType"),
        ("run.json", "[1]", "run.json: expected {...}, found list"),
        ("run.yaml", "lr: 1", "the following arguments are required: --model, --output_dir"),
        ("run.yaml", "model: m\noutput_dir: o\ntrain_file: t\n", "required: --deepspeed_config"),
        ("run.yaml", YAML + "train_file: t", "give either --train_file or --dataset_name"),
        ("run.yaml", YAML + "deepspeed: b.json", "give one of the two"),
    ],
)
def test_a_file_that_does_not_describe_a_run_is_refused(name, content, message, tmp_path, capsys):
    assert message in error_of(capsys, write(tmp_path, name, content))


def test_a_missing_file_is_named(tmp_path, capsys):
    assert error_of(capsys, str(tmp_path / "run.yaml")).startswith(
        f"{tmp_path / 'run.yaml'}: not found"
    )


def aliases(depth):
    """A value of 10 ** depth parts, in a few lines of YAML."""
    lines = ["seed: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, depth):
        lines.append(f"k{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join([*lines, f"max_steps: *a{depth - 1}"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (aliases(9), "max_steps: found [[["),
        ("lr: " + "[" * 100_000, "not valid YAML: maximum recursion depth"),
        ("\n".join(f"k{i}: 1" for i in range(1001)), "1001 keys, at most 1000 are read"),
        ("seed: 1" + "0" * 5000, "not valid YAML: Exceeds the limit"),
        ("template: " + "x" * 2**20, "1048586 bytes; a file of options has at most 1048576"),
        ("seed: 0x1" + "0" * 5000, "seed: "),
    ],
    ids=["aliases", "deep", "keys", "digits", "size", "hexadecimal digits"],
)
def test_a_hostile_file_of_options_is_one_short_error(tmp_path, capsys, content, said):
    error = error_of(capsys, write(tmp_path, "run.yaml", content))
    assert said in error
    assert len(error) < 20_000


def test_a_named_pipe_in_the_place_of_a_file_of_options_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "run.yaml")
    with within(10):
        assert "run.yaml: it is a named pipe" in error_of(capsys, str(tmp_path / "run.yaml"))
