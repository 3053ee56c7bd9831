"""Slots that may hold bytes of purged blocks, and must be filled with zeros before anybody gets them. Part of a `Store`.

    wrote ──(free, a purge)──> soiled ──take──> cleaning ──cleaned──> free
    wrote ──(rests, a purge)──> spoilt ──(rested)──> soiled

Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class Soiled:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._written = bytearray()  # by slot: 1 if it may hold anything but zeros
        self._waiting: list[int] = []
        self._cleaning: set[int] = set()
        self._spoilt: set[int] = set()  # resting: somebody may be writing there

    def __iter__(self) -> Iterator[int]:
        """All that are neither free nor anything else of a store's."""
        yield from self._waiting
        yield from self._cleaning

    def extend(self, written: bytes) -> None:
        """More slots: for each, whether it was written to in the past (0 or 1)."""
        self._written += written

    def wrote(self, slot: int) -> None:
        """Somebody is about to write there."""
        self._written[slot] = 1

    def add(self, slot: int) -> None:
        self._waiting.append(slot)

    def spoil(self, slots: Iterable[int]) -> None:
        """These rest; they are to be cleaned when they have."""
        self._spoilt.update(slots)

    def rested(self, slot: int) -> bool:
        """Must this slot be cleaned now that it has rested?"""
        spoilt = slot in self._spoilt
        self._spoilt.discard(slot)
        return spoilt

    def sift(self, free: Sequence[int]) -> list[int]:
        """Those of these free slots that were never written to; the others are to be cleaned."""
        self._waiting += [slot for slot in free if self._written[slot]]
        return [slot for slot in free if not self._written[slot]]

    def take(self, slots_max: int) -> list[int]:
        """Slots to be filled with zeros now, then given back by `Store.cleaned` or `again`. Ascending; empty: none."""
        self._waiting.sort(reverse=True)
        taken = self._waiting[-slots_max:][::-1]
        del self._waiting[-slots_max:]
        self._cleaning.update(taken)
        return taken

    def again(self, slots: Sequence[int]) -> None:
        """These could not be cleaned."""
        self._cleaning.difference_update(slots)
        self._waiting += slots

    def cleaned(self, slots: Sequence[int]) -> None:
        """These hold nothing but zeros."""
        self._cleaning.difference_update(slots)
        for slot in slots:
            self._written[slot] = 0
