"""Formats of instruction and chat data: detection, rendered text, labels, and wrong rows."""

import json
import logging

import datasets
import pytest
import torch
from tiny_tasks import MODEL_ARGUMENTS, ORDERS, labelled_text, llama, make_task, make_tokenizer

from zods.data.objectives import batch_loss
from zods.tasks import build_task, load_examples, name_of_rows, read_chat_template
from zods.tasks.chat import FALLBACK
from zods.tasks.formats import FORMATS, find_format
from zods.tasks.task import MOST_CHARACTERS

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The last answer only gets a mark, as in templates with thinking
REWRITES = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '(thought) ' }}{% endif %}{{ m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{% if loop.last %}{{ '(thought) ' }}{% endif %}{{ m['content'] }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
)


def turns(*texts, first="user"):
    """Messages with these contents; the roles alternate."""
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return [
        {"role": roles[i] if i < len(roles) else roles[-2:][(i - len(roles)) % 2], "content": text}
        for i, text in enumerate(texts)
    ]


TALK = turns("say one", "one", "say two", "two three")
LONG_TALK = turns("say numbers", "say one", "one", "say two", "two three", first="system")
ROWS = {
    "messages": [{"messages": TALK}, {"messages": LONG_TALK}] * 2,
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "say one"}, {"from": "gpt", "value": "one"}]}
    ]
    * 4,
    "alpaca": [
        {"instruction": "say one", "input": "", "output": "one"},
        {"instruction": "say this", "input": "two", "output": "two"},
        {"instruction": "say six", "input": None, "output": "six"},
        {"instruction": "say two", "input": "", "output": 2},
    ],
    "prompt_completion": [{"prompt": "say one:", "completion": " one"}] * 4,
    "text": [{"text": "say one two three"}] * 4,
}


def write(tmp_path, rows, name="a.jsonl"):
    """Load rows from a file as `zods.finetune` does: (examples, text before a row's number)."""
    path = tmp_path / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name.endswith(".json"):
        path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return load_examples(file=path, seed=0, keep_rows=True), name_of_rows(file=path)


def chat(messages, template, kind="gpt2", **settings):
    """The rendered text of one conversation, and its labelled text in pieces."""
    data = datasets.Dataset.from_list([{"messages": messages}])
    task = make_task("instruction", kind, data, chat_template=template, max_length=200, **settings)
    (row,) = task.prepare(data)
    pieces, before = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != -100:
            assert label == token
            pieces = [*pieces[:-1], [*pieces[-1], token]] if before else [*pieces, [token]]
        before = label != -100
    return task.tokenizer.decode(row["input_ids"]), list(map(task.tokenizer.decode, pieces))


def test_a_chatml_template_labels_each_answer_with_its_end_of_turn():
    text, labelled = chat(LONG_TALK, CHATML)
    assert text == (
        "<|im_start|>system\nsay numbers<|im_end|>\n<|im_start|>user\nsay one<|im_end|>\n"
        "<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nsay two<|im_end|>\n"
        "<|im_start|>assistant\ntwo three<|im_end|>\n"
    )
    assert [piece.strip() for piece in labelled] == ["one<|im_end|>", "two three<|im_end|>"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_llama_2_template_labels_each_answer_with_the_end_of_sequence(kind):
    text, labelled = chat(LONG_TALK, LLAMA_2, kind)
    assert text == (
        "<s>[INST] <<SYS>>\nsay numbers\n<</SYS>>\n\nsay one [/INST] one </s>"
        "<s>[INST] say two [/INST] two three </s>"
    )
    assert labelled == [" one </s>", " two three </s>"]


@pytest.mark.parametrize(("kind", "start"), [("gpt2", ""), ("llama", "<s>")])
def test_without_a_chat_template_turns_are_rendered_in_words_and_the_tokenizer_keeps_the_template(
    kind, start, caplog
):
    text, labelled = chat(LONG_TALK, None, kind)
    assert text == (
        f"{start}say numbers\n\nUser: say one\nAssistant: one</s>\nUser: say two\n"
        "Assistant: two three</s>\n"
    )
    assert labelled == [" one</s>", " two three</s>"]
    assert "the tokenizer has no chat template" in caplog.text
    data = datasets.Dataset.from_list([{"messages": TALK}])
    assert make_task("instruction", kind, data).tokenizer.chat_template.endswith(FALLBACK)


def test_spaces_and_characters_of_several_tokens_inside_an_answer_are_labelled():
    answer = "if x:\n        \n\N{GRINNING FACE}  y"
    assert chat(turns("say one", answer), None)[1] == [f" {answer}</s>"]


def test_a_template_that_changes_earlier_turns_is_refused_unless_it_marks_the_answers():
    text, labelled = chat(TALK, MARKED)
    assert [piece.strip() for piece in labelled] == ["one", "(thought) two three"]
    assert text.endswith("assistant: (thought) two three\n")
    with pytest.raises(ValueError, match=r"row 0: .*turns up to turn 2 in another way when later"):
        chat(TALK, REWRITES)
    assert chat(TALK[:2], REWRITES)[1] == ["(thought) one"]


def test_turns_need_not_alternate_where_the_template_allows_it():
    messages = [*TALK, {"role": "assistant", "content": "four"}, {"role": "user", "content": "a"}]
    text, labelled = chat(messages, None)
    assert labelled == [" one</s>", " two three</s>", " four</s>"]
    assert text.endswith("Assistant: four</s>\n"), "a question without an answer is not used"
    with pytest.raises(ValueError, match=r"row 0: the chat template refuses .* must alternate"):
        chat(messages, LLAMA_2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_sharegpt_messages_and_parts_of_text_give_the_same_rows(tmp_path, name):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    same = {
        "messages": LONG_TALK,
        "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in LONG_TALK],
    }
    parts = [
        {"role": m["role"], "content": [{"type": "text", "text": t} for t in (m["content"], "")]}
        for m in LONG_TALK
    ]
    expected = None
    for column, value in [*same.items(), ("messages", parts)]:
        data, row_name = write(tmp_path, [{column: value}], name)
        prepared = make_task("instruction", dataset=data).prepare(data, row_name).to_list()
        expected = expected or prepared
        assert prepared == expected


def test_texts_numbers_and_parts_may_be_mixed_in_one_json_file(tmp_path):
    contents = ["[1] one", [{"type": "text", "text": "one"}], 42, 0.5]
    data, row_name = write(tmp_path, [{"messages": turns("say one", c)} for c in contents])
    task = make_task("instruction", dataset=data)
    texts = labelled_text(task, task.collate(list(task.prepare(data, row_name))))
    assert texts == [" [1] one</s>", " one</s>", " 42</s>", " 0.5</s>"]


def test_the_input_of_alpaca_follows_the_instruction_where_it_is_not_empty(tmp_path):
    data, row_name = write(tmp_path, ROWS["alpaca"])
    task = make_task("instruction", dataset=data)
    texts = [task.tokenizer.decode(row["input_ids"]) for row in task.prepare(data, row_name)]
    assert texts == [
        "<s>say one\none</s>",
        "<s>say this\n\ntwo\ntwo</s>",
        "<s>say six\nsix</s>",
        "<s>say two\n2</s>",
    ]


def test_instruction_and_output_without_input_give_the_rows_of_the_columns_named():
    named = make_task("instruction", prompt_column="instruction", response_column="output")
    found = make_task("instruction")
    assert found.prepare(ORDERS).to_dict() == named.prepare(ORDERS).to_dict()


def test_whole_texts_and_completions_are_used_as_they_are():
    data = datasets.Dataset.from_list(ROWS["text"])
    task = make_task("instruction", dataset=data)
    assert set(labelled_text(task, task.collate(list(task.prepare(data))))) == {
        "say one two three</s>"
    }
    data = datasets.Dataset.from_list(ROWS["prompt_completion"])
    task = make_task("instruction", dataset=data)
    assert set(labelled_text(task, task.collate(list(task.prepare(data))))) == {" one</s>"}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_trains_and_evaluates_from_a_file(tmp_path, name, caplog):
    data, row_name = write(tmp_path, ROWS[name])
    with caplog.at_level(logging.INFO):
        task = make_task("instruction", dataset=data)
    assert f"data format {name}, found by the columns" in caplog.text
    rows, model = list(task.prepare(data, row_name)), llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        batch = task.collate(rows)
        loss = batch_loss(model(batch["input_ids"], batch["attention_mask"]), batch)
        assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    inputs, targets = task.collate_eval(rows)
    with torch.no_grad():
        metrics = task.measure(model(**inputs), inputs, targets)
        alone = [model(**task.collate([row])).loss.item() for row in rows]
    assert metrics["loss"] == (pytest.approx(sum(alone), rel=1e-5), len(rows))
    assert 0 <= metrics["accuracy"][0] <= metrics["accuracy"][1] == len(rows)


def test_a_named_format_is_used_where_the_columns_fit_several():
    row = {**ROWS["alpaca"][0], **ROWS["text"][0], "messages": TALK}
    data = datasets.Dataset.from_list([row])
    assert find_format(data, None).name == "messages"
    assert find_format(data, "text").name == "text"
    assert find_format(data.remove_columns("messages"), None).name == "alpaca"


# --- rows that are left out -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": "say one", "output": text} for text in ("one", "", " ", None)],
        [{"messages": turns("say one", text)} for text in ("one", "", " ", None)],
        [{"text": text} for text in ("one", "", " ", None)],
    ],
)
def test_empty_responses_are_counted_and_left_out_with_their_source(tmp_path, rows, caplog):
    data, row_name = write(tmp_path, rows)
    task = make_task("instruction", dataset=data)
    prepared = task.prepare(data, row_name, {"source": list("abcd")})
    assert list(prepared["source"]) == ["a"]
    assert "a.jsonl: 3 of 4 examples are left out: 3 with an empty response" in caplog.text
    empty = data.select([1, 2])
    with pytest.raises(ValueError, match="2 of 2 examples have nothing to learn"):
        task.prepare(empty, row_name)


def test_a_conversation_is_cut_on_the_right_and_left_out_without_an_answer(caplog):
    data = datasets.Dataset.from_list(
        [{"messages": TALK}, {"messages": turns("say one " * 30, "one")}]
    )
    whole = make_task("instruction", dataset=data, max_length=200).prepare(data)
    length = len(whole[0]["input_ids"]) - 3
    cut = make_task("instruction", dataset=data, max_length=length).prepare(data)
    assert list(cut["input_ids"]) == [whole[0]["input_ids"][:length]]
    assert list(cut["labels"]) == [whole[0]["labels"][:length]]
    assert f"1 of 2 examples are left out: 1 with no label in {length} tokens" in caplog.text
    assert f"1 of 1 examples were cut to {length} tokens" in caplog.text


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "column 'messages' holds a text, not a list of turns"),
        (None, "column 'messages' holds null, not a list"),
        ([], "no turn of the assistant in column 'messages'"),
        (["hello"], "turn 1 is a text, not an object"),
        (TALK[:1], "no turn of the assistant"),
        (TALK[1:], "begins with the assistant's turn"),
        ([{"role": "wizard", "content": "a"}], "turn 1 has the role 'wizard'; allowed are system,"),
        ([{"content": "a"}], 'turn 1 has no "role"'),
        ([{"role": "tool", "content": "a"}], "turn 1 is a call of a tool or its result"),
        (
            [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
            "turn 2 is a call of a tool",
        ),
        ([{"role": "user", "content": " "}, TALK[1]], "turn 1 of the user has no text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}, TALK[1]],
            "turn 1, 'content': found a part of type 'image_url', allowed are",
        ),
        ([{"role": "user", "content": {"a": 1}}, TALK[1]], "turn 1, 'content': found an object"),
        (turns("a" * MOST_CHARACTERS, "one"), "1000003 characters, at most 1000000"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_all_rows_without_a_conversation_are_named_by_line(tmp_path, value, message, alone):
    """Alone: no other row determines the type of the column."""
    good = [] if alone else [{"messages": TALK}]
    data, row_name = write(tmp_path, [*good, {"messages": value}, *good, {"messages": value}])
    task = make_task("instruction", dataset=datasets.Dataset.from_list([{"messages": TALK}]))
    lines = "1, 2" if alone else "2, 4"
    with pytest.raises(ValueError, match=rf"a.jsonl, line {lines}: .*{message}"):
        task.prepare(data, row_name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": " ", "output": "one"}, "blank text in 'instruction'"),
        ({"instruction": None, "output": "one"}, "blank text in 'instruction'"),
        ({"instruction": ["a"], "output": "one"}, "column 'instruction' holds a list, .* no text"),
        ({"instruction": "a", "output": {"b": 1}}, "column 'output' holds an object, .* no text"),
        ({"instruction": "a", "input": ["c"], "output": "b"}, "column 'input' holds a list"),
    ],
)
def test_rows_that_are_no_texts_are_named_by_line(tmp_path, row, message):
    good = {"instruction": "say one", "input": "a", "output": "one"}
    data, row_name = write(tmp_path, [good, row, row])
    with pytest.raises(ValueError, match=rf"a.jsonl, line 2, 3: {message}"):
        make_task("instruction", dataset=data).prepare(data, row_name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_format": "chatml"}, "unknown data_format 'chatml'; allowed are messages, sharegpt"),
        ({"data_format": "text"}, "no column 'text'; its columns are instruction, output"),
        ({"data_format": "alpaca", "template": "{a} {b}"}, "pass either data_format"),
        ({"chat_template": CHATML}, "chat_template is for conversations; .* the format alpaca"),
        ({"dataset": ORDERS.rename_column("output", "b")}, "columns instruction, b, .* no known"),
        (
            {"dataset": datasets.Dataset.from_list(ROWS["messages"]), "chat_template": "{{ a.b.c"},
            "the chat template cannot be used: .*unexpected end",
        ),
        (
            {"dataset": datasets.Dataset.from_list(ROWS["messages"]), "chat_template": "{{ 1 }}"},
            "renders nothing of the assistant's turn",
        ),
    ],
)
def test_a_wrong_format_or_template_is_an_error_before_any_model_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task("instruction", **{"dataset": ORDERS, **settings})


def test_a_chat_template_is_a_text_or_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert read_chat_template(str(tmp_path / "chat.jinja")) == read_chat_template(CHATML) == CHATML
    with pytest.raises(ValueError, match=r"--chat_template chatml: No such file .*Jinja template"):
        read_chat_template("chatml")
    assert (
        build_task(
            "instruction",
            make_tokenizer("gpt2"),
            datasets.Dataset.from_list(ROWS["messages"]),
            max_length=64,
            chat_template=CHATML,
            **MODEL_ARGUMENTS,
        ).tokenizer.chat_template
        == CHATML
    )
