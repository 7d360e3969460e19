"""A digest of the sources of zods, which hosts and ranks compare. It imports nothing that takes time."""

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def package_digest() -> str:
    """The digest of all files in Python and C++."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cpp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
