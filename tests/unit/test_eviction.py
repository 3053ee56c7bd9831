"""Which block leaves first: S3-FIFO against a plain LRU, on seeded workloads of requests with shared prefixes and scans."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from kvshare.eviction import S3Fifo

BATCH = 16


class Lru:
    """What most caches do; the yardstick."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:
        self._keys[key] = None

    def touch(self, key: bytes) -> None:
        if key in self._keys:
            self._keys.move_to_end(key)

    def evict(self) -> bytes | None:
        return self._keys.popitem(last=False)[0] if self._keys else None

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys


def chain(name: str, blocks: int) -> list[bytes]:
    return [f"{name}/{i}".encode() for i in range(blocks)]


def serve(policy: S3Fifo | Lru, request: list[bytes], capacity: int) -> int:
    """One request: hits are the leading keys that are held; the rest is saved in batches, each entered tail first."""
    hits = next((i for i, key in enumerate(request) if key not in policy), len(request))
    for key in reversed(request[:hits]):
        policy.touch(key)
    for start in range(hits, len(request), BATCH):
        missing = [key for key in request[start : start + BATCH] if key not in policy]
        while len(policy) + len(missing) > capacity and policy.evict() is not None:
            pass
        for key in reversed(missing):
            policy.insert(key)
    return hits


def hit_rate(policy: S3Fifo | Lru, requests: Iterable[list[bytes]], capacity: int) -> float:
    hits = blocks = 0
    for request in requests:
        hits += serve(policy, request, capacity)
        blocks += len(request)
    return hits / blocks


def skewed_requests_with_scans(seed: int) -> list[list[bytes]]:
    """Prompts drawn from 400 by a Zipf law; every twentieth request is a long prompt that never comes again."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    prompts = [chain(f"prompt{i}", rng.randint(4, 24)) for i in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(prompts))]
    requests = rng.choices(prompts, weights, k=4000)
    return [chain(f"cold{i}", 300) if i % 20 == 19 else request for i, request in enumerate(requests)]


def test_more_prefixes_are_hit_than_under_lru_where_scans_pass_through() -> None:
    for seed in (1, 2, 3):
        requests = skewed_requests_with_scans(seed)
        ours, lru = hit_rate(S3Fifo(), requests, 800), hit_rate(Lru(), requests, 800)
        assert ours > 1.1 * lru, f"{ours:.3f} against {lru:.3f}"


def test_little_is_lost_to_lru_where_nothing_scans() -> None:
    for seed in (1, 2, 3):
        requests = [request for request in skewed_requests_with_scans(seed) if len(request) < 300]
        ours, lru = hit_rate(S3Fifo(), requests, 800), hit_rate(Lru(), requests, 800)
        assert ours > 0.97 * lru, f"{ours:.3f} against {lru:.3f}"


def test_a_long_cold_prompt_does_not_flush_the_hot_set() -> None:
    policy, lru, capacity = S3Fifo(), Lru(), 200
    hot = chain("hot", 60)
    for one in (policy, lru):
        for i in range(10):
            serve(one, hot, capacity)
            serve(one, chain(f"warm{i}", 30), capacity)
        serve(one, chain("cold", 10 * capacity), capacity)
    assert all(key in policy for key in hot)
    assert not any(key in lru for key in hot)
    assert policy.check() == []


def test_a_chain_entered_tail_first_leaves_tail_first() -> None:
    policy = S3Fifo()
    one, other = chain("one", 8), chain("other", 8)
    for key in [*reversed(one), *reversed(other)]:
        policy.insert(key)
    assert [policy.evict() for _ in range(12)] == [*reversed(one), *reversed(other[4:])]


def test_a_hot_chain_rotates_without_turning_round() -> None:
    policy = S3Fifo()
    hot = chain("hot", 6)
    for key in reversed(hot):
        policy.insert(key)
    for key in hot:
        policy.touch(key)
    assert [policy.evict() for _ in hot] == [*reversed(hot)]


def test_what_comes_back_soon_after_it_left_stays_through_the_next_scan() -> None:
    policy = S3Fifo()
    for key in chain("first", 20):
        policy.insert(key)
    assert policy.evict() == b"first/0"
    policy.insert(b"first/0")
    for key in chain("scan", 100):
        policy.insert(key)
        policy.evict()
    assert b"first/0" in policy


def test_what_was_removed_is_not_remembered() -> None:
    policy = S3Fifo()
    for key in chain("first", 20):
        policy.insert(key)
    policy.remove(b"first/0")
    policy.insert(b"first/0")
    for key in chain("scan", 100):
        policy.insert(key)
        policy.evict()
    assert b"first/0" not in policy


def test_nothing_held_nothing_evicted() -> None:
    policy = S3Fifo()
    policy.touch(b"unknown")
    assert policy.evict() is None
    assert len(policy) == 0


@given(st.lists(st.tuples(st.sampled_from(["insert", "touch", "remove", "evict"]), st.integers(0, 12)), max_size=200))
def test_it_holds_what_came_in_and_did_not_leave(steps: list[tuple[str, int]]) -> None:
    policy, held = S3Fifo(), set()
    for step, number in steps:
        key = bytes([number])
        match step:
            case "insert" if key not in held:
                policy.insert(key)
                held.add(key)
            case "remove" if key in held:
                policy.remove(key)
                held.remove(key)
            case "touch":
                policy.touch(key)
            case "evict":
                victim = policy.evict()
                assert (victim is None) == (not held)
                held.discard(victim or b"")
        assert len(policy) == len(held)
        assert all((bytes([i]) in policy) == (bytes([i]) in held) for i in range(13))
        assert policy.check() == []
