"""What is hot. Goal: the ranking is right, prefix-closed whatever happens, and bounded; method: small cases and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare import keys
from kvshare.hotness import NO_PARENT, Hotness

FAMILY, OTHER = b"f" * keys.FAMILY_BYTES, b"o" * keys.FAMILY_BYTES


def chain(name: str, length: int, family: bytes = FAMILY) -> list[bytes]:
    """A chain whose keys name its tokens up to each block, as real hashes do: "ab" shares its head with "ac"."""
    return [keys.prefix(family) + name[: depth + 1].encode().ljust(depth + 1, b".") for depth in range(length)]


def ranking(hotness: Hotness, family: bytes = FAMILY, keys_max: int = 1000) -> list[bytes]:
    return [hot.key for hot in hotness.hottest(family, keys_max)]


def test_what_was_looked_up_more_often_ranks_first() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(chain("a", 1), 0.0)
    hotness.touch(chain("b", 1), 0.0)
    hotness.touch(chain("b", 1), 0.0)
    assert ranking(hotness) == chain("b", 1) + chain("a", 1)
    assert not hotness.check()


def test_at_equal_heat_heads_rank_before_what_follows_them() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(chain("abc", 3), 0.0)
    hotness.touch(chain("xyz", 3), 0.0)
    depths = [len(keys.hash_of(key)) for key in ranking(hotness)]
    assert depths == [1, 1, 2, 2, 3, 3]


def test_a_lookup_counts_half_after_a_half_life() -> None:
    hotness = Hotness(600.0, 100)
    (key,) = chain("a", 1)
    hotness.touch([key], 1000.0)
    assert hotness.count(key, 1000.0) == pytest.approx(1.0)
    assert hotness.count(key, 1600.0) == pytest.approx(0.5)
    assert hotness.count(keys.prefix(FAMILY) + b"unknown", 1600.0) == 0.0


def test_a_new_lookup_outranks_three_of_two_half_lives_ago() -> None:
    hotness = Hotness(600.0, 100)
    for _ in range(3):
        hotness.touch(chain("a", 1), 0.0)
    hotness.touch(chain("b", 1), 1200.0)
    assert ranking(hotness) == chain("b", 1) + chain("a", 1)


def test_thousands_of_half_lives_keep_order_and_counts() -> None:
    """The landmark moves several times; what is older than a double can tell stays, as the coldest."""
    hotness = Hotness(1.0, 100)
    names = "abcdefgh"
    for i, name in enumerate(names):
        hotness.touch(chain(name, 2), 400.0 * i)
    hotness.touch(chain("z", 1), 400.0 * (len(names) - 1) + 1)
    assert ranking(hotness)[0] == chain("z", 1)[0]
    assert ranking(hotness)[1:4] == [*chain("h", 2), chain("g", 2)[0]]
    assert hotness.count(chain("h", 1)[0], 400.0 * (len(names) - 1)) == pytest.approx(1.0)
    assert len(ranking(hotness)) == 17
    assert not hotness.check()


def test_families_do_not_mix() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(chain("a", 2), 0.0)
    hotness.touch(chain("a", 2, OTHER), 0.0)
    assert ranking(hotness, OTHER) == chain("a", 2, OTHER)
    assert ranking(hotness, b"n" * keys.FAMILY_BYTES) == []


def test_a_chain_is_counted_up_to_where_it_contradicts_itself() -> None:
    hotness = Hotness(600.0, 100)
    first, second = chain("ab", 2)
    hotness.touch([first, second], 0.0)
    hotness.touch([second, first], 0.0)  # second is known as no head
    hotness.touch([first, *chain("ab", 2, OTHER)], 0.0)  # another family's keys cannot follow
    hotness.touch([], 0.0)
    assert hotness.count(first, 0.0) == 2.0 and hotness.count(second, 0.0) == 1.0
    assert len(hotness) == 2
    assert not hotness.check()


def test_over_the_limit_the_coldest_go_ends_of_chains_first() -> None:
    hotness = Hotness(600.0, 16)
    for _ in range(3):
        hotness.touch(chain("hot.....", 8), 0.0)
    hotness.touch(chain("cold.........", 12), 0.0)
    kept = ranking(hotness)
    assert kept == chain("hot.....", 8) + chain("cold.........", 12)[:6]
    assert len(hotness) == 14
    assert not hotness.check()


def test_a_chain_longer_than_the_limit_keeps_its_head() -> None:
    hotness = Hotness(600.0, 10)
    long = chain("x" * 50, 50)
    hotness.touch(long, 0.0)
    hotness.touch(long, 0.0)
    assert ranking(hotness) == long[: len(hotness)]
    assert not hotness.check()


def test_a_family_that_cools_out_leaves_nothing() -> None:
    hotness = Hotness(1.0, 8)
    hotness.touch(chain("a", 2, OTHER), 0.0)
    hotness.touch(chain("abcdefgh", 8), 100.0)
    assert ranking(hotness, OTHER) == []
    assert not hotness.check()


@given(
    st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=7), st.floats(0.0, 400.0), st.sampled_from([FAMILY, OTHER])), max_size=60
    ),
    st.integers(1, 40),
)
def test_every_beginning_of_the_ranking_is_closed_whatever_was_reported(
    touches: list[tuple[str, float, bytes]], keys_max: int
) -> None:
    hotness = Hotness(1.0, keys_max)
    now = 0.0
    for name, step, family in touches:
        now += step
        hotness.touch(chain(name, len(name), family), now)
    assert not hotness.check()
    assert len(hotness) <= keys_max
    for family in (FAMILY, OTHER):
        seen = {NO_PARENT}
        for hot in hotness.hottest(family, keys_max):
            assert hot.parent in seen
            seen.add(hot.key)
