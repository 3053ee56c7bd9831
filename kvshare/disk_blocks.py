"""Blocks between memory and a disk region's data file, a row of neighbouring slots by one call: sealed and verified here.

    write   block ──────────────────────────> slot      straight, where it fills its slot and lies on whole pages
            block ── copy or seal ─> scratch ──> slot     with zeros behind it: whole slots are written, nothing old stays
    read    slot ──> block ── verify
            slot ──> scratch ── copy or unseal ─> block ── verify

Threads: any, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare import keys, native
from kvshare.disk_io import PAGE_BYTES, RUN_BYTES_MAX, BlockFile, Scratch
from kvshare.native import U8, BlockStatus
from kvshare.vault import UNSEALED, Sealed, Vault, associated


class Block(NamedTuple):
    """A block to be written."""

    slot: int
    key: bytes
    length: int
    checksum: int
    address: int
    expires: int


class Wanted(NamedTuple):
    """A block to be read, as its header says it is."""

    slot: int
    key: bytes
    address: int
    header: np.void


class BlockMover:
    """See the module's docstring. place_id: what the sealed blocks of the region are bound to."""

    def __init__(self, data: BlockFile, slot_bytes: int, place_id: bytes, vault: Vault) -> None:
        self._data, self._vault = data, vault
        self._slot_bytes = slot_bytes
        self._place_id = place_id
        self._scratch = Scratch(max(RUN_BYTES_MAX, slot_bytes))

    def write(self, blocks: Sequence[Block]) -> list[Sealed | None]:
        """Bring blocks to neighbouring slots. How each is sealed; None: its tenant's secret can't be had, it is not there.

        Raises:
            OSError: of the disk; what the slots hold is undefined.
        """
        seals: list[Sealed | None] = []
        buffers: list[memoryview] = []
        with ExitStack() as stack:
            scratch: memoryview | None = None
            for i, block in enumerate(blocks):
                if not self._vault.enabled and self._fits(block.address, block.length):
                    buffers.append(native.view(block.address, block.length))
                    seals.append(UNSEALED)
                    continue
                if scratch is None:
                    scratch = stack.enter_context(self._scratch.taken())
                place = scratch[i * self._slot_bytes : (i + 1) * self._slot_bytes]
                seals.append(self._seal(block, place[: block.length]))
                rest = self._slot_bytes - block.length if seals[-1] is not None else self._slot_bytes
                place[self._slot_bytes - rest :] = bytes(rest)
                buffers.append(place)
            self._data.write(buffers, blocks[0].slot * self._slot_bytes)
        return seals

    def read(self, blocks: Sequence[Wanted], length: int) -> U8:
        """Bring blocks of ``length`` bytes from neighbouring slots; uint8 [blocks]: `BlockStatus.OK` or CORRUPT.

        Raises:
            OSError: of the disk; what the targets hold is undefined.
        """
        statuses = np.full(len(blocks), BlockStatus.OK, np.uint8)
        targets = [native.view(block.address, length, writable=True) for block in blocks]
        start = blocks[0].slot * self._slot_bytes
        sealed = self._vault.enabled or any(block.header["key_id"] for block in blocks)
        if not sealed and all(self._fits(block.address, length) for block in blocks):
            self._data.read(targets, start)
        else:
            with self._scratch.taken() as scratch:
                self._data.read([scratch[: len(blocks) * self._slot_bytes]], start)
                for i, block in enumerate(blocks):
                    at = i * self._slot_bytes
                    if not self._unseal(block, scratch[at : at + length], targets[i]):
                        statuses[i] = BlockStatus.CORRUPT
        addresses = np.array([block.address for block in blocks], np.uint64).reshape(-1, 1)
        seeds = np.array(keys.seeds_of(block.key for block in blocks), np.uint64)
        digests = native.checksums(addresses, np.full_like(addresses, length), seeds)
        told: npt.NDArray[np.uint64] = np.array([block.header["checksum"] for block in blocks], np.uint64)
        statuses[digests != told] = BlockStatus.CORRUPT
        return statuses

    def _seal(self, block: Block, target: memoryview) -> Sealed | None:
        aad = associated(self._place_id, block.slot, block.key, block.length)
        return self._vault.seal(keys.tenant_of(block.key), aad, native.view(block.address, block.length), target)

    def _unseal(self, block: Wanted, source: memoryview, target: memoryview) -> bool:
        header = block.header
        sealed = Sealed(header["nonce"].tobytes(), header["tag"].tobytes(), int(header["key_id"]))
        aad = associated(self._place_id, block.slot, block.key, len(source))
        return self._vault.unseal(keys.tenant_of(block.key), aad, sealed, source, target)

    def _fits(self, address: int, length: int) -> bool:
        return length == self._slot_bytes and (address % PAGE_BYTES == 0 or not self._data.direct)
