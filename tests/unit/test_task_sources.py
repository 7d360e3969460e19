"""Every format gives the same rows, and what cannot be read is an error that names the file and the line."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from zods.tasks import load_examples, split_held_out

ROWS = [{"text": 'a "quoted" word', "label": 0}, {"text": "NA", "label": 1}, {"text": "ünïcode", "label": 1}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def data_folder():
    if "ZODS_DATA" not in os.environ:
        pytest.skip("ZODS_DATA does not name the folder of the real data")
    return Path(os.environ["ZODS_DATA"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("extension", "text"),
    [
        (".jsonl", "\n".join(map(json.dumps, ROWS))),
        (".json", json.dumps(ROWS)),
        (".csv", 'text,label\n"a ""quoted"" word",0\nNA,1\nünïcode,1\n'),
        (".tsv", 'text\tlabel\na "quoted" word\t0\nNA\t1\nünïcode\t1'),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path, extension, text, suffix):
    path = write(tmp_path / f"data{extension}{suffix}", text)
    assert load_examples(file=path, seed=0).to_list() == ROWS


def test_parquet_gives_the_rows_it_was_made_of(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "data.parquet")
    assert load_examples(file=tmp_path / "data.parquet", seed=0).to_list() == ROWS


def test_column_names_make_the_first_line_of_a_headerless_file_a_row(tmp_path):
    path = write(tmp_path / "data.tsv", '"good\t1\nbad"\t0\n')
    rows = load_examples(file=path, column_names=["text", "label"], seed=0).to_list()
    assert rows == [{"text": '"good', "label": 1}, {"text": 'bad"', "label": 0}]
    with pytest.raises(ValueError, match=r"data.tsv, line 1 has 2 columns; column_names names 1: text"):
        load_examples(file=path, column_names=["text"], seed=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n{"a": 3}\n', r"a\.jsonl, line 3: malformed JSON"),
        ("a.jsonl.gz", '{"a": 1}\n{"a": \n', r"a\.jsonl\.gz, line 2: malformed JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: must be a JSON object.*list"),
        ("a.json", '[{"a": 1},\n{"a": 2]', r"a\.json, line 2: malformed JSON"),
        ("a.csv", "a,b\nx,1\ny,2,3\n", r"a\.csv.*Expected 2 fields in line 3, saw 3"),
        ("a.csv", "a,b\n", r"a\.csv holds no examples"),
        ("a.jsonl", "", r"a\.jsonl holds no examples"),
        ("a.tsv", "", r"a\.tsv holds no examples"),
        ("a.parquet", "no parquet", r"a\.parquet holds no examples that can be read as \.parquet"),
        ("a.txt", "text", r"unknown extension '\.txt'; allowed are \.json, \.jsonl, \.csv, \.tsv, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_examples(file=write(tmp_path / name, text), seed=0)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.jsonl"):
        load_examples(file=tmp_path / "gone.jsonl", seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a file or"),
        ({"file": "a.csv", "dataset_name": "glue"}, "either a file or"),
        ({"file": "a.csv", "split": "test"}, "belongs to a hub dataset"),
        ({"dataset_name": "glue", "column_names": ["a"]}, "column_names is for"),
        ({"file": "a.csv", "max_examples": 0}, "at least 1"),
    ],
)
def test_arguments_that_exclude_each_other_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_examples(**arguments, seed=0)


def test_column_names_for_a_format_that_has_its_own_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="column_names is for"):
        load_examples(file=write(tmp_path / "a.jsonl", '{"a": 1}'), column_names=["a"], seed=0)


def test_a_hub_dataset_out_of_reach_is_named_with_the_reason_and_the_remedy(monkeypatch):
    def unreachable(name, config, split):
        assert (name, config, split) == ("nyu-mll/glue", "sst2", "train")
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"'nyu-mll/glue'.*'sst2'.*no route to the hub; .*pass --train_file"):
        load_examples(dataset_name="nyu-mll/glue", dataset_config="sst2", seed=0)


def test_a_folder_of_files_loads_by_its_name_with_the_split_asked_for(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"a": 1}')
    write(folder / "test.jsonl", '{"a": 2}')
    assert load_examples(dataset_name=str(folder), seed=0)["a"][0] == 1
    assert load_examples(dataset_name=str(folder), split="test", seed=0)["a"][0] == 2
    with pytest.raises(ValueError, match="split 'dev'"):
        load_examples(dataset_name=str(folder), split="dev", seed=0)


def test_max_examples_draws_by_the_seed_and_not_the_first_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(f'{{"a": {i}}}' for i in range(100)))

    def drawn(seed, max_examples=20):
        return list(load_examples(file=path, max_examples=max_examples, seed=seed)["a"])

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 20
    assert max(drawn(1)) >= 20
    assert drawn(1, max_examples=1000) == list(range(100))


@pytest.mark.parametrize(("size", "count"), [(3, 3), (0.25, 3), (0.01, 1)])
def test_held_out_and_the_rest_share_nothing_and_lose_nothing(size, count):
    dataset = datasets.Dataset.from_dict({"a": list(range(12))})
    rest, held_out = split_held_out(dataset, size, seed=3)
    assert len(held_out) == count
    assert sorted([*rest["a"], *held_out["a"]]) == list(range(12))
    assert list(held_out["a"]) == list(split_held_out(dataset, size, seed=3)[1]["a"])
    assert list(held_out["a"]) != list(split_held_out(dataset, size, seed=4)[1]["a"])


@pytest.mark.parametrize("size", [0, 12, -1, 0.0, 1.0, 1.5])
def test_a_held_out_size_that_leaves_a_side_empty_is_an_error(size):
    with pytest.raises(ValueError, match=f"cannot hold out {size} of 12"):
        split_held_out(datasets.Dataset.from_dict({"a": list(range(12))}), size, seed=0)


def test_the_real_sst2_loses_no_line():
    dataset = load_examples(file=data_folder() / "sst2/train.tsv", column_names=["sentence", "label"], seed=0)
    assert len(dataset) == 6920
    assert set(dataset["label"]) == {0, 1}
    assert dataset[0]["sentence"].startswith("a stirring , funny")


def test_the_real_math_mix_loses_no_line():
    dataset = load_examples(file=data_folder() / "math_mix.jsonl", seed=0)
    assert len(dataset) == 4048
    assert {"instruction", "output", "source"} <= set(dataset.column_names)
