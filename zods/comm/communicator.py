"""The collectives of zods. Only this folder calls torch.distributed.

A step sends one small vector of float64 per rank (loss sums and counts). Up to 16 ranks every rank
gathers all of them and adds in rank order; more ranks do so in groups, see `zods.comm.rank_groups`.
So all ranks compute the same bits. Shards of a stored anchor point travel like a ZeRO-3 gather and
are counted apart.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from zods.comm.rank_groups import rank_groups
from zods.comm.store import Board


class Disagreement(RuntimeError):
    """Ranks that must agree differ: in their configuration, model, data, or updates."""


class RankFailure(RuntimeError):
    """An exception of some ranks, raised on all of them. rank: the first that failed.

    On that rank the exception is the cause.
    """

    def __init__(self, rank: int, described: str) -> None:
        self.rank = rank
        super().__init__(f"rank {rank}: {described}")


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that another rank, or rank 0's store, has ended.

    Gloo (torch 2.13) raises a plain RuntimeError then, e.g. "Connection closed by peer".
    """
    return isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or (
        isinstance(error, RuntimeError) and "by peer" in str(error)
    )


def is_connected() -> bool:
    """Whether this process is one of the ranks of a process group."""
    return dist.is_initialized()


class _Group(NamedTuple):
    """Ranks that gather numbers among themselves: with torch, or with MPI where that is in use.

    torch: None for the default process group.
    """

    size: int
    torch: dist.ProcessGroup | None = None
    mpi: Any = None


class Communicator:
    """The ranks of the default process group, with counters of the bytes that this rank sends.

    scalar_bytes: loss scalars and agreement checks. gather_bytes: shards of the anchor point.
    selection_bytes: candidates' features and gains. A rank that contributes b bytes to an
    all-gather of n ranks is counted with b * (n - 1).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()
        self.scalar_bytes = 0
        self.gather_bytes = 0
        self.selection_bytes = 0
        self._mpi: Any = None
        self._groups: list[_Group] = []

    def use_mpi(self) -> None:
        """Send numbers through MPI from now on, in host memory: no stream of a GPU waits for them.

        Tensors of the model's size still go through torch. Raises ValueError where the ranks were
        not started by mpirun, or where mpi4py is missing.
        """
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise ValueError(
                f'zeroth_order.comm: "mpi" needs mpi4py ({error}). Install it, or use "torch".'
            ) from None
        world = MPI.COMM_WORLD
        if (world.Get_size(), world.Get_rank()) != (self.world_size, self.rank):
            raise ValueError(
                f'zeroth_order.comm: "mpi", but MPI has {world.Get_size()} ranks and torch '
                f'{self.world_size}. Start the ranks by mpirun (launch/mpirun.sh), or use "torch".'
            )
        self._mpi = world
        self._groups = []  # of torch

    @property
    def _all(self) -> _Group:
        return _Group(self.world_size, mpi=self._mpi)

    def _own_groups(self) -> list[_Group]:
        """This rank's group of each level of `rank_groups`, from the lowest to the last level that
        it is in. Collective: the first call makes the groups.
        """
        if not self._groups:
            levels = rank_groups(self.world_size)
            self._groups = [self._all] if len(levels) == 1 else self._made(levels)
        return self._groups

    def _made(self, levels: Sequence[Sequence[range]]) -> list[_Group]:
        """Make the groups of all levels, on all ranks. Returns those of this rank."""
        own = []
        for groups in levels:
            number = next((k for k, ranks in enumerate(groups) if self.rank in ranks), len(groups))
            mpi, of_torch = None, []
            if self._mpi is None:  # every rank makes every group, as torch demands
                of_torch = [dist.new_group(list(ranks)) for ranks in groups]
            else:
                mpi = self._mpi.Split(number, self.rank)
            if number < len(groups):
                made = None if mpi is not None else of_torch[number]
                own.append(_Group(len(groups[number]), made, mpi))
        return own

    def _gather_numbers(
        self, values: Sequence[Any], dtype: torch.dtype, group: _Group | None = None
    ) -> list[list[Any]]:
        """The values of each rank of a group, as many on all of them, in rank order."""
        group = group or self._all
        if group.size == 1:
            return [torch.tensor(values, dtype=dtype).tolist()]
        if group.mpi is None:
            local = torch.tensor(values, dtype=dtype, device=self.device)
            return self._all_gather(local, group).tolist()
        gathered = torch.empty(group.size, len(values), dtype=dtype)
        group.mpi.Allgather(torch.tensor(values, dtype=dtype).numpy(), gathered.numpy())
        return gathered.tolist()

    def _all_gather(self, local: torch.Tensor, group: _Group | None = None) -> torch.Tensor:
        """Gather `local`, 1-D and of the same size on all ranks of the group, as (size, numel)."""
        group = group or self._all
        if group.size == 1:
            return local.unsqueeze(0)
        gathered = torch.empty(group.size, local.numel(), dtype=local.dtype, device=local.device)
        dist.all_gather(list(gathered), local, group=group.torch)
        return gathered

    def _combined(
        self,
        values: Sequence[Any],
        dtype: torch.dtype,
        combine: Callable[[Sequence[Any]], Any],
    ) -> list[Any]:
        """Combine each of the values over the ranks, group by group.

        values: numbers of 8 bytes. combine: maps the values of some ranks, in rank order, to one.
        """
        combined = list(values)

        def gather(group: _Group) -> list[list[Any]]:
            self.scalar_bytes += 8 * len(values) * (group.size - 1)
            return self._gather_numbers(combined, dtype, group)

        own = self._own_groups()
        for group in own:
            combined = [combine(of_value) for of_value in zip(*gather(group), strict=True)]
        num_levels = len(rank_groups(self.world_size))
        for group in reversed(own[: num_levels - 1]):
            combined = gather(group)[0]  # its first rank has the total
        return combined

    def numbers(self, values: torch.Tensor) -> list[float]:
        """Read a tensor's numbers.

        On a GPU this waits for the device, and so for the other ranks of its pending collectives.
        """
        return values.tolist()

    def gather_scalars(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, in rank order, as float64.

        `values` has the same length on all ranks. The bytes grow with the number of ranks.
        """
        self.scalar_bytes += 8 * len(values) * (self.world_size - 1)
        return self._gather_numbers(values, torch.float64)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks in float64: the same bits on every rank.

        Up to 16 ranks are added in rank order. Of more ranks, those of a group are added in rank
        order, and then the sums of the groups.
        """
        return self._combined(values, torch.float64, _sum_in_order)

    def max_over_ranks(self, value: float) -> float:
        """The largest value of a rank, as float64."""
        return self._combined([value], torch.float64, max)[0]

    def gather_shards(self, local: torch.Tensor) -> torch.Tensor:
        """Concatenate all ranks' shards in rank order. `local` is 1-D and padded to the same size
        on all ranks.
        """
        self.gather_bytes += local.nbytes * (self.world_size - 1)
        return self._all_gather(local).view(-1)

    def gather_rows(self, local: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order; they differ in dim 0 only, which may be 0."""
        sizes = [size for (size,) in self._gather_numbers([len(local)], torch.int64)]
        row_bytes = local.element_size() * local.shape[1:].numel()
        padded = torch.zeros(max(sizes) * row_bytes, dtype=torch.uint8, device=self.device)
        mine = local.to(self.device).contiguous().view(-1).view(torch.uint8)
        padded[: mine.numel()] = mine
        self.selection_bytes += (8 + padded.numel()) * (self.world_size - 1)
        gathered = self._all_gather(padded) if max(sizes) else padded.expand(self.world_size, -1)
        return [
            row[: size * row_bytes].clone().view(local.dtype).view(size, *local.shape[1:])
            for row, size in zip(gathered, sizes, strict=True)
        ]

    def gather_integers(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values, in rank order.

        `values`, of 64 bits, has the same length on all ranks.
        """
        self.selection_bytes += 8 * len(values) * (self.world_size - 1)
        return self._gather_numbers(values, torch.int64)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, of any type that can be pickled, in rank order."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's `data`, on all ranks."""
        if self.world_size == 1:
            return data
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, 0)
        sent = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else sent)
        dist.broadcast(sent, 0)
        return sent.cpu().numpy().tobytes()

    def board(self) -> Board:
        """A new connection to the ranks' board, which works without collectives. For one thread."""
        return Board()

    def check_agreement(self, digest: bytes, what: str) -> None:
        """Raise Disagreement on every rank, naming those that differ from rank 0, unless all
        digests are equal.
        """
        short = int.from_bytes(hashlib.blake2b(digest, digest_size=7).digest(), "little")
        if self._combined([short], torch.int64, _common) != [DIFFERENT]:
            return
        values, hosts = zip(*self.gather_objects((short, socket.gethostname())), strict=True)
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        several = len(set(hosts)) > 1
        named = [f"{rank} (on {hosts[rank]})" if several else str(rank) for rank in odd]
        raise Disagreement(
            f"rank {', '.join(named)}: {what} differs from rank 0's. The run stops here."
        )

    @contextmanager
    def same_on_all_ranks(self) -> Iterator[None]:
        """Run a block that may fail on some ranks only, and raise on all ranks if it does.

        A ValueError or OSError, which is meant for the user, is raised on all ranks. Its message
        names the rank if not all ranks failed. Any other exception is raised as it is if all ranks
        raised it, and as a `RankFailure` otherwise. The block itself must not communicate.
        """
        failure: BaseException | None = None
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            failure = error
        failures = self.gather_objects(None if failure is None else _described(failure))
        failing = [rank for rank, found in enumerate(failures) if found is not None]
        if not failing:
            return
        first = failing[0]
        kind, text = failures[first]
        on_all = failures.count(failures[first]) == self.world_size
        if kind in _FOR_USERS:
            raise _FOR_USERS[kind](text if on_all else f"rank {first}: {text}") from None
        if failure is not None and (on_all or not isinstance(failure, Exception)):
            raise failure
        summary = next(iter(text.strip().splitlines()), "")
        raise RankFailure(first, f"{kind}: {summary}") from (
            failure if first == self.rank else None
        )


DIFFERENT = -1  # no digest


def _common(values: Sequence[int]) -> int:
    """The value of all, or DIFFERENT."""
    return values[0] if len(set(values)) == 1 else DIFFERENT


def _sum_in_order(values: Sequence[float]) -> float:
    # `sum` compensates its rounding from Python 3.12 on, and would give other bits there
    total = 0.0
    for value in values:
        total += value
    return total


_FOR_USERS = {"FileNotFoundError": FileNotFoundError, "OSError": OSError, "ValueError": ValueError}


def _described(error: BaseException) -> tuple[str, str]:
    """(type, text) of an exception, to be sent to other ranks. The type is the nearest one that is
    meant for users, else the exception's own.
    """
    kind = next(
        (name for name, known in _FOR_USERS.items() if isinstance(error, known)),
        type(error).__name__,
    )
    return kind, str(error)
