"""A play: a cluster of nodes, engines and shards of the directory lives through a storm that a seed has drawn, and is judged.

    storm ── requests, faults, strangers ──> quiet ── nothing but heartbeats ──> verdict

On the way: no reader accepts a wrong block, no directory fails or breaks its own rules, no plan exceeds its bytes, every
question has an answer or its end in time. After the quiet: every shard knows exactly what the living hold, of what belongs to
it, and who lives; every node has told its inventory; all parts find themselves in order.

    python -m tests.sim.cluster --seed 1 --seconds 60        plays seeds from 1 on for a minute, see `make sim`

Threads: none.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

from kvshare import outbox
from kvshare.config import Settings
from kvshare.fingerprints import digests_of, index_seed
from kvshare.places import DEVICE, HOST
from kvshare.runs import keys_of, runs_of
from tests.sim import faults
from tests.sim.links import HEARTBEAT_SECONDS
from tests.sim.network import Network
from tests.sim.nodes import Node
from tests.sim.setting import FAMILY, Rules, Setting
from tests.sim.shards import Shard
from tests.sim.world import Broken, World

BLOCK_SIZES = (4, 16, 4096)  # of publishes
PENDING_SIZES = (64, 1 << 18)
QUIET_SECONDS = 90.0  # faults end, the dead stay dead, everyone is back and has told all
TOLD_MAX = 254  # locations of one key
SECRET = "the secret of a simulated cluster"


@dataclass(frozen=True)
class Plot:
    """What a play is like; `drawn` by a seed. faults_per_second: in the whole cluster. requests_per_second: of each node."""

    seed: int
    nodes: int = 60
    shards: int = 2
    slots: int = 40
    prompts: int = 150
    seconds: float = 40.0
    requests_per_second: float = 0.5
    faults_per_second: float = 2.0
    strangers_per_second: float = 0.3
    lossy: float = 0.0
    publish_blocks: int = 16
    pending_blocks: int = 1 << 18
    quarantine_seconds: float = 2.0
    index_keys: int = 100_000  # that a shard has room for
    faults: tuple[str, ...] = ()  # names of the only ones that happen; empty: all, by their weights

    @classmethod
    def drawn(cls, seed: int, nodes: int | None = None) -> Plot:
        draw = random.Random(f"plot {seed}")
        return cls(
            seed,
            nodes=nodes or draw.choice((3, 20, 60, 150, 300)),
            shards=draw.choice((1, 1, 2, 3, 5)),
            slots=draw.choice((12, 40, 100)),
            prompts=draw.choice((20, 150, 600)),
            seconds=draw.choice((20.0, 60.0)),
            requests_per_second=draw.choice((0.1, 0.5, 1.0)),
            faults_per_second=draw.choice((0.3, 2.0, 6.0)),
            strangers_per_second=draw.choice((0.0, 0.5)),
            lossy=draw.choice((0.0, 0.0, 0.05)),
            publish_blocks=draw.choice(BLOCK_SIZES),
            pending_blocks=draw.choice(PENDING_SIZES),
        )


class Cluster:
    """One play."""

    def __init__(self, plot: Plot, rules: Rules | None = None) -> None:
        self.plot = plot
        self.world = World(plot.seed)
        overrides = {"heartbeat_seconds": HEARTBEAT_SECONDS, "quarantine_seconds": plot.quarantine_seconds, "secret": SECRET}
        overrides |= {"index_keys_max": plot.index_keys}
        settings = Settings.load(overrides, {})
        self.network = Network(self.world)
        self.setting = setting = Setting(self.world, self.network, settings, rules or Rules(), plot.lossy)
        for number in range(plot.shards):
            setting.shards.append(Shard(setting, number, plot.shards))
        for number in range(plot.nodes):
            engine = number % 5 == 4
            name, kind = (f"n{number - 1}/engine", DEVICE) if engine else (f"n{number}", HOST)
            setting.nodes[name] = Node(setting, name, f"host {(number - engine) // 2}", plot.slots, kind)

    def play(self) -> None:
        """Raises Broken."""
        with small_messages(self.plot):
            self.storm()
            self.calm()
            self.judge()

    # --- acts ---------------------------------------------------------------------------------------------------------

    def storm(self) -> None:
        world, plot = self.world, self.plot
        for node in self.setting.nodes.values():
            if world.chance(0.9):
                world.soon(0.0, 1.0, node.start)
        self._happen(plot.requests_per_second * plot.nodes, self._request)
        self._happen(0.02 * plot.nodes, self._warm)
        weights = Counter(plot.faults) or faults.FAULTS
        self._happen(plot.faults_per_second, lambda: faults.befall(self.setting, weights))
        self._happen(plot.strangers_per_second, partial(faults.Stranger, self.setting))
        world.run(plot.seconds)

    def _happen(self, per_second: float, what: Callable[[], object]) -> None:
        """At random moments of the storm."""
        for _ in range(int(per_second * self.plot.seconds)):
            self.world.soon(0.0, self.plot.seconds, what)

    def _request(self) -> None:
        node = faults.node_of(self.setting)
        node.request(min(int(self.world.random.expovariate(6.0) * self.plot.prompts), self.plot.prompts - 1))

    def _warm(self) -> None:
        faults.node_of(self.setting).warm(self.world.random.randrange(3000), FAMILY)

    def calm(self) -> None:
        """The faults are over, and what they have led to takes its course."""
        self.setting.lossy = 0.0
        for node in self.setting.nodes.values():
            for link in node.links:
                link.lossy = 0.0
        self.world.run(QUIET_SECONDS)

    # --- the verdict --------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        require = self.world.require
        alive = {name: node for name, node in self.setting.nodes.items() if node.alive}
        for node in alive.values():
            assert node.shelf is not None
            require(not (problems := node.shelf.check()), f"{node.name}: {problems[:3]}")
            for link in node.links:
                where = f"{node.name} and shard {link.shard.number}"
                require(link.welcomed, f"{where} are not connected")
                require(link.outbox.given, f"{where}: the inventory had no turn")
                require(link.outbox.idle, f"{where}: something is still to be told")
                others = alive.keys() - {node.name}
                require(link.peers.keys() == others, f"{where}: of the peers {sorted(link.peers.keys() ^ others)} are wrong")
                epochs = {name: peer.epoch for name, peer in link.peers.items()}
                require(all(alive[name].epoch == epoch for name, epoch in epochs.items()), f"{where}: a peer's epoch is old")
        for shard in self.setting.shards:
            shard.check()
            self._judge_shard(shard, alive)

    def _judge_shard(self, shard: Shard, alive: dict[str, Node]) -> None:
        """Its index, against the memory of all who live."""
        require, index, name = self.world.require, shard.index, f"shard {shard.number}"
        require({known.node for known in shard.directory.status().nodes} == alive.keys(), f"{name} knows other nodes")
        require(index.nodes() <= alive.keys(), f"{name} knows of what {sorted(index.nodes() - alive.keys())} held")
        held: dict[bytes, set[tuple[str, int, int]]] = {}
        for node in alive.values():
            blocks = [block for block in node.held() if node.shard_of(block.key) == shard.number]
            for block in blocks:
                held.setdefault(block.key, set()).add((node.name, block.slot, block.generation))
            sums = digests_of(runs_of(blocks), index_seed(SECRET))
            require(bool((index.digests(node.name) == sums).all()), f"{name} has other sums of {node.name} than it holds")
        located = index.locate(list(held), "", TOLD_MAX)
        for key, places in zip(held, located, strict=True):
            known = {(where.node, where.slot, where.generation) for where in places}
            right = known <= held[key] and len(known) == min(len(held[key]), TOLD_MAX)
            require(right, f"{name}: {key!r} lies at {sorted(held[key])}, it knows {sorted(known)}")
        total = sum(map(len, held.values()))
        require(index.locations() == total, f"{name} knows {index.locations()} locations, there are {total}")
        require(index.held(keys_of(held)) == len(held), f"{name} does not find all keys that are held")


@contextmanager
def small_messages(plot: Plot) -> Iterator[None]:
    """Inventories of a few blocks travel in several messages, and few changes are too many."""
    with patch.object(outbox, "PUBLISH_BLOCKS_MAX", plot.publish_blocks):
        with patch.object(outbox, "PENDING_BLOCKS_MAX", plot.pending_blocks):
            yield


__all__ = ["Broken", "Cluster", "Plot"]
