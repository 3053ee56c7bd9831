"""The messages between nodes and the directory; `kvshare.messages` says what all messages have in common.

* `ToDirectory`   node -> directory (authenticated TCP)
* `FromDirectory` directory -> node
"""

from __future__ import annotations

from typing import Union

from kvshare.keys import Namespace
from kvshare.messages import Message
from kvshare.places import GroupPlan, Location, NodeDescription, Stored, WarmItem

# --- node -> directory ----------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """First message of a node; again whenever its description changes (a new region). ``capable``: it may be asked
    to `Host`."""

    version: int
    node: NodeDescription
    capable: bool


class Publish(Message, frozen=True):
    """What changed since sequence - 1. ``full``: forget what you had of me, this is all (sequence starts anew at it);
    a long inventory comes as one full message and ordinary ones behind it."""

    node: str
    epoch: int
    sequence: int
    full: bool
    stored: list[Stored]
    removed: list[bytes]


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


class Beat(Message, frozen=True):
    """I am alive."""


class AskDirectory(Message, frozen=True):
    """Answered by `DirectoryStatus`."""

    ask: int


ToDirectory = Union[Join, Publish, Find, Report, Declare, AskPlan, Hosted, Beat, AskDirectory]


# --- directory -> node ----------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """Answer to the first `Join`: who is here. The node then publishes everything."""

    epoch: int  # of the directory
    nodes: list[NodeDescription]


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


class DirectoryStatus(Message, frozen=True):
    ask: int
    epoch: int
    nodes: list[NodeDescription]
    keys: int
    counters: dict[str, int]


FromDirectory = Union[Welcome, NodeJoined, NodeLost, Resync, Found, Declared, Plan, Host, DirectoryStatus]
