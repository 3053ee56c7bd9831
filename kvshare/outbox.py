"""What one shard of the directory has to be told by one node, in order, message by message, as the connection takes them.

    resync ──> the inventory, piece by piece ─╮
    changed ─> what came and went             ├─> next() ─> Publish, Report, what was posted
    looked ──> chains that engines looked up  │
    post ────> answers that come behind ──────╯

Nothing of what the node holds is told before the shard asks for its inventory (`resync`), and nothing of it is remembered when
the connection ends (`forget`). An inventory is read as it is sent, and what changes meanwhile comes behind it: the last word on
a block is the newest. A block that came and went before its turn is not told of at all. Whoever changes faster than the
connection takes does not grow without limit: beyond `PENDING_BLOCKS_MAX` the changes are thrown away, and a gap in the sequence
has the shard ask for the inventory when it is our turn.

What has been told is kept in an index of this one node, so that heartbeats carry its sums and a shard that knows something else
finds out (`beat`).

Pure. Threads: none; one caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from kvshare.cluster_messages import Beat, Publish, Report
from kvshare.fingerprints import ALL_PARTS, PARTS, hashes_of, part_of, shard_of
from kvshare.index import Index
from kvshare.keys import PREFIX_BYTES
from kvshare.messages import Message
from kvshare.places import Stored
from kvshare.runs import Seen, gathered, keys_of

PUBLISH_BLOCKS_MAX = 4096  # of one message, and looked at for it
PENDING_BLOCKS_MAX = 1 << 18  # changes that wait for the connection
REPORT_KEYS_MAX = 1 << 16  # of looked up chains that wait, the latest ones: the sample is good enough


class Outbox:
    """See the module's docstring.

    node: its name. new_index: makes an empty one. seed: `kvshare.fingerprints.index_seed`. inventory: all that the node holds,
    for every shard; it may change while it is read, but what came since is told by `changed` as well. shard, of ``shards``:
    which of its keys belong here; `changed` and `looked` are given no others.
    """

    def __init__(
        self,
        node: str,
        new_index: Callable[[], Index],
        seed: int,
        inventory: Callable[[], Iterator[Stored]],
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        self._node = node
        self._new_index = new_index
        self._index = new_index()  # what has been told
        self._seed = seed
        self._inventory = inventory
        self._shard, self._shards = shard, shards
        self._stored: dict[bytes, Stored] = {}
        self._removed: dict[bytes, None] = {}
        self._chains: deque[Seen] = deque()
        self._chain_keys = 0
        self._posted: deque[Iterator[Message]] = deque()
        self._giving: Iterator[Stored] | None = None  # the inventory that is under way
        self._parts = self._anew = 0  # of it: what it is about, and what is still to be said to be so
        self._open = False  # has the shard asked?
        self._gap = False  # something was thrown away, and this is to be said
        self._refused = False  # the index did not take all: its sums say nothing
        self.sequence = 0
        self.counters = {"publishes": 0, "resyncs": 0, "overflows": 0, "malformed": 0}

    @property
    def given(self) -> bool:
        """Has the shard been told all that it asked for?"""
        return self._open and self._giving is None

    @property
    def idle(self) -> bool:
        """Nothing waits to be told."""
        waits = self._stored or self._removed or self._chains or self._posted or self._gap
        return self._giving is None and not waits

    # --- what happens -------------------------------------------------------------------------------------------------

    def changed(self, stored: Iterable[Stored], removed: Iterable[bytes]) -> None:
        """These blocks came, those went before."""
        if not self._open:
            return  # the inventory will say so
        for key in removed:
            self._stored.pop(key, None)
            self._removed[key] = None
        for block in stored:
            self._removed.pop(block.key, None)  # it has moved
            self._stored[block.key] = block
        if len(self._stored) + len(self._removed) > PENDING_BLOCKS_MAX:
            self._overflow()

    def looked(self, seen: Seen) -> None:
        """Engines looked this up."""
        self._chains.append(seen)
        self._chain_keys += len(seen.keys)
        while self._chain_keys > REPORT_KEYS_MAX:
            self._chain_keys -= len(self._chains.popleft().keys)

    def post(self, messages: Iterable[Message]) -> None:
        """To be sent behind all that has changed up to now; they may be made as they are taken."""
        self._posted.append(iter(messages))

    def resync(self, parts: int) -> None:
        """The shard asks for these parts of the inventory (bits)."""
        self.counters["resyncs"] += 1
        parts = (parts | self._parts if self._open else ALL_PARTS) & ALL_PARTS
        if parts == ALL_PARTS:
            self._stored.clear()  # all in the inventory
            self._removed.clear()
            self._refused = self._gap = False
            self._index = self._new_index()
        else:
            self._index.drop(self._node, parts)
        self._giving, self._parts, self._anew, self._open = self._inventory(), parts, parts, True

    def forget(self) -> None:
        """The connection is gone, and with it all that its shard knew. What was looked up waits for the next one."""
        self._stored.clear()
        self._removed.clear()
        self._posted.clear()
        self._giving, self._parts, self._anew = None, 0, 0
        self._open = self._gap = self._refused = False
        self._index = self._new_index()

    # --- what is told -------------------------------------------------------------------------------------------------

    def next(self, epoch: int, free_bytes: int) -> Message | None:
        """The next message, None when nothing is left to be told. ``epoch``, ``free_bytes``: of the node, now."""
        if self._gap:
            self._gap = False
            self.sequence += 1  # the one that never comes
            return self._publish(epoch, free_bytes)
        if self._giving is not None:
            return self._give(epoch, free_bytes)
        while self._stored or self._removed:
            removed = self._told(list(islice(self._removed, PUBLISH_BLOCKS_MAX)))
            stored = [self._stored.pop(key) for key in list(islice(self._stored, PUBLISH_BLOCKS_MAX))]
            if stored or removed:
                return self._publish(epoch, free_bytes, stored, removed)
        if self._chains:
            chains = list(self._chains)
            self._chains.clear()
            self._chain_keys = 0
            return Report(chains)
        while self._posted:
            message = next(self._posted[0], None)
            if message is not None:
                return message
            self._posted.popleft()
        return None

    def beat(self) -> Beat:
        """A heartbeat: it tells what the shard must know by now, unless an inventory is under way."""
        if not self.given or self._refused:
            return Beat(self.sequence, b"")
        return Beat(self.sequence, self._index.digests(self._node).astype("<u8").tobytes())

    def _give(self, epoch: int, free_bytes: int) -> Publish:
        """The next piece of the inventory."""
        assert self._giving is not None
        looked_at = list(islice(self._giving, PUBLISH_BLOCKS_MAX))
        anew, self._anew = self._anew, 0
        stored = self._asked_for(looked_at)
        if len(looked_at) < PUBLISH_BLOCKS_MAX:
            self._giving, self._parts = None, 0
        return self._publish(epoch, free_bytes, stored, [], anew)

    def _asked_for(self, blocks: list[Stored]) -> list[Stored]:
        """Those that belong to this shard and to the parts that it asks for."""
        if self._shards == 1 and self._parts == ALL_PARTS:
            return blocks
        blocks = [block for block in blocks if len(block.key) > PREFIX_BYTES]  # what is shorter is no key
        keys = keys_of(block.key for block in blocks)
        wanted = np.ones(len(blocks), np.bool_)
        if self._shards > 1:
            wanted &= shard_of(keys, self._seed, self._shards) == self._shard
        if self._parts != ALL_PARTS:
            asked = np.array([self._parts >> part & 1 for part in range(PARTS)], np.bool_)
            wanted &= asked[part_of(hashes_of(keys, self._seed))]
        return [blocks[i] for i in np.flatnonzero(wanted).tolist()]

    def _told(self, keys: list[bytes]) -> list[bytes]:
        """Take these from those to be removed; returns the ones that the shard was told of."""
        for key in keys:
            del self._removed[key]
        # A stable sort: a chain stays one. What is too short is no key, and was never told of.
        ordered = sorted((key for key in keys if len(key) > PREFIX_BYTES), key=_prefix_of)
        known = self._index.holds(self._node, keys_of(ordered))
        return [ordered[i] for i in np.flatnonzero(known).tolist()]

    def _publish(
        self, epoch: int, free_bytes: int, stored: Sequence[Stored] = (), removed: Sequence[bytes] = (), anew: int = 0
    ) -> Publish:
        self.sequence += 1
        self.counters["publishes"] += 1
        runs = gathered(stored)
        if not all(run.well_formed() for run in runs):  # an engine told nonsense: the shard would not have us any more
            self.counters["malformed"] += 1
            runs = [run for run in runs if run.well_formed()]
        gone = keys_of(removed)
        self._index.remove(self._node, gone)
        self._refused |= self._index.add(self._node, runs) > 0
        more = self._giving is not None
        return Publish(self._node, epoch, self.sequence, anew, more, runs, gone, free_bytes)

    def _overflow(self) -> None:
        """Begin again: the shard has us give our inventory when it is our turn."""
        self.counters["overflows"] += 1
        posted = list(self._posted)
        self.forget()
        self._posted.extend(posted)  # whoever waits for them is answered all the same
        self._gap = True


def _prefix_of(key: bytes) -> tuple[bytes, int]:
    return key[:PREFIX_BYTES], len(key)
