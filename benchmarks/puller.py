"""A peer that does nothing but pull blocks out of an engine's KV cache: a child process of `bench_live`.

Its argument is the region's description (JSON). One line on stdin starts it; at the next one it stops and prints a JSON line:

    {"seconds": of pulling, "bytes": of blocks that were OK, "blocks": {status: how many}, "errors": why others were not}

It ends when its input does. Each read is of as many blocks as a prompt has, complete ones that the region's table names, chosen
at random. It runs only where nobody else wants to (SCHED_IDLE), on the processors it was started on.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections import Counter
from io import FileIO

import msgspec
import numpy as np
from common import BLOCKS

from kvshare import native
from kvshare.device import DeviceTable
from kvshare.places import RegionDescription
from kvshare.transport.base import BlockStatus, ReadRequest, Targets
from kvshare.transport.process import ProcessTransport

REQUEST_SECONDS = 2.0


class Puller:
    """Reads of one region into memory of ours that is never new to the system."""

    def __init__(self, region: RegionDescription) -> None:
        self._region = region
        self._table = DeviceTable.open(region.table_path)
        self._transport = ProcessTransport()
        self._memory = np.ones((BLOCKS, region.slot_bytes), np.uint8)
        self._random = np.random.default_rng(1)

    def read(self, blocks: Counter[str], errors: Counter[str]) -> int:
        """One read; returns the bytes of its blocks that were OK."""
        generations = self._table.generations(np.arange(self._table.slots))
        complete = np.flatnonzero((generations != 0) & (generations % np.uint64(2) == 0))
        slots = self._random.permutation(complete)[:BLOCKS]
        base, length = native.address_of(self._memory), self._region.slot_bytes
        targets = Targets.strided(base, length, np.arange(len(slots)), length)
        seeds = np.zeros(len(slots), np.uint64)  # nobody asks for them
        request = ReadRequest(slots, generations[slots], seeds, targets, REQUEST_SECONDS)
        completion = self._transport.read(self._region, request).wait()
        assert completion is not None
        blocks.update(BlockStatus(status).name for status in completion.statuses.tolist())
        if completion.error:
            errors[completion.error] += 1
        return completion.bytes


def serve(puller: Puller, lines: FileIO) -> None:
    while lines.readline():
        blocks, errors = Counter[str](), Counter[str]()
        moved, began = 0, time.perf_counter()
        while not select.select([lines], [], [], 0)[0]:
            moved += puller.read(blocks, errors)
        said = {"seconds": time.perf_counter() - began, "bytes": moved, "blocks": blocks, "errors": errors}
        if lines.readline():
            print(json.dumps(said), flush=True)


def main() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # before there are threads: they inherit it
    puller = Puller(msgspec.json.decode(sys.argv[1], type=RegionDescription))
    with open(0, "rb", buffering=0) as lines:  # a line that waits in a buffer would not be selected
        serve(puller, lines)


if __name__ == "__main__":
    main()
