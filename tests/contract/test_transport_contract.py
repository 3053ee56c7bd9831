"""What every transport keeps (`kvshare.transport.base`): one suite, all transports, faults made by hand."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from kvshare import native
from kvshare.slots import Arena, Region
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets, Transport
from kvshare.transport.loopback import LoopbackTransport, Network
from kvshare.transport.shm import ShmTransport
from kvshare.transport.tcp import TcpTransport

from .conftest import HOST, SECRET, SLOT_BYTES, SLOTS, Block, House, Landing, request_for, write

OK, STALE, CORRUPT = BlockStatus.OK, BlockStatus.STALE, BlockStatus.CORRUPT
UNREACHABLE, CANCELLED = BlockStatus.UNREACHABLE, BlockStatus.CANCELLED


@pytest.mark.parametrize("page_bytes", [[SLOT_BYTES], [4096] * 16, [100, 60_000, 5436], [7, 13, 100]])
def test_scattered_blocks_land_in_scattered_pages(house: House, page_bytes: list[int]) -> None:
    blocks = house.save([5, 63, 0, 17, 18, 40], length=sum(page_bytes))
    landing = Landing(len(blocks), page_bytes)
    completion = house.read(request_for(blocks, landing.targets))
    assert completion.ok, completion
    assert completion.bytes == len(blocks) * sum(page_bytes)
    assert completion.error == ""
    for i, block in enumerate(blocks):
        assert np.array_equal(landing.block(i), block.data)


def test_nothing_but_the_targets_is_written(house: House) -> None:
    blocks = house.save([1, 2, 3], length=3000)
    landing = Landing(len(blocks), [1000, 2000])
    assert house.read(request_for(blocks, landing.targets)).ok
    foreign = np.ones(len(landing.memory), bool)
    for row in landing.targets.addresses - np.uint64(native.address_of(landing.memory)):
        foreign[int(row[0]) : int(row[0]) + 1000] = foreign[int(row[1]) : int(row[1]) + 2000] = False
    assert (landing.memory[foreign] == 0xEE).all()


def test_a_block_of_another_generation_is_stale_and_the_others_arrive(house: House) -> None:
    kept, evicted, rewritten = house.save([1, 2, 3])
    house.region.retire(2)
    house.save([3], seed=9)
    landing = Landing(3, [SLOT_BYTES])
    completion = house.read(request_for([kept, evicted, rewritten], landing.targets))
    assert completion.statuses.tolist() == [OK, STALE, STALE]
    assert completion.bytes == SLOT_BYTES
    assert completion.error != ""
    assert np.array_equal(landing.block(0), kept.data)


def test_a_slot_that_is_being_written_is_stale_under_any_generation(house: House) -> None:
    (block,) = house.save([4])
    writing = house.region.begin(4)
    asked = [block, Block(4, writing, block.seed, block.data), Block(4, writing + 1, block.seed, block.data)]
    completion = house.read(request_for(asked, Landing(3, [SLOT_BYTES]).targets))
    assert completion.statuses.tolist() == [STALE] * 3


def test_a_slot_that_was_never_used_is_stale(house: House) -> None:
    asked = [Block(7, 0, 1, np.empty(0, np.uint8))]
    assert house.read(request_for(asked, Landing(1, [SLOT_BYTES]).targets)).statuses.tolist() == [STALE]


@pytest.mark.parametrize("slot", [-1, SLOTS, 1 << 40, -(1 << 62)])
def test_a_slot_outside_the_region_is_stale_and_touches_nothing(house: House, slot: int) -> None:
    (block,) = house.save([3])
    outside = Block(slot, block.generation, block.seed, block.data)
    completion = house.read(request_for([outside, block], Landing(2, [SLOT_BYTES]).targets))
    assert completion.statuses.tolist() == [STALE, OK]


@pytest.mark.parametrize("length", [SLOT_BYTES - 1, SLOT_BYTES + 1, 10 * SLOT_BYTES])
def test_a_block_of_another_length_is_stale_and_not_corrupt(house: House, length: int) -> None:
    blocks = house.save([3])
    assert house.read(request_for(blocks, Landing(1, [length]).targets)).statuses.tolist() == [STALE]


def test_bytes_that_changed_under_their_generation_are_corrupt(house: House) -> None:
    good, bad = house.save([1, 2])
    native.view(house.region.slot_address(2) + SLOT_BYTES - 1, 1, writable=True)[0] ^= 0x10
    completion = house.read(request_for([good, bad], Landing(2, [SLOT_BYTES]).targets))
    assert completion.statuses.tolist() == [OK, CORRUPT]


def test_the_block_of_another_key_is_corrupt(house: House) -> None:
    (block,) = house.save([1])
    other = Block(block.slot, block.generation, block.seed + 1, block.data)
    assert house.read(request_for([other], Landing(1, [SLOT_BYTES]).targets)).statuses.tolist() == [CORRUPT]


@pytest.mark.parametrize("length", [100, SLOT_BYTES])
def test_bytes_that_change_on_the_way_are_corrupt(house: House, length: int) -> None:
    blocks = house.save([1, 2, 3], length=length)
    landing = Landing(3, [60, length - 60])
    flipped = int(landing.targets.addresses[1, 1])

    def tamper(addresses: np.ndarray, lengths: np.ndarray) -> None:  # type: ignore[type-arg]
        assert addresses.shape == lengths.shape
        if flipped in addresses:
            native.view(flipped, 1, writable=True)[0] ^= 1

    below = getattr(house.reader, "inner", house.reader)
    below.tamper = tamper
    assert house.read(request_for(blocks, landing.targets)).statuses.tolist() == [OK, CORRUPT, OK]


def test_an_unknown_region_is_unreachable(house: House) -> None:
    blocks = house.save([1])
    elsewhere = Region.anonymous(SLOT_BYTES * 2, 4).describe("a", HOST, house.description.endpoint)
    transfer = house.reader.read(elsewhere, request_for(blocks, Landing(1, [SLOT_BYTES]).targets))
    completion = transfer.wait()
    assert completion is not None
    assert completion.statuses.tolist() == [UNREACHABLE]
    assert completion.error != ""


def test_a_region_that_is_no_longer_served_is_unreachable(house: House) -> None:
    blocks = house.save([1])
    assert house.read(request_for(blocks, Landing(1, [SLOT_BYTES]).targets)).ok
    house.owner.deregister(house.region)
    if isinstance(house.region, Arena):
        house.region.close(unlink=True)
    completion = house.read(request_for(blocks, Landing(1, [SLOT_BYTES]).targets))
    assert completion.statuses.tolist() == [UNREACHABLE]


def test_an_empty_request_completes(house: House) -> None:
    completion = house.read(request_for([], Landing(0, [SLOT_BYTES]).targets))
    assert completion.ok
    assert completion.bytes == 0


def test_a_forgotten_node_is_read_again_when_asked(house: House) -> None:
    blocks = house.save([1])
    request = request_for(blocks, Landing(1, [SLOT_BYTES]).targets)
    assert house.read(request).ok
    house.reader.forget("a")
    house.reader.forget("somebody else")
    assert house.read(request).ok


def test_callbacks_are_called_once_before_and_after_the_end(house: House) -> None:
    blocks = house.save([1])
    heard: list[Completion] = []
    transfer = house.reader.read(house.description, request_for(blocks, Landing(1, [SLOT_BYTES]).targets))
    transfer.then(heard.append)
    completion = transfer.wait()
    transfer.then(heard.append)
    assert completion is not None
    assert transfer.wait(0) is completion
    while len(heard) < 2:  # the waiter may be told a moment before the callbacks are
        threading.Event().wait(0.01)
    assert heard == [completion, completion]


def test_a_read_that_nobody_waits_for_is_done_for_its_callback(house: House) -> None:
    blocks = house.save([1, 2])
    for _ in range(20):
        heard = threading.Event()
        landing = Landing(2, [SLOT_BYTES])
        transfer = house.reader.read(house.description, request_for(blocks, landing.targets))
        transfer.then(lambda _, heard=heard: heard.set())  # type: ignore[misc]
        assert heard.wait(10)
        assert np.array_equal(landing.block(1), blocks[1].data)


def test_a_cancelled_read_that_nobody_waits_for_ends(house: House) -> None:
    blocks = house.save([1, 2])
    transfer = house.reader.read(house.description, request_for(blocks, Landing(2, [SLOT_BYTES]).targets))
    transfer.cancel()
    completion = transfer.wait(10)
    assert completion is not None
    assert set(completion.statuses.tolist()) <= {OK, CANCELLED}
    assert house.read(request_for(blocks, Landing(2, [SLOT_BYTES]).targets)).ok


def test_a_writer_that_races_readers_never_gets_a_wrong_block_accepted(house: House) -> None:
    """Every version of a slot is one repeated number, so that a torn block shows. Thousands of reads, at least some of which
    the writer must have spoilt, or the race was none."""
    slots, stop = list(range(4)), threading.Event()
    current = [write(house.region, slot, np.full(SLOT_BYTES, slot, np.uint8), slot) for slot in slots]

    def rewrite() -> None:
        random = np.random.default_rng(3)
        while not stop.is_set():
            slot, value = int(random.integers(len(slots))), int(random.integers(256))
            current[slot] = write(house.region, slot, np.full(SLOT_BYTES, value, np.uint8), slot)

    writer = threading.Thread(target=rewrite)
    writer.start()
    counts = dict.fromkeys(BlockStatus, 0)
    try:
        landing = Landing(len(slots) * 2, [SLOT_BYTES // 2] * 2)
        for reads in range(20_000):
            asked = list(current) * 2
            completion = house.read(request_for(asked, landing.targets))
            for i, status in enumerate(completion.statuses.tolist()):
                counts[BlockStatus(status)] += 1
                assert status != OK or np.array_equal(landing.block(i), asked[i].data)
            if reads >= 2_000 and counts[OK] >= 1_000 and counts[STALE] >= 1_000:
                break
    finally:
        stop.set()
        writer.join()
    assert counts[OK] >= 100 and counts[STALE] >= 100, counts
    assert counts[OK] + counts[STALE] == sum(counts.values()), "a torn block is stale, never the owner's fault"


def test_a_cancelled_read_writes_nothing_after_its_completion(house: House) -> None:
    blocks = house.save(range(SLOTS)) * 100
    memory = np.zeros(SLOTS * SLOT_BYTES, np.uint8)
    places = np.tile(np.arange(SLOTS), 100)
    targets = Targets.strided(native.address_of(memory), SLOT_BYTES, places, SLOT_BYTES)
    for attempt in range(5):
        transfer = house.reader.read(house.description, request_for(blocks, targets))
        transfer.wait(0.002 * attempt)
        transfer.cancel()
        completion = transfer.wait()
        assert completion is not None
        assert set(completion.statuses.tolist()) <= {OK, CANCELLED}
        memory[:] = 0
        threading.Event().wait(0.05)
        assert not memory.any()
    assert house.read(request_for(blocks[:SLOTS], Landing(SLOTS, [SLOT_BYTES]).targets)).ok


def test_many_threads_read_at_once(house: House) -> None:
    blocks = house.save(range(SLOTS))
    failures: list[object] = []

    def read(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(10):
            asked = [blocks[i] for i in random.integers(0, SLOTS, 20)]
            landing = Landing(len(asked), [SLOT_BYTES // 4] * 4, seed=number)
            completion = house.read(request_for(asked, landing.targets, seconds=60))
            if not completion.ok or not all(np.array_equal(landing.block(i), b.data) for i, b in enumerate(asked)):
                failures.append(completion)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_many_reads_are_under_way_without_anybody_waiting(house: House) -> None:
    blocks = house.save(range(8))
    landings = [Landing(8, [SLOT_BYTES]) for _ in range(50)]
    transfers = [house.reader.read(house.description, request_for(blocks, one.targets, seconds=60)) for one in landings]
    for transfer, landing in zip(transfers, landings, strict=True):
        completion = transfer.wait(timeout=60)
        assert completion is not None and completion.ok
        assert np.array_equal(landing.block(7), blocks[7].data)


def test_close_ends_running_reads_and_may_be_repeated(house: House) -> None:
    blocks = house.save(range(SLOTS)) * 100
    memory = np.zeros(SLOTS * SLOT_BYTES, np.uint8)
    targets = Targets.strided(native.address_of(memory), SLOT_BYTES, np.tile(np.arange(SLOTS), 100), SLOT_BYTES)
    transfers = [house.reader.read(house.description, request_for(blocks, targets)) for _ in range(4)]
    house.reader.close()
    house.reader.close()
    for transfer in transfers:
        completion = transfer.wait(0)
        assert completion is not None, "close returns when nothing runs any more"
        assert set(completion.statuses.tolist()) <= {OK, CANCELLED}
    late = house.reader.read(house.description, request_for(blocks, targets)).wait(0)
    assert late is not None
    assert set(late.statuses.tolist()) == {CANCELLED}


def _pair(name: str, network: Network) -> tuple[Transport, Transport]:
    if name == "loopback":
        return LoopbackTransport(network, "a"), LoopbackTransport(network)
    if name == "shm":
        return ShmTransport("the owner's process"), ShmTransport(HOST)
    return TcpTransport(SECRET, "127.0.0.1"), TcpTransport(SECRET, streams=3)


@pytest.mark.parametrize("name", ["loopback", "shm", "tcp"])
def test_a_closed_pair_leaves_no_thread_and_no_descriptor(short_dir: Path, name: str, request: pytest.FixtureRequest) -> None:
    region = Arena.open(str(short_dir / "leak"), SLOT_BYTES, 4 * SLOT_BYTES, 4 * SLOT_BYTES)
    request.addfinalizer(lambda: region.close(unlink=True))
    assert region.available_slots or region.grow()
    blocks = [write(region, slot, np.full(SLOT_BYTES, slot, np.uint8), slot) for slot in range(4)]
    request.getfixturevalue("nothing_left_behind")
    for _ in range(3):
        owner, reader = _pair(name, Network())
        with owner, reader:
            owner.register(region)
            description = region.describe("a", HOST, owner.endpoint())
            landings = [Landing(4, [SLOT_BYTES]) for _ in range(10)]
            transfers = [reader.read(description, request_for(blocks, one.targets, 60)) for one in landings]
            assert all(completion is not None and completion.ok for completion in (t.wait(60) for t in transfers))


def test_a_request_with_unequal_lengths_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        ReadRequest(np.zeros(2, np.int64), np.zeros(1, np.uint64), np.zeros(2, np.uint64), Landing(2, [8]).targets)
