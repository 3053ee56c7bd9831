"""What the directory has answered lately: where blocks of peers are, kept for all sessions of a node.

Prompts repeat within seconds (an agent's turns, the requests of a batch), and what is repeated costs the directory
nothing. An answer is good for `ANSWER_SECONDS` to twice that; whoever finds it wrong says so before (`drop`), and peers that
go, or start again, take all answers with them (`clear`). Only places are kept, never that there are none: what was just
computed must be found.

Pure. Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvshare.places import Location

ANSWER_SECONDS = 1.0
ANSWERS_MAX = 1 << 15  # keys of one generation; there are two


class Answers:
    """Two generations: the younger becomes the older when its time is over, or it is full. ``used``: keys that were told."""

    def __init__(self) -> None:
        self._young: dict[bytes, list[Location]] = {}
        self._old: dict[bytes, list[Location]] = {}
        self._until = 0.0
        self.used = 0

    def get(self, keys: Iterable[bytes], now: float) -> list[list[Location]]:
        """The places of each key, none where nothing is known. ``now`` in seconds, never going back."""
        self._age(now)
        young, old = self._young, self._old
        found = [young.get(key) or old.get(key) or [] for key in keys]
        self.used += sum(map(bool, found))
        return found

    def put(self, keys: Sequence[bytes], found: Sequence[list[Location]], now: float) -> None:
        """The directory has said so."""
        self._age(now)
        for key, places in zip(keys, found, strict=True):
            if places:
                self._young[key] = places
                if len(self._young) >= ANSWERS_MAX:
                    self._turn(now)

    def drop(self, keys: Iterable[bytes]) -> None:
        """They are not there, or not whole."""
        for key in keys:
            self._young.pop(key, None)
            self._old.pop(key, None)

    def clear(self) -> None:
        self._young, self._old = {}, {}

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())

    def _age(self, now: float) -> None:
        if now >= self._until:
            if now >= self._until + ANSWER_SECONDS:
                self._young = {}  # nobody has looked for so long: these are too old as well
            self._turn(now)

    def _turn(self, now: float) -> None:
        self._young, self._old, self._until = {}, self._young, now + ANSWER_SECONDS
