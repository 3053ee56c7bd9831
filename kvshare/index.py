"""The directory's index: which nodes hold a key, and where. `Index` is the door for a faster one; `MemoryIndex` is two dicts.

    holders   key -> names of nodes, freshest last      held   node -> key -> Stored

The name of a single holder (the common case) is kept bare, so that a key costs one entry here and one there, and no
container of its own.

Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Protocol

from kvshare.places import Location, Stored, located

LOCATIONS_PER_KEY = 2  # on average: memory follows locations, so these are limited too


class Index(Protocol):
    """What the directory asks of an index. A question changes nothing."""

    def add(self, node: str, stored: Iterable[Stored]) -> int:
        """``node`` holds these blocks now, where they say (again: they have moved). Returns how many were refused for
        want of room; a refused block is simply not known."""

    def remove(self, node: str, keys: Iterable[bytes]) -> None:
        """``node`` no longer holds these. Unknown ones are ignored: they may have been refused."""

    def drop(self, node: str) -> None:
        """Forget all that ``node`` held."""

    def locate(self, keys: Sequence[bytes], exclude: str, locations_max: int) -> list[list[Location]]:
        """For each key up to ``locations_max`` places, freshest first, none of them on ``exclude``."""

    def holders(self, key: bytes) -> Sequence[str]:
        """The names of all who hold a key, freshest last."""

    def held_by(self, node: str) -> Set[bytes]:
        """The keys that ``node`` holds: a view, good until the next change."""

    def nodes(self) -> Set[str]:
        """Who holds anything."""

    def locations(self) -> int:
        """How many pairs of key and node are known."""

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""

    def __len__(self) -> int:
        """How many keys are known."""


class MemoryIndex:
    """An `Index` in this process's memory: at most ``keys_max`` keys and twice as many locations."""

    def __init__(self, keys_max: int) -> None:
        assert keys_max >= 1
        self._keys_max = keys_max
        self._locations_max = keys_max * LOCATIONS_PER_KEY
        self._holders: dict[bytes, str | tuple[str, ...]] = {}
        self._held: dict[str, dict[bytes, Stored]] = {}
        self._locations = 0

    def __len__(self) -> int:
        return len(self._holders)

    def nodes(self) -> Set[str]:
        return self._held.keys()

    def locations(self) -> int:
        return self._locations

    def add(self, node: str, stored: Iterable[Stored]) -> int:
        refused = 0
        held = self._held.setdefault(node, {})
        holders = self._holders
        for block in stored:
            key = block.key
            names = holders.get(key)
            if key in held:
                if isinstance(names, tuple):
                    holders[key] = (*_without(names, node), node)
            elif self._locations >= self._locations_max or (names is None and len(holders) >= self._keys_max):
                refused += 1
                continue
            else:
                self._locations += 1
                holders[key] = node if names is None else (*_names(names), node)
            held[key] = block
        if not held:
            del self._held[node]
        return refused

    def remove(self, node: str, keys: Iterable[bytes]) -> None:
        held = self._held.get(node)
        if held is None:
            return
        for key in keys:
            if held.pop(key, None) is not None:
                self._unlink(node, key)
        if not held:
            del self._held[node]

    def drop(self, node: str) -> None:
        for key in self._held.pop(node, {}):
            self._unlink(node, key)

    def locate(self, keys: Sequence[bytes], exclude: str, locations_max: int) -> list[list[Location]]:
        found: list[list[Location]] = []
        for key in keys:
            names = self._holders.get(key, ())
            if isinstance(names, str):
                found.append([] if names == exclude else [located(names, self._held[names][key])])
                continue
            chosen = [name for name in reversed(names) if name != exclude][:locations_max]
            found.append([located(name, self._held[name][key]) for name in chosen])
        return found

    def holders(self, key: bytes) -> Sequence[str]:
        return _names(self._holders.get(key, ()))

    def held_by(self, node: str) -> Set[bytes]:
        return self._held.get(node, {}).keys()

    def check(self) -> list[str]:
        problems = []
        for key, value in self._holders.items():
            names = _names(value)
            if not names or len(set(names)) != len(names):
                problems.append(f"{key.hex()} has holders {names}")
            if isinstance(value, tuple) and len(value) < 2:
                problems.append(f"{key.hex()} keeps a container for {len(value)} holder")
            problems.extend(f"{key.hex()} is not held by {name}" for name in names if key not in self._held.get(name, {}))
        for name, held in self._held.items():
            if not held:
                problems.append(f"{name} is kept without keys")
            for key, block in held.items():
                if block.key != key:
                    problems.append(f"{key.hex()} of {name} says that it is {block.key.hex()}")
                if name not in _names(self._holders.get(key, ())):
                    problems.append(f"{key.hex()} of {name} cannot be found")
        if self._locations != sum(map(len, self._held.values())):
            problems.append(f"{self._locations} locations are counted, {sum(map(len, self._held.values()))} are known")
        if len(self._holders) > self._keys_max or self._locations > self._locations_max:
            problems.append(f"{len(self._holders)} keys and {self._locations} locations are over the limit")
        return problems

    def _unlink(self, node: str, key: bytes) -> None:
        names = _without(_names(self._holders[key]), node)
        self._locations -= 1
        if not names:
            del self._holders[key]
        else:
            self._holders[key] = names[0] if len(names) == 1 else names


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _without(names: tuple[str, ...], node: str) -> tuple[str, ...]:
    return tuple(name for name in names if name != node)
