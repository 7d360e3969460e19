"""Write the quickstart's data: snippets of the standard library, labelled as code or docstring.

    python make_data.py OUT_FOLDER

The sources of the running Python are parsed, never imported. Three packages in ten, chosen by a
hash of their name, are held out. Their snippets are the validation data, and the quickstart's model
was not pretrained on them.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LABELS = ("code", "text")
NUM_TRAIN, NUM_VALIDATION = 128, 300
MAX_CHARS = 100  # per example, about 40 tokens
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "pydoc_data",
}
# Packages that only some installations have
NOT_EVERYWHERE = {
    "tkinter",
    "turtle",
    "turtledemo",
    "idlelib",
    "distutils",
    "ensurepip",
}


@dataclass(frozen=True)
class Piece:
    """A docstring, or the body of a function without its docstring and comments."""

    package: str
    label: str
    whole: str

    @property
    def opening(self) -> str:
        return " ".join(self.whole.split())[:MAX_CHARS]

    @property
    def key(self) -> str:
        """A key that is equal for pieces with the same first characters."""
        return self.opening[:40]

    @property
    def is_held_out(self) -> bool:
        return hashed(self.package.lstrip("_").split("_")[0]) % 10 < 3


def hashed(text: str) -> int:
    """Hash a text to an integer, the same in every process and every version of Python."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def standard_library() -> Iterator[Piece]:
    """Yield docstrings and function bodies of the running Python's standard library, by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not (SKIPPED | NOT_EVERYWHERE).isdisjoint(parts) or parts[0].startswith(
            ("config-", "_sysconfigdata")
        ):
            continue
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 30:
                yield Piece(parts[0], "text", docstring)
            body = node.body[1:] if docstring else node.body
            if body and not isinstance(node, ast.ClassDef):
                code = "\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno])
                if len(code) >= 40 and "#" not in code and '"""' not in code:
                    yield Piece(parts[0], "code", code)


def split(pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Divide pieces into (not held out, held out), with one piece per key.

    A piece that is not held out, but has the key of a held-out piece, is in neither part.
    """
    held_out = {piece.key: piece for piece in pieces if piece.is_held_out}
    others = {
        piece.key: piece for piece in pieces if not piece.is_held_out and piece.key not in held_out
    }
    return list(others.values()), list(held_out.values())


def examples(pieces: list[Piece], count: int) -> list[dict[str, str]]:
    """Draw `count` examples by the hash of their text, the same number for each label."""
    drawn = sorted(pieces, key=lambda piece: hashed(piece.key))
    by_label = [
        [piece for piece in drawn if piece.label == label][: count // len(LABELS)]
        for label in LABELS
    ]
    return [
        {"text": p.opening, "label": p.label}
        for group in zip(*by_label, strict=True)
        for p in group
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for train.jsonl and validation.jsonl")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    others, held_out = split(list(standard_library()))
    for name, pieces, count in (
        ("train", others, NUM_TRAIN),
        ("validation", held_out, NUM_VALIDATION),
    ):
        lines = [json.dumps(example) + "\n" for example in examples(pieces, count)]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(lines)} examples")


if __name__ == "__main__":
    main()
