"""What a play is made of: the rules that its parts keep, the prompts that its engines get, and where everything is found.

Threads: none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from kvshare import keys
from kvshare.config import Settings
from kvshare.directory_events import Command, Event
from kvshare.outbox import Outbox
from tests.sim.network import Network
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.nodes import Node
    from tests.sim.shards import Shard

HASH_BYTES = 16
FAMILY = b"s" * keys.FAMILY_BYTES
PREFIX = keys.prefix(FAMILY)
PARENTS: dict[bytes, bytes] = {}  # of all keys that were ever made and are no chain's first


@lru_cache(1 << 14)
def _chain(number: int) -> tuple[bytes, ...]:
    """Of true chains: a hash stands for all before it."""
    length, hashes = 6 + number % 7, [b""]
    for depth in range(length):
        text = b"head %d" % (number // 4) if depth < 3 else b"tail %d" % number
        hashes.append(hashlib.blake2b(hashes[-1] + text, digest_size=HASH_BYTES).digest())
    names = tuple(PREFIX + each for each in hashes[1:])
    PARENTS.update(zip(names[1:], names, strict=False))
    return names


def chain(number: int) -> list[bytes]:
    """The keys of a prompt; those of four share a head."""
    return list(_chain(number))


def later_birth(epoch: int, now: float) -> int:
    """The epoch of a node that starts: above all of its former ones."""
    return max(epoch + 1, int(now))


@dataclass(frozen=True)
class Rules:
    """What the simulated parts do where it matters. The defaults are right; a test breaks one and sees that it is found out.

    validate: does a reader accept what it read at that generation, when it was told this one? birth: of a node's next epoch.
    outbox: what nodes have for one. hears: what of an event the directory gets to know. says: which of its commands are obeyed.
    """

    validate: Callable[[int, int], bool] = lambda found, told: found == told
    birth: Callable[[int, float], int] = later_birth
    outbox: type[Outbox] = Outbox
    hears: Callable[[Event], Event | None] = lambda event: event
    says: Callable[[Command], bool] = lambda command: True


@dataclass
class Setting:
    """Shared by all parts of a play. ``lossy``: share of publishes that are lost or come twice."""

    world: World
    network: Network
    settings: Settings
    rules: Rules
    lossy: float = 0.0
    shards: list[Shard] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
