"""Saves share questions to the node, and stay jobs of their own: one that is cancelled takes no other along."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvshare import keys, native
from kvshare.errors import Unavailable
from kvshare.messages import Abort, Commit, Done, Message, Reserve, Reserved
from kvshare.saving import SAVE_BATCH_BLOCKS, Saver
from kvshare.slots import Region
from kvshare.transport.base import Targets

BLOCK_BYTES = 4096


@dataclass
class Node:
    """The node's answers, by a session's methods: slots in order, none for keys in ``held``."""

    region: Region = field(default_factory=lambda: Region.anonymous(BLOCK_BYTES, 1024))
    settings: Any = field(default_factory=lambda: SimpleNamespace(save_bytes_max=1 << 30))
    connected: bool = True
    held: set[bytes] = field(default_factory=set)
    said: list[Message] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    saved: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # key -> slot, checksum
    down: bool = False
    on_reserved: Callable[[Reserve], None] = field(default=lambda _: None)

    def call(self, make: Any, _seconds: float) -> Message:
        message = make(1)
        self.said.append(message)
        self.entered.set()
        self.gate.wait(10)
        if self.down:
            raise Unavailable("the node is gone")
        if isinstance(message, Reserve):
            first = 2 * len(self.said)
            slots = [-1 if key in self.held else 100 * first % 900 + i for i, key in enumerate(message.keys)]
            self.on_reserved(message)
            self.reserved = dict(zip(slots, message.keys, strict=True))
            return Reserved(1, slots, [max(0, 2 * slot + 1) for slot in slots])
        assert isinstance(message, Commit) and message.generations == [2 * slot + 1 for slot in message.slots]
        pairs = zip(message.slots, message.checksums, strict=True)
        self.saved |= {self.reserved[slot]: (slot, checksum) for slot, checksum in pairs}
        return Done(1, len(message.slots))

    def send(self, message: Message) -> bool:
        self.said.append(message)
        return True

    def holds(self, key: bytes, data: np.ndarray) -> bool:
        slot, checksum = self.saved[key]
        address, length = np.array([self.region.slot_address(slot)], np.uint64), np.array([BLOCK_BYTES], np.uint64)
        same = bytes(native.view(int(address[0]), BLOCK_BYTES)) == data.tobytes()
        return same and native.checksum(address, length, keys.seed_of(key)) == checksum


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def saver(node: Node) -> Iterator[Saver]:
    made = Saver(node)  # type: ignore[arg-type]
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    node.gate.set()
    made.close()
    thread.join(10)
    assert not thread.is_alive()


DATA = np.random.default_rng(3).integers(0, 256, (SAVE_BATCH_BLOCKS + 40, BLOCK_BYTES), np.uint8)


def key(i: int) -> bytes:
    return b"k" * 30 + b"%d" % i


def job(saver: Saver, *blocks: int) -> Any:
    targets = Targets.strided(DATA.ctypes.data, BLOCK_BYTES, blocks, BLOCK_BYTES)
    return saver.save([key(i) for i in blocks], targets)


def test_small_jobs_that_wait_together_ask_the_node_together(node: Node, saver: Saver) -> None:
    first = job(saver, 0)
    assert node.entered.wait(10)  # the node is slow with the first: the others wait
    others = [job(saver, 1, 2), job(saver, 3), job(saver, 4, 5)]
    node.held.add(key(4))
    node.gate.set()
    assert all(one.wait(10) for one in [first, *others])
    assert [one.saved for one in [first, *others]] == [1, 2, 1, 1]
    assert [type(message) for message in node.said] == [Reserve, Commit, Reserve, Commit]
    assert all(node.holds(key(i), DATA[i]) for i in (0, 1, 2, 3, 5)) and key(4) not in node.saved


def test_a_cancelled_job_of_a_batch_gives_its_slots_back_and_the_others_are_saved(node: Node, saver: Saver) -> None:
    first = job(saver, 0)
    assert node.entered.wait(10)
    kept, dropped = job(saver, 1, 2), job(saver, 3, 4)
    node.on_reserved = lambda message: dropped.cancel() if len(message.keys) == 4 else None
    node.gate.set()
    assert first.wait(10) and kept.wait(10) and dropped.wait(10)
    assert (kept.saved, dropped.saved) == (2, 0)
    assert node.holds(key(1), DATA[1]) and key(3) not in node.saved
    (abort,) = [message for message in node.said if isinstance(message, Abort)]
    assert [node.reserved[slot] for slot in abort.slots] == [key(3), key(4)]


def test_a_job_of_many_blocks_goes_in_batches(node: Node, saver: Saver) -> None:
    node.gate.set()
    many = job(saver, *range(SAVE_BATCH_BLOCKS + 40))
    assert many.wait(20) and many.saved == SAVE_BATCH_BLOCKS + 40
    reserved = [len(message.keys) for message in node.said if isinstance(message, Reserve)]
    assert reserved == [SAVE_BATCH_BLOCKS, 40]


def test_a_node_that_goes_away_ends_the_jobs_and_the_next_ones_are_tried(node: Node, saver: Saver) -> None:
    node.down = True
    node.gate.set()
    assert job(saver, 0).wait(10)
    node.down = False
    later = job(saver, 1)
    assert later.wait(10) and later.saved == 1
