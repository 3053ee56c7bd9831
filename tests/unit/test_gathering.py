"""Gathering joiners. Goal: nobody waits in vain or is answered twice; method: the pure state machine, cases and any story."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare.cluster_messages import AskPlan, Host, Hosted
from kvshare.gathering import HOSTED_SECONDS, Gatherings, Waiting
from kvshare.keys import NO_TENANT
from kvshare.places import GroupPlan, Location, WarmItem

RANKS, SECONDS = 3, 2.0
DONOR = 100
ITEMS = [WarmItem(b"key", Location("donor", 4096, 0, 2, 4096))]


def waiting(connection: int, ask: int = 1, family: bytes = b"f") -> Waiting:
    return Waiting(connection, AskPlan(ask, family, NO_TENANT, 10, 10.0, True, {}))


def answer(host: Host, **changes: Any) -> Hosted:
    return Hosted(host.ask, GroupPlan(**{"group": bytes(16), "endpoint": "h:1", "ranks": host.ranks, **changes}))


@pytest.fixture
def gatherings() -> Gatherings:
    return Gatherings(RANKS, SECONDS)


def hosting(gatherings: Gatherings, now: float = 10.0) -> Host:
    """A donor has been asked for connections 1, 2 and 3."""
    assert gatherings.come(waiting(1), now) == []
    assert gatherings.come(waiting(2), now) == []
    joiners = gatherings.come(waiting(3), now)
    return gatherings.host(DONOR, joiners, ITEMS, 7, now)


def test_enough_joiners_make_a_group_in_which_each_has_a_rank(gatherings: Gatherings) -> None:
    host = hosting(gatherings)
    assert (host.ranks, host.items) == (4, ITEMS)
    plans, left_over = gatherings.hosted(DONOR, answer(host))
    assert left_over == []
    assert [connection for connection, _ in plans] == [1, 2, 3]
    assert [plan.group.rank for _, plan in plans if plan.group] == [1, 2, 3]
    assert all((plan.ask, plan.items, plan.present) == (1, ITEMS, 7) for _, plan in plans)
    assert list(gatherings.deadlines()) == [] and gatherings.connections() == set()


def test_too_few_in_time_get_plans_of_their_own(gatherings: Gatherings) -> None:
    assert gatherings.come(waiting(1), 10.0) == gatherings.come(waiting(2), 11.5) == []
    assert list(gatherings.deadlines()) == [12.0]  # from the first one's coming
    assert gatherings.overdue(11.9) == []
    assert gatherings.overdue(12.0) == [waiting(1), waiting(2)]
    assert list(gatherings.deadlines()) == []
    assert gatherings.come(waiting(3), 12.5) == []  # begins anew
    assert list(gatherings.deadlines()) == [14.5]


def test_families_are_gathered_apart(gatherings: Gatherings) -> None:
    for family in (b"f", b"g"):
        assert gatherings.come(waiting(1, family=family), 10.0) == gatherings.come(waiting(2, family=family), 10.0) == []
    assert gatherings.come(waiting(3, family=b"g"), 10.0) == [waiting(each, family=b"g") for each in (1, 2, 3)]
    assert gatherings.overdue(12.0) == [waiting(1), waiting(2)]


def test_a_joiner_that_asks_again_counts_once_and_is_answered_its_last_question(gatherings: Gatherings) -> None:
    for ask in (1, 2, 3):
        assert gatherings.come(waiting(1, ask), 10.0) == []
    assert gatherings.overdue(12.0) == [waiting(1, 3)]


@pytest.mark.parametrize(
    "told",
    [lambda host: Hosted(host.ask, None), lambda host: answer(host, ranks=host.ranks + 1)],
    ids=["refusal", "another size"],
)
def test_a_donor_that_does_not_host_leaves_all_over(gatherings: Gatherings, told: Any) -> None:
    host = hosting(gatherings)
    assert gatherings.hosted(DONOR, told(host)) == ([], [waiting(1), waiting(2), waiting(3)])
    assert list(gatherings.deadlines()) == []


def test_a_silent_donor_leaves_all_overdue_and_its_late_answer_is_ignored(gatherings: Gatherings) -> None:
    host = hosting(gatherings, now=10.0)
    assert list(gatherings.deadlines()) == [10.0 + HOSTED_SECONDS]
    assert gatherings.overdue(10.0 + HOSTED_SECONDS) == [waiting(1), waiting(2), waiting(3)]
    assert gatherings.hosted(DONOR, answer(host)) == ([], [])


def test_only_the_donor_can_answer(gatherings: Gatherings) -> None:
    host = hosting(gatherings)
    assert gatherings.hosted(1, answer(host)) == ([], [])
    assert len(gatherings.hosted(DONOR, answer(host))[0]) == 3


@pytest.mark.parametrize("gone", [DONOR, 2])
def test_a_loss_in_a_group_that_is_not_made_yet_leaves_the_others_overdue_at_once(gatherings: Gatherings, gone: int) -> None:
    hosting(gatherings, now=10.0)
    gatherings.leave(gone)
    assert min(gatherings.deadlines()) <= 10.0
    assert gatherings.overdue(10.0) == [waiting(each) for each in (1, 2, 3) if each != gone]


def test_a_donor_that_answers_after_a_loss_makes_no_group(gatherings: Gatherings) -> None:
    host = hosting(gatherings)
    gatherings.leave(2)
    smaller = answer(host, ranks=3)  # the number of those who are left
    assert gatherings.hosted(DONOR, smaller) == ([], [waiting(1), waiting(3)])


def test_a_joiner_that_is_lost_while_it_waits_does_not_count(gatherings: Gatherings) -> None:
    assert gatherings.come(waiting(1), 10.0) == gatherings.come(waiting(2), 10.0) == []
    gatherings.leave(1)
    assert gatherings.come(waiting(3), 10.0) == []
    gatherings.leave(2)
    gatherings.leave(3)
    assert list(gatherings.deadlines()) == []


STORIES = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(1, 6), st.sampled_from([b"f", b"g"])),
        st.tuples(st.just("leave"), st.sampled_from([1, 2, 3, 4, 5, 6, DONOR]), st.none()),
        st.tuples(st.just("answer"), st.booleans(), st.none()),
        st.tuples(st.just("pass"), st.sampled_from([0.3, 1.0, 2.0]), st.none()),
    ),
    max_size=40,
)


@given(STORIES)
def test_in_any_story_each_question_is_answered_at_most_once_and_none_is_forgotten(story: list[tuple[str, Any, Any]]) -> None:
    gatherings, now, ask = Gatherings(RANKS, SECONDS), 10.0, 0
    open_questions: dict[tuple[int, int], bytes] = {}  # (connection, ask) -> family
    asked: list[Host] = []

    def answered(connection: int, number: int) -> None:
        del open_questions[(connection, number)]

    def settle(given: list[Waiting]) -> None:
        for each in given:
            answered(each.connection, each.ask.ask)

    for what, value, family in story:
        if what == "come":
            ask += 1
            if value in gatherings.connections():
                continue  # a node has one plan of a family under way
            open_questions[(value, ask)] = family
            joiners = gatherings.come(waiting(value, ask, family), now)
            if joiners:
                assert len(joiners) == RANKS == len({each.connection for each in joiners})
                assert {open_questions[(each.connection, each.ask.ask)] for each in joiners} == {family}
                asked.append(gatherings.host(DONOR, joiners, ITEMS, 0, now))
        elif what == "leave":
            gatherings.leave(value)
            open_questions = {key: told for key, told in open_questions.items() if key[0] != value}
        elif what == "answer" and asked:
            host = asked.pop()
            plans, left_over = gatherings.hosted(DONOR, answer(host) if value else Hosted(host.ask, None))
            assert not plans or (value and [plan.group.rank for _, plan in plans if plan.group] == [1, 2, 3])
            for connection, plan in plans:
                answered(connection, plan.ask)
            settle(left_over)
        elif what == "pass":
            now += value
            settle(gatherings.overdue(now))
        assert {connection for connection, _ in open_questions} == gatherings.connections()
        assert list(gatherings.deadlines()) or not open_questions
    settle(gatherings.overdue(now + SECONDS + HOSTED_SECONDS))
    assert open_questions == {}
    assert list(gatherings.deadlines()) == []
