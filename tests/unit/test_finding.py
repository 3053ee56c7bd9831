"""Where keys are. Goal: the best places first, none that he may not have. Method: an index, members, no clock."""

from __future__ import annotations

import random

import pytest

from kvshare import keys
from kvshare.cluster_messages import Leave
from kvshare.finding import FIND_KEYS_MAX, FOUND_LOCATIONS_MAX, Finder
from kvshare.index import CompactIndex, Index
from kvshare.leaving import Leavings
from kvshare.members import Members, Peer
from kvshare.places import DEVICE, DISK, HOST, Location, NodeDescription, RegionDescription, Stored
from kvshare.runs import keys_of, runs_of
from kvshare.tenants import TenantRules, Tenants

FAMILY = b"f" * keys.FAMILY_BYTES
OURS, BOUND = keys.prefix(FAMILY), keys.prefix(FAMILY, tenant=keys.tenant_tag("bound"))
TENANTS = Tenants({"bound": TenantRules(regions=("eu",))})
LENGTHS = {HOST: 10, DISK: 11, DEVICE: 12}  # of blocks, and the numbers of their regions


class Play:
    """Nodes that have one region of each kind, and what they hold."""

    def __init__(self, index: Index | None = None) -> None:
        self.index: Index = CompactIndex(1_000_000) if index is None else index
        self.members = Members(TENANTS)
        self.leavings = Leavings(self.index, lambda name: name in self.members.nodes, lambda _: [], lambda name, key: True)
        self.finder = Finder(self.index, self.members, self.leavings)
        self.generation = 0

    def join(self, name: str, host: str = "", label: str = "") -> NodeDescription:
        kinds = (DEVICE,) if "/" in name else (HOST, DISK)
        regions = tuple(RegionDescription(name, LENGTHS[kind], 1, 1, "", "", "", "", kind) for kind in kinds)
        peer = Peer(len(self.members.peers), 0.0)
        peer.description = NodeDescription(name, 1, host or f"host of {name}", "", regions, label)
        self.members.peers[peer.connection] = self.members.nodes[name] = peer
        self.finder.changed()
        return peer.description

    def hold(self, name: str, *held: bytes, kind: str = HOST) -> None:
        blocks = []
        for key in held:
            self.generation += 2
            blocks.append(Stored(key, LENGTHS[kind], self.generation, self.generation, LENGTHS[kind]))
        assert self.index.add(name, runs_of(blocks)) == 0

    def leave(self, name: str) -> None:
        self.leavings.begin(name, 1, Leave(1, 1.0, [], False), [], 0.0)
        self.finder.changed()

    def find(self, asker: NodeDescription, *wanted: bytes) -> list[list[Location]]:
        return self.finder.find(asker, keys_of(wanted)).locations()

    def names(self, asker: NodeDescription, *wanted: bytes) -> list[list[str]]:
        return [[where.node for where in places] for places in self.find(asker, *wanted)]


@pytest.fixture
def play() -> Play:
    return Play()


def key(number: int, prefix: bytes = OURS) -> bytes:
    return prefix + number.to_bytes(8, "big")


X, Y = key(1), key(2)


def test_memory_comes_before_disk_the_askers_host_first_then_the_freshest(play: Play) -> None:
    asker = play.join("asker", host="here")
    for name, kind in (("near disk", DISK), ("far disk", DISK), ("near", HOST), ("far", HOST), ("fresh", HOST)):
        play.join(name, host="here" if "near" in name else "")
        play.hold(name, X, kind=kind)
    assert play.names(asker, X) == [["near", "fresh", "far"]]
    play.index.remove("near", keys_of([X]))
    play.index.remove("far", keys_of([X]))
    assert play.names(asker, X) == [["fresh", "near disk", "far disk"]]


def test_nobody_is_told_of_himself_nor_of_who_is_not_here(play: Play) -> None:
    asker = play.join("asker")
    for name in ("asker", "stranger"):
        play.hold(name, X)
    assert play.names(asker, X, Y) == [[], []]
    play.join("stranger")
    assert play.names(asker, X) == [["stranger"]]
    del play.members.nodes["stranger"]
    play.finder.changed()
    assert play.names(asker, X) == [[]]


def test_new_places_of_who_was_here_before_are_told(play: Play) -> None:
    asker = play.join("asker")
    play.join("a")
    play.hold("a", X)
    assert play.names(asker, X) == [["a"]]
    play.hold("a", Y, kind=DISK)
    assert play.names(asker, X, Y) == [["a"], ["a"]]


def test_who_leaves_is_told_only_where_no_node_has_the_block_that_stays(play: Play) -> None:
    asker = play.join("asker")
    for name in ("a", "a/engine", "b", "c/engine"):
        play.join(name)
    play.hold("a", X, Y, key(3))
    play.hold("a/engine", X, kind=DEVICE)
    play.hold("b", X, kind=DISK)
    play.hold("c/engine", X, Y, kind=DEVICE)
    play.leave("a")
    assert play.names(asker, X, Y, key(3), key(4)) == [["c/engine", "b"], ["c/engine", "a"], ["a"], []]


def test_to_who_leaves_only_places_are_told_that_stay(play: Play) -> None:
    asker = play.join("asker")
    for name in ("a", "asker/engine", "b", "b/engine"):
        play.join(name)
    play.hold("a", X, Y)
    play.hold("b", Y)
    play.hold("b/engine", X, kind=DEVICE)
    play.leave("a")
    play.leave("asker")
    assert play.names(asker, X, Y) == [[], ["b"]]


def test_what_a_tenant_does_not_allow_is_not_told_and_all_else_is_in_its_place(play: Play) -> None:
    outside, inside = play.join("outside", label="us"), play.join("inside", label="eu")
    play.join("a", label="eu")
    mixed = [key(1), key(1, BOUND), key(2, BOUND), key(9), key(2), key(3, BOUND)]
    play.hold("a", *(each for each in mixed if each != key(9)))
    assert play.names(inside, *mixed) == [["a"], ["a"], ["a"], [], ["a"], ["a"]]
    assert play.names(outside, *mixed) == [["a"], [], [], [], ["a"], []]


def test_a_long_question_is_answered_up_to_a_limit(play: Play) -> None:
    asker = play.join("asker")
    play.join("a")
    play.hold("a", X, Y)
    found = play.finder.find(asker, keys_of([X, key(3, BOUND), *[Y] * FIND_KEYS_MAX]))
    assert len(found) == FIND_KEYS_MAX
    assert [len(places) for places in found.locations()] == [1, 0] + [1] * (FIND_KEYS_MAX - 2)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_comes_and_goes_the_answer_is_what_the_rules_say(seed: int) -> None:
    """Against the rules in plain words, with a cache that could be stale at every step."""
    chance = random.Random(seed)
    play = Play()
    names = ["a", "a/engine", "b", "b/engine", "c", "d"]
    held: dict[str, dict[bytes, str]] = {name: {} for name in names}
    asker = play.join("asker", host="h0")
    for _ in range(300):
        name = chance.choice(names)
        what = chance.choice(("join", "go", "hold", "hold", "hold", "remove", "leave", "ask"))
        here = name in play.members.nodes
        if what == "join" and not here:
            play.join(name, host=f"h{chance.randrange(3)}")
        elif what == "go" and here:
            del play.members.nodes[name]
            play.leavings.lose(name, 0.0)
            play.index.drop(name)
            held[name].clear()
            play.finder.changed()
            while chance.random() < 0.5 and play.index.sweep():
                pass
        elif what == "hold" and here:
            kind = DEVICE if "/" in name else chance.choice((HOST, DISK))
            number = chance.randrange(6)
            play.hold(name, key(number), kind=kind)
            held[name].pop(key(number), None)
            held[name][key(number)] = kind
        elif what == "remove" and here:
            number = chance.randrange(6)
            play.index.remove(name, keys_of([key(number)]))
            held[name].pop(key(number), None)
        elif what == "leave" and here and "/" not in name:
            play.leave(name)
        for number in range(6):
            (found,) = play.find(asker, key(number))
            expected = [each for each in names if key(number) in held[each]]
            kept = [each for each in expected if "/" not in each and each not in play.leavings]
            if kept:
                expected = [each for each in expected if not play.leavings.leaves_with(each)]

            def rank(each: str, number: int = number) -> tuple[bool, bool, bool]:
                far = play.members.description(each).host_id != asker.host_id
                return play.leavings.leaves_with(each), held[each][key(number)] == DISK, far

            told = [where.node for where in found]
            assert len(told) == len(set(told)) and set(told) <= set(expected)
            assert len(told) == min(len(expected), FOUND_LOCATIONS_MAX)
            assert sorted(map(rank, told)) == sorted(map(rank, expected))[: len(told)]
            assert list(map(rank, told)) == sorted(map(rank, told))
    assert play.index.check() == []
