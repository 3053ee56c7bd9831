"""An engine's KV cache as a member of the cluster: a device region, told of by the engine, known to the directory by a name of
its own ("node/engine") and a connection of its own.

So everything that holds for nodes holds for it: peers learn its locations, a plan may draw on it, and it is forgotten by
everybody when it ends. Its blocks are read without the engine or this node doing anything.

Threads: all on the node's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvshare import device
from kvshare.link import Member
from kvshare.messages import Expose, Shown
from kvshare.places import DEVICE, Location, NodeDescription, RegionDescription, Stored, located
from kvshare.purge import Matches
from kvshare.region import generation_now
from kvshare.shards import Shards

if TYPE_CHECKING:
    from kvshare.node import Node

log = logging.getLogger("kvshare")


class Exposed:
    """What one engine exposes. ``engine``: its name."""

    def __init__(self, node: Node, engine: str, offer: Expose) -> None:
        self.name = f"{node.name}/{engine}"
        self._node = node
        self._offer = offer
        self._epoch = generation_now()
        self._blocks: dict[bytes, Stored] = {}
        self._purged: dict[bytes, int] = {}  # key -> generation that it had here
        self._link: Shards | None = None
        self._linking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Join the directory, if the node is part of a cluster."""
        node = self._node
        if node.clustered:
            member = Member(self.name, self.describe, self._inventory)  # others' comings and goings the node hears of itself
            self._link = Shards(node.settings, member, node.resolve, node.shards)
            self._linking = asyncio.get_running_loop().create_task(self._link.run())

    def describe(self) -> NodeDescription:
        return NodeDescription(self.name, self._epoch, self._node.host, "", (self.region,), self._node.settings.region)

    @property
    def region(self) -> RegionDescription:
        offer = self._offer
        place = (self.name, offer.region, offer.slot_bytes, offer.slots)
        return RegionDescription(*place, self._node.host, "", offer.table_path, "", DEVICE, offer.memory)

    def show(self, shown: Shown) -> None:
        """What changed in the engine's cache."""
        gone = [key for key in shown.gone if self._blocks.pop(key, None) is not None]
        for key in shown.gone:
            self._purged.pop(key, None)
        told = [self._node.memory.with_end(block) for block in shown.stored if self._may_be_told(block)]
        for block in told:
            self._blocks[block.key] = block
            self._purged.pop(block.key, None)  # it has been computed anew
        if self._link is not None:
            self._link.changed(told, gone)

    def purge(self, matches: Matches) -> list[Stored]:
        """No longer tell of these, and never again as long as they are what they are. Returns them."""
        gone = [block for key, block in self._blocks.items() if matches(key)]
        for block in gone:
            del self._blocks[block.key]
            self._purged[block.key] = block.generation
        if self._link is not None and gone:
            self._link.changed([], [block.key for block in gone])
        return gone

    async def settle(self, seconds: float) -> None:
        """Return when the directory knows what has changed, or can't be told."""
        if self._link is not None:
            await self._link.settle(seconds)

    def _may_be_told(self, block: Stored) -> bool:
        """Peers read an engine's memory without asking anybody, so they hear of nothing whose tenant is bound to regions."""
        gate = self._node.gate
        return not (gate.is_bound(block.key) or gate.bars(block.key) or self._purged.get(block.key) == block.generation)

    def lookup(self, key: bytes) -> Location | None:
        block = self._blocks.get(key)
        return None if block is None else located(self.name, block)

    def __len__(self) -> int:
        return len(self._blocks)

    async def close(self) -> None:
        """The engine is gone."""
        if self._linking is not None:
            self._linking.cancel()
            await asyncio.gather(self._linking, return_exceptions=True)
        self._node.transports.forget(self.name)
        device.remove_stale(self._node.settings.arena_stem)  # a killed engine leaves its table behind

    def _inventory(self) -> Iterator[Stored]:
        return iter(list(self._blocks.values()))
