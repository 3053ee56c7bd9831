"""What the two ends of a data connection say to each other, after `kvshare.wire`'s handshake with purpose `PURPOSE`.

    reader -> owner   frame: `ReadBlocks` (MessagePack)
    owner -> reader   verdict: magic (4 bytes), number of blocks (4), one status a block (1 each):
                      OK (it follows), STALE or UNREACHABLE (it does not)
                      then, for every `portion_blocks` of the OK ones: their bytes, in the order asked for;
                      then their trailer: generations (8 each), then checksums (8 each)
                      verdict and trailers are padded to multiples of 64 bytes, so that block bytes stay aligned

All numbers are little-endian. A trailer is made after its portion's last byte was handed to the network: the reader that finds
the generation that it asked for has the bytes that were written under it. The checksum is the one in the slot's header;
the reader compares it with that of what arrived.

A connection carries one request at a time. Either end drops it when anything is not as expected.
"""

from __future__ import annotations

import contextlib
import socket
import struct

import msgspec
import numpy as np

from kvshare import native

PURPOSE = "blocks"
LENGTH = struct.Struct("<I")  # before a request
VERDICT = struct.Struct("<4sI")
VERDICT_MAGIC = b"KVSV"
PADDED = 64
BLOCKS_MAX = 4096  # of one request; longer reads are several
REQUEST_BYTES_MAX = 16 * BLOCKS_MAX + 4096
PORTION_BYTES = 8 << 20  # between two trailers


class ReadBlocks(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The first ``length`` bytes of each of ``slots`` (int64), if it is at its generation (uint64). ``label``: where the reader
    stands (setting 'region'); the owner sends no block of a tenant that may not be there."""

    region: int
    length: int
    portion_blocks: int
    slots: bytes
    generations: bytes
    label: str


def tune(sock: socket.socket) -> None:
    """Options of a data connection, or of the listener that it comes from."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        # bbr paces by a rate that it has to find out anew after every pause: half of cubic's throughput in bursts.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    # An idle connection whose other end vanished without a word is given up after a minute.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def send(sock: socket.socket, data: bytes, seconds: float) -> None:
    """Raises TimeoutError (no progress for ``seconds``), ConnectionError."""
    where, length = np.array([native.address_of(data), len(data)], np.uint64).reshape(2, 1)
    native.send_ranges(sock.fileno(), where, length, seconds)


def receive(sock: socket.socket, count: int, seconds: float) -> bytearray:
    """``count`` bytes. Errors as `send`."""
    data = bytearray(count)
    where, length = np.array([native.address_of(data), count], np.uint64).reshape(2, 1)
    native.recv_ranges(sock.fileno(), where, length, seconds)
    return data


def verdict_of(statuses: bytes) -> bytes:
    """A verdict, one status a block."""
    verdict = VERDICT.pack(VERDICT_MAGIC, len(statuses)) + statuses
    return verdict.ljust(-(-len(verdict) // PADDED) * PADDED, b"\0")


def shut_down(sock: socket.socket) -> None:
    """End both directions, which wakes whoever waits on it. The descriptor stays open."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
