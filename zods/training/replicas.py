"""Replicas: several DeepSpeed worlds that train one model together over any link.

Each replica holds the whole model, sharded over its own ranks, and evaluates its part of every
global batch. Only loss sums and records travel between replicas, through torch's TCP store.
Replica 0 leads. It keeps the store and the log, adds the sums that the others post, and publishes
every record. The others apply the published records, so all have the same bits.

A replica that starts late reads the log from the store, replays it, applies the records that are
published meanwhile, and takes part from the next step on. A replica that falls silent or leaves is
left out: the step then uses the sums of the others.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zods.comm.communicator import Communicator
from zods.comm.store import connect_store
from zods.config.schema import ReplicasConfig
from zods.trajectory.log import START, chained
from zods.trajectory.record_parser import record_of
from zods.trajectory.records import Record

logger = logging.getLogger(__name__)

LEADER = 0
BEAT_SECONDS = 1.0
POLL_SECONDS = 0.002
BLOCK = 1000  # records that are read from the store in one round trip
KEPT_SUMS = 1000  # in the store, for replicas that are late
FAREWELL_SECONDS = 60.0  # at its end the leader waits at most so long for the others to read


class Member(NamedTuple):
    """A replica that takes part. replica: its index. ranks: its number of ranks."""

    replica: int
    ranks: int


class Replicas:
    """This replica among the others. All ranks of a replica call its methods together; rank 0 uses
    the store.

    members: the replicas that take part in the current step, in the order in which their sums are
    added. All replicas have the same list.
    """

    def __init__(self, config: ReplicasConfig, comm: Communicator) -> None:
        """Raises ValueError, the same on all ranks, where the store cannot be reached, or cannot be
        kept at that address.
        """
        self.index, self._config, self._comm = config.index, config, comm
        self.members = [Member(LEADER, comm.world_size)] if self.leads else []
        self._store: Any = None
        self._num_records = 0  # records that were published or applied
        self._ahead: deque[str] = deque()  # on rank 0, records that were read and not applied yet
        # the number of this replica's request to join; at the leader, of the next one to answer
        self._ticket: int | None = None
        self._kept: deque[list[str]] = deque()
        self._beats: dict[int, tuple[bytes, float]] = {}  # replica -> the last beat seen, and when
        self._over = threading.Event()
        with comm.same_on_all_ranks():
            if comm.rank == 0:
                self._store = connect_store(
                    config.store, keeps=self.leads, seconds=config.silence_timeout
                )
        if comm.rank == 0 and not self.leads:
            threading.Thread(target=self._beat, name="zods-replica", daemon=True).start()

    @property
    def leads(self) -> bool:
        return self.index == LEADER

    @property
    def split(self) -> tuple[int, int]:
        """(index of this rank, number of ranks) among the ranks of all members."""
        before = sum(member.ranks for member in self.members[: self._index])
        return before + self._comm.rank, sum(member.ranks for member in self.members)

    @property
    def _index(self) -> int:
        return [member.replica for member in self.members].index(self.index)

    # --- sums -------------------------------------------------------------------------------------

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

        Raises RuntimeError, the same on all ranks, where the leader is gone or has refused this
        replica.
        """
        *own, leaving = self._comm.sum_over_ranks([*values, float(asked)])
        post = {"sums": own, "head": head, "leaving": leaving > 0}
        answer = self._from_rank_0(
            lambda: self._lead(post, tag, rows) if self.leads else self._ask(post, tag)
        )
        if str(self.index) in answer["refused"]:
            raise RuntimeError(
                f"replica {self.index}: {answer['refused'][str(self.index)]}. Start it again to "
                "join anew."
            )
        if rows is not None:
            self.members = [Member(*member) for member in answer["members"]]
        return answer["sums"], answer["stop"] or leaving > 0

    def _from_rank_0(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return rank 0's answer from the store on all ranks.

        Raises RuntimeError where the store is gone.
        """
        answer: dict[str, Any] = {}
        if self._comm.rank == 0:
            try:
                answer = make()
            except RuntimeError as error:  # torch raises it where the store does not answer
                answer = {"lost": str(error).splitlines()[0]}
        answer = json.loads(self._comm.broadcast_bytes(json.dumps(answer).encode()))
        if "lost" in answer:
            raise RuntimeError(
                f"replica {self.index}: the leading replica is gone ({answer['lost']}). Start that "
                "one again, then this one."
            )
        return answer

    def _ask(self, post: dict[str, Any], tag: str) -> dict[str, Any]:
        self._store.set(f"sums/{tag}/{self.index}", json.dumps(post))
        return self._awaited(f"sums/{tag}")

    def _awaited(self, key: str) -> Any:
        """Wait for a key that the leader sets."""
        while not self._store.check([key]):
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(key))

    def _lead(self, own: dict[str, Any], tag: str, rows: int | None) -> dict[str, Any]:
        posts, refused = {LEADER: own}, {}
        for member in self.members[1:]:
            post = self._posted(f"sums/{tag}/{member.replica}", member.replica)
            if post is None:
                refused[member.replica] = (
                    f"silent for {self._config.silence_timeout:g} s and left out"
                )
            elif post["head"] != own["head"]:
                refused[member.replica] = "what was applied differs from the leader's"
            else:
                posts[member.replica] = post
        for index, reason in refused.items():
            logger.warning("replica %d: %s", index, reason)
        present = [member for member in self.members if member.replica in posts]
        sums = [
            sum(values)
            for values in zip(*(posts[member.replica]["sums"] for member in present), strict=True)
        ]
        members = [m for m in present if m.replica == LEADER or not posts[m.replica]["leaving"]]
        if rows is not None:
            members += self._admitted(members, int(tag) + 1, rows)
        answer = {"sums": sums, "refused": refused, "members": members, "stop": own["leaving"]}
        self._store.set(f"sums/{tag}", json.dumps(answer))
        self._kept.append(
            [f"sums/{tag}", *(f"sums/{tag}/{member.replica}" for member in present[1:])]
        )
        if len(self._kept) > KEPT_SUMS:
            for key in self._kept.popleft():
                self._store.delete_key(key)
        return answer

    def _posted(self, key: str, index: int) -> dict[str, Any] | None:
        """Wait for a replica's sums; None if the replica falls silent or starts again."""
        while not self._store.check([key]):
            beat = self._store.get(f"beat/{index}") if self._store.check([f"beat/{index}"]) else b""
            if self._asks_anew(index):  # it was started again
                return None
            if index not in self._beats or self._beats[index][0] != beat:
                self._beats[index] = (beat, time.monotonic())
            elif time.monotonic() - self._beats[index][1] > self._config.silence_timeout:
                return None
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(key))

    def _asks_anew(self, index: int) -> bool:
        ticket = self._ticket or 0
        while self._store.check([f"asked/{ticket}"]):
            if json.loads(self._store.get(f"asked/{ticket}"))[0] == index:
                return True
            ticket += 1
        return False

    def _beat(self) -> None:
        store = self._store.clone()
        try:
            while not self._over.wait(BEAT_SECONDS):
                store.add(f"beat/{self.index}", 1)
        except RuntimeError:  # the store is gone; the main thread reports it
            return

    def _admitted(self, members: Sequence[Member], step: int, rows: int) -> list[Member]:
        """Answer requests to join. Returns the replicas that take part from `step` on."""
        new: list[Member] = []
        answers: dict[int, dict[str, Any]] = {}
        ticket = self._ticket or 0
        while self._store.check([f"asked/{ticket}"]):
            member = Member(*json.loads(self._store.get(f"asked/{ticket}")))
            taken = [*members, *new]
            ranks = sum(other.ranks for other in taken)
            if member.replica in [other.replica for other in taken]:
                answers[ticket] = {"refused": "its index is another's; give each replica its own"}
            elif ranks + member.ranks > rows:
                answers[ticket] = {
                    "refused": f"{ranks} ranks share micro-batches of {rows} examples; "
                    f"{member.ranks} more do not fit"
                }
            else:
                new.append(member)
                answers[ticket] = {"step": step}
                logger.info("replica %d (%d ranks) takes part from step %d on", *member, step)
            ticket += 1
        self._ticket = ticket
        # answered together, because each answer lists all members
        for number, answer in answers.items():
            self._store.set(
                f"joined/{number}",
                json.dumps({"refused": None, "members": [*members, *new], **answer}),
            )
        return new

    # --- records ----------------------------------------------------------------------------------

    def publish(self, text: str) -> None:
        """On the leader's rank 0, publish a record. The first one is the log's header."""
        self._store.set(f"record/{self._num_records}", text)
        self._num_records += 1
        self._store.set("records", json.dumps(self._num_records))

    def next_record(self) -> Record:
        """Wait for the next record that this replica is to apply."""
        record = self._from_rank_0(lambda: self._awaited(f"record/{self._num_records}"))
        self._num_records += 1
        return record_of(record)

    # --- joining and leaving ----------------------------------------------------------------------

    def read_log(self) -> bytes:
        """Read the leader's log, on all ranks."""

        def read() -> dict[str, Any]:
            number = self._awaited("records")
            return {"texts": self._records(0, number)}

        head, lines = START, []
        for text in self._from_rank_0(read)["texts"]:
            head = chained(head, text)
            lines.append(f"{head} {text}\n")
        self._num_records = len(lines)
        return "".join(lines).encode()

    def _records(self, first: int, end: int) -> list[str]:
        """The JSON of records `first` to `end` - 1, which are published; on rank 0."""
        texts: list[str] = []
        for start in range(first, end, BLOCK):
            keys = [f"record/{k}" for k in range(start, min(end, start + BLOCK))]
            texts += [text.decode() for text in self._store.multi_get(keys)]
        return texts

    def to_catch_up(self, step: int) -> Record | None:
        """The next record to apply after `step` steps; None when this replica takes part from `step`
        on.

        When there is no further record, the replica asks to join. Raises ValueError where the
        leader refuses.
        """

        def look() -> dict[str, Any]:
            while True:
                # once it has asked to join, the answer comes before further records
                if self._ahead and self._ticket is None:
                    return {"record": json.loads(self._ahead.popleft())}
                joined = f"joined/{self._ticket}"
                if self._ticket is not None and self._store.check([joined]):
                    answer = json.loads(self._store.get(joined))
                    if answer["refused"] or answer["step"] == step:
                        return answer
                if not self._ahead:
                    published = self._awaited("records")
                    self._ahead += self._records(
                        self._num_records, min(published, self._num_records + BLOCK)
                    )
                if self._ahead:
                    return {"record": json.loads(self._ahead.popleft())}
                if self._ticket is None:
                    self._ticket = self._store.add("asking", 1) - 1
                    self._store.set(
                        f"asked/{self._ticket}", json.dumps([self.index, self._comm.world_size])
                    )
                time.sleep(POLL_SECONDS)

        answer = self._from_rank_0(look)
        if "record" in answer:
            self._num_records += 1
            return record_of(answer["record"])
        if answer["refused"]:
            raise ValueError(f"zeroth_order.replicas: replica {self.index}: {answer['refused']}.")
        self.members = [Member(*member) for member in answer["members"]]
        return None

    def close(self) -> None:
        """Leave. The leader, which keeps the store, waits until the others have read the last
        record.
        """
        self._over.set()
        if self._comm.rank != 0:
            return
        try:
            if not self.leads:
                self._store.set(f"done/{self.index}", "")
                return
            deadline = time.monotonic() + FAREWELL_SECONDS
            waiting = [f"done/{member.replica}" for member in self.members[1:]]
            while waiting and not self._store.check(waiting) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        except RuntimeError:  # the store is gone already
            return
