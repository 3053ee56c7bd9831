"""The enabled transports of a process, in order of preference, and which of them reads which region.

    Transports ──> shm      (a node's arena: same host, same user, same memory file system)
               ├─> process  (an engine's KV cache in host memory: same host, same user, same pid namespace)
               └─> tcp      (everybody else's arena, who knows the secret)

Which one was chosen for a region is said once and kept for `paths`.

Threads: all methods from any thread.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from kvshare import processes
from kvshare.transport.base import BlockStatus, ReadRequest, Transfer, Transport, failed
from kvshare.transport.process import ProcessTransport
from kvshare.transport.shm import ShmTransport
from kvshare.transport.tcp import TcpTransport

if TYPE_CHECKING:
    from kvshare.config import Settings
    from kvshare.places import RegionDescription
    from kvshare.slots import Region

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
    there is no tcp.

    Raises:
        ConfigError: it cannot listen on ``settings.bind``.
    """

    def __init__(self, settings: Settings, host: str, serve: bool = False) -> None:
        self._transports: list[Transport] = []
        self._chosen: dict[tuple[str, int], tuple[RegionDescription, Transport | None]] = {}  # by node and region
        self._lock = threading.Lock()
        for name in settings.transports:
            if name == "shm":
                self._transports.append(ShmTransport(host))
            elif name == "process":
                self._transports.append(ProcessTransport())
            elif settings.secret:
                bind = settings.bind if serve else ""
                self._transports.append(TcpTransport(settings.secret, bind, settings.tcp_streams))

    def register(self, region: Region) -> None:
        for transport in self._transports:
            transport.register(region)

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
        """How regions are read from here: node and kind of region -> name of the transport, "none" where there is none."""
        with self._lock:
            chosen = list(self._chosen.values())
        return {(region.node, region.kind): "none" if way is None else way.name for region, way in chosen}

    def _path(self, description: RegionDescription) -> Transport | None:
        """The transport that reads this region; chosen anew when its description, or what a transport can, has changed."""
        key = (description.node, description.region)
        known = self._chosen.get(key)
        if known is not None and known[0] == description and (known[1] is None or known[1].reaches(description)):
            return known[1]
        transport = next((one for one in self._transports if one.reaches(description)), None)
        with self._lock:
            self._chosen[key] = (description, transport)
        if known is None or known[1] is not transport:
            way = f"over {transport.name}" if transport is not None else "by no transport"
            log.info("kvshare: the %s region of %s is read %s", description.kind, description.node, way)
        return transport

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
