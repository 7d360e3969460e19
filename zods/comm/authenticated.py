"""Messages over TCP between processes that share a secret token.

Each message carries an HMAC-SHA256 (RFC 2104, truncated to 16 bytes) of its number on this
connection and its content. Both sides contribute a random nonce to the key of a connection, and
each direction has a key of its own. So a message that was altered, repeated, reordered, or recorded
on another connection ends the connection, and so does one by a process without the token. Nothing
is encrypted.

`Server` accepts connections for `zods.training.replica_leader`, and `connect` makes them for
`zods.training.replica_follower`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "ZODS_REPLICA_TOKEN"
LEAST_CHARACTERS = 16  # of a token: shorter ones can be guessed from recorded messages
PROGRAM = b"zods-"  # a connection begins with it and the version of the messages, one digit
MAGIC = PROGRAM + b"2"
NONCE_BYTES, TAG_BYTES = 32, 16
LONG = 255  # in place of a message's length; its length then follows in 4 bytes
MOST_BYTES = 2**24  # of a message
MOST_HELLO_BYTES = 1024  # of the first message, whose sender is not known yet
HANDSHAKE_SECONDS = 10.0
MOST_STRANGERS = 256  # connections whose first message has not come yet
MOST_STRANGERS_OF_ONE = 64  # from one address


def read_token(file: str | None) -> bytes:
    """Read the secret token from `file`, or from the environment where it is None.

    Raises ValueError where there is none, or where it is too short.
    """
    where = TOKEN_VARIABLE if file is None else file
    try:
        token = os.environ.get(where, "") if file is None else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"zeroth_order.replicas.token_file: {file} cannot be read ({error})."
        ) from None
    if len(token.strip()) < LEAST_CHARACTERS:
        found = f"{len(token.strip())} characters" if token.strip() else "nothing"
        raise ValueError(
            f"zeroth_order.replicas: found {found} in {where}, expected the run's secret token of "
            f"at least {LEAST_CHARACTERS} characters. Make one (openssl rand -hex 32), and give it "
            f"to all replicas in the environment variable {TOKEN_VARIABLE}, or in a file that "
            '"token_file" names.'
        )
    return token.strip().encode()


class Channel:
    """An authenticated connection. Any thread may send; one thread receives.

    sent_bytes: including lengths and tags, without the headers of TCP and IP.
    """

    def __init__(self, sock: socket.socket, token: bytes, nonces: bytes, *, serves: bool) -> None:
        """nonces: the server's, then the client's. serves: this is the server's side."""
        keys = [
            hmac.digest(token, MAGIC + side + nonces, hashlib.sha256)
            for side in (b"server", b"client")
        ]
        self._sock = sock
        self._send_key, self._receive_key = keys if serves else keys[::-1]
        self._sent = self._received = 0  # numbers of messages
        self._lock = threading.Lock()
        self.sent_bytes = 0

    def send(self, message: bytes) -> None:
        """Raises OSError where the connection is lost, or the other side does not read."""
        with self._lock:
            tag = _tag(self._send_key, self._sent, message)
            self._sent += 1
            length = len(message)
            long = b"" if length < LONG else struct.pack("!I", length)
            frame = bytes([min(length, LONG)]) + tag + long + message
            self._sock.sendall(frame)
            self.sent_bytes += len(frame)

    def receive(self, most: int = MOST_BYTES, deadline: float | None = None) -> bytes:
        """Wait for the next message.

        most: its largest size in bytes. deadline: of time.monotonic(); without one, the timeout of
        the socket is for each part. Raises OSError where the connection is lost or silent, and
        where a message is not the other side's.
        """
        head = _read(self._sock, 1 + TAG_BYTES, deadline)
        length = head[0]
        if length == LONG:
            (length,) = struct.unpack("!I", _read(self._sock, 4, deadline))
        if length > most:
            raise ConnectionError(f"a message of {length} bytes; the largest has {most}")
        message = _read(self._sock, length, deadline)
        if not hmac.compare_digest(head[1:], _tag(self._receive_key, self._received, message)):
            raise ConnectionError("a message without the run's token")
        self._received += 1
        return message

    def close(self) -> None:
        """End the connection. A thread that receives gets an OSError."""
        with contextlib.suppress(OSError):  # it may not be connected
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _tag(key: bytes, number: int, message: bytes) -> bytes:
    return hmac.digest(key, struct.pack("!Q", number) + message, hashlib.sha256)[:TAG_BYTES]


def _read(sock: socket.socket, count: int, deadline: float | None = None) -> bytes:
    """Read `count` bytes."""
    parts = bytearray()
    while len(parts) < count:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(min(count - len(parts), 2**16))
        if not part:
            raise ConnectionError("the connection was closed")
        parts += part
    return bytes(parts)


def _prepare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _check_version(greeting: bytes, who: str) -> None:
    """Raise ConnectionError where a greeting is not of this version's messages."""
    if not greeting.startswith(PROGRAM):
        raise ConnectionError(f"{who} is no replica of zods")
    if not greeting.startswith(MAGIC):
        theirs, ours = (
            text[len(PROGRAM) :][:1].decode(errors="replace") for text in (greeting, MAGIC)
        )
        raise ConnectionError(
            f"{who} has version {theirs!r} of the messages between replicas, this replica "
            f"{ours!r}. Give all replicas the same version of zods."
        )


def connect(
    address: tuple[str, int], token: bytes, hello: bytes, *, seconds: float, silence: float
) -> tuple[Channel, bytes]:
    """Connect to a server. Returns the channel and the server's answer to `hello`.

    seconds: the time that it may take. silence: seconds without a message after which the
    connection is lost. Raises OSError.
    """
    deadline = time.monotonic() + seconds
    sock = socket.create_connection(address, timeout=seconds)
    try:
        _prepare(sock)
        own = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(MAGIC + own)
        greeting = _read(sock, len(MAGIC) + NONCE_BYTES, deadline)
        _check_version(greeting, "the program that listens there")
        channel = Channel(sock, token, greeting[len(MAGIC) :] + own, serves=False)
        channel.send(hello)
        try:
            answer = channel.receive(deadline=deadline)
        except ConnectionError as error:
            raise ConnectionError(f"{error}; is the token the same?") from None
        sock.settimeout(silence)
    except BaseException:
        sock.close()
        raise
    return channel, answer


class Server:
    """Accepts connections, each in a thread of its own.

    A process that connects and does not prove within HANDSHAKE_SECONDS that it has the token is cut
    off. Of more than MOST_STRANGERS such connections, or MOST_STRANGERS_OF_ONE from one address,
    the oldest is cut off: who has the token needs one round trip only.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        serve: Callable[[Channel, bytes], None],
        *,
        silence: float,
    ) -> None:
        """Listen at `address` alone.

        serve: called in a connection's thread with its channel and its first message, to receive
        until it is lost. silence: seconds without a message after which it is. Raises OSError where
        the address cannot be used.
        """
        self._token, self._serve, self._silence = token, serve, silence
        self._strangers: dict[socket.socket, str] = {}  # their addresses; the oldest first
        self._refused = 0
        self._lock = threading.Lock()
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._listener = socket.create_server(address, family=family, backlog=MOST_STRANGERS)
        threading.Thread(target=self._accept, name="zods-accept", daemon=True).start()

    def close(self) -> None:
        """Accept no further connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, (host, *_) = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:  # closed
                    return
                time.sleep(0.1)  # no file descriptor is free, or the stranger is gone again
                continue
            self._add_stranger(sock, host)
            threading.Thread(
                target=self._run, args=(sock, host), name="zods-connection", daemon=True
            ).start()

    def _add_stranger(self, sock: socket.socket, host: str) -> None:
        with self._lock:
            of_host = [other for other, address in self._strangers.items() if address == host]
            oldest = None
            if len(of_host) >= MOST_STRANGERS_OF_ONE:
                oldest = of_host[0]
            elif len(self._strangers) >= MOST_STRANGERS:
                oldest = next(iter(self._strangers))
            if oldest is not None:
                del self._strangers[oldest]
                with contextlib.suppress(OSError):  # its thread closes it
                    oldest.shutdown(socket.SHUT_RDWR)
            self._strangers[sock] = host

    def _run(self, sock: socket.socket, host: str) -> None:
        try:
            channel, hello = self._handshake(sock)
        except OSError as error:
            self._refuse(host, str(error))
            sock.close()
            return
        finally:
            with self._lock:
                self._strangers.pop(sock, None)
        try:
            self._serve(channel, hello)
        finally:
            channel.close()

    def _handshake(self, sock: socket.socket) -> tuple[Channel, bytes]:
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        sock.settimeout(HANDSHAKE_SECONDS)
        _prepare(sock)
        own = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(MAGIC + own)
        answer = _read(sock, len(MAGIC) + NONCE_BYTES, deadline)
        _check_version(answer, "it")
        channel = Channel(sock, self._token, own + answer[len(MAGIC) :], serves=True)
        hello = channel.receive(MOST_HELLO_BYTES, deadline)
        sock.settimeout(self._silence)
        return channel, hello

    def _refuse(self, host: str, reason: str) -> None:
        """Say that a connection was refused: the 1st, the 2nd, the 4th, the 8th, ..."""
        with self._lock:
            self._refused += 1
            number = self._refused
        if number.bit_count() == 1:
            logger.warning(
                "replicas: connection %d that was refused, from %s: %s", number, host, reason
            )
