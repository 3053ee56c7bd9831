"""A process that owns a region and serves it through NIXL until its input closes or it is killed.

    python nixl_child.py KIND TABLE_PATH SLOTS BLOCK_BYTES [overwrite]

Every block is one u64 over and over: its generation. ``overwrite``: blocks of the device region are overwritten all the time.
Prints the region's description.
"""

from __future__ import annotations

import os
import sys
import threading

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare import native, processes
from kvshare.device import DeviceTable
from kvshare.places import DEVICE, ProcessMemory, RegionDescription
from kvshare.slots import Region
from kvshare.transport.nixl import NixlTransport


def host_region(slots: int, block_bytes: int) -> Region:
    region = Region.anonymous(block_bytes, slots)
    for slot in range(slots):
        generation, address = region.begin(slot), region.slot_address(slot)
        data = np.full(block_bytes // 8, generation + 1, np.uint64)
        native.view(address, block_bytes, writable=True)[:] = data.tobytes()
        whole = np.array([address], np.uint64), np.array([block_bytes], np.uint64)
        region.finish(slot, generation, b"key-%d" % slot, block_bytes, native.checksum(*whole, seed=slot))
    return region


def overwrite(table: DeviceTable, pages: npt.NDArray[np.uint64]) -> None:
    random = np.random.default_rng(4)
    while True:
        slots = random.permutation(len(pages))[:4]
        table.begin(slots)
        begun = table.generations(slots)
        pages[slots] = (begun + np.uint64(1))[:, None]
        table.finish(slots, begun)


def main(kind: str, path: str, slots: int, block_bytes: int, race: bool) -> None:
    transport = NixlTransport()
    if kind == "host":
        region = host_region(slots, block_bytes)
        transport.register(region)
        described = msgspec.structs.replace(region.describe("a", "", ""), memory=transport.memory_of(region))
    else:
        pages = np.zeros((slots, block_bytes // 8), np.uint64)
        table = DeviceTable.create(path, slots, block_bytes)
        table.begin(range(slots))
        begun = table.generations(range(slots))
        pages[:] = (begun + np.uint64(1))[:, None]
        table.finish(range(slots), begun)
        # Two pages a block, each half of it: an engine's layers.
        base, half = native.address_of(pages), block_bytes // 2
        who = (os.getpid(), processes.started(os.getpid()), processes.pid_space(), "DRAM", 0)
        memory = ProcessMemory(*who, (base, base + half), (block_bytes,) * 2, (half,) * 2, 0, 0)
        memory = transport.register_memory(memory, slots, table)
        described = RegionDescription("a", 1, block_bytes, slots, "this host", "", path, "", DEVICE, memory)
        if race:
            threading.Thread(target=overwrite, args=(table, pages), daemon=True).start()
    print(msgspec.json.encode(described).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), "overwrite" in sys.argv[5:])
