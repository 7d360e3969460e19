"""Replicas: several DeepSpeed worlds that train one model together over any link.

Each replica holds the whole model, sharded over its own ranks, and evaluates its part of every
global batch. Replica 0 leads: it adds the loss sums that the others send, and keeps the log. All
combine the same sums into the same record, and apply it once it is on the leader's disk. So all
have the same bits, and a leader that is started again knows every record that another has applied.

A replica that starts late reads the log, replays it, applies the records that are made meanwhile,
and takes part from the next step on. A replica that is silent, later than `straggler_timeout`, or
gone, is left out, and the step uses the sums of the others. One that was left out, or lost the
leader, catches up in the same way without a restart.

Messages are authenticated by the run's token, see `zods.comm.authenticated`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from zods.comm.authenticated import read_token
from zods.comm.communicator import Communicator
from zods.config.replicas_section import ReplicasConfig
from zods.training.replica_follower import Follower, Lost, Refused
from zods.training.replica_leader import LEADER, Leader
from zods.training.replica_messages import Member, Sums
from zods.trajectory.log import START, Trajectory, chained, text_of
from zods.trajectory.record_parser import record_of
from zods.trajectory.records import Record

logger = logging.getLogger(__name__)


class LeftOut(Exception):
    """This replica does not take part in the step under way. Raised on all its ranks."""


class SharedSelection:
    """The replicas as a selector needs them, see `zods.selection.measurement.Sharing`.

    A selection is made while a batch is loaded. Where this replica is left out meanwhile, the
    loader gives any batch, and `left_out` has the reason until the engine drops the step.
    """

    def __init__(self, replicas: Replicas, trajectory: Trajectory) -> None:
        self._replicas, self._trajectory = replicas, trajectory
        self.left_out: str | None = None

    @property
    def split(self) -> tuple[int, int]:
        return self._replicas.split

    def sum(self, values: Sequence[float], what: str) -> list[float] | None:
        if self.left_out is None:
            try:
                return self._replicas.sum(values, what, self._trajectory.head)[0]
            except LeftOut as left:
                self.left_out = str(left)
        return None


class Replicas:
    """This replica among the others. All ranks of a replica call its methods together; rank 0 has
    the connections.

    members: the replicas that take part in the current step, in the order in which their sums are
    added. All replicas have the same list.
    """

    def __init__(self, config: ReplicasConfig, comm: Communicator) -> None:
        """Raises ValueError, the same on all ranks, where the token is missing, or the leader cannot
        be reached, or its address cannot be used.
        """
        self.index, self._config, self._comm = config.index, config, comm
        self.members = [Member(LEADER, comm.world_size)] if self.leads else []
        self._leader: Leader | None = None
        self._follower: Follower | None = None
        self._num_records = 0  # that were applied
        self._counted_bytes = 0
        with comm.same_on_all_ranks():
            if comm.rank == 0:
                self._open(config)

    def _open(self, config: ReplicasConfig) -> None:
        token = read_token(config.token_file)
        try:
            if self.leads:
                self._leader = Leader(config, token, self._comm.world_size)
            else:
                self._follower = Follower(config, token, self._comm.world_size)
        except OSError as error:
            what = (
                "the leading replica cannot listen"
                if self.leads
                else f"no leading replica can be reached within {config.leader_timeout:g} s"
            )
            raise ValueError(
                f"zeroth_order.replicas.store: {what} at {config.store} ({error}). Give an address "
                "of the leading replica's host, with a free port."
            ) from None
        except ValueError as error:
            raise ValueError(f"zeroth_order.replicas: replica {self.index}: {error}.") from None

    def stop_where(self, asked: Callable[[], bool]) -> None:
        """Wait for the leader no longer where `asked` returns True on rank 0."""
        if self._follower is not None:
            self._follower.asked = asked

    @property
    def leads(self) -> bool:
        return self.index == LEADER

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to other replicas, without the headers of TCP and IP."""
        end = self._leader or self._follower
        return 0 if end is None else end.sent_bytes

    @property
    def split(self) -> tuple[int, int]:
        """(index of this rank, number of ranks) among the ranks of all members."""
        before = sum(member.ranks for member in self.members[: self._position])
        return before + self._comm.rank, sum(member.ranks for member in self.members)

    @property
    def _position(self) -> int:
        return [member.replica for member in self.members].index(self.index)

    # --- a step -----------------------------------------------------------------------------------

    def sum(
        self,
        values: Sequence[float],
        tag: str,
        head: str,
        *,
        asked: bool = False,
        rows: int | None = None,
    ) -> tuple[list[float], bool]:
        """Sum values over the ranks of all members. Returns (sums, whether this replica ends after
        this step).

        tag: the name of this sum; the step for a step's losses. head: the head of this replica's
        chain, which must be the leader's. asked: whether this rank was asked to stop; where the
        leader was asked, all replicas end. rows: examples of a micro-batch over all ranks; each
        rank needs one. It is given where members may join or leave after this sum.

        Raises, the same on all ranks, LeftOut, and ValueError where the leader refuses this replica.
        """
        *own, leaving = self._comm.sum_over_ranks([*values, float(asked)])
        post = Sums(tag, head, leaving > 0, own)

        def add() -> dict[str, Any]:
            if self._leader is not None:
                return self._leader.sum(post, rows)._asdict()
            assert self._follower is not None
            return self._follower.sum(post)._asdict()

        answer = self._from_rank_0(add)
        self._count_bytes()
        if answer["members"] is not None:
            self.members = [Member(*member) for member in answer["members"]]
        return answer["values"], answer["ends"] or leaving > 0

    def _count_bytes(self) -> None:
        sent = self.sent_bytes
        self._comm.scalar_bytes += sent - self._counted_bytes
        self._counted_bytes = sent

    def _from_rank_0(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return rank 0's answer on all ranks. Raises LeftOut or ValueError."""
        answer: dict[str, Any] = {}
        if self._comm.rank == 0:
            try:
                answer = make()
            except Lost as lost:
                answer = {"lost": str(lost)}
            except Refused as refused:
                answer = {"refused": str(refused)}
        answer = json.loads(self._comm.broadcast_bytes(json.dumps(answer).encode()))
        if "lost" in answer:
            raise LeftOut(answer["lost"])
        if "refused" in answer:
            raise ValueError(
                f"zeroth_order.replicas: replica {self.index}: {answer['refused']}. Start it again "
                "to join anew."
            )
        return answer

    def next_record(self, own: Record, head: str) -> Record:
        """Wait until the next record is in the leader's log, and return it.

        own: the record that this replica made. head: of the chain before it. Raises LeftOut or
        ValueError.
        """

        def read() -> dict[str, Any]:
            assert self._follower is not None
            after = chained(head, text_of(own))
            return {"text": self._follower.next_record(self._num_records, after)}

        text = self._from_rank_0(read)["text"]
        self._num_records += 1
        return own if text is None else record_of(json.loads(text))

    # --- the log ----------------------------------------------------------------------------------

    def publish_log(self, texts: Sequence[str]) -> None:
        """On the leader's rank 0, publish the JSON of the records that its log has already."""
        assert self._leader is not None
        self._leader.publish_log(texts)

    def publish(self, text: str) -> None:
        """On the leader's rank 0, publish the JSON of a record that is on the disk. The first one
        is the log's header. Any thread may call it.
        """
        assert self._leader is not None
        self._leader.publish(text)

    def read_log(self) -> bytes:
        """Read the leader's log, on all ranks. Raises ValueError."""

        def read() -> dict[str, Any]:
            assert self._follower is not None
            return {"texts": self._follower.read_records()}

        head, lines = START, []
        for text in self._from_rank_0(read)["texts"]:
            head = chained(head, text)
            lines.append(f"{head} {text}\n")
        self._num_records = len(lines)
        return "".join(lines).encode()

    def to_catch_up(self, step: int, head: str) -> Record | None:
        """The next record to apply after `step` steps; None when this replica takes part from `step`
        on. It is also None where the leader makes no further step, or this replica was asked to
        stop: `members` is then empty.

        head: of the chain of records so far. Raises ValueError where the leader refuses this
        replica, or is gone.
        """

        def read() -> dict[str, Any]:
            assert self._follower is not None
            return self._follower.next_event(step, self._num_records, head)

        answer = self._from_rank_0(read)
        if "record" in answer:
            self._num_records += 1
            return record_of(json.loads(answer["record"]))
        self.members = [Member(*member) for member in answer.get("members", [])]
        return None

    def close(self) -> None:
        """Leave. The leader waits until the others have read the last record."""
        end = self._leader or self._follower
        if end is not None:
            end.close()
