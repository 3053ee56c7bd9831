"""The node's memory of what the directory said: short, bounded, only places. Method: time is an argument."""

from __future__ import annotations

import pytest

from kvshare import answers
from kvshare.answers import ANSWER_SECONDS, Answers
from kvshare.places import Location

HERE, THERE = [Location("a", 1, 2, 4, 8)], [Location("b", 1, 2, 4, 8)]


def test_an_answer_is_given_again_for_a_while_and_then_forgotten() -> None:
    known = Answers()
    known.put([b"x", b"y"], [HERE, []], 100.0)
    assert known.get([b"x", b"y", b"z"], 100.5) == [HERE, [], []]
    assert known.used == 1 and len(known) == 1, "that a key is nowhere is not kept"
    assert known.get([b"x"], 100.0 + ANSWER_SECONDS) == [HERE]
    assert known.get([b"x"], 100.0 + 2 * ANSWER_SECONDS) == [[]]


def test_nobody_is_told_what_lay_unasked_for_long() -> None:
    known = Answers()
    known.put([b"x"], [HERE], 100.0)
    assert known.get([b"x"], 200.0) == [[]]


def test_the_newest_answer_counts_and_a_wrong_one_is_dropped() -> None:
    known = Answers()
    known.put([b"x"], [HERE], 100.0)
    known.put([b"x"], [THERE], 100.0 + ANSWER_SECONDS)
    assert known.get([b"x"], 100.0 + ANSWER_SECONDS) == [THERE]
    known.drop([b"x", b"unknown"])
    assert known.get([b"x"], 100.0 + ANSWER_SECONDS) == [[]], "the older answer must not come back"
    known.put([b"x"], [HERE], 100.0 + ANSWER_SECONDS)
    known.clear()
    assert len(known) == 0


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ANSWERS_MAX", 10)
    known = Answers()
    for number in range(100):
        known.put([bytes([number])], [HERE], 100.0)
    assert len(known) <= 20
    assert known.get([bytes([99])], 100.0) == [HERE]
