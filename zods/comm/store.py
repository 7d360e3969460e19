"""Short texts that the ranks share through the process group's store, without a collective."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class Board:
    """Short texts that any thread of a rank writes and reads: keys in the process group's store.

    Each Board has a connection of its own, because a thread that waits on a connection blocks it
    for others. Where a launcher started the ranks, rank 0's process keeps the store: while that
    process is stopped, every call blocks; once it is gone, calls raise RuntimeError.
    """

    def __init__(self) -> None:
        default: Any = dist.distributed_c10d._get_default_store()  # private; read in torch 2.13
        self._store = dist.PrefixStore("zods", default.clone())

    def pin(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def has(self, *keys: str) -> bool:
        """Whether all keys are set."""
        return self._store.check(list(keys))

    def read(self, key: str) -> str | None:
        """The text of a key; None if it is not set. Does not wait."""
        return self._store.get(key).decode() if self.has(key) else None

    def first(self, key: str) -> bool:
        """Whether this is the first call for `key` on any rank."""
        return self._store.add(key, 1) == 1
