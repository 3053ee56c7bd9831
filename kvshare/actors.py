"""Ray's part: it places, names, supervises and restarts; it is not on the path of a lookup or of a byte.

    directory actor   one per cluster: a `DirectoryServer`, and what keeps a node actor on every Ray node (`kvshare.supervisor`)
    shard actors      the directory's further shards, where it has several: a `DirectoryServer` each
    node actor        one per Ray node: a `Node`, and a card by which that Ray node's processes find it (`kvshare.cards`)

All are detached, named in the namespace "kvshare", restarted for ever. A restarted shard listens on another port; nodes
ask for it by the actor's name at every reconnect, and publish everything anew. A restarted node has its name from its Ray
node, so it recovers the arena that its predecessor left. What dies with its Ray node is forgotten at once.

Threads: methods of an actor run in Ray's threads.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from functools import partial
from typing import Any

import ray
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvshare import cards
from kvshare.config import Settings
from kvshare.errors import ConfigError
from kvshare.leftovers import remove_leftovers
from kvshare.messages import Drained, NodeStatus, Purged
from kvshare.node import Node
from kvshare.purge import PurgeScope

log = logging.getLogger("kvshare")

NAMESPACE = "kvshare"
RESOLVE_SECONDS = 2.0  # for the directory's endpoint; a node that gets none tries again
TAKE_OVER_SECONDS = 5.0  # a killed process keeps its lock while the kernel takes it apart
# Settings of a node that are nothing to its engines.
ENGINE_IGNORES = ("bind", "port", "directory", "directory_shards", "autostart")


def directory_name(cluster: str, shard: int = 0) -> str:
    """Of the actor that is this shard of the directory; shard 0 supervises the others."""
    return f"{cluster}/directory/{shard}" if shard else f"{cluster}/directory"


def node_actor_name(cluster: str, ray_node: str) -> str:
    return f"{cluster}/node/{node_name(ray_node)}"


def node_name(ray_node: str) -> str:
    """Our node's name, from the id of its Ray node: short, because it is part of a socket's name."""
    return ray_node[:12]


def alive_ray_nodes() -> dict[str, dict[str, Any]]:
    """Ray's description of each living Ray node, by its id."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def reason_of(error: BaseException) -> str:
    """Why an actor failed, in one line: our own error if one is behind it, else Ray's first words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("kvshare.errors.")]
    return ours[-1].partition(": ")[2] if ours else (lines[0] if lines else type(error).__name__)


def environment() -> dict[str, str]:
    """This host's environment, without what would have us read the card of a node like an engine."""
    return {name: value for name, value in os.environ.items() if name != cards.VARIABLE}


def resolve_directory(cluster: str, shard: int = 0) -> str:
    """Endpoint of one shard of the cluster's directory, "" when there is none now. Called by nodes at every reconnect."""
    try:
        actor = ray.get_actor(directory_name(cluster, shard), NAMESPACE)
        return str(ray.get(actor.endpoint.remote(), timeout=RESOLVE_SECONDS))
    except (ValueError, ray.exceptions.RayError):
        return ""


class NodeActor:
    """The node of one Ray node. ``values``: settings that the cluster was started with; the environment of the Ray node
    adds what differs from host to host. Raises ConfigError."""

    def __init__(self, values: dict[str, Any]) -> None:
        log_to_stderr()
        own = {"node_name": node_name(ray.get_runtime_context().get_node_id()), "bind": ray.util.get_node_ip_address()}
        self._settings = Settings.load({**values, **own}, environment())
        self._node = self._started()
        self._changed = threading.Condition()
        self._supervisors, self._ended = 0, False
        threading.Thread(target=self._watch, name="kvshare-end", daemon=True).start()
        self._raylet_pid = int(os.environ[cards.VARIABLE])
        cards.write(Settings().runtime_dir, self._raylet_pid, self._settings.cluster, self._for_engines())

    def lifetime(self) -> None:
        """Returns when the node has ended, or when another supervisor asks: a former one that died holds no thread of ours."""
        with self._changed:
            self._supervisors += 1
            mine = self._supervisors
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._supervisors != mine)

    def status(self) -> tuple[int, NodeStatus]:
        """Our process id, and the node's status."""
        return os.getpid(), self._node.status()

    def purge(self, scope: PurgeScope, destroy_key: bool) -> Purged:
        """Erase it from every tier of every node."""
        return self._node.purge(scope, destroy_key)

    def environment(self) -> dict[str, str]:
        """Variables that make any process of this host attach here."""
        values = self._for_engines()
        return {f"KVSHARE_{name.upper()}": _spelled(value) for name, value in values.items()}

    def clean(self, keep: list[str]) -> list[str]:
        """Remove what nodes of this cluster left on this host, except those named. Returns the paths."""
        return remove_leftovers(self._settings, keep)

    def drain(self, seconds: float | None = None) -> Drained | None:
        """Hand over what only this node holds, then end in good order. ``seconds``: default ``drain_seconds``. None when it had
        ended before."""
        drained = self._node.drain(self._settings.drain_seconds if seconds is None else seconds)
        self._end()
        return drained

    def stop(self) -> None:
        """End in good order; memory, socket and card are gone afterwards. What only memory holds goes to disk and object store
        before, where there are any: all nodes stop, so peers are no help."""
        if self._settings.disk_dir or self._settings.object_url:
            self._node.drain(self._settings.drain_seconds, to_peers=False)
        self._end()

    def _end(self) -> None:
        cards.remove(Settings().runtime_dir, self._raylet_pid, self._settings.cluster)
        self._node.stop(unlink=True)

    def _started(self) -> Node:
        deadline = time.monotonic() + TAKE_OVER_SECONDS
        while True:
            node = Node(self._settings, partial(resolve_directory, self._settings.cluster))
            try:
                node.start()
                return node
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _watch(self) -> None:
        self._node.join()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _for_engines(self) -> dict[str, Any]:
        defaults = Settings()
        given = {
            name: value
            for name, value in dataclasses.asdict(self._settings).items()
            if name not in ENGINE_IGNORES and value != getattr(defaults, name)
        }
        # Always told: who we are, and that nodes are Ray's business here, also while one restarts.
        identity = {name: getattr(self._settings, name) for name in ("cluster", "node_name", "runtime_dir")}
        return {**given, **identity, "autostart": False}


def clean_hosts(settings: Settings, seconds: float) -> list[str]:
    """Remove what nodes of this cluster left on the hosts of all living Ray nodes. Returns the paths. Best effort, bounded."""
    task = ray.remote(remove_leftovers)
    running = [
        task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(ray_node, soft=False)).remote(settings, [])
        for ray_node in alive_ray_nodes()
    ]
    done, late = ray.wait(running, num_returns=len(running), timeout=seconds) if running else ([], [])
    if late:
        log.warning("kvshare: %d of %d hosts were not cleaned in time: run 'kvshare clean' there", len(late), len(running))
    removed: list[str] = []
    for reference in done:
        try:
            removed += ray.get(reference)
        except ray.exceptions.RayError as error:
            log.warning("kvshare: a host was not cleaned (%s): run 'kvshare clean' there", reason_of(error))
    return removed


def log_to_stderr() -> None:
    """Ray collects what an actor writes there."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(os.environ.get("KVSHARE_LOG_LEVEL", "INFO"))


def _spelled(value: Any) -> str:
    """A setting as the environment spells it."""
    return ",".join(value) if isinstance(value, tuple) else str(value)
