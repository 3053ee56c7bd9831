"""One rank of a group in a process of its own: does what it reads, a line of JSON each, and answers with a line."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare import native
from kvshare.errors import KVShareError
from kvshare.places import RegionDescription
from kvshare.region import Region
from kvshare.transport import nccl
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets
from kvshare.transport.group_frames import Rows
from kvshare.transport.tcp import TcpTransport

Bytes = npt.NDArray[np.uint8]


def content(slot: int, length: int) -> Bytes:
    """What block ``slot`` holds in every test."""
    return np.random.default_rng(slot).integers(0, 256, length, np.uint8)


def save(region: Region, slot: int, data: Bytes, seed: int) -> int:
    generation = region.begin(slot)
    native.view(region.slot_address(slot), len(data), writable=True)[:] = data.tobytes()
    where, lengths = np.array([region.slot_address(slot)], np.uint64), np.array([len(data)], np.uint64)
    return region.finish(slot, generation, b"key", len(data), native.checksum(where, lengths, seed))


class PausingSource:
    """A source that says when portion ``at`` is to be gathered, and goes on when it is told to."""

    def __init__(self, inner: nccl.Source, at: int) -> None:
        self.block_bytes = inner.block_bytes
        self.next = 0  # block that is gathered next
        self._inner, self._at, self._portions = inner, at, 0

    def __len__(self) -> int:
        return len(self._inner)

    def gather(self, start: int, stop: int, targets: npt.NDArray[np.uint64]) -> Rows:
        if self._portions == self._at:
            print(json.dumps({"paused": True}), flush=True)
            sys.stdin.readline()
        self._portions += 1
        self.next = start
        return self._inner.gather(start, stop, targets)


class Child:
    """The state of this process between commands."""

    def __init__(self, secret: str) -> None:
        self.transport = TcpTransport(secret, "127.0.0.1")
        self.region: Region | None = None
        self.group: nccl.GroupTransfer | None = None
        self.listener: Any = None
        self.statuses: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self.memory: Bytes = np.empty(0, np.uint8)
        self.request: ReadRequest | None = None

    def serve(self, blocks: int, length: int) -> dict[str, Any]:
        if self.region is not None:
            self.transport.deregister(self.region)
        self.region = Region.anonymous(length, blocks)
        self.transport.register(self.region)
        generations = [save(self.region, slot, content(slot, length), slot) for slot in range(blocks)]
        return {"generations": generations, "endpoint": self.transport.endpoint()}

    def retire(self, slots: list[int]) -> dict[str, Any]:
        assert self.region is not None
        for slot in slots:
            self.region.retire(slot)
        return {}

    def announce(self, ranks: int, limits: dict[str, Any]) -> dict[str, Any]:
        self.listener, plan = nccl.announce("127.0.0.1", ranks, **limits)
        return {"plan": msgspec.msgpack.encode(plan).hex()}

    def join(self, plan: str, rank: int, secret: str) -> dict[str, Any]:
        self.leave()
        known = msgspec.msgpack.decode(bytes.fromhex(plan), type=nccl.GroupPlan).for_rank(rank)
        listener, self.listener = self.listener, None
        self.group = nccl.join(known, secret, listener)
        return {}

    def broadcast(self, generations: list[int], length: int, pause_at: int, overwrite: bool) -> dict[str, Any]:
        """``overwrite``: and meanwhile write other blocks into slots that are being gathered, or will be soon."""
        assert self.group is not None and self.region is not None
        slots = np.arange(len(generations))
        source = nccl.RegionSource(self.region, slots, np.array(generations, np.uint64), slots.astype(np.uint64), length)
        pausing = PausingSource(source, pause_at)
        stop = threading.Event()
        writer = threading.Thread(target=self._overwrite, args=(pausing, length, stop))
        if overwrite:
            writer.start()
        completion = self.group.broadcast(pausing)
        stop.set()
        if overwrite:
            writer.join()
        return told(completion)

    def _overwrite(self, source: PausingSource, length: int, stop: threading.Event) -> None:
        assert self.region is not None
        random = np.random.default_rng(7)
        noise = random.integers(0, 256, length, np.uint8)
        while not stop.wait(0.0002):
            save(self.region, min(source.next + int(random.integers(8)), len(source) - 1), noise, 1)

    def receive(self, generations: list[int], length: int, positions: list[int] | None) -> dict[str, Any]:
        """``generations`` of all blocks of the broadcast; we want those at ``positions``."""
        assert self.group is not None
        chosen = np.arange(len(generations)) if positions is None else np.array(positions, np.int64)
        self.memory = np.full(len(chosen) * length, 0xEE, np.uint8)
        # Two pages a block, so that pages of targets are seen to be filled.
        starts = np.uint64(native.address_of(self.memory)) + np.arange(len(chosen), dtype=np.uint64) * np.uint64(length)
        pages = np.array([length // 4, length - length // 4], np.uint64)
        targets = Targets(np.stack([starts, starts + pages[0]], axis=1), pages)
        expected = np.array(generations, np.uint64)[chosen]
        self.request = ReadRequest(chosen, expected, chosen.astype(np.uint64), targets)
        completion = self.group.receive(self.request, chosen, len(generations))
        self.statuses = completion.statuses
        return {**told(completion), "wrong": self.wrong()}

    def rest(self, endpoint: str, slots: int) -> dict[str, Any]:
        """Read singly what the group left, from ``endpoint``."""
        assert self.request is not None
        left = np.flatnonzero(self.statuses != BlockStatus.OK)
        request, targets = self.request, self.request.targets
        length = targets.block_bytes
        description = RegionDescription("donor", length, length, slots, "elsewhere", "", "", endpoint)
        chosen = Targets(targets.addresses[left], targets.page_bytes)
        again = ReadRequest(request.slots[left], request.generations[left], request.seeds[left], chosen)
        completion = self.transport.read(description, again).wait()
        assert completion is not None
        self.statuses[left] = completion.statuses
        return {**told(completion), "all": self.statuses.tolist(), "wrong": self.wrong()}

    def wrong(self) -> int:
        """Blocks that were accepted and are not what they should be."""
        assert self.request is not None
        length = self.request.targets.block_bytes
        good = np.flatnonzero(self.statuses == BlockStatus.OK).tolist()
        rows = self.memory.reshape(-1, length)
        return sum(not np.array_equal(rows[i], content(int(self.request.slots[i]), length)) for i in good)

    def default_group(self) -> dict[str, Any]:
        """Be in a default group of torch.distributed, as an engine is."""
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return {}

    def default_group_works(self) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        ones = torch.ones(3)
        dist.all_reduce(ones)
        return {"sum": float(ones.sum())}

    def leave(self) -> dict[str, Any]:
        group, self.group = self.group, None
        if group is not None:
            group.close()
        return {"threads": sorted(thread.name for thread in threading.enumerate()), "files": len(os.listdir("/proc/self/fd"))}


def told(completion: Completion) -> dict[str, Any]:
    return {"statuses": completion.statuses.tolist(), "error": completion.error, "seconds": completion.seconds}


def main(secret: str) -> None:
    child = Child(secret)
    for line in sys.stdin:
        command = json.loads(line)
        do: Callable[..., dict[str, Any]] = getattr(child, command.pop("do"))
        try:
            answer = do(**command)
        except KVShareError as error:
            answer = {"raised": type(error).__name__, "error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
