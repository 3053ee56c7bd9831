"""Houses: a region with an owner and a reader, for every transport."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from kvshare import native
from kvshare.places import RegionDescription
from kvshare.slots import Arena, Region
from kvshare.transport.base import Completion, ReadRequest, Targets, Transport
from kvshare.transport.faulty import FaultyTransport
from kvshare.transport.loopback import LoopbackTransport, Network
from kvshare.transport.nixl import NixlTransport, available
from kvshare.transport.process import ProcessTransport, memory_of_region
from kvshare.transport.shm import ShmTransport
from kvshare.transport.tcp import TcpTransport

SLOT_BYTES = 64 << 10
SLOTS = 64
SECRET = "a secret of the cluster"
HOST = "this host"
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Block:
    """What was saved, and where."""

    slot: int
    generation: int
    seed: int
    data: Bytes


class Landing:
    """Scattered memory for blocks: page ``j`` of block ``i`` lies anywhere. It lives to the end of the test, since a request
    holds addresses only."""

    kept: ClassVar[list[Bytes]] = []

    def __init__(self, blocks: int, page_bytes: Sequence[int], seed: int = 0) -> None:
        self._page_bytes = page_bytes
        room = max(page_bytes)
        self.memory = np.full(2 * blocks * len(page_bytes) * room, 0xEE, np.uint8)
        self.kept.append(self.memory)
        places = np.random.default_rng(seed).permutation(2 * blocks * len(page_bytes))[: blocks * len(page_bytes)]
        self._offsets = places.reshape(blocks, len(page_bytes)) * room
        addresses = np.uint64(native.address_of(self.memory)) + self._offsets.astype(np.uint64)
        self.targets = Targets(addresses, np.array(page_bytes, np.uint64))

    def block(self, index: int) -> Bytes:
        pages = zip(self._offsets[index].tolist(), self._page_bytes, strict=True)
        return np.concatenate([self.memory[at : at + length] for at, length in pages])


def request_for(blocks: Sequence[Block], targets: Targets, seconds: float = 5.0) -> ReadRequest:
    slots = np.array([block.slot for block in blocks], np.int64)
    generations = np.array([block.generation for block in blocks], np.uint64)
    seeds = np.array([block.seed for block in blocks], np.uint64)
    return ReadRequest(slots, generations, seeds, targets, seconds)


def write(region: Region, slot: int, data: Bytes, seed: int) -> Block:
    """Save ``data`` in a slot as a node would."""
    generation = region.begin(slot)
    native.view(region.slot_address(slot), len(data), writable=True)[:] = data.tobytes()
    checksum = native.checksum(np.array([region.slot_address(slot)], np.uint64), np.array([len(data)], np.uint64), seed)
    return Block(slot, region.finish(slot, generation, b"key-%d" % slot, len(data), checksum), seed, data)


@pytest.fixture(autouse=True)
def _landings_live_to_the_end_of_the_test() -> Iterator[None]:
    yield
    Landing.kept.clear()


@dataclass
class House:
    """A region, the transport of its owner and the transport of a reader."""

    name: str
    region: Region
    owner: Transport
    reader: Transport
    description: RegionDescription

    def save(self, slots: Sequence[int], length: int = SLOT_BYTES, seed: int = 0) -> list[Block]:
        """Random blocks in these slots."""
        random = np.random.default_rng(seed)
        return [write(self.region, slot, random.integers(0, 256, length, np.uint8), seed * 1000 + slot) for slot in slots]

    def read(self, request: ReadRequest) -> Completion:
        completion = self.reader.read(self.description, request).wait()
        assert completion is not None
        return completion


def _files(folder: Path) -> Region:
    arena = Arena.open(str(folder / "arena"), SLOT_BYTES, SLOTS * SLOT_BYTES, 1 << 20)
    while arena.available_slots < SLOTS:
        assert arena.grow()
    return arena


@pytest.fixture(params=["loopback", "shm", "tcp", "process", "nixl", "faulty"])
def house(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[House]:
    """One house per transport; ``faulty`` has no faults."""
    name: str = request.param
    region = _files(short_dir) if name == "shm" else Region.anonymous(SLOT_BYTES, SLOTS)
    owner: Transport
    reader: Transport
    if name == "shm":
        owner, reader = ShmTransport("the owner's process"), ShmTransport(HOST)
    elif name == "tcp":
        owner, reader = TcpTransport(SECRET, "127.0.0.1"), TcpTransport(SECRET)
    elif name == "process":
        owner, reader = ProcessTransport(), ProcessTransport()
    elif name == "nixl":
        if reason := available():
            pytest.skip(reason)
        owner, reader = NixlTransport(), NixlTransport(tcp=True)  # by whatever it finds here
    else:
        network = Network()
        owner, reader = LoopbackTransport(network, "a"), LoopbackTransport(network)
        reader = FaultyTransport(reader, seed=1) if name == "faulty" else reader
    owner.register(region)
    description = region.describe("a", HOST, owner.endpoint())
    if name == "process":
        description = msgspec.structs.replace(description, memory=memory_of_region(region))
    elif isinstance(owner, NixlTransport):
        description = msgspec.structs.replace(description, memory=owner.memory_of(region))
    with owner, reader:
        yield House(name, region, owner, reader, description)
    if isinstance(region, Arena):
        region.close(unlink=True)


@pytest.fixture
def tcp_house() -> Iterator[House]:
    """The house of ``tcp``, for what only a network does."""
    region = Region.anonymous(SLOT_BYTES, SLOTS)
    with TcpTransport(SECRET, "127.0.0.1") as owner, TcpTransport(SECRET) as reader:
        owner.register(region)
        yield House("tcp", region, owner, reader, region.describe("a", HOST, owner.endpoint()))


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait for what another thread does soon; fails after a time that no working machine needs."""

    def wait_for(condition: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(2000):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError("it did not happen")

    return wait_for


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Threads and descriptors of this process are afterwards those that it had before."""
    gc.collect()  # what earlier tests left to be collected shall not be gone by our doing
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors
