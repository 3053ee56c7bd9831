"""The life of a slot in a store: reserved, committed, evicted, given up, at rest; each test ends with `check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import xxhash
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvshare.config import Settings
from kvshare.keys import seed_of
from kvshare.places import Stored
from kvshare.slots import Arena, Recovered, Region
from kvshare.store import Store

SLOT = 64
ENGINE, OTHER = 1, 2
NOTHING = (-1, 0)


class Shelf:
    """A region and its store, and the two halves of a save in one call."""

    def __init__(self, slots: int = 8) -> None:
        self.region = Region.anonymous(SLOT, slots)
        self.store = Store(self.region, Settings(quarantine_seconds=10.0))

    def save(self, keys: Sequence[bytes], owner: int = ENGINE, now: float = 0.0) -> list[Stored]:
        pairs = [pair for pair in self.store.reserve(keys, SLOT, owner, now) if pair != NOTHING]
        return self.store.commit([slot for slot, _ in pairs], [odd for _, odd in pairs], [7] * len(pairs), owner)

    def holds(self, key: bytes) -> bool:
        return self.store.lookup([key]) != [None]


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    yield made
    assert made.store.check() == []


def names(start: int, end: int) -> list[bytes]:
    return [b"key%d" % i for i in range(start, end)]


def zero_checksum(key: bytes) -> int:
    """Of a slot that nobody has written to."""
    return xxhash.xxh3_64_intdigest(bytes(SLOT), seed_of(key))


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_committed_block_is_found_where_its_header_says(shelf: Shelf) -> None:
    ((slot, odd),) = shelf.store.reserve([b"a"], 40, ENGINE, now=0.0)
    assert not shelf.holds(b"a")
    (block,) = shelf.store.commit([slot], [odd], [123], ENGINE)
    assert block == Stored(b"a", SLOT, slot, odd + 1, 40)
    assert shelf.store.lookup([b"b", b"a"]) == [None, block]
    assert list(shelf.store.inventory()) == [block]
    assert shelf.region.generations([slot]).tolist() == [odd + 1]
    assert (shelf.region.key(slot), shelf.region.checksums([slot]).tolist()) == (b"a", [123])


def test_nothing_to_write_where_a_block_is_here_or_being_written(shelf: Shelf) -> None:
    shelf.save([b"here"])
    shelf.store.reserve([b"coming"], SLOT, OTHER, now=0.0)
    pairs = shelf.store.reserve([b"here", b"coming", b"new", b"new"], SLOT, ENGINE, now=0.0)
    assert [pair == NOTHING for pair in pairs] == [True, True, False, True]


def test_a_batch_lies_together_in_an_empty_region(shelf: Shelf) -> None:
    assert [slot for slot, _ in shelf.store.reserve(names(0, 4), SLOT, ENGINE, now=0.0)] == [0, 1, 2, 3]


@pytest.mark.parametrize(("key", "length"), [(b"", SLOT), (b"k" * 65, SLOT), (b"a", 0), (b"a", -1), (b"a", SLOT + 1)])
def test_what_cannot_be_stored_gets_no_slot(shelf: Shelf, key: bytes, length: int) -> None:
    assert shelf.store.reserve([key], length, ENGINE, now=0.0) == [NOTHING]


def test_a_commit_that_comes_too_late_or_from_another_is_ignored(shelf: Shelf) -> None:
    ((slot, odd),) = shelf.store.reserve([b"a"], SLOT, ENGINE, now=0.0)
    assert shelf.store.commit([slot], [odd], [7], OTHER) == []
    assert shelf.store.commit([slot], [odd - 2], [7], ENGINE) == []
    assert shelf.store.commit([99, -1], [odd, odd], [7, 7], ENGINE) == []
    assert len(shelf.store.commit([slot, slot], [odd, odd], [7, 7], ENGINE)) == 1
    assert shelf.store.commit([slot], [odd], [7], ENGINE) == []


def test_an_aborted_slot_is_free_and_its_generation_void(shelf: Shelf) -> None:
    ((slot, odd),) = shelf.store.reserve([b"a"], SLOT, ENGINE, now=0.0)
    shelf.store.abort([slot], [odd], OTHER)
    assert shelf.store.free_slots == 7
    shelf.store.abort([slot], [odd], ENGINE)
    assert shelf.store.free_slots == 8
    assert shelf.store.commit([slot], [odd], [7], ENGINE) == []
    assert len(shelf.save([b"a"])) == 1


# --- a full region ----------------------------------------------------------------------------------------------------


def test_reserve_evicts_the_coldest_block_and_bumps_its_generation(shelf: Shelf) -> None:
    stored = {block.key: block for block in shelf.save(names(0, 8))}
    shelf.store.touch(names(0, 7))
    ((slot, odd),) = shelf.store.reserve([b"new"], SLOT, ENGINE, now=0.0)
    assert (slot, odd) == (stored[b"key7"].slot, stored[b"key7"].generation + 1)
    assert shelf.region.generations([slot]).tolist() == [odd]
    assert not shelf.holds(b"key7")
    assert shelf.store.take_removed() == [b"key7"]
    assert shelf.store.take_removed() == []


def test_a_chain_loses_its_tail_before_its_head(shelf: Shelf) -> None:
    shelf.save(names(0, 8))
    shelf.store.reserve([b"x", b"y", b"z"], SLOT, ENGINE, now=0.0)
    assert [shelf.holds(key) for key in names(0, 8)] == [True] * 5 + [False] * 3


def test_a_recovered_chain_loses_its_tail_before_its_head() -> None:
    region = Region.anonymous(SLOT, 4)
    store = Store(region, Settings())
    recovered = [
        Recovered(slot, b"key%d" % slot, 5, region.finish(slot, region.begin(slot), b"key%d" % slot, 5, 7)) for slot in range(4)
    ]
    assert [block.key for block in store.adopt(recovered)] == names(0, 4)
    store.reserve([b"x"], SLOT, ENGINE, now=0.0)
    assert store.take_removed() == [b"key3"]
    assert store.check() == []


def test_reserved_slots_are_never_evicted(shelf: Shelf) -> None:
    first = shelf.store.reserve(names(0, 6), SLOT, ENGINE, now=0.0)
    shelf.save(names(6, 8))
    second = shelf.store.reserve(names(10, 14), SLOT, OTHER, now=0.0)
    assert [pair == NOTHING for pair in second] == [False, False, True, True]
    slots, generations = zip(*first, strict=True)
    assert len(shelf.store.commit(slots, generations, [7] * 6, ENGINE)) == 6


def test_a_long_cold_prompt_does_not_flush_the_hot_set() -> None:
    shelf = Shelf(slots=100)
    hot = [b"hot%d" % i for i in range(30)]
    shelf.save(hot)
    shelf.store.touch(hot)
    for start in range(0, 1000, 10):
        shelf.save([b"cold%d" % i for i in range(start, start + 10)])
    assert all(shelf.holds(key) for key in hot)
    assert shelf.store.check() == []


# --- owners that die, blocks that are corrupt -------------------------------------------------------------------------


def test_slots_of_a_dead_owner_rest_before_others_get_them(shelf: Shelf) -> None:
    pairs = shelf.store.reserve(names(0, 8), SLOT, ENGINE, now=100.0)
    assert shelf.store.next_expiry() is None
    shelf.store.release(ENGINE, now=100.0)
    assert shelf.store.next_expiry() == 110.0
    assert shelf.store.reserve([b"key0"], SLOT, OTHER, now=109.0) == [NOTHING]
    shelf.store.expire(now=110.0)
    assert shelf.store.next_expiry() is None
    ((slot, odd),) = shelf.store.reserve([b"key0"], SLOT, OTHER, now=110.0)
    assert odd > dict(pairs)[slot]
    slots, generations = zip(*pairs, strict=True)
    assert shelf.store.commit(slots, generations, [7] * 8, ENGINE) == []


def test_the_death_of_one_owner_leaves_others_their_reservations(shelf: Shelf) -> None:
    ((slot, odd),) = shelf.store.reserve([b"a"], SLOT, OTHER, now=0.0)
    shelf.store.release(ENGINE, now=0.0)
    assert len(shelf.store.commit([slot], [odd], [7], OTHER)) == 1


def test_a_corrupt_block_leaves_the_index_and_its_slot_rests(shelf: Shelf) -> None:
    good, bad = shelf.save([b"good", b"bad"])
    shelf.store.quarantine([bad.slot, good.slot, 99], [bad.generation, good.generation - 2, 8], now=0.0)
    assert (shelf.holds(b"bad"), shelf.holds(b"good")) == (False, True)
    assert shelf.region.generations([bad.slot]).tolist() == [bad.generation + 1]
    assert shelf.store.take_removed() == [b"bad"]
    assert shelf.store.counters["resting_slots"] == 1
    (again,) = shelf.save([b"bad"])
    assert again.slot != bad.slot


def test_a_dropped_block_is_gone_at_once(shelf: Shelf) -> None:
    (block,) = shelf.save([b"a"])
    shelf.store.drop([b"a", b"unknown"])
    assert not shelf.holds(b"a")
    assert int(shelf.region.generations([block.slot])[0]) % 2 == 1
    assert shelf.store.take_removed() == [b"a"]
    assert shelf.store.free_slots == 8


def test_counters_tell_what_happened_and_what_is(shelf: Shelf) -> None:
    shelf.save(names(0, 9))
    shelf.save(names(0, 1))
    shelf.store.drop([b"key0"])
    expected = {"stored": 8, "no_room": 1, "present": 1, "dropped": 1, "blocks": 7, "bytes": 7 * SLOT, "free_slots": 1}
    assert {name: shelf.store.counters[name] for name in expected} == expected


# --- an arena behind it -----------------------------------------------------------------------------------------------


def test_growth_is_asked_for_ahead_of_need_and_used(short_dir: object) -> None:
    with Arena.open(f"{short_dir}/arena", SLOT, 8 * SLOT, 2 * SLOT) as arena:
        arena.grow()
        store = Store(arena, Settings())
        assert (store.free_slots, store.needs_growth) == (2, False)
        store.reserve([b"a"], SLOT, ENGINE, now=0.0)
        assert store.needs_growth
        while store.needs_growth:
            assert arena.grow()
            store.extend()
        assert store.free_slots == 3
        while arena.grow():
            store.extend()
        store.reserve(names(0, 7), SLOT, ENGINE, now=0.0)
        assert (store.free_slots, store.needs_growth) == (0, False)
        assert store.check() == []


def test_a_restarted_node_serves_what_its_arena_held(short_dir: object) -> None:
    def opened() -> tuple[Arena, Store]:
        arena = Arena.open(f"{short_dir}/arena", SLOT, 8 * SLOT, 8 * SLOT)
        arena.grow()
        return arena, Store(arena, Settings(quarantine_seconds=10.0))

    arena, store = opened()
    pairs = store.reserve([b"kept", b"torn", b"unfinished"], SLOT, ENGINE, now=0.0)
    sums = [zero_checksum(b"kept"), zero_checksum(b"torn") + 1]
    before = store.commit([slot for slot, _ in pairs[:2]], [odd for _, odd in pairs[:2]], sums, ENGINE)
    arena.close()

    arena, store = opened()
    adopted = store.adopt(arena.recovered, arena.unsettled, now=50.0)
    assert [block.key for block in adopted] == [b"kept"]
    assert adopted[0].generation > before[0].generation
    assert (store.free_slots, store.next_expiry()) == (6, 60.0)
    assert store.check() == []
    store.expire(now=60.0)
    assert store.free_slots == 7
    assert store.check() == []
    arena.close()


def test_a_second_copy_of_a_key_is_not_adopted() -> None:
    region = Region.anonymous(SLOT, 4)
    recovered = [Recovered(slot, b"a", 5, region.finish(slot, region.begin(slot), b"a", 5, 7)) for slot in (0, 1)]
    store = Store(region, Settings())
    assert len(store.adopt(recovered)) == 1
    assert store.check() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda region: region.retire(0),
        lambda region: region.headers["key"].__setitem__(0, region.headers["key"][1]),
        lambda region: region.finish(5, region.begin(5), b"unknown", 5, 7),
    ],
)
def test_check_finds_headers_that_differ_from_the_index(damage: Callable[[Region], object]) -> None:
    shelf = Shelf()
    shelf.save(names(0, 2))
    damage(shelf.region)
    assert len(shelf.store.check()) == 1


# --- any order of events ----------------------------------------------------------------------------------------------

KEYS = st.lists(st.integers(0, 11).map(lambda i: b"key%d" % i), max_size=6)
OWNERS = st.sampled_from([ENGINE, OTHER])


class AnyOrder(RuleBasedStateMachine):
    """Reservations, late commits, deaths and evictions in any order: all structures agree, no generation comes twice, and
    what was told (stored, removed) adds up to what is held."""

    @initialize()
    def start(self) -> None:
        self.shelf = Shelf(slots=6)
        self.now = 0.0
        self.tickets: list[tuple[int, int, int]] = []  # (slot, generation, owner), never taken off: late ones stay
        self.told: dict[bytes, Stored] = {}
        self.generations: set[tuple[int, int]] = set()

    def hear(self, stored: Sequence[Stored] = ()) -> None:
        for key in self.shelf.store.take_removed():
            del self.told[key]
        for block in stored:
            assert block.key not in self.told
            self.told[block.key] = block

    @rule(keys=KEYS, owner=OWNERS)
    def reserve(self, keys: list[bytes], owner: int) -> None:
        pairs = self.shelf.store.reserve(keys, SLOT, owner, self.now)
        for slot, generation in pairs:
            if slot >= 0:
                assert generation % 2 == 1
                assert (slot, generation) not in self.generations
                self.generations.add((slot, generation))
                self.tickets.append((slot, generation, owner))
        self.hear()

    @rule(data=st.data(), end=st.sampled_from(["commit", "abort"]))
    def end(self, data: st.DataObject, end: str) -> None:
        if not self.tickets:
            return
        slot, generation, owner = data.draw(st.sampled_from(self.tickets))
        if end == "abort":
            self.shelf.store.abort([slot], [generation], owner)
        else:
            self.hear(self.shelf.store.commit([slot], [generation], [7], owner))

    @rule(keys=KEYS)
    def touch(self, keys: list[bytes]) -> None:
        self.shelf.store.touch(keys)

    @rule(keys=KEYS)
    def drop(self, keys: list[bytes]) -> None:
        self.shelf.store.drop(keys)
        self.hear()

    @rule(keys=KEYS, clean=st.integers(0, 6))
    def purge(self, keys: list[bytes], clean: int) -> None:
        store = self.shelf.store
        store.begin_purge(lambda key: key in keys, self.now)
        store.purge(keys)
        store.end_purge()
        self.hear()
        slots = store.soiled.take(clean)
        self.shelf.region.punch(slots)
        store.cleaned(slots)

    @rule(data=st.data())
    def find_corrupt(self, data: st.DataObject) -> None:
        if self.told:
            block = data.draw(st.sampled_from(list(self.told.values())))
            self.shelf.store.quarantine([block.slot], [block.generation], self.now)
            self.hear()

    @rule(owner=OWNERS)
    def die(self, owner: int) -> None:
        self.shelf.store.release(owner, self.now)

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.shelf.store.expire(self.now)
        expiry = self.shelf.store.next_expiry()
        assert expiry is None or expiry > self.now

    @invariant()
    def all_agree(self) -> None:
        assert self.shelf.store.check() == []
        assert {block.key: block for block in self.shelf.store.inventory()} == self.told


TestAnyOrder = AnyOrder.TestCase
