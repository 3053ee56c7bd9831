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
from kvshare.link import DirectoryLink
from kvshare.messages import Expose, Shown
from kvshare.places import DEVICE, Location, NodeDescription, RegionDescription, Stored
from kvshare.region import generation_now

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
        self._link: DirectoryLink | None = None
        self._linking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Join the directory, if the node is part of a cluster."""
        node = self._node
        if node.clustered:
            self._link = DirectoryLink(
                node.settings, node.resolve, self.describe, self._inventory, lambda _: None, lambda _: None
            )  # others' comings and goings the node hears of itself
            self._linking = asyncio.get_running_loop().create_task(self._link.run())

    def describe(self) -> NodeDescription:
        return NodeDescription(self.name, self._epoch, self._node.host, "", (self.region,))

    @property
    def region(self) -> RegionDescription:
        offer = self._offer
        place = (self.name, offer.region, offer.slot_bytes, offer.slots)
        return RegionDescription(*place, self._node.host, "", offer.table_path, "", DEVICE, offer.memory)

    def show(self, shown: Shown) -> None:
        """What changed in the engine's cache."""
        gone = [key for key in shown.gone if self._blocks.pop(key, None) is not None]
        for block in shown.stored:
            self._blocks[block.key] = block
        if self._link is not None:
            self._link.changed(shown.stored, gone)

    def lookup(self, key: bytes) -> Location | None:
        block = self._blocks.get(key)
        return None if block is None else Location(self.name, block.region, block.slot, block.generation, block.length)

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
