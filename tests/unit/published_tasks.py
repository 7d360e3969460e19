"""Load and build declared tasks with a tiny tokenizer, for the tests of these tasks."""

from tiny_tasks import MODEL_ARGUMENTS, make_tokenizer

from zods.tasks import TASKS, build_published, load_published


def load(name, folder, held_out=False, **settings):
    return load_published(
        TASKS[name],
        held_out=held_out,
        **{
            "file": None,
            "folder": folder,
            "column_names": None,
            "max_examples": None,
            "seed": 0,
            **settings,
        },
    )


def build(name, data, declared=None, **settings):
    tokenizer = make_tokenizer("llama")
    return build_published(
        declared or TASKS[name],
        tokenizer,
        data,
        **{**MODEL_ARGUMENTS, "max_length": 512, **settings},
    )


def texts_of(task, row):
    """(prompt with its special token, right answer, all candidates) of a prepared row."""
    decode = make_tokenizer("llama").decode
    if "words" in row:
        whole = [decode(row["prompt"] + word) for word in row["words"]]
        return whole[row["answer"]], whole
    return decode(row["input_ids"]).removesuffix("</s>"), []
