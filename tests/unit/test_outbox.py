"""What one shard is told: order, completeness, coalescing, limits. Goal: after every play a shard that does as it is told knows
exactly what the node holds; method: a small model shard (`Told`) is fed with what the outbox gives."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from kvshare import outbox
from kvshare.cluster_messages import Publish, Report, Taken
from kvshare.fingerprints import ALL_PARTS, PARTS, hashes_of, part_of, shard_of
from kvshare.index_reference import ReferenceIndex
from kvshare.outbox import Outbox
from kvshare.places import Stored
from kvshare.runs import Seen, keys_of

SEED = 7


def key(number: int, prefix: int = 0) -> bytes:
    return bytes([prefix]) * 20 + number.to_bytes(32, "big")


def block(number: int, generation: int = 2, prefix: int = 0) -> Stored:
    return Stored(key(number, prefix), 4096, number % 1000, generation, 4096)


class Node:
    """What a node holds, and its outbox."""

    def __init__(self, shard: int = 0, shards: int = 1, keys_max: int = 1 << 20) -> None:
        self.held: dict[bytes, Stored] = {}
        self.outbox = Outbox("a", lambda: ReferenceIndex(keys_max, SEED), SEED, self.inventory, shard, shards)

    def inventory(self) -> Iterator[Stored]:
        return iter(list(self.held.values()))

    def store(self, *blocks: Stored) -> None:
        self.held.update({each.key: each for each in blocks})
        self.outbox.changed(blocks, [])

    def remove(self, *keys: bytes) -> None:
        for each in keys:
            del self.held[each]
        self.outbox.changed([], keys)

    def next(self) -> object:
        return self.outbox.next(epoch=5, free_bytes=99)

    def rest(self) -> list[object]:
        return list(iter(self.next, None))


class Told:
    """A shard that believes everything."""

    def __init__(self) -> None:
        self.known: dict[bytes, Stored] = {}
        self.sequence: int | None = None

    def hear(self, *messages: object) -> None:
        for message in messages:
            if not isinstance(message, Publish):
                continue
            assert (message.node, message.epoch, message.free_bytes) == ("a", 5, 99)
            if message.anew == ALL_PARTS:
                self.sequence = message.sequence
            else:
                assert self.sequence is not None and message.sequence == self.sequence + 1, "a gap"
                self.sequence = message.sequence
            for each in list(self.known):
                if message.anew >> int(part_of(hashes_of(keys_of([each]), SEED))[0]) & 1:
                    del self.known[each]
            for each in (each for keys in message.removed for each in keys):
                assert each in self.known, "told that something went which was never told of"
                del self.known[each]
            assert all(run.well_formed() for run in message.stored)
            self.known.update({stored.key: stored for run in message.stored for stored in run.stored()})

    def digests(self) -> bytes:
        from kvshare.runs import runs_of

        index = ReferenceIndex(1 << 20, SEED)
        index.add("a", runs_of(self.known.values()))
        return index.digests("a").astype("<u8").tobytes()


def test_nothing_is_told_before_the_shard_asks() -> None:
    node = Node()
    node.store(block(1))
    assert node.rest() == [] and not node.outbox.given
    assert node.outbox.beat().digests == b""
    node.outbox.resync(ALL_PARTS)
    (publish,) = node.rest()
    assert isinstance(publish, Publish)
    assert (publish.anew, publish.more, len(publish.stored[0])) == (ALL_PARTS, False, 1)
    assert node.outbox.given and node.outbox.idle


def test_a_part_asked_for_first_is_answered_by_everything() -> None:
    node = Node()
    node.store(*map(block, range(100)))
    node.outbox.resync(1)
    (publish,) = node.rest()
    assert isinstance(publish, Publish) and publish.anew == ALL_PARTS and len(publish.stored[0]) == 100


def test_a_long_inventory_comes_in_pieces_and_what_changes_meanwhile_comes_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PUBLISH_BLOCKS_MAX", 10)
    node, told = Node(), Told()
    node.store(*map(block, range(35)))
    node.outbox.resync(ALL_PARTS)
    told.hear(first := node.next())
    assert isinstance(first, Publish) and first.more and first.anew == ALL_PARTS
    node.remove(key(30))  # the inventory was read before: it is told, and taken back
    node.store(block(3, generation=4), block(50))
    node.outbox.post([Taken(1)])
    messages = node.rest()
    assert [type(each) for each in messages] == [*[Publish] * 4, Taken], "answers come behind all that changed before"
    assert [each.more for each in messages if isinstance(each, Publish)] == [True, True, False, False]
    told.hear(*messages)
    assert told.known == node.held


def test_what_came_and_went_in_one_period_is_not_told_of() -> None:
    node, told = Node(), Told()
    node.outbox.resync(ALL_PARTS)
    told.hear(*node.rest())
    node.store(block(1))
    node.remove(key(1))
    assert node.rest() == []
    node.store(block(1))
    told.hear(*node.rest())
    node.remove(key(1))
    node.store(block(1, generation=8))  # it has moved
    (moved,) = node.rest()
    assert isinstance(moved, Publish) and moved.removed == []
    told.hear(moved)
    assert told.known == node.held


def test_blocks_that_are_alike_travel_in_one_run_in_the_order_of_their_chain() -> None:
    node = Node()
    node.outbox.resync(ALL_PARTS)
    node.rest()
    for number in range(50):
        node.store(block(number, prefix=0), block(1000 + number, prefix=1))
    (publish,) = node.rest()
    assert isinstance(publish, Publish)
    assert [len(run) for run in publish.stored] == [50, 50]
    assert list(publish.stored[0].keys) == [key(number) for number in range(50)]
    node.remove(*(key(number) for number in range(0, 50, 2)), *(key(1000 + number, 1) for number in range(50)))
    (publish,) = node.rest()
    assert isinstance(publish, Publish) and [len(keys) for keys in publish.removed] == [25, 50]


def test_parts_are_told_anew_and_nothing_else_is() -> None:
    node, told = Node(), Told()
    node.store(*map(block, range(500)))
    node.outbox.resync(ALL_PARTS)
    told.hear(*node.rest())
    for each in list(told.known)[:200]:  # the shard has lost some
        del told.known[each]
    assert told.digests() != node.outbox.beat().digests
    ours, theirs = (np.frombuffer(sums, "<u8") for sums in (node.outbox.beat().digests, told.digests()))
    differ = [part for part in range(PARTS) if ours[part] != theirs[part]]
    node.outbox.resync(sum(1 << part for part in differ))
    (publish,) = node.rest()
    assert isinstance(publish, Publish) and sum(map(len, publish.stored)) < 500 + 1
    told.hear(publish)
    assert told.known == node.held and told.digests() == node.outbox.beat().digests
    node.outbox.resync(1 << 3)
    (publish,) = node.rest()
    assert isinstance(publish, Publish) and publish.anew == 1 << 3 and 0 < sum(map(len, publish.stored)) < 40


def test_a_shard_is_told_only_of_keys_that_belong_to_it() -> None:
    nodes = [Node(shard, 3) for shard in range(3)]
    seen: list[bytes] = []
    for shard, node in enumerate(nodes):
        node.store(*map(block, range(300)))
        node.outbox.resync(ALL_PARTS)
        told = Told()
        told.hear(*node.rest())
        assert set(shard_of(keys_of(told.known), SEED, 3).tolist()) == {shard}
        seen += told.known
    assert sorted(seen) == sorted(nodes[0].held)


def test_changes_beyond_the_limit_become_a_gap_and_an_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PENDING_BLOCKS_MAX", 100)
    node, told = Node(), Told()
    node.outbox.resync(ALL_PARTS)
    told.hear(*node.rest())
    node.store(*map(block, range(101)))
    node.store(block(500))  # nothing is remembered from now on
    (gap,) = node.rest()
    assert isinstance(gap, Publish) and (gap.stored, gap.removed, gap.anew) == ([], [], 0)
    assert told.sequence is not None and gap.sequence == told.sequence + 2
    assert node.outbox.beat().digests == b"" and node.outbox.counters["overflows"] == 1
    node.outbox.resync(ALL_PARTS)
    told.hear(*node.rest())
    assert told.known == node.held


def test_chains_are_bounded_and_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "REPORT_KEYS_MAX", 10)
    node = Node()
    seen = [Seen(keys_of([key(number) for number in range(start, start + 4)])[0]) for start in range(5)]
    for each in seen:
        node.outbox.looked(each)
    node.outbox.forget()
    assert node.rest() == [Report(seen[-2:])], "the latest, also over a break"
    assert node.rest() == []


def test_nonsense_is_kept_from_the_shard() -> None:
    node, told = Node(), Told()
    node.store(block(1), block(2, generation=3), Stored(b"short", 8192, 0, 2, 8192))
    node.outbox.resync(ALL_PARTS)
    told.hear(*node.rest())
    assert told.known == {} and node.outbox.counters["malformed"] == 1
    node.store(block(2, generation=4), block(1, generation=6))
    told.hear(*node.rest())
    assert set(told.known) == {key(1), key(2)}


def test_an_index_that_is_full_says_no_digests() -> None:
    node = Node(keys_max=10)
    node.store(*map(block, range(30)))
    node.outbox.resync(ALL_PARTS)
    node.rest()
    assert node.outbox.beat().digests == b""


def test_a_broken_connection_is_forgotten_with_all_that_was_told() -> None:
    node, told = Node(), Told()
    node.store(*map(block, range(10)))
    node.outbox.resync(ALL_PARTS)
    node.rest()
    node.store(block(20))
    node.outbox.post([Taken(1)])
    node.outbox.forget()
    node.remove(key(1))
    assert node.rest() == []
    node.outbox.resync(ALL_PARTS)
    told.hear(*node.rest())
    assert told.known == node.held


@pytest.mark.parametrize("seed", range(20))
def test_any_play_ends_with_a_shard_that_knows_what_is_held(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes, resyncs of parts, breaks, in random order; the messages are taken now and then."""
    monkeypatch.setattr(outbox, "PUBLISH_BLOCKS_MAX", 16)
    dice, node, told = random.Random(seed), Node(), Told()
    node.outbox.resync(ALL_PARTS)
    for turn in range(400):
        choice = dice.random()
        if choice < 0.5:
            node.store(*(block(dice.randrange(200), generation=2 * turn + 2, prefix=dice.randrange(2)) for _ in range(5)))
        elif choice < 0.8 and node.held:
            node.remove(*dice.sample(list(node.held), min(4, len(node.held))))
        elif choice < 0.85:
            node.outbox.resync(dice.getrandbits(64) & dice.getrandbits(64))
        elif choice < 0.87:
            node.outbox.forget()
            told = Told()
            node.outbox.resync(ALL_PARTS)
        else:
            for _ in range(dice.randrange(4)):
                told.hear(node.next())
        if choice > 0.95 and told.sequence is not None and node.outbox.given:
            assert told.digests() == node.outbox.beat().digests, "sums are those of what was told up to the sequence"
    told.hear(*node.rest())
    assert told.known == node.held and told.digests() == node.outbox.beat().digests
