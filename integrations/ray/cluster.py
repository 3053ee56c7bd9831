"""Start, status and stop of kvshare on the Ray cluster that this process is connected to.

Stopping goes step by step, each bounded, and needs no living directory: 1. supervise no more, 2. nodes end in good order,
3. node actors end, 4. what killed nodes left on living hosts is removed, 5. the directory's shards end.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
import ray.exceptions
import ray.util

from kvshare import actors, supervisor
from kvshare.cluster_messages import DirectoryStatus
from kvshare.config import Settings
from kvshare.errors import ConfigError, Unavailable
from kvshare.integrations.ray.status import ClusterStatus, NodeState, ShardState
from kvshare.messages import Drained, NodeStatus, Purged
from kvshare.purge import PurgeScope

START_SECONDS = 60.0  # for the directory actor: a process, and imports on a busy host
ANSWER_SECONDS = 10.0
PURGE_SECONDS = 600.0  # an object store is rewritten segment by segment
STOP_SECONDS = 20.0  # for one step of stopping
DRAIN_SECONDS_MAX = 3600.0  # where the cluster's own setting says how long
PAUSE_SECONDS = 0.1
OWN = ("node_name", "bind", "directory")  # settings that follow from the Ray node


@dataclass(frozen=True)
class Cluster:
    """kvshare on a Ray cluster, by name. As a context manager it stops at the end."""

    cluster: str

    def status(self) -> ClusterStatus:
        return status(self.cluster)

    def wait(self, timeout: float = 60.0) -> ClusterStatus:
        """Wait until every living Ray node has a node that joined. Raises Unavailable after ``timeout`` seconds, or when a
        node can't start, saying why."""
        deadline = time.monotonic() + timeout
        while True:
            now = self.status()
            if now.joined:
                return now
            failed = [f"{node.node}: {node.reason}" for node in now.nodes if node.state == "failed"]
            if failed or time.monotonic() > deadline:
                missing = failed or [f"{node.node} is {node.state}" for node in now.nodes if node.state != "joined"]
                missing += [f"shard {i} of the directory is away" for i, shard in enumerate(now.shards) if not shard.endpoint]
                raise Unavailable(f"kvshare cluster {self.cluster!r} is not complete: {'; '.join(missing) or 'no Ray nodes'}")
            time.sleep(PAUSE_SECONDS)

    def purge(self, *, tenant: str = "", family: bytes = b"", prefix: bytes = b"", destroy_key: bool = False) -> Purged:
        return purge(self.cluster, PurgeScope(tenant, family, prefix), destroy_key)

    def drain(self, node: str, timeout: float | None = None) -> Drained:
        return drain(self.cluster, node, timeout)

    def stop(self) -> None:
        stop(self.cluster)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()


def start(*, num_cpus: float = 0, **settings: Any) -> Cluster:
    """Start kvshare on the Ray cluster that this process is connected to, or attach to what runs there.

    settings: see `kvshare.config.Settings`; ``cluster`` names it (several may run side by side), ``secret`` is drawn at random
    unless given. The environment of a Ray node adds what differs from host to host. num_cpus: what Ray reserves for each of
    our actors. Returns when the directory listens; nodes follow (`Cluster.wait`).

    Raises:
        ConfigError: Ray is not initialized, a setting is wrong, or the cluster runs with other settings.
        Unavailable: the directory did not start in time.
    """
    _require_ray()
    for name in OWN:
        if name in settings:
            raise ConfigError(
                f"setting {name!r} cannot be {settings[name]!r}: on Ray it follows from the Ray node; leave it out."
            )
    loaded = Settings.load({"secret": secrets.token_hex(32), **settings}, actors.environment())
    if len(loaded.secret) < 16:
        raise ConfigError(
            f"setting 'secret' cannot be {'*' * len(loaded.secret)!r}: use 16 characters or more, or leave it out."
        )
    values = {**settings, "cluster": loaded.cluster, "secret": loaded.secret}
    directory = supervisor.create_directory(values, loaded.cluster, num_cpus)
    _ask(directory.endpoint.remote(), START_SECONDS, "the directory did not start")
    running = _ask(directory.values.remote(), ANSWER_SECONDS, "the directory does not answer")
    asked, runs = Settings.load(values, {}), Settings.load(running, {})
    others = sorted(name for name in settings if getattr(asked, name) != getattr(runs, name))
    if others:
        shown = "this one" if others[0] == "secret" else repr(settings[others[0]])
        raise ConfigError(
            f"setting {others[0]!r} cannot be {shown}: kvshare cluster {loaded.cluster!r} runs with another; stop it first, or "
            "choose another 'cluster'."
        )
    return Cluster(loaded.cluster)


def status(cluster: str = "default") -> ClusterStatus:
    """How a cluster is: bounded, also when parts are away. Raises ConfigError (Ray is not initialized), Unavailable (no
    cluster of that name runs)."""
    _require_ray()
    directory = _actor(actors.directory_name(cluster))
    if directory is None:
        raise Unavailable(f"no kvshare cluster {cluster!r} runs on this Ray cluster: call kvshare.integrations.ray.start()")
    alive = actors.alive_ray_nodes()
    asked = {ray_node: _actor(actors.node_actor_name(cluster, ray_node)) for ray_node in alive}
    questions = {ray_node: actor.status.remote() for ray_node, actor in asked.items() if actor is not None}
    failures, left = dict[str, str](), set[str]()
    question = directory.nodes.remote()
    parts = [actor.shard.remote() if actor is not None else None for actor in [directory, *_further_shards(cluster)]]
    asked_for = [question, *(part for part in parts if part is not None), *questions.values()]
    ray.wait(asked_for, num_returns=len(asked_for), timeout=ANSWER_SECONDS)
    try:
        failures, left = ray.get(question, timeout=0)
    except ray.exceptions.RayError:
        pass  # restarting: nodes go on without
    shards = [_shard_state(part) for part in parts]
    known = [{node.node for node in told.nodes if not node.is_engine} for _, told in shards if told is not None]
    joined = set.intersection(*known) if known else set()
    nodes = [
        _node_state(
            ray_node,
            alive[ray_node]["NodeManagerAddress"],
            questions.get(ray_node),
            joined,
            failures.get(ray_node, ""),
            ray_node in left,
        )
        for ray_node in sorted(alive)
    ]
    counters = sum((Counter(told.counters) for _, told in shards if told is not None), Counter())
    return ClusterStatus(
        cluster, tuple(state for state, _ in shards), tuple(nodes), tuple(sorted(set().union(*known))), dict(counters)
    )


def purge(cluster: str, scope: PurgeScope, destroy_key: bool = False) -> Purged:
    """Erase blocks from every tier of every node; ``destroy_key``: the tenant's key too. Returns what each node gave up;
    nothing is left when ``silent`` and all ``faults`` are empty.

    Raises:
        ConfigError: Ray is not initialized. Unavailable: no node answers, or not within `PURGE_SECONDS`.
    """
    _require_ray()
    actor = next((actor for name in _names(f"{cluster}/node/") if (actor := _actor(name)) is not None), None)
    if actor is None:
        raise Unavailable(f"kvshare cluster {cluster!r} has no node that could be asked: start() it and wait() for it")
    done = _ask(actor.purge.remote(scope, destroy_key), PURGE_SECONDS, f"{scope} was not purged: run it again")
    assert isinstance(done, Purged)
    return done


def drain(cluster: str, node: str, timeout: float | None = None) -> Drained:
    """Have one node leave: what only it holds goes to peers, disk and object store; then it ends, for as long as its Ray node
    lives. node: its name or Ray's id of its Ray node. timeout: default ``drain_seconds``. Ray's own notices (`ray drain-node`,
    preemption) do the same without being asked.

    Raises:
        ConfigError: Ray is not initialized. Unavailable: there is no such node, or it does not answer.
    """
    _require_ray()
    ray_node = next((each for each in actors.alive_ray_nodes() if node in (each, actors.node_name(each))), None)
    directory = _actor(actors.directory_name(cluster))
    if ray_node is None or directory is None:
        raise Unavailable(f"kvshare cluster {cluster!r} has no node {node!r} that could be drained")
    limit = DRAIN_SECONDS_MAX if timeout is None else timeout + 2 * STOP_SECONDS
    drained = _ask(directory.drain.remote(ray_node, timeout), limit, f"node {node} was not drained")
    if not isinstance(drained, Drained):
        raise Unavailable(f"node {node} ended before it had handed over")
    return drained


def stop(cluster: str = "default") -> None:
    """Stop a cluster in good order: afterwards no actor, socket or memory of it is left on living Ray nodes. Where a disk or an
    object store is configured, blocks go there first. Idempotent. Engines go on without it. Raises ConfigError (Ray is not
    initialized)."""
    _require_ray()
    directory = _actor(actors.directory_name(cluster))
    values: dict[str, Any] = {"cluster": cluster}
    if directory is not None:
        try:
            values = _ask(directory.values.remote(), ANSWER_SECONDS, "")
            _ask(directory.quiesce.remote(), STOP_SECONDS, "")
        except Unavailable:
            # It would go on supervising: nodes first is only good manners, this is needed.
            ray.kill(directory, no_restart=True)
            directory = None
    names = _names(f"{cluster}/node/")
    nodes = [actor for name in names if (actor := _actor(name)) is not None]
    settings = Settings.load({name: value for name, value in values.items() if name not in OWN}, {})
    if nodes:
        seconds = STOP_SECONDS + settings.drain_seconds
        ray.wait([actor.stop.remote() for actor in nodes], num_returns=len(nodes), timeout=seconds)
    for actor in nodes:
        ray.kill(actor, no_restart=True)
    _wait_gone(names)
    actors.clean_hosts(settings, STOP_SECONDS)
    shards = [actor for actor in [directory, *_further_shards(cluster)] if actor is not None]
    if shards:
        ray.wait([actor.stop.remote() for actor in shards], num_returns=len(shards), timeout=STOP_SECONDS)
    for actor in shards:
        ray.kill(actor, no_restart=True)
    _wait_gone([actors.directory_name(cluster), *_names(f"{actors.directory_name(cluster)}/")])


def engine_env(cluster: str = "default", ray_node: str | None = None) -> dict[str, str]:
    """Environment variables that make any process on a Ray node attach to its kvshare node.

    Engines in Ray actors and tasks need none of this: they find their node by themselves. It is for processes that Ray did
    not start, or for one of several clusters. It holds the cluster's secret. ray_node: Ray's id of the node; default: the one
    that this process runs on.

    Raises:
        Unavailable: that Ray node has no kvshare node (yet).
    """
    _require_ray()
    ray_node = ray_node or ray.get_runtime_context().get_node_id()
    actor = _actor(actors.node_actor_name(cluster, ray_node))
    if actor is None:
        raise Unavailable(f"Ray node {ray_node} has no node of kvshare cluster {cluster!r}: start() it and wait() for it")
    return dict(_ask(actor.environment.remote(), START_SECONDS, f"the node of Ray node {ray_node} does not answer"))


def _node_state(ray_node: str, address: str, question: Any, joined: set[str], failure: str, left: bool) -> NodeState:
    name = actors.node_name(ray_node)
    try:
        if question is None:
            raise ray.exceptions.GetTimeoutError("no actor")
        pid, node = ray.get(question, timeout=0)
    except ray.exceptions.RayError:
        return NodeState(ray_node, address, name, "left" if left else "failed" if failure else "starting", failure)
    assert isinstance(node, NodeStatus)
    state = "leaving" if left else "joined" if name in joined else "starting"
    return NodeState(ray_node, address, name, state, "", pid, node.node.endpoint, node.sessions, dict(node.counters))


def _further_shards(cluster: str) -> list[Any]:
    """Handles of the actors of the directory's shards from the second on, in order; None where there is none at present."""
    start = actors.directory_name(cluster) + "/"
    numbers = [int(name.removeprefix(start)) for name in _names(start)]
    return [_actor(actors.directory_name(cluster, shard)) for shard in range(1, max(numbers, default=0) + 1)]


def _shard_state(question: Any) -> tuple[ShardState, DirectoryStatus | None]:
    try:
        if question is None:
            raise ray.exceptions.GetTimeoutError("no actor")
        pid, endpoint, told = ray.get(question, timeout=0)
    except ray.exceptions.RayError:
        return ShardState(), None  # restarting: nodes go on without
    assert isinstance(told, DirectoryStatus)
    return ShardState(endpoint, pid, told.keys), told


def _require_ray() -> None:
    if not ray.is_initialized():
        raise ConfigError("Ray is not initialized: call ray.init() before kvshare.integrations.ray.")


def _actor(name: str) -> Any:
    """Handle of a named actor of ours, or None."""
    try:
        return ray.get_actor(name, actors.NAMESPACE)
    except ValueError:
        return None


def _names(start_of_name: str) -> list[str]:
    return [
        found["name"]
        for found in ray.util.list_named_actors(all_namespaces=True)
        if found["namespace"] == actors.NAMESPACE and found["name"].startswith(start_of_name)
    ]


def _ask(reference: Any, seconds: float, sentence: str) -> Any:
    """An actor's answer. Raises Unavailable, with ``sentence`` and the reason."""
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayError as error:
        raise Unavailable(f"{sentence}: {actors.reason_of(error)}") from error


def _wait_gone(names: list[str]) -> None:
    """Until Ray has forgotten these actors, so that a start right behind makes new ones. Bounded."""
    deadline = time.monotonic() + STOP_SECONDS
    while any(_actor(name) is not None for name in names) and time.monotonic() < deadline:
        time.sleep(PAUSE_SECONDS)
