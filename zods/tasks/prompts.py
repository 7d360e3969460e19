"""Templates of prompts, and the tokens of a prompt and of its continuations.

Callers: the tasks `Prompted` and `Instruction`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zods.data.objectives import IGNORE_INDEX, sequence_log_likelihood
from zods.tasks.task import Columns, Row, pad_inputs


@dataclass(frozen=True)
class Template:
    """A prompt with fields; the last field is the answer, as in "{text}\\nArea: {label}".

    Attributes:
        pieces: (literal text, the field that follows it), in order, without the answer.
        cue: the literal text between the last of these fields and the answer.
        answer: name of the answer's field.
    """

    pieces: tuple[tuple[str, str], ...]
    cue: str
    answer: str

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template in the format of `str.format`, with plain field names only.

        {{ and }} are replaced by single braces.

        Raises:
            ValueError: unbalanced braces, a field that is no plain name, text after the last field,
                an answer that is also a field of the prompt, or no field before it.
        """
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"template {text!r}: {error}; write {{{{ and }}}} for braces"
            ) from None
        pieces: list[tuple[str, str]] = []
        literal = ""
        for before, field, spec, conversion in parsed:
            literal += before
            if field is None:
                continue
            if not field or spec or conversion:
                raise ValueError(
                    f"template {text!r}: a field is a column's name in braces, without '!' or ':'"
                )
            pieces.append((literal, field))
            literal = ""
        if literal or len(pieces) < 2:
            raise ValueError(
                f"template {text!r} must have a field for the text, and end with the field of the "
                f"answer; it has the fields {', '.join(field for _, field in pieces) or '(none)'} "
                f"and ends with {text[-20:]!r}"
            )
        *prompt, (cue, answer) = pieces
        if answer in [field for _, field in prompt]:
            raise ValueError(
                f"template {text!r}: the answer {{{answer}}} must stand only once, at the end"
            )
        return cls(tuple(prompt), cue, answer)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the prompt, each once."""
        return tuple(dict.fromkeys(field for _, field in self.pieces))

    def prompts(self, batch: Columns) -> list[str]:
        """The text of each row up to the answer."""
        num_rows = len(batch[self.columns[0]])
        return [
            "".join(literal + batch[field][row] for literal, field in self.pieces) + self.cue
            for row in range(num_rows)
        ]


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def read_escapes(text: str, where: str) -> str:
    r"""Replace \n, \t, \r and \\ in a text of the command line, as Python does.

    Raises ValueError for another backslash.
    """

    def character(match: re.Match[str]) -> str:
        if match[1] not in ESCAPES:
            raise ValueError(
                rf"{where}: found {match[0]!r}, allowed are \n, \t, \r and \\; "
                r"write \\ for a backslash"
            )
        return ESCAPES[match[1]]

    return re.sub(r"\\(.?)", character, text, flags=re.DOTALL)


def tokenize_continuations(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
) -> list[tuple[list[int], list[list[int]]]]:
    """Tokenise prompts and their continuations, without special tokens.

    Returns for each prompt its tokens, and the tokens of each continuation.

    A continuation's tokens are its tokens after this prompt, not its tokens alone. Prompt and
    continuation are tokenised as one text. The cut is where the tokens of the prompt alone and of
    all its continuations first differ. Some tokenizers merge the end of the prompt with the start
    of a continuation (most do so with a space and a word). The cut is then before the merged token,
    for all continuations.
    """
    texts = []
    for prompt, group in zip(prompts, continuations, strict=True):
        texts += [prompt, *(prompt + continuation for continuation in group)]
    ids = iter(
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    )
    result = []
    for group in continuations:
        alone, together = next(ids), [next(ids) for _ in group]
        columns = enumerate(zip(alone, *together, strict=False))
        cut = next(
            (i for i, column in columns if len(set(column)) > 1), min(map(len, [alone, *together]))
        )
        result.append((alone[:cut], [tokens[cut:] for tokens in together]))
    return result


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text.

    This is a beginning-of-sequence token, or nothing.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    num_leading = (*encoded["special_tokens_mask"], 0).index(0)
    return encoded["input_ids"][:num_leading]


def fit_prompt(start: list[int], prompt: list[int], limit: int) -> list[int]:
    """Keep `start` and the last `limit` tokens of a prompt.

    Returns [] where `limit` is 0 or less: no token would be left from which to predict the answer.
    """
    return start + prompt[-limit:] if limit > 0 else []


def unusable(prompts: Sequence[list[int]]) -> list[str]:
    """The reason why each row cannot be used, or ""."""
    reason = "no token is left before the answer (lengthen the prompt or raise max_length)"
    return ["" if prompt else reason for prompt in prompts]


def num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Count the tokens of a text, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def collate_answers(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Collate rows with `input_ids` and `num_answer_tokens` to a training batch of a causal LM.

    Only the answers are labelled.
    """
    inputs = pad_inputs([row["input_ids"] for row in rows], pad_id)
    return {
        **inputs,
        "labels": answer_labels(inputs, torch.tensor([row["num_answer_tokens"] for row in rows])),
    }


def answer_labels(inputs: dict[str, Tensor], num_answer_tokens: Tensor) -> Tensor:
    """Make labels (B, L) for the last `num_answer_tokens` (B,) tokens of right-padded rows."""
    ends = inputs["attention_mask"].sum(1, keepdim=True)  # (B, 1)
    positions = torch.arange(inputs["input_ids"].shape[1], device=ends.device)
    is_answer = (positions < ends) & (positions >= ends - num_answer_tokens[:, None])
    return inputs["input_ids"].where(is_answer, IGNORE_INDEX)


def measure_answers(logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Sum the loss and the accuracy over the examples, as {metric: (sum, number of examples)}.

    An example's loss is its mean negative log-likelihood per labelled token. Its accuracy is the
    share of labelled tokens predicted.

    Args:
        logits: (B, L, V) of a causal LM; those of virtual tokens before a row's own are left out.
        labels: (B, L), -100 where a token is not labelled.
    """
    logits = logits[:, -labels.shape[1] :]
    log_likelihood, counts = sequence_log_likelihood(logits, labels)
    num_correct = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum(1)
    return {
        "loss": (-(log_likelihood / counts).sum().item(), len(counts)),
        "accuracy": ((num_correct / counts).sum().item(), len(counts)),
    }
