"""A process with a device region, as an engine has one: layer-major pages in the GPU's memory, each version of a block one
repeated number, its generation, written by a kernel. Prints the region's description; runs until its parent is gone.

    python owner_child.py TABLE DEVICE still|rewriting
"""

from __future__ import annotations

import os
import sys
import time

import msgspec
import numpy as np
import torch

from kvshare import processes
from kvshare.device import STRIDE, DeviceTable
from kvshare.places import DEVICE, ProcessMemory, RegionDescription
from kvshare.transport.nixl import NixlTransport

LAYERS, SLOTS, PAGE_BYTES = 8, 64, 64 << 10


def main(table_path: str, where: str, mode: str) -> None:
    device = torch.device(where)
    layers = [torch.zeros((SLOTS, PAGE_BYTES // 8), dtype=torch.int64, device=device) for _ in range(LAYERS)]
    table = DeviceTable.create(table_path, SLOTS, LAYERS * PAGE_BYTES)

    def rewrite(slots: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        table.begin(slots)
        begun = table.generations(slots)
        for slot, generation in zip(slots.tolist(), begun.tolist(), strict=True):
            for layer in layers:
                layer[slot].fill_(generation + 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert table.finish(slots, begun).all()

    rewrite(np.arange(SLOTS))
    pages, process = (PAGE_BYTES,) * LAYERS, os.getpid()
    kind = "DRAM" if device.type == "cpu" else "VRAM"
    identity = process, processes.started(process), processes.pid_space(), kind, device.index or 0
    bases = tuple(layer.data_ptr() for layer in layers)
    memory = ProcessMemory(*identity, bases, pages, pages, table.table_address, STRIDE)
    with NixlTransport() as transport:
        memory = transport.register_memory(memory, SLOTS)
        description = RegionDescription("owner", 1, LAYERS * PAGE_BYTES, SLOTS, "", "", table_path, "", DEVICE, memory)
        sys.stdout.buffer.write(msgspec.json.encode(description) + b"\n")
        sys.stdout.buffer.flush()
        random, parent = np.random.default_rng(7), os.getppid()
        while os.getppid() == parent:
            if mode == "rewriting":
                rewrite(random.choice(SLOTS, int(random.integers(1, 9)), replace=False))
            time.sleep(float(random.uniform(0, 3e-3)))


if __name__ == "__main__":
    main(*sys.argv[1:])
