"""Threads that are made as needed, reused, and gone after close."""

from __future__ import annotations

import threading

import pytest

from kvshare.transport.workers import Workers


def test_tasks_run_at_once_up_to_the_limit_and_all_of_them_run() -> None:
    workers, meeting, done = Workers("w", 3), threading.Barrier(3), []
    for number in range(9):
        workers.submit(lambda number=number: (meeting.wait(10), done.append(number)))  # type: ignore[misc]
    workers.close()
    assert sorted(done) == list(range(9))


def test_threads_are_reused_by_tasks_that_do_not_overlap() -> None:
    before = set(threading.enumerate())
    workers, names = Workers("w", 1000), set()
    for _ in range(200):
        ran = threading.Event()
        workers.submit(lambda ran=ran: (names.add(threading.current_thread().name), ran.set()))  # type: ignore[misc]
        assert ran.wait(10)
    workers.close()
    assert len(names) < 200
    assert set(threading.enumerate()) == before


def test_close_does_what_was_submitted_and_drops_what_comes_later() -> None:
    workers, done = Workers("w", 1), []
    for number in range(5):
        workers.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    workers.close()
    workers.close()
    workers.submit(lambda: done.append(99))
    assert done == list(range(5))


def test_a_task_that_fails_is_told_and_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    workers, done = Workers("w", 1), []
    workers.submit(lambda: 1 // 0)  # type: ignore[arg-type]
    workers.submit(lambda: done.append(1))
    workers.close()
    assert done == [1]
    assert "ZeroDivisionError" in caplog.text
