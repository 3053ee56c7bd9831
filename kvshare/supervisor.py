"""The directory as Ray actors, one for each shard, and the supervisor in the first: one node actor on every living Ray node.

    shard 0: `DirectoryActor`, with the supervisor     shard 1 ..: `ShardActor`, each made (again) when there is none

    Ray node appears ──> a node actor on it      Ray node is gone ──> its node is forgotten
    Ray node is about to go (drained, preempted) ──> its node hands over and ends, before it

Threads: methods of the actor run in Ray's threads; the supervisor is one thread, which sleeps until an actor ends or
`WATCH_SECONDS` are over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray._private.state
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvshare.actors import (
    NAMESPACE,
    NodeActor,
    alive_ray_nodes,
    directory_name,
    environment,
    log_to_stderr,
    node_actor_name,
    node_name,
    reason_of,
)
from kvshare.cluster_messages import DirectoryStatus
from kvshare.config import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.errors import Unavailable
from kvshare.messages import Drained

log = logging.getLogger("kvshare")

WATCH_SECONDS = 2.0  # a new Ray node is seen after this; asking Ray costs a quarter of a millisecond of processor time
RETRY_SECONDS = 10.0  # a node actor that could not start is tried again after this
CLEANINGS = 5  # rounds in which left-overs are looked for after Ray nodes came or went
ANSWER_SECONDS = 30.0  # beyond a drain: giving back a large arena takes a while
LEAD_SECONDS = 1.0  # before a Ray node's deadline our own is over


def draining_ray_nodes() -> dict[str, float]:
    """Ray nodes that are to go (`ray drain-node`, a preemption notice, the autoscaler), and the seconds that each has left;
    infinite where nobody says. Ray offers this to its own libraries only, so a Ray that has it no more drains none of ours."""
    try:
        deadlines = ray._private.state.state.get_draining_nodes()
    except AttributeError:
        return {}
    now = time.time()
    return {ray_node: deadline / 1000 - now if deadline else float("inf") for ray_node, deadline in deadlines.items()}


class ShardActor:
    """One shard of the cluster's directory. ``values``: settings, the secret among them. Raises ConfigError."""

    def __init__(self, values: dict[str, Any], shard: int) -> None:
        log_to_stderr()
        # The port is the nodes' one; a shard is found by name and takes a free one.
        settings = Settings.load({**values, "bind": ray.util.get_node_ip_address(), "port": 0}, environment())
        self._server = DirectoryServer(settings, shard, settings.directory_shards)
        self._server.start()

    def endpoint(self) -> str:
        return str(self._server.endpoint)

    def shard(self) -> tuple[int, str, DirectoryStatus]:
        """Our process id, our endpoint, and the shard's status."""
        return os.getpid(), self.endpoint(), self._server.status()

    def node_lost(self, node: str) -> None:
        self._server.node_lost(node)

    def stop(self) -> None:
        self._server.stop()


class DirectoryActor(ShardActor):
    """The cluster's directory, or the first shard of it, and the supervisor of the others and of the nodes. ``values``: as
    above. Raises ConfigError."""

    def __init__(self, values: dict[str, Any], num_cpus: float) -> None:
        super().__init__(values, 0)
        self._values = values
        self._supervisor = Supervisor(self._server, values, num_cpus)
        self._supervisor.start()

    def values(self) -> dict[str, Any]:
        """Settings that the cluster was started with."""
        return self._values

    def nodes(self) -> tuple[dict[str, str], set[str]]:
        """Why nodes that could not start did not, by Ray node, and the Ray nodes whose nodes have left."""
        return self._supervisor.failures(), self._supervisor.left()

    def drain(self, ray_node: str, seconds: float | None) -> Drained | None:
        """Hand over what only the node of this Ray node holds, and end it for good. Raises Unavailable."""
        return self._supervisor.drain(ray_node, seconds)

    def quiesce(self) -> None:
        """Supervise no more: node actors may be stopped now."""
        self._supervisor.stop()

    def stop(self) -> None:
        self._supervisor.stop()
        self._server.stop()


class Supervisor:
    """Keeps one node actor on every living Ray node that is not about to go; those hand over. And an actor for each further
    shard of the directory. Its state is what Ray knows: a restarted one finds all by name."""

    def __init__(self, server: DirectoryServer, values: Mapping[str, Any], num_cpus: float) -> None:
        self._server = server
        self._values = dict(values)
        settings = Settings.load(values, {})
        self._cluster, self._shards = settings.cluster, range(1, settings.directory_shards)
        self._num_cpus = num_cpus
        self._actors: dict[str, Any] = {}  # Ray node -> handle of its node actor
        self._lifetimes: dict[Any, str] = {}  # reference that resolves when the actor has ended -> Ray node
        self._failed: dict[str, tuple[float, str]] = {}  # Ray node -> when to try again, why
        self._left: set[str] = set()  # Ray nodes whose nodes have been told to leave
        self._cleanings = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvshare-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Idempotent. Returns when nothing is started any more."""
        self._stopping.set()
        self._thread.join()

    def failures(self) -> dict[str, str]:
        return {ray_node: reason for ray_node, (_, reason) in dict(self._failed).items()}

    def left(self) -> set[str]:
        return set(self._left)

    def drain(self, ray_node: str, seconds: float | None) -> Drained | None:
        """From any thread: have the node of this Ray node leave, and start none there any more. Raises Unavailable."""
        actor = self._actors.get(ray_node)
        if actor is None:
            raise Unavailable(f"Ray node {ray_node} has no node of kvshare cluster {self._cluster!r}")
        self._left.add(ray_node)
        limit = Settings.load(self._values, {}).drain_seconds if seconds is None else seconds
        drained: Drained | None = ray.get(actor.drain.remote(seconds), timeout=limit + ANSWER_SECONDS)
        return drained

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                alive = alive_ray_nodes()
                self._keep_shards()
                self._hand_over(draining_ray_nodes())
                self._reconcile(alive)
                self._sleep()
            except (ray.exceptions.RayError, ValueError) as error:
                log.warning("kvshare: supervising goes on after a failure of Ray: %s", reason_of(error))
                self._stopping.wait(WATCH_SECONDS)

    def _keep_shards(self) -> None:
        """Ray restarts those that die; one that was removed is made anew."""
        for shard in self._shards:
            try:
                ray.get_actor(directory_name(self._cluster, shard), NAMESPACE)
            except ValueError:
                create_shard(self._values, self._cluster, shard, self._num_cpus)

    def _lose(self, ray_node: str) -> None:
        """Have all shards forget the node of this Ray node now, rather than at its missing heartbeats."""
        name = node_name(ray_node)
        self._server.node_lost(name)
        for shard in self._shards:
            with contextlib.suppress(ValueError):  # there is none now: it will not hear of that node either
                ray.get_actor(directory_name(self._cluster, shard), NAMESPACE).node_lost.remote(name)

    def _hand_over(self, draining: Mapping[str, float]) -> None:
        """Ray nodes that are to go: ours leaves before they do. Not waited for: it ends when it is done, like any."""
        for ray_node, seconds in draining.items():
            if ray_node not in self._left:
                self._left.add(ray_node)
                log.info("kvshare: Ray node %s is about to go: our node hands over", node_name(ray_node))
                limit = Settings.load(self._values, {}).drain_seconds
                try:
                    actor = ray.get_actor(node_actor_name(self._cluster, ray_node), NAMESPACE)
                except ValueError:
                    continue  # there is none
                actor.drain.remote(max(0.0, min(limit, seconds - LEAD_SECONDS)))

    def _reconcile(self, alive: Mapping[str, dict[str, Any]]) -> None:
        """Make it so: a node actor on each living Ray node and nowhere else."""
        gone = self._actors.keys() - alive.keys()
        for ray_node in gone:
            log.info("kvshare: Ray node %s is gone, and our node with it", node_name(ray_node))
            self._lose(ray_node)
            self._kill(ray_node)
        for ray_node in self._failed.keys() - alive.keys():
            del self._failed[ray_node]
        self._left &= alive.keys()
        now = time.monotonic()
        missing = [ray_node for ray_node in alive if ray_node not in self._actors and ray_node not in self._left]
        fresh = [ray_node for ray_node in missing if self._failed.get(ray_node, (0.0, ""))[0] <= now]
        for ray_node in fresh:
            self._create(ray_node)
        if gone or fresh:
            self._cleanings = CLEANINGS
        if self._cleanings:
            # A Ray node that died on a host that lives leaves files there: whoever lives there removes them. More than
            # once, because its processes may outlive it for a moment.
            self._cleanings -= 1
            keep = [node_name(ray_node) for ray_node in alive]
            for actor in self._actors.values():
                actor.clean.remote(keep)

    def _create(self, ray_node: str) -> None:
        actor = (
            ray.remote(NodeActor)
            .options(
                name=node_actor_name(self._cluster, ray_node),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=4,
                num_cpus=self._num_cpus,
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray_node, soft=False),
            )
            .remote(self._values)
        )
        self._actors[ray_node] = actor
        # Retried over restarts of the actor, so it resolves only when the actor is gone for good.
        self._lifetimes[actor.lifetime.remote()] = ray_node

    def _kill(self, ray_node: str) -> None:
        actor = self._actors.pop(ray_node)
        self._lifetimes = {reference: owner for reference, owner in self._lifetimes.items() if owner != ray_node}
        ray.kill(actor, no_restart=True)

    def _sleep(self) -> None:
        if not self._lifetimes:
            self._stopping.wait(WATCH_SECONDS)
            return
        ended, _ = ray.wait(list(self._lifetimes), num_returns=1, timeout=WATCH_SECONDS)
        for reference in ended:
            ray_node = self._lifetimes[reference]
            try:
                ray.get(reference)
                reason = "the node ended"
            except ray.exceptions.RayError as error:
                reason = reason_of(error)
            if ray_node in self._left:
                log.info("kvshare: node %s has left", node_name(ray_node))
            elif ray_node in alive_ray_nodes() and not self._stopping.is_set():
                log.warning("kvshare: node %s: %s; next try in %g s", node_name(ray_node), reason, RETRY_SECONDS)
                self._failed[ray_node] = (time.monotonic() + RETRY_SECONDS, reason)
            self._lose(ray_node)
            self._kill(ray_node)


def create_directory(values: Mapping[str, Any], cluster: str, num_cpus: float) -> Any:
    """Handle of the cluster's directory actor, made if need be."""
    return _made(DirectoryActor, directory_name(cluster), num_cpus, dict(values), num_cpus)


def create_shard(values: Mapping[str, Any], cluster: str, shard: int, num_cpus: float) -> Any:
    """Handle of the actor that is this further shard of the directory, made if need be."""
    return _made(ShardActor, directory_name(cluster, shard), num_cpus, dict(values), shard)


def _made(kind: type[ShardActor], name: str, num_cpus: float, *arguments: Any) -> Any:
    """An actor that prefers Ray's head, which lives as long as Ray does."""
    heads = [node_id for node_id, node in alive_ray_nodes().items() if "node:__internal_head__" in node["Resources"]]
    return (
        ray.remote(kind)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=8,
            num_cpus=num_cpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(heads[0], soft=True) if heads else "DEFAULT",
        )
        .remote(*arguments)
    )
