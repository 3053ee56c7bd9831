"""The enabled transports of a process, in order of preference, and which of them reads which region.

    Transports ──> shm      (a node's arena: same host, same user, same memory file system)
               ├─> process  (an engine's KV cache in host memory: same host, same user, same pid namespace)
               ├─> nixl     (GPU memory by CUDA IPC or RDMA; host memory of other hosts by RDMA)
               └─> tcp      (everybody else's arena, who knows the secret, and their disks)

Which one was chosen for a region is said once and kept for `paths`. NIXL is optional: where it is needed and cannot be used,
that is said once, with the reason, and the others carry on. For host memory without RDMA it is passed over, since over plain
TCP it is slower than `tcp`, unless it is the first in ``settings.transports``.

Threads: all methods from any thread.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from kvshare import processes
from kvshare.transport.base import BlockStatus, ReadRequest, Transfer, Transport, failed
from kvshare.transport.nixl import NixlTransport, available
from kvshare.transport.nixl_lane import has_rdma
from kvshare.transport.process import ProcessTransport
from kvshare.transport.ranges import extents
from kvshare.transport.shm import ShmTransport
from kvshare.transport.tcp import TcpTransport

if TYPE_CHECKING:
    from kvshare.config import Settings
    from kvshare.device import DeviceTable
    from kvshare.places import ProcessMemory, RegionDescription
    from kvshare.slots import Region
    from kvshare.transport.tcp_server import MayRead
    from kvshare.transport.tcp_staged import Staged

log = logging.getLogger("kvshare")

MEMORY_FILES = "/dev/shm"


def host_id() -> str:
    """Equal in two processes exactly when one can map the other's arena: same boot of the same kernel, same user, same memory
    file system. Containers that share ``/dev/shm`` (``--ipc=host``) are one host in this sense, others are not."""
    try:
        device = os.stat(MEMORY_FILES).st_dev
    except OSError:
        device = 0
    return f"{processes.boot_id()}-{device}-{os.getuid()}"


class Transports:
    """Hands each read to the first transport that reaches its region.

    host: `host_id` of this process. serve: listen for peers' reads (of a node; sessions only read). Without a secret
    there is no tcp. may_read: may a block of this key be sent to a reader that stands in that region? None: any may.

    Raises:
        ConfigError: it cannot listen on ``settings.bind``.
    """

    def __init__(self, settings: Settings, host: str, serve: bool = False, may_read: MayRead | None = None) -> None:
        self._transports: list[Transport] = []
        self._chosen: dict[tuple[str, int], tuple[RegionDescription, Transport | None]] = {}  # by node and region
        self._lock = threading.Lock()
        self._nixl_missing_said = False
        self._may_read = may_read
        self._nixl: NixlTransport | None = None
        self._nixl_for_hosts = settings.transports[0] == "nixl" or has_rdma()
        self._process = "process" in settings.transports
        for name in settings.transports:
            if name == "nixl":
                # Over plain TCP a reader that dies can take the owner along (decision 9): only if the user insists.
                self._nixl = NixlTransport(host, tcp=settings.transports[0] == "nixl")
                self._transports.append(self._nixl)
            elif name == "shm":
                self._transports.append(ShmTransport(host))
            elif name == "process":
                self._transports.append(ProcessTransport())
            elif settings.secret:
                bind = settings.bind if serve else ""
                pace = settings.tcp_bytes_per_second
                self._transports.append(
                    TcpTransport(settings.secret, bind, settings.tcp_streams, 0, pace, settings.region, may_read)
                )

    def register(self, region: Region) -> None:
        """Serve a region of which this process is the owner."""
        for transport in self._transports:
            if transport is not self._nixl:
                transport.register(region)
        # Who reads by NIXL asks nobody: not where some tenants' blocks are not for all.
        if self._nixl is not None and self._nixl_for_hosts and self._may_read is None and self._nixl_works():
            self._nixl.register(region)

    def register_staged(self, source: Staged) -> None:
        """Serve a region that is no memory, as a disk region, until we close: only tcp can."""
        for transport in self._transports:
            if isinstance(transport, TcpTransport):
                transport.register_staged(source)

    def memory_of(self, region: Region) -> ProcessMemory | None:
        """How a registered region is addressed in this process, for its description; None when nobody reads it so."""
        return self._nixl.memory_of(region) if self._nixl is not None else None

    def expose(self, memory: ProcessMemory, slots: int, table: DeviceTable | None) -> ProcessMemory | None:
        """Serve an engine's KV cache of so many blocks: ``memory`` with all that peers need; None when nobody could read it.
        ``table``: of its generations, if this process has it."""
        if self._nixl is not None and (memory.kind != "DRAM" or self._nixl_for_hosts) and self._nixl_works():
            return self._nixl.register_memory(memory, slots, table)
        return memory if memory.kind == "DRAM" and self._process else None

    def lands_directly(self, description: RegionDescription) -> bool:
        """Can blocks of this region be read into GPU memory?"""
        return self._nixl is not None and self._path(description) is self._nixl

    def register_targets(self, memory: ProcessMemory, slots: int) -> None:
        """Blocks may be read into this GPU memory. Raises NixlError."""
        assert self._nixl is not None
        for address, length in extents(memory, slots):
            self._nixl.register_targets(address, length, memory.kind, memory.device)

    def quarantined(self) -> list[tuple[int, int]]:
        """Registered GPU memory (address, length) to which reads that were given up may still write."""
        return self._nixl.quarantined() if self._nixl is not None else []

    def deregister(self, region: Region) -> None:
        for transport in self._transports:
            transport.deregister(region)

    def endpoint(self) -> str:
        """Where peers read from us ("host:port"); empty when nothing listens."""
        return next((endpoint for transport in self._transports if (endpoint := transport.endpoint())), "")

    def reaches(self, description: RegionDescription) -> bool:
        return self._path(description) is not None

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        """As `Transport.read`; a region that no transport reaches is `UNREACHABLE`."""
        transport = self._path(description)
        if transport is not None:
            return transport.read(description, request)
        transfer = Transfer()
        transfer.complete(failed(request, BlockStatus.UNREACHABLE, f"no transport reaches node {description.node!r}"))
        return transfer

    def paths(self) -> dict[tuple[str, str], str]:
        """How regions are read from here: node and kind of region -> name of the transport ("none" where there is none), and of
        NIXL the wire that UCX chose, since it falls back silently."""
        with self._lock:
            chosen = list(self._chosen.values())
        ways = {(region.node, region.kind): "none" if way is None else way.name for region, way in chosen}
        lanes = self._nixl.lanes() if self._nixl is not None else {}
        return {
            where: f"{way} by {lanes[where[0]][0]}" if way == "nixl" and where[0] in lanes else way
            for where, way in ways.items()
        }

    def _path(self, description: RegionDescription) -> Transport | None:
        """The transport that reads this region; chosen anew when its description, or what a transport can, has changed."""
        key = (description.node, description.region)
        known = self._chosen.get(key)
        if known is not None and known[0] == description and (known[1] is None or known[1].reaches(description)):
            return known[1]
        able = [one for one in self._transports if one.reaches(description) and (one is not self._nixl or self._nixl_works())]
        transport = able[0] if able else None
        if transport is self._nixl and len(able) > 1 and not self._nixl_for_hosts:
            transport = able[1]  # only memory that several reach: a host's
        with self._lock:
            self._chosen[key] = (description, transport)
        if known is None or known[1] is not transport:
            way = f"over {transport.name}" if transport is not None else "by no transport"
            log.info("kvshare: the %s region of %s is read %s", description.kind, description.node, way)
        return transport

    def _nixl_works(self) -> bool:
        """Asked only where it is needed: finding out takes a good part of a second."""
        reason = available()
        if reason and not self._nixl_missing_said:
            self._nixl_missing_said = True
            others = ", ".join(one.name for one in self._transports if one is not self._nixl) or "nothing"
            log.warning("kvshare: NIXL cannot be used here (%s); falling back to %s", reason, others)
        return not reason

    def forget(self, node: str) -> None:
        """A node is gone: drop what any transport keeps for it."""
        with self._lock:
            for key in [key for key in self._chosen if key[0] == node]:
                del self._chosen[key]
        for transport in self._transports:
            transport.forget(node)

    def close(self) -> None:
        """End all reads and listeners; idempotent."""
        for transport in self._transports:
            transport.close()
