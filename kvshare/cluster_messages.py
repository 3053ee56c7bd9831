"""The messages between nodes and the directory; `kvshare.messages` says what all messages have in common.

* `ToDirectory`   node -> directory (authenticated TCP)
* `FromDirectory` directory -> node
"""

from __future__ import annotations

from typing import Union

from kvshare.keys import Namespace
from kvshare.messages import Message
from kvshare.places import GroupPlan, Location, NodeDescription, Stored, WarmItem
from kvshare.purge import NodePurge, PurgeScope

# --- node -> directory ----------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """First message of a node; again whenever its description changes (a new region). ``capable``: it may be asked
    to `Host`."""

    version: int
    node: NodeDescription
    capable: bool


class Publish(Message, frozen=True):
    """What changed since sequence - 1. ``full``: forget what you had of me, this is all (sequence starts anew at it);
    a long inventory comes as one full message and ordinary ones behind it. ``free_bytes``: room that is left for more, without
    pushing anything out."""

    node: str
    epoch: int
    sequence: int
    full: bool
    stored: list[Stored]
    removed: list[bytes]
    free_bytes: int


class Find(Message, frozen=True):
    """Answered by `Found`."""

    ask: int
    keys: list[bytes]


class Report(Message, frozen=True):
    """Chains that engines looked up: ``keys`` in order of the chain, ``weight`` lookups (decayed counts add up)."""

    chains: list[list[bytes]]


class Declare(Message, frozen=True):
    """An engine of this namespace attached here. Answered by `Declared`."""

    ask: int
    namespace: Namespace


class AskPlan(Message, frozen=True):
    """What should this node pull to be warm for ``family``? Answered by `Plan`, with ``group`` (it would take part in one) up
    to ``warm_gather_seconds`` later."""

    ask: int
    family: bytes
    bytes_max: int
    seconds_max: float
    group: bool


class Hosted(Message, frozen=True):
    """Answer to `Host`: the donor's plan, or none where it refuses."""

    ask: int
    group: GroupPlan | None


class Leave(Message, frozen=True):
    """I am about to end: have what only I hold taken by others, within ``seconds``. Answered by `Left`. From now on I get no
    plans and nothing to take, and nobody is sent to me for what others have as well."""

    ask: int
    seconds: float


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
    """I am alive."""


class AskDirectory(Message, frozen=True):
    """Answered by `DirectoryStatus`."""

    ask: int


ToDirectory = Union[Join, Publish, Find, Report, Declare, AskPlan, Hosted, Leave, Taken, AskPurge, Erased, Beat, AskDirectory]


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
    """Answer to the first `Join`: who is here, and the purges that this node missed. The node then publishes everything
    else."""

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
    """Your sequence has a gap: publish everything."""


class Found(Message, frozen=True):
    """Locations of each key, best first; empty where unknown."""

    ask: int
    locations: list[list[Location]]


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


FromDirectory = Union[
    Welcome, Erase, PurgeDone, NodeJoined, NodeLost, Resync, Found, Declared, Plan, Host, Take, Left, DirectoryStatus
]
