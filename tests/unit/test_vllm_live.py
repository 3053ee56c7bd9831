"""What peers may read of an engine's own KV cache, played: a small cache whose blocks are handed out, written, freed, preempted
and aborted at random, with several steps under way; a reader looks at every moment."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and torch's own making
    pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

from kvshare.device import DeviceTable
from kvshare.integrations.vllm.live import Exposure, LiveCache
from kvshare.keys import FAMILY_BYTES
from kvshare.messages import Expose, Message, Shown
from kvshare.places import ProcessMemory, Stored

BLOCKS, BLOCK_BYTES = 12, 4096
REGION = 77
FAMILY = b"f" * FAMILY_BYTES


@dataclass
class Node:
    """What the node knows of the region, by what it was sent. ``connections`` grows when it restarts."""

    connections: int = 1
    away: bool = False
    exposed: bool = False
    blocks: dict[bytes, Stored] = field(default_factory=dict)

    def send(self, message: Message) -> bool:
        if self.away:
            return False
        if isinstance(message, Expose):
            self.exposed, self.blocks = True, {}
        elif isinstance(message, Shown) and self.exposed:
            for key in message.gone:
                self.blocks.pop(key, None)
            self.blocks |= {block.key: block for block in message.stored}
        return True

    def restart(self) -> None:
        self.connections += 1
        self.exposed, self.blocks = False, {}


@pytest.fixture
def table(tmp_path: Path) -> Iterator[DeviceTable]:
    table = DeviceTable.create(str(tmp_path / "t.table"), BLOCKS, BLOCK_BYTES)
    yield table
    table.unlink()


def key(name: object) -> bytes:
    return FAMILY + str(name).encode()


def live_cache(table: DeviceTable, node: Node) -> LiveCache:
    memory = ProcessMemory(1, 1, "", "DRAM", 0, (0,), (BLOCK_BYTES,), (BLOCK_BYTES,), 0, 8)
    return LiveCache(table, [Exposure(Expose(REGION, table.path, BLOCKS, BLOCK_BYTES, memory), node, FAMILY)])


def step(live: LiveCache, begun: list[int], completing: dict[bytes, int]) -> None:
    live.begin(begun)
    live.completing(list(completing), list(completing.values()))
    live.sent()
    live.flush()


def back(live: LiveCache) -> None:
    live.returned()
    live.flush()


def test_a_block_is_told_when_its_step_is_back_and_no_longer_when_it_is_handed_out(table: DeviceTable) -> None:
    node = Node()
    live = live_cache(table, node)
    step(live, [3, 4], {key("k"): 3})
    assert node.blocks == {} and (table.generations([3, 4]) % 2 == 1).all()
    back(live)
    (told,) = node.blocks.values()
    assert (told.key, told.region, told.slot, told.length) == (key("k"), REGION, 3, BLOCK_BYTES)
    assert table.generations([3])[0] == told.generation and told.generation % 2 == 0
    assert table.generations([4])[0] % 2 == 1
    live.begin([3])
    assert table.generations([3])[0] != told.generation  # before the step goes anywhere
    live.sent()
    live.flush()
    assert node.blocks == {}


def test_a_block_handed_out_again_before_its_step_is_back_is_not_told(table: DeviceTable) -> None:
    node = Node()
    live = live_cache(table, node)
    step(live, [3], {key("old"): 3})
    step(live, [3], {key("new"): 3})
    back(live)
    assert node.blocks == {} and table.generations([3])[0] % 2 == 1
    back(live)
    assert list(node.blocks) == [key("new")]


def test_of_equal_blocks_the_one_that_stays_is_told_of(table: DeviceTable) -> None:
    node = Node()
    live = live_cache(table, node)
    step(live, [1, 2], {key("k"): 1})
    step(live, [], {key("k"): 2})
    back(live)
    back(live)
    step(live, [1], {})
    assert node.blocks[key("k")].slot == 2
    assert live.check() == []


def test_what_is_withdrawn_cannot_be_read_and_what_is_computed_anew_can(table: DeviceTable) -> None:
    """Also where an equal block was told of before, and under the name of another shard."""
    node = Node()
    live = live_cache(table, node)
    step(live, [1, 2, 3], {key("k"): 1, key("other"): 3})
    step(live, [], {key("k"): 2})
    back(live)
    back(live)
    live.withdraw([b"g" * FAMILY_BYTES + b"k", key("unknown")])
    assert (table.generations([1, 2]) % 2 == 1).all() and table.generations([3])[0] % 2 == 0
    live.flush()
    assert list(node.blocks) == [key("other")] and live.check() == []
    step(live, [4], {key("k"): 4})
    back(live)
    assert node.blocks[key("k")].slot == 4


def test_a_reset_takes_everything_back_and_steps_under_way_bring_nothing(table: DeviceTable) -> None:
    node = Node()
    live = live_cache(table, node)
    step(live, [1], {key("a"): 1})
    back(live)
    step(live, [2], {key("b"): 2})
    live.reset()
    live.flush()
    back(live)
    assert node.blocks == {} and (table.generations([1, 2]) % 2 == 1).all()


def test_a_node_that_restarted_is_told_everything_anew(table: DeviceTable) -> None:
    node = Node()
    live = live_cache(table, node)
    step(live, [1, 2], {key("a"): 1, key("b"): 2})
    back(live)
    node.restart()
    node.away = True
    step(live, [3], {key("c"): 3})
    back(live)
    assert node.blocks == {}
    node.away = False
    step(live, [4, 1], {key("d"): 4})
    back(live)
    assert sorted(node.blocks) == [key("b"), key("c"), key("d")]


class World:
    """vLLM in small. A request is a list of blocks; a step writes to its requests' blocks while it runs; up to two are sent and
    not back. What a block holds is (key, generation of content): a torn write is a content of its own."""

    def __init__(self, table: DeviceTable, seed: int) -> None:
        self.random = random.Random(seed)
        self.node = Node()
        self.table = table
        self.live = live_cache(table, self.node)
        self.content: list[bytes] = [b"garbage"] * BLOCKS
        self.free: deque[int] = deque(range(BLOCKS))
        self.requests: dict[int, list[int]] = {}
        self.steps: deque[dict[int, bytes]] = deque()  # block -> what it holds when it is done
        self.ever: set[Stored] = set()
        self.read = self.hits = 0

    def turn(self) -> None:
        action = self.random.choice(["step"] * 3 + ["run", "back"] * 2 + ["drop", "reset"] + ["restart"])
        if action == "step" and len(self.steps) < 2:
            self.send_step()
        elif action in ("run", "back") and self.steps:
            self.run_step()
            if action == "back":
                self.steps.popleft()
                back(self.live)
        elif action == "drop" and self.requests:
            self.drop(self.random.choice(list(self.requests)))
        elif action == "reset" and self.random.random() < 0.05 and not self.steps:
            self.live.reset()
        elif action == "restart" and self.random.random() < 0.1:
            self.node.restart()

    def send_step(self) -> None:
        """A request gets a few blocks, a random part of which the step completes."""
        count = self.random.randint(1, 3)
        while len(self.free) < count:
            if not self.requests:
                return
            self.drop(next(iter(self.requests)))  # preempted, or aborted: its blocks go to whoever comes next
        blocks = [self.free.popleft() for _ in range(count)]
        self.requests[self.random.getrandbits(60)] = blocks
        written = {block: key(self.random.randrange(40)) for block in blocks}
        done = [block for block in blocks if self.random.random() < 0.7]
        written |= {block: b"half of something" for block in blocks if block not in done}
        self.live.begin(blocks)
        self.live.completing([written[block] for block in done], done)
        self.live.sent()
        self.live.flush()
        self.steps.append(written)

    def run_step(self) -> None:
        """The oldest step runs on the workers; it may be seen in the middle of it."""
        for block, holds in self.steps[0].items():
            self.content[block] = b"torn"
            self.look()
            self.content[block] = holds

    def drop(self, request: int) -> None:
        self.free.extend(self.requests.pop(request))

    def look(self) -> None:
        """Whatever a reader was ever told, it may read now: generation, bytes, generation."""
        self.ever |= set(self.node.blocks.values())
        for told in self.ever:
            self.read += 1
            if int(self.table.generations([told.slot])[0]) == told.generation:
                self.hits += 1
                assert self.content[told.slot] == told.key


@pytest.mark.parametrize("seed", range(25))
def test_whatever_a_reader_was_told_it_never_reads_a_wrong_block(table: DeviceTable, seed: int) -> None:
    world = World(table, seed)
    for _ in range(600):
        world.turn()
        world.look()
        assert world.live.check() == []
    assert world.hits > 100  # some blocks were there
    assert world.read > 10 * world.hits // 9  # and many that were told had gone
    world.live.close()
    told = world.node.blocks.values()
    assert all(int(table.generations([block.slot])[0]) == block.generation for block in told) or np.any(world.steps)
