"""The commands that the documents show."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def commands(document: str) -> list[str]:
    """The indented and the quoted commands of a document, on one line each, without comments."""
    text = (REPOSITORY / document).read_text().replace("\\\n", " ")
    indented = re.findall(r"^ {4,}((?:deepspeed|bash|python|torchrun) .*)$", text, re.MULTILINE)
    quoted = re.findall(r"`([A-Z_]+=\S+ )?((?:deepspeed|bash|python|torchrun) [^`]+)`", text)
    found = [*indented, *(command for _, command in quoted)]
    return [re.sub(r"\s+#.*", "", command) for command in found]


def arguments_after(words: list[str], name: str) -> list[str]:
    """The words after `name`, without "..." and without the brackets of "[--until STEP]"."""
    return [word.strip("[]") for word in words[words.index(name) + 1 :] if word != "..."]
