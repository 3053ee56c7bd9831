"""How long an engine's scheduler is held up by the lookup of a 128k-token prompt that its node holds.

A real node (a process of its own) holds 8,192 blocks; a real session asks ``ask(prefix, hashes)`` and ``available(0)``, the
scheduler's whole lookup, with hashes that are fresh objects, as those of a new request are. Counted too: lookups that were
not answered at once, and messages that they sent to the node; both must be zero.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Failed, Fleet, arguments, progress, report, summary

from kvshare import keys, native
from kvshare.messages import Located
from kvshare.mover import Mover
from kvshare.question import Asked
from kvshare.session import Session
from kvshare.transport.base import Targets

BLOCK_SIZE = 16  # tokens
BLOCKS = 131072 // BLOCK_SIZE
BLOCK_BYTES = 512  # only the lookup is of interest


class CountingSession(Session):
    """Counts the questions that go to the node."""

    messages = 0

    def locate(self, asked: Asked, answer: Callable[[Located | None], None], fetching: Callable[[float], None]) -> bool:
        self.messages += 1
        return super().locate(asked, answer, fetching)


def main() -> None:
    options = arguments(__doc__ or "")
    repetitions = 50 if options.quick else 500
    with Fleet() as fleet:
        settings = fleet.settings("node", arena_bytes=64 << 20, secret="", directory="")
        fleet.start_node(settings)
        session = CountingSession.connect(settings, _namespace(), engine="bench", block_bytes=BLOCK_BYTES)
        mover = Mover(session)
        try:
            figures, detail = measure(session, mover, repetitions)
        finally:
            mover.close()
            session.close()
    report(figures, detail, options.json)


def measure(session: Session, mover: Mover, repetitions: int) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    random = np.random.default_rng(7)
    hashes = [random.bytes(32) for _ in range(BLOCKS)]
    prefix = keys.prefix(session.namespace.family())
    fill(session, mover, prefix, hashes)
    assert isinstance(session, CountingSession)
    session.messages = 0
    lookups, decisions, unanswered = [], [], 0
    for repetition in range(repetitions + 10):
        fresh = [bytes(bytearray(block_hash)) for block_hash in hashes]
        began = time.perf_counter()
        question = session.ask(prefix, fresh)
        available = question.available(0)
        looked = time.perf_counter()
        question.plan(0, BLOCKS)
        question.close(BLOCKS)
        ended = time.perf_counter()
        if available is None:
            unanswered += 1
        elif available != BLOCKS:
            raise Failed(f"{available} of {BLOCKS} blocks were found")
        if repetition >= 10:
            lookups.append((looked - began) * 1e3)
            decisions.append((ended - looked) * 1e3)
        time.sleep(0.002)  # the node reads what `close` reported
    detail = {
        "blocks": BLOCKS,
        "tokens": BLOCKS * BLOCK_SIZE,
        "lookup_ms": summary(lookups),
        "plan_and_close_ms": summary(decisions),
        "not_answered_at_once": unanswered,
        "messages_sent": session.messages,
        "garbage_collector": gc.isenabled(),
    }
    if unanswered or session.messages:
        raise Failed(f"{unanswered} lookups were not answered at once, {session.messages} messages were sent")
    return {"lookup_128k_ms": (detail["lookup_ms"]["median"], "ms")}, detail


def fill(session: Session, mover: Mover, prefix: bytes, hashes: list[bytes]) -> None:
    """Save a block under every hash and wait until the session has heard of all."""
    data = np.random.default_rng(8).integers(0, 256, BLOCKS * BLOCK_BYTES, np.uint8)
    sources = Targets.strided(native.address_of(data), BLOCK_BYTES, np.arange(BLOCKS), BLOCK_BYTES)
    job = mover.save([prefix + block_hash for block_hash in hashes], sources)
    job.wait(60.0)
    progress(f"{job.saved} of {BLOCKS} blocks saved")
    deadline = time.monotonic() + 30.0
    while (known := session.ask(prefix, hashes).available(0)) != BLOCKS:
        if time.monotonic() > deadline:
            raise Failed(f"the session knows of {known} of {BLOCKS} blocks")
        time.sleep(0.05)


def _namespace() -> keys.Namespace:
    return keys.Namespace(
        weights="bench",
        dtype="bfloat16",
        kv_dtype="bfloat16",
        block_size=BLOCK_SIZE,
        page_bytes=BLOCK_BYTES,
        layers=1,
        kv_heads=1,
        head_size=64,
        hash_algorithm="bench",
        hash_seed="",
        packing="bench",
    )


if __name__ == "__main__":
    main()
