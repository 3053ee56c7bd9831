"""Where blocks lie: what nodes, regions and locations look like to those who are told of them. Parts of messages.

NodeDescription ── its RegionDescriptions (── ProcessMemory)
Location = (node, region, slot, generation, length)
"""

from __future__ import annotations

import msgspec


class Location(msgspec.Struct, frozen=True, array_like=True):
    """Where a block was when we last heard: a slot of a region of a node, and its generation."""

    node: str
    region: int
    slot: int
    generation: int
    length: int  # bytes


class Stored(msgspec.Struct, frozen=True, array_like=True):
    """A block that its node holds: `Location` without the node, which the message around it names."""

    key: bytes
    region: int
    slot: int
    generation: int
    length: int


class ProcessMemory(msgspec.Struct, frozen=True, array_like=True):
    """Where a region lies in the memory of the process that holds it, for transports that address it there.

    Page j of slot s: ``page_bytes[j]`` bytes at ``bases[j] + s * strides[j]``; a slot is the concatenation of its pages.
    ``pid`` and ``started`` (start in clock ticks since boot) name one process; ``pid_space`` is equal in two processes when
    one's pid means something to the other. ``table_address``: of slot 0's generation, the next ones follow every
    ``table_stride`` bytes; 0: the table is not mapped in that process. ``agent`` and ``metadata``: name and connection data of
    its NIXL agent, which has all of this registered; empty: it has none.
    """

    pid: int
    started: int
    pid_space: str
    kind: str  # "DRAM", or "VRAM" of GPU number `device`
    device: int
    bases: tuple[int, ...]
    strides: tuple[int, ...]
    page_bytes: tuple[int, ...]
    table_address: int
    table_stride: int
    agent: str = ""
    metadata: bytes = b""


HOST, DEVICE = "host", "device"  # kinds of regions


class RegionDescription(msgspec.Struct, frozen=True, array_like=True):
    """What a peer must know to read a region. ``data_path`` and ``table_path`` serve readers on the same host
    (equal ``host_id``); ``endpoint`` ("host:port") serves the others and is empty when the owner listens on nothing.

    A ``device`` region is an engine's KV cache: its slots are the engine's blocks, its table
    (`kvshare.device.DeviceTable`) has generations and no checksums, and ``memory`` says where it lies.
    """

    node: str
    region: int  # of a host region its slot_bytes: a node has one per slot size
    slot_bytes: int
    slots: int
    host_id: str
    data_path: str
    table_path: str
    endpoint: str
    kind: str = HOST
    memory: ProcessMemory | None = None


class NodeDescription(msgspec.Struct, frozen=True, array_like=True):
    """A node as the cluster knows it. ``epoch`` changes at every start."""

    node: str
    epoch: int
    host_id: str
    endpoint: str  # of its data server; empty: cannot be reached from other hosts
    regions: tuple[RegionDescription, ...]

    @property
    def is_engine(self) -> bool:
        """Is this an engine's KV cache, which its host's node exposes, rather than a node?"""
        return any(region.kind == DEVICE for region in self.regions)

    def may_be_read_from(self, host_id: str) -> bool:
        """Is there any way, as far as descriptions tell, from that host?"""
        agent = any(region.memory is not None and region.memory.agent for region in self.regions)
        return self.host_id == host_id or bool(self.endpoint) or agent


class WarmItem(msgspec.Struct, frozen=True, array_like=True):
    """One block of a warm plan: read ``location``, keep it under ``key``."""

    key: bytes
    location: Location
