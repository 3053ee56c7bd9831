"""Who holds how much of a prompt, also where its keys are spread over several shards of the directory.

Goal: the answers of shards, put together, are what one directory with all keys would say, and a shard without an answer costs
precision only. Method: seeded fleets in reference indexes, one with everything and one for each shard.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvshare.cluster_messages import AskDepths, AskNamespaces, Depths, Namespaces
from kvshare.config import Settings
from kvshare.directory import Directory
from kvshare.directory_events import Close, Connected, Heard, Send
from kvshare.fingerprints import shard_of
from kvshare.index_reference import ReferenceIndex
from kvshare.keys import prefix
from kvshare.overlap import Held, Part, held_by, merge, split, take, thin, widen
from kvshare.places import Stored
from kvshare.runs import Keys, keys_of, runs_of

SEED = 7
HOST_REGION, DISK_REGION = 1, 2


def kind_of(node: str, region: int) -> str:
    return "disk" if region == DISK_REGION else "host"


def chain(count: int, space: int = 1) -> list[bytes]:
    """Keys of a prompt whose first half is hashed to 32 bytes and whose second half to 20, so that they pack into two."""
    rng = random.Random(space)
    before = prefix(bytes([space]) * 16)
    return [before + rng.randbytes(32 if i < count // 2 else 20) for i in range(count)]


def hold(index: ReferenceIndex, node: str, keys: list[bytes], region: int = HOST_REGION) -> None:
    index.add(node, runs_of([Stored(key, region, slot, 2, 100) for slot, key in enumerate(keys)]))


def sharded(keys: list[bytes], shards: int) -> list[Part]:
    packed = keys_of(keys)
    return split(packed, shard_of(packed, SEED, shards), shards)


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_shards_put_together_say_what_one_directory_would_say(shards: int, seed: int) -> None:
    rng = random.Random(seed)
    keys = chain(60, seed + 1)
    whole, parts = ReferenceIndex(10_000, SEED), [ReferenceIndex(10_000, SEED) for _ in range(shards)]
    belongs = shard_of(keys_of(keys), SEED, shards)
    for node in ("a", "b", "c", "d/engine"):
        length = rng.randrange(0, 61)
        held = [i for i in range(length) if rng.random() > 0.02]
        hold(whole, node, [keys[i] for i in held])
        for shard, index in enumerate(parts):
            hold(index, node, [keys[i] for i in held if belongs[i] == shard])
    asked = sharded(keys, shards)
    merged = merge(asked, [held_by(index, part.keys, kind_of) for index, part in zip(parts, asked, strict=True)], len(keys))
    assert merged == held_by(whole, keys_of(keys), kind_of)


def test_parts_keep_the_order_of_the_chain_and_lose_no_key() -> None:
    keys = chain(41)
    parts = sharded(keys, 3)
    found = {int(i): key for part in parts for i, key in zip(part.positions, [k for p in part.keys for k in p], strict=True)}
    assert [found[i] for i in range(41)] == keys
    assert all((np.diff(part.positions) > 0).all() for part in parts)


def test_a_shard_without_an_answer_is_left_out_and_silence_of_all_is_told_apart_from_nothing_held() -> None:
    keys = chain(40)
    parts = sharded(keys, 2)
    answers = [{"a": Held(len(part.positions))} for part in parts]
    assert merge(parts, [answers[0], None], 40) == {"a": Held(40)}
    assert merge(parts, [None, None], 40) is None
    assert merge(parts, [{}, None], 40) == {}
    assert merge(sharded([], 2), [None, None], 0) == {}


def test_a_node_that_one_shard_does_not_know_ends_at_that_shards_first_key() -> None:
    keys = chain(40)
    parts = sharded(keys, 2)
    first = int(parts[1].positions[0])
    expected = {"a": Held(first)} if first else {}
    assert merge(parts, [{"a": Held(len(parts[0].positions))}, {}], 40) == expected


def test_what_lies_on_disk_is_estimated_from_a_sample_of_the_chain() -> None:
    keys = chain(64)
    index = ReferenceIndex(10_000, SEED)
    hold(index, "memory", keys)
    hold(index, "disk", keys, DISK_REGION)
    hold(index, "both", keys[:32])
    hold(index, "both", keys[32:], DISK_REGION)
    hold(index, "short", keys[:3], DISK_REGION)
    held = held_by(index, keys_of(keys), kind_of)
    assert held["memory"] == Held(64, 0) and held["disk"] == Held(64, 64) and held["short"] == Held(3, 3)
    assert held["both"].blocks == 64 and 24 <= held["both"].on_disk <= 40


def test_keys_are_taken_from_wherever_they_are_packed() -> None:
    packed = [Keys(b"p" * 32, 2, b"aabbcc"), Keys(b"q" * 32, 1, b"xyz")]
    assert take(packed, np.array([0, 2, 3, 5])) == [Keys(b"p" * 32, 2, b"aacc"), Keys(b"q" * 32, 1, b"xz")]
    assert take(packed, np.array([4])) == [Keys(b"q" * 32, 1, b"y")]
    assert take(packed, np.array([], np.int64)) == []


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("held", [0, 1, 50, 99, 100])
def test_some_keys_of_a_chain_tell_about_how_far_it_is_held_and_never_too_much(count: int, held: int) -> None:
    keys = chain(100)
    index = ReferenceIndex(10_000, SEED)
    hold(index, "a", keys[:held])
    asked, positions = thin(keys_of(keys), count)
    assert [key for packed in asked for key in packed] == [keys[i] for i in positions]
    assert len(positions) <= count
    wide = widen(held_by(index, asked, kind_of), positions)
    blocks = wide["a"].blocks if wide else 0
    assert blocks <= held and held - blocks <= (0 if count >= 100 else 100 // max(1, count - 1) + 1)
    if held == 100 and count > 1:
        assert blocks == 100, "the last key is one of them"


def test_nothing_thinned_is_nothing() -> None:
    keys, positions = thin([], 5)
    assert keys == [] and len(positions) == 0 and widen({}, positions) == {}


def test_a_directory_tells_anybody_and_closes_whoever_asks_for_what_is_no_key() -> None:
    directory = Directory(Settings(), index=ReferenceIndex(100))
    for connection in (1, 2):
        assert directory.handle(Connected(connection), 0.0) == []
    assert directory.handle(Heard(1, AskDepths(7, keys_of(chain(3)))), 0.0) == [Send(1, Depths(7, {}))]
    assert directory.handle(Heard(1, AskDepths(8, [])), 0.0) == [Send(1, Depths(8, {}))]
    assert directory.handle(Heard(1, AskNamespaces(9)), 0.0) == [Send(1, Namespaces(9, []))]
    assert directory.status().counters["depths"] == 1
    closed = directory.handle(Heard(2, AskDepths(1, [Keys(b"short", 32, bytes(32))])), 0.0)
    assert isinstance(closed[0], Close) and closed[0].connection == 2
    assert directory.check() == []
