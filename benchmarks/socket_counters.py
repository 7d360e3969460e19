"""What the kernel has counted on this process's TCP connections (Linux)."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import NamedTuple

INFO_BYTES = 160
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received, then
# tcpi_data_segs_in and tcpi_data_segs_out
BYTES_AT, SEGMENTS_AT = 120, 152


class Counted(NamedTuple):
    """Bytes without the headers of TCP and IP, and packets with data, in each direction."""

    sent: int
    received: int
    packets_sent: int
    packets_received: int

    def per_step(self, before: Counted, steps: int) -> dict[str, int]:
        """The means per step since `before`, by name, as they are in a row of a benchmark."""
        names = ("socket_sent", "socket_received", "packets_sent", "packets_received")
        pairs = zip(self, before, strict=True)
        return {
            name: round((now - then) / steps)
            for name, (now, then) in zip(names, pairs, strict=True)
        }


def counted(port: int | None = None, *, but: int | None = None) -> Counted:
    """Add the counters of the open TCP connections of this process: all of them, those with this
    port on either side, or all `but` those.
    """
    sums = [0, 0, 0, 0]
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket, or no TCP
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
                ends = {end[1] for end in (sock.getsockname(), sock.getpeername())}
            if (port is not None and port not in ends) or but in ends:
                continue
            sent, received = struct.unpack_from("=2Q", info, BYTES_AT)
            packets_received, packets_sent = struct.unpack_from("=2I", info, SEGMENTS_AT)
            of_socket = (sent, received, packets_sent, packets_received)
            sums = [a + b for a, b in zip(sums, of_socket, strict=True)]
    return Counted(*sums)
