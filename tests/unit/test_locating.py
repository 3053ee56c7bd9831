"""How long an answer waits for blocks of a slow tier: no longer than they have saved, and a grace."""

from __future__ import annotations

import asyncio

from kvshare.locating import worthwhile

LONG = 1000.0  # seconds that no test waits


def run(*outcomes: bool | None, grace: float, allowed: float) -> list[bool]:
    """Which blocks were waited for to their end; an outcome None never comes."""

    async def main() -> list[bool]:
        loop = asyncio.get_running_loop()
        blocks: list[asyncio.Future[bool]] = [loop.create_future() for _ in outcomes]
        seen: list[bool] = []

        async def arrive() -> None:
            for block, outcome in zip(blocks, outcomes, strict=True):
                await asyncio.sleep(0)
                if outcome is not None:
                    block.set_result(outcome)

        arriving = asyncio.ensure_future(arrive())
        async with asyncio.timeout(LONG / 2):
            await worthwhile(blocks, grace, allowed)
        seen = [block.done() for block in blocks]
        await arriving
        for block in blocks:
            block.cancel()
        return seen

    return asyncio.run(main())


def test_all_that_comes_is_waited_for() -> None:
    assert run(True, True, True, grace=LONG, allowed=0.0) == [True, True, True]


def test_a_first_block_that_does_not_come_costs_the_grace_and_no_more() -> None:
    assert run(None, None, grace=0.01, allowed=LONG) == [False, False]


def test_what_has_come_earns_time_for_the_next() -> None:
    assert run(True, True, grace=LONG / 100, allowed=LONG) == [True, True]
    assert run(True, None, grace=0.01, allowed=0.02) == [True, False]


def test_the_wait_ends_at_a_gap() -> None:
    assert run(True, False, None, grace=LONG, allowed=LONG) == [True, True, False]
