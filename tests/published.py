"""Small files in the form in which each task's data are published, and the prompts they give.

Texts are made up here. A case lists the files by name, the first prompt with its right answer, and
what the answers are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """files: {name: content}; the first is the training file. prompt: the first row's text up to
    its answer. answer: the right one. candidates: all of the first row's, in order; empty where the
    answer is generated.
    """

    files: Mapping[str, str]
    prompt: str
    answer: str
    candidates: Sequence[str] = ()


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def both(first: str, second: str, content: str) -> dict[str, str]:
    return {first: content, second: content}


PREMISE = "Dogs bark loudly ."
HYPOTHESIS = "Dogs make noise ."
YES_NO = ("Yes", "No")
NO_YES = ("No", "Yes")
PAIR_QUESTION = f'{PREMISE}\nDoes this mean that "{HYPOTHESIS}" is true? '
# a name that stands twice is one candidate
NEWS = "Rome beat Oslo.\n@highlight\nRome won in Oslo"
SPANS = [(0, 3), (10, 13), (27, 30)]
ARTICLE = {
    "title": "Tower",
    "paragraphs": [
        {
            "context": "The tower is in Paris. It is old.",
            "qas": [
                {
                    "id": "1",
                    "question": "Where is the tower?",
                    "answers": [
                        {"text": "Paris", "answer_start": 16},
                        {"text": "in Paris", "answer_start": 13},
                    ],
                },
                {
                    "id": "2",
                    "question": "How is it?",
                    "answers": [{"text": "old", "answer_start": 29}],
                },
            ],
        }
    ],
}


def drop_answer(number: str = "", spans: Sequence[str] = (), year: str = "") -> dict[str, Any]:
    return {
        "number": number,
        "date": {"day": "", "month": "", "year": year},
        "spans": list(spans),
    }


GAME = {
    "nfl_1": {
        "passage": "The team kicked two goals in 1999.",
        "qa_pairs": [
            {"question": "How many goals?", "answer": drop_answer(number="2"), "query_id": "a"},
            {"question": "Which year?", "answer": drop_answer(year="1999"), "query_id": "b"},
            {"question": "Who?", "answer": drop_answer(spans=["The team"]), "query_id": "c"},
        ],
        "wiki_url": "",
    }
}

CASES: dict[str, Case] = {
    "sst2": Case(
        both(
            "train.tsv",
            "dev.tsv",
            "sentence\tlabel\na fine movie\t1\nso dull\t0\ngood fun\t1\nno plot\t0\n",
        ),
        "a fine movie It was ",
        "great",
        ("terrible", "great"),
    ),
    "sst5": Case(
        both(
            "train.jsonl",
            "dev.jsonl",
            lines(
                *(
                    {"text": f"film {label}", "label": label, "label_text": text}
                    for label, text in enumerate(
                        ("very negative", "negative", "neutral", "positive", "very positive")
                    )
                )
            ),
        ),
        "film 0 It was ",
        "terrible",
        ("terrible", "bad", "okay", "good", "great"),
    ),
    "trec": Case(
        both(
            "train.jsonl",
            "test.jsonl",
            lines(
                {"question": "How far is it ?", "label": "NUM", "fine": "dist"},
                {"question": "Who is it ?", "label": "HUM", "fine": "ind"},
            ),
        ),
        "How far is it ?\nType: ",
        "Number",
        ("Expression", "Entity", "Description", "Human", "Location", "Number"),
    ),
    "ag_news": Case(
        both(
            "train.csv",
            "test.csv",
            '"3","Stocks rise","Shares rose, again."\n"4","A chip","It is fast."\n'
            '"1","A vote","They voted."\n"2","A match","They won."\n',
        ),
        "Stocks rise Shares rose, again.\nTopic: ",
        "Business",
        ("World", "Sports", "Business", "Technology"),
    ),
    "mnli": Case(
        both(
            "train.tsv",
            "dev_matched.tsv",
            "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
            f"0\t1\t1e\tfiction\t{PREMISE}\t{HYPOTHESIS}\tentailment\tentailment\n"
            f"1\t2\t2n\tfiction\t{PREMISE}\tIt is dark .\tneutral\tneutral\n",
        ),
        PAIR_QUESTION + "Yes, No, or Maybe?\n",
        "Yes",
        ("Yes", "Maybe", "No"),
    ),
    "snli": Case(
        both(
            "snli_1.0_train.jsonl",
            "snli_1.0_dev.jsonl",
            lines(
                {"gold_label": "-", "sentence1": "Unclear .", "sentence2": "Not agreed on ."},
                {"gold_label": "contradiction", "sentence1": PREMISE, "sentence2": HYPOTHESIS},
                {"gold_label": "neutral", "sentence1": PREMISE, "sentence2": "It is dark ."},
            ),
        ),
        PAIR_QUESTION + "Yes, No, or Maybe?\n",
        "No",
        ("Yes", "Maybe", "No"),
    ),
    "qnli": Case(
        both(
            "train.tsv",
            "dev.tsv",
            "index\tquestion\tsentence\tlabel\n"
            "0\tWhere is it?\tIt is in Rome.\tentailment\n"
            "1\tWho came?\tIt rained.\tnot_entailment\n",
        ),
        "It is in Rome.\nDoes this answer the question: Where is it? Yes or No?\n",
        "Yes",
        YES_NO,
    ),
    "rte": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                {"premise": PREMISE, "hypothesis": HYPOTHESIS, "label": "entailment", "idx": 0},
                {"premise": PREMISE, "hypothesis": "Cats .", "label": "not_entailment", "idx": 1},
            ),
        ),
        PAIR_QUESTION + "Yes or No?\n",
        "Yes",
        YES_NO,
    ),
    "cola": Case(
        both("train.tsv", "dev.tsv", "gj04\t1\t\tBirds sing.\ngj04\t0\t*\tSing birds the.\n"),
        "Birds sing. This is ",
        "correct",
        ("incorrect", "correct"),
    ),
    "cb": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                {"premise": PREMISE, "hypothesis": HYPOTHESIS, "label": "neutral", "idx": 0},
                {"premise": PREMISE, "hypothesis": "Cats .", "label": "contradiction", "idx": 1},
            ),
        ),
        f'Suppose {PREMISE} Can we infer that "{HYPOTHESIS}"? Yes, No, or Maybe?\n',
        "Maybe",
        ("Yes", "No", "Maybe"),
    ),
    "boolq": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                {"question": "is it red", "passage": "It is red.", "idx": 0, "label": True},
                {"question": "is it blue?", "passage": "It is red.", "idx": 1, "label": False},
            ),
        ),
        "It is red. Is it red?\n",
        "Yes",
        NO_YES,
    ),
    "wsc": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                *(
                    {
                        "text": "Mark told Pete that he won.",
                        "target": {
                            "span1_index": 0,
                            "span1_text": name,
                            "span2_index": 4,
                            "span2_text": "he",
                        },
                        "idx": number,
                        "label": bool(number),
                    }
                    for number, name in enumerate(("Mark", "Pete"))
                )
            ),
        ),
        'Mark told Pete that he won.\nIn the previous sentence, does the pronoun "he" refer to '
        "Mark? Yes or No?\n",
        "No",
        NO_YES,
    ),
    "wic": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                *(
                    {
                        "word": "bank",
                        "sentence1": "A river bank.",
                        "sentence2": second,
                        "idx": number,
                        "label": bool(number),
                        "start1": 8,
                        "start2": 0,
                        "end1": 12,
                        "end2": 4,
                    }
                    for number, second in enumerate(("Bank on it.", "Banks of a river."))
                )
            ),
        ),
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "A river bank.\nBank on it.\n",
        "No",
        NO_YES,
    ),
    "copa": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                {
                    "premise": "The man slipped.",
                    "choice1": "The floor was wet.",
                    "choice2": "I was away.",
                    "question": "cause",
                    "label": 0,
                    "idx": 0,
                },
                {
                    "premise": "It rained.",
                    "choice1": "We swam.",
                    "choice2": "We stayed in.",
                    "question": "effect",
                    "label": 1,
                    "idx": 1,
                },
            ),
        ),
        "The man slipped because ",
        "the floor was wet.",
        ("the floor was wet.", "I was away."),
    ),
    "multirc": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                {
                    "idx": 0,
                    "version": 1.1,
                    "passage": {
                        "text": "Ann and Bob left.",
                        "questions": [
                            {
                                "question": "Who left?",
                                "idx": 0,
                                "answers": [
                                    {"text": "Ann", "idx": 0, "label": 1},
                                    {"text": "Carl", "idx": 1, "label": 0},
                                ],
                            }
                        ],
                    },
                }
            ),
        ),
        'Ann and Bob left.\nQuestion: Who left?\nI found this answer "Ann". Is that correct? '
        "Yes or No?\n",
        "Yes",
        NO_YES,
    ),
    "record": Case(
        both(
            "train.jsonl",
            "val.jsonl",
            lines(
                {
                    "source": "news",
                    "passage": {
                        "text": NEWS,
                        "entities": [{"start": a, "end": b} for a, b in SPANS],
                    },
                    "idx": 0,
                    "qas": [
                        {
                            "query": "The winner was @placeholder , they said",
                            "answers": [{"start": 0, "end": 3, "text": "Rome"}],
                            "idx": 0,
                        }
                    ],
                }
            )
            * 2,
        ),
        "Rome beat Oslo.\n- Rome won in Oslo\nThe winner was ",
        "Rome , they said",
        ("Rome , they said", "Oslo , they said"),
    ),
    "squad": Case(
        both(
            "train-v1.1.json",
            "dev-v1.1.json",
            json.dumps({"version": "1.1", "data": [ARTICLE]}),
        ),
        "Title: Tower\nContext: The tower is in Paris. It is old.\nQuestion: Where is the tower?\n"
        "Answer: ",
        "Paris",
    ),
    "drop": Case(
        both("drop_dataset_train.json", "drop_dataset_dev.json", json.dumps(GAME)),
        "Passage: The team kicked two goals in 1999.\nQuestion: How many goals?\nAnswer: ",
        "2",
    ),
    "gsm8k": Case(
        both(
            "train.jsonl",
            "test.jsonl",
            lines(
                {"question": "What is 3 and 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
                {"question": "What is 1 and 1?", "answer": "1 + 1 = 2\n#### 2"},
            ),
        ),
        "Question: What is 3 and 4?\nAnswer: ",
        "3 + 4 = <<3+4=7>>7\n#### 7",
    ),
    "mathinstruct": Case(
        {
            "MathInstruct.json": json.dumps(
                [
                    {"source": "CoT/a.json", "output": "It is 7.", "instruction": "Add 3 and 4."},
                    {"source": "PoT/b.json", "output": "print(2)", "instruction": "Add 1 and 1."},
                ]
            )
        },
        "Add 3 and 4.\n",
        "It is 7.",
    ),
}


def write_files(folder: Path, files: Mapping[str, str]) -> Path:
    """Write the files of a case; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder
