"""What the scheduler's half asks when a block has several shards (`kvshare.integrations.vllm.sharding`): a session for each,
and their answers in one. A block is there when all its shards are.

Prefixes are those of shard 0; the others differ in their family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvshare.keys import FAMILY_BYTES
from kvshare.loading import LoadPlan, Offer
from kvshare.question import Local, Question
from kvshare.session import Session


class ShardedLookup:
    """``sessions`` and ``families``: of each shard."""

    def __init__(self, sessions: Sequence[Session], families: Sequence[bytes]) -> None:
        self._sessions = list(sessions)
        self._families = list(families)

    def ask(
        self, prefix: bytes, hashes: Sequence[bytes], patience_seconds: float = 0.0, fetch_seconds: float = 0.0
    ) -> ShardedChain:
        pairs = zip(self._sessions, self._prefixes(prefix), strict=True)
        return ShardedChain([session.ask(own, hashes, patience_seconds, fetch_seconds) for session, own in pairs])

    def local(self, prefix: bytes, hashes: Sequence[bytes]) -> list[Local]:
        pairs = zip(self._sessions, self._prefixes(prefix), strict=True)
        return [session.local(own, hashes) for session, own in pairs]

    def still(self, local: Sequence[Local]) -> npt.NDArray[np.bool_]:
        answers = [session.still(one) for session, one in zip(self._sessions, local, strict=True)]
        return np.asarray(np.logical_and.reduce(answers))

    def close(self) -> None:
        for session in self._sessions:
            session.close()

    def _prefixes(self, prefix: bytes) -> list[bytes]:
        return [family + prefix[FAMILY_BYTES:] for family in self._families]


class ShardedChain:
    """A question about each shard of a chain of blocks."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = list(questions)

    def available(self, start: int) -> int | None:
        answers = [question.available(start) for question in self._questions]
        known = [answer for answer in answers if answer is not None]
        return min(known) if len(known) == len(answers) or 0 in known else None

    def offer(self, start: int, count: int) -> Offer:
        """Of shard 0: the others lie where it lies, nearly always."""
        return self._questions[0].offer(start, count)

    def plan(self, start: int, count: int) -> LoadPlan:
        first, *others = (question.plan(start, count) for question in self._questions)
        return replace(first, others=tuple(others))

    def close(self, hits: int) -> None:
        for question in self._questions:
            question.close(hits)
