"""What nodes hold, as they tell it: in sequence, in turn, and compared now and then.

    join, gap, drift ─> wanted ─> in line, first come first served ─> its turn: Resync(parts)
                                                                        │
    Publish ─┬─ in sequence: taken                                      v
             ├─ a gap: everything is wanted, often     Publish(anew, more) ... Publish ─> the next one's turn
             │         only after a pause                │
             └─ no inventory yet: ignored                │
    Beat ────── digests that differ: their parts are     └ nothing for `INVENTORY_SECONDS`: the next one's turn, then again
                wanted, each time after a longer pause

At most `INVENTORIES_MAX` tell what they hold at one time, so that a hundred nodes that start at once, or find their directory
back, are heard one after the other while questions are answered. A node that waits for its turn is known to be alive; its
blocks are misses, or found where they were when they were last told: a stale place costs its reader one failed validation.

The newest word of a node about a block holds, whatever its generation: each slot counts for itself, so a block that moved may
well have a lower one. A node that lies costs its readers failed validations, never a wrong byte.

What a dead node held is gone at once; its memory comes back step by step, with ticks (`Index.sweep`).

A pure state machine, part of the directory's: time is an argument. Threads: none; one caller.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvshare.cluster_messages import Beat, Publish, Resync
from kvshare.directory_events import Command, Send, Tell
from kvshare.fingerprints import ALL_PARTS, PARTS
from kvshare.index import LOCATIONS_PER_KEY, Index
from kvshare.members import Misbehaved, Peer, require_keys

INVENTORIES_MAX = 4  # that are told at one time
INVENTORY_SECONDS = 5.0  # without a word of it, and it is the next one's turn
TURN_SECONDS_MAX = 60.0  # then others are asked as well, what still comes is taken nevertheless
GAP_SECONDS = (1.0, 32.0)  # waited after another gap: first, longest; doubled as long as they come within twice the longest
REPAIR_SECONDS = (10.0, 640.0)  # from one repair of a node to the next: first, longest; doubled as long as it differs
AT_ONCE = -math.inf
SWEEP_PAUSE_SECONDS = 0.001  # between two steps: others are heard


@dataclass
class _Want:
    """A node that is to tell what it holds of these parts, not before ``earliest``."""

    peer: Peer
    parts: int
    earliest: float


@dataclass
class _Turn:
    """A node that tells what it holds of these parts. ``begun``: it does so; another word of it comes until ``deadline``, and
    its turn lasts until ``end`` at most."""

    peer: Peer
    parts: int
    deadline: float
    end: float
    begun: bool = False


class Inventories:
    """See the module's docstring. Index and counters are the directory's; ``keys_max``: what its index can hold."""

    def __init__(self, index: Index, counters: Counter[str], keys_max: int) -> None:
        self._index = index
        self._counters = counters
        self._keys_max = keys_max
        self._waiting: OrderedDict[int, _Want] = OrderedDict()  # by connection
        self._turns: dict[int, _Turn] = {}  # by connection
        self._sweep_at: float | None = None

    @property
    def waiting(self) -> int:
        """How many nodes wait for their turn."""
        return len(self._waiting)

    def deadlines(self) -> Iterator[float]:
        """When `tick` has something to do."""
        yield from (turn.deadline for turn in self._turns.values())
        if len(self._turns) < INVENTORIES_MAX:
            yield from (want.earliest for want in self._waiting.values())
        if self._sweep_at is not None:
            yield self._sweep_at

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = [f"connection {each} waits for its turn and has it" for each in self._waiting.keys() & self._turns.keys()]
        if len(self._turns) < INVENTORIES_MAX and any(want.earliest == AT_ONCE for want in self._waiting.values()):
            problems.append(f"{len(self._waiting)} nodes wait for their turn, and {len(self._turns)} have theirs")
        for connection, turn in self._turns.items():
            if turn.parts == ALL_PARTS and (turn.peer.sequence is None) == turn.begun:
                problems.append(f"the inventory of connection {connection} is confused")
        return problems

    # --- events -------------------------------------------------------------------------------------------------------

    def want(self, peer: Peer, parts: int, now: float, earliest: float = AT_ONCE) -> list[Command]:
        """Have this node tell what it holds of these parts, in its turn. All parts: until then nothing else that it tells is
        taken."""
        if parts == ALL_PARTS:
            peer.sequence = None
        self._turns.pop(peer.connection, None)
        known = self._waiting.get(peer.connection)
        self._waiting[peer.connection] = _Want(peer, parts if known is None else parts | known.parts, earliest)
        return self._next(now)

    def publish(self, peer: Peer, publish: Publish, now: float) -> list[Command]:
        """Raises Misbehaved."""
        node = peer.description
        assert node is not None
        _require_well_formed(publish, node.node)
        self._counters["publishes"] += 1
        if publish.anew == ALL_PARTS and publish.epoch == node.epoch:
            self.forget(node.node, now)
            self._waiting.pop(peer.connection, None)  # who was not asked yet has good reasons
            self._turns[peer.connection] = _Turn(peer, ALL_PARTS, now, now + TURN_SECONDS_MAX, begun=True)
            peer.refused = False
        elif peer.sequence is None:
            return []
        elif publish.epoch != node.epoch or publish.sequence != peer.sequence + 1:
            return self._gap(peer, now)
        elif publish.anew:
            self.forget(node.node, now, publish.anew)
        peer.sequence, peer.free_bytes = publish.sequence, publish.free_bytes
        self._index.remove(node.node, publish.removed)
        refused = self._index.add(node.node, publish.stored)
        return self._refuse(peer, refused) + self._told(peer, publish, now)

    def beat(self, peer: Peer, beat: Beat, now: float) -> list[Command]:
        """A node says how far it has published, and perhaps what it holds. Raises Misbehaved."""
        assert peer.description is not None
        if len(beat.digests) not in (0, 8 * PARTS):
            raise Misbehaved(f"sent digests of {len(beat.digests)} bytes, not {8 * PARTS}")
        if peer.sequence is None or peer.connection in self._waiting or peer.connection in self._turns:
            return []
        if beat.sequence != peer.sequence:
            return self._gap(peer, now)
        if not beat.digests or peer.refused or now < peer.repair_after:
            return []
        differing = np.frombuffer(beat.digests, "<u8") != self._index.digests(peer.description.node)
        if not differing.any():
            peer.repair_pause = 0.0
            return []
        first, longest = REPAIR_SECONDS
        peer.repair_pause = min(max(first, 2 * peer.repair_pause), longest)
        peer.repair_after = now + peer.repair_pause
        parts = np.flatnonzero(differing).tolist()
        self._counters["drift"] += 1
        said = f"{len(parts)} of {PARTS} parts of what {peer.name} holds differ from what is known: it tells them anew"
        return [Tell(said), *self.want(peer, sum(1 << part for part in parts), now)]

    def leave(self, peer: Peer, now: float) -> list[Command]:
        """A connection is gone; what its node held is forgotten."""
        self._waiting.pop(peer.connection, None)
        self._turns.pop(peer.connection, None)
        if peer.description is not None:
            self.forget(peer.description.node, now)
        return self._next(now)

    def forget(self, name: str, now: float, parts: int = ALL_PARTS) -> None:
        """Nothing that this node held in these parts is there any more."""
        if name in self._index.nodes():
            self._index.drop(name, parts)
            self._sweep_at = now + SWEEP_PAUSE_SECONDS

    def tick(self, now: float) -> list[Command]:
        """Time has passed: turns that are not used end, and some memory is taken back."""
        for connection in [each for each, turn in self._turns.items() if turn.deadline <= now]:
            turn = self._turns.pop(connection)
            self._counters["inventories_late"] += 1
            if turn.parts == ALL_PARTS and not turn.begun:
                self._waiting[connection] = _Want(turn.peer, ALL_PARTS, AT_ONCE)
            # Else what comes of it yet is taken, and what does not shows in the digests.
        if self._sweep_at is not None and self._sweep_at <= now:
            self._sweep_at = now + SWEEP_PAUSE_SECONDS if self._index.sweep() else None
        return self._next(now)

    # --- how ----------------------------------------------------------------------------------------------------------

    def _next(self, now: float) -> list[Command]:
        """Those whose turn it is are asked."""
        commands: list[Command] = []
        while len(self._turns) < INVENTORIES_MAX:
            connection = next((each for each, want in self._waiting.items() if want.earliest <= now), None)
            if connection is None:
                break
            want = self._waiting.pop(connection)
            self._turns[connection] = _Turn(want.peer, want.parts, now + INVENTORY_SECONDS, now + TURN_SECONDS_MAX)
            self._counters["resyncs"] += 1
            commands.append(Send(connection, Resync(want.parts)))
        return commands

    def _told(self, peer: Peer, publish: Publish, now: float) -> list[Command]:
        """If this belongs to an inventory: is it all of it?"""
        turn = self._turns.get(peer.connection)
        if turn is None:
            return []
        turn.begun = turn.begun or publish.anew & turn.parts == turn.parts
        if not turn.begun:
            return []
        turn.deadline = min(now + INVENTORY_SECONDS, turn.end)
        if publish.more:
            return []
        del self._turns[peer.connection]
        return self._next(now)

    def _gap(self, peer: Peer, now: float) -> list[Command]:
        """Something that it published got lost. Once that is bad luck; who makes it a habit waits."""
        first, longest = GAP_SECONDS
        often = now - peer.gap_at <= 2 * longest
        earliest = now + peer.gap_pause if often else AT_ONCE
        peer.gap_at, peer.gap_pause = now, min(2 * peer.gap_pause, longest) if often else first
        self._counters["gaps"] += 1
        said = f"something that {peer.name} published got lost: it tells anew all that it holds"
        return [Tell(said), *self.want(peer, ALL_PARTS, now, earliest)]

    def _refuse(self, peer: Peer, refused: int) -> list[Command]:
        if not refused:
            return []
        peer.refused = True
        self._counters["refused"] += refused
        if self._counters["refused"] > refused:
            return []
        if len(self._index) < self._keys_max and self._index.locations() < LOCATIONS_PER_KEY * self._keys_max:
            return [Tell(f"{refused} blocks of {peer.name} lie in slots or places beyond what an index can number: not shared")]
        full = f"the directory has no room for all blocks of {peer.name} ('index_keys_max' is {self._keys_max})"
        return [Tell(f"{full}: more blocks are not shared; raise it, or use more shards")]


def _require_well_formed(publish: Publish, name: str) -> None:
    """Raises Misbehaved."""
    if publish.node != name:
        raise Misbehaved(f"publishes for {publish.node}")
    require_keys(publish, publish.removed)
    require_keys(publish, (run.keys for run in publish.stored))
    if not all(run.well_formed() for run in publish.stored):
        raise Misbehaved("sent a Publish with a malformed run: columns of unequal length, or generations that are odd")
    if not 0 <= publish.anew <= ALL_PARTS:
        raise Misbehaved(f"sent a Publish of parts {publish.anew:#x}, which there are not")
