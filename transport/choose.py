"""The enabled transports of a process, in order of preference.

    Transports ──> shm   (same host, same user, same memory file system)
               └─> tcp   (everybody else who knows the secret)

Threads: all methods from any thread.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvshare import processes
from kvshare.transport.base import BlockStatus, ReadRequest, Transfer, Transport, failed
from kvshare.transport.shm import ShmTransport
from kvshare.transport.tcp import TcpTransport

if TYPE_CHECKING:
    from kvshare.config import Settings
    from kvshare.places import RegionDescription
    from kvshare.slots import Region

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
        for name in settings.transports:
            if name == "shm":
                self._transports.append(ShmTransport(host))
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
        return any(transport.reaches(description) for transport in self._transports)

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        """As `Transport.read`; a region that no transport reaches is `UNREACHABLE`."""
        for transport in self._transports:
            if transport.reaches(description):
                return transport.read(description, request)
        transfer = Transfer()
        transfer.complete(failed(request, BlockStatus.UNREACHABLE, f"no transport reaches node {description.node!r}"))
        return transfer

    def forget(self, node: str) -> None:
        """A node is gone: drop what any transport keeps for it."""
        for transport in self._transports:
            transport.forget(node)

    def close(self) -> None:
        """End all reads and listeners; idempotent."""
        for transport in self._transports:
            transport.close()
