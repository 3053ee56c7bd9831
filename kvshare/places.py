"""Where blocks lie: what nodes, regions and locations look like to those who are told of them. Parts of messages.

NodeDescription ── its RegionDescriptions (── ProcessMemory)
Location = (node, region, slot, generation, length)
GroupPlan: where nodes meet that are given blocks together
"""

from __future__ import annotations

import msgspec

GROUP_RANKS_MAX = 64
GROUP_PORTION_BYTES_MAX = 1 << 30


class Location(msgspec.Struct, frozen=True, array_like=True):
    """Where a block was when we last heard: a slot of a region of a node, and its generation."""

    node: str
    region: int
    slot: int
    generation: int
    length: int  # bytes
    expires: int = 0  # second since 2020 from which on nobody may read it; 0: no end. A copy of it ends then at the latest


class Stored(msgspec.Struct, frozen=True, array_like=True, gc=False):  # nodes hold millions, the collector need not look
    """A block that its node holds: `Location` without the node, which the message around it names."""

    key: bytes
    region: int
    slot: int
    generation: int
    length: int
    expires: int = 0


def located(node: str, block: Stored) -> Location:
    """Where ``node`` holds that block."""
    return Location(node, block.region, block.slot, block.generation, block.length, block.expires)


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


HOST, DEVICE, DISK = "host", "device", "disk"  # kinds of regions


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
    label: str = ""  # where it stands (setting 'region'): tenants may be bound to such regions

    @property
    def is_engine(self) -> bool:
        """Is this an engine's KV cache, which its host's node exposes, rather than a node?"""
        return any(region.kind == DEVICE for region in self.regions)

    def kind_of(self, region: int) -> str:
        """Of one of its regions; empty where it has no such region (any more)."""
        return next((known.kind for known in self.regions if known.region == region), "")

    def may_be_read_from(self, host_id: str) -> bool:
        """Is there any way, as far as descriptions tell, from that host?"""
        agent = any(region.memory is not None and region.memory.agent for region in self.regions)
        return self.host_id == host_id or bool(self.endpoint) or agent


class WarmItem(msgspec.Struct, frozen=True, array_like=True):
    """One block of a warm plan: read ``location``, keep it under ``key``."""

    key: bytes
    location: Location


class GroupPlan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one rank must know of its group (`kvshare.transport.group`). The same for all but ``rank``, 0 for
    the donor.

    group: random id. endpoint: "host:port" of the donor's board. backend: "gloo" (host memory, TCP) or "nccl" (through GPUs).
    join_seconds: within which all ranks must have come, the first import of torch included. seconds: longest time without
    progress afterwards, that is for one portion. portion_bytes: moved at a time; every rank has two buffers of it.

    Raises:
        ValueError: a value is impossible; when decoded, msgspec's ValidationError.
    """

    group: bytes
    endpoint: str
    ranks: int
    rank: int = 0
    backend: str = "gloo"
    join_seconds: float = 30.0
    seconds: float = 5.0
    portion_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        faults = {
            f"a group has 2 to {GROUP_RANKS_MAX} ranks, not {self.ranks}": not 2 <= self.ranks <= GROUP_RANKS_MAX,
            f"rank {self.rank} is none of {self.ranks}": not 0 <= self.rank < self.ranks,
            f"backend {self.backend!r} is neither 'gloo' nor 'nccl'": self.backend not in ("gloo", "nccl"),
            "a group's limits of time must be positive": not (self.join_seconds > 0 and self.seconds > 0),
            f"portions of {self.portion_bytes} bytes are impossible": not 0 < self.portion_bytes <= GROUP_PORTION_BYTES_MAX,
            "a group's id has 16 bytes": len(self.group) != 16,
        }
        wrong = [fault for fault, found in faults.items() if found]
        if wrong:
            raise ValueError("; ".join(wrong))

    def for_rank(self, rank: int) -> GroupPlan:
        """The same group's plan for another rank. Raises ValueError."""
        return msgspec.structs.replace(self, rank=rank)
