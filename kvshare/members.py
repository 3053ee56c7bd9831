"""Who is connected to the directory, and which of them are nodes that joined. Shared by the parts of `kvshare.directory`.

Threads: none; one caller.
"""

from __future__ import annotations

from collections import OrderedDict

from kvshare.gate import TenantRegions
from kvshare.keys import tenant_of
from kvshare.places import NodeDescription


class Peer:
    """A connection and, once it joined, its node."""

    def __init__(self, connection: int, heard: float) -> None:
        self.connection = connection
        self.heard = heard
        self.description: NodeDescription | None = None
        self.capable = False  # of being a group's donor
        self.sequence: int | None = None  # of its last publish; None: only a full one will do
        self.asked = heard  # when it was last asked for that
        self.free_bytes = 0  # as of its last publish


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
        """May this node have blocks of that key, by where it stands and what the tenant allows?"""
        return self._tenants is None or self._tenants.may_be_in(tenant_of(key), node.label)
