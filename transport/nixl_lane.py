"""The way to one peer through NIXL, and what is known of each region at its end.

Which wire UCX chose it does not tell, and it falls back to TCP silently: a lane is found out by trying, and named aloud.

Threads: all methods from any thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvshare import processes
from kvshare.device import DeviceTable
from kvshare.errors import TransportError
from kvshare.places import DEVICE, ProcessMemory
from kvshare.transport import ranges
from kvshare.transport.base import U64, Transfer
from kvshare.transport.nixl_agent import DRAM, VRAM, Agent, unpacked
from kvshare.transport.nixl_landing import Landing, Slab

if TYPE_CHECKING:
    from kvshare.places import RegionDescription

PROBE_BYTES = 1 << 20
STEP_BYTES_MIN, STEP_BYTES_MAX = 64 << 10, 64 << 20  # of one transfer, where progress shows only at its end
LEARN_BYTES_MIN = 1 << 20  # that tell of a lane's speed, where it does not matter much
STEP_BYTES_FIRST = 256 << 10
CHECKS_AT_ONCE = 30  # of a transfer, before a thread sleeps between two
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 20e-6, 1e-3
RDMA_DEVICES = Path("/sys/class/infiniband")


def has_rdma() -> bool:
    """Has this host a network card that reads other hosts' memory?"""
    return RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())


class Hung(TransportError):
    """No progress for as long as was allowed."""


class Cancelled(TransportError):
    """The read was cancelled."""


class Lane:
    """The way to one agent: what UCX chose, found out by trying, since it does not tell.

    inline: transfers are over when they are posted, because this process's kernel copies; such a transfer cannot hang.
    """

    def __init__(self, agent: Agent, landing: Landing, memory: ProcessMemory) -> None:
        self.peer = memory.agent
        self.agent = agent
        self.inline = False
        self.name = ""  # until it is known
        self.gb_per_second = 0.0  # of the last transfer large enough to tell
        self._landing = landing
        self._near = memory.pid_space == processes.pid_space()
        self._step_bytes = STEP_BYTES_FIRST
        self._trying = threading.Lock()

    def find_out(self, route: Route, transfer: Transfer, seconds: float) -> None:
        """Connect and see which lane it is. The peer is held by the caller. Errors as `carry`."""
        if not self._trying.acquire(timeout=seconds):
            raise Hung(f"agent {self.peer} does not answer others of our reads either")
        try:
            if self._landing.hangs(self.peer):
                raise Hung(f"agent {self.peer} does not answer others of our reads either")
            if self.name:
                return
            if route.memory.kind == VRAM:  # by what it can be read depends on where to
                self.name = "cuda" if self._near else "rdma or tcp"
            else:
                self._try(route, transfer, seconds)
        finally:
            self._trying.release()

    def _try(self, route: Route, transfer: Transfer, seconds: float) -> None:
        memory = route.memory
        length = min(PROBE_BYTES, memory.strides[0] * (route.slots - 1) + memory.page_bytes[0])
        slab = self._landing.take(length, seconds)
        keep = False
        try:
            local = np.array([[slab.room, length, 0]], np.uint64)
            remote = np.array([[memory.bases[0], length, memory.device]], np.uint64)
            inline = True
            for number in range(4):  # the first one connects; one of the others alone may be over by chance
                if inline:
                    handle = self.agent.request(self.peer, local, remote, (DRAM, memory.kind))
                    inline = self.carry(handle, transfer, seconds, slab, length=length) or number == 0
        except (Hung, Cancelled):
            keep = True
            raise
        finally:
            if not keep:
                self._landing.give(slab)
        self.inline = self._near and inline
        self.name = self._named()

    def _named(self) -> str:
        if self.inline:
            return "self" if self.peer == self.agent.name else "cma"
        return "rdma or tcp" if has_rdma() else "tcp"

    def steps(self, copies: ranges.Spans, seconds: float) -> list[ranges.Spans]:
        """The same copies as transfers that are over, as far as we know, well before ``seconds``."""
        if self.inline or int(copies.lengths.sum()) <= self._step_bytes:
            return [copies]
        step = np.uint64(self._step_bytes)
        pieces = (copies.lengths + step - np.uint64(1)) // step
        of = np.repeat(np.arange(len(pieces)), pieces.astype(np.int64))
        first = np.cumsum(pieces) - pieces
        offsets = (np.arange(len(of), dtype=np.uint64) - first[of]) * step
        lengths = np.minimum(copies.lengths[of] - offsets, step)
        cut = ranges.Spans(copies.targets[of] + offsets, copies.sources[of] + offsets, lengths)
        group = (np.cumsum(lengths) - np.uint64(1)) // step
        bounds = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(lengths)]
        return [ranges.Spans(*(one[a:b] for one in cut)) for a, b in itertools.pairwise(bounds)]

    def carry(
        self,
        handle: int,
        transfer: Transfer,
        seconds: float,
        slab: Slab | None,
        targets: tuple[tuple[int, int], ...] = (),
        length: int = 0,
    ) -> bool:
        """Do a transfer of ``length`` bytes and release it; returns whether it was over when posted. ``slab``, ``targets``:
        what it writes to, ours or a caller's.

        Raises:
            Hung, Cancelled: it is not over: what it writes to is in quarantine now, a slab belongs to that.
            NixlError: it failed, and is over.
        """
        began = time.monotonic()
        try:
            inline = self.agent.post(handle)
            if not inline:
                self._wait(handle, transfer, began + seconds, bool(targets))
        except (Hung, Cancelled) as error:
            self.agent.hold_again(self.peer)
            self._landing.abandon(self.peer, handle, slab, targets, isinstance(error, Hung))
            if isinstance(error, Hung):  # or it was only slower than it used to be
                self._step_bytes = max(self._step_bytes // 4, STEP_BYTES_MIN)
            raise
        except BaseException:
            self.agent.release(handle)
            raise
        self.agent.release(handle)
        if self.inline and not inline:  # not what we took it for
            self.inline, self.name = False, ""
        if length >= (LEARN_BYTES_MIN if inline else STEP_BYTES_MIN):
            self._learn(length, time.monotonic() - began, seconds)
        return inline

    def _wait(self, handle: int, transfer: Transfer, deadline: float, direct: bool) -> None:
        pause, agent = PAUSE_SECONDS_MIN, self.agent
        for checks in itertools.count():
            if agent.done(handle):
                return
            if transfer.cancelled and not direct:  # a caller's memory is not given up while there is hope
                raise Cancelled("cancelled")
            if time.monotonic() > deadline:
                where = "; its targets may still be written to: see quarantined()" if direct else ""
                raise Hung(f"agent {self.peer} does not answer: its process is stopped or the network is down{where}")
            if checks >= CHECKS_AT_ONCE:
                time.sleep(pause)
                pause = min(pause * 1.2, PAUSE_SECONDS_MAX)

    def _learn(self, length: int, took: float, seconds: float) -> None:
        rate = length / max(took, 1e-9)
        self.gb_per_second = rate / 1e9
        self._step_bytes = int(min(max(rate * seconds / 8, STEP_BYTES_MIN), STEP_BYTES_MAX))


class Route:
    """How a described region is read: its places, made ready once.

    Raises:
        TransportError: it cannot be read, for this reason.
    """

    def __init__(self, description: RegionDescription, memory: ProcessMemory, host: str) -> None:
        self.description, self.memory, self.agent = description, memory, memory.agent
        self.device = description.kind == DEVICE
        self.connection = unpacked(memory.metadata)
        if self.connection.agent != memory.agent:
            raise TransportError(
                f"node {description.node!r} describes region {description.region} with another agent's metadata"
            )
        counts = {len(memory.bases), len(memory.strides), len(memory.page_bytes)}
        if len(counts) != 1 or 0 in counts or description.slots < 1 or min(memory.page_bytes) < 1:
            raise TransportError(
                f"node {description.node!r} describes region {description.region} wrongly: its pages do not match"
            )
        self.slots = description.slots
        self.page_bytes = np.array(memory.page_bytes, np.uint64)
        self.slot_bytes = sum(memory.page_bytes)
        self.table: DeviceTable | None = None
        if self.device and description.table_path and description.host_id == host:
            self.table = DeviceTable.open(description.table_path)
            if self.table.slots != self.slots or self.table.slot_bytes != description.slot_bytes:
                raise TransportError(
                    f"node {description.node!r} describes region {description.region} of another size than it has"
                )
        elif memory.table_address == 0:
            raise TransportError(f"region {description.region} of node {description.node!r} has no table that we can read")
        self.available = self.slots if self.device else 0  # of a host region: as far as we have seen, it only grows
        self.lists: dict[int, int] = {}  # prepared ones, by length of a page
        self._lock = threading.Lock()

    def uniform(self, page_bytes: U64) -> int:
        """Length of all pages, if the blocks of both sides are cut alike into pages of one length; else 0."""
        length = int(page_bytes[0])
        if len(page_bytes) == 1:
            return length if len(self.page_bytes) == 1 else 0
        return length if np.array_equal(page_bytes, self.page_bytes) and (page_bytes == length).all() else 0

    def pages(self, lane: Lane, length: int) -> int:
        """The prepared list of its pages of this length: page j of slot s is number ``j * slots + s``. Raises NixlError."""
        prepared = self.lists.get(length)
        if prepared is not None:
            return prepared
        with self._lock:
            if length not in self.lists:
                memory = self.memory
                places = zip(memory.bases, memory.strides, strict=True)
                rows = np.array([[base, length, memory.device, stride, self.slots] for base, stride in places], np.uint64)
                self.lists[length] = lane.agent.prepare_remote(self.agent, rows, memory.kind)
            return self.lists[length]
