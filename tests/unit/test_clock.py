"""Deadlines come in order, on one thread, and not after close."""

from __future__ import annotations

import threading

import pytest

from kvshare.transport.clock import Clock


def test_actions_come_in_the_order_of_their_deadlines() -> None:
    clock, heard, done = Clock("clock"), [], threading.Event()
    clock.after(0.03, lambda: heard.append("later"))
    clock.after(0.01, lambda: heard.append("sooner"))
    clock.after(0.05, done.set)
    assert done.wait(10)
    assert heard == ["sooner", "later"]
    clock.close()


def test_an_action_that_fails_is_told_and_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    clock, done = Clock("clock"), threading.Event()
    clock.after(0, lambda: 1 // 0)  # type: ignore[arg-type]
    clock.after(0.01, done.set)
    assert done.wait(10)
    assert "ZeroDivisionError" in caplog.text
    clock.close()


def test_a_clock_without_deadlines_has_no_thread_and_a_closed_one_does_nothing() -> None:
    before = set(threading.enumerate())
    clock, heard = Clock("clock"), threading.Event()
    assert set(threading.enumerate()) == before
    clock.after(60, heard.set)
    assert set(threading.enumerate()) > before
    clock.close()
    clock.close()
    clock.after(0, heard.set)
    assert set(threading.enumerate()) == before
    assert not heard.is_set()
