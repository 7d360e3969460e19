"""Authenticated messages: who has no token can neither send one nor stop the others."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zods.comm import authenticated
from zods.comm.authenticated import MAGIC, MOST_BYTES, NONCE_BYTES, Channel, Server, connect

TOKEN, OTHER = b"a token of the tests", b"another token of the tests"


class Echo:
    """A server that sends each message back. hellos: the first messages it was sent."""

    def __init__(self, silence: float = 30.0) -> None:
        self.hellos: list[bytes] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        self.server = Server(self.address, TOKEN, self._serve, silence=silence)

    def _serve(self, channel: Channel, hello: bytes) -> None:
        self.hellos.append(hello)
        channel.send(b"welcome")
        with contextlib.suppress(OSError):
            while True:
                channel.send(channel.receive())

    def client(self, token: bytes = TOKEN) -> Channel:
        channel, answer = connect(self.address, token, b"hello", seconds=10, silence=10)
        assert answer == b"welcome"
        return channel

    def stranger(self) -> socket.socket:
        sock = socket.create_connection(self.address, timeout=10)
        sock.settimeout(10)
        return sock


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.server.close()


def is_cut_off(sock: socket.socket) -> bool:
    """Read what the server sends until it closes the connection."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(1000):
            pass
    sock.close()
    return True


def answers(channel: Channel, message: bytes = b"are you there") -> bool:
    channel.send(message)
    return channel.receive() == message


class Recorder:
    """Stands between a client and a server, and keeps what the client sends."""

    def __init__(self, address: Any, change: Callable[[bytes], bytes] = bytes) -> None:
        self.sent = b""
        self._address, self._change = address, change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(self._address)
        threading.Thread(target=self._copy, args=(server, client, bytes), daemon=True).start()
        self._copy(client, server, self._record)

    def _record(self, data: bytes) -> bytes:
        self.sent += data
        return self._change(data)

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, change: Callable) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1000):
                sink.sendall(change(data))
            sink.shutdown(socket.SHUT_WR)


def test_messages_of_any_size_arrive_in_order(echo):
    channel = echo.client()
    sizes = [0, 1, 254, 255, 2**16 + 1, 2**20]
    for size in sizes:
        assert answers(channel, bytes(size))
    channel.close()
    # per message a length and a tag; a long message has 4 further bytes of length
    assert channel.sent_bytes == len(b"hello") + sum(sizes) + (1 + len(sizes)) * (1 + 16) + 3 * 4


def test_a_process_with_another_token_is_refused_and_learns_so(echo):
    with pytest.raises(ConnectionError, match="is the token the same"):
        echo.client(OTHER)
    assert not echo.hellos
    assert answers(echo.client())


def test_a_server_with_another_token_is_refused():
    """A program that answers as the server, but does not know the token."""

    def pretend() -> None:
        sock, _ = listener.accept()
        sock.sendall(MAGIC + bytes(NONCE_BYTES))
        sock.sendall(bytes([7]) + bytes(16) + b"welcome")
        sock.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=pretend, daemon=True).start()
        with pytest.raises(ConnectionError, match="without the run's token"):
            connect(listener.getsockname(), TOKEN, b"hello", seconds=10, silence=10)


def test_an_end_of_another_version_is_told_by_both_sides(echo, caplog):
    stranger = echo.stranger()
    stranger.sendall(b"zods-1" + bytes(NONCE_BYTES))
    assert is_cut_off(stranger)
    assert "it has version '1' of the messages between replicas, this replica '2'" in caplog.text

    with socket.create_server(("127.0.0.1", 0)) as older:
        thread = threading.Thread(
            target=lambda: older.accept()[0].sendall(b"zods-1" + bytes(NONCE_BYTES)), daemon=True
        )
        thread.start()
        with pytest.raises(ConnectionError, match=r"has version '1' .* '2'\. Give all replicas"):
            connect(older.getsockname(), TOKEN, b"hello", seconds=10, silence=10)


def test_a_recorded_connection_cannot_be_repeated(echo):
    between = Recorder(echo.address)
    channel, _ = connect(between.address, TOKEN, b"hello", seconds=10, silence=10)
    assert answers(channel)
    again = echo.stranger()
    again.sendall(between.sent)
    assert is_cut_off(again)
    assert len(echo.hellos) == 1
    assert answers(channel)


def test_a_repeated_message_ends_the_connection_that_carries_it(echo):
    def twice(data: bytes) -> bytes:
        return data * 2 if b"repeat me" in data else data

    between = Recorder(echo.address, twice)
    channel, _ = connect(between.address, TOKEN, b"hello", seconds=10, silence=10)
    assert answers(channel)
    assert answers(channel, b"repeat me")
    with pytest.raises(ConnectionError):
        answers(channel)
    assert answers(echo.client())


@pytest.mark.parametrize("position", [0, 1, 16, 17, 22])
def test_an_altered_message_ends_the_connection(echo, position):
    def altered(data: bytes) -> bytes:
        if b"are you" not in data:
            return data
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]

    between = Recorder(echo.address, altered)
    channel, _ = connect(between.address, TOKEN, b"hello", seconds=10, silence=10)
    with pytest.raises(ConnectionError):
        answers(channel)
    assert answers(echo.client())


NONSENSE = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: store\r\n\r\n" + bytes(100),
    "zeros": bytes(10_000),
    "a long first message": MAGIC
    + bytes(NONCE_BYTES)
    + b"\xff"
    + bytes(16)
    + struct.pack("!I", 2**31),
    "a first message without a tag": MAGIC + bytes(NONCE_BYTES) + b"\x02" + bytes(18),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_cut_off_and_others_do_not_notice(echo, name):
    channel = echo.client()
    stranger = echo.stranger()
    stranger.sendall(NONSENSE[name])
    assert is_cut_off(stranger)
    assert answers(channel)


def test_a_message_above_the_bound_is_refused_before_it_is_read(echo):
    channel = echo.client()
    with pytest.raises(ConnectionError):
        answers(channel, bytes(MOST_BYTES + 1))
    assert answers(echo.client())


def test_a_stranger_who_says_nothing_or_little_is_cut_off(echo, monkeypatch):
    monkeypatch.setattr(authenticated, "HANDSHAKE_SECONDS", 1.0)
    silent, slow = echo.stranger(), echo.stranger()
    began = time.monotonic()
    with contextlib.suppress(OSError):
        for k in range(100):
            slow.sendall(MAGIC[k % 6 : k % 6 + 1])
            time.sleep(0.1)
    assert time.monotonic() - began < 9.0
    assert is_cut_off(silent)


def test_a_flood_of_connections_does_not_disturb_those_that_are_there(echo):
    channel = echo.client()
    strangers = [echo.stranger() for _ in range(300)]
    assert answers(channel)
    assert len(echo.server._strangers) <= authenticated.MOST_STRANGERS_OF_ONE
    assert answers(echo.client()), "and others can connect meanwhile"
    for stranger in strangers:
        stranger.close()


def test_the_server_listens_at_an_address_of_ipv6():
    try:
        free = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    address = free.getsockname()[:2]
    free.close()
    server = Server(address, TOKEN, lambda channel, hello: channel.send(hello), silence=10)
    assert connect(address, TOKEN, b"hello", seconds=10, silence=10)[1] == b"hello"
    server.close()


def test_a_silent_connection_is_lost():
    echo = Echo(silence=0.5)
    channel = echo.client()
    with pytest.raises(OSError, match=r"."):
        channel.receive()
    echo.server.close()


def test_the_server_listens_at_the_given_address_only(echo):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", echo.address[1]), timeout=10)


@pytest.mark.parametrize(
    ("text", "found"), [(None, "nothing"), ("  \n", "nothing"), ("short\n", "5 characters")]
)
def test_a_missing_or_short_token_is_refused(text, found, tmp_path, monkeypatch):
    monkeypatch.delenv(authenticated.TOKEN_VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(authenticated.TOKEN_VARIABLE, text)
    with pytest.raises(ValueError, match=f"found {found} in ZODS_REPLICA_TOKEN, expected"):
        authenticated.read_token(None)
    (tmp_path / "token").write_text(text or "")
    with pytest.raises(ValueError, match=f"found {found} in .*/token, expected"):
        authenticated.read_token(str(tmp_path / "token"))


def test_the_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(authenticated.TOKEN_VARIABLE, f" {TOKEN.decode()}\n")
    assert authenticated.read_token(None) == TOKEN
    (tmp_path / "token").write_text(OTHER.decode() + "\n")
    assert authenticated.read_token(str(tmp_path / "token")) == OTHER
    with pytest.raises(ValueError, match=r"token_file: .*/none cannot be read"):
        authenticated.read_token(str(tmp_path / "none"))
