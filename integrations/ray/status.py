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
class ShardState:
    """One shard of the directory. endpoint: its "host:port", "" when it is away (nodes and engines go on, its keys are misses).
    pid: of its process. keys: blocks that it can find, by key."""

    endpoint: str = ""
    pid: int = 0
    keys: int = 0


@dataclass(frozen=True)
class ClusterStatus:
    """A cluster as it is now. shards: of the directory, in order; a directory that is not divided is one. known: nodes that
    it knows; nodes: one per living Ray node. counters: of all shards together."""

    cluster: str
    shards: tuple[ShardState, ...]
    nodes: tuple[NodeState, ...]
    known: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """Blocks that the directory can find, by key."""
        return sum(shard.keys for shard in self.shards)

    @property
    def directory(self) -> str:
        """ "host:port" of the directory, of its shards with commas between; "" where one is away."""
        return ",".join(shard.endpoint for shard in self.shards)

    @property
    def directory_pid(self) -> int:
        """Of the process of the directory's first shard."""
        return self.shards[0].pid

    @property
    def joined(self) -> bool:
        """Is the directory complete, and has every living Ray node that is not about to go a node that it knows?"""
        states = {node.state for node in self.nodes} - {"leaving", "left"}
        return states == {"joined"} and all(shard.endpoint for shard in self.shards)

    def __str__(self) -> str:
        shards = ", ".join(shard.endpoint or "away" for shard in self.shards)
        head = f"kvshare cluster {self.cluster!r}: directory {shards}, {self.keys} keys"
        rows = [("node", "state", "endpoint", "sessions", "pid")]
        rows += [
            (node.node, node.state, node.endpoint or node.address, str(node.sessions), str(node.pid or "-"))
            for node in self.nodes
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        reasons = [f"{node.node}: {node.reason}" for node in self.nodes if node.reason]
        return "\n".join([head, *lines, *reasons])
