"""The transport that fails on purpose does what it says, and the same again by the same seed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvshare.slots import Region
from kvshare.transport.base import BlockStatus, Completion
from kvshare.transport.faulty import FaultyTransport
from kvshare.transport.loopback import LoopbackTransport, Network

from .conftest import SLOT_BYTES, Landing, request_for, write

OK, CORRUPT, UNREACHABLE = BlockStatus.OK, BlockStatus.CORRUPT, BlockStatus.UNREACHABLE
TIMEOUT, CANCELLED = BlockStatus.TIMEOUT, BlockStatus.CANCELLED
BLOCKS = 16


class Peer:
    """A region of blocks and faulty readers of it."""

    def __init__(self) -> None:
        self.network = Network()
        region = Region.anonymous(SLOT_BYTES, BLOCKS)
        self.blocks = [write(region, slot, np.full(SLOT_BYTES, slot, np.uint8), slot) for slot in range(BLOCKS)]
        self.owner = LoopbackTransport(self.network, "a")
        self.owner.register(region)
        self.description = region.describe("a", "", "")

    def reader(self, seed: int = 1, **faults: Any) -> FaultyTransport:
        return FaultyTransport(LoopbackTransport(self.network, threads=1), seed, **faults)

    def read(self, reader: FaultyTransport, seconds: float = 5.0) -> Completion:
        landing = Landing(BLOCKS, [1000, SLOT_BYTES - 1000])
        completion = reader.read(self.description, request_for(self.blocks, landing.targets, seconds)).wait()
        assert completion is not None
        for i in np.flatnonzero(completion.statuses == OK).tolist():
            assert np.array_equal(landing.block(i), self.blocks[i].data)
        for i in np.flatnonzero(completion.statuses == CORRUPT).tolist():
            assert np.count_nonzero(landing.block(i) != self.blocks[i].data) == 1, "one bit of one byte"
        return completion


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    with made.owner:
        yield made


def test_corrupt_blocks_are_found_by_verification_and_the_others_are_right(peer: Peer) -> None:
    with peer.reader(corrupt=0.3) as reader:
        statuses = np.concatenate([peer.read(reader).statuses for _ in range(20)])
    assert set(statuses.tolist()) == {OK, CORRUPT}
    assert 0.1 < np.mean(statuses == CORRUPT) < 0.5


def test_equal_seeds_give_equal_faults_and_others_differ(peer: Peer) -> None:
    def faults(seed: int) -> list[list[int]]:
        with peer.reader(seed, corrupt=0.2, reads_max=5) as reader:
            return [peer.read(reader).statuses.tolist() for _ in range(7)]

    assert faults(3) == faults(3)
    assert faults(3) != faults(4)


def test_a_lost_read_says_nothing_until_its_seconds_are_over(peer: Peer) -> None:
    with peer.reader(lose=1.0) as reader:
        landing = Landing(BLOCKS, [SLOT_BYTES])
        transfer = reader.read(peer.description, request_for(peer.blocks, landing.targets, seconds=1.0))
        assert transfer.wait(0) is None
        completion = transfer.wait()
        assert completion is not None
        assert set(completion.statuses.tolist()) == {TIMEOUT}
        assert (landing.memory == 0xEE).all()


def test_a_dead_peer_stays_dead(peer: Peer) -> None:
    with peer.reader(reads_max=2) as reader:
        statuses = [set(peer.read(reader).statuses.tolist()) for _ in range(4)]
    assert statuses == [{OK}, {OK}, {UNREACHABLE}, {UNREACHABLE}]


def test_delayed_reads_arrive(peer: Peer) -> None:
    with peer.reader(delay_seconds=0.02) as reader:
        landings = [Landing(BLOCKS, [SLOT_BYTES]) for _ in range(20)]
        transfers = [reader.read(peer.description, request_for(peer.blocks, one.targets)) for one in landings]
        assert all(completion is not None and completion.ok for completion in (one.wait() for one in transfers))


@pytest.mark.parametrize("faults", [{"lose": 1.0}, {"delay_seconds": 1e6}], ids=["lost", "delayed"])
def test_what_waits_ends_by_cancel_and_by_close(peer: Peer, faults: dict[str, float]) -> None:
    request = request_for(peer.blocks, Landing(BLOCKS, [SLOT_BYTES]).targets, seconds=1e6)
    with peer.reader(**faults) as reader:
        cancelled, closed = reader.read(peer.description, request), reader.read(peer.description, request)
        cancelled.cancel()
        first = cancelled.wait(5)
        assert first is not None
        assert set(first.statuses.tolist()) == {CANCELLED}
    second = closed.wait(0)
    assert second is not None
    assert set(second.statuses.tolist()) == {CANCELLED}
    late = reader.read(peer.description, request).wait(0)
    assert late is not None
    assert set(late.statuses.tolist()) == {CANCELLED}


def test_it_leaves_no_thread_behind(peer: Peer, nothing_left_behind: None) -> None:
    with peer.reader(delay_seconds=0.001, lose=0.5) as reader:
        peer.read(reader, seconds=0.01)
        peer.read(reader, seconds=0.01)
        assert len(threading.enumerate()) > 1
