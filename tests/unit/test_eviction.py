"""Which block leaves first: S3-FIFO against a plain LRU, on seeded workloads of requests with shared prefixes and scans."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvshare.eviction import EXPECTED_MIN, S3Fifo

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

    def follow(self, keys: Sequence[bytes]) -> None:
        """Knows nothing of chains."""

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
    policy.follow(request)
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


def sessions_with_a_scan(seed: int) -> list[list[bytes]]:
    """Conversations under one system prompt, each turn longer than the last; amid them a scan of cold prompts."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    system = chain("system", 20)
    turns = [(i, turn) for i in range(300) for turn in range(1, rng.randint(2, 6))]
    order = sorted(turns, key=lambda one: one[0] + 6 * one[1] + rng.random())
    requests = [system + chain(f"session{i}", 8 * turn) for i, turn in order]
    middle = len(requests) // 2
    return [*requests[:middle], *(chain(f"cold{i}", 200) for i in range(20)), *requests[middle:]]


def test_sessions_go_on_and_the_system_prompt_stays_through_a_scan() -> None:
    for seed in (1, 2, 3):
        requests, policy, lru, capacity = sessions_with_a_scan(seed), S3Fifo(), Lru(), 1000
        scan = next(i for i, request in enumerate(requests) if request[0].startswith(b"cold"))
        for one in (policy, lru):
            for request in requests[: scan + 20]:
                serve(one, request, capacity)
        assert all(key in policy for key in chain("system", 20))
        assert not any(key in lru for key in chain("system", 20))
        assert hit_rate(policy, requests[scan + 20 :], capacity) > hit_rate(lru, requests[scan + 20 :], capacity)
        assert policy.check() == []


def test_no_block_leaves_before_those_after_it_whatever_is_asked_for() -> None:
    """Random walks in a forest of prompts, saved in random order, some used often. Of what it was told nothing is torn."""
    for seed in range(5):
        print(f"seed {seed}")
        rng = random.Random(seed)
        policy, parents, held = S3Fifo(), dict[bytes, bytes](), set[bytes]()
        for _ in range(600):
            request = [b"root"]
            for _ in range(rng.randint(1, 30)):
                request.append(request[-1] + bytes([rng.choices((0, 1, 2), (8, 1, 1))[0]]))
            parents.update((key, parent) for parent, key in pairwise(request))
            policy.follow(request)
            for key in request:
                policy.touch(key)
            for key in sorted(set(request) - held, key=lambda _: rng.random()):
                if len(policy) >= 100:
                    victim = policy.evict()
                    assert victim is not None
                    held.remove(victim)
                    assert not [child for child in held if parents.get(child) == victim]
                policy.insert(key)
                held.add(key)
        assert policy.check() == []


def test_a_chain_that_was_told_leaves_tail_first_even_if_it_came_head_first() -> None:
    policy, one = S3Fifo(), chain("one", 8)
    policy.follow(one)
    for key in one:
        policy.insert(key)
    assert [policy.evict() for _ in one] == [*reversed(one)]
    assert policy.check() == []


def test_the_end_of_a_chain_leaves_even_from_the_main_queue() -> None:
    policy, one = S3Fifo(), chain("one", 4)
    policy.follow(one)
    for key in one:
        policy.insert(key)
    policy.touch(one[3])  # a lie: whoever asks for the end asks for all
    policy.insert(b"other")
    assert [policy.evict() for _ in range(5)] == [*reversed(one), b"other"]


def test_a_parent_that_comes_later_or_again_finds_its_children() -> None:
    policy, one = S3Fifo(), chain("one", 3)
    policy.follow(one)
    policy.insert(one[2])
    policy.insert(one[1])
    policy.insert(one[0])
    policy.remove(one[1])
    policy.insert(one[1])
    policy.follow(one)
    assert [policy.evict() for _ in one] == [one[2], one[1], one[0]]
    assert policy.check() == []


def test_told_that_keys_follow_each_other_in_a_circle_it_evicts_all_the_same() -> None:
    for lie in ([b"a", b"b", b"c", b"a"], [b"a", b"a"]):
        policy = S3Fifo()
        for key in (b"a", b"b", b"c"):
            policy.insert(key)
        policy.follow(lie)
        assert {policy.evict() for _ in range(3)} == {b"a", b"b", b"c"}
        assert policy.check() == []


def test_what_is_told_of_keys_that_never_come_is_forgotten() -> None:
    policy = S3Fifo()
    one = chain("one", 2)
    policy.follow(one)
    policy.follow(chain("never", EXPECTED_MIN + 1))
    for key in one:
        policy.insert(key)
    assert policy.evict() == one[0]  # in the order of their coming: that one follows the other is not known any more


def test_a_long_chain_leaves_in_steps_that_do_not_grow_with_it() -> None:
    """Each end that leaves is found from where the last one was. Counted are the keys that any table is asked for."""
    looks = 0

    class Key(bytes):
        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            return super().__hash__()

    for blocks in (100, 3000):
        policy, one = S3Fifo(), [Key(key) for key in chain("one", blocks)]
        policy.follow(one)
        for key in one:
            policy.insert(key)
        looks = 0
        assert [policy.evict() for _ in one] == [*reversed(one)]
        assert looks < 40 * blocks


def test_nothing_held_nothing_evicted() -> None:
    policy = S3Fifo()
    policy.touch(b"unknown")
    assert policy.evict() is None
    assert len(policy) == 0


@given(st.lists(st.tuples(st.sampled_from(["insert", "touch", "remove", "evict", "follow"]), st.integers(0, 12)), max_size=200))
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
            case "follow":
                policy.follow([bytes([i]) for i in range(number % 3, number, 1 + number % 2)])
            case "evict":
                victim = policy.evict()
                assert (victim is None) == (not held)
                held.discard(victim or b"")
        assert len(policy) == len(held)
        assert all((bytes([i]) in policy) == (bytes([i]) in held) for i in range(13))
        assert policy.check() == []
