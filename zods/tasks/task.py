"""The face that every task has, and the steps that tasks share: checking columns, mapping rows, padding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Columns = dict[str, list[Any]]
TEXT_DTYPES = ("string", "large_string")


class Task(Protocol):
    """How examples become batches for one kind of model, and its outputs become metrics."""

    name: ClassVar[str]

    def auto_class(self) -> type[Any]:
        """The transformers Auto class of the model."""

    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` is given beside the model's name."""

    def prepare(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Validate and tokenise: one row of lists of ints for each row of `dataset`, in the same order.

        Ranks may prepare the same data at the same time: each writes its own temporary file and renames it to a name
        that follows from data, task, tokenizer and code, so at worst the work is done twice. A caller that lets one
        rank go first has the others read its result.

        Raises:
            ValueError: a column, a row's text or a row's label is not as the task needs it; names the row, from 0.
        """

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A training batch of prepared rows: `input_ids`, `attention_mask` (B, L) and `labels`, right-padded."""

    def collate_eval(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """(what the model's forward takes, targets for `measure`): without labels, so that forward computes no loss."""

    def measure(self, outputs: Any, inputs: dict[str, Tensor], targets: Tensor) -> dict[str, tuple[float, float]]:
        """{metric: (sum, count)} of an evaluation batch, with "loss" and "accuracy"; the counts are examples.

        Args:
            outputs: the model's, with `outputs["logits"]`.
            inputs, targets: from `collate_eval`, on the device of the logits.
        """


def check_text_columns(dataset: datasets.Dataset, columns: Sequence[str]) -> None:
    """Raise ValueError unless all these columns are there and hold text."""
    check_columns(dataset, columns)
    for column in columns:
        dtype = getattr(dataset.features[column], "dtype", None)
        if dtype not in TEXT_DTYPES:
            raise ValueError(f"column {column!r} must hold text; it holds {dataset.features[column]}")


def check_columns(dataset: datasets.Dataset, columns: Sequence[str]) -> None:
    """Raise ValueError unless all these columns are there."""
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"the data has no column {column!r}; its columns are {', '.join(dataset.column_names)}")


def check_texts(batch: Columns, columns: Sequence[str], indices: Sequence[int]) -> None:
    """Raise ValueError for a row where one of the texts is missing, or all are blank (one of several may be)."""
    for row, texts in zip(indices, zip(*(batch[column] for column in columns), strict=True), strict=True):
        if None in texts:
            raise ValueError(f"row {row}: column {columns[texts.index(None)]!r} has no text; remove the row or fill it")
        if not any(text.strip() for text in texts):
            raise ValueError(f"row {row}: blank text in {', '.join(map(repr, columns))}; remove the row or fill it")


def map_rows(
    dataset: datasets.Dataset, make_rows: Callable[[Columns, list[int]], Columns], max_length: int
) -> datasets.Dataset:
    """Tokenise in batches of rows; `make_rows` also gives a column "truncated", which is counted and dropped."""
    prepared = dataset.map(
        _apply,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"make_rows": make_rows, "code": _code_digest()},
    )
    num_truncated = sum(prepared["truncated"])
    if num_truncated:
        logger.warning("%d of %d examples were cut to %d tokens", num_truncated, len(prepared), max_length)
    return prepared.remove_columns("truncated")


def _apply(
    batch: Columns, indices: list[int], make_rows: Callable[[Columns, list[int]], Columns], code: str
) -> Columns:
    return make_rows(batch, indices)


def _code_digest() -> str:
    """Of this package: `datasets` knows our functions by name only, and would reuse what an older version made."""
    return Hasher.hash([path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))])


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token, or else its end-of-sequence token (padding is masked, whatever it is).

    Raises:
        ValueError: it has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a pad token nor an eos token; set tokenizer.pad_token")


def pad_right(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, L) int64, L the longest of the sequences; `value` fills the rest of the others."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def pad_inputs(sequences: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both (B, L) int64, of right-padded token sequences."""
    return {
        "input_ids": pad_right(sequences, pad_token_id(tokenizer)),
        "attention_mask": pad_right([[1] * len(sequence) for sequence in sequences], 0),
    }
