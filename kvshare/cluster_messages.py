"""The messages between nodes and the directory; `kvshare.messages` says what all messages have in common.

* `ToDirectory`   node -> directory (authenticated TCP)
* `FromDirectory` directory -> node
"""

from __future__ import annotations

from typing import Union

from kvshare.keys import Namespace
from kvshare.messages import Message
from kvshare.overlap import Held
from kvshare.places import GroupPlan, NodeDescription, WarmItem
from kvshare.purge import NodePurge, PurgeScope
from kvshare.runs import Keys, Places, Run, Seen

PURPOSE = "directory"  # said when a connection to it is made (`kvshare.wire`)

# --- node -> directory ----------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """First message of a node; again whenever its description changes (a new region). ``capable``: it may be asked
    to `Host`. ``shard`` of ``shards``: as which part of the directory it takes the one that it speaks to."""

    version: int
    node: NodeDescription
    capable: bool
    shard: int
    shards: int


class Publish(Message, frozen=True):
    """What changed since sequence - 1: first ``removed``, then ``stored``. ``anew``: a bit for each part of the index of which
    you forget first what you had of me; what I hold there follows, in this message and in those behind it up to the one that
    has no ``more``. The sequence starts anew where all parts do. ``free_bytes``: room that is left for more, without pushing
    anything out."""

    node: str
    epoch: int
    sequence: int
    anew: int
    more: bool
    stored: list[Run]
    removed: list[Keys]
    free_bytes: int


class Find(Message, frozen=True):
    """Where are these keys? Answered by `Found`."""

    ask: int
    keys: list[Keys]


class Report(Message, frozen=True):
    """Chains that engines looked up, once each (decayed counts add up)."""

    chains: list[Seen]


class Declare(Message, frozen=True):
    """An engine of this namespace attached here. Answered by `Declared`."""

    ask: int
    namespace: Namespace


class AskPlan(Message, frozen=True):
    """What should this node pull to be warm for ``family``, first what is of ``tenant`` (a tag, zeros for none)? Answered by
    `Plan`, with ``group`` (it would take part in one) up to ``warm_gather_seconds`` later. ``rates``: bytes per second at which
    it read from nodes' memory lately, where it did."""

    ask: int
    family: bytes
    tenant: bytes
    bytes_max: int
    seconds_max: float
    group: bool
    rates: dict[str, float]


class Hosted(Message, frozen=True):
    """Answer to `Host`: the donor's plan, or none where it refuses."""

    ask: int
    group: GroupPlan | None


class Leave(Message, frozen=True):
    """I am about to end: have what only I hold taken by others, within ``seconds``. Answered by `Left`. From now on I get no
    plans and nothing to take, and nobody is sent to me for what others have as well. ``keys``: what I hold, in the order in
    which I would keep it; with ``more`` it goes on in another `Leave` of the same ``ask``."""

    ask: int
    seconds: float
    keys: list[Keys]
    more: bool


class Taken(Message, frozen=True):
    """Answer to `Take`: what could be taken has been published before."""

    ask: int


class AskPurge(Message, frozen=True):
    """Have all nodes give up what ``scope`` names; ``destroy_key``: and the tenant's key. Answered by `PurgeDone`."""

    ask: int
    scope: PurgeScope
    destroy_key: bool


class Erased(Message, frozen=True):
    """Answer to `Erase`: done, after the last `Publish` of it."""

    number: int
    result: NodePurge


class Beat(Message, frozen=True):
    """I am alive, have published up to ``sequence``, and hold what has these ``digests`` (`kvshare.index.Index.digests`,
    uint64 each; empty: I do not say)."""

    sequence: int
    digests: bytes


class AskDirectory(Message, frozen=True):
    """Answered by `DirectoryStatus`."""

    ask: int


class AskDepths(Message, frozen=True):
    """Who holds how much of this chain (or of its keys that are this shard's)? From anybody, joined or not. Answered by
    `Depths`. Without keys: I am alive."""

    ask: int
    keys: list[Keys]


class AskNamespaces(Message, frozen=True):
    """Of which namespaces have engines attached? From anybody, joined or not. Answered by `Namespaces`."""

    ask: int


ToDirectory = Union[
    Join,
    Publish,
    Find,
    Report,
    Declare,
    AskPlan,
    Hosted,
    Leave,
    Taken,
    AskPurge,
    Erased,
    Beat,
    AskDirectory,
    AskDepths,
    AskNamespaces,
]


# --- directory -> node ----------------------------------------------------------------------------------------------


class Erase(Message, frozen=True):
    """Give up what ``scope`` names, in memory and on disk, and with ``destroy_key`` the tenant's key. Answered by `Erased`."""

    number: int  # of the purge, one for all nodes
    scope: PurgeScope
    destroy_key: bool


class PurgeDone(Message, frozen=True):
    """What each node gave up; ``silent``: nodes that have not answered. They are asked again when they join again."""

    ask: int
    nodes: list[NodePurge]
    silent: list[str]


class Welcome(Message, frozen=True):
    """Answer to the first `Join`: who is here, and the purges that this node missed. The node publishes when it is asked to, by
    `Resync`: so many that start at once do not come at once."""

    epoch: int  # of the directory
    nodes: list[NodeDescription]
    purges: list[Erase]


class NodeJoined(Message, frozen=True):
    """A node joined, restarted (new epoch) or changed its description."""

    node: NodeDescription


class NodeLost(Message, frozen=True):
    """Forget this node."""

    node: str


class Resync(Message, frozen=True):
    """Publish ``parts`` of the index anew (a bit each): it is your turn, your sequence has a gap, or we differ there."""

    parts: int


class Found(Message, frozen=True):
    """Where the first of the keys are; what lies beyond the answer is unknown."""

    ask: int
    places: Places


class Declared(Message, frozen=True):
    """Namespaces of other engines in the cluster that are not this one (at most a few, the nearest first)."""

    ask: int
    others: list[Namespace]


class Plan(Message, frozen=True):
    """Blocks to pull, hottest first; ``present`` more hot blocks are on the asking node already. With ``group``, all of its
    nodes get the same ``items``, which its donor broadcasts; each one may hold some of them already."""

    ask: int
    items: list[WarmItem]
    present: int
    group: GroupPlan | None


class Host(Message, frozen=True):
    """Broadcast ``items``, all of one host region of yours and of one length, to a group of ``ranks``, you included. Answered
    by `Hosted`."""

    ask: int
    ranks: int
    items: list[WarmItem]


class Take(Message, frozen=True):
    """``items`` are held by nobody but a node that leaves: read them into your free room, pushing nothing out, within
    ``seconds``. Answered by `Taken`, whatever came of it."""

    ask: int
    items: list[WarmItem]
    seconds: float


class Left(Message, frozen=True):
    """Answer to `Leave`: no more will be taken. ``moved`` blocks were; ``hottest``: of all others that it holds, a bounded
    number, hottest first. Which of them are elsewhere, `Find` tells: to a node that leaves, only places that stay."""

    ask: int
    moved: int
    hottest: list[bytes]


class DirectoryStatus(Message, frozen=True):
    ask: int
    epoch: int
    nodes: list[NodeDescription]
    keys: int
    counters: dict[str, int]


class Depths(Message, frozen=True):
    """Answer to `AskDepths`, by node: each holds the first of these keys."""

    ask: int
    nodes: dict[str, Held]


class Namespaces(Message, frozen=True):
    """Answer to `AskNamespaces`: the most recently declared, latest last."""

    ask: int
    namespaces: list[Namespace]


FromDirectory = Union[
    Welcome,
    Erase,
    PurgeDone,
    NodeJoined,
    NodeLost,
    Resync,
    Found,
    Declared,
    Plan,
    Host,
    Take,
    Left,
    DirectoryStatus,
    Depths,
    Namespaces,
]
