"""A node of a simulated cluster and the engine on its host: real memory, real outboxes, and what moves blocks between them.

    request ── held here? ──> find what is missing ──> read it from peers, validated ──> compute the rest ──> tell the directory

Threads: none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kvshare.cluster_messages import AskPlan, Erase, Erased, Find, Found, Leave, Plan, Take, Taken
from kvshare.fingerprints import index_seed, shard_of
from kvshare.index import CompactIndex
from kvshare.keys import NO_TENANT
from kvshare.messages import Message
from kvshare.places import DEVICE, HOST, Location, NodeDescription, RegionDescription, Stored, WarmItem
from kvshare.purge import NodePurge, PurgeScope
from kvshare.runs import Seen, keys_of
from kvshare.store import NO_SLOT
from tests.sim.blocks import HALF, SLOT_BYTES, Memory, Shelf, checksum, halves
from tests.sim.links import Link
from tests.sim.setting import Setting, chain

LOOKUP_SECONDS, PLAN_SECONDS, LEAVE_SECONDS = 0.5, 3.0, 8.0
WRITE_SECONDS = (0.001, 0.2)  # each half of a batch
READ_SECONDS = (0.0005, 0.1)
FAILED_SECONDS = 0.3  # until a read from somebody who is not there fails
ROUNDING_SECONDS = 1e-6

Written = Callable[[list[bytes]], None]


class Node:
    """``name`` on ``host``, with so many ``slots``. Dead until it starts; a node of one name lives again and again. ``kind`` of
    its region: `DEVICE` makes it an engine's KV cache that is a member of the cluster."""

    def __init__(self, setting: Setting, name: str, host: str, slots: int, kind: str = HOST) -> None:
        self._setting = setting
        self._world = setting.world
        self.name = name
        self._host = host
        self._kind = kind
        self._memory = Memory(slots)
        self.shelf: Shelf | None = None  # while it lives
        self.epoch = 0
        self.links: list[Link] = []
        self.leaving = False
        self._engine = 0  # the number of its session
        self._described = 0

    @property
    def alive(self) -> bool:
        return self.shelf is not None

    # --- its life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """With what its memory still holds."""
        if self.shelf is not None:
            return
        setting = self._setting
        self.epoch = setting.rules.birth(self.epoch, self._world.now)
        self.shelf = shelf = self._memory.own(self.epoch << 32, setting.settings, self._world.now)
        self.leaving = False
        self._engine += 1
        seed, shards = index_seed(setting.settings.secret), len(setting.shards)
        for shard in setting.shards:
            outbox = setting.rules.outbox(self.name, self._new_index, seed, shelf.store.inventory, shard.number, shards)
            self.links.append(Link(self._world, setting.network, self, shard, shards, outbox))
        for link in self.links:
            link.lossy = setting.lossy

    def _new_index(self) -> CompactIndex:
        return CompactIndex(2 * self._memory.slots, index_seed(self._setting.settings.secret))

    def die(self, loud: bool, forget: bool = False) -> None:
        """``forget``: its memory is lost with it."""
        self.shelf = None
        links, self.links = self.links, []
        for link in links:
            link.end(loud)
        if forget:
            self._memory = Memory(self._memory.slots)

    def engine_dies(self) -> None:
        """What it had under way is still being written for a while."""
        if self.shelf is not None:
            self.shelf.store.release(self._engine, self._world.now)
            self._engine += 1

    def describe(self) -> NodeDescription:
        endpoint = f"10.0.0.1:{self._described}"
        region = RegionDescription(
            self.name, SLOT_BYTES, SLOT_BYTES, self._memory.slots, self._host, "", "", endpoint, self._kind
        )
        return NodeDescription(self.name, self.epoch, self._host, endpoint, (region,))

    def describe_anew(self) -> None:
        self._described += 1
        for link in self.links:
            if link.connection is not None:
                link.join()

    def room(self) -> int:
        return 0 if self.shelf is None else self.shelf.store.free_slots * SLOT_BYTES

    def held(self) -> list[Stored]:
        return [] if self.shelf is None else self.shelf.held()

    # --- what it tells ------------------------------------------------------------------------------------------------

    def _changed(self, shelf: Shelf, stored: Sequence[Stored]) -> None:
        removed = shelf.store.take_removed()
        shards = self._shards_of([*(block.key for block in stored), *removed])
        for link in self.links:
            mine = [key for key in removed if shards[key] == link.shard.number]
            came = [block for block in stored if shards[block.key] == link.shard.number]
            if mine or came:
                link.outbox.changed(came, mine)
                link.pump()

    def _looked(self, keys: list[bytes]) -> None:
        shards = self._shards_of(keys)
        for link in self.links:
            depths = [depth for depth, key in enumerate(keys) if shards[key] == link.shard.number]
            if len(depths) == len(keys):
                link.outbox.looked(Seen(keys_of(keys)[0]))
            elif depths:
                columns = b"".join(depth.to_bytes(4, "little") for depth in depths)
                link.outbox.looked(Seen(keys_of(keys[depth] for depth in depths)[0], columns))
            link.pump()

    def shard_of(self, key: bytes) -> int:
        return self._shards_of([key])[key]

    def _shards_of(self, keys: list[bytes]) -> dict[bytes, int]:
        if len(self.links) <= 1 or not keys:
            return dict.fromkeys(keys, 0)
        numbers = shard_of(keys_of(keys), index_seed(self._setting.settings.secret), len(self.links))
        return dict(zip(keys, numbers.tolist(), strict=True))

    def told(self, link: Link, message: Message) -> None:
        """Something that the directory wants of this node."""
        match message:
            case Take(ask=ask, items=items) if self._kind == HOST:
                free = 0 if self.shelf is None or self.leaving else self.shelf.store.free_slots
                room = items[:free]
                self._fetch(room, partial(link.tell, Taken(ask)))
            case Erase(number=number, scope=scope) if self._kind == HOST:
                self._purge(scope)
                link.tell(Erased(number, NodePurge(self.name, [])))
            case _:
                self._world.require(False, f"{self.name} is told {message}")

    # --- what its engine does -----------------------------------------------------------------------------------------

    def request(self, prompt: int) -> None:
        """The engine serves a prompt."""
        if self.shelf is None or self.leaving:
            return
        self._world.counts["requests"] += 1
        keys = chain(prompt)
        known = self.shelf.store.lookup(keys)
        depth = next((i for i, block in enumerate(known) if block is None), len(keys))
        self.shelf.store.touch(keys[:depth], keys[depth:])
        self._looked(keys)
        if missing := keys[depth:]:
            self._find(missing, partial(self._load, missing))

    def _find(self, keys: list[bytes], then: Callable[[dict[bytes, Location]], None]) -> None:
        """Where are these? A shard that is away or silent costs its time, and its keys are misses."""
        world, began = self._world, self._world.now
        shards = self._shards_of(keys)
        where: dict[bytes, Location] = {}
        groups = {link: [key for key in keys if shards[key] == link.shard.number] for link in self.links}
        waits = [link for link, wanted in groups.items() if wanted]

        def answered(link: Link, found: Found | None) -> None:
            world.require(world.now - began <= LOOKUP_SECONDS + ROUNDING_SECONDS, f"{self.name} waited {world.now - began} s")
            for key, places in zip(groups[link], found.places.locations() if found is not None else [], strict=False):
                if places:
                    where[key] = places[0] if world.chance(0.8) else world.random.choice(places)
            waits.remove(link)
            if not waits:
                then(where)

        for link in list(waits):
            link.ask(partial(Find, keys=keys_of(groups[link])), LOOKUP_SECONDS, partial(answered, link))

    def _load(self, keys: list[bytes], where: dict[bytes, Location]) -> None:
        """Read the leading blocks that somebody has, then compute what is still missing."""
        items = []
        for key in keys:
            if key not in where:
                break
            items.append(WarmItem(key, where[key]))
        self._world.counts["found"] += len(items)
        self._fetch(items, lambda: self._compute(keys))

    def warm(self, bytes_max: int, family: bytes) -> None:
        """Pull what is hot."""
        for link in self.links:
            share = bytes_max // len(self.links)
            rates = {name: self._world.random.uniform(1e3, 1e9) for name in list(link.peers)[::2]}
            ask = partial(AskPlan, family=family, tenant=NO_TENANT, bytes_max=share, seconds_max=5.0, group=False, rates=rates)
            link.ask(ask, PLAN_SECONDS, self._planned)

    def _planned(self, plan: Plan | None) -> None:
        if plan is not None:
            self._fetch(plan.items, lambda: None)

    def leave(self) -> None:
        """Hand over what only this node holds, then go."""
        if self.shelf is None or self.leaving or self._kind == DEVICE:
            return
        self.leaving = True
        shelf, waits = self.shelf, len(self.links)

        def left(answer: Message | None) -> None:
            nonlocal waits
            waits -= 1
            self._world.counts["left"] += answer is not None
            if not waits and self.shelf is shelf:
                self.die(loud=True)

        held = [block.key for block in self.held()]
        shards = self._shards_of(held)
        for link in list(self.links):
            mine = keys_of(key for key in held if shards[key] == link.shard.number)
            link.ask(partial(Leave, seconds=LEAVE_SECONDS / 2, keys=mine, more=False), LEAVE_SECONDS, left)

    def _purge(self, scope: PurgeScope) -> None:
        if self.shelf is None:
            return
        store, matches = self.shelf.store, scope.matcher()
        store.begin_purge(matches, self._world.now)
        store.purge([block.key for block in self.held() if matches(block.key)])
        store.end_purge()
        slots = store.soiled.take(self._memory.slots)
        self.shelf.region.punch(slots)
        store.cleaned(slots)
        self._changed(self.shelf, [])

    # --- blocks -------------------------------------------------------------------------------------------------------

    def _fetch(self, items: Sequence[WarmItem], then: Callable[[], None]) -> None:
        """Read these from their holders, one read for each, and keep what validates."""
        lots: dict[str, list[WarmItem]] = {}
        for item in items:
            lots.setdefault(item.location.node, []).append(item)
        waits = len(lots)

        def done(_: list[bytes]) -> None:
            nonlocal waits
            waits -= 1
            if not waits:
                then()

        if not lots:
            then()
        for name, lot in lots.items():
            self._read(name, lot, done)

    def _read(self, name: str, items: list[WarmItem], then: Written) -> None:
        """Slots are read half by half, then their generations: those that are what was told have given the right bytes."""
        world, setting = self._world, self._setting
        slots = self._reserve([item.key for item in items])
        places = {item.key: item.location for item in items}
        first: dict[bytes, bytes] = {}

        def source() -> Shelf | None:
            node = None if (self.name, name) in setting.network.apart else setting.nodes.get(name)
            return None if node is None else node.shelf

        def begin() -> None:
            shelf = source()
            if shelf is not None:
                first.update((key, shelf.read(places[key].slot, 0)) for key in slots)
                world.soon(*READ_SECONDS, lambda: finish(shelf))
            else:
                world.later(FAILED_SECONDS, lambda: finish(None))

        def finish(shelf: Shelf | None) -> None:
            good: list[bytes] = []
            for key in slots if shelf is not None else ():
                assert shelf is not None
                second = shelf.read(places[key].slot, 1)
                if setting.rules.validate(shelf.generation(places[key].slot), places[key].generation):
                    right = (first[key], second) == halves(key)
                    world.require(right, f"{self.name} accepts a wrong block of {key!r} from {name}: {places[key]}")
                    good.append(key)
                self._write(slots[key], 0, first[key])
                self._write(slots[key], 1, second)
            world.counts["read"] += len(good)
            world.counts["stale"] += len(slots) - len(good)
            self._commit(slots, good)
            then(good)

        world.soon(*READ_SECONDS, begin)

    def _compute(self, keys: list[bytes]) -> None:
        """The engine computes these and saves them, half by half."""
        slots = self._reserve(keys)

        def write(half: int) -> None:
            for key, reserved in slots.items():
                self._write(reserved, half, halves(key)[half])
            if half == 0:
                self._world.soon(*WRITE_SECONDS, lambda: write(1))
            else:
                self._commit(slots, list(slots))

        self._world.soon(*WRITE_SECONDS, lambda: write(0))

    def _reserve(self, keys: list[bytes]) -> dict[bytes, Reserved]:
        """By key, a slot for each that is neither here nor on its way, as far as there is room."""
        if self.shelf is None:
            return {}
        pairs = self.shelf.store.reserve(keys, SLOT_BYTES, self._engine, self._world.now)
        self._changed(self.shelf, [])
        return {
            key: Reserved(self.shelf, self._engine, slot, odd)
            for key, (slot, odd) in zip(keys, pairs, strict=True)
            if (slot, odd) != NO_SLOT
        }

    def _write(self, reserved: Reserved, half: int, content: bytes) -> None:
        """Into the slot, even if its owner has given it up meanwhile: whoever writes does not know."""
        assert len(content) == HALF
        reserved.shelf.write(reserved.slot, half, content)

    def _commit(self, slots: dict[bytes, Reserved], good: list[bytes]) -> None:
        if not slots:
            return
        shelf = next(iter(slots.values())).shelf
        if shelf is not self.shelf:
            return  # of a former life
        kept = [(slots[key], key) for key in good]
        bad = [reserved for key, reserved in slots.items() if key not in good]
        engine = next(iter(slots.values())).engine
        numbers, odds = [each.slot for each, _ in kept], [each.generation for each, _ in kept]
        stored = shelf.store.commit(numbers, odds, [checksum(key) for _, key in kept], engine)
        shelf.store.abort([each.slot for each in bad], [each.generation for each in bad], engine)
        self._changed(shelf, stored)


class Reserved:
    """A slot of ``shelf`` for ``engine`` to write to."""

    def __init__(self, shelf: Shelf, engine: int, slot: int, generation: int) -> None:
        self.shelf, self.engine, self.slot, self.generation = shelf, engine, slot, generation
