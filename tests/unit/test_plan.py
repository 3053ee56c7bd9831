"""The warm plan. Goal: within bytes and seconds, closed, spread over donors; method: the pure function on small cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvshare.hotness import NO_PARENT, HotKey
from kvshare.places import Location
from kvshare.plan import DONOR_BYTES_PER_SECOND, WarmPlan, plan_group, plan_warm

LENGTH = 100


def ranked(*chains: str) -> list[HotKey]:
    """Each chain's blocks in order, chains one after another: "ab" is block "a" and then block "ab"."""
    known: dict[str, HotKey] = {}
    for name in chains:
        for end in range(1, len(name) + 1):
            parent = name[: end - 1].encode() if end > 1 else NO_PARENT
            known.setdefault(name[:end], HotKey(name[:end].encode(), parent))
    return list(known.values())


def place(node: str, length: int = LENGTH) -> Location:
    return Location(node, length, 0, 2, length)


def plan(
    hot: list[HotKey],
    held: Mapping[str, str],
    own: str = "",
    dead: str = "",
    bytes_max: int = 10**6,
    seconds_max: float = 1e6,
    busy: Mapping[str, float] | None = None,
    rates: Mapping[str, float] | None = None,
) -> WarmPlan:
    """A block takes a second. ``held``: key -> one letter per donor. ``own``: keys, parted by commas, of the asking node."""
    mine = set(own.encode().split(b","))
    return plan_warm(
        hot,
        lambda key: key in mine,
        lambda key: [place(node) for node in held.get(key.decode(), "")],
        lambda node: node not in dead,
        bytes_max,
        seconds_max,
        busy,
        dict.fromkeys("XYZ", float(LENGTH)) if rates is None else rates,
    )


def keys_of(made: WarmPlan) -> list[str]:
    return [item.key.decode() for item in made.items]


def test_a_plan_names_what_the_node_lacks_and_counts_what_it_has() -> None:
    made = plan(ranked("abc"), {"a": "X", "ab": "X", "abc": "X"}, own="a")
    assert keys_of(made) == ["ab", "abc"]
    assert made.present == 1


def test_work_is_spread_evenly_over_the_donors_of_a_block() -> None:
    made = plan(ranked("abcdef"), {"abcdef"[: i + 1]: "XYZ" for i in range(6)})
    assert Counter(item.location.node for item in made.items) == {"X": 2, "Y": 2, "Z": 2}
    assert made.seconds == {"X": 2.0, "Y": 2.0, "Z": 2.0}


def test_donors_that_other_plans_keep_busy_are_spared() -> None:
    made = plan(ranked("abc"), {"a": "XY", "ab": "XY", "abc": "XY"}, busy={"X": 10.0})
    assert {item.location.node for item in made.items} == {"Y"}


def test_work_is_spread_in_proportion_to_what_donors_can_give() -> None:
    held = {"abcdefghi"[: i + 1]: "XYZ" for i in range(9)}
    made = plan(ranked("abcdefghi"), held, rates={"X": 6.0 * LENGTH, "Y": 2.0 * LENGTH, "Z": 1.0 * LENGTH})
    assert Counter(item.location.node for item in made.items) == {"X": 6, "Y": 2, "Z": 1}
    assert all(abs(seconds - 1.0) < 1e-9 for seconds in made.seconds.values())


def test_a_donor_that_nobody_measured_counts_as_an_ordinary_one() -> None:
    held = {"abcd"[: i + 1]: "XY" for i in range(4)}
    made = plan(ranked("abcd"), held, rates={"X": DONOR_BYTES_PER_SECOND / 3})
    assert Counter(item.location.node for item in made.items) == {"X": 1, "Y": 3}


def test_a_slow_donor_is_given_no_more_than_it_can_give_in_time() -> None:
    held = {"abcd"[: i + 1]: "X" for i in range(4)}
    made = plan(ranked("abcd"), held, seconds_max=4.5, rates={"X": LENGTH / 2})
    assert keys_of(made) == ["a", "ab"] and made.seconds == {"X": 4.0}


def test_a_block_that_is_ranked_twice_is_given_once() -> None:
    assert keys_of(plan(ranked("ab") + ranked("ab"), {"a": "X", "ab": "X"})) == ["a", "ab"]
    assert plan(ranked("ab") + ranked("ab"), {"ab": "X"}, own="a").present == 1


def test_the_freshest_of_equal_donors_is_taken() -> None:
    assert plan(ranked("a"), {"a": "YX"}).items[0].location.node == "Y"


def test_a_plan_ends_before_the_block_that_would_take_it_over_its_bytes() -> None:
    held = {"abcd"[: i + 1]: "X" for i in range(4)}
    assert keys_of(plan(ranked("abcd"), held, bytes_max=2 * LENGTH)) == ["a", "ab"]
    assert keys_of(plan(ranked("abcd"), held, bytes_max=2 * LENGTH - 1)) == ["a"]
    assert keys_of(plan(ranked("abcd"), held, bytes_max=0)) == []


def test_no_donor_is_given_more_work_than_there_is_time() -> None:
    held = {"a": "X", "ab": "X", "abc": "X", "b": "XY"}
    made = plan(ranked("abc", "b"), held, seconds_max=2.0)
    assert keys_of(made) == ["a", "ab", "b"]
    assert made.seconds == {"X": 2.0, "Y": 1.0}


def test_a_block_after_one_that_nobody_can_give_is_of_no_use() -> None:
    made = plan(ranked("abc", "x"), {"a": "X", "abc": "X", "x": "X"})
    assert keys_of(made) == ["a", "x"]


def test_dead_and_unreachable_donors_give_nothing() -> None:
    made = plan(ranked("ab", "x"), {"a": "XY", "ab": "Y", "x": "X"}, dead="Y")
    assert [(item.key, item.location.node) for item in made.items] == [(b"a", "X"), (b"x", "X")]


@given(st.data())
def test_any_plan_is_closed_and_within_its_limits(data: st.DataObject) -> None:
    hot = ranked(*data.draw(st.lists(st.text("ab", min_size=1, max_size=6), max_size=8)))
    names = [key.key.decode() for key in hot]
    held = {name: data.draw(st.text("XYZ", max_size=3)) for name in names}
    own = {name for name in names if data.draw(st.booleans())}
    dead = data.draw(st.text("XYZ", max_size=2))
    bytes_max, seconds_max = data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 5))
    made = plan(hot, held, ",".join(own), dead, bytes_max, seconds_max)

    assert sum(item.location.length for item in made.items) <= bytes_max
    assert all(seconds <= seconds_max for seconds in made.seconds.values())
    assert not {item.location.node for item in made.items} & set(dead)
    assert not set(keys_of(made)) & own
    usable = own | {""}
    for name in keys_of(made):
        assert name[:-1] in usable
        usable.add(name)


# --- for several nodes at once ----------------------------------------------------------------------------------------------


def together(hot: list[HotKey], places: Mapping[str, list[Location]], *held: str, **limits: Any) -> WarmPlan:
    """``held``: keys, parted by commas, of each node."""
    sets = [set(keys.encode().split(b",")) for keys in held]
    limits = {"bytes_max": 10**6, "seconds_max": 1e6, **limits}
    return plan_group(hot, sets, lambda key: places.get(key.decode(), []), **limits)


def test_a_group_is_given_what_any_of_its_nodes_lacks() -> None:
    places = {"abc"[: i + 1]: [place("X")] for i in range(3)}
    made = together(ranked("abc"), places, "a,ab", "a")
    assert (keys_of(made), made.present) == (["ab", "abc"], 1)
    assert together(ranked("abc"), places, "a,ab,abc", "a,ab,abc").items == []


def test_a_group_is_given_blocks_of_one_region_and_length_by_the_donor_that_has_most() -> None:
    places = {"a": [place("X"), place("Y")], "ab": [place("Y"), place("X")], "b": [place("Y", 2 * LENGTH), place("X")]}
    made = together(ranked("ab", "b"), places, "", "")
    assert keys_of(made) == ["a", "ab", "b"]
    assert {(item.location.node, item.location.length) for item in made.items} == {("X", LENGTH)}
    places["b"] = [place("Y", 2 * LENGTH)]
    assert keys_of(together(ranked("ab", "b"), places, "", "")) == ["a", "ab"]


def test_of_equal_donors_of_a_group_the_one_that_is_less_busy_is_taken() -> None:
    places = {"a": [place("X"), place("Y")]}
    for busy, spared in (("X", "Y"), ("Y", "X")):
        assert together(ranked("a"), places, "", "", busy={busy: 1.0}).items[0].location.node == spared


def test_a_group_keeps_to_its_bytes_and_to_chains_and_may_be_empty() -> None:
    places = {"a": [place("X")], "ab": [place("X")], "cd": [place("X")]}
    assert keys_of(together(ranked("ab", "cd"), places, "", "", bytes_max=LENGTH)) == ["a"]
    assert keys_of(together(ranked("ab", "cd"), places, "", "")) == ["a", "ab"]  # nobody has "c"
    assert together(ranked("ab"), {}, "", "").items == []
