"""The side of a replica that follows the leading one. A `Follower` lives on its rank 0."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from zods.comm.authenticated import Channel, connect
from zods.config.replicas_section import ReplicasConfig
from zods.training import replica_messages as messages
from zods.training.replica_leader import BEAT_SECONDS
from zods.training.replica_messages import Sums
from zods.trajectory.log import START

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


class Lost(Exception):
    """This replica does not take part any more, and can catch up.

    connected: whether the connection to the leader is still there.
    """

    def __init__(self, reason: str, *, connected: bool) -> None:
        super().__init__(reason)
        self.connected = connected


class NotReady(ConnectionError):
    """The leader lives, and has not read its log yet."""


class Refused(Exception):
    """The leader refuses this replica, or is gone for longer than `leader_timeout`."""


class Follower:
    """The connection of a replica's rank 0 to the leader.

    asked: whether this replica was asked to stop; it then waits for the leader no longer.
    """

    def __init__(self, config: ReplicasConfig, token: bytes, ranks: int) -> None:
        """Raises ValueError where the leader refuses this replica, OSError where it cannot be
        reached within `leader_timeout`.
        """
        self.asked: Callable[[], bool] = lambda: False
        self._is_catching_up = False
        self._config, self._token = config, token
        self._hello = {"replica": config.index, "ranks": ranks, "process": secrets.token_hex(8)}
        self._ahead: deque[str] = deque()  # records that were read and not applied yet
        self._channel: Channel
        self._inbox: queue.SimpleQueue[bytes | OSError]
        self._over = threading.Event()
        self._sent_before = 0  # bytes, on connections that were lost
        try:
            self._connect_within(config.leader_timeout, 0, START)
        except Refused as error:
            raise ValueError(str(error)) from None
        threading.Thread(target=self._beat, name="zods-replicas-beat", daemon=True).start()

    # --- the connection ---------------------------------------------------------------------------

    def _connect(self, number: int, head: str, seconds: float) -> None:
        """Connect with `number` records applied. Raises OSError, or Refused."""
        hello = json.dumps({**self._hello, "records": number, "head": head}).encode()
        channel, answer = connect(
            self._config.address,
            self._token,
            hello,
            seconds=seconds,
            silence=self._config.silence_timeout,
        )
        said = json.loads(answer)
        if said["refused"]:
            channel.close()
            raise Refused(said["refused"])
        if said["again"]:
            channel.close()
            raise NotReady("the leading replica is not ready yet")
        self._channel, self._inbox = channel, queue.SimpleQueue()
        self._ahead.clear()
        self._asks = self._has_asked_to_join = self._is_over = False
        self._joined: dict[str, Any] | None = None
        threading.Thread(
            target=_receive, args=(channel, self._inbox), name="zods-replicas", daemon=True
        ).start()

    def _reconnect(self, number: int, head: str, reason: Lost) -> None:
        """Wait for the leader. Raises Refused."""
        self._sent_before += self._channel.sent_bytes
        self._channel.close()
        limit = self._config.leader_timeout
        logger.warning(
            "replica %d: the connection to the leading replica is lost (%s); waiting up to %g s "
            "for it",
            *(self._config.index, reason, limit),
        )
        try:
            self._connect_within(limit, number, head)
        except OSError as error:
            raise Refused(
                f"the leading replica is gone for {limit:g} s ({error}); see "
                "zeroth_order.replicas.leader_timeout"
            ) from None

    def _connect_within(self, seconds: float, number: int, head: str) -> None:
        """Try to connect, again and again. Raises the last OSError, or Refused."""
        deadline, said = time.monotonic() + seconds, ""
        while True:
            left = max(deadline - time.monotonic(), RETRY_SECONDS)
            try:
                self._connect(number, head, min(left, self._config.silence_timeout))
                return
            except OSError as error:
                if isinstance(error, NotReady):
                    deadline = time.monotonic() + seconds
                if time.monotonic() + RETRY_SECONDS > deadline or self.asked():
                    raise
                if str(error) != said:
                    said = str(error)
                    logger.warning(
                        "replica %d: no leading replica yet: %s", self._config.index, said
                    )
                time.sleep(RETRY_SECONDS)

    @property
    def sent_bytes(self) -> int:
        return self._sent_before + self._channel.sent_bytes

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._channel.send(messages.BEAT)
            except OSError:  # the main thread connects again
                continue

    def _send(self, message: bytes) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise Lost(str(error), connected=False) from None

    def _next(self) -> bytes:
        """Wait for a message. Raises Lost, or Refused."""
        message: bytes | OSError | None = None
        while message is None:
            with contextlib.suppress(queue.Empty):
                message = self._inbox.get(timeout=RETRY_SECONDS)
            if message is None and self._is_catching_up and self.asked():
                raise Lost("it was asked to stop", connected=True)
        if isinstance(message, OSError):
            self._inbox.put(message)  # for the next call
            silent = f"silent for {self._config.silence_timeout:g} s"
            reason = silent if isinstance(message, TimeoutError) else str(message)
            raise Lost(reason, connected=False)
        if message[:1] == messages.OUT:
            said = messages.unpacked(message)
            self._has_asked_to_join, self._joined = False, None
            if said["final"]:
                raise Refused(said["reason"])
            raise Lost(said["reason"], connected=True)
        return message

    # --- a step -----------------------------------------------------------------------------------

    def sum(self, own: Sums) -> Sums:
        """Send sums, and wait for those of all."""
        self._send(own.pack(messages.POST))
        while True:
            message = self._next()
            if message[:1] == messages.ANSWER and (answer := Sums.unpack(message)).tag == own.tag:
                return answer
            self._check_not_over(message)

    def _check_not_over(self, message: bytes) -> None:
        if message[:1] == messages.OVER:
            self._is_over = True
            raise Lost("the leading replica ends", connected=True)

    def next_record(self, number: int, head: str) -> str | None:
        """Wait until record `number` is in the leader's log. Returns its JSON; None where the chain
        with it has the head `head`.
        """
        while not self._ahead:
            message = self._next()
            if message[:1] == messages.RECORDS:
                self._take_records(message, number)
            elif message[:1] == messages.NOTICE:
                noticed, after, text = messages.unpack_notice(message)
                if noticed < number:
                    continue
                if noticed == number and (text or head.startswith(after)):
                    return text or None
                self._ask(number, waits=False)
            self._check_not_over(message)
        return self._ahead.popleft()

    # --- catching up ------------------------------------------------------------------------------

    def next_event(self, step: int, number: int, head: str) -> dict[str, Any]:
        """Wait for what comes next for a replica that does not take part.

        step: the number of steps that were made. number, head: of records, and of their chain.
        Returns "record" (the JSON of the next one), "members" (this replica takes part with them
        from this step on) or "over" (the leader makes no further step, or this replica was asked to
        stop). Raises Refused.
        """
        self._is_catching_up = True
        try:
            while not self.asked():
                try:
                    return self._next_event(step, number)
                except Lost as lost:
                    if not lost.connected:
                        self._reconnect(number, head, lost)
        except Refused:
            if not self.asked():
                raise
        finally:
            self._is_catching_up = False
        return {"over": True}

    def _next_event(self, step: int, number: int) -> dict[str, Any]:
        while True:
            joined = self._joined
            if joined is not None and (joined["refused"] or joined["step"] == step):
                self._joined, self._has_asked_to_join, self._asks = None, False, False
                if joined["refused"]:
                    raise Refused(joined["refused"])
                return {"members": joined["members"]}
            if self._ahead:
                return {"record": self._ahead.popleft()}
            if not self._asks:
                self._ask(number, waits=self._has_asked_to_join and not self._is_over)
            message = self._next()
            kind = message[:1]
            if kind == messages.RECORDS:
                self._take_records(message, number)
                if self._ahead or self._asks:
                    continue
                if self._is_over:
                    return {"over": True}
                if not self._has_asked_to_join:
                    self._send(messages.JOIN)
                    self._has_asked_to_join = True
            elif kind == messages.JOINED:
                self._joined = messages.unpacked(message)
            elif kind == messages.OVER:
                # it asks once more, because there may be a further record
                self._is_over, self._asks = True, False

    def read_records(self) -> list[str]:
        """All records that the leader has, at least one, the log's header first. Raises Refused."""
        while True:
            try:
                return self._read_records()
            except Lost as lost:
                self._reconnect(0, START, lost)

    def _read_records(self) -> list[str]:
        texts: list[str] = []
        self._ask(0, waits=True)
        while True:
            message = self._next()
            if message[:1] != messages.RECORDS:
                continue
            first, *found = messages.unpacked(message)
            if first != len(texts):
                continue
            if not found:
                self._asks = False
                return texts
            texts += found
            # the header is followed by the record of the run
            self._ask(len(texts), waits=len(texts) < 2)

    def _ask(self, number: int, *, waits: bool) -> None:
        self._send(messages.pack_ask(number, waits))
        self._asks = True

    def _take_records(self, message: bytes, number: int) -> None:
        """Keep records, unless they answer a request of before."""
        first, *texts = messages.unpacked(message)
        if first == number:
            self._ahead += texts
            self._asks = False

    def close(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):  # the leader may be gone already
            self._channel.send(messages.BYE)
        self._channel.close()


def _receive(channel: Channel, inbox: queue.SimpleQueue[bytes | OSError]) -> None:
    """Receive messages in a thread, until the connection is lost."""
    try:
        while True:
            message = channel.receive()
            if message != messages.BEAT:
                inbox.put(message)
    except OSError as error:
        inbox.put(error)
