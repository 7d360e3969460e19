"""The leading replica's side: who takes part, the sums of all, and the records.

A `Leader` lives on rank 0 of replica 0. Each connection has a thread, which hands messages over;
the main thread adds the sums, and the log's thread publishes records once they are on the disk. So
no replica ever applies a record that a restarted leader does not know.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from zods.comm.authenticated import Channel, Server
from zods.config.replicas_section import ReplicasConfig
from zods.core.ordered_sum import ordered_sum
from zods.training import replica_messages as messages
from zods.training.replica_messages import Member, Sums
from zods.trajectory.log import START, chained

logger = logging.getLogger(__name__)

LEADER = 0
BEAT_SECONDS = 1.0
BLOCK_BYTES = 2**16  # of records in one message, about
MOST_WAITING = 1000  # messages for a replica that does not read
QUIET_SECONDS = 3 * BEAT_SECONDS  # after which a new connection may take a replica's place
FAREWELL_SECONDS = 60.0  # at its end the leader waits at most so long for another to read on
# Records that the replicas which take part make, too, by how their JSON begins
MADE_BY_ALL = ('{"step":', '{"refresh":')


@dataclass(eq=False)
class Peer:
    """A connection of another replica.

    process: a random name of the replica's process. heard: when its last message came. post: its
    last sums. awaited_record: the number of the record it waits for. gone: the reason why the
    connection is lost.

    Messages are sent by a thread of the connection, so that a bad link holds up nobody else.
    """

    channel: Channel
    member: Member
    process: str
    heard: float = field(default_factory=time.monotonic)
    post: Sums | None = None
    awaited_record: int | None = None
    wants_to_join: bool = False
    has_said_bye: bool = False
    gone: str | None = None
    outgoing: queue.Queue[bytes | None] = field(default_factory=lambda: queue.Queue(MOST_WAITING))

    def send(self, message: bytes) -> None:
        """Queue a message. It is dropped where the connection is lost."""
        if self.gone is None:
            try:
                self.outgoing.put_nowait(message)
            except queue.Full:
                self.lose("it does not read")

    def lose(self, reason: str) -> None:
        """Give the connection up. Its receiving thread ends."""
        self.gone = self.gone or reason
        self.channel.close()

    def write(self) -> None:
        """Send what is queued, in a thread, until None is queued."""
        while (message := self.outgoing.get()) is not None:
            try:
                self.channel.send(message)
            except OSError as error:
                self.lose(str(error))
                return


class Leader:
    """members: the replicas that share a step's batch, this one first."""

    def __init__(self, config: ReplicasConfig, token: bytes, ranks: int) -> None:
        """Raises OSError where the address cannot be used."""
        self.members = [Member(LEADER, ranks)]
        self._config = config
        self._changed = threading.Condition()  # guards what follows
        self._peers: list[Peer] = []  # connected
        self._taking_part: dict[int, Peer] = {}  # by index; without those that were left out
        self._awaited_tag = ""
        self._awaited: set[Peer] = set()  # those whose sums with this tag are missing
        self._notified: list[Peer] = []  # of new records
        self._texts: list[str] = []
        self._heads: list[str] = []
        self._has_log = self._closes = False
        self._num_requests = 0  # for records
        self._sent_before = 0  # bytes, on connections that are lost
        self._ended = threading.Event()
        self._server = Server(config.address, token, self._serve, silence=config.silence_timeout)
        threading.Thread(target=self._beat, name="zods-replicas-beat", daemon=True).start()

    @property
    def sent_bytes(self) -> int:
        with self._changed:
            return self._sent_before + sum(peer.channel.sent_bytes for peer in self._peers)

    # --- connections ------------------------------------------------------------------------------

    def _serve(self, channel: Channel, hello: bytes) -> None:
        """Receive a replica's messages, in its thread."""
        try:
            said = json.loads(hello)
            member = Member(int(said["replica"]), int(said["ranks"]))
            peer = Peer(channel, member, str(said["process"]))
            with self._changed:
                refused = self._refusal(peer, int(said["records"]), said["head"])
                again = said["records"] > 0 and not self._has_log
                # before it is in the list, whose peers are sent beats
                channel.send(json.dumps({"refused": refused, "again": again}).encode())
                if not refused and not again:
                    self._peers.append(peer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("replicas: a connection was closed: %s", error)
            return
        if refused or again:
            return
        threading.Thread(target=peer.write, name="zods-replicas-write", daemon=True).start()
        reason = "it sent nonsense"
        try:
            while not peer.has_said_bye:
                message = channel.receive()
                peer.heard = time.monotonic()
                self._take(peer, message)
            reason = "it left"
        except TimeoutError:
            reason = f"silent for {self._config.silence_timeout:g} s"
        except OSError as error:
            reason = str(error)
        except (ValueError, IndexError, struct.error):  # of a message that cannot be read
            pass
        finally:
            with self._changed:
                peer.lose(reason)
                self._sent_before += channel.sent_bytes
                self._peers.remove(peer)
                self._awaited.discard(peer)
                self._changed.notify_all()
            with contextlib.suppress(queue.Full):  # the thread ends at its next message
                peer.outgoing.put_nowait(None)

    def _refusal(self, new: Peer, number: int, head: str) -> str | None:
        """Why a replica with `number` records cannot be served; None where it can."""
        taken = new.member.replica == LEADER
        for peer in self._peers:
            if peer.member.replica == new.member.replica and peer.gone is None:
                quiet = time.monotonic() - peer.heard > QUIET_SECONDS
                if quiet or peer.process == new.process:
                    peer.lose("it connected again")
                else:
                    taken = True
        if taken:
            return "its index is another's; give each replica its own"
        if not self._has_log or not number:
            return None
        if number > len(self._heads) or self._heads[number - 1] != head:
            return "what it has applied is not in the leader's log"
        return None

    def _take(self, peer: Peer, message: bytes) -> None:
        kind = message[:1]
        if kind == messages.ASK:
            first, waits = messages.unpack_ask(message)
            with self._changed:
                self._num_requests += 1
                self._changed.notify_all()
                texts = self._block(first)
                if not texts and waits:
                    peer.awaited_record = first
                else:
                    peer.send(messages.pack_records(first, texts))
            return
        with self._changed:
            if kind in (messages.POST, messages.JOIN) and self._closes:
                peer.send(messages.OVER)
            elif kind == messages.POST and self._taking_part.get(peer.member.replica) is not peer:
                reason = "it was left out before"
                peer.send(messages.packed(messages.OUT, reason=reason, final=False))
            elif kind == messages.POST:
                peer.post = Sums.unpack(message)
                if peer.post.tag == self._awaited_tag:
                    self._awaited.discard(peer)
            elif kind == messages.JOIN:
                peer.wants_to_join = True
            elif kind == messages.BYE:
                peer.has_said_bye = True
            elif kind != messages.BEAT:
                raise ValueError(f"a message of an unknown kind {kind!r}")
            self._changed.notify_all()

    def _block(self, first: int) -> list[str]:
        texts: list[str] = []
        size = 0
        while first + len(texts) < len(self._texts) and size < BLOCK_BYTES:
            texts.append(self._texts[first + len(texts)])
            size += len(texts[-1])
        return texts

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._changed:
                peers = list(self._peers)
            for peer in peers:
                if peer.outgoing.empty():
                    peer.send(messages.BEAT)

    # --- records ----------------------------------------------------------------------------------

    def publish_log(self, texts: Sequence[str]) -> None:
        """Publish the records of a log that is continued, or none."""
        with self._changed:
            for text in texts:
                self._append(text)
            self._has_log = True
            self._answer_requests()

    def publish(self, text: str) -> None:
        """Publish a record that is on the disk. The first one is the log's header."""
        with self._changed:
            number = len(self._texts)
            self._append(text)
            shown = "" if text.startswith(MADE_BY_ALL) else text
            notice = messages.pack_notice(number, self._heads[-1], shown)
            for peer in self._notified:
                peer.send(notice)
            self._answer_requests()

    def _answer_requests(self) -> None:
        """Send records to those who wait for them."""
        for peer in self._peers:
            first = peer.awaited_record
            if first is not None and (texts := self._block(first)):
                peer.awaited_record = None
                peer.send(messages.pack_records(first, texts))

    def _append(self, text: str) -> None:
        self._texts.append(text)
        self._heads.append(chained(self._heads[-1] if self._heads else START, text))

    # --- sums -------------------------------------------------------------------------------------

    def sum(self, own: Sums, rows: int | None) -> Sums:
        """Add the sums of all who take part, and answer them.

        rows: as in `Replicas.sum`.
        """
        with self._changed:
            late = self._wait_for_posts(own.tag)
            present = {
                index: peer
                for index, peer in self._taking_part.items()
                if peer not in late and peer.gone is None
            }
            for index, peer in list(self._taking_part.items()):
                self._leave_out(index, peer, present, own.head)
            sums = [own.values, *(_post(peer).values for peer in present.values())]
            members = None
            if rows is not None:
                for index, peer in present.items():
                    if _post(peer).ends:
                        del self._taking_part[index]
                members = self._members_after(own, rows)
            changed = members if members != self.members else None
            answer = own._replace(values=_added(sums), members=changed)
            for peer in present.values():
                peer.send(answer.pack(messages.ANSWER))
            self._notified = list({*present.values(), *self._taking_part.values()})
            self.members = self.members if members is None else members
            return answer

    def _wait_for_posts(self, tag: str) -> set[Peer]:
        """Wait for the sums of those who take part. Returns the peers that are late."""
        self._awaited_tag = tag
        self._awaited = {
            peer
            for peer in self._taking_part.values()
            if peer.gone is None and (peer.post is None or peer.post.tag != tag)
        }
        self._changed.wait_for(lambda: not self._awaited, self._config.straggler_timeout)
        return self._awaited

    def _leave_out(self, index: int, peer: Peer, present: dict[int, Peer], head: str) -> None:
        """Take a replica that is gone, late or different out of those who take part."""
        limit = self._config.straggler_timeout
        if peer.gone is not None:
            reason, final = peer.gone, False
        elif index not in present:
            reason, final = f"its sums came later than the others' by {limit:g} s", False
        elif not head.startswith(_post(peer).head):
            reason, final = "what was applied differs from the leader's", True
        else:
            return
        present.pop(index, None)
        del self._taking_part[index]
        peer.wants_to_join = False
        logger.warning("replica %d: %s; it is left out", index, reason)
        peer.send(messages.packed(messages.OUT, reason=reason, final=final))

    def _members_after(self, own: Sums, rows: int) -> list[Member]:
        """Answer requests to join. Returns the members from the next step on."""
        stay = [self.members[0], *(peer.member for peer in self._taking_part.values())]
        if own.ends:
            return stay
        joined: list[Peer] = []
        for peer in [p for p in self._peers if p.wants_to_join and p.gone is None]:
            peer.wants_to_join = False
            ranks = sum(member.ranks for member in stay)
            if ranks + peer.member.ranks > rows:
                peer.send(
                    messages.packed(
                        messages.JOINED,
                        refused=f"{ranks} ranks share micro-batches of {rows} examples; "
                        f"{peer.member.ranks} more do not fit",
                    )
                )
                continue
            stay.append(peer.member)
            joined.append(peer)
        for peer in joined:
            self._taking_part[peer.member.replica] = peer
            peer.send(
                messages.packed(messages.JOINED, refused=None, step=int(own.tag) + 1, members=stay)
            )
            logger.info(
                "replica %d (%d ranks) takes part from step %d on", *peer.member, int(own.tag) + 1
            )
        return stay

    def close(self) -> None:
        """Wait until the others have read the last record, and stop listening."""
        with self._changed:
            self._closes = True
            for peer in self._peers:
                peer.send(messages.OVER)
            served = -1
            while self._peers and served != self._num_requests:  # another still reads records
                served = self._num_requests
                self._changed.wait_for(lambda: not self._peers, FAREWELL_SECONDS)
            peers = list(self._peers)
        self._ended.set()
        self._server.close()
        for peer in peers:
            peer.channel.close()


def _post(peer: Peer) -> Sums:
    assert peer.post is not None
    return peer.post


def _added(sums: Sequence[Sequence[float]]) -> list[float]:
    """Add in the order of the members, so that a repetition gives the same bits."""
    return [ordered_sum(values) for values in zip(*sums, strict=True)]
