"""Bulk bytes without the GIL: the typed face of the C extension.

Ranges are given by plain addresses. Whoever passes an address keeps its memory mapped until the call returns, and for
`view` as long as the view is used: nothing here can check it, and a wrong address ends the process.

Threads: every function may be called from any thread; those that move bytes release the GIL for the whole call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvshare import _native

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

FUSED_BYTES_MIN = 241  # shorter blocks have another formula in xxh3, which only the xxhash package knows


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


def load_generations(table_address: int, stride: int, slots: I64, out: U64) -> None:
    """Load the u64 at ``table_address + stride * slots[i]`` into ``out[i]``, after all that this thread read before.

    slots: int64 [n], checked by the caller to lie in the table; out: uint64 [n], contiguous.
    """
    assert slots.dtype == np.int64 and out.dtype == np.uint64
    _native.load_generations(table_address, stride, np.ascontiguousarray(slots), out)


class Headers(NamedTuple):
    """Fields of slots' headers, uint64 [n] each."""

    lengths: U64
    checksums: U64
    generations: U64


def load_headers(table_address: int, slots: I64) -> Headers:
    """Headers of ``slots`` (int64 [n], checked by the caller to lie in the table of 128-byte headers at ``table_address``).

    Generations are loaded last: equal to what is expected, they vouch for the other fields and for all that this thread read
    before.
    """
    assert slots.dtype == np.int64
    headers = Headers(*np.empty((3, len(slots)), np.uint64))
    _native.load_headers(table_address, np.ascontiguousarray(slots), *headers)
    return headers


def find_slots(
    table_address: int, available: int, slot_bytes: int, slots: I64, expected: U64, length: int
) -> npt.NDArray[np.bool_]:
    """Which of ``slots`` (int64 [n], any numbers) hold a block of ``length`` bytes at its ``expected`` generation, bool [n].

    Headers of slots from ``available`` on are not touched.
    """
    assert slots.dtype == np.int64
    there = np.empty(len(slots), np.bool_)
    if not 0 < length <= slot_bytes:
        there[:] = False
        return there
    _native.find_slots(table_address, available, slot_bytes, length, np.ascontiguousarray(slots), _u64(expected), there)
    return there


class Found(NamedTuple):
    """Outcome of `read_slots`, uint64 [blocks] each. ``generations``: as they were after the copy, unequal to the expected
    where nothing was copied; ``checksums``: what the headers told; ``digests``: of what was copied."""

    generations: U64
    checksums: U64
    digests: U64


def read_slots(
    addresses: tuple[int, int],
    slot_bytes: int,
    available: int,
    slots: I64,
    expected: U64,
    seeds: U64,
    targets: U64,
    page_bytes: U64,
) -> Found:
    """A validated read of a mapped region: copy each block that is there at its expected generation, and digest what is copied.

    addresses: of header 0 and of slot 0. available: slots from there on are never touched. slots: int64 [blocks], any numbers;
    expected (generations), seeds: uint64 [blocks]; targets: uint64 [blocks, pages]; page_bytes: uint64 [pages].
    """
    assert slots.dtype == np.int64
    found = Found(*np.zeros((3, len(slots)), np.uint64))
    where, sizes = _u64(targets), _u64(page_bytes)
    blocks = (np.ascontiguousarray(slots), _u64(expected), _u64(seeds), *found)
    _native.read_slots(*addresses, slot_bytes, available, *blocks, where, sizes)
    if int(sizes.sum()) < FUSED_BYTES_MIN:
        found.digests[:] = checksums(where, np.broadcast_to(sizes, where.shape), seeds)
    return found


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


def recv_blocks(fd: int, addresses: U64, lengths: U64, seeds: U64, rest: memoryview | bytearray, seconds: float) -> U64:
    """Fill blocks, then ``rest`` (writable), from a connected socket; returns the blocks' checksums (uint64 [blocks]).

    addresses, lengths: uint64 [blocks, pages]; seeds: uint64 [blocks]. Errors as in `send_ranges`.
    """
    where = np.append(addresses.reshape(-1), np.uint64(address_of(rest)))
    sizes = np.append(lengths.reshape(-1), np.uint64(len(rest)))
    if len(seeds) and int(lengths[0].sum()) >= FUSED_BYTES_MIN:
        digests = np.empty(len(seeds), np.uint64)
        _native.recv_blocks(fd, where, sizes, seconds, addresses.shape[1], _u64(seeds), digests)
        return digests
    _native.recv_ranges(fd, where, sizes, seconds)
    return checksums(addresses, lengths, seeds)


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
