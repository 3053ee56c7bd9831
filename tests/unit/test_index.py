"""The compact index against its oracle: random operations on both, all questions compared after each; then its limits, what
ends, the numbers of places and nodes, and keys that a thousand nodes hold."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvshare.fingerprints import ALL_PARTS, PARTS, digests_of, hashes_of, index_seed, part_of, shard_of
from kvshare.index import RANK_NEVER, SLOTS_MAX, CompactIndex
from kvshare.index_reference import ReferenceIndex
from kvshare.places import Location, Stored
from kvshare.runs import Keys, Run, keys_of, runs_of

SEED = 0x1234_5678_9ABC_DEF0
PREFIXES = (b"a" * 32, b"b" * 32)
NODES = ("n0", "n1", "n2", "n3/engine")
EPOCH = 1 << 32


def key(number: int, size: int = 32) -> bytes:
    """Some key: block hashes of ``size`` bytes, of one of two prefixes."""
    return PREFIXES[number % 2] + random.Random(number).randbytes(size)


UNIVERSE = [key(number, size) for number, size in enumerate([32] * 30 + [1, 8, 8, 16, 31, 20])]
KEYS = st.lists(st.sampled_from(UNIVERSE), max_size=12)
BLOCKS = st.lists(
    st.builds(
        Stored,
        key=st.sampled_from(UNIVERSE),
        region=st.sampled_from([0, 4096, 1 << 40]),
        slot=st.sampled_from([0, 1, 77, SLOTS_MAX - 1, SLOTS_MAX]),
        generation=st.builds(lambda epoch, half: epoch * EPOCH + 2 * half, st.integers(0, 3), st.integers(0, (1 << 31) - 1)),
        length=st.sampled_from([4096, 8192]),
        expires=st.sampled_from([0, 0, 0, 5, (1 << 32) - 1]),
    ),
    max_size=12,
)
NODE = st.sampled_from(NODES)


def block(number: int, slot: int = 0, generation: int = EPOCH, region: int = 4096, expires: int = 0) -> Stored:
    return Stored(key(number), region, slot, generation, 4096, expires)


def random_runs(count: int, seed: int, epoch: int = 7) -> list[Run]:
    """``count`` blocks of random keys: one run."""
    rng = np.random.default_rng(seed)
    generations = (np.arange(count, dtype="<u8") * 2) + np.uint64(epoch << 32)
    slots = np.arange(count, dtype="<u4")
    return [Run(Keys(PREFIXES[0], 32, rng.bytes(32 * count)), 4096, 4096, 0, slots.tobytes(), generations.tobytes())]


def assert_alike(ours: CompactIndex, oracle: ReferenceIndex) -> None:
    keys = keys_of(UNIVERSE)
    assert ours.check() == [] and oracle.check() == []
    assert ours.locations() == oracle.locations()
    assert ours.nodes() == oracle.nodes()
    assert ours.find(keys, None, 4).locations() == oracle.find(keys, None, 4).locations()
    for node in NODES:
        assert ours.digests(node).tolist() == oracle.digests(node).tolist()
        assert ours.holds(node, keys).tolist() == oracle.holds(node, keys).tolist()


class Alike(RuleBasedStateMachine):
    """Whatever is done to both, all questions are answered alike."""

    @initialize(keys_max=st.sampled_from([3, 8, 1000]))
    def begin(self, keys_max: int) -> None:
        self.roomy = keys_max == 1000
        self.ours, self.oracle = CompactIndex(keys_max, SEED), ReferenceIndex(keys_max, SEED)

    @rule(node=NODE, blocks=BLOCKS)
    def add(self, node: str, blocks: list[Stored]) -> None:
        assert self.ours.add(node, runs_of(blocks)) == self.oracle.add(node, runs_of(blocks))

    @rule(node=NODE, keys=KEYS)
    def remove(self, node: str, keys: list[bytes]) -> None:
        self.ours.remove(node, keys_of(keys))
        self.oracle.remove(node, keys_of(keys))

    @rule(node=NODE, parts=st.one_of(st.just(ALL_PARTS), st.integers(0, ALL_PARTS)))
    def drop(self, node: str, parts: int) -> None:
        self.ours.drop(node, parts)
        self.oracle.drop(node, parts)
        if not self.roomy:  # the dead take room until they are swept
            self.sweep()

    @rule()
    def sweep(self) -> None:
        while self.ours.sweep():
            pass
        assert len(self.ours) == len(self.oracle)
        assert None not in [place for place, used in zip(self.ours.places(), self._used(), strict=True) if used]

    def _used(self) -> list[bool]:
        nodes = self.ours.nodes()
        return [place is not None and place.node in nodes for place in self.ours.places()]

    @rule(keys=KEYS, most=st.integers(1, 5), of_place=st.dictionaries(NODE, st.sampled_from([0, 1, 2, RANK_NEVER])))
    def find(self, keys: list[bytes], most: int, of_place: dict[str, int]) -> None:
        found = []
        for index in (self.ours, self.oracle):
            ranks = [0 if place is None else of_place.get(place.node, 1) for place in index.places()]
            found.append(index.find(keys_of(keys), np.array(ranks, np.uint8), most).locations())
        assert found[0] == found[1]

    @rule(keys=KEYS, exclude=NODE, most=st.integers(1, 3))
    def ask(self, keys: list[bytes], exclude: str, most: int) -> None:
        packed = keys_of(keys)
        assert self.ours.held(packed) == self.oracle.held(packed)
        assert self.ours.depths(packed) == self.oracle.depths(packed)
        assert self.ours.locate(keys, exclude, most) == self.oracle.locate(keys, exclude, most)
        assert [self.ours.holders(one) for one in keys] == [self.oracle.holders(one) for one in keys]

    @invariant()
    @precondition(lambda self: hasattr(self, "ours"))
    def compare(self) -> None:
        assert_alike(self.ours, self.oracle)


TestAlike = Alike.TestCase
TestAlike.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.integers(1, 400), min_size=1, max_size=25))
def test_a_grown_index_finds_all_that_it_was_told(seed: int, sizes: list[int]) -> None:
    """Several nodes hold the same random keys and lose some again; banks grow and shrink meanwhile."""
    ours, oracle, rng = CompactIndex(100_000, SEED), ReferenceIndex(100_000, SEED), random.Random(seed)
    told: list[Run] = []
    for step, size in enumerate(sizes):
        told += random_runs(size, seed + step)
        node = NODES[step % len(NODES)]
        for index in (ours, oracle):
            index.add(node, told[-3:])
        if rng.random() < 0.3:
            going = [rng.choice(told).keys]
            for index in (ours, oracle):
                index.remove(node, going)
    keys = [run.keys for run in told]
    assert ours.check() == []
    assert ours.find(keys, None, 9).locations() == oracle.find(keys, None, 9).locations()
    assert len(ours) == len(oracle)


# --- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 33))
def test_hashes_are_xxh3_of_the_whole_key(size: int) -> None:
    whole = [key(number, size) for number in range(0, 40, 2)]
    assert hashes_of(keys_of(whole), SEED).tolist() == [xxhash.xxh3_64_intdigest(one, SEED) for one in whole]


def test_malformed_keys_have_no_hashes() -> None:
    for bad in (Keys(b"short", 4, b"1234"), Keys(b"p" * 32, 33, b"1" * 33), Keys(b"p" * 32, 4, b"123456")):
        with pytest.raises(ValueError, match="a prefix has 32 bytes"):
            hashes_of([bad], SEED)


def test_secrets_make_different_seeds_and_a_seed_different_hashes() -> None:
    assert index_seed("a") == index_seed("a") != index_seed("b")
    assert 0 <= index_seed("") < 1 << 64
    keys = keys_of([key(1)])
    assert hashes_of(keys, 1) != hashes_of(keys, 2)


def test_shards_are_even_and_say_nothing_of_parts() -> None:
    """Each shard has its share of each part, within what chance allows for 80,000 keys."""
    keys = [random_runs(80_000, 3)[0].keys]
    shards, parts = shard_of(keys, SEED, 5), part_of(hashes_of(keys, SEED))
    table = np.zeros((5, PARTS), np.int64)
    np.add.at(table, (shards, parts), 1)
    assert table.sum() == 80_000 and 150 < table.min() <= table.max() < 350
    assert shard_of(keys, SEED, 1).max() == 0


def test_digests_tell_by_part_what_differs() -> None:
    blocks = [block(number, slot=number) for number in range(200)]
    index = CompactIndex(1000, SEED)
    index.add("n", runs_of(blocks))
    assert index.digests("n").tolist() == digests_of(runs_of(reversed(blocks)), SEED).tolist()
    index.add("n", [*runs_of([block(7, slot=8)])])
    differing = np.flatnonzero(index.digests("n") != digests_of(runs_of(blocks), SEED))
    assert differing.tolist() == part_of(hashes_of(keys_of([key(7)]), SEED)).tolist()


# --- room -------------------------------------------------------------------------------------------------------------


def test_keys_and_locations_over_the_limit_are_refused_and_what_is_known_may_still_move() -> None:
    index = CompactIndex(2, SEED)
    assert index.add("a", runs_of([block(1), block(2), block(3)])) == 1
    assert index.add("b", runs_of([block(1), block(2)])) == 0
    assert index.add("c", runs_of([block(1)])) == 1  # a fifth location
    assert index.nodes() == {"a", "b"}
    assert index.add("a", runs_of([block(1, slot=5)])) == 0
    assert index.locate([key(1)], "b", 1) == [[Location("a", 4096, 5, EPOCH, 4096)]]
    index.remove("a", keys_of([key(2)]))
    assert index.add("c", runs_of([block(1)])) == 0
    assert index.check() == []


def test_numbers_too_large_for_a_column_are_refused() -> None:
    index = CompactIndex(100, SEED)
    assert index.add("a", runs_of([block(1, slot=SLOTS_MAX), block(2, slot=SLOTS_MAX - 1)])) == 1
    assert index.add("a", runs_of([block(3, region=1 << 63), block(4, expires=1 << 32)])) == 2
    assert index.locations() == 1 and index.check() == []


def test_a_node_that_tells_a_start_for_each_block_is_refused_after_a_thousand() -> None:
    index = CompactIndex(10_000, SEED)
    blocks = [block(number, generation=number * EPOCH) for number in range(1500)]
    assert index.add("liar", runs_of(blocks)) == 1500 - 1024
    assert index.add("honest", runs_of(blocks[:1])) == 0
    index.drop("liar")
    while index.sweep():
        pass
    assert index.add("liar", runs_of(blocks[:10])) == 0
    assert index.check() == []


def test_dropping_parts_again_and_again_uses_up_no_places() -> None:
    """Each repair gives the node's places new numbers, which sweeping frees."""
    index = CompactIndex(1000, SEED)
    runs = runs_of([block(number, slot=number) for number in range(100)])
    for part in range(3000):
        index.drop("a", 1 << part % PARTS)
        assert index.add("a", runs) == 0
        if part % 500 == 0:
            while index.sweep():
                pass
    assert index.locations() == 100 and index.check() == []


def test_numbers_of_nodes_and_places_are_given_again() -> None:
    index = CompactIndex(1000, SEED)
    for start in range(200):
        index.add(f"node-{start}", runs_of([block(number, generation=start * EPOCH) for number in range(20)]))
        index.drop(f"node-{start}")
        while index.sweep():
            pass
    assert len(index.places()) <= 2 and index.check() == []
    assert index.add("last", runs_of([block(1)])) == 0
    assert index.nodes() == {"last"}


def test_places_are_the_same_object_until_they_change() -> None:
    index = CompactIndex(1000, SEED)
    index.add("a", runs_of([block(1)]))
    before = index.places()
    index.add("a", runs_of([block(2)]))
    assert index.places() is before
    index.add("b", runs_of([block(2)]))
    assert index.places() is not before and before == index.places()[: len(before)]


def test_ranks_that_are_not_of_these_places_are_an_error() -> None:
    index = CompactIndex(1000, SEED)
    index.add("a", runs_of([block(1)]))
    with pytest.raises(ValueError, match="a rank is needed for each place"):
        index.find(keys_of([key(1)]), np.zeros(2, np.uint8))


# --- what goes --------------------------------------------------------------------------------------------------------


def test_a_dropped_node_is_gone_at_once_and_its_memory_by_and_by() -> None:
    index = CompactIndex(10_000_000, SEED)
    index.add("a", random_runs(1_500_000, 1))
    index.add("b", runs := random_runs(1_500_000, 2))
    before = index.memory_bytes()
    index.drop("a")
    assert index.nodes() == {"b"} and index.locations() == 1_500_000 and index.held([runs[0].keys]) == 1_500_000
    assert index.memory_bytes() == before
    steps = 0
    while index.sweep():
        steps += 1
        assert index.locations() == 1_500_000
    assert steps > 100 and index.check() == [] and len(index) == 1_500_000
    assert index.memory_bytes() < 0.75 * before
    assert index.held([runs[0].keys]) == 1_500_000


def test_a_node_that_comes_back_before_it_is_swept_is_told_anew() -> None:
    index = CompactIndex(1000, SEED)
    index.add("a", runs_of([block(1, slot=1), block(2, slot=2)]))
    index.drop("a")
    index.add("a", runs_of([block(1, slot=9)]))
    assert index.locate([key(1), key(2)], "", 3) == [[Location("a", 4096, 9, EPOCH, 4096)], []]
    while index.sweep():
        pass
    assert index.locations() == 1 and len(index) == 1 and index.check() == []


def test_what_ends_is_told_and_forgotten_with_its_block() -> None:
    index = CompactIndex(10_000, SEED)
    index.add("a", runs_of([block(number, expires=number % 3 * 100) for number in range(3000)]))

    def ends() -> list[int]:
        return [where[0].expires for where in index.locate([key(number) for number in range(3000)], "", 1)]

    assert ends() == [number % 3 * 100 for number in range(3000)]
    index.remove("a", keys_of([key(number) for number in range(3000)]))
    index.add("a", runs_of([block(number) for number in range(3000)]))
    assert not any(ends()) and index.check() == []
    index.add("a", runs_of([block(number, expires=7) for number in range(3000)]))
    index.drop("a")
    index.add("a", runs_of([block(number) for number in range(0, 3000, 2)]))
    while index.sweep():
        pass
    assert index.check() == [] and index.find(keys_of([key(2)])).expires == b""


def test_a_key_that_a_thousand_nodes_hold() -> None:
    """All are told, the freshest first; the keys beside it stay as they were."""
    index = CompactIndex(1_000_000, SEED)
    beside = random_runs(20_000, 5)
    index.add("other", beside)
    popular = [block(number) for number in range(5)]
    for node in range(1000):
        index.add(f"node-{node}", runs_of(popular))
    names = [f"node-{node}" for node in reversed(range(1000))]
    assert index.holders(key(3)) == names
    assert index.depths(keys_of([one.key for one in popular])) == dict.fromkeys(names, 5)
    assert index.held([beside[0].keys]) == 20_000 and index.check() == []
    index.add("node-0", runs_of(popular))
    assert index.holders(key(3)) == ["node-0", *names[:-1]]
    for node in range(0, 1000, 2):
        index.remove(f"node-{node}", keys_of([one.key for one in popular]))
    assert len(index.holders(key(3))) == 500 and index.check() == []


def test_memory_is_given_back_when_blocks_go() -> None:
    index = CompactIndex(10_000_000, SEED)
    index.add("a", runs := random_runs(2_500_000, 9))
    full = index.memory_bytes()
    hashes = runs[0].keys.hashes
    index.remove("a", [Keys(PREFIXES[0], 32, hashes[: 32 * 2_400_000])])
    assert index.memory_bytes() < 0.4 * full
    assert index.held([Keys(PREFIXES[0], 32, hashes[32 * 2_400_000 :])]) == 100_000 and index.check() == []


def test_a_location_takes_about_23_bytes_with_all_slack() -> None:
    """Whenever one looks while it grows. Pages are coarse for 4 million: `benchmarks/bench_index.py` measures 50."""
    index = CompactIndex(10_000_000, SEED)
    for step in range(25):
        index.add("a", random_runs(200_000, step))
        if step >= 20:
            assert index.memory_bytes() <= 26 * index.locations()
