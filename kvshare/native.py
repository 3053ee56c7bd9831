"""Bulk bytes without the GIL: the typed face of the C extension.

Ranges are given by plain addresses. Whoever passes an address keeps its memory mapped until the call returns, and for
`view` as long as the view is used: nothing here can check it, and a wrong address ends the process.

Threads: every function may be called from any thread; those that move bytes release the GIL for the whole call.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvshare import _native

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

FUSED_BYTES_MIN = 241  # shorter blocks have another formula in xxh3, which only the xxhash package knows


class BlockStatus(enum.IntEnum):
    """What became of one block of a read."""

    OK = 0
    STALE = 1  # the slot holds another generation now: evicted, rewritten, or its owner restarted
    CORRUPT = 2  # the checksum differs: the owner should take the slot out
    UNREACHABLE = 3  # the peer is dead, refuses us or does not know the region
    TIMEOUT = 4  # no progress for request.seconds
    CANCELLED = 5


def copy_ranges(targets: U64, sources: U64, lengths: U64) -> None:
    """Copy ``lengths[i]`` bytes from ``sources[i]`` to ``targets[i]``, all uint64 [n]. Ranges must not overlap."""
    _native.copy_ranges(_u64(targets), _u64(sources), _u64(lengths))


def send_ranges(fd: int, addresses: U64, lengths: U64, seconds: float) -> int:
    """Send all ranges through a connected socket; returns bytes sent.

    addresses, lengths: uint64 [n]. seconds: longest time without progress. Works on blocking and other sockets.

    Raises:
        TimeoutError: no progress for ``seconds``. ConnectionError: the connection is gone.
    """
    sent: int = _native.send_ranges(fd, _u64(addresses), _u64(lengths), seconds)
    return sent


def recv_ranges(fd: int, addresses: U64, lengths: U64, seconds: float) -> int:
    """Fill all ranges from a connected socket; returns bytes received. Arguments and errors as in `send_ranges`."""
    received: int = _native.recv_ranges(fd, _u64(addresses), _u64(lengths), seconds)
    return received


def read_process(pid: int, targets: U64, sources: U64, lengths: U64) -> int:
    """Copy ``lengths[i]`` bytes from ``sources[i]`` in the memory of process ``pid`` to ``targets[i]`` in ours, all uint64 [n];
    returns the bytes copied, which are all. What lies side by side costs no more than one range.

    Raises:
        OSError: not all were copied. EFAULT: one side is not mapped there; ProcessLookupError: the process is gone;
            PermissionError: it may not be read by us.
    """
    copied: int = _native.read_process(pid, _u64(targets), _u64(sources), _u64(lengths))
    return copied


def load_generations(table_address: int, stride: int, slots: I64, out: U64) -> None:
    """Load the u64 at ``table_address + stride * slots[i]`` into ``out[i]``, after all that this thread read before.

    slots: int64 [n], checked by the caller to lie in the table; out: uint64 [n], contiguous.
    """
    assert slots.dtype == np.int64 and out.dtype == np.uint64
    _native.load_generations(table_address, stride, np.ascontiguousarray(slots), out)


class Wanted(NamedTuple):
    """Blocks to be read, and where their outcome goes. All contiguous.

    expected: generations; seeds; checksums (out: what the headers of blocks that landed told): uint64 [blocks].
    targets: uint64 [blocks, pages]; page_bytes: uint64 [pages].
    statuses (out): uint8 [blocks], `BlockStatus`. Blocks shorter than `FUSED_BYTES_MIN` are OK before
    their digests are compared, which is left to the caller.
    """

    expected: U64
    seeds: U64
    checksums: U64
    targets: U64
    page_bytes: U64
    statuses: U8


def read_slots(addresses: tuple[int, int], slot_bytes: int, available: int, slots: I64, wanted: Wanted) -> int:
    """A validated read of a mapped region: copy each block that is there at its expected generation, digest what is copied,
    judge. Returns how many are OK.

    addresses: of header 0 and of slot 0. available: slots from there on are never touched. slots: int64 [blocks], any numbers.
    """
    of_blocks = (wanted.expected, wanted.seeds, wanted.checksums, slots)
    of_pages = (wanted.targets, wanted.page_bytes, wanted.statuses)
    ok: int = _native.read_slots(*addresses, slot_bytes, available, *of_blocks, *of_pages)
    return ok


def send_slots(
    fd: int,
    seconds: float,
    addresses: tuple[int, int],
    slot_bytes: int,
    available: int,
    slots: I64,
    expected: U64,
    length: int,
    portion_blocks: int,
) -> int:
    """Send an answer of the tcp transport (`kvshare.transport.tcp_protocol`) through a connected socket; returns blocks sent.

    addresses, slot_bytes, available, slots, expected: as in `read_slots`. Errors as in `send_ranges`.
    """
    assert slots.dtype == np.int64 and length >= 0
    whom = (fd, seconds, *addresses, slot_bytes, available)
    sent: int = _native.send_slots(*whom, np.ascontiguousarray(slots), _u64(expected), length, portion_blocks)
    return sent


def recv_slots(fd: int, seconds: float, portion_blocks: int, wanted: Wanted) -> int:
    """Receive such an answer, as `read_slots` reads; returns how many blocks are OK.

    Statuses are written as soon as a block's outcome is known, also when this raises.

    Raises:
        ValueError: what came is no answer to this. Others as in `send_ranges`.
    """
    ok: int = _native.recv_slots(fd, seconds, portion_blocks, *wanted)
    return ok


def store_generation(address: int, value: int) -> None:
    """Store a u64: seen after all that this thread wrote before, and before all that it writes later."""
    _native.store_generation(address, value)


def view(address: int, length: int, writable: bool = False) -> memoryview:
    """``length`` bytes at ``address`` as a memoryview; it does not keep the memory alive."""
    made: memoryview = _native.view(address, length, writable)
    return made


def address_of(buffer: Any) -> int:
    """Address of the first byte of a C-contiguous buffer (array, bytes, mmap, memoryview)."""
    address: int = _native.address_of(buffer)
    return address


def checksum(addresses: U64, lengths: U64, seed: int) -> int:
    """xxh3_64 with ``seed`` of the concatenation of the ranges (uint64 [n] each)."""
    if len(addresses) == 1:
        return xxhash.xxh3_64_intdigest(view(int(addresses[0]), int(lengths[0])), seed)
    digest = xxhash.xxh3_64(seed=seed)
    for address, length in zip(addresses.tolist(), lengths.tolist(), strict=True):
        digest.update(view(address, length))
    return digest.intdigest()


def checksums(addresses: U64, lengths: U64, seeds: U64) -> U64:
    """The checksums (uint64 [blocks]) of blocks in one call.

    addresses, lengths: uint64 [blocks, pages]; seeds: uint64 [blocks].
    """
    return _blocks(addresses, lengths, None, seeds)


def copy_blocks(targets: U64, sources: U64, lengths: U64, seeds: U64) -> U64:
    """Copy blocks and return the checksums (uint64 [blocks]) of what landed, taken while it is in the cache.

    targets, sources, lengths: uint64 [blocks, pages]; seeds: uint64 [blocks].
    """
    return _blocks(targets, lengths, sources, seeds)


def _blocks(targets: U64, lengths: U64, sources: U64 | None, seeds: U64) -> U64:
    assert targets.ndim == 2 and targets.shape == lengths.shape and len(targets) == len(seeds)
    digests = np.empty(len(seeds), np.uint64)
    if not len(seeds):
        return digests
    if int(lengths.sum(axis=1).min()) >= FUSED_BYTES_MIN:
        origin = None if sources is None else _u64(sources)
        _native.copy_blocks(_u64(targets), _u64(lengths), origin, targets.shape[1], _u64(seeds), digests)
        return digests
    if sources is not None:
        copy_ranges(targets, sources, lengths)
    for i, seed in enumerate(seeds.tolist()):
        digests[i] = checksum(targets[i], lengths[i], seed)
    return digests


def _u64(array: U64) -> U64:
    assert array.dtype == np.uint64
    return np.ascontiguousarray(array)
