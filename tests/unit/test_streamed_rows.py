"""Rows of files that are streamed: as those of files that are read whole, and named where wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_tasks import make_task

from zods.cli.arguments import parse_arguments
from zods.data.stream import BadRow
from zods.tasks import RowStream, StreamedTask, check_streamable, load_examples, name_of_rows
from zods.tasks.streams import HEAD

SAY = [f"say {word}" for word in ("one", "two and then three", "four", "five", "six")]
# rows of each format; the third one has nothing to learn, and is kept without a label
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": say, "input": "fun" * (i % 2), "output": "" if i == 2 else f"{i}", "id": i}
        for i, say in enumerate(SAY)
    ],
    "prompt_completion": [
        {"prompt": say, "completion": "  " if i == 2 else 42 + i / 2} for i, say in enumerate(SAY)
    ],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": say if i % 2 else [{"type": "text", "text": say}]},
                {"role": "assistant", "content": "" if i == 2 else "great fun"},
            ],
            "note": None if i else "only here",
        }
        for i, say in enumerate(SAY)
    ],
    "text": [{"text": " " if i == 2 else say} for i, say in enumerate(SAY)],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a file of this extension, with a blank line after the first row where it may."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        first, *others = (json.dumps(row) + "\n" for row in rows)
        path.write_text(f"{first}\n{''.join(others)}")
    return path


def streamed(path: Path, **settings: Any) -> tuple[StreamedTask, list[Any]]:
    stream = RowStream.open(file=str(path))
    task: Any = make_task("instruction", "gpt2", stream.head, **settings)
    name = name_of_rows(file=path)
    return StreamedTask(task, stream, name, None), list(stream.rows)


CASES = [
    *((kind, ".jsonl") for kind in ROWS),
    ("alpaca", ".csv"),
    ("text", ".csv"),
    ("text", ".parquet"),
    ("alpaca", ".parquet"),
]


@pytest.mark.parametrize(("kind", "extension"), CASES)
def test_streamed_rows_are_those_of_the_whole_file_and_rows_without_a_label_keep_their_place(
    tmp_path, kind, extension
):
    path = write(tmp_path / f"data{extension}", ROWS[kind])
    of_stream, raw = streamed(path)
    collated = [
        of_stream.collated_by(of_stream.task.collate)(raw[start : start + 3]) for start in (0, 3)
    ]
    whole = load_examples(file=path, seed=0, keep_rows=True)
    expected = list(of_stream.task.prepare(whole, "row"))
    assert len(raw) == 5
    assert len(expected) == 4
    parts = (expected[:2], expected[2:])
    for batch, kept, rows in zip(collated, ([0, 1], [0, 1]), parts, strict=True):
        found = {name: values[kept] for name, values in batch.items()}
        wanted = of_stream.task.collate(rows)
        width = wanted["input_ids"].shape[1]
        assert all(found[name][:, :width].tolist() == wanted[name].tolist() for name in wanted)
    assert (collated[0]["labels"][2] == -100).all()


WRONG = {
    "malformed": ('{"text": "a"', r"line 9: malformed JSON"),
    "list": ('{"text": ["a"]}', r"line 9: column 'text' holds a list, which is no text"),
    "no object": ("[1]", r"line 9: a JSON list, not an object"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_row_is_named_with_its_line_when_it_is_met(tmp_path, kind):
    line, message = WRONG[kind]
    path = write(tmp_path / "data.jsonl", [{"text": "a"}] * 6)
    of_stream, _ = streamed(path)
    path.write_text(path.read_text() + f'{{"text": "b"}}\n{line}\n')
    raw = list(of_stream.stream.rows)
    assert len(of_stream.prepare(raw[:7])) == 7
    with pytest.raises(BadRow, match=rf"^--streaming: {path}, {message}"):
        of_stream.prepare(raw[6:])


def test_a_wrong_turn_and_a_token_without_a_vector_are_named_with_their_line(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS["messages"])
    of_stream, raw = streamed(path)
    odd = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}
    raw.append({**raw[0], "__row__": 77, "__line__": json.dumps(odd)})
    with pytest.raises(BadRow, match=r"data\.jsonl, line 77: turn 1 of the user has no text"):
        of_stream.prepare(raw[-2:])
    small = StreamedTask(of_stream.task, of_stream.stream, of_stream.row_name, 5)
    with pytest.raises(BadRow, match=r"data\.jsonl, line 3: a token of which the model, with 5"):
        small.prepare(raw[1:2])


def test_a_record_of_csv_with_other_fields_than_the_header_is_named_with_its_line(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('text,id\n"a\nb",1\n' + "c,2\n" * 1500 + "d\n")
    stream = RowStream.open(file=str(path))
    with pytest.raises(ValueError, match=r"data\.csv, line 1504: 1 fields, but 2 columns \(text"):
        list(stream.rows)


def test_the_tokens_of_a_row_do_not_depend_on_the_other_rows_of_its_micro_batch(tmp_path):
    rows = [{"prompt": "say", "completion": 42.0} for _ in range(HEAD)]
    text = {"prompt": "say", "completion": "n/a"}  # beyond the rows whose types are known
    task, raw = streamed(write(tmp_path / "a.jsonl", [*rows, rows[0], text]))
    (alone,), together = task.prepare(raw[HEAD : HEAD + 1]), task.prepare(raw[HEAD:])
    assert alone["input_ids"] == together[0]["input_ids"]


def test_a_buffer_draws_by_the_seed(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"text": str(i)} for i in range(40)])
    stream = RowStream.open(file=str(path))
    first, again, other = (
        [row["__row__"] for row in stream.shuffled(10, seed)] for seed in (1, 1, 2)
    )
    in_order = [row["__row__"] for row in stream.shuffled(None, 1)]
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == in_order == [1, *range(3, 42)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("data.json", "a list of objects ends where its bracket closes"),
        ("data.tsv", "its quotes can be understood only when all rows are known"),
        ("data.txt", "its extension is not known"),
    ],
)
def test_files_that_cannot_be_streamed_are_refused_with_the_reason(tmp_path, name, reason):
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"^--streaming: .*{name}: {reason}.*\.jsonl, \.csv"):
        RowStream.open(file=str(tmp_path / name))


def test_an_empty_or_missing_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: no rows"):
        RowStream.open(file=str(tmp_path / "data.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.jsonl"):
        RowStream.open(file=str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("name", ["classification", "prompted"])
def test_tasks_with_labels_are_refused(name):
    with pytest.raises(ValueError, match=rf"--task {name} has to read all labels before"):
        check_streamable(make_task(name))


BASE = [
    "--deepspeed_config",
    "c.json",
    "--model",
    "m",
    "--output_dir",
    "o",
    "--train_file",
    "t.jsonl",
]
STREAM = [*BASE, "--streaming", "--validation_file", "v.jsonl", "--max_steps", "3"]
REFUSED = {
    "--shots 2": "--streaming: --shots draws from all examples of a class",
    "--icl 2": "--streaming: --icl draws from all examples of a class",
    "--max_train_examples 9": "--streaming: --max_train_examples draws from all examples",
    "--mixture_weights a=1": "--streaming: --mixture_weights draws from all examples of a source",
    "--select 4/8": "--streaming: --select draws its candidates from all examples",
    "--packing": "--streaming: --packing cuts rows where all texts before them end",
    "--task sst2": "--streaming: --task sst2 loads its own data whole",
    "--shuffle_buffer 1": "--shuffle_buffer: found 1, must be 2 or more",
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_need_all_examples_are_refused_with_the_reason(option, capsys):
    parse_arguments(STREAM)
    with pytest.raises(SystemExit):
        parse_arguments([*STREAM, *option.split()])
    assert REFUSED[option] in capsys.readouterr().err


def test_a_stream_needs_a_number_of_steps_and_held_out_data(capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*BASE, "--streaming"])
    message = capsys.readouterr().err
    assert "--streaming: the number of steps in a pass over the data is not known" in message
    assert "--streaming: no examples can be held out from a stream" in message
    with pytest.raises(SystemExit):
        parse_arguments([*BASE, "--shuffle_buffer", "9"])
    assert "--shuffle_buffer belongs to --streaming" in capsys.readouterr().err
