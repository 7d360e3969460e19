"""Declared tasks: data in their published forms, golden prompts, three steps and an evaluation."""

import pytest
import torch
from published_tasks import build, load, texts_of
from tiny_tasks import llama, outputs_of

from tests.published import CASES, write_files
from zods.data.objectives import batch_loss
from zods.tasks import TASKS, with_derived
from zods.tasks.task import check_rows

pytestmark = pytest.mark.usefixtures("own_cache")


def test_every_declared_task_has_a_case():
    assert CASES.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_a_published_file_gives_the_golden_prompt(name, tmp_path):
    case = CASES[name]
    data, row_name = load(name, write_files(tmp_path, case.files))
    task = build(name, data)
    right, candidates = texts_of(task, task.prepare(data, row_name)[0])
    assert right == f"<s>{case.prompt}{case.answer}"
    assert candidates == [f"<s>{case.prompt}{text}" for text in case.candidates]


@pytest.mark.parametrize("name", TASKS)
def test_a_published_file_trains_three_steps_and_is_evaluated(name, tmp_path):
    data, row_name = load(name, write_files(tmp_path, CASES[name].files))
    task, model = build(name, data), llama()
    held_out = load(name, tmp_path, held_out=True) or (data, row_name)
    check_rows(task, [(data, row_name), held_out])
    rows = list(task.prepare(data, row_name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        batch = task.collate(rows)
        loss = batch_loss(
            {"logits": model(batch["input_ids"], batch["attention_mask"]).logits}, batch
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    held_out_rows = list(task.prepare(*held_out))
    inputs, targets = task.collate_eval(held_out_rows)
    with torch.no_grad():
        measured = task.measure(outputs_of(model, inputs), inputs, targets)
    metrics = with_derived({key: total / count for key, (total, count) in measured.items()})
    assert all(
        count == len(held_out_rows) for key, (_, count) in measured.items() if "@" not in key
    )
    named = {"f1", "f1_macro", "matthews"} & {TASKS[name].metric}
    assert metrics.keys() == {"loss", "accuracy", *named}
    assert 0 < metrics["loss"] < 10
