"""What `status` returns: plain data, and a table when printed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NodeState:
    """One Ray node. state: "joined" (the directory knows our node), "starting" (it does not yet, or not at present), "leaving"
    or "left" (it was drained, or its Ray node is about to go), or "failed". reason: why it failed. pid: of the node's process,
    0 when unknown."""

    ray_node: str
    address: str
    node: str
    state: str
    reason: str = ""
    pid: int = 0
    endpoint: str = ""
    sessions: int = 0
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterStatus:
    """A cluster as it is now. keys: blocks that the directory can find, by key. directory: its "host:port", "" when it is
    away (nodes and engines go on); directory_pid: of its process. known: nodes that it knows; nodes: one per living Ray
    node."""

    cluster: str
    directory: str
    directory_pid: int
    keys: int
    nodes: tuple[NodeState, ...]
    known: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def joined(self) -> bool:
        """Has every living Ray node that is not about to go a node that the directory knows?"""
        states = {node.state for node in self.nodes} - {"leaving", "left"}
        return states == {"joined"}

    def __str__(self) -> str:
        head = f"kvshare cluster {self.cluster!r}: directory {self.directory or 'away'}, {self.keys} keys"
        rows = [("node", "state", "endpoint", "sessions", "pid")]
        rows += [
            (node.node, node.state, node.endpoint or node.address, str(node.sessions), str(node.pid or "-"))
            for node in self.nodes
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        reasons = [f"{node.node}: {node.reason}" for node in self.nodes if node.reason]
        return "\n".join([head, *lines, *reasons])
