"""A process with a small device region, as an engine has one: layer-major pages that it rewrites block by block, each version
one repeated number, its generation. Prints the region's description; runs until it is killed or its parent is gone."""

from __future__ import annotations

import os
import sys
import time

import msgspec
import numpy as np

from kvshare import native, processes
from kvshare.device import DeviceTable
from kvshare.places import DEVICE, ProcessMemory, RegionDescription

LAYERS, SLOTS, PAGE_BYTES = 4, 64, 8192


def main(table_path: str, seed: int) -> None:
    layers = [np.zeros((SLOTS, PAGE_BYTES // 8), np.uint64) for _ in range(LAYERS)]
    table = DeviceTable.create(table_path, SLOTS, LAYERS * PAGE_BYTES)
    bases = tuple(native.address_of(layer) for layer in layers)
    pages = (PAGE_BYTES,) * LAYERS
    process = os.getpid(), processes.started(os.getpid()), processes.pid_space()
    memory = ProcessMemory(*process, "DRAM", 0, bases, pages, pages, table.table_address, 8)
    described = RegionDescription("a", 1, LAYERS * PAGE_BYTES, SLOTS, "", "", table_path, "", DEVICE, memory)

    def rewrite(slots: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        table.begin(slots)
        begun = table.generations(slots)
        for slot, generation in zip(slots.tolist(), begun.tolist(), strict=True):
            for layer in layers:
                layer[slot] = generation + 1
        assert table.finish(slots, begun).all()

    rewrite(np.arange(SLOTS))
    sys.stdout.buffer.write(msgspec.json.encode(described) + b"\n")
    sys.stdout.buffer.flush()
    random, parent = np.random.default_rng(seed), os.getppid()
    while os.getppid() == parent:
        rewrite(random.choice(SLOTS, int(random.integers(1, 9)), replace=False))
        time.sleep(float(random.uniform(0, 3e-4)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
