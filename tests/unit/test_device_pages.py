"""Blocks of other GPUs that land in the pages of ours: when, which, and what becomes of a read that hangs.

The device is a stand-in: its memory is the CPU's, so that the process transport can stand in for NIXL, and its engine's stream
gets to what it was given no sooner than somebody waits for it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's own making
    torch = pytest.importorskip("torch")

from kvshare import keys, native, processes
from kvshare.device import DeviceTable
from kvshare.integrations.vllm.direct import part_of
from kvshare.integrations.vllm.layout import Layout, pages_of
from kvshare.integrations.vllm.pages import AtOnce, DevicePages
from kvshare.loading import LoadPlan, Measured, Source, SourceRead
from kvshare.places import DEVICE, ProcessMemory, RegionDescription
from kvshare.pull import Pull
from kvshare.slots import Region
from kvshare.transport.base import I64, BlockStatus, Completion, ReadRequest, Targets, Transfer
from kvshare.transport.loopback import LoopbackTransport, Network
from kvshare.transport.process import ProcessTransport

OK, STALE, CORRUPT, CANCELLED = BlockStatus.OK, BlockStatus.STALE, BlockStatus.CORRUPT, BlockStatus.CANCELLED
UNREACHABLE, TIMEOUT = BlockStatus.UNREACHABLE, BlockStatus.TIMEOUT
LAYERS, BLOCKS, WORDS = 3, 16, 64
BLOCK_BYTES = LAYERS * WORDS * 8
PREFIX = keys.prefix(b"f" * keys.FAMILY_BYTES, keys.variant(b"", ""))
SECONDS = 10.0  # of patience with what ends at once


def hash_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


class LateEngine(AtOnce):
    """Its stream runs only while somebody waits for a mark, and only so far. ``waiters``: threads that did."""

    def __init__(self) -> None:
        self.given: list[Callable[[], object]] = []
        self.waiters: set[str] = set()
        self.lost = False
        self._done = 0

    def mark(self) -> int:  # type: ignore[override]
        return len(self.given)

    def wait(self, mark: int) -> None:  # type: ignore[override]
        if self.lost:
            raise RuntimeError("the device is lost")
        self.waiters.add(threading.current_thread().name)
        self.after(mark)

    def after(self, mark: int) -> None:  # type: ignore[override]
        while self._done < mark:
            self._done += 1
            self.given[self._done - 1]()


class Cache:
    """A KV cache, each layer in an allocation of its own. ``peers``: it has a table, and a description for others."""

    def __init__(self, table_path: Path | None = None) -> None:
        self.tensors = {f"layer.{i}": torch.zeros((BLOCKS, 1, 1, WORDS), dtype=torch.int64) for i in range(LAYERS)}
        pages = [page for tensor in self.tensors.values() for page in pages_of(tensor, BLOCKS)[0]]
        self.layout = Layout(*(np.array(column, np.uint64) for column in zip(*pages, strict=True)), "test", "cpu")
        if table_path is None:
            return
        self.table = DeviceTable.create(str(table_path), BLOCKS, BLOCK_BYTES)
        self.table.begin(np.arange(BLOCKS))
        self.table.finish(np.arange(BLOCKS), self.table.generations(np.arange(BLOCKS)))
        bases, strides, lengths = (
            tuple(column.tolist()) for column in (self.layout.bases, self.layout.strides, self.layout.page_bytes)
        )
        process = os.getpid(), processes.started(os.getpid()), processes.pid_space()
        memory = ProcessMemory(*process, "DRAM", 0, bases, strides, lengths, self.table.table_address, 8)
        self.description = RegionDescription("engine", 1, BLOCK_BYTES, BLOCKS, "", "", str(table_path), "", DEVICE, memory)

    def fill(self, block: int, value: int) -> None:
        for tensor in self.tensors.values():
            tensor[block] = value

    def values(self, block: int) -> set[int]:
        return {value for tensor in self.tensors.values() for value in tensor[block].flatten().tolist()}

    def read(self, positions: list[int], slots: list[int]) -> SourceRead:
        return SourceRead(self.description, np.array(positions), np.array(slots), self.table.generations(slots))


class HostRegion:
    """A node's region: block ``number`` of the plans is a repeated number in slot ``slot``."""

    def __init__(self, network: Network) -> None:
        self.region = Region.anonymous(BLOCK_BYTES, BLOCKS)
        self.description = self.region.describe("node", host_id="", endpoint="")
        LoopbackTransport(network, "node").register(self.region)

    def save(self, number: int, slot: int, value: int) -> None:
        generation, address = self.region.begin(slot), self.region.slot_address(slot)
        native.view(address, BLOCK_BYTES, writable=True)[:] = np.full(BLOCK_BYTES // 8, value, np.int64).tobytes()
        key = PREFIX + hash_of(number)
        length = np.array([BLOCK_BYTES], np.uint64)
        checksum = native.checksum(np.array([address], np.uint64), length, int(keys.seeds_of([key])[0]))
        self.region.finish(slot, generation, key, BLOCK_BYTES, checksum)

    def read(self, positions: list[int], slots: list[int]) -> SourceRead:
        generations = self.region.headers["generation"][slots].astype(np.uint64)
        return SourceRead(self.description, np.array(positions), np.array(slots), generations)


class Mover:
    """Loads as `kvshare.mover.Mover` does, over real transports; ``stalled``: device regions answer when the test says so."""

    def __init__(self) -> None:
        self.network = Network()
        self._process, self._loopback = ProcessTransport(), LoopbackTransport(self.network)
        self.targets: list[Targets] = []
        self.stalled: list[tuple[ReadRequest, Transfer]] | None = None

    def load(self, plan: LoadPlan, targets: Targets) -> Pull:
        self.targets.append(targets)
        pull = Pull(plan, targets, 2.0, self)
        pull.advance()
        return pull

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        if description.kind != DEVICE:
            return self._loopback.read(description, request)
        if self.stalled is None:
            return self._process.read(description, request)
        transfer = Transfer()
        transfer.on_cancel = lambda: end(transfer, request, CANCELLED)
        self.stalled.append((request, transfer))
        return transfer

    def is_own(self, description: RegionDescription) -> bool:
        return False

    def rate(self, source: Source) -> float:
        return 0.0

    def began(self, source: Source) -> None: ...

    def ended(self, source: Source, moved: int) -> None: ...

    def gave_up(self, measured: Measured) -> None: ...

    def corrupt(self, read: SourceRead, blocks: I64) -> None: ...

    def missed(self, keys: list[bytes]) -> None: ...

    def resume(self, pull: Pull) -> None:
        pull.advance()


def end(transfer: Transfer, request: ReadRequest, status: BlockStatus) -> None:
    transfer.complete(Completion(np.full(len(request), status, np.uint8), 0, 0.0, status.name))


class Ways:
    """All regions can be read into the device. ``places``: what is in quarantine; ``asked`` counts questions for it."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []
        self.asked = threading.Semaphore(0)

    def lands_directly(self, description: RegionDescription) -> bool:
        return True

    def quarantined(self) -> list[tuple[int, int]]:
        places = self.places
        self.asked.release()
        return places


class House:
    def __init__(self, folder: Path) -> None:
        self.mover, self.ways, self.engine = Mover(), Ways(), LateEngine()
        self.source, self.cache = Cache(folder / "table"), Cache()
        self.pages = DevicePages(self.cache.layout, self.cache.tensors, self.mover, self.engine, self.ways)  # type: ignore[arg-type]
        for block in range(BLOCKS):
            self.source.fill(block, 100 + block)

    def load(self, reads: list[SourceRead], block_ids: list[int]) -> Transfer:
        return self.pages.load(LoadPlan(PREFIX, [hash_of(i) for i in range(len(block_ids))], reads), block_ids)

    def statuses(self, transfer: Transfer) -> list[int]:
        completion = transfer.wait(SECONDS)
        assert completion is not None
        return completion.statuses.tolist()


@pytest.fixture
def house(tmp_path: Path) -> Any:
    made = House(tmp_path)
    yield made
    made.pages.close()


def test_blocks_land_in_their_pages_after_a_former_owners_step_for_which_the_engine_does_not_wait(house: House) -> None:
    for block in (3, 5, 7):
        house.engine.given.append(lambda block=block: house.cache.fill(block, -1))  # type: ignore[misc]
    transfer = house.load([house.source.read([0, 1], [9, 2])], [5, 3])
    assert house.statuses(transfer) == [OK, OK]
    assert [house.cache.values(block) for block in (5, 3, 7)] == [{109}, {102}, {-1}]
    assert house.engine.waiters == {"kvshare-device"}
    assert np.array_equal(house.mover.targets[0].addresses, house.cache.layout.targets([5, 3]).addresses), "no detour"


def test_a_plan_of_both_kinds_of_sources_has_each_blocks_own_status(house: House) -> None:
    host = HostRegion(house.mover.network)
    for number, slot in ((0, 4), (2, 1), (5, 2)):
        host.save(number, slot, 200 + number)
    native.view(host.region.slot_address(1), 8, writable=True)[:] = bytes(8)  # block 2 is damaged
    reads = [house.source.read([4, 1], [9, 2]), host.read([0, 5, 2], [4, 2, 1]), house.source.read([3], [0])]
    house.source.table.begin([9])  # block 4 is being written
    transfer = house.load(reads, [10, 11, 12, 13, 14, 15])
    assert house.statuses(transfer) == [OK, OK, CORRUPT, OK, STALE, OK]
    found = [house.cache.values(block) for block in (10, 11, 12, 13, 15)]
    assert found == [{200}, {102}, {0}, {100}, {205}], "a damaged block has never been in the engine's memory"
    completion = transfer.wait(0)
    assert completion is not None and completion.bytes == 4 * BLOCK_BYTES
    assert "engine: " in completion.error and "node: " in completion.error


def test_a_nodes_blocks_take_the_way_through_pinned_memory_whatever_a_transport_can(house: House) -> None:
    host = HostRegion(house.mover.network)
    host.save(0, 4, 77)
    assert house.statuses(house.load([host.read([0], [4])], [6])) == [OK]
    assert house.cache.values(6) == {77}
    assert house.mover.targets[0].addresses[0, 0] != house.cache.layout.targets([6]).addresses[0, 0]


def test_a_load_is_held_back_while_a_read_that_was_given_up_may_still_write(house: House) -> None:
    house.mover.stalled = []
    late, other = (house.load([house.source.read([0, 1], [9, 2])], blocks) for blocks in ([5, 3], [6, 7]))
    house.engine.wait(house.engine.mark())
    house.pages.save([], []).wait(SECONDS)  # the thread has come so far
    base, length = int(house.cache.layout.bases[1]), int(house.cache.layout.strides[1])
    house.ways.places = [(1, 4096), (base + 5 * length, 8)]
    for request, transfer in house.mover.stalled:
        end(transfer, request, TIMEOUT)
    assert house.statuses(other) == [TIMEOUT, TIMEOUT], "nothing writes to these"
    for _ in range(5):
        assert house.ways.asked.acquire(timeout=SECONDS)
    assert late.wait(0) is None
    house.mover.stalled = None
    assert house.statuses(house.load([house.source.read([0], [9])], [8])) == [OK], "others go on"
    assert late.wait(0) is None
    house.ways.places = []
    assert house.statuses(late) == [TIMEOUT, TIMEOUT]


def test_a_load_that_failed_otherwise_is_not_held_back(house: House) -> None:
    house.ways.places = [(0, 1 << 62)]
    generation = house.source.table.generations([9]) + np.uint64(2)
    read = SourceRead(house.source.description, np.array([0]), np.array([9]), generation)
    assert house.statuses(house.load([read], [5])) == [STALE]


def test_the_end_lets_go_of_loads_that_are_held_back(house: House) -> None:
    house.mover.stalled, house.ways.places = [], [(0, 1 << 62)]
    load = house.load([house.source.read([0], [9])], [5])
    house.pages.save([], []).wait(SECONDS)
    ((request, transfer),) = house.mover.stalled
    end(transfer, request, TIMEOUT)
    assert house.ways.asked.acquire(timeout=SECONDS) and load.wait(0) is None
    house.pages.close()
    assert house.statuses(load) == [TIMEOUT]


def test_a_cancelled_load_ends_also_where_it_has_not_begun(house: House) -> None:
    gate = threading.Event()
    house.engine.given.append(lambda: gate.wait(SECONDS))
    house.mover.stalled = []
    host = HostRegion(house.mover.network)
    host.save(1, 4, 77)
    load = house.load([house.source.read([0], [9]), host.read([1], [4])], [5, 6])
    load.cancel()
    gate.set()
    assert house.statuses(load)[0] == CANCELLED
    load = house.load([house.source.read([0], [9])], [5])
    house.pages.save([], []).wait(SECONDS)
    load.cancel()
    assert house.statuses(load) == [CANCELLED]


def test_what_goes_wrong_makes_misses_and_the_next_load_is_served(house: House) -> None:
    read = house.source.read([0], [9])
    assert house.statuses(house.load([read], [BLOCKS])) == [UNREACHABLE], "there is no such block"
    house.engine.lost = True
    lost = house.load([read], [5])
    assert house.statuses(lost) == [UNREACHABLE] and not house.mover.targets
    house.engine.lost = False
    assert house.statuses(house.load([read], [5])) == [OK] and house.cache.values(5) == {109}


def test_a_part_has_its_own_blocks_and_their_share_of_the_seconds(house: House) -> None:
    first, second = house.source.read([4, 1], [9, 2]), house.source.read([3], [0])
    plan = LoadPlan(PREFIX, [hash_of(i) for i in range(6)], [first, second], 12.0, 0.5, (LoadPlan(b"", [], []),))
    part, positions = part_of(plan, [first, second])
    assert positions.tolist() == [1, 3, 4] and part.hashes == [hash_of(i) for i in (1, 3, 4)]
    assert [read.positions.tolist() for read in part.reads] == [[2, 0], [1]]
    assert part.reads[0].slots.tolist() == [9, 2] and part.reads[0].description is first.description
    assert (part.seconds, part.grace_seconds, part.others) == (6.0, 0.5, ())
