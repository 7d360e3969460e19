"""Rows of published data sets, in the form that the templates need.

A function takes a published row, with all its columns there, and yields the task's rows. Texts
follow MeZO's published prompts (Malladi et al. 2023, arXiv:2305.17333, appendix E).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zods.data.answer_metrics import exact_match, token_f1
from zods.tasks.published.declaration import Row

PLACEHOLDER = "@placeholder"


def ag_news(row: Row) -> Iterator[Row]:
    """Title and text as one text. The hub has them so; the published CSV has two columns."""
    title, text = (row.get("title") or "").strip(), row["text"].strip()
    yield {**row, "text": f"{title} {text}" if title else text}


def sentence(row: Row) -> Iterator[Row]:
    """The sentence without spaces around it: those of GLUE end with one."""
    yield {**row, "sentence": row["sentence"].strip()}


def boolq(row: Row) -> Iterator[Row]:
    """The question with a capital letter and a question mark."""
    question = row["question"].strip()
    yield {**row, "question": question[:1].upper() + question[1:].removesuffix("?") + "?"}


def wsc(row: Row) -> Iterator[Row]:
    """The spans as columns. SuperGLUE's files have them in an object "target"."""
    target = row.get("target") or row
    first, second = target["span1_text"], target["span2_text"]
    yield {**row, "span1_text": first, "span2_text": second.lower()}


def copa(row: Row) -> Iterator[Row]:
    """A premise without its full stop, "so" or "because", and the two ends of the sentence."""
    joined = {"effect": "so", "cause": "because"}.get(row["question"])
    candidates = [row["choice1"], row["choice2"]]
    yield {
        **row,
        "premise": row["premise"].rstrip().removesuffix("."),
        "connector": joined,
        "candidates": [_lower_first(text) for text in candidates],
        "answer": row["label"],
    }


def _lower_first(text: str) -> str:
    """The text with a small first letter, unless it begins with "I"."""
    return text if text.split(" ")[0] in ("I", "I'm", "I'd") else text[:1].lower() + text[1:]


def multirc(row: Row) -> Iterator[Row]:
    """One row for each answer. SuperGLUE's files have a passage with its questions as a row."""
    passage = row["passage"]
    if isinstance(passage, str):
        yield row
        return
    for question in passage["questions"]:
        for answer in question["answers"]:
            yield {
                **row,
                "passage": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
            }


def record(row: Row) -> Iterator[Row]:
    """One row for each query, with the entities of the passage as candidates.

    A candidate is an entity with the rest of the query after it. The right one is the first entity
    that is an answer. "f1" and "exact" compare each entity with the answers.
    """
    if isinstance(row["passage"], str):
        text, entities = row["passage"], row["entities"]
        queries = [(row["query"], row["answers"])]
    else:
        text = row["passage"]["text"]
        spans = [(span["start"], span["end"] + 1) for span in row["passage"]["entities"]]
        entities = [text[start:end] for start, end in spans]
        queries = [
            (query["query"], [answer["text"] for answer in query["answers"]])
            for query in row["qas"]
        ]
    entities = list(dict.fromkeys(entities))
    for query, answers in queries:
        before, _, after = query.partition(PLACEHOLDER)
        exact = [exact_match(entity, answers) for entity in entities]
        yield {
            "passage": text.replace("@highlight\n", "- "),
            "query": before,
            "candidates": [entity + after for entity in entities],
            "answer": exact.index(1.0) if 1.0 in exact else None,
            "exact": exact,
            "f1": [token_f1(entity, answers) for entity in entities],
        }


def squad(row: Row) -> Iterator[Row]:
    """The first answer as the response, and all as references."""
    texts = row["answers"]["text"]
    answer = texts[0] if texts else None
    yield {**row, "question": row["question"].strip(), "answer": answer, "references": texts}


def squad_document(document: Any) -> Iterator[Row]:
    """The questions of SQuAD's file, with the columns of the hub."""
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield {
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": {"text": [answer["text"] for answer in asked["answers"]]},
                }


def drop(row: Row) -> Iterator[Row]:
    """The first span as the response, and all as references, as MeZO has it.

    On the hub the spans of held-out questions are those of several annotators.
    """
    spans = row["answers_spans"]["spans"]
    answer = spans[0] if spans else None
    yield {**row, "question": row["question"].strip(), "answer": answer, "references": spans}


def drop_document(document: Any) -> Iterator[Row]:
    """The questions of DROP's file, with the columns of the hub."""
    for entry in document.values():
        for pair in entry["qa_pairs"]:
            answer = pair["answer"]
            date = [answer["date"].get(part) or "" for part in ("day", "month", "year")]
            spans = [str(answer["number"] or ""), *answer["spans"], " ".join(filter(None, date))]
            yield {
                "passage": entry["passage"],
                "question": pair["question"],
                "answers_spans": {"spans": [span for span in spans if span]},
            }
