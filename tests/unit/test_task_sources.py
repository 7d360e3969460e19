"""Files and hub datasets of the tasks.

Every format gives the same rows. The error of an unreadable file names the file and the line.
"""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from zods.tasks import load_examples, split_held_out

ROWS = [
    {"text": 'a "quoted" word', "label": 0},
    {"text": "NA", "label": 1},
    {"text": "ünïcode", "label": 1},
]


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


def test_with_column_names_the_first_line_of_a_file_is_a_row(tmp_path):
    path = write(tmp_path / "data.tsv", '"good\t1\nbad"\t0\n')
    rows = load_examples(file=path, column_names=["text", "label"], seed=0).to_list()
    assert rows == [{"text": '"good', "label": 1}, {"text": 'bad"', "label": 0}]
    with pytest.raises(
        ValueError,
        match=r"data.tsv, line 1: 2 fields. Each row needs 1 fields, .* in column_names \(text\)",
    ):
        load_examples(file=path, column_names=["text"], seed=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n{"a": 3}\n', r"a\.jsonl, line 3: malformed JSON"),
        ("a.jsonl.gz", '{"a": 1}\n{"a": \n', r"a\.jsonl\.gz, line 2: malformed JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: a JSON list, not an object"),
        ("a.json", '[{"a": 1},\n{"a": 2]', r"a\.json, line 2: malformed JSON"),
        (
            "a.csv",
            "a,b\nx,1\ny,2,3\n",
            r"a\.csv, line 3: 3 fields\. Each row needs 2 fields, one for each name in the header "
            r"\(a, b\)",
        ),
        ("a.csv", "a,b\n", r"a\.csv holds no examples"),
        ("a.jsonl", "", r"a\.jsonl holds no examples"),
        ("a.tsv", "", r"a\.tsv holds no examples"),
        ("a.parquet", "no parquet", r"a\.parquet holds no examples that can be read as \.parquet"),
        (
            "a.txt",
            "text",
            r"unknown extension '\.txt'; allowed are \.json, \.jsonl, \.csv, \.tsv, \.parquet",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_examples(file=write(tmp_path / name, text), seed=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,b\n1\n2,3\n4\n5,6,7\n", r"a\.csv, line 2, 4: 1 field; .*line 5: 3 fields"),
        (
            "a.csv",
            "text,label\nfine,0,\npoor,1,\n",
            r"line 2, 3: 3 fields.*remove a comma at the end of a line",
        ),
        ("a.csv", "id,text\n1,Poor, first\n2,Good, second\n", r"line 2, 3: 3 fields"),
        (
            "a.csv",
            'a,b\n"x" y,1\nz,2\n"x" z,3\n',
            r"line 2, 4: a quoted field goes on after its closing quote",
        ),
        (
            "a.csv",
            'a,b\nx,1\n"y,2\nz,3\n',
            r"line 3: a field begins with a quote that is never closed",
        ),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv, line 1: the header names 'a' twice"),
        ("a.tsv", 'a\tb\n"x\n"y\t1\nz\n', r"line 2, 4: 1 field"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a"\n[1]\n{"a": 2}\n{"a"\n',
            r"line 2, 5: malformed JSON: .*line 3: a JSON list",
        ),
        (
            "a.json",
            '[{"a": 1},\n\n3,\n{"a": 2},\n"x"]',
            r"line 3: a JSON int, not an object; .*line 5: a JSON str",
        ),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', r"line 2: malformed JSON: Extra data after the list"),
        (
            "a.csv",
            "a\n" + "x,1\n" * 30,
            r"line 2, 3, 4, 5, 6, 7, 8, 9 and 22 more \(30 in all\): 2 fields",
        ),
    ],
)
def test_all_rows_that_cannot_be_read_are_named_by_line_at_once(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_examples(file=write(tmp_path / name, text), seed=0)


@pytest.mark.parametrize(
    ("text", "keys", "remedy"),
    [
        (
            '{"rows": [{"a": 1}, {"a": 2}], "version": 1}',
            "'rows', 'version'",
            r"Write the list under 'rows'",
        ),
        ('{\n  "a": [1, 2],\n  "b": [3, 4]\n}', "'a', 'b'", ""),
        ('{"0": {"a": 1},\n "1": {"a": 2}}', "'0', '1'", ""),
    ],
)
def test_a_json_file_that_is_one_object_is_refused_whatever_its_lines(tmp_path, text, keys, remedy):
    with pytest.raises(
        ValueError,
        match=rf"one JSON object with the keys {keys}; a list of rows is needed.*{remedy}",
    ):
        load_examples(file=write(tmp_path / "a.json", text), seed=0)


def test_one_object_in_a_line_is_a_row_of_json_lines(tmp_path):
    assert load_examples(file=write(tmp_path / "a.jsonl", '{"a": [1, 2]}\n'), seed=0).to_list() == [
        {"a": [1, 2]}
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,label\nx,1\nna\u00efve,0\n\u00fc,1\n".encode("latin1"),
            r"line 3, 4: .*0xef, in line 3.*latin1",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"b": "\u00e9"}\n'.encode("cp1252"),
            r"line 2: .*0xe9.*iconv -f latin1 -t utf-8",
        ),
        (
            "a.tsv",
            "a\tb\n1\t2\n".encode("utf-16"),
            r"the byte order mark of UTF-16.*iconv -f utf-16 -t utf-8",
        ),
        ("a.json", '[{"a": 1}]'.encode("utf-16-be"), r"line 1 has a zero byte"),
        (
            "a.csv.gz",
            gzip.compress("a,b\n\u00e9,1\n".encode("latin1"), mtime=0),
            r"zcat .*a\.csv\.gz \| iconv -f latin1",
        ),
        (
            "a.csv.gz",
            gzip.compress(b"a,b\nx,1\n", mtime=0)[:-9],
            r"a\.csv\.gz: damaged or truncated",
        ),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_file_of_another_encoding_is_named_with_line_byte_and_conversion(
    tmp_path, name, content, message, named
):
    (tmp_path / name).write_bytes(content)
    columns = ["x", "y"] if named and "json" not in name else None
    with pytest.raises(ValueError, match=rf"{name}.*{message}" if "gz" not in name else message):
        load_examples(file=tmp_path / name, column_names=columns, seed=0)


def test_quotes_of_a_tsv_are_removed_around_a_field_and_are_characters_elsewhere(tmp_path, caplog):
    lines = ['say "hi"\t0', '"all ""of"" it"\t1', '"so" he said\t0', "it's\t1", '"\t0', '""\t1']
    rows = load_examples(
        file=write(tmp_path / "a.tsv", "text\tlabel\n" + "\n".join(lines)), seed=0
    )["text"]
    assert list(rows) == ['say "hi"', 'all "of" it', '"so" he said', "it's", '"', ""]
    assert "line 4, 6: a quote that does not belong to a pair around a whole field" in caplog.text


def test_a_tsv_with_quoted_tabs_and_line_ends_is_read_back_as_csv_wrote_it(tmp_path, caplog):
    rows = [["a\tb", "0"], ["two\nlines", "1"], ['"quoted"', "0"]]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text", "label"], *rows])
    examples = load_examples(file=tmp_path / "a.tsv", seed=0, keep_rows=True)
    assert list(examples["text"]) == ["a\tb", "two\nlines", '"quoted"']
    assert list(examples["__row__"]) == [2, 3, 5]
    assert not caplog.text


def test_row_names_written_by_r_are_dropped_with_a_warning(tmp_path, caplog):
    written = '"text","label"\n"1","Poor, but short",0\n"2","Good",1\n'
    rows = load_examples(file=write(tmp_path / "a.csv", written), seed=0).to_list()
    assert rows == [{"text": "Poor, but short", "label": 0}, {"text": "Good", "label": 1}]
    assert "is a row name and is left out" in caplog.text
    # names that repeat are no row names
    with pytest.raises(ValueError, match=r"line 2, 3: 3 fields"):
        load_examples(file=write(tmp_path / "b.csv", written.replace('"2"', '"1"')), seed=0)


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize("extension", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"text": "smile \\ud83d", "label": 0}',
            r"column 'text' holds half of a character, \\ud83d",
        ),
        (
            '{"text": "a", "label": {"\\udc00": 1}}',
            r"column 'label' holds half of a character, \\udc00",
        ),
        ('{"te\\ud83dxt": "a"}', r"column 'te\\ud83dxt' holds half of a character"),
        ('{"text": ' + DEEP + "}", "inside each other, more than 100 deep"),
        (
            '{"text": ' + '{"a": ' * 400 + "1" + "}" * 401,
            "column 'text' holds JSON .* more than 100 deep",
        ),
        ('{"text": 1' + "0" * 5000 + "}", "a number of more digits than Python converts"),
        ('{"text": "a", "__row__": 4}', "column name __row__ is reserved"),
        ('{"__not_text__": "a"}', "column name __not_text__ is reserved"),
    ],
    ids=["text", "inner key", "column", "deep", "less deep", "digits", "row", "not text"],
)
def test_json_that_no_table_can_hold_is_named_with_its_line(tmp_path, extension, row, message):
    rows = ['{"text": "a", "label": 0}', row]
    text = "\n".join(rows) if extension == ".jsonl" else "[" + ",\n".join(rows) + "]"
    with pytest.raises(ValueError, match=rf"a{extension}, line 2: .*{message}"):
        load_examples(file=write(tmp_path / f"a{extension}", text), seed=0)


def test_a_pair_of_surrogates_is_one_character(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}')
    assert load_examples(file=path, seed=0)["text"][:] == ["\N{GRINNING FACE}"]


def test_reserved_column_names_are_refused_in_a_header_too(tmp_path):
    path = write(tmp_path / "a.csv", "text,__row__\na,1\n")
    with pytest.raises(ValueError, match=r"a.csv, line 1: the column name __row__ is reserved"):
        load_examples(file=path, seed=0)
    path = write(tmp_path / "b.tsv", "a\t1\n")
    with pytest.raises(ValueError, match=r"column_names: .* reserved"):
        load_examples(file=path, column_names=["text", "__not_text__"], seed=0)


@pytest.mark.parametrize(("extension", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_a_delimiter_at_the_end_of_each_row_does_not_make_its_first_field_a_row_name(
    tmp_path, extension, delimiter
):
    rows = [("text", "label"), ("Poor", "no", ""), ("Good", "yes", "")]
    text = "\n".join(delimiter.join(f'"{field}"' if field else "" for field in row) for row in rows)
    with pytest.raises(
        ValueError, match=r"line 2, 3: 3 fields\. .*remove a \w+ at the end of a line"
    ):
        load_examples(file=write(tmp_path / f"a{extension}", text), seed=0)


@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".json"])
def test_a_type_that_changes_in_the_last_row_holds_for_the_whole_column(tmp_path, extension):
    rows = [{"id": i, "share": i, "flag": True, "label": i % 2} for i in range(12000)]
    rows.append({"id": "last", "share": 0.5, "flag": "maybe", "label": None})
    if extension == ".csv":
        lines = [
            ",".join("" if value is None else str(value) for value in row.values()) for row in rows
        ]
        text = "id,share,flag,label\n" + "\n".join(lines)
    else:
        text = "\n".join(map(json.dumps, rows)) if extension == ".jsonl" else json.dumps(rows)
    examples = load_examples(file=write(tmp_path / f"a{extension}", text), seed=0)
    assert {name: feature.dtype for name, feature in examples.features.items()} == {
        "id": "string", "share": "float64", "flag": "string", "label": "int64",
    }  # fmt: skip
    assert examples[0] == {
        "id": "0",
        "share": 0.0,
        "flag": "True" if extension == ".csv" else "true",
        "label": 0,
    }
    assert examples[12000] == {"id": "last", "share": 0.5, "flag": "maybe", "label": None}


def test_nested_json_gets_one_type_over_all_rows(tmp_path):
    rows = [
        {"m": [{"role": "user"}]},
        {"m": [{"role": "tool", "calls": [1]}]},
        {"m": None},
        {"m": [{"calls": [2.5]}]},
    ]
    examples = load_examples(
        file=write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), seed=0
    )
    assert examples[1]["m"] == [{"role": "tool", "calls": [1.0]}]
    assert examples[3]["m"] == [{"role": None, "calls": [2.5]}]
    assert examples[2]["m"] is None


def test_numbers_that_would_change_when_written_back_stay_text(tmp_path):
    text = f"zip,big,word,date\n01234,{2**63},nan,2020-01-01\n99999,1,1_000,2020-01-02\n"
    examples = load_examples(file=write(tmp_path / "a.csv", text), seed=0)
    assert examples[0] == {"zip": "01234", "big": str(2**63), "word": "nan", "date": "2020-01-01"}


@pytest.mark.parametrize("name", ["a[1].csv", "a*.jsonl", "what?.tsv", "[x]*.parquet"])
def test_a_path_is_not_read_as_a_pattern(tmp_path, name):
    if name.endswith("parquet"):
        datasets.Dataset.from_list([{"a": 7}]).to_parquet(tmp_path / name)
    else:
        write(tmp_path / name, '{"a": 7}' if name.endswith("jsonl") else "a\n7\n")
    write(tmp_path / "a1.csv", "a\n8\n")
    assert load_examples(file=tmp_path / name, seed=0).to_list() == [{"a": 7}]


def test_a_changed_file_is_read_again(tmp_path):
    for value in ("1", "2"):
        assert load_examples(file=write(tmp_path / "a.csv", f"a\n{value}\n"), seed=0)["a"][
            0
        ] == int(value)


def test_a_missing_file_is_named(tmp_path):
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


def test_an_unreachable_hub_dataset_is_named_with_the_reason_and_the_remedy(monkeypatch):
    def unreachable(name, config, split):
        assert (name, config, split) == ("nyu-mll/glue", "sst2", "train")
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"'nyu-mll/glue'.*'sst2'.*no route to the hub; .*pass --train_file"
    ):
        load_examples(dataset_name="nyu-mll/glue", dataset_config="sst2", seed=0)


def test_a_folder_of_files_loads_by_its_name_with_the_requested_split(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"a": 1}')
    write(folder / "test.jsonl", '{"a": 2}')
    assert load_examples(dataset_name=str(folder), seed=0)["a"][0] == 1
    assert load_examples(dataset_name=str(folder), split="test", seed=0)["a"][0] == 2
    with pytest.raises(ValueError, match="split 'dev'"):
        load_examples(dataset_name=str(folder), split="dev", seed=0)


def test_max_examples_draws_examples_by_the_seed_and_not_the_first_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(f'{{"a": {i}}}' for i in range(100)))

    def drawn(seed, max_examples=20):
        return list(load_examples(file=path, max_examples=max_examples, seed=seed)["a"])

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 20
    assert max(drawn(1)) >= 20
    assert drawn(1, max_examples=1000) == list(range(100))


@pytest.mark.parametrize(("size", "count"), [(3, 3), (0.25, 3), (0.01, 1)])
def test_held_out_examples_and_the_rest_do_not_overlap_and_lose_no_example(size, count):
    dataset = datasets.Dataset.from_dict({"a": list(range(12))})
    rest, held_out = split_held_out(dataset, size, seed=3)
    assert len(held_out) == count
    assert sorted([*rest["a"], *held_out["a"]]) == list(range(12))
    assert list(held_out["a"]) == list(split_held_out(dataset, size, seed=3)[1]["a"])
    assert list(held_out["a"]) != list(split_held_out(dataset, size, seed=4)[1]["a"])


@pytest.mark.parametrize("size", [0, 12, -1, 0.0, 1.0, 1.5])
def test_a_held_out_size_that_leaves_one_part_empty_is_an_error(size):
    with pytest.raises(ValueError, match=f"cannot hold out {size} of 12"):
        split_held_out(datasets.Dataset.from_dict({"a": list(range(12))}), size, seed=0)


def test_the_real_sst2_loses_no_line():
    dataset = load_examples(
        file=data_folder() / "sst2/train.tsv", column_names=["sentence", "label"], seed=0
    )
    assert len(dataset) == 6920
    assert set(dataset["label"]) == {0, 1}
    assert dataset[0]["sentence"].startswith("a stirring , funny")


def test_the_real_math_mix_loses_no_line():
    dataset = load_examples(file=data_folder() / "math_mix.jsonl", seed=0)
    assert len(dataset) == 4048
    assert {"instruction", "output", "source"} <= set(dataset.column_names)


def test_a_cell_of_more_digits_than_python_converts_is_text(tmp_path):
    digits = "1" + "0" * 5000
    path = write(tmp_path / "a.csv", f"id,deep\n1,{DEEP}\n{digits},b\n")
    examples = load_examples(file=path, seed=0)
    assert examples["id"][:] == ["1", digits]
    assert examples["deep"][:] == [DEEP, "b"]
