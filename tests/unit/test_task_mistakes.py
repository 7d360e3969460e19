"""Errors of wrong settings, columns, rows and labels: what was found, and what is allowed."""

import json
import re

import datasets
import pytest
from tiny_tasks import (
    CLASSES,
    MODEL_ARGUMENTS,
    ORDERS,
    REVIEWS,
    WORDS,
    make_task,
    make_tokenizer,
    reviews,
)

from zods.cli.data_options import DataArguments
from zods.cli.prepared_data import load_parts
from zods.tasks import build_task, check_rows, check_token_ids, load_examples, read_escapes
from zods.tasks import task as task_module


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "summary",
            {},
            "unknown task 'summary'; allowed are classification, prompted, instruction",
        ),
        (
            "classification",
            {"template": "{text}"},
            "classification does not use template .*text_pair_column",
        ),
        ("prompted", {"text_column": "text"}, "prompted does not use text_column"),
        (
            "instruction",
            {"dataset": ORDERS, "label_words": WORDS},
            "instruction does not use label_words",
        ),
        ("instruction", {"template": "{a} {b}", "prompt_column": "a"}, "either a template"),
        (
            "classification",
            {"text_column": "body"},
            "no column 'body'; its columns are text, label",
        ),
        (
            "classification",
            {"label_column": "stars"},
            "no column 'stars'; its columns are text, label",
        ),
        (
            "classification",
            {"text_column": "label"},
            "column 'label' must hold text; it holds .*int64",
        ),
        (
            "classification",
            {"dataset": reviews(label=[0.5, 1.0])},
            "'label' must hold integers, booleans or text",
        ),
        (
            "classification",
            {"dataset": reviews(label=["x", ""])},
            r"only \('x',\), and 1 rows without a label",
        ),
        (
            "classification",
            {"dataset": reviews(label=[3, 3])},
            r"at least two labels; .* only \(3,\)",
        ),
        ("classification", {"max_length": 1}, "max_length 1 is too short"),
        ("prompted", {"template": None}, "needs a template"),
        (
            "prompted",
            {"template": "{text} {label}."},
            "end with the field of the answer; .*text, label .*'{text} {label}.'",
        ),
        ("prompted", {"template": "It was {label}"}, "must have a field for the text"),
        ("prompted", {"template": "{label} {text} {label}"}, "only once, at the end"),
        ("prompted", {"template": "{label} {text}"}, "must end with {label}; it ends with {text}"),
        ("prompted", {"template": "{text!r} {label}"}, "a column's name in braces"),
        ("prompted", {"template": "{text {label}"}, "braces"),
        ("prompted", {"template": "{body} {label}"}, "no column 'body'"),
        (
            "prompted",
            {"label_words": ["bad"]},
            "label_words gives 1 word; give one for each of the labels",
        ),
        (
            "prompted",
            {"label_words": ["great", "great"]},
            "'great' and 'great' have the same tokens",
        ),
        ("prompted", {"label_words": ["great", " "]}, "label word ' ' has no tokens"),
        ("prompted", {"dataset": reviews(label=["x", "y"])}, "rename integer labels"),
        ("prompted", {"max_length": 5}, "max_length 5 is too short .* they need"),
        (
            "instruction",
            {"dataset": ORDERS, "max_length": 3},
            "max_length 3 is too short .* they need",
        ),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it_before_any_model_is_loaded(
    name, settings, message
):
    with pytest.raises(ValueError, match=message):
        make_task(name, **{"dataset": reviews(), **settings})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "classification",
            reviews(label=[1, 2]),
            r"row 1: .*label 2; the 2 labels .* are 0 \(0\), 1 \(1\)",
        ),
        ("classification", reviews(text=["a", " "]), "row 1: blank text in 'text'"),
        ("classification", reviews(text=["a", None]), "row 1: no text in column 'text'"),
        ("prompted", reviews(label=[5, 0]), r"row 0: .*label 5; .* 0 \(terrible\), 1 \(great\)"),
        ("prompted", reviews(text=["", "b"]), "row 0: blank text"),
        ("prompted", reviews(label=[None, 1]), "row 0: no label in column 'label'"),
        (
            "instruction",
            ORDERS.select([0]).map(lambda row: {"output": " "}),
            "1 of 1 examples have nothing to learn: 1 with an empty response",
        ),
        ("instruction", reviews(), "no columns 'instruction', 'output'"),
    ],
)
def test_a_wrong_row_in_held_out_data_is_an_error_that_names_row_and_value(name, data, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, dataset=ORDERS if name == "instruction" else reviews()).prepare(data)


def test_an_unlabelled_row_of_a_hub_dataset_is_an_error():
    data = reviews(label=[0, -1]).cast(CLASSES)
    task = make_task("classification", "bert", reviews().cast(CLASSES), max_length=8)
    with pytest.raises(
        ValueError, match=r"row 1: .*label -1; the 2 labels .* are 0 \(bad\), 1 \(good\)"
    ):
        task.prepare(data)


def test_a_tokenizer_without_the_tokens_a_task_needs_is_an_error():
    tokenizer = make_tokenizer("bert")
    with pytest.raises(ValueError, match="no eos token"):
        build_task("instruction", tokenizer, ORDERS, max_length=8, **MODEL_ARGUMENTS)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an eos token"):
        build_task("classification", tokenizer, REVIEWS, max_length=8, **MODEL_ARGUMENTS)


def test_mistakes_of_all_files_are_reported_at_once_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(20)]
    bad = {
        3: {"text": " "},
        7: {"text": None},
        11: {"label": ""},
        12: {"label": None},
        16: {"text": ""},
    }
    rows = [{**row, **bad.get(i, {})} for i, row in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("\n\n" + "\n".join(map(json.dumps, rows)))
    train = load_examples(file=tmp_path / "train.jsonl", seed=0, keep_rows=True).shuffle(seed=1)
    (tmp_path / "dev.csv").write_text('text,label\n"two\nlines",a\nfine,c\n,b\nfine,c\n')
    held_out = load_examples(file=tmp_path / "dev.csv", seed=0, keep_rows=True)
    task = make_task("classification", "bert", train)
    with pytest.raises(ValueError, match="blank text") as caught:
        check_rows(task, [(train, "train.jsonl, line"), (held_out, "dev.csv, line")])
    parts = set(str(caught.value).removesuffix(". Mend these rows or remove them").split("; "))
    assert "train.jsonl, line 6, 19: blank text in 'text'" in parts
    assert "train.jsonl, line 10: no text in column 'text'" in parts
    assert "train.jsonl, line 14, 15: no label in column 'label'" in parts
    assert "dev.csv, line 5: blank text in 'text'" in parts
    assert "dev.csv, line 4, 6: column 'label' has the label 'c'" in parts


def test_a_missing_column_is_reported_together_with_the_mistakes_of_other_files():
    task = make_task("classification", "bert", reviews())
    with pytest.raises(
        ValueError,
        match=r"dev.csv: the data has no columns 'text', 'label'.*; train.csv, line 1: blank text",
    ):
        check_rows(task, [(reviews(text=["a", ""]), "train.csv, line"), (ORDERS, "dev.csv, line")])


def test_mistakes_of_training_and_validation_files_are_reported_together(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,b,c\n")
    (tmp_path / "dev.json").write_text('{"rows": []}')
    files = DataArguments(
        train_file=str(tmp_path / "train.csv"), validation_file=str(tmp_path / "dev.json")
    )
    with pytest.raises(
        ValueError, match=r"train\.csv, line 2: 3 fields.*; .*dev\.json: one JSON object"
    ):
        load_parts(files, seed=0)


def test_integers_stay_labels_beside_a_label_that_is_no_integer():
    task = make_task("classification", "bert", reviews(label=[0, 1]))
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": ["0", "1", "one"]})
    with pytest.raises(ValueError, match=r"^row 2: column 'label' has the label 'one'"):
        task.prepare(data)
    assert task.prepare(data.select([1, 0]))["answer"][:] == [1, 0]


def test_a_value_that_is_no_text_is_named_in_a_column_of_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"instruction": "say one", "output": "one"}] * 4
    rows[2] = {"instruction": ["say", "two"], "output": "two"}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_examples(file=tmp_path / "a.jsonl", seed=0, keep_rows=True)
    with pytest.raises(
        ValueError,
        match=r"a, line 3: column 'instruction' holds a list, which is no text",
    ):
        make_task("instruction", dataset=data).prepare(data, "a, line")


def test_a_row_without_a_token_before_its_answer_is_named():
    data = datasets.Dataset.from_dict({"a": ["one", "say", "two"], "b": ["one", "two", "three"]})
    task = make_task("instruction", "gpt2", data, template="{a}{b}", max_length=8)
    merged = data.map(lambda row, i: {"a": "" if i == 1 else row["a"]}, with_indices=True)
    with pytest.raises(ValueError, match="row 1: blank text"):
        task.prepare(merged)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"{a}\n{b}", "{a}\n{b}"),
        (r"{a}\t{b}", "{a}\t{b}"),
        (r"\r\\n{a}", "\r\\n{a}"),
        (r"\\\n", "\\\n"),
        ("a", "a"),
    ],
)
def test_escapes_of_a_template_are_read_as_in_python(written, read):
    assert read_escapes(written, "--template") == read


@pytest.mark.parametrize(
    ("text", "found"), [(r"{a}\d{b}", r"\d"), ("{a}\\", "\\"), (r"\x41", r"\x"), (r"\\\{", r"\{")]
)
def test_an_unknown_escape_is_an_error_that_names_it(text, found):
    with pytest.raises(ValueError, match=re.escape(f"--template: found {found!r}, allowed are")):
        read_escapes(text, "--template")


@pytest.mark.parametrize("name", ["classification", "prompted", "instruction"])
def test_a_pad_token_that_the_model_does_not_embed_is_replaced_by_one_that_it_embeds(name):
    kind = "bert" if name == "classification" else "gpt2"
    task = make_task(name, kind)
    size = len(task.tokenizer)
    task.tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert task.tokenizer.pad_token_id == size
    settings = {"template": "{text} {label}"} if name == "prompted" else {}
    data = ORDERS if name == "instruction" else REVIEWS
    task = build_task(
        name,
        task.tokenizer,
        data,
        max_length=64,
        **{**MODEL_ARGUMENTS, **settings, "num_embeddings": size},
    )
    rows = list(task.prepare(data))
    batch = task.collate(rows)
    assert not batch["attention_mask"].all()
    assert batch["input_ids"].max() < size
    inputs = task.collate_eval(rows)[0]
    ids = inputs.input_ids if name == "prompted" else inputs["input_ids"]
    assert ids.max() < size


@pytest.mark.parametrize("name", ["classification", "prompted", "instruction"])
def test_a_token_of_the_data_beyond_the_embedding_is_named_with_both_sizes(name):
    data = ORDERS if name == "instruction" else REVIEWS
    task = make_task(name)
    prepared, size = task.prepare(data), len(task.tokenizer)
    check_token_ids(prepared, size, task.tokenizer)
    task.tokenizer.add_tokens(["fun", "six"])
    with pytest.raises(
        ValueError,
        match=rf"token \d+ \('(fun|six)'\), but the model embeds {size} .* has {size + 2}",
    ):
        check_token_ids(task.prepare(data), size, task.tokenizer)


def test_the_classes_found_are_logged_with_their_counts(caplog):
    with caplog.at_level("INFO"):
        make_task("classification", dataset=reviews(label=["x", "y"]))
    assert "2 classes in column 'label': x (1), y (1)" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "classification",
            {"text_column": "body"},
            "train.jsonl: the data has no columns 'body', 'label'; .* are text, n$",
        ),
        (
            "classification",
            {"text_column": "n"},
            "train.jsonl: the data has no column 'label'; .*; column 'n' must hold text",
        ),
        (
            "prompted",
            {"template": "{a} {b} {label}"},
            "train.jsonl: the data has no columns 'a', 'b', 'label'",
        ),
        (
            "instruction",
            {"data_format": "alpaca"},
            "train.jsonl: the data has no columns 'instruction', 'output'; its columns are text, "
            "n$",
        ),
    ],
)
def test_all_wrong_columns_are_reported_at_once_with_the_file_and_its_columns(
    tmp_path, monkeypatch, name, settings, message
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "n": 1}')
    data = load_examples(file=tmp_path / "train.jsonl", seed=0, keep_rows=True)
    tokenizer = make_tokenizer("llama")
    with pytest.raises(ValueError, match=message):
        build_task(
            name, tokenizer, data, max_length=8, **MODEL_ARGUMENTS, **settings, source="train.jsonl"
        )


# --- long texts -----------------------------------------------------------------------------------


def test_a_text_too_long_to_be_tokenised_is_named_with_its_line_and_the_limit():
    """A tokenizer takes 200 bytes per character, so that one line can take all memory."""
    rows = reviews(text=["a", "b" * (task_module.MOST_CHARACTERS + 1)], __row__=[4, 9])
    for name in ("classification", "prompted"):
        with pytest.raises(
            ValueError,
            match=r"a.csv, line 9: a text of 1000001 characters in column 'text', at most 1000000",
        ):
            check_rows(make_task(name), [(rows, "a.csv, line")])
    fits = reviews(text=["a", "b " * (task_module.MOST_CHARACTERS // 2)])
    check_rows(make_task("classification"), [(fits, "row")])


def test_rows_are_tokenised_in_parts_of_a_bounded_number_of_characters(monkeypatch):
    monkeypatch.setattr(task_module, "AT_ONCE", 25)
    lengths = [3, 20, 2, 1, 30, 40, 0, 25, 1]
    seen = []

    def make_rows(batch):
        seen.append([len(text) for text in batch["text"]])
        return {"size": seen[-1], "truncated": [False] * len(seen[-1])}

    rows = datasets.Dataset.from_dict({"text": ["x" * size for size in lengths]})
    prepared = task_module.map_rows(rows, make_rows, 8, "row")
    assert prepared["size"][:] == lengths
    assert seen == [[3, 20, 2], [1], [30], [40], [0, 25], [1]]


@pytest.mark.parametrize("name", ["classification", "prompted", "instruction"])
def test_the_parts_do_not_change_the_rows(monkeypatch, name):
    dataset = ORDERS if name == "instruction" else REVIEWS
    whole = make_task(name).prepare(dataset)
    monkeypatch.setattr(task_module, "AT_ONCE", 1)
    assert make_task(name).prepare(dataset).to_dict() == whole.to_dict()
