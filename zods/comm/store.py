"""Stores of short texts that ranks and replicas share, without a collective.

`Board` uses the process group's store, `connect_store` opens one between replicas.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist


class Board:
    """Short texts that any rank pins up and any rank reads, whatever their main threads do: keys of
    the process group's store.

    It has a connection of its own, since a thread that waits on one keeps it to itself. Where a
    launcher started the ranks, rank 0's process keeps the store: while that is stopped, every call
    blocks, and once it is gone, they raise RuntimeError.
    """

    def __init__(self) -> None:
        default: Any = dist.distributed_c10d._get_default_store()  # private; read in torch 2.13
        self._store = dist.PrefixStore("zods", default.clone())

    def pin(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def has(self, *keys: str) -> bool:
        """Whether all of them are pinned up."""
        return self._store.check(list(keys))

    def read(self, key: str) -> str | None:
        """The text, or None if nothing is pinned up there. Does not wait for it."""
        return self._store.get(key).decode() if self.has(key) else None

    def first(self, key: str) -> bool:
        """Whether nobody has asked this of `key` before, on any rank."""
        return self._store.add(key, 1) == 1


def connect_store(address: str, *, keeps: bool, seconds: float) -> Any:
    """A torch store at "host:port", kept by this process or another one's.

    Raises ValueError where that fails.
    """
    host, _, port = address.rpartition(":")
    try:
        return dist.TCPStore(
            host,
            int(port),
            is_master=keeps,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=seconds),
        )
    except (RuntimeError, OSError) as error:
        what = "kept" if keeps else f"reached within {seconds:g} s"
        raise ValueError(
            f"zeroth_order.replicas.store: no store can be {what} at {address} "
            f"({str(error).splitlines()[0]})."
        ) from None
