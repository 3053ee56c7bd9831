"""What befalls a simulated cluster: each function is one fault, drawn by the seed.

Threads: none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec

from kvshare.cluster_messages import AskPurge, Beat, Find, Join, Leave, Publish, PurgeDone, Report, Taken
from kvshare.messages import PROTOCOL_VERSION
from kvshare.places import NodeDescription, Stored
from kvshare.purge import PurgeScope
from kvshare.runs import Keys, Run, Seen, keys_of, runs_of
from tests.sim.blocks import SLOT_BYTES
from tests.sim.network import NODE, SHARD, Connection
from tests.sim.nodes import Node
from tests.sim.setting import PREFIX, Setting, chain
from tests.sim.shards import Shard

LONGEST_SECONDS = 25.0  # of a partition, or of a directory's absence: over what heartbeats bear
PURGE_SECONDS = 40.0  # the directory gives up those that are silent before that
Fault = Callable[[Setting], None]


def node_of(setting: Setting) -> Node:
    return setting.world.random.choice(list(setting.nodes.values()))


def shard_of(setting: Setting) -> Shard:
    return setting.world.random.choice(setting.shards)


def start_a_node(setting: Setting) -> None:
    node_of(setting).start()


def kill_a_node(setting: Setting) -> None:
    """Loudly (the kernel closes its sockets), or with its host: silently, unless a supervisor saw it."""
    node, random = node_of(setting), setting.world.random
    if not node.alive:
        return
    how = random.choice(("loud", "silent", "seen"))
    node.die(loud=how == "loud", forget=random.random() < 0.5)
    setting.world.counts["deaths"] += 1
    if how == "seen":
        for shard in setting.shards:
            setting.world.soon(0.1, 1.0, partial(_lost, shard, node))
    if random.random() < 0.7:
        setting.world.soon(0.01, random.choice((0.3, 30.0)), node.start)


def _lost(shard: Shard, node: Node) -> None:
    if not node.alive:
        shard.node_lost(node.name)


def restart_unseen(setting: Setting) -> None:
    """A node starts anew where no shard sees it: they tell of its former life, whose slots have other blocks by now."""
    node, world = node_of(setting), setting.world
    if node.alive:
        setting.network.part(
            [(node.name, shard.number) for shard in setting.shards], world.random.uniform(1.0, LONGEST_SECONDS)
        )
        node.die(loud=False, forget=world.chance(0.5))
        world.counts["deaths"] += 1
        world.soon(0.01, 1.0, node.start)


def kill_an_engine(setting: Setting) -> None:
    node_of(setting).engine_dies()


def leave(setting: Setting) -> None:
    node_of(setting).leave()


def describe_anew(setting: Setting) -> None:
    node_of(setting).describe_anew()


def break_a_connection(setting: Setting) -> None:
    """Both sides hear of it, or only one: then there are two connections of one node, or one that nobody reads."""
    node, random = node_of(setting), setting.world.random
    for link in node.links:
        if link.connection is not None and random.random() < 0.5:
            hears = random.choice(((0.0, None), (0.0, 0.001), (random.uniform(0.0, 20.0), 0.0)))
            setting.network.sever(link.connection, *hears)
            setting.world.counts["breaks"] += 1


def part(setting: Setting) -> None:
    """Some nodes and some shards do not reach each other."""
    random = setting.world.random
    names = random.sample(list(setting.nodes), max(1, int(len(setting.nodes) * random.choice((0.02, 0.1, 0.5)))))
    shards = random.sample(range(len(setting.shards)), random.randint(1, len(setting.shards)))
    setting.network.part([(name, shard) for name in names for shard in shards], random.uniform(0.1, LONGEST_SECONDS))
    setting.world.counts["partitions"] += 1


def separate(setting: Setting) -> None:
    """Some nodes cannot read from some others."""
    names = list(setting.nodes)
    setting.world.random.shuffle(names)
    half = len(names) // 2
    setting.network.separate(names[:half], names[half:], setting.world.random.uniform(0.1, LONGEST_SECONDS))


def kill_a_shard(setting: Setting) -> None:
    """It comes back empty."""
    shard = shard_of(setting)
    if shard.alive:
        shard.die(loud=setting.world.chance(0.5))
        setting.world.counts["shards lost"] += 1
        setting.world.soon(0.1, LONGEST_SECONDS, shard.start)


def jump_a_clock(setting: Setting) -> None:
    shard_of(setting).jump(setting.world.random.choice((-100_000.0, -3.0, 3.0, 40.0, 100_000.0)))
    setting.world.counts["jumps"] += 1


def purge(setting: Setting) -> None:
    """All blocks of one prompt's first one; whoever asks hears who obeyed and who was silent, within its time."""
    asker = node_of(setting)
    if asker.alive and asker.links[0].shard.alive:
        scope = PurgeScope(prefix=chain(setting.world.random.randrange(4))[0])

        def done(answer: PurgeDone | None) -> None:
            setting.world.counts["purges"] += answer is not None

        asker.links[0].ask(lambda ask: AskPurge(ask, scope, False), PURGE_SECONDS, done)


def damage_an_index(setting: Setting) -> None:
    """Where our own code is at fault (`Setting.lossy`): a shard forgets blocks, or believes something of one that is not so."""
    shard, node = shard_of(setting), node_of(setting)
    known = [block for block in node.held() if node.shard_of(block.key) == shard.number] if setting.lossy else []
    known = [block for block in known if shard.alive and shard.index.holds(node.name, keys_of([block.key])).all()]
    if known:
        wrong = setting.world.random.sample(known, min(3, len(known)))
        shard.index.remove(node.name, keys_of(block.key for block in wrong[1:]))
        shard.index.add(node.name, runs_of([msgspec.structs.replace(wrong[0], generation=2)]))
        setting.world.counts["damages"] += 1


FAULTS = {
    "start_a_node": 20,
    "kill_a_node": 8,
    "restart_unseen": 2,
    "kill_an_engine": 6,
    "leave": 3,
    "describe_anew": 2,
    "break_a_connection": 6,
    "part": 2,
    "separate": 1,
    "kill_a_shard": 1,
    "jump_a_clock": 1,
    "purge": 1,
    "damage_an_index": 2,
}


def befall(setting: Setting, weights: dict[str, int]) -> None:
    """One of these faults."""
    fault: Fault = globals()[setting.world.random.choices(list(weights), list(weights.values()))[0]]
    fault(setting)


# --- strangers that know the secret -----------------------------------------------------------------------------------


class Stranger:
    """Connects to a shard, joins under a name of its own or of a node, says something wrong, and goes after a while."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._random = setting.world.random
        self.shard = shard_of(setting)
        self.name = self._random.choice([*setting.nodes, "stranger"])
        self._encoder = msgspec.msgpack.Encoder()
        setting.world.counts["strangers"] += 1
        setting.network.dial(self, self.shard)

    def connected(self, connection: Connection) -> None:
        shards = len(self._setting.shards)
        description = NodeDescription(self.name, 0, "nowhere", "", ())
        if self._random.random() < 0.9:
            version = self._random.choice((PROTOCOL_VERSION,) * 5 + (PROTOCOL_VERSION - 1,))
            number = self._random.choice((self.shard.number,) * 5 + (shards,))
            self._say(connection, self._encoder.encode(Join(version, description, False, number, shards)))
        for _ in range(self._random.randint(1, 3)):
            self._say(connection, self.nonsense())
        self._setting.world.soon(0.0, 10.0, lambda: self._setting.network.end(connection, NODE))

    def refused(self, shard: int) -> None:
        pass

    def received(self, connection: Connection, frame: bytes) -> None:
        pass

    def lost(self, connection: Connection) -> None:
        pass

    def _say(self, connection: Connection, frame: bytes) -> None:
        self._setting.network.send(connection, SHARD, frame)

    def nonsense(self) -> bytes:
        random = self._random
        key = random.choice(chain(random.randrange(50)))
        block = Stored(key, SLOT_BYTES, random.randrange(8), random.randrange(2, 1 << 40, 2), SLOT_BYTES)
        (run,) = runs_of([block])
        bad_runs = [
            msgspec.structs.replace(run, generations=(3).to_bytes(8, "little")),  # being written
            msgspec.structs.replace(run, slots=b"\xff" * 4),
            msgspec.structs.replace(run, slots=b""),
            msgspec.structs.replace(run, length=-1),
            msgspec.structs.replace(run, keys=Keys(PREFIX, 0, b"")),
            msgspec.structs.replace(run, keys=Keys(b"short", 16, b"k" * 16)),
            run,
        ]
        bad_keys = [Keys(PREFIX, 0, b"x"), Keys(PREFIX, 33, b"x" * 33), Keys(b"", 16, b"x" * 16), Keys(PREFIX, 16, b"x" * 15)]
        asked = random.choice(bad_keys)
        messages = [
            self._publish(random.choice(bad_runs), []),
            self._publish(random.choice(bad_runs), [asked]),
            Publish(self.name, 0, -1, -1, True, [], [], -5),
            Publish("somebody else", 0, 1, (1 << 64) - 1, False, [run], [], 0),
            Find(1, [asked]),
            Find(-1, []),
            Report([Seen(asked)]),
            Report([Seen(Keys(PREFIX, 16, b"x" * 32), b"\0" * 4)]),
            Report([Seen(Keys(PREFIX, 16, b"x" * 16), b"\xff" * 4)]),
            Beat(random.choice((-1, 0, 1 << 62)), random.choice((b"", b"short", b"\0" * 512))),
            Leave(1, random.choice((-1.0, float("nan"), 1e300)), [asked], random.random() < 0.5),
            Taken(77),
        ]
        frame = self._encoder.encode(random.choice(messages))
        if random.random() < 0.2:
            frame = frame[: random.randrange(len(frame))] + random.randbytes(random.randrange(4))
        return frame

    def _publish(self, run: Run, removed: list[Keys]) -> Publish:
        return Publish(self.name, 0, 1, (1 << 64) - 1, self._random.random() < 0.3, [run], removed, 0)
