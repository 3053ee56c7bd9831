"""The donor of `bench_overwrite`: a process with a small device region whose blocks it rewrites all the time, in random pieces.

What is in a block follows from its key, so whoever knows the key can tell every byte of it. Keys are never used twice.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare import processes
from kvshare.device import STRIDE, DeviceTable
from kvshare.places import DEVICE, ProcessMemory, RegionDescription
from kvshare.transport.nixl import NixlTransport

SLOTS = 24
PAGES_MAX = 6
PAGE_BYTES = (4 << 10, 8 << 10, 16 << 10)
BLOCK_BYTES_MAX = PAGES_MAX * max(PAGE_BYTES)
TOLD = np.dtype([("key", "<u8"), ("slot", "<i8"), ("generation", "<u8")])  # of blocks that are complete
PAUSE_SECONDS_MAX = 300e-6

Bytes = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
_PATTERN = np.random.default_rng(3).integers(0, 1 << 63, BLOCK_BYTES_MAX // 8, np.uint64)


def content(key: int, length: int) -> Bytes:
    """The ``length`` bytes of the block of this key. Those of two keys differ in every word, and so do any two words of one
    block."""
    mixed = (key * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % (1 << 64)  # odd factor: no two keys give the same
    return (_PATTERN[: length // 8] ^ np.uint64(mixed ^ mixed >> 32)).view(np.uint8)


def donate(pipe: Connection, seed: int, node: str, host: str, table_path: str, by_nixl: bool) -> None:
    """Be a donor until the other end of ``pipe`` closes. Sends its region's description, then what is complete (`TOLD`).

    host: which readers map its table. by_nixl: it has a NIXL agent.
    """
    processes.allow_reading()
    donor = Donor(seed, table_path)
    memory = donor.memory
    with contextlib.ExitStack() as stack:
        if by_nixl:
            nixl = stack.enter_context(NixlTransport(host))
            memory = nixl.register_memory(memory, SLOTS, donor.table)
            stack.callback(nixl.deregister_memory, memory)
        stack.callback(donor.table.retire_all)
        path = table_path if host or donor.chance.random() < 0.5 else ""  # without, generations are read like bytes
        described = RegionDescription(node, seed, donor.block_bytes, SLOTS, host, "", path, "", DEVICE, memory)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            pipe.send_bytes(msgspec.msgpack.encode(described))
            while not pipe.poll():
                pipe.send_bytes(donor.overwrite().tobytes())


class Donor:
    """Memory, its table, and what is written to it. All choices follow from ``seed``."""

    def __init__(self, seed: int, table_path: str) -> None:
        self.chance = chance = random.Random(seed)
        self._keys = seed << 32
        pages, page_bytes = chance.randint(2, PAGES_MAX), chance.choice(PAGE_BYTES)
        self.block_bytes = pages * page_bytes
        if chance.random() < 0.5:  # layer by layer, or block by block: the same pages, other strides
            self._pages = np.zeros((pages, SLOTS, page_bytes), np.uint8)
        else:
            self._pages = np.zeros((SLOTS, pages, page_bytes), np.uint8).transpose(1, 0, 2)
        self.table = DeviceTable.create(table_path, SLOTS, self.block_bytes)
        process = os.getpid(), processes.started(os.getpid()), processes.pid_space()
        bases = tuple(self._pages.ctypes.data + page * self._pages.strides[0] for page in range(pages))
        strides, lengths = (self._pages.strides[1],) * pages, (page_bytes,) * pages
        self.memory = ProcessMemory(*process, "DRAM", 0, bases, strides, lengths, self.table.table_address, STRIDE)

    def overwrite(self) -> npt.NDArray[np.void]:
        """New blocks in some slots; returns what is complete now (`TOLD`)."""
        chance = self.chance
        slots = np.array(chance.sample(range(SLOTS), chance.randint(1, 4)), np.int64)
        self.table.begin(slots)
        begun = self.table.generations(slots)
        keys = [self._keys + i for i in range(len(slots))]
        self._keys += len(slots)
        self._write(slots, keys)
        if chance.random() < 0.1:
            self.table.begin(slots[:1])  # handed out again before it was complete
        held = self.table.finish(slots, begun)
        if chance.random() < 0.02:
            self.table.retire_all()  # what is told now is gone already
        told = np.empty(int(held.sum()), TOLD)
        told["key"], told["slot"], told["generation"] = np.array(keys, np.uint64)[held], slots[held], begun[held] + np.uint64(1)
        return told

    def _write(self, slots: I64, keys: list[int]) -> None:
        """All bytes of these blocks, cut and ordered at random, with pauses as of one who computes them."""
        chance = self.chance
        pages, _, page_bytes = self._pages.shape
        pieces = []
        for slot, key in zip(slots.tolist(), keys, strict=True):
            data = content(key, self.block_bytes).reshape(pages, page_bytes)
            for page in range(pages):
                cut = chance.randrange(page_bytes)
                pieces += [(slot, page, data, 0, cut), (slot, page, data, cut, page_bytes)]
        chance.shuffle(pieces)
        for slot, page, data, start, stop in pieces:
            self._pages[page, slot, start:stop] = data[page, start:stop]
            if chance.random() < 0.03:
                time.sleep(chance.uniform(0, PAUSE_SECONDS_MAX))
