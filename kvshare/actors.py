"""Ray's part: it places, names, supervises and restarts; it is not on the path of a lookup or of a byte.

    directory actor   one per cluster: a `DirectoryServer`, and a `Supervisor` that keeps a node actor on every Ray node
    node actor        one per Ray node: a `Node`, and a card by which that Ray node's processes find it (`kvshare.cards`)

All are detached, named in the namespace "kvshare", restarted for ever. A restarted directory listens on another port; nodes
ask for it by the actor's name at every reconnect, and publish everything anew. A restarted node has its name from its Ray
node, so it recovers the arena that its predecessor left. What dies with its Ray node is forgotten at once.

Threads: methods of an actor run in Ray's threads; the supervisor is one thread, which sleeps until an actor ends or
`WATCH_SECONDS` are over.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvshare import cards
from kvshare.cluster_messages import DirectoryStatus
from kvshare.config import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.errors import ConfigError
from kvshare.leftovers import remove_leftovers
from kvshare.messages import NodeStatus
from kvshare.node import Node

log = logging.getLogger("kvshare")

NAMESPACE = "kvshare"
WATCH_SECONDS = 2.0  # a new Ray node is seen after this; asking Ray costs a quarter of a millisecond of processor time
RETRY_SECONDS = 10.0  # a node actor that could not start is tried again after this
CLEANINGS = 5  # rounds in which left-overs are looked for after Ray nodes came or went
RESOLVE_SECONDS = 2.0  # for the directory's endpoint; a node that gets none tries again
TAKE_OVER_SECONDS = 5.0  # a killed process keeps its lock while the kernel takes it apart
ENGINE_IGNORES = ("bind", "port", "directory", "autostart")  # settings of a node that are nothing to its engines


def directory_name(cluster: str) -> str:
    return f"{cluster}/directory"


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


def resolve_directory(cluster: str) -> str:
    """Endpoint of the cluster's directory, "" when there is none now. Called by nodes at every reconnect."""
    try:
        directory = ray.get_actor(directory_name(cluster), NAMESPACE)
        return str(ray.get(directory.endpoint.remote(), timeout=RESOLVE_SECONDS))
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

    def environment(self) -> dict[str, str]:
        """Variables that make any process of this host attach here."""
        values = self._for_engines()
        return {f"KVSHARE_{name.upper()}": _spelled(value) for name, value in values.items()}

    def clean(self, keep: list[str]) -> list[str]:
        """Remove what nodes of this cluster left on this host, except those named. Returns the paths."""
        return remove_leftovers(self._settings, keep)

    def stop(self) -> None:
        """End in good order; memory, socket and card are gone afterwards."""
        cards.remove(Settings().runtime_dir, self._raylet_pid, self._settings.cluster)
        self._node.stop(unlink=True)

    def _started(self) -> Node:
        deadline = time.monotonic() + TAKE_OVER_SECONDS
        while True:
            node = Node(self._settings, lambda: resolve_directory(self._settings.cluster))
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


class DirectoryActor:
    """The cluster's directory and the supervisor of its nodes. ``values``: settings, the secret among them.
    Raises ConfigError."""

    def __init__(self, values: dict[str, Any], num_cpus: float) -> None:
        log_to_stderr()
        self._values = values
        # The port is the nodes' one; the directory is found by name and takes a free one.
        self._server = DirectoryServer(
            Settings.load({**values, "bind": ray.util.get_node_ip_address(), "port": 0}, environment())
        )
        self._server.start()
        self._supervisor = Supervisor(self._server, values, num_cpus)
        self._supervisor.start()

    def endpoint(self) -> str:
        return str(self._server.endpoint)

    def values(self) -> dict[str, Any]:
        """Settings that the cluster was started with."""
        return self._values

    def status(self) -> tuple[int, DirectoryStatus, dict[str, str]]:
        """Our process id, the directory's status, and why nodes that could not start did not, by Ray node."""
        return os.getpid(), self._server.status(), self._supervisor.failures()

    def quiesce(self) -> None:
        """Supervise no more: node actors may be stopped now."""
        self._supervisor.stop()

    def stop(self) -> None:
        self._supervisor.stop()
        self._server.stop()


class Supervisor:
    """Keeps one node actor on every living Ray node. Its state is what Ray knows: a restarted one finds all by name."""

    def __init__(self, server: DirectoryServer, values: Mapping[str, Any], num_cpus: float) -> None:
        self._server = server
        self._values = dict(values)
        self._cluster = Settings.load(values, {}).cluster
        self._num_cpus = num_cpus
        self._actors: dict[str, Any] = {}  # Ray node -> handle of its node actor
        self._lifetimes: dict[Any, str] = {}  # reference that resolves when the actor has ended -> Ray node
        self._failed: dict[str, tuple[float, str]] = {}  # Ray node -> when to try again, why
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

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._reconcile(alive_ray_nodes())
                self._sleep()
            except (ray.exceptions.RayError, ValueError) as error:
                log.warning("kvshare: supervising goes on after a failure of Ray: %s", reason_of(error))
                self._stopping.wait(WATCH_SECONDS)

    def _reconcile(self, alive: Mapping[str, dict[str, Any]]) -> None:
        """Make it so: a node actor on each living Ray node and nowhere else."""
        gone = self._actors.keys() - alive.keys()
        for ray_node in gone:
            log.info("kvshare: Ray node %s is gone, and our node with it", node_name(ray_node))
            self._server.node_lost(node_name(ray_node))
            self._kill(ray_node)
        for ray_node in self._failed.keys() - alive.keys():
            del self._failed[ray_node]
        now = time.monotonic()
        missing = [ray_node for ray_node in alive if ray_node not in self._actors]
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
            if ray_node in alive_ray_nodes() and not self._stopping.is_set():
                log.warning("kvshare: node %s: %s; next try in %g s", node_name(ray_node), reason, RETRY_SECONDS)
                self._failed[ray_node] = (time.monotonic() + RETRY_SECONDS, reason)
            self._server.node_lost(node_name(ray_node))
            self._kill(ray_node)


def create_directory(values: Mapping[str, Any], cluster: str, num_cpus: float) -> Any:
    """Handle of the cluster's directory actor, made if need be. It prefers Ray's head, which lives as long as Ray does."""
    heads = [node_id for node_id, node in alive_ray_nodes().items() if "node:__internal_head__" in node["Resources"]]
    return (
        ray.remote(DirectoryActor)
        .options(
            name=directory_name(cluster),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=8,
            num_cpus=num_cpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(heads[0], soft=True) if heads else "DEFAULT",
        )
        .remote(dict(values), num_cpus)
    )


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
