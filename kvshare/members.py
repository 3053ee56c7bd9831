"""Who is connected to the directory, and which of them are nodes that joined. Shared by the parts of `kvshare.directory`.

Threads: none; one caller.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

from kvshare.gate import TenantRegions
from kvshare.keys import tenant_of
from kvshare.messages import Message
from kvshare.places import NodeDescription
from kvshare.runs import Keys


class Misbehaved(Exception):
    """The connection broke the protocol; the text says how."""


class Peer:
    """A connection and, once it joined, its node."""

    def __init__(self, connection: int, heard: float) -> None:
        self.connection = connection
        self.heard = heard
        self.description: NodeDescription | None = None
        self.capable = False  # of being a group's donor
        self.free_bytes = 0  # as of its last publish
        # Of what it holds (`kvshare.inventories`):
        self.sequence: int | None = None  # of its last publish that was taken; None: only a whole inventory will do
        self.refused = False  # some of it found no room: what is known differs from what it holds
        self.repair_pause = 0.0  # seconds: how long the last repair was to hold
        self.repair_after = -math.inf  # not repaired again before that
        self.gap_at = -math.inf  # when its sequence had a gap last
        self.gap_pause = 0.0  # seconds: how long the next one is going to wait

    @property
    def name(self) -> str:
        """For a line of the log."""
        return f"connection {self.connection}" if self.description is None else f"node {self.description.node}"


class Members:
    """``peers`` by connection, longest unheard first; ``nodes``: those that joined, by name. Written by the directory only.
    ``tenants``: the regions that they are bound to; None: nobody is."""

    def __init__(self, tenants: TenantRegions | None = None) -> None:
        self._tenants = tenants if tenants is not None and tenants.bound else None
        self.peers: OrderedDict[int, Peer] = OrderedDict()
        self.nodes: dict[str, Peer] = {}

    def description(self, name: str) -> NodeDescription:
        """Of a node that is here; the index names no others."""
        description = self.nodes[name].description
        assert description is not None
        return description

    def at(self, connection: int) -> NodeDescription:
        """The node that joined on this connection."""
        description = self.peers[connection].description
        assert description is not None
        return description

    def may_hold(self, node: NodeDescription, key: bytes) -> bool:
        """May this node have blocks of that key, by where it stands and what the tenant allows? Of a key its prefix will do."""
        return self._tenants is None or self._tenants.may_be_in(tenant_of(key), node.label)

    def heard(self, peer: Peer, now: float) -> None:
        peer.heard = now
        self.peers.move_to_end(peer.connection)

    def heard_all(self, since: float) -> None:
        """Nobody shall count as unheard of for longer than since then."""
        for peer in self.peers.values():
            peer.heard = max(peer.heard, since)

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = []
        for name, peer in self.nodes.items():
            if self.peers.get(peer.connection) is not peer:
                problems.append(f"node {name} has no connection")
            if peer.description is None or peer.description.node != name:
                problems.append(f"node {name} is described as {peer.description}")
        joined = sum(peer.description is not None for peer in self.peers.values())
        if joined != len(self.nodes):
            problems.append(f"{joined} connections joined, {len(self.nodes)} nodes are known")
        heard = [peer.heard for peer in self.peers.values()]
        if heard != sorted(heard):
            problems.append("connections are out of the order in which they were heard")
        return problems


def require_keys(message: Message, keys: Iterable[Keys]) -> None:
    """Raises Misbehaved."""
    if not all(each.well_formed() for each in keys):
        raise Misbehaved(f"sent a {type(message).__name__} with keys of a length that no key has")
