"""The control plane's messages: typed, small, MessagePack, decoded by one decoder per channel.

Between a session and its node (a Unix socket within a host), each a tagged union:

* `ToNode`    session -> node
* `ToSession` node -> session

Those between nodes and the directory are in `kvshare.cluster_messages`.

A message that asks carries ``ask`` (a number chosen by the asker, unique on its connection); its answer carries the same.
Messages hold keys, slots and numbers; never block bytes, never anything that is unpickled.

Whoever decodes bytes of others expects `msgspec.MsgspecError`, and `UnicodeDecodeError`: text that is none is not msgspec's
affair.
"""

from __future__ import annotations

from typing import Union

import msgspec

from kvshare.keys import Namespace
from kvshare.places import Location, NodeDescription, ProcessMemory, RegionDescription, Stored
from kvshare.purge import NodePurge, PurgeScope

PROTOCOL_VERSION = 5


class Message(msgspec.Struct, tag=True, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


# --- session -> node ------------------------------------------------------------------------------------------------


class Attach(Message, frozen=True):
    """First message of a session. ``family`` subscribes to the node's blocks of that family (`Indexed`, `Dropped`).
    ``block_bytes`` is the length of the engine's blocks: the node makes a region of that slot size.
    ``warm``: this engine wants the warm plan (its scheduler half says so, its workers do not). ``tenant``: the tag of whose its
    requests are where they do not say, zeros for nobody's: what the plan looks for first."""

    ask: int
    version: int
    engine: str
    namespace: Namespace
    block_bytes: int
    subscribe: bool
    warm: bool
    tenant: bytes


class Locate(Message, frozen=True):
    """Where are these keys, a chain in order? Answered by `Located` in the same order; up to ``patience_seconds`` later if a
    source has to be measured, and up to ``fetch_seconds`` later (said by `Fetching`) if some have to be fetched from disk or
    object store: what that may take to be worth it, 0 where nobody knows."""

    ask: int
    keys: list[bytes]
    patience_seconds: float
    fetch_seconds: float


class Reserve(Message, frozen=True):
    """Give me slots to write these blocks into. Answered by `Reserved`."""

    ask: int
    region: int
    keys: list[bytes]
    length: int  # bytes of every block


class Commit(Message, frozen=True):
    """These reserved slots are written; generations are those of `Reserved` (odd). Answered by `Done`."""

    ask: int
    region: int
    slots: list[int]
    generations: list[int]
    checksums: list[int]


class Abort(Message, frozen=True):
    """These reserved slots will not be written. Not answered."""

    region: int
    slots: list[int]
    generations: list[int]


class Quarantine(Message, frozen=True):
    """These blocks failed verification where they lie: take them out. Not answered."""

    region: int
    slots: list[int]
    generations: list[int]


class Missed(Message, frozen=True):
    """These blocks of peers were not where `Located` said, or could not be read: forget where they were. Not answered."""

    keys: list[bytes]


class Looked(Message, frozen=True):
    """An engine looked these up (a chain, in order; ``hits`` of them were there). Feeds eviction and hotness."""

    keys: list[bytes]
    hits: int


class AskWarm(Message, frozen=True):
    """Is the warm plan of ``family`` done? Answered by `Warm`, at once or when it is done or ``wait_seconds`` are over.
    An empty family means all that this node has ever been asked to warm."""

    ask: int
    family: bytes
    wait_seconds: float


class AskStatus(Message, frozen=True):
    """Answered by `NodeStatus`."""

    ask: int


class Purge(Message, frozen=True):
    """Have every node of the cluster give up what ``scope`` names, and with ``destroy_key`` the tenant's key. Answered by
    `Purged`."""

    ask: int
    scope: PurgeScope
    destroy_key: bool


class Stop(Message, frozen=True):
    """End the node in good order, at once: what only its memory holds is given up."""

    ask: int


class Drain(Message, frozen=True):
    """Hand over what only this node holds, within ``seconds``, then end in good order. ``keep_arena``: leave its files to the
    next node of this name. Answered by `Drained` when all is handed over."""

    ask: int
    seconds: float
    keep_arena: bool


class Expose(Message, frozen=True):
    """An engine's scheduler offers its KV cache as a device region, as long as this session lives: ``region`` is a number that
    is never used again, ``memory`` where its worker has the blocks. Not answered."""

    region: int
    table_path: str
    slots: int
    slot_bytes: int
    memory: ProcessMemory


class Shown(Message, frozen=True):
    """What the exposed region holds now and no longer holds, since the last one. Removals come first. Not answered."""

    stored: list[Stored]
    gone: list[bytes]


ToNode = Union[
    Attach, Locate, Reserve, Commit, Abort, Quarantine, Missed, Looked, AskWarm, AskStatus, Purge, Stop, Drain, Expose, Shown
]


# --- node -> session ------------------------------------------------------------------------------------------------


class Attached(Message, frozen=True):
    """``notices``: one line for each thing that the engine's log should say once, e.g. a namespace that differs."""

    ask: int
    node: NodeDescription
    region: RegionDescription
    notices: list[str]


class Located(Message, frozen=True):
    """One entry per key: none where unknown. ``peers`` describes every region that the locations name; ``rates``: bytes/s that
    this node has measured of each, 0 where it has not."""

    ask: int
    locations: list[Location | None]
    peers: list[RegionDescription]
    rates: list[float]


class Fetching(Message, frozen=True):
    """The answer to ``ask`` takes up to ``seconds`` from now: blocks are being fetched from disk or object store."""

    ask: int
    seconds: float


class Reserved(Message, frozen=True):
    """Slot -1: nothing to write, the block is there, is being written, or there is no room."""

    ask: int
    slots: list[int]
    generations: list[int]


class Done(Message, frozen=True):
    """``count``: how many were accepted."""

    ask: int
    count: int


class Refused(Message, frozen=True):
    """The question cannot be answered; ``reason`` is for people and names the remedy."""

    ask: int
    reason: str


class Warm(Message, frozen=True):
    """State of the warm plan: ``done`` with what it wanted, found already here, pulled (blocks, bytes, from whom)."""

    ask: int
    done: bool
    wanted: int
    present: int
    pulled: int
    bytes_pulled: int
    seconds: float
    donors: dict[str, int]  # node -> blocks pulled from it


class Purged(Message, frozen=True):
    """What each node gave up. ``silent``: sentences, one for each node (or the directory) that did not answer; empty: nothing
    of it is left."""

    ask: int
    nodes: list[NodePurge]
    silent: list[str]


class Drained(Message, frozen=True):
    """Blocks of a node that leaves: ``moved`` to peers, ``kept`` on disk or in the object store, ``lost``: nowhere else."""

    ask: int
    moved: int
    kept: int
    lost: int
    seconds: float


class NodeStatus(Message, frozen=True):
    """``engines``: those whose KV caches are exposed here. ``paths``: "node kind" of regions -> how this node reads
    them."""

    ask: int
    node: NodeDescription
    directory: str  # endpoint it is connected to, or empty
    sessions: int
    counters: dict[str, int]
    engines: list[NodeDescription]
    paths: dict[str, str]


class Indexed(Message, frozen=True):
    """Pushed: this node holds these blocks now (of the family subscribed to)."""

    stored: list[Stored]


class Dropped(Message, frozen=True):
    """Pushed: this node no longer holds these."""

    keys: list[bytes]


class Withdraw(Message, frozen=True):
    """Pushed to an engine that exposes its KV cache: these were purged, nobody may read them there any more."""

    keys: list[bytes]


class PeerLost(Message, frozen=True):
    """Pushed: forget all locations of this node."""

    node: str


ToSession = Union[
    Attached,
    Located,
    Fetching,
    Reserved,
    Done,
    Refused,
    Warm,
    NodeStatus,
    Purged,
    Drained,
    Indexed,
    Dropped,
    Withdraw,
    PeerLost,
]
