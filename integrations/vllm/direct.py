"""Blocks of other GPUs' KV caches, read straight into the pages of ours: what `DevicePages` needs for them besides the mover.

Only blocks of device regions land directly: the transport verifies them by their generations. A node's blocks have a checksum
besides, which the CPU can only verify in its own memory.

A read whose peer falls silent may still write when it has been given up (`NixlTransport.quarantined`). The blocks are the
engine's, which would give them to others as soon as the load is complete. So such a load is held back, however long, until the
read is over, the peer's process dead, or our end: a request that waits is better than another one with wrong bytes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kvshare.integrations.vllm.layout import Layout
from kvshare.loading import LoadPlan, SourceRead
from kvshare.transport.base import BlockStatus, Completion, Transfer

if TYPE_CHECKING:
    from kvshare.places import RegionDescription

log = logging.getLogger("kvshare")
I64 = npt.NDArray[np.int64]


class Direct(Protocol):
    """The mover's ways into GPU memory: `kvshare.transport.choose.Transports`, where the KV cache is registered. Any thread."""

    def lands_directly(self, description: RegionDescription) -> bool:
        """Can blocks of this region be read into the KV cache?"""

    def quarantined(self) -> list[tuple[int, int]]:
        """Our memory (address, length) to which reads that were given up may still write."""


@dataclass(frozen=True, eq=False)
class DirectLoad:
    """Blocks that are to land in their pages, which may be written to when ``mark`` is reached."""

    plan: LoadPlan
    block_ids: list[int]
    mark: Any
    transfer: Transfer = field(default_factory=Transfer)


@dataclass(frozen=True, eq=False)
class Ended:
    """A direct load that has ended, although a read of it may still write."""

    load: DirectLoad
    completion: Completion


class Held:
    """Loads that are held back. Threads: one."""

    def __init__(self, layout: Layout, direct: Direct) -> None:
        self._layout = layout
        self._direct = direct
        self._loads: list[Ended] = []

    def __len__(self) -> int:
        return len(self._loads)

    def add(self, ended: Ended) -> None:
        """Complete it at once if nothing writes to its blocks."""
        self._loads.append(ended)
        self.let_go()
        if ended in self._loads:
            log.warning(
                "kvshare: a request waits for a peer that has stopped in the middle of a read into its blocks: %s",
                ended.completion.error,
            )

    def let_go(self) -> None:
        """Complete the loads to whose blocks nothing writes any more."""
        places = self._direct.quarantined()
        loads, self._loads = self._loads, []
        for ended in loads:
            if self._written_to(ended, places):
                self._loads.append(ended)
            else:
                ended.load.transfer.complete(ended.completion)

    def let_all_go(self) -> None:
        """When the transports are closed."""
        for ended in self._loads:
            ended.load.transfer.complete(ended.completion)
        self._loads = []

    def _written_to(self, ended: Ended, places: list[tuple[int, int]]) -> bool:
        late = np.flatnonzero(may_be_written_to(ended.completion))
        targets = self._layout.targets([ended.load.block_ids[i] for i in late.tolist()])
        starts, ends = targets.addresses, targets.addresses + targets.page_bytes
        return any(
            bool(((starts < np.uint64(address + length)) & (ends > np.uint64(address))).any()) for address, length in places
        )


def may_be_written_to(completion: Completion) -> npt.NDArray[np.bool_]:
    """Which blocks, bool [n]: a read is only given up, and left to end by itself, when it made no progress for too long."""
    return np.equal(completion.statuses, BlockStatus.TIMEOUT)


class Joined(Transfer):
    """Loads of different blocks of a plan as one: each of ``parts`` with the positions of its blocks."""

    def __init__(self, blocks: int, parts: Sequence[tuple[Transfer, I64]]) -> None:
        super().__init__()
        self._statuses = np.full(blocks, BlockStatus.UNREACHABLE, np.uint8)
        self._parts = [transfer for transfer, _ in parts]
        self._ended: list[Completion] = []
        self._joining = threading.Lock()
        self.on_cancel = self._cancel_parts
        for transfer, positions in parts:
            transfer.then(partial(self._part_ended, positions))

    def _cancel_parts(self) -> None:
        for part in self._parts:
            part.cancel()

    def _part_ended(self, positions: I64, completion: Completion) -> None:
        with self._joining:
            self._statuses[positions] = completion.statuses
            self._ended.append(completion)
            last = len(self._ended) == len(self._parts)
        if last:
            error = "; ".join(dict.fromkeys(part.error for part in self._ended if part.error))
            moved, seconds = sum(part.bytes for part in self._ended), max(part.seconds for part in self._ended)
            self.complete(Completion(self._statuses, moved, seconds, error))


def part_of(plan: LoadPlan, reads: list[SourceRead]) -> tuple[LoadPlan, I64]:
    """A plan of these reads' blocks alone, and their positions in ``plan``, int64 [n].

    It has its blocks' share of the seconds, so that it pays or not by itself: a load counts the leading blocks of its plan
    that have arrived, and would never count any if the plan's first one were another part's. Parts run at the same time, so
    all together lose no more than the plan's grace.
    """
    positions = np.sort(np.concatenate([read.positions for read in reads]))
    own = [replace(read, positions=np.searchsorted(positions, read.positions)) for read in reads]
    hashes = [plan.hashes[i] for i in positions.tolist()]
    return replace(plan, hashes=hashes, reads=own, seconds=plan.seconds * len(positions) / len(plan), others=()), positions
