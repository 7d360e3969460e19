"""The leader and the followers of replicas, with real connections and without a model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zods.comm import authenticated
from zods.config.replicas_section import ReplicasConfig
from zods.training import replica_leader
from zods.training import replica_messages as messages
from zods.training.replica_follower import Follower, Lost, Refused
from zods.training.replica_leader import Leader
from zods.training.replica_messages import Member, Sums
from zods.trajectory.log import START, chained

TOKEN = b"a token of the tests"
ROWS = 8


def record(step: int) -> str:
    return f'{{"step":{step},"loss":0.5}}'


HEADER, RUN = '{"header":1}', '{"run":0}'


class World:
    """A leader at some step, and its followers. heads: of its chain, after each record."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.store = f"127.0.0.1:{free.getsockname()[1]}"
        self.heads = [START]
        self.step = 0
        self.followers: list[Follower] = []
        self.leader = self._lead(straggler_timeout=0.5, silence_timeout=3.0)

    def _lead(self, **others: Any) -> Leader:
        return Leader(ReplicasConfig(store=self.store, **others), TOKEN, 1)

    def follower(self, index: int = 1, **others: Any) -> Follower:
        config = ReplicasConfig(
            store=self.store,
            index=index,
            **{"silence_timeout": 3.0, "leader_timeout": 5.0} | others,
        )
        self.followers.append(Follower(config, TOKEN, 1))
        return self.followers[-1]

    def publish(self, text: str) -> None:
        self.heads.append(chained(self.heads[-1], text))
        self.leader.publish(text)

    def begin(self) -> None:
        self.leader.publish_log([])
        self.publish(HEADER)
        self.publish(RUN)

    def make_step(self, before: Callable[[], None] = lambda: None) -> Sums:
        """Make a step as the leader. before: called between its sums and its record."""
        answer = self.leader.sum(Sums(str(self.step), self.heads[-1], False, [1.0]), ROWS)
        before()
        self.publish(record(self.step))
        self.step += 1
        return answer


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    for follower in made.followers:
        follower.close()
    made.leader.close()


class Replica:
    """A replica that catches up and takes part, in a thread. heads: of its chain."""

    def __init__(self, world: World, follower: Follower) -> None:
        self.follower = follower
        texts = follower.read_records()
        self.heads = [START]
        for text in texts:
            self.heads.append(chained(self.heads[-1], text))
        self.step = len(texts) - 2
        self.takes_part = self.is_over = False

    def apply(self, text: str) -> None:
        self.heads.append(chained(self.heads[-1], text))
        self.step += text.startswith('{"step"')

    def catch_up(self) -> None:
        while True:
            event = self.follower.next_event(self.step, len(self.heads) - 1, self.heads[-1])
            if "record" not in event:
                self.takes_part, self.is_over = "members" in event, "over" in event
                return
            self.apply(event["record"])

    def make_step(self) -> None:
        self.follower.sum(Sums(str(self.step), self.heads[-1], False, [1.0]))
        after = chained(self.heads[-1], record(self.step))
        text = self.follower.next_record(len(self.heads) - 1, after)
        self.apply(text or record(self.step))


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call a function in a thread: (thread, list that gets its result or exception)."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def joined(world: World, index: int = 1, **others: Any) -> Replica:
    """A replica that takes part from the leader's next step on."""
    replica = Replica(world, world.follower(index, **others))
    thread, _ = in_thread(replica.catch_up)
    until(lambda: any(peer.wants_to_join for peer in world.leader._peers))
    world.make_step()
    thread.join(30)
    assert replica.takes_part
    return replica


SUMS = {
    "a step's": (
        Sums("123456", "0123456789abcdef", False, [0.1, -2.0, 8.0, 1.0, 8.0]),
        10 + 16 + 6,
    ),
    "large counts": (Sums("0", START, True, [0.1, 2.0**32 - 1, 1.0]), 10 + 8 + 8),
    "the largest step": (Sums(str(2**32 - 1), START, False, []), 10),
    "a step beyond": (Sums(str(2**32), START, False, []), 6 + 4 + 10),
    "a refresh's": (Sums("12, refresh", START, False, [0.5]), 6 + 4 + 11 + 8),
    "no counts": (
        Sums("7", START, False, [2.0**32, -1.0, float("inf"), float("nan"), -0.0, 0.5]),
        10 + 6 * 8,
    ),
    "many counts": (Sums("7", START, False, [3.0] * 20), 10 + 5 * 8 + 15 * 2),
    "of members": (Sums("7", START, False, [1.5], [Member(0, 2), Member(3, 1)]), 10 + 4 + 16 + 8),
    "nothing": (Sums("7", START, True, [], []), 10 + 4 + 2),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_arrive_with_the_same_bits_in_few_bytes(name):
    sums, size = SUMS[name]
    packed = sums.pack(messages.POST)
    assert len(packed) == size
    arrived = Sums.unpack(packed)
    assert repr(arrived) == repr(sums._replace(head=sums.head[:8])), "repr tells -0.0 and NaN apart"


def test_a_step_of_one_direction_takes_64_bytes_at_most_whatever_its_counts():
    frame = 1 + authenticated.TAG_BYTES
    for count, examples in ((8.0, 8.0), (2.0**32 - 1, 1e6), (8.3, 8.0)):
        one = Sums("999999999", START, False, [0.1, 0.2, 0.3, count, 1.0, examples])
        several = one._replace(values=[0.1] * 16 + one.values)
        assert frame + len(one.pack(messages.POST)) <= 64
        assert len(several.pack(messages.POST)) - len(one.pack(messages.POST)) == 16 * 8


def test_a_request_before_the_leader_has_read_its_log_gets_the_whole_log(world):
    thread, found = in_thread(world.follower().read_records)
    until(lambda: world.leader._peers and world.leader._peers[0].awaited_record is not None)
    texts = [HEADER, RUN, record(0), record(1)]
    world.leader.publish_log(texts)
    thread.join(30)
    assert found == [texts]


def test_a_replica_that_starts_with_the_leader_waits_for_the_record_of_the_run(world):
    world.leader.publish_log([])
    thread, found = in_thread(world.follower().read_records)
    until(lambda: world.leader._peers and world.leader._peers[0].awaited_record is not None)
    world.publish(HEADER)
    time.sleep(0.3)
    world.publish(RUN)
    thread.join(30)
    assert found == [[HEADER, RUN]]


def test_all_make_the_same_records_and_sums(world):
    world.begin()
    world.make_step()
    replica = joined(world)
    for _ in range(3):
        thread, found = in_thread(replica.make_step)
        assert world.make_step().values == [2.0]
        thread.join(30)
        assert found == [None]
    assert replica.heads == world.heads


def test_a_replica_that_is_left_out_before_it_has_noticed_that_it_joined_joins_again(world):
    world.begin()
    replica = Replica(world, world.follower())
    replica.follower._ask(2, waits=False)
    replica.follower._send(messages.JOIN)
    until(lambda: any(peer.wants_to_join for peer in world.leader._peers))
    world.make_step()  # it takes part from the next step on
    assert world.make_step().values == [1.0], "and is left out of that one"
    thread, _ = in_thread(replica.catch_up)
    until(lambda: any(peer.wants_to_join for peer in world.leader._peers))
    world.make_step()
    thread.join(30)
    assert replica.takes_part
    thread, found = in_thread(replica.make_step)
    assert world.make_step().values == [2.0]
    thread.join(30)
    assert found == [None]
    assert replica.heads == world.heads


def test_sums_of_a_replica_that_does_not_take_part_are_answered(world):
    world.begin()
    replica = joined(world)
    assert world.make_step().values == [1.0], "it is late"
    with pytest.raises(Lost, match="later than the others'") as error:
        replica.make_step()
    assert error.value.connected
    with pytest.raises(Lost, match="left out before"):
        replica.make_step()


def test_a_leader_that_ends_lets_those_go_who_wait_in_a_step(world):
    world.begin()
    replica = joined(world)
    thread, found = in_thread(replica.make_step)
    time.sleep(0.2)
    closing, _ = in_thread(world.leader.close)
    thread.join(30)
    assert isinstance(found[0], Lost)
    replica.catch_up()
    assert replica.is_over
    assert replica.heads == world.heads
    replica.follower.close()
    closing.join(30)
    assert not closing.is_alive()


def test_a_replica_that_catches_up_while_the_leader_ends_has_all_its_records(world, monkeypatch):
    monkeypatch.setattr(replica_leader, "BLOCK_BYTES", 1)  # a record at a time
    world.begin()
    replica = Replica(world, world.follower())
    for _ in range(20):
        world.make_step()
    closing, _ = in_thread(world.leader.close)
    time.sleep(0.2)
    replica.catch_up()
    assert replica.is_over
    assert replica.heads == world.heads
    replica.follower.close()
    closing.join(30)


def test_a_replica_that_was_asked_to_stop_does_not_wait_for_the_leader(world):
    world.begin()
    waiting = Replica(world, world.follower())
    thread, _ = in_thread(waiting.catch_up)
    until(lambda: any(peer.wants_to_join for peer in world.leader._peers))
    waiting.follower.asked = lambda: True
    thread.join(10)
    assert waiting.is_over
    alone = Replica(world, world.follower(2, leader_timeout=300.0))
    alone.follower._channel.close()
    world.leader._server.close()
    thread, _ = in_thread(alone.catch_up)
    time.sleep(0.5)
    alone.follower.asked = lambda: True
    thread.join(10)
    assert alone.is_over


def test_a_replica_that_does_not_read_holds_up_nobody(world):
    world.begin()
    for step in range(3000):
        world.publish(f'{{"step":{step},"loss":"{"x" * 1000}"}}')
    stalled = world.follower(2)
    stalled._channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    stalled._inbox = None  # type: ignore[assignment]
    for number in range(0, 3000, 10):
        stalled._channel.send(messages.pack_ask(number, False))
    began = time.monotonic()
    other = world.follower(1)
    assert len(other.read_records()) == 3002
    assert time.monotonic() - began < 20
    time.sleep(4)  # longer than silence_timeout
    other._ask(0, waits=False)
    assert other._next()[:1] == messages.RECORDS, "the beats kept the connection"


def test_nonsense_by_one_who_has_the_token_ends_its_connection(world):
    world.begin()
    replica = joined(world)
    replica.follower._channel.send(messages.POST)
    until(lambda: not world.leader._peers)
    assert world.make_step().values == [1.0]


def test_a_replica_with_records_that_the_leader_lacks_is_refused(world):
    world.begin()
    replica = joined(world)
    replica.heads[-1] = "0" * 16
    replica.follower._channel.close()
    with pytest.raises(Refused, match="what it has applied is not in the leader's log"):
        replica.catch_up()
