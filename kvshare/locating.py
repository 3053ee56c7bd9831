"""A session asks where the blocks of a chain are: the node's answer, from what is nearest to what is farthest.

    Locate ─> own arena, engines of this host ─> own disk ╮              ╭─> promoted into the arena (`Fetching` says how long)
                   └─> what the directory said lately     │              │
                             └─> directory (peers) ─> object store ──────╯
                                        └─> unmeasured peers are probed ─> Located

Blocks on our disk and in the object store are brought into the arena first, so what is answered is always memory: as many
leading ones as get there in time. What that may take is the asker's ``fetch_seconds`` (clearly less than computing would); at
any moment it may have taken the share of what has arrived, and a small grace. So a device that turns out slow, or stalls,
costs no more than the grace. The wait ends with the first block that fails: what comes behind a gap is of no use.

Threads: all on the node's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvshare.cost import Candidate, choose
from kvshare.device import is_of
from kvshare.messages import Fetching, Locate, Located
from kvshare.places import DEVICE, Location, RegionDescription, located
from kvshare.promotion import Want

if TYPE_CHECKING:
    from kvshare.node import Node
    from kvshare.node_session import NodeSession

DIRECTORY_SECONDS = 2.0  # the session gives up earlier by its own deadline
SHARD_SHARE = 0.5  # of `lookup_seconds`, for one shard of several: what the others say is to be in time


class Locating:
    """The answers to one session's questions."""

    def __init__(self, node: Node, session: NodeSession) -> None:
        self._node = node
        self._session = session

    def locate(self, message: Locate) -> None:
        """Answer now where memory knows all, else later."""
        node = self._node
        found = [self._near(key) for key in message.keys]
        unknown: list[int] = []
        if not all(found):
            bars, on_disk = node.gate.bars, node.memory.tiers.on_disk
            missing = [i for i, key in enumerate(message.keys) if not (found[i] or on_disk(key) or bars(key))]
            told = node.answers.get([message.keys[i] for i in missing], time.monotonic())
            self._take(message.keys, found, missing, told)
            unknown = [i for i in missing if not found[i]]
        if all(found) or not (node.link.connected or node.memory.tiers.enabled):
            self._settle(message, found)
        else:
            self._session.later(self._locate_far(message, found, unknown))

    def _near(self, key: bytes) -> list[Location]:
        """Where memory of this host has it."""
        own = self._in_arena(key)
        if own is not None:
            return [own]
        exposed, ends = self._node.exposed_block(key, self._session.number), self._node.memory.ends
        if exposed is None or ends.over(exposed.expires):
            return []
        ends.told(key, exposed.expires)
        return [exposed]

    def _in_arena(self, key: bytes) -> Location | None:
        block = self._node.memory.lookup(key)
        return None if block is None else located(self._node.name, block)

    async def _locate_far(self, message: Locate, found: list[list[Location]], unknown: list[int]) -> None:
        node = self._node
        if unknown and node.link.connected:
            await self._ask_directory(message, found, unknown)
        if node.memory.tiers.enabled:
            await self._fetch(message, found)
        self._settle(message, found)

    async def _ask_directory(self, message: Locate, found: list[list[Location]], unknown: list[int]) -> None:
        link, answers = self._node.link, self._node.answers
        seconds = DIRECTORY_SECONDS if len(link) == 1 else self._node.settings.lookup_seconds * SHARD_SHARE
        wanted = [message.keys[i] for i in unknown]
        told = await link.find(wanted, seconds)
        answers.put(wanted, told, time.monotonic())
        self._take(message.keys, found, unknown, told)

    def _take(self, keys: Sequence[bytes], found: list[list[Location]], which: list[int], told: list[list[Location]]) -> None:
        """Of what the directory told, what we can read and may."""
        ends, regions = self._node.memory.ends, {(place.node, place.region): place for places in told for place in places}
        kinds = {where: self._reached_kind(place) for where, place in regions.items()}
        for i, places in zip(which, told, strict=True):
            for place in places:
                kind = kinds[place.node, place.region]
                if not kind or ends.over(place.expires) or (kind == DEVICE and not is_of(place.generation, keys[i])):
                    continue
                found[i].append(place)
                ends.told(keys[i], place.expires)

    def _reached_kind(self, location: Location) -> str:
        """The kind of the region that it names; empty where we cannot read it."""
        peer = self._node.region_of(location)
        own = self._node.exposed.get(self._session.number)  # what its engine has, its engine finds itself
        if peer is None or (own is not None and own.name == location.node) or not self._node.transports.reaches(peer):
            return ""
        return peer.kind

    # --- slow tiers ---------------------------------------------------------------------------------------------------

    async def _fetch(self, message: Locate, found: list[list[Location]]) -> None:
        """Bring the blocks of the leading gaps that slow tiers hold into the arena, if and as long as that pays."""
        tiers = self._node.memory.tiers
        gaps = [i for i, places in enumerate(found) if not places]
        held = tiers.held([message.keys[i] for i in gaps])
        absent = held.index(0) if 0 in held else len(held)
        end = gaps[absent] if absent < len(gaps) else len(found)  # the chain is of use up to here
        wanted = [message.keys[i] for i in gaps[:absent]]
        if not wanted:
            return
        known = message.fetch_seconds > 0
        allowed = message.fetch_seconds * end / len(found) if known else self._node.settings.lookup_seconds
        if tiers.expected_seconds(wanted) > allowed:
            return
        grace = min(tiers.grace_seconds(wanted), allowed)
        self._session.send(Fetching(message.ask, allowed + grace))
        want = Want()
        try:
            await worthwhile(tiers.promote(wanted, want), grace if known else allowed, allowed if known else 0.0)
        finally:
            if known:
                want.end()  # else nobody knows that it does not pay: the next question finds what arrives yet
        for i in gaps[:absent]:
            place = self._in_arena(message.keys[i])
            if place is None:
                break
            found[i] = [place]

    # --- answers ------------------------------------------------------------------------------------------------------

    def _settle(self, message: Locate, found: list[list[Location]]) -> None:
        """Answer, or have unmeasured sources measured and answer then; in any case before the asker's patience ends."""
        name = self._node.name
        peers = (
            (key, place) for key, places in zip(message.keys, found, strict=True) for place in places if place.node != name
        )
        probes = self._node.prober.start(peers, self._node.region_of) if message.patience_seconds > 0 else []
        if probes:
            self._session.later(self._settle_later(message, found, probes))
        else:
            self._answer(message.ask, found)

    async def _settle_later(self, message: Locate, found: list[list[Location]], probes: list[asyncio.Task[None]]) -> None:
        await asyncio.wait(probes, timeout=min(message.patience_seconds, DIRECTORY_SECONDS))
        self._answer(message.ask, found)

    def _answer(self, ask: int, found: list[list[Location]]) -> None:
        node, now = self._node, time.monotonic()
        regions: dict[tuple[str, int], RegionDescription] = {}
        candidates: dict[tuple[str, int], Candidate] = {}
        for place in (place for places in found for place in places):
            where = (place.node, place.region)
            if where not in candidates:
                region = node.region_of(place)
                if region is not None:
                    regions[where] = region
                    candidates[where] = Candidate((region.node, region.kind), region.region, region.host_id == node.host)
        usable = [[place for place in places if (place.node, place.region) in candidates] for places in found]
        chain = [[candidates[place.node, place.region] for place in places] for places in usable]
        chosen = choose(chain, node.prober.rates, now)
        locations = [places[i] if i >= 0 else None for places, i in zip(usable, chosen, strict=True)]
        named = dict.fromkeys((place.node, place.region) for place in locations if place is not None)
        peers = [regions[where] for where in named]
        rates = [node.prober.rates.rate(candidates[where].source, now) for where in named]
        self._session.send(Located(ask, locations, peers, rates))


async def worthwhile(blocks: Sequence[asyncio.Future[bool]], grace: float, allowed: float) -> None:
    """Wait for ``blocks`` in order, until one fails or they have taken longer than ``grace`` seconds and the share of
    ``allowed`` seconds of those that are here."""
    began = time.monotonic()
    for arrived, block in enumerate(blocks):
        left = began + grace + allowed * arrived / len(blocks) - time.monotonic()
        if not block.done():
            await asyncio.wait([block], timeout=max(0.0, left))
        if not block.done() or not block.result():
            return
