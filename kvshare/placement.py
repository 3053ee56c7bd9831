"""Admission: which blocks of the arena deserve a place in a slow tier. A disk is worn by what is written, not by what is read.

    saved ───── came before, or "all" ────┐
    found again ──────────────────────────┼──> write it now, unless it is there
    held by a node that leaves ───────────┘

Most blocks are never asked for again (74 % on the Mooncake conversation trace): with ``used`` a block is written at its second
use. That it is found again in the arena is one sign, and always enough. The other is that it is saved again: it came, left the
arena before anyone asked, was asked for and computed anew. For that, `Admission` remembers what was saved.

The last copy in the cluster needs no rule of its own: a block that was ever of use here was written to this node's disk then,
so the arena may let its copy go without asking who else has one; who never was of use is not worth the write. Who leaves
writes everything that only it has (`kvshare.handover`), used or not.

Memory is bounded: two sets of the keys' hashes, of which the former is forgotten when the recent one is full. Two keys of one
hash cost a write too many.

Pure. Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Sequence

REMEMBERED_MAX = 1 << 19  # saved blocks, about 40 MiB: a terabyte of blocks of 2 MiB


class Admission:
    """See the module's docstring. ``everything``: the setting ``disk_admit`` is ``all``."""

    def __init__(self, everything: bool, remembered_max: int = REMEMBERED_MAX) -> None:
        assert remembered_max >= 2
        self._everything = everything
        self._set_max = remembered_max // 2
        self._recent: set[int] = set()
        self._former: set[int] = set()

    def __len__(self) -> int:
        """Saved blocks that are remembered; those in both sets count twice."""
        return len(self._recent) + len(self._former)

    def saved(self, keys: Sequence[bytes]) -> list[bytes]:
        """The arena has got these. Those of them to write, in order; what the slow tier has is for the caller to leave out."""
        if self._everything:
            return list(keys)
        again = []
        for key in keys:
            number = hash(key)
            if number in self._recent or number in self._former:
                again.append(key)
            self._remember(number)
        return again

    def _remember(self, number: int) -> None:
        self._recent.add(number)
        if len(self._recent) >= self._set_max:
            self._recent, self._former = set(), self._recent
