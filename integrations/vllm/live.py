"""The engine's own KV cache as a device region: which of its blocks peers may read, and under which keys.

    step ──> begin: blocks handed out become unreadable, and are no longer told of
         ──> completing: blocks that this step completes, if it comes back
         ──> sent
    the step is back ──> returned: those blocks, unless handed out meanwhile, become readable and are told of

vLLM writes to a block only in steps that were sent after it was handed out. So a block is unreadable before anything may write
to it, and readable when nothing will: freed blocks stay readable until somebody else gets them.

Steps come back in the order in which they were sent, several may be under way (asynchronous scheduling, pipelines).

What changed is told a moment later, by a thread of its own: right after a step its request's token is on its way, and whoever
hears of blocks would take the processor from that.

Threads: the scheduler's, the one that tells, and the session's, in which the node has blocks withdrawn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvshare.device import DeviceTable, completed, tag_of
from kvshare.keys import FAMILY_BYTES
from kvshare.messages import Expose, Message, Shown
from kvshare.places import Stored

TELL_SECONDS = 0.02  # what happens within it is told together


class Teller(Protocol):
    """What this needs of a `kvshare.session.Session`."""

    connections: int

    def send(self, message: Message) -> bool: ...


class Completing(NamedTuple):
    """Blocks (int64 [n]) that a step completes, the keys of what is in them and their tags, and the generations (odd) under
    which they are written."""

    keys: list[bytes]
    tags: npt.NDArray[np.uint64]
    blocks: npt.NDArray[np.int64]
    begun: npt.NDArray[np.uint64]


class Exposure:
    """One shard's region: ``offer``, how it is exposed to a node that does not know it; ``family`` of its keys."""

    def __init__(self, offer: Expose, teller: Teller, family: bytes) -> None:
        self._offer = offer
        self._teller = teller
        self._family = family
        self._connection = 0  # to which the region was exposed

    def tell(self, places: Mapping[bytes, Place], stored: Mapping[bytes, Place], gone: Sequence[bytes]) -> None:
        """The node hears what changed; one that does not know the region yet hears everything (``places``)."""
        connection = self._teller.connections
        if connection != self._connection:
            if not self._teller.send(self._offer):
                return
            self._connection, stored, gone = connection, places, []
        region, length = self._offer.region, self._offer.slot_bytes
        blocks = [Stored(self._key(key), region, place.block, place.generation, length) for key, place in stored.items()]
        self._teller.send(Shown(blocks, [self._key(key) for key in gone]))

    def _key(self, key: bytes) -> bytes:
        return self._family + key[FAMILY_BYTES:]


class Place(NamedTuple):
    """Where a block is: vLLM's number of it, and the generation under which it is complete."""

    block: int
    generation: int


class LiveCache:
    """See the module's docstring. Keys are those of shard 0; one table serves all ranks."""

    def __init__(self, table: DeviceTable, exposures: Sequence[Exposure]) -> None:
        self._table = table
        self._exposures = list(exposures)
        self._keys: dict[int, bytes] = {}  # of readable blocks
        self._places: dict[bytes, Place] = {}  # of readable blocks; of equal ones the latest
        self._gone: list[bytes] = []  # not yet told to be gone
        self._came: set[bytes] = set()  # not yet told
        self._changing = threading.Lock()
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._tell_all, name="kvshare-live", daemon=True)
        self._thread.start()
        self._now: list[Completing] = []
        self._under_way: deque[list[Completing]] = deque()  # one for each step that is not back

    def begin(self, block_ids: Sequence[int]) -> None:
        """These blocks may be written to by the step that is being made, or by a load that it begins."""
        if not block_ids:
            return
        with self._changing:
            self._table.begin(block_ids)
            for block_id in block_ids:
                key = self._keys.pop(block_id, None)
                place = self._places.get(key) if key is not None else None
                if key is not None and place is not None and place.block == block_id:
                    del self._places[key]
                    self._gone.append(key)

    def completing(self, block_keys: list[bytes], block_ids: Sequence[int]) -> None:
        """Once the step that is being made is back, these blocks hold what these keys say."""
        blocks = np.array(block_ids, np.int64)
        tags = np.array([tag_of(key) for key in block_keys], np.uint64)
        self._now.append(Completing(block_keys, tags, blocks, self._table.generations(blocks)))

    def sent(self) -> None:
        """The step goes to the workers."""
        self._under_way.append(self._now)
        self._now = []
        if self._gone:
            self._changed.set()

    def returned(self) -> None:
        """The step that was sent first of those under way is back."""
        if not self._under_way:
            return
        for done in self._under_way.popleft():
            with self._changing:
                held = self._table.finish(done.blocks, done.begun, done.tags)
                generations = completed(done.begun, done.tags).tolist()
                for i in np.flatnonzero(held).tolist():
                    block_id, key = int(done.blocks[i]), done.keys[i]
                    self._keys[block_id] = key
                    self._places[key] = Place(block_id, generations[i])
                    self._came.add(key)
            self._changed.set()

    def reset(self) -> None:
        """What is in the cache is nobody's any more."""
        self._table.retire_all()
        with self._changing:
            self._gone += self._places
            self._keys.clear()
            self._places.clear()
        for step in self._under_way:
            step.clear()
        self._changed.set()

    def withdraw(self, keys: Sequence[bytes]) -> None:
        """These were purged, in any shard: nobody else may read them any more, whatever the engine does. Any thread."""
        named = {key[FAMILY_BYTES:] for key in keys}
        with self._changing:
            for block, key in [(block, key) for block, key in self._keys.items() if key[FAMILY_BYTES:] in named]:
                self._table.begin([block])
                del self._keys[block]
                if self._places.pop(key, None) is not None:
                    self._gone.append(key)
        self._changed.set()

    def flush(self) -> None:
        """Tell now what has changed. Any thread."""
        with self._changing:
            stored = {key: self._places[key] for key in self._came if key in self._places}
            gone = self._gone
            self._came, self._gone = set(), []
            if stored or gone:
                for exposure in self._exposures:
                    exposure.tell(self._places, stored, gone)

    def close(self) -> None:
        """Nothing more is told; idempotent."""
        self._closing.set()
        self._changed.set()
        self._thread.join(timeout=5.0)

    def check(self) -> list[str]:
        """Problems found; empty when all is well."""
        problems = []
        for key, (block, generation) in self._places.items():
            if self._keys.get(block) != key:
                problems.append(f"{key.hex()} is told to be in block {block}, which holds something else")
            if int(self._table.generations([block])[0]) != generation:
                problems.append(f"block {block} is not readable as told")
        return problems

    def _tell_all(self) -> None:
        while not self._closing.is_set():
            self._changed.wait()
            self._changed.clear()
            if not self._closing.wait(TELL_SECONDS):
                self.flush()
