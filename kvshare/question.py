"""Questions about chains of blocks, and the mirror of the node's index that answers most of them from memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvshare import keys
from kvshare.config import Settings
from kvshare.loading import LoadPlan, Offer, Source, SourceRead
from kvshare.messages import Located, Looked, Message
from kvshare.places import Location, RegionDescription

LOOKED_KEYS_MAX = 4096  # of one request; hotness needs the head of a chain most
FETCH_GRACE_SECONDS = 0.7  # beyond what fetching may take: until it is clear that it does not pay, and the answer's way


class Mirror:
    """The node's blocks of our family: prefix -> block hash -> slot, and each slot's expected generation."""

    def __init__(self) -> None:
        self.by_prefix: dict[bytes, dict[bytes, int]] = {}
        self.generations = np.zeros(1024, np.uint64)

    def add(self, key: bytes, slot: int, generation: int) -> None:
        if slot >= len(self.generations):
            self.generations = np.concatenate([self.generations, np.zeros(slot + 1, np.uint64)])
        self.by_prefix.setdefault(keys.prefix_of(key), {})[keys.hash_of(key)] = slot
        self.generations[slot] = generation

    def remove(self, key: bytes) -> None:
        hashes = self.by_prefix.get(keys.prefix_of(key))
        if hashes is not None:
            hashes.pop(keys.hash_of(key), None)
            if not hashes:
                del self.by_prefix[keys.prefix_of(key)]

    def lookup(self, prefix: bytes, hashes: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Slot of each hash, -1 where unknown."""
        known = self.by_prefix.get(prefix)
        if not known:
            return np.full(len(hashes), -1, np.int64)
        return np.fromiter(map(known.get, hashes, repeat(-1)), np.int64, len(hashes))


class Local(NamedTuple):
    """Blocks of our own node: slot of each (-1: unknown), its generation, and the mirror that said so."""

    mirror: Mirror
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint64]


class Asked(NamedTuple):
    """What our node is asked: see `kvshare.messages.Locate`."""

    keys: list[bytes]
    patience_seconds: float
    fetch_seconds: float


class Asker(Protocol):
    """What a question needs of its session."""

    settings: Settings

    @property
    def description(self) -> RegionDescription | None: ...

    def local(self, prefix: bytes, hashes: Sequence[bytes]) -> Local: ...

    def still(self, local: Local) -> npt.NDArray[np.bool_]: ...

    def locate(self, asked: Asked, answer: Callable[[Located | None], None], fetching: Callable[[float], None]) -> bool: ...

    def send(self, message: Message) -> bool: ...


class Question:
    """What became of one chain of blocks; made by `Session.ask`.

    Threads: one asker; the answer arrives in the channel's thread and is handed over by a single assignment.
    """

    def __init__(
        self,
        session: Asker,
        prefix: bytes,
        hashes: Sequence[bytes],
        patience_seconds: float = 0.0,
        fetch_seconds: float = 0.0,
    ) -> None:
        self._session = session
        self._prefix = prefix
        self._hashes = hashes
        self._remote: dict[int, Location] = {}
        self._peers: dict[tuple[str, int], RegionDescription] = {}
        self._rates: dict[Source, float] = {}
        self._waiting = False
        self._closed = False
        self._deadline = 0.0
        self._fetch_seconds = 0.0  # by which the node may put the deadline off
        self._local = session.local(prefix, hashes)
        # Not validated yet: what was evicted a moment ago is a gap when it comes to `available`.
        missing = np.flatnonzero(self._local.slots < 0).tolist()
        if missing:
            wanted = [prefix + hashes[i] for i in missing]
            self._deadline = time.monotonic() + session.settings.lookup_seconds
            self._waiting = True
            # An answer that is late is no answer: half of the time is for its way.
            patience_seconds = min(patience_seconds, session.settings.lookup_seconds / 2)
            asked = Asked(wanted, patience_seconds, fetch_seconds * len(missing) / len(hashes))
            self._fetch_seconds = (asked.fetch_seconds or session.settings.lookup_seconds) + FETCH_GRACE_SECONDS
            if not session.locate(asked, lambda located: self._answered(missing, located), self._fetching):
                self._waiting = False

    def available(self, start: int) -> int | None:
        """Leading blocks from index ``start`` that can be loaded now; None while the answer still travels."""
        slots = self._slots()[start:]
        remote = self._remote
        for gap in np.flatnonzero(slots < 0).tolist():
            if gap + start not in remote:
                count = int(gap)
                break
        else:
            return len(slots)
        if self._waiting:
            if time.monotonic() < self._deadline:
                return None
            self._waiting = False
        return count

    def plan(self, start: int, count: int) -> LoadPlan:
        """Sources of ``count`` blocks from index ``start``, as `available` just said."""
        slots = self._slots()[start : start + count]
        generations = self._local.generations[start : start + count]
        reads: list[SourceRead] = []
        description = self._session.description
        local = np.flatnonzero(slots >= 0)
        if len(local) and description is not None:
            reads.append(SourceRead(description, local, slots[local], generations[local]))
        by_region: dict[tuple[str, int], list[tuple[int, Location]]] = {}
        for position in np.flatnonzero(slots < 0).tolist():
            location = self._remote.get(position + start)
            if location is not None:
                by_region.setdefault((location.node, location.region), []).append((position, location))
        for source, blocks in by_region.items():
            reads.append(
                SourceRead(
                    self._peers[source],
                    np.array([position for position, _ in blocks], np.int64),
                    np.array([location.slot for _, location in blocks], np.int64),
                    np.array([location.generation for _, location in blocks], np.uint64),
                )
            )
        return LoadPlan(self._prefix, list(self._hashes[start : start + count]), reads)

    def offer(self, start: int, count: int) -> Offer:
        """Who has ``count`` blocks from index ``start``, as `available` just said."""
        slots = self._slots()[start : start + count]
        source = np.zeros(count, np.int64)
        own = self._session.description
        # What our node has just lost counts as its own all the same: it will be a failed block.
        numbers: dict[Source, int] = {(own.node, own.kind) if own is not None else ("", ""): 0}
        for position in np.flatnonzero(slots < 0).tolist():
            location = self._remote.get(position + start)
            if location is not None:
                peer = self._peers[location.node, location.region]
                source[position] = numbers.setdefault((peer.node, peer.kind), len(numbers))
        sources = list(numbers)
        return Offer(source, sources, [self._rates.get(source, 0.0) for source in sources], own is not None)

    def _slots(self) -> npt.NDArray[np.int64]:
        """Slots in our own node that hold their block at this moment, -1 for the others."""
        return np.where(self._session.still(self._local), self._local.slots, -1)

    def close(self, hits: int) -> None:
        """The engine has decided: report what it looked up and that ``hits`` leading blocks were there. Idempotent."""
        if not self._closed:
            self._closed = True
            chain = [self._prefix + block_hash for block_hash in self._hashes[:LOOKED_KEYS_MAX]]
            if chain:
                self._session.send(Looked(chain, min(hits, len(chain))))

    def _fetching(self, seconds: float) -> None:
        """Our node needs so much longer, since it fetches blocks from disk or object store."""
        self._deadline += min(seconds, self._fetch_seconds)

    def _answered(self, missing: list[int], located: Located | None) -> None:
        if located is not None:
            self._peers = {(peer.node, peer.region): peer for peer in located.peers}
            self._rates = {(peer.node, peer.kind): rate for peer, rate in zip(located.peers, located.rates, strict=True)}
            self._remote = {
                index: location
                for index, location in zip(missing, located.locations, strict=True)
                if location is not None and (location.node, location.region) in self._peers
            }
        self._waiting = False
