"""Chat templates: the tokens of a conversation, and the tokens that the assistant wrote.

Caller: the task `Chat`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from zods.data.objectives import IGNORE_INDEX
from zods.tasks.formats import Message
from zods.tasks.prompts import leading_special_tokens

# Used where the tokenizer has no chat template and none is given.
FALLBACK = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


def read_chat_template(file_or_text: str) -> str:
    """Read a chat template from a file, or take the text itself where it is a Jinja template.

    Raises:
        ValueError: neither a file nor a text with {{ or {%.
    """
    if "{{" in file_or_text or "{%" in file_or_text:
        return file_or_text
    try:
        return Path(file_or_text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--chat_template {file_or_text}: {reason}. Give a file that holds a Jinja template, "
            "or the template itself"
        ) from None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its tokenizer.

    The assistant's tokens are those between the end of the prompt for a turn (the conversation up
    to it, rendered with `add_generation_prompt`) and the end of that turn, with the template's
    end-of-turn token, and without the white space at its end. A token that a turn shares with the
    text before it belongs to the turn. Where the template marks the assistant's text with
    {% generation %}, the marked tokens are taken instead.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, given: str | None) -> ChatTemplate:
        """Take the given template, the tokenizer's, or FALLBACK, and check it.

        The tokenizer gets this template, so that it is saved with the tokenizer.

        Raises:
            ValueError: the tokenizer gives no offsets of its tokens, or the template cannot render
                a conversation of one question and one answer.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                "chat data need a fast tokenizer, which tells the place of a token in the text; "
                f"this one is a {type(tokenizer).__name__}. Convert it to a tokenizer.json"
            )
        if given is not None:
            tokenizer.chat_template = given
        elif tokenizer.chat_template is None:
            starts = "{{ bos_token }}" if leading_special_tokens(tokenizer) else ""
            tokenizer.chat_template = starts + FALLBACK
        found = cls(tokenizer, tokenizer.get_chat_template())
        try:
            labels = found.tokenize(_PROBE)[1]
        except ValueError as error:
            raise ValueError(f"the chat template cannot be used: {error}") from None
        if all(label == IGNORE_INDEX for label in labels):
            raise ValueError(
                "the chat template cannot be used: it renders nothing of the assistant's turn"
            )
        return found

    def tokenize(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Tokenise a conversation whose last turn is the assistant's.

        Blank turns of the assistant get no labels.

        Returns:
            (token ids, labels: the ids of the assistant's tokens and -100 elsewhere).

        Raises:
            ValueError: the template refuses the conversation, or changes earlier turns when later
                ones are added.
        """
        if _MARKS.search(self.template):
            encoded = self._apply(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, is_answer = encoded["input_ids"], encoded["assistant_masks"]
        else:
            text = self._render(messages)
            encoded = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids = encoded["input_ids"]
            is_answer = _overlaps(encoded["offset_mapping"], self._answers(messages, text))
        labels = [
            token if labelled else IGNORE_INDEX
            for token, labelled in zip(ids, is_answer, strict=True)
        ]
        return ids, labels

    def _answers(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """The (start, end) of each turn of the assistant in the rendered text, in characters."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            prompt = self._render(messages[:i], add_generation_prompt=True)
            whole = self._render(messages[: i + 1])
            if not (text.startswith(whole) and whole.startswith(prompt)):
                raise ValueError(
                    f"the chat template renders the turns up to turn {i + 1} in another way when "
                    "later turns follow, so that the assistant's tokens cannot be found. Give "
                    "--chat_template with one that keeps earlier turns as they are, or marks the "
                    "assistant's text with {% generation %}"
                )
            spans.append((len(prompt), len(whole.rstrip())))
        return spans

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, **options
            )
        # A template raises exceptions of Jinja and of Python, of many types.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses the conversation: {reason}") from error


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token lies in one of the ascending spans, at least in part.

    A byte-level tokenizer leaves the space before a word out of the token's offsets. A token
    therefore begins where the token before it ends.
    """
    found, before, current = [], 0, 0
    for start, end in offsets:
        start = min(start, before)
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        found.append(current < len(spans) and spans[current][0] < end)
        before = max(before, end)
    return found
