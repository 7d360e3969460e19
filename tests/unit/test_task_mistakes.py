"""A wrong setting, column, row or label is an error that names it, what was found and what is allowed."""

import pytest
from tiny_tasks import CLASSES, ORDERS, REVIEWS, WORDS, make_task, make_tokenizer, reviews

from zods.tasks import build_task


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("summary", {}, "unknown task 'summary'; allowed are classification, prompted, instruction"),
        ("classification", {"template": "{text}"}, "classification does not use template .*text_pair_column"),
        ("prompted", {"text_column": "text"}, "prompted does not use text_column"),
        ("instruction", {"dataset": ORDERS, "label_words": WORDS}, "instruction does not use label_words"),
        ("instruction", {"template": "{a} {b}", "prompt_column": "a"}, "either a template"),
        ("classification", {"text_column": "body"}, "no column 'body'; its columns are text, label"),
        ("classification", {"label_column": "stars"}, "no column 'stars'; its columns are text, label"),
        ("classification", {"text_column": "label"}, "column 'label' must hold text; it holds .*int64"),
        ("classification", {"dataset": reviews(label=[0.5, 1.0])}, "'label' must hold integers, booleans or text"),
        ("classification", {"dataset": reviews(label=["x", ""])}, "row 1: column 'label' has no label"),
        ("classification", {"dataset": reviews(label=[3, 3])}, r"at least two labels; .* only \(3,\)"),
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
        ("prompted", {"label_words": ["bad"]}, r"row 1: .*label 1; the 1 labels of the training data are 0 \(bad\)"),
        ("prompted", {"label_words": ["great", "great"]}, "'great' and 'great' have the same tokens"),
        ("prompted", {"label_words": ["great", " "]}, "label word ' ' has no tokens"),
        ("prompted", {"dataset": reviews(label=["x", "y"])}, "rename integer labels"),
        ("prompted", {"max_length": 5}, "max_length 5 is too short .* they need"),
        ("instruction", {"dataset": ORDERS, "max_length": 3}, "max_length 3 is too short .* they need"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it_before_any_model_is_loaded(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **{"dataset": reviews(), **settings})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("classification", reviews(label=[1, 2]), r"row 1: .*label 2; the 2 labels .* are 0 \(0\), 1 \(1\)"),
        ("classification", reviews(text=["a", " "]), "row 1: blank text in 'text'"),
        ("classification", reviews(text=["a", None]), "row 1: column 'text' has no text"),
        ("prompted", reviews(label=[5, 0]), r"row 0: .*label 5; .* 0 \(terrible\), 1 \(great\)"),
        ("prompted", reviews(text=["", "b"]), "row 0: blank text"),
        ("prompted", reviews(label=[None, 1]), "row 0: column 'label' has the label None"),
        ("instruction", ORDERS.select([0]).map(lambda row: {"output": " "}), "row 0: blank text in 'output'"),
        ("instruction", reviews(), "no column 'instruction'"),
    ],
)
def test_a_wrong_row_in_held_out_data_is_an_error_that_names_row_and_value(name, data, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, dataset=ORDERS if name == "instruction" else reviews()).prepare(data)


def test_an_unlabelled_row_of_a_hub_dataset_is_an_error():
    data = reviews(label=[0, -1]).cast(CLASSES)
    task = build_task("classification", make_tokenizer("bert"), reviews().cast(CLASSES), max_length=8)
    with pytest.raises(ValueError, match=r"row 1: .*label -1; the 2 labels .* are 0 \(bad\), 1 \(good\)"):
        task.prepare(data)


def test_a_tokenizer_without_the_tokens_a_task_needs_is_an_error():
    tokenizer = make_tokenizer("bert")
    with pytest.raises(ValueError, match="no eos token"):
        build_task("instruction", tokenizer, ORDERS, max_length=8)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an eos token"):
        build_task("classification", tokenizer, REVIEWS, max_length=8)
