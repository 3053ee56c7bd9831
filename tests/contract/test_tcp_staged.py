"""A region that is no memory, read over tcp: portions are fetched, verified and sent; what fails is a miss like any other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvshare import native
from kvshare.errors import Unavailable
from kvshare.mapping import Mapping
from kvshare.native import I64, U8, U64, BlockStatus
from kvshare.places import DISK, RegionDescription
from kvshare.transport.tcp import TcpTransport

from .conftest import SECRET, SLOT_BYTES, Block, Landing, request_for

OK, STALE, UNREACHABLE = BlockStatus.OK, BlockStatus.STALE, BlockStatus.UNREACHABLE
SLOTS = 300  # more than two portions


class Shelf:
    """A staged region whose blocks lie in arrays. ``on_stage``: called before each portion is fetched; ``lost``: slots whose
    block turns out to be another one."""

    region = SLOT_BYTES + 1
    slot_bytes = SLOT_BYTES
    available_slots = SLOTS

    def __init__(self) -> None:
        random = np.random.default_rng(5)
        self.data = random.integers(1, 255, (SLOTS, SLOT_BYTES), np.uint8)
        self.blocks = [Block(slot, 2 * slot + 2, slot, self.data[slot]) for slot in range(SLOTS)]
        self.lost: set[int] = set()
        self.on_stage: Callable[[], None] = lambda: None
        self.staged = 0

    def key(self, slot: int) -> bytes:
        return b"key-%d" % slot

    def current(self, slots: I64, generations: U64, length: int) -> U8:
        right = (slots >= 0) & (slots < SLOTS) & (generations == 2 * slots + 2) & (length == SLOT_BYTES)
        return np.where(right, OK, STALE).astype(np.uint8)

    def stage(self, slots: I64, generations: U64, target: Mapping, stride: int, length: int) -> tuple[U8, U64]:
        self.on_stage()
        self.staged += 1
        for i, slot in enumerate(slots.tolist()):
            target.memory[i * stride : i * stride + length] = self.data[slot].tobytes()
        sources = np.array([[native.address_of(self.data[slot])] for slot in slots.tolist()], np.uint64)
        checksums = native.checksums(sources, np.full_like(sources, length), slots.astype(np.uint64))
        statuses = np.array([STALE if slot in self.lost else OK for slot in slots.tolist()], np.uint8)
        return statuses, checksums


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def owner(shelf: Shelf) -> Iterator[TcpTransport]:
    with TcpTransport(SECRET, "127.0.0.1") as made:
        made.register_staged(shelf)
        yield made


@pytest.fixture
def description(owner: TcpTransport) -> RegionDescription:
    return RegionDescription("owner", Shelf.region, SLOT_BYTES, SLOTS, "elsewhere", "", "", owner.endpoint(), DISK)


@pytest.fixture
def reader() -> Iterator[TcpTransport]:
    with TcpTransport(SECRET, streams=1) as made:
        yield made


def read(
    reader: TcpTransport, description: RegionDescription, blocks: list[Block], seconds: float = 20.0
) -> tuple[U8, Landing]:
    landing = Landing(len(blocks), [SLOT_BYTES])
    completion = reader.read(description, request_for(blocks, landing.targets, seconds)).wait()
    assert completion is not None
    for i, block in enumerate(blocks):
        if completion.statuses[i] == OK:
            assert (landing.block(i) == block.data).all()
    return completion.statuses, landing


def test_blocks_of_several_portions_arrive_in_any_order_of_slots(reader, description, shelf) -> None:
    blocks = [shelf.blocks[i] for i in np.random.default_rng(1).permutation(SLOTS)]
    statuses, _ = read(reader, description, blocks)
    assert (statuses == OK).all()
    assert shelf.staged == 3


def test_what_the_table_knows_to_be_gone_is_not_even_fetched(reader, description, shelf) -> None:
    gone = Block(3, 99, 3, shelf.data[3])
    nowhere = Block(SLOTS + 7, 2, 3, shelf.data[3])
    statuses, _ = read(reader, description, [gone, shelf.blocks[4], nowhere])
    assert statuses.tolist() == [STALE, OK, STALE]
    statuses, _ = read(reader, description, [gone])
    assert statuses.tolist() == [STALE]
    assert shelf.staged == 1


def test_what_turns_out_to_be_another_block_is_a_miss_and_its_bytes_do_not_leave(reader, description, shelf) -> None:
    shelf.lost = {1}
    statuses, landing = read(reader, description, shelf.blocks[:3])
    assert statuses.tolist() == [OK, STALE, OK]
    assert not landing.block(1).any()


def test_a_tier_that_is_away_is_unreachable_and_the_connection_stays(reader, description, shelf, owner) -> None:
    def away() -> None:
        raise Unavailable("the disk does not answer")

    shelf.on_stage = away
    statuses, _ = read(reader, description, shelf.blocks)
    assert (statuses == UNREACHABLE).all()
    shelf.on_stage = lambda: None
    statuses, _ = read(reader, description, shelf.blocks[:5])
    assert (statuses == OK).all()
    assert owner.counters()["connections"] == 1


def test_a_tier_that_goes_away_in_the_middle_ends_the_answer_and_nothing_else(reader, description, shelf) -> None:
    def away() -> None:
        if shelf.staged == 1:
            raise Unavailable("the disk does not answer")

    shelf.on_stage = away
    statuses, _ = read(reader, description, shelf.blocks)
    assert (statuses[:128] == OK).all() and (statuses[128:] == UNREACHABLE).all()
    shelf.on_stage = lambda: None
    deadline = time.monotonic() + 20.0  # a peer that failed is left alone for a moment
    while not (read(reader, description, shelf.blocks[:5])[0] == OK).all():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tier_that_hangs_is_a_timeout_at_the_reader(reader, description, shelf) -> None:
    answers = threading.Event()
    shelf.on_stage = lambda: answers.wait() and None
    try:
        statuses, _ = read(reader, description, shelf.blocks[:3], seconds=0.3)
        assert not (statuses == OK).any()
    finally:
        answers.set()
