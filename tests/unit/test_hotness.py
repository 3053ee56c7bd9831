"""What is hot. Goal: the ranking is right, prefix-closed whatever happens, and bounded; method: small cases, and properties
with plain counting as the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare import keys
from kvshare.hotness import NO_PARENT, Hotness
from kvshare.runs import Seen, keys_of

FAMILY, OTHER = b"f" * keys.FAMILY_BYTES, b"o" * keys.FAMILY_BYTES
HASH_BYTES = 16


def chain(
    name: str,
    length: int | None = None,
    family: bytes = FAMILY,
    variant: bytes = keys.NO_VARIANT,
    tenant: bytes = keys.NO_TENANT,
) -> list[bytes]:
    """A chain whose keys name its tokens up to each block, as real hashes do: "ab" shares its head with "ac"."""
    length = len(name) if length is None else length
    names = [name[: depth + 1].encode().ljust(depth + 1, b".").ljust(HASH_BYTES, b"_") for depth in range(length)]
    return [keys.prefix(family, variant, tenant=tenant) + each for each in names]


def seen(chain: Sequence[bytes], depths: Sequence[int] = ()) -> Seen:
    (packed,) = keys_of(chain)
    return Seen(packed, np.array(depths, "<u4").tobytes() if depths else b"")


def ranking(hotness: Hotness, family: bytes = FAMILY, keys_max: int = 1000) -> list[bytes]:
    return [hot.key for hot in hotness.hottest(family, keys_max)]


def test_what_was_looked_up_more_often_ranks_first() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(seen(chain("a")), 0.0)
    hotness.touch(seen(chain("b")), 0.0)
    hotness.touch(seen(chain("b")), 0.0)
    assert ranking(hotness) == chain("b") + chain("a")
    assert not hotness.check()


def test_a_tenants_own_come_before_what_is_hotter() -> None:
    """Its engines can use nothing else, but for requests that name others."""
    hotness, tags = Hotness(600.0, 100), [keys.tenant_tag(name) for name in ("acme", "other")]
    acme, other, nobodys = chain("ab", tenant=tags[0]), chain("cd", tenant=tags[1]), chain("ef")
    for times, each in ((1, acme), (2, other), (3, nobodys)):
        for _ in range(times):
            hotness.touch(seen(each), 0.0)
    for tag, wanted in ((tags[0], acme + nobodys + other), (keys.NO_TENANT, nobodys + other + acme)):
        for count in range(7):
            assert [hot.key for hot in hotness.hottest(FAMILY, count, tag)] == wanted[:count]


def test_at_equal_heat_heads_rank_before_what_follows_them() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(seen(chain("abc")), 0.0)
    hotness.touch(seen(chain("xyz")), 0.0)
    assert sorted(ranking(hotness)[:2]) == [chain("a")[0], chain("x")[0]]
    assert sorted(ranking(hotness)[2:4]) == [chain("ab")[1], chain("xy")[1]]
    assert sorted(ranking(hotness)[4:]) == [chain("abc")[2], chain("xyz")[2]]


def test_what_several_chains_have_in_common_is_counted_for_each() -> None:
    hotness = Hotness(600.0, 100)
    for name in ("abcd", "abxy", "ab", "abcz"):
        hotness.touch(seen(chain(name)), 0.0)
    assert ranking(hotness)[:3] == chain("abc"), "four, four, two"
    assert len(hotness) == 7
    assert not hotness.check()


def test_each_block_names_the_one_before_it() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(seen(chain("abcd")), 0.0)
    hotness.touch(seen(chain("abxy")), 1.0)
    parents = {hot.key: hot.parent for hot in hotness.hottest(FAMILY, 100)}
    for name in ("abcd", "abxy"):
        assert [parents[key] for key in chain(name)] == [NO_PARENT, *chain(name)[:-1]]


def test_a_new_lookup_outranks_three_of_two_half_lives_ago_but_not_five() -> None:
    hotness = Hotness(600.0, 100)
    for _ in range(3):
        hotness.touch(seen(chain("a")), 0.0)
    for _ in range(5):
        hotness.touch(seen(chain("c")), 0.0)
    hotness.touch(seen(chain("b")), 1200.0)
    assert ranking(hotness) == chain("c") + chain("b") + chain("a")


def test_weight_counts_as_so_many_lookups() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(seen(chain("a")), 0.0, weight=3.0)
    hotness.touch(seen(chain("b")), 0.0)
    hotness.touch(seen(chain("b")), 0.0)
    assert ranking(hotness) == chain("a") + chain("b")


@pytest.mark.parametrize("start", [0.0, -1e6, 1e9])
def test_thousands_of_half_lives_and_a_clock_that_jumps_keep_the_order(start: float) -> None:
    hotness = Hotness(1.0, 100)
    names = "abcdefgh"
    for i, name in enumerate(names):
        hotness.touch(seen(chain(name, 2)), start + 4000.0 * i)
    hotness.touch(seen(chain("q")), start - 5000.0)  # the clock went back
    assert ranking(hotness)[-1:] == chain("q")
    assert ranking(hotness)[:2] == chain("h", 2)
    assert len(ranking(hotness)) == 17
    assert not hotness.check()


def test_families_do_not_mix_and_variants_of_one_do() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(seen(chain("a", 2)), 0.0)
    hotness.touch(seen(chain("a", 2, OTHER)), 0.0)
    assert ranking(hotness, OTHER) == chain("a", 2, OTHER)
    assert ranking(hotness, b"n" * keys.FAMILY_BYTES) == []
    assert hotness.knows(OTHER) and not hotness.knows(b"n" * keys.FAMILY_BYTES)
    salted = chain("a", 2, variant=b"salted..")
    hotness.touch(seen(salted), 1.0)
    assert ranking(hotness) == salted + chain("a", 2)


def test_of_given_keys_those_that_are_known_come_hottest_first() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(seen(chain("ab")), 0.0)
    hotness.touch(seen(chain("xy", None, OTHER)), 100.0)
    wanted = {*chain("abc")[1:], *chain("x", None, OTHER)}
    assert hotness.hottest_of(wanted) == chain("x", None, OTHER) + chain("ab")[1:]
    assert hotness.hottest_of(set()) == []


def test_a_shard_knows_of_each_chain_what_belongs_to_it() -> None:
    """Each other block, as a shard of two might get them."""
    hotness = Hotness(600.0, 100)
    first, second = chain("abcdef"), chain("abcdxy")
    hotness.touch(seen(first[1::2], [1, 3, 5]), 0.0)
    hotness.touch(seen(second[1::2], [1, 3, 5]), 0.0)
    hotness.touch(seen(chain("p")), 0.0)
    ranked = hotness.hottest(FAMILY, 100)
    assert [hot.key for hot in ranked[:2]] == [first[1], first[3]]
    assert ranked[0].parent == NO_PARENT and ranked[1].parent == first[1]
    assert [hot.key for hot in ranked[2:3]] == chain("p"), "less deep than what is as hot"
    assert {hot.parent for hot in ranked[3:]} == {first[3]}
    assert not hotness.check()


def test_depths_that_do_not_rise_end_a_chain() -> None:
    hotness = Hotness(600.0, 100)
    hotness.touch(seen(chain("abcd"), [0, 1, 1, 2]), 0.0)
    assert ranking(hotness) == chain("ab")
    hotness.touch(seen(chain("abxy"), [0, 1, 1, 2]), 0.0)
    hotness.touch(seen([*chain("ab"), *chain("xy")], [0, 4, 1, 2]), 0.0)
    assert ranking(hotness) == chain("ab"), "whoever looks them up elsewhere is not believed"
    assert not hotness.check()


def test_a_chain_that_has_a_block_twice_is_no_chain_but_does_no_harm() -> None:
    hotness = Hotness(600.0, 100)
    first, second = chain("ab")
    hotness.touch(seen([first, second, first]), 0.0)
    hotness.touch(seen([second, first]), 0.0)
    assert set(ranking(hotness)) == {first, second}
    assert not hotness.check()


def test_over_the_limit_the_coldest_go_ends_of_chains_first() -> None:
    hotness = Hotness(600.0, 16)
    for _ in range(3):
        hotness.touch(seen(chain("hot.....")), 0.0)
    hotness.touch(seen(chain("cold........")), 0.0)
    assert ranking(hotness) == chain("hot.....") + chain("cold....")
    hotness.touch(seen(chain("new")), 600.0)
    assert ranking(hotness) == chain("hot.....") + chain("new") + chain("cold.")
    assert len(hotness) == 16
    assert not hotness.check()


def test_where_chains_part_both_ends_go_before_what_they_have_in_common() -> None:
    hotness = Hotness(600.0, 8)
    for name in ("abcdef", "abcxyz", "pq"):
        hotness.touch(seen(chain(name)), 0.0)
    assert set(chain("abc")) < set(ranking(hotness))
    hotness.touch(seen(chain("lmnopqr")), 1.0, weight=3.0)
    assert ranking(hotness) == chain("lmnopqr") + chain("a"), "its end has become the end of a chain"
    assert not hotness.check()


def test_a_chain_longer_than_the_limit_keeps_its_head() -> None:
    hotness = Hotness(600.0, 10)
    long = chain("x" * HASH_BYTES)
    hotness.touch(seen(long), 0.0)
    hotness.touch(seen(long), 0.0)
    assert ranking(hotness) == long[:10]
    assert not hotness.check()


def test_a_family_that_cools_out_leaves_nothing() -> None:
    hotness = Hotness(1.0, 8)
    hotness.touch(seen(chain("a", 2, OTHER)), 0.0)
    hotness.touch(seen(chain("abcdefgh")), 100.0)
    assert ranking(hotness, OTHER) == [] and not hotness.knows(OTHER)
    assert not hotness.check()


NAMES = st.text("ab", min_size=1, max_size=7)


@given(st.lists(st.tuples(NAMES, st.floats(0.0, 400.0), st.sampled_from([FAMILY, OTHER])), max_size=60), st.integers(1, 40))
def test_every_beginning_of_the_ranking_is_closed_whatever_was_reported(
    touches: list[tuple[str, float, bytes]], keys_max: int
) -> None:
    hotness = Hotness(1.0, keys_max)
    now = 0.0
    for name, step, family in touches:
        now += step
        hotness.touch(seen(chain(name, None, family)), now)
        assert not hotness.check()
    assert len(hotness) <= keys_max
    for family in (FAMILY, OTHER):
        known = {NO_PARENT}
        for hot in hotness.hottest(family, keys_max):
            assert hot.parent in known
            known.add(hot.key)


@given(st.lists(st.tuples(NAMES, st.integers(0, 40)), min_size=1, max_size=40), st.integers(1, 80))
def test_the_ranking_is_that_of_plain_counting(touches: list[tuple[str, int]], keys_max: int) -> None:
    """Whole seconds at a half-life of 8 s: sums that are equal differ by rounding at most."""
    hotness = Hotness(8.0, 1000)
    counts: dict[bytes, float] = {}
    for name, now in touches:
        hotness.touch(seen(chain(name)), now)
        for key in chain(name):
            counts[key] = counts.get(key, 0.0) + 2.0 ** (now / 8.0)
    ranked = ranking(hotness, keys_max=keys_max)
    assert len(ranked) == len(set(ranked)) == min(keys_max, len(counts))
    assert len(hotness) == len(counts)
    assert [counts[key] for key in ranked] == pytest.approx(sorted(counts.values(), reverse=True)[: len(ranked)])
    assert [counts[key] for key in hotness.hottest_of(counts)] == pytest.approx(sorted(counts.values(), reverse=True))
