"""The reference transport: regions of one process, found in a registry. Public, for tests of what is built on transports.

network = Network()
owner, reader = LoopbackTransport(network, node="a"), LoopbackTransport(network)
owner.register(region)
reader.read(region.describe("a", host_id="", endpoint=""), request).wait()
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

from kvshare.errors import TransportError
from kvshare.transport.mapped import MappedTransport

if TYPE_CHECKING:
    from kvshare.places import RegionDescription
    from kvshare.slots import Region


class Network:
    """What the transports of one simulated cluster share: regions by node and region id."""

    def __init__(self) -> None:
        self._regions: dict[tuple[str, int], Region] = {}
        self._lock = threading.Lock()

    def add(self, node: str, region: Region) -> None:
        with self._lock:
            self._regions[node, region.region] = region

    def remove(self, node: str, region: Region) -> None:
        with self._lock:
            self._regions.pop((node, region.region), None)

    def find(self, node: str, region: int) -> Region | None:
        with self._lock:
            return self._regions.get((node, region))


class LoopbackTransport(MappedTransport):
    """Reads regions that were registered, under the name of ``node``, with a transport of the same network."""

    name: ClassVar[str] = "loopback"

    def __init__(self, network: Network, node: str = "", threads: int = 2) -> None:
        super().__init__(threads)
        self._network = network
        self._node = node

    def register(self, region: Region) -> None:
        self._network.add(self._node, region)

    def deregister(self, region: Region) -> None:
        self._network.remove(self._node, region)

    def reaches(self, description: RegionDescription) -> bool:
        return self._network.find(description.node, description.region) is not None

    def region_of(self, description: RegionDescription) -> Region:
        region = self._network.find(description.node, description.region)
        if region is None:
            raise TransportError(f"node {description.node!r} serves no region {description.region}")
        return region

    def forget(self, node: str) -> None:
        """Nothing is kept of a node."""
