"""Declared tasks: where their data come from, mistakes in them, few-shot samples, custom tasks."""

import gzip
import json
import re
from collections import Counter

import datasets
import pytest
from published_tasks import build, load, texts_of

from tests.helpers import LogTexts
from tests.published import CASES, lines, write_files
from zods.tasks import custom_task, draw_shots, load_published, task_of_module
from zods.tasks.task import check_rows

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_folder_of_the_task_and_a_compressed_file_are_found(tmp_path):
    (tmp_path / "sst2").mkdir()
    with gzip.open(tmp_path / "sst2" / "train.tsv.gz", "wt") as file:
        file.write(CASES["sst2"].files["train.tsv"])
    data, row_name = load("sst2", tmp_path)
    assert len(data) == 4
    assert row_name == f"{tmp_path}/sst2/train.tsv.gz, line"
    assert load("sst2", tmp_path, held_out=True) is None


def test_a_folder_without_the_published_file_is_an_error_that_names_it_and_its_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.tsv.*dev.tsv \(columns sentence, label\)"):
        load("sst2", tmp_path)


def test_without_hub_and_files_the_error_names_the_files_expected(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"(?s)cannot load the dataset 'nyu-mll/glue'.*--train_file.*--data_dir with the "
        r"published files of sst2: train.tsv and dev.tsv \(columns sentence, label\)",
    ):
        load("sst2", None)


def test_a_file_without_a_header_is_read_with_named_columns(tmp_path):
    (tmp_path / "own.tsv").write_text("a fine movie\t1\nso dull\t0\n")
    data, row_name = load(
        "sst2", None, file=tmp_path / "own.tsv", column_names=("sentence", "label")
    )
    task = build("sst2", data)
    right, _ = texts_of(task, task.prepare(data, row_name)[0])
    assert right == "<s>a fine movie It was great"


@pytest.mark.parametrize("name", ["sst2", "boolq"])
def test_a_missing_column_lists_those_that_exist(name, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"review": "x", "stars": 1}))
    with pytest.raises(ValueError, match=r"no columns? .*; its columns are review, stars"):
        build(name, load(name, None, file=tmp_path / "a.jsonl")[0])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([1, 2, 3, 4], [0, 1, 2, 3]), ([0, 3, 1, 2], [0, 3, 1, 2]), (["World", "Sci/Tech"], [0, 3])],
)
def test_labels_count_from_zero_or_one_or_are_texts(labels, expected, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*({"text": "x", "label": i} for i in labels)))
    data, _ = load("ag_news", None, file=tmp_path / "a.jsonl")
    assert build("ag_news", data).prepare(data)["answer"][:] == expected


def test_an_unknown_label_and_a_row_of_another_form_are_named_by_their_lines(tmp_path):
    good = {"question": "is it", "passage": "It is.", "label": True}
    wrong = [{**good, "label": None}, {**good, "question": None}]
    (tmp_path / "a.jsonl").write_text(lines(good, *wrong, good))
    data, row_name = load("boolq", None, file=tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="line 2") as caught:
        check_rows(build("boolq", data), [(data, row_name)])
    assert re.search(r"line 2(, 3)?: no label in column 'label'", str(caught.value))
    assert "line 3: no text in column" in str(caught.value)


def test_a_document_of_another_form_is_refused_with_what_is_missing(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"a.json: one JSON object, but not .*KeyError: 'data'"):
        load("squad", None, file=tmp_path / "a.json")


def test_shots_are_of_each_class_and_follow_the_seed():
    data = datasets.Dataset.from_dict(
        {"sentence": [f"t{i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    )
    task = build("sst2", data)
    drawn = [draw_shots(task, data, 5, seed) for seed in (0, 0, 1)]
    assert all(Counter(part["label"]) == {0: 5, 1: 5} for part in drawn)
    assert drawn[0]["sentence"][:] == drawn[1]["sentence"][:] != drawn[2]["sentence"][:]
    with pytest.raises(ValueError, match=r"--shots 21: .* terrible \(20\), great \(20\)"):
        draw_shots(task, data, 21, 0)


def test_label_words_and_template_replace_those_of_the_declaration(tmp_path):
    data, _ = load("sst2", write_files(tmp_path, CASES["sst2"].files))
    task = build("sst2", data, template="{sentence} So {label}", label_words=("bad", "good"))
    assert texts_of(task, task.prepare(data)[0])[0] == "<s>a fine movie So good"
    with pytest.raises(ValueError, match="gives 3 words; the task sst2 has 2 labels"):
        build("sst2", data, label_words=("a", "b", "c"))


def test_a_classification_head_reads_the_texts_and_names_the_labels(tmp_path):
    data, _ = load("rte", write_files(tmp_path, CASES["rte"].files))
    task = build("rte", data, classification_head=True)
    assert task.text_columns == ("premise", "hypothesis")
    assert task.model_kwargs()["id2label"] == {0: "entailment", 1: "not_entailment"}
    assert task.prepare(data)["answer"][:] == [0, 1]
    copa, _ = load("copa", write_files(tmp_path / "copa", CASES["copa"].files))
    with pytest.raises(ValueError, match="copa has no form for a classification head"):
        build("copa", copa, classification_head=True)


CUSTOM = {
    "template": "{body}\nMood: {label}",
    "words": ["sad", "happy"],
    "labels": ["neg", "pos"],
    "label_column": "mood",
    "train_files": ["a.jsonl"],
    "metric": "f1",
}


def test_a_custom_task_is_declared_by_the_same_keys(tmp_path):
    task = custom_task(CUSTOM, "t.yaml")
    (tmp_path / "a.jsonl").write_text(lines({"body": "x", "mood": "pos"}))
    data, _ = load_published(
        task, held_out=False, file=None, folder=tmp_path, column_names=None, max_examples=None,
        seed=0,
    )  # fmt: skip
    built = build("sst2", data, declared=task)
    assert texts_of(built, built.prepare(data)[0])[0] == "<s>x\nMood: happy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word": ["a"]}, "t.yaml: word: unknown key. Did you mean 'words'?"),
        ({"template": None}, "t.yaml: template: found None, expected a text"),
        ({"template": "{body}"}, "must have a field for the text"),
        ({"words": ["sad", False]}, "words: found .* expected a list of texts"),
        ({"labels": ["neg"]}, "labels has 1 texts, words 2: give as many"),
        ({"metric": "bleu"}, "metric: found 'bleu', allowed are accuracy, f1"),
        ({"max_new_tokens": 5}, "words and max_new_tokens exclude each other"),
        ({"options": 1}, "options: found 1, expected true or false"),
    ],
)
def test_a_wrong_key_of_a_custom_task_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        custom_task({**CUSTOM, **changes}, "t.yaml")


def test_scoring_is_refused_where_answers_are_generated(tmp_path):
    data, _ = load("gsm8k", write_files(tmp_path, CASES["gsm8k"].files))
    with pytest.raises(ValueError, match="gsm8k does not use scoring"):
        build("gsm8k", data, scoring="sum")


PYTHON = """
from zods.tasks import PublishedTask

def rows(row):
    for mood in ("sad", "happy"):
        yield {"body": row["body"] + "!", "asked": mood, "label": int(row["mood"] == mood)}

task = PublishedTask(
    name="moods", columns=("body",), template="{body} Is it {asked}? {label}", words=("No", "Yes"),
    rows=rows, train_files=("a.jsonl",),
)
"""


def test_a_python_file_declares_a_task_with_rows_made_by_the_version_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"body": "x", "mood": "sad"}))
    for mark in ("!", "?"):
        (tmp_path / "task.py").write_text(PYTHON.replace('"!"', f'"{mark}"'))
        task = task_of_module(tmp_path / "task.py")
        data, _ = load_published(
            task, held_out=False, file=None, folder=tmp_path, column_names=None, max_examples=None,
            seed=0,
        )  # fmt: skip
        built = build("sst2", data, declared=task)
        prepared = built.prepare(data)
        found = [texts_of(built, row)[0] for row in prepared]
        assert found == [f"<s>x{mark} Is it sad? Yes", f"<s>x{mark} Is it happy? No"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def rows", "def", "task.py: SyntaxError: "),
        ("import PublishedTask", "import NoTask", "task.py: ImportError: cannot import name"),
        ("task = ", "tasks = ", "task.py: `task` is NoneType, expected zods.tasks.PublishedTask"),
        ("{label}", "", "task.py: template .* must have a field for the text"),
        ("rows=rows", "metric='bleu'", "task.py: metric: found 'bleu', allowed are accuracy, f1"),
        ("rows=rows", "source_column='a'", "task.py: source_column is an option"),
    ],
)
def test_a_python_file_without_a_task_that_can_be_used_is_refused(old, new, message, tmp_path):
    (tmp_path / "task.py").write_text(PYTHON.replace(old, new))
    with pytest.raises(ValueError, match=message):
        task_of_module(tmp_path / "task.py")


def test_rows_with_an_empty_output_are_counted_and_left_out(tmp_path):
    rows = [{"instruction": f"Add {i}.", "output": text} for i, text in enumerate(["7", "", " "])]
    (tmp_path / "MathInstruct.json").write_text(json.dumps([*rows, {**rows[0], "output": None}]))
    data, row_name = load("mathinstruct", tmp_path)
    messages = LogTexts()
    assert len(build("mathinstruct", data).prepare(data, row_name)) == 1
    assert "3 of 4 examples are left out: 3 with an empty response" in " ".join(messages.texts)


def test_the_source_of_rows_that_are_made_anew_is_kept(tmp_path):
    data, _ = load("record", write_files(tmp_path, CASES["record"].files), source_column="source")
    assert data["source"][:] == ["news", "news"]
    assert "source" not in load("record", tmp_path)[0].column_names
    made, _ = load("copa", write_files(tmp_path / "c", CASES["copa"].files), source_column="answer")
    assert made["answer"][:] == [0, 1], "a column of the task itself is not replaced"


def test_answers_that_max_length_cuts_and_generated_ones_that_it_limits_are_said(tmp_path):
    data, row_name = load("gsm8k", write_files(tmp_path, CASES["gsm8k"].files))
    messages = LogTexts()
    build("gsm8k", data, max_length=32).prepare(data, row_name)
    said = " ".join(messages.texts)
    assert "generated answers have at most 16 tokens, half of max_length 32, not 256" in said
    assert "2 of 2 examples were cut to 32 tokens, 1 of them in the answer, whose end is" in said
    build("gsm8k", data, max_length=512)
    assert len(messages.texts) == 2
