"""Work that may not end: whoever waits is let go, nobody else is held up, and what comes back is taken back."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from kvshare.blocking import Blocking
from kvshare.errors import Unavailable

PATIENCE = 0.05  # seconds; the work that is "stalled" ends only when a test says so


@pytest.fixture
def stall():
    event = threading.Event()
    yield event
    event.set()


def test_work_is_done_in_a_thread_and_its_result_and_errors_come_back() -> None:
    tier = Blocking("disk", "disk_seconds", 2, 60.0)

    async def main() -> None:
        assert await tier.run(threading.current_thread) is not threading.main_thread()
        with pytest.raises(ZeroDivisionError):
            await tier.run(lambda: 1 // 0)

    asyncio.run(main())
    assert tier.call(lambda: 7) == 7
    with pytest.raises(TimeoutError):
        tier.call(_times_out)
    tier.close()


def _times_out() -> None:
    raise TimeoutError("the work's own")


def test_a_stalled_tier_lets_everybody_go_until_it_answers(stall: threading.Event, caplog) -> None:
    tier = Blocking("disk", "disk_seconds", 1, PATIENCE)
    over: list[str] = []

    async def main() -> None:
        first = asyncio.ensure_future(tier.run(stall.wait, lambda: over.append("first")))
        await asyncio.sleep(0)
        queued = asyncio.ensure_future(tier.run(lambda: None, lambda: over.append("queued")))
        results = await asyncio.gather(first, queued, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]
        await asyncio.sleep(0)
        assert over == ["queued"]  # never begun; the first one still runs
        with pytest.raises(Unavailable):
            await tier.run(lambda: None, lambda: over.append("refused"))
        with pytest.raises(Unavailable):
            await asyncio.to_thread(tier.call, lambda: None)
        stall.set()
        while "first" not in over:
            await asyncio.sleep(0.001)
        assert await tier.run(lambda: 3) == 3
        assert over == ["queued", "refused", "first"]

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    tier.close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "disk_seconds" in said[0] and "answers again" in said[1]


def test_who_is_cancelled_hears_when_its_work_is_over(stall: threading.Event) -> None:
    tier = Blocking("disk", "disk_seconds", 1, 60.0)
    over: list[bool] = []

    async def main() -> None:
        task = asyncio.ensure_future(tier.run(stall.wait, lambda: over.append(True)))
        while not tier.lag():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not over
        stall.set()
        while not over:
            await asyncio.sleep(0.001)

    asyncio.run(main())
    tier.close()


def test_closing_does_not_wait_for_a_device_for_ever(stall: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare.blocking.CLOSE_SECONDS", 0.01)
    tier = Blocking("disk", "disk_seconds", 1, PATIENCE)
    with pytest.raises(Unavailable):
        tier.call(stall.wait)
    tier.close()
    assert not stall.is_set()
