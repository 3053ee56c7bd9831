"""The owner's end of `tcp` for a region that is no memory: each portion is read into a buffer of ours, verified, and sent.

    request ─> stage the first portion ─> verdict (what the table says) ─> its bytes, its trailer ─> (stage the next ...)*

To the reader it is an answer like any other (`kvshare.transport.tcp_protocol`): the trailer of a block that turned out stale or
damaged has generation 0, which is not what was asked for.

Bounds: `STAGES_MAX` answers at a time, a portion of at most `STAGE_BYTES_MAX` (or one block) each. A tier that does not answer
makes the verdict UNREACHABLE; when it stops in the middle, the connection ends, for what was promised cannot be sent.

Threads: each connection's own.
"""

from __future__ import annotations

import socket
import threading
from typing import Protocol

import numpy as np

from kvshare import native
from kvshare.errors import KVShareError
from kvshare.mapping import Mapping
from kvshare.transport.base import I64, U64, BlockStatus
from kvshare.transport.tcp_protocol import PADDED, send, verdict_of

STAGES_MAX = 8
STAGE_BYTES_MAX = 16 << 20
STAGE_SECONDS = 1.0  # for a place among them: the reader waits not much longer
ALIGNED = 4096  # where blocks begin in a buffer: direct reads of files want that

U8 = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Staged(Protocol):
    """A region whose blocks have to be fetched before they can be sent. Any thread."""

    region: int
    slot_bytes: int

    @property
    def available_slots(self) -> int: ...

    def key(self, slot: int) -> bytes:
        """As `kvshare.region.SlotTable.key`."""

    def current(self, slots: I64, generations: U64, length: int) -> U8:
        """By the table: `BlockStatus.OK` where the slot has that generation and its block that length, else STALE; UNREACHABLE
        where nothing can be read now. ``slots``: any numbers. Never waits."""

    def stage(self, slots: I64, generations: U64, target: Mapping, stride: int, length: int) -> tuple[U8, U64]:
        """Read and verify blocks, the i-th to ``target`` at ``i * stride``; returns `BlockStatus` and checksums of each. Keeps
        ``target`` as long as anything may write there.

        Raises:
            KVShareError, OSError: nothing could be read.
        """


class Stages:
    """The answers of one server from staged regions."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(STAGES_MAX)

    def answer(
        self, sock: socket.socket, seconds: float, source: Staged, wanted: tuple[I64, U64], length: int, portion_blocks: int
    ) -> int:
        """Answer a request for ``wanted`` (slots, generations); returns blocks sent.

        Raises:
            TimeoutError, ConnectionError: the connection is lost, or has to be given up.
        """
        slots = wanted[0]
        stride = -(-length // ALIGNED) * ALIGNED
        portion = min(portion_blocks, len(slots))
        if (portion > 1 and portion * stride > STAGE_BYTES_MAX) or not self._places.acquire(timeout=STAGE_SECONDS):
            send(sock, verdict_of(bytes([BlockStatus.UNREACHABLE]) * len(slots)), seconds)
            return 0
        try:
            return _answer(sock, seconds, source, wanted, (stride, length), portion)
        finally:
            self._places.release()


def _answer(
    sock: socket.socket, seconds: float, source: Staged, wanted: tuple[I64, U64], sizes: tuple[int, int], portion: int
) -> int:
    slots, generations = wanted
    statuses = source.current(slots, generations, sizes[1])
    live = np.flatnonzero(statuses == BlockStatus.OK)
    target = Mapping.anonymous(max(1, min(portion, len(live))) * sizes[0])
    for start in range(0, len(live), portion):
        chosen = live[start : start + portion]
        try:
            staged = source.stage(slots[chosen], generations[chosen], target, *sizes)
        except (KVShareError, OSError) as error:
            if start:
                raise ConnectionError(f"blocks that were promised cannot be read: {error}") from error
            statuses[live] = BlockStatus.UNREACHABLE
            live = live[:0]
            break
        if not start:
            send(sock, verdict_of(statuses.tobytes()), seconds)
        _send(sock, seconds, generations[chosen], staged, (target, *sizes))
    if not len(live):
        send(sock, verdict_of(statuses.tobytes()), seconds)
    return len(live)


def _send(
    sock: socket.socket, seconds: float, generations: U64, staged: tuple[U8, U64], where: tuple[Mapping, int, int]
) -> None:
    """A portion and its trailer."""
    statuses, checksums = staged
    target, stride, length = where
    memory = np.frombuffer(target.memory, np.uint8)
    for i in np.flatnonzero(statuses != BlockStatus.OK).tolist():
        memory[i * stride : i * stride + length] = 0  # whatever was read instead is none of the reader's business
    told = np.where(statuses == BlockStatus.OK, generations, 0)
    trailer = np.concatenate([told, checksums]).astype(np.uint64).tobytes()
    trailer = trailer.ljust(-(-len(trailer) // PADDED) * PADDED, b"\0")
    blocks = np.uint64(target.address) + np.arange(len(statuses), dtype=np.uint64) * np.uint64(stride)
    addresses = np.append(blocks, np.uint64(native.address_of(trailer)))
    lengths = np.append(np.full(len(statuses), length, np.uint64), np.uint64(len(trailer)))
    native.send_ranges(sock.fileno(), addresses, lengths, seconds)
