"""Reads through NIXL: between memories of any kind, by the best wire that UCX finds (RDMA, CUDA IPC, process-to-process, TCP).

    owner: register ──> description.memory (agent, metadata) ──directory──> reader: connect, find out the lane, read portions

Serving costs the owner nothing but a sleeping thread: bytes are read from its memory. So only its tables can refuse a read: a
host region is served while a word in its table's first page says so, a device region while its generations are even; whoever
takes a device region away retires its generations first (`kvshare.device.DeviceTable.retire_all`).

What NIXL does not do is done here: a deadline (it never reports a stopped peer), a fence (a transfer that is given up goes on
writing: see `nixl_landing`), checks (see `nixl_reads`), a new connection to a peer that restarted. A peer that failed is left
alone for a second. Bytes land directly in memory that was registered with `register_targets`, where the lane allows it.

Threads: a read's portions are done by a few threads of ours and by whoever waits for it; by the latter alone, if
nothing can be done side by side.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import msgspec
import numpy as np

from kvshare import native, processes
from kvshare.device import STRIDE
from kvshare.errors import TransportError
from kvshare.places import DEVICE, ProcessMemory
from kvshare.region import HEADER, SUPERBLOCK_BYTES, Region, table_bytes
from kvshare.transport import ranges
from kvshare.transport.base import BlockStatus, ReadRequest, Transfer, Transport, failed
from kvshare.transport.nixl_agent import DRAM, Agent, Registration, available
from kvshare.transport.nixl_errors import NixlError, PeerDead
from kvshare.transport.nixl_landing import Landing, Registered
from kvshare.transport.nixl_lane import Cancelled, Hung, Lane, Route, has_rdma
from kvshare.transport.nixl_near import read_near
from kvshare.transport.nixl_reads import PORTION_BYTES, PORTION_BYTES_NEAR, PORTION_BYTES_VRAM, SERVED_OFFSET, Portion, Read
from kvshare.transport.workers import Workers

if TYPE_CHECKING:
    from kvshare.device import DeviceTable
    from kvshare.places import RegionDescription

__all__ = ["NixlTransport", "available"]

log = logging.getLogger("kvshare")

THREADS_MAX = 128  # over all reads: a peer that hangs keeps its threads for as long as its reads allow
FAILURE_SECONDS = 1.0
FAILURES_MAX = 1000  # remembered


class _Made(NamedTuple):
    """What there is once it is needed."""

    agent: Agent
    landing: Landing
    registered: Registered


class _Served:
    """A region that is registered, with what keeps it mapped."""

    def __init__(self, registrations: list[Registration], memory: ProcessMemory, kept: object) -> None:
        self.registrations, self.memory, self.kept = registrations, memory, kept


class NixlTransport(Transport):
    """See the module's docstring. ``host``: `kvshare.transport.choose.host_id`, for tables that can be mapped. ``tcp``: read by
    UCX's TCP as well: it is slow, and a reader that dies in the middle can end the *owner's* process.

    The agent is made with the first region, target or read; where that fails reads are UNREACHABLE, and `register` raises
    NixlMissing (ask `available` before).
    """

    name: ClassVar[str] = "nixl"

    def __init__(self, host: str = "", tcp: bool = False) -> None:
        self._host, self._tcp = host, tcp
        self._pid_space = processes.pid_space()
        self._made: _Made | None = None
        self._served: dict[int, _Served] = {}  # by address of the first page
        # Once served, for ever mapped: peers may still read by what they know, and over TCP a read of memory that is gone would
        # end this process.
        self._former: list[object] = []
        self._routes: dict[tuple[str, int], Route] = {}  # by node and region
        self._lanes: dict[str, Lane] = {}  # by agent
        self._failures: dict[str, tuple[float, str]] = {}  # by agent: until when it is left alone, and why
        self._pool = Workers("kvshare-nixl", THREADS_MAX)
        self._running: set[Read] = set()
        self._lock = threading.Lock()
        self._maker: threading.Thread | None = None
        self._missing: NixlError | None = None  # why there is no agent
        self._closed = False

    def _ours(self, seconds: float | None = None) -> _Made:
        """The agent and what belongs to it, made in a thread of its own when it is first needed: that may take seconds.

        Raises:
            NixlMissing: it cannot be made. Hung: it is not ready in ``seconds``. Cancelled: we are closed.
        """
        made = self._made
        if made is not None:
            return made
        with self._lock:
            if self._closed:
                raise Cancelled("transport nixl is closed")
            if self._maker is None:
                self._maker = threading.Thread(target=self._make, name="kvshare-nixl-start", daemon=True)
                self._maker.start()
        self._maker.join(seconds)
        if self._made is None:
            raise self._missing or Hung("NIXL is still starting")
        return self._made

    def _make(self) -> None:
        try:
            agent = Agent()
            self._made = _Made(agent, Landing(agent), Registered(agent))
        except NixlError as error:
            self._missing = error

    # --- serving ------------------------------------------------------------------------------------------------------

    def register(self, region: Region) -> None:
        """Serve a region of which this process is the owner. All of it is registered, also what has no memory yet: without RDMA
        that pins nothing, with RDMA it takes the memory. Raises NixlError."""
        if region.data_address in self._served:
            return
        agent, pid = self._ours().agent, os.getpid()
        slot_bytes = (region.slot_bytes,)
        data = region.data_address, region.slots * region.slot_bytes
        table = region.table_address - SUPERBLOCK_BYTES, table_bytes(region.slots)
        places = (region.data_address,), slot_bytes, slot_bytes, region.table_address, HEADER.itemsize
        memory = ProcessMemory(pid, processes.started(pid), processes.pid_space(), DRAM, 0, *places)
        self._serve(memory, [agent.register([data, table])], region)
        self._say_served(region, True)

    def register_memory(self, memory: ProcessMemory, slots: int, table: DeviceTable | None = None) -> ProcessMemory:
        """Serve a device region, of so many slots; returns ``memory`` with what peers need to reach it. ``table``: for peers
        that cannot map its file; its address is filled in. The pages stay mapped as long as this transport lives. Raises
        NixlError."""
        agent = self._ours().agent
        registrations = [agent.register(ranges.extents(memory, slots), memory.kind, memory.device)]
        if table is not None:
            memory = msgspec.structs.replace(memory, table_address=table.table_address, table_stride=STRIDE)
            registrations.append(agent.register([(table.table_address, slots * STRIDE)]))
        return self._serve(memory, registrations, table)

    def _serve(self, memory: ProcessMemory, registrations: list[Registration], kept: object) -> ProcessMemory:
        agent = self._ours().agent
        memory = msgspec.structs.replace(memory, agent=agent.name, metadata=agent.metadata(registrations))
        with self._lock:
            self._served[memory.bases[0]] = _Served(registrations, memory, kept)
        return memory

    def memory_of(self, region: Region) -> ProcessMemory | None:
        """What a description of this region must say, if it is registered here."""
        served = self._served.get(region.data_address)
        return served.memory if served is not None else None

    def deregister(self, region: Region) -> None:
        """Running and later reads of it find that it is not served."""
        if region.data_address in self._served:
            self._say_served(region, False)
            self._withdraw(region.data_address)

    def deregister_memory(self, memory: ProcessMemory) -> None:
        """Stop serving a device region, whose generations have been retired. Unknown: nothing."""
        self._withdraw(memory.bases[0])

    def _withdraw(self, address: int) -> None:
        with self._lock:
            served = self._served.pop(address, None)
            if served is not None:
                self._former.append(served.kept)
        if served is not None:
            for registration in served.registrations:
                self._ours().agent.deregister(registration)

    def _say_served(self, region: Region, served: bool) -> None:
        assert region.headers.flags.writeable  # else it is another's
        native.store_generation(region.table_address - SUPERBLOCK_BYTES + SERVED_OFFSET, int(served))

    # --- targets ------------------------------------------------------------------------------------------------------

    def register_targets(self, address: int, length: int, kind: str = DRAM, device: int = 0) -> None:
        """Blocks may land directly in this memory, which stays mapped until `deregister_targets`. Other host memory is filled
        by a copy; VRAM has to be registered. Raises NixlError."""
        self._ours().registered.add(address, length, kind, device)

    def deregister_targets(self, address: int, length: int) -> None:
        """No read into it may be running."""
        if self._made is not None:
            self._made.registered.remove(address, length)

    def quarantined(self) -> list[tuple[int, int]]:
        """Callers' memory (address, length) that must not be used yet: a transfer into VRAM was given up and is not over."""
        return self._made.landing.quarantined() if self._made is not None else []

    @property
    def registrations(self) -> int:
        """How many pieces of memory NIXL has registered for us."""
        return self._made.agent.registrations if self._made is not None else 0

    # --- reading ------------------------------------------------------------------------------------------------------

    def reaches(self, description: RegionDescription) -> bool:
        """No longer, once its lane was refused."""
        memory = description.memory
        if memory is None or not memory.agent or not memory.metadata:
            return False
        if not self._tcp and memory.pid_space != self._pid_space and not has_rdma():
            return False  # what is left is TCP
        return not math.isinf(self._failures.get(memory.agent, (0.0, ""))[0])

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        read = Read(self, description, request)
        with self._lock:
            closed = self._closed
            if not closed:
                self._running.add(read)
        if closed:
            read.complete(failed(request, BlockStatus.CANCELLED, "transport nixl is closed"))
        elif read.portions == 0:
            read.finish()
        elif read.portions > 1:
            for _ in range(read.threads):
                self._pool.submit(read.run)
        return read

    def portion_bytes(self, description: RegionDescription) -> tuple[int, bool]:
        """For reads: how much of a large one is done at once, and whether one thread is to do it all."""
        memory = description.memory
        lane = self._lanes.get(memory.agent) if memory is not None else None
        if memory is None or lane is None or description.kind != DEVICE:
            return PORTION_BYTES, False
        if memory.kind != DRAM:
            return PORTION_BYTES_VRAM, False
        return (PORTION_BYTES_NEAR, True) if lane.inline else (PORTION_BYTES, False)

    def submit(self, task: Callable[[], None]) -> None:
        """For reads: have it done by a thread of ours."""
        self._pool.submit(task)

    def finished(self, read: Read) -> None:
        """For reads: this one is complete."""
        with self._lock:
            self._running.discard(read)

    def portion(
        self,
        description: RegionDescription,
        request: ReadRequest,
        transfer: Transfer,
        statuses: np.ndarray[tuple[int], np.dtype[np.uint8]],
        start: int,
        stop: int,
    ) -> int:
        """For reads: blocks ``start`` to ``stop``; returns how many are OK. Raises OSError, KVShareError: none is."""
        agent, landing, registered = self._made or self._ours(request.seconds)
        route, lane = self._way(description)
        if landing.abandoned and landing.hangs(route.agent):
            raise TransportError(f"node {description.node!r} hangs: it is left alone until its last transfer is over")
        try:
            agent.hold(route.connection)
            try:
                if not lane.name:
                    lane.find_out(route, transfer, request.seconds)
                    self._accept(description.node, lane)
                ok = read_near(lane, route, registered, transfer, request, statuses, start, stop)
                if ok is not None:
                    return ok
                portion = Portion(lane, route, landing, registered, transfer, self.tamper)
                return portion.read(request, statuses, start, stop)
            finally:
                agent.let_go(route.agent)
        except PeerDead as error:
            self._failed(description.node, route.agent, str(error))
            raise

    def _way(self, description: RegionDescription) -> tuple[Route, Lane]:
        """How to read this region. Raises OSError, KVShareError."""
        route = self._routes.get((description.node, description.region))
        if route is not None and (route.description is description or route.description == description):
            lane = self._lanes.get(route.agent)
            if lane is not None:
                return route, lane
        return self._make_way(description)

    def _make_way(self, description: RegionDescription) -> tuple[Route, Lane]:
        memory = description.memory
        if memory is None or not memory.agent:
            raise TransportError(f"node {description.node!r} does not serve region {description.region} through NIXL")
        until, failure = self._failures.get(memory.agent, (0.0, ""))
        if time.monotonic() < until:
            raise TransportError(f"left alone after a failure: {failure}")
        agent, landing, _ = self._ours()
        key, route = (description.node, description.region), Route(description, memory, self._host)
        with self._lock:
            former = self._routes.get(key)
            self._routes[key] = route
            lane = self._lanes.setdefault(memory.agent, Lane(agent, landing, memory))
        if former is not None and former.agent != memory.agent:
            self._drop_unused(former.agent)
        return route, lane

    def _accept(self, node: str, lane: Lane) -> None:
        """Raises TransportError: we do not want to read by this lane."""
        if lane.name != "tcp" or self._tcp:
            log.info("kvshare: node %s is read through NIXL by %s", node, lane.name)
            return
        error = "UCX has nothing but TCP to it, by which a reader that dies can end its process"
        self._failed(node, lane.peer, error, math.inf)
        raise TransportError(f"node {node!r} is not read through NIXL: {error}; see docs/decisions/0009-nixl.md")

    def _drop_unused(self, agent: str) -> None:
        """Disconnect an agent to which no route leads any more."""
        with self._lock:
            used = any(route.agent == agent for route in self._routes.values())
            if not used:
                self._lanes.pop(agent, None)
        if not used:
            self._ours().agent.disconnect(agent)

    def _failed(self, node: str, agent: str, error: str, seconds: float = FAILURE_SECONDS) -> None:
        """A peer cannot be read: it is left alone for a while, then connected anew."""
        with self._lock:
            first = agent not in self._failures
            self._failures[agent] = (time.monotonic() + seconds, error)
            if len(self._failures) > FAILURES_MAX:
                del self._failures[next(iter(self._failures))]
            for key in [key for key, route in self._routes.items() if route.agent == agent]:
                del self._routes[key]
        self._drop_unused(agent)
        if first:
            log.warning("kvshare: node %s cannot be read through NIXL, its blocks are misses: %s", node, error)

    def lanes(self) -> dict[str, tuple[str, float]]:
        """By node: the lane that UCX chose, and GB/s of the last large transfer."""
        with self._lock:
            ways = [(key[0], self._lanes.get(route.agent)) for key, route in self._routes.items()]
        return {node: (lane.name, lane.gb_per_second) for node, lane in ways if lane is not None and lane.name}

    # --- the end ------------------------------------------------------------------------------------------------------

    def forget(self, node: str) -> None:
        with self._lock:
            gone = {key: route.agent for key, route in self._routes.items() if key[0] == node}
            for key, agent in gone.items():
                del self._routes[key]
                self._failures.pop(agent, None)
        for agent in set(gone.values()):
            self._drop_unused(agent)

    def close(self) -> None:
        """End everything; idempotent. Not to be called by a transfer's callback."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for read in running:
            read.cancel()
            read.wait()
        self._pool.close()
        if self._maker is not None:
            self._maker.join()
        with self._lock:
            made, self._made = self._made, None
        if made is None:
            return
        for address in list(self._served):
            kept = self._served[address].kept
            if isinstance(kept, Region):
                self._say_served(kept, False)
        made.registered.clear()
        made.landing.close()
        made.agent.close()
        with self._lock:
            self._served.clear()
            self._former.clear()
            self._routes.clear()
            self._lanes.clear()
