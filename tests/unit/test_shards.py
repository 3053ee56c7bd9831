"""How a node's words are divided among shards of the directory. Goal: each shard is told of its own keys only, in order,
whatever engines say; method: links that write down what they are told."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare import shards as module
from kvshare.config import Settings
from kvshare.fingerprints import index_seed, shard_of
from kvshare.keys import PREFIX_BYTES
from kvshare.link import Member
from kvshare.places import NodeDescription, Stored
from kvshare.runs import Seen, keys_of
from kvshare.shards import Shards

COUNT = 3
SETTINGS = Settings.load({"secret": "a secret of the tests"}, {})
KEYS = [bytes(PREFIX_BYTES) + number.to_bytes(32, "big") for number in range(1, 101)]
OWNERS = shard_of(keys_of(KEYS), index_seed(SETTINGS.secret), COUNT).tolist()


class Link:
    """What `Shards` needs of a link, and nothing behind it."""

    def __init__(self, *arguments: object) -> None:
        self.listed = arguments[3]
        self.welcomed = self.connected = True
        self.nodes: dict[str, NodeDescription] = {}
        self.stored: list[bytes] = []
        self.removed: list[bytes] = []
        self.seen: list[Seen] = []

    def changed(self, stored: list[Stored], removed: list[bytes]) -> None:
        self.stored += [block.key for block in stored]
        self.removed += removed

    def looked(self, seen: Seen) -> None:
        self.seen.append(seen)

    def lists(self, *nodes: NodeDescription) -> None:
        """It was welcomed anew, and these are here."""
        self.nodes = {node.node: node for node in nodes}
        self.listed(None)  # type: ignore[operator]


class Play:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = COUNT) -> None:
        self.links: list[Link] = []

        def made(*arguments: object) -> Link:
            self.links.append(Link(*arguments))
            return self.links[-1]

        monkeypatch.setattr(module, "DirectoryLink", made)
        self.heard: list[object] = []
        member = Member("me", lambda: node("me"), lambda: iter(()), self.heard.append, self.heard.append)
        self.shards = Shards(SETTINGS, member, lambda _: "", count)


def node(name: str, epoch: int = 1) -> NodeDescription:
    return NodeDescription(name, epoch, "host", "", ())


def owned_by(shard: int) -> list[bytes]:
    return [key for key, owner in zip(KEYS, OWNERS, strict=True) if owner == shard]


def test_each_shard_hears_of_its_own_keys_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch)
    play.shards.changed([Stored(key, 1, 2, 4, 8) for key in KEYS], KEYS)
    assert [link.stored for link in play.links] == [link.removed for link in play.links] == [*map(owned_by, range(COUNT))]


def test_what_is_no_key_goes_to_nobody_and_moves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch)
    play.shards.changed([], [b"", KEYS[0], b"short", *KEYS[1:], bytes(PREFIX_BYTES)])
    assert [link.removed for link in play.links] == [*map(owned_by, range(COUNT))]


def test_a_chain_is_told_with_the_depth_of_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch)
    play.shards.looked(KEYS)
    told = {}
    for link in play.links:
        (seen,) = link.seen
        assert seen.well_formed()
        depths = np.frombuffer(seen.depths, "<u4").tolist()
        assert depths == sorted(depths)
        told |= dict(zip(seen.keys, depths, strict=True))
    assert told == {key: depth for depth, key in enumerate(KEYS)}


def test_one_shard_is_told_of_whole_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, 1)
    play.shards.looked(KEYS)
    play.shards.looked([])
    play.shards.looked([KEYS[0], b"\xff" * PREFIX_BYTES + b"another prefix"])
    assert play.links[0].seen == [Seen(keys_of(KEYS)[0])]


def test_a_node_is_here_while_any_shard_that_is_there_lists_it(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, 2)
    first, second = play.links
    first.lists(node("a"))
    second.lists(node("a"), node("b"))
    assert play.heard == [node("a"), node("b")]
    first.lists()  # it has restarted, and nobody has come back to it yet
    assert len(play.heard) == 2
    second.welcomed = False
    second.listed(list(second.nodes))  # type: ignore[operator]
    assert sorted(play.heard[2:], key=str) == ["a", "b"]


def test_without_any_shard_nobody_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, 1)
    (only,) = play.links
    only.lists(node("a"), node("b"))
    only.welcomed = False
    only.listed(["a", "b"])  # type: ignore[operator]
    assert len(play.heard) == 2
    only.welcomed = True
    only.lists(node("b"), node("c"))
    assert set(play.heard[2:]) == {node("c"), "a"}


def test_a_shard_that_lags_behind_does_not_bring_back_an_earlier_start(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, 2)
    first, second = play.links
    first.lists(node("a", epoch=2))
    second.lists(node("a", epoch=1))
    assert play.heard == [node("a", epoch=2)]
    second.lists(node("a", epoch=3))
    assert play.heard[1:] == [node("a", epoch=3)]
