"""Goal: on Ray a node that is to go hands over before, asked by us or by Ray itself, and stopping everything forgets nothing
that an object store can keep. Method: a real cluster of raylets on this machine; one more joins and goes in each test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from kvshare import Unavailable
from kvshare.integrations.ray import Cluster, NodeState
from tests.ray.conftest import Fleet, eventually, prompt

pytestmark = pytest.mark.ray


@contextmanager
def one_more(fleet: Fleet, cluster: Cluster) -> Iterator[NodeState]:
    """The node of a raylet that is there for a while."""
    before = {state.ray_node for state in cluster.status().nodes}
    raylet = fleet.add_raylet()
    try:
        assert eventually(lambda: len(cluster.status().nodes) == len(before) + 1 and cluster.status().joined, 60)
        (new,) = [state for state in cluster.status().nodes if state.ray_node not in before]
        yield new
    finally:
        fleet.ray_cluster.remove_node(raylet)  # also where it has gone by itself
        assert eventually(lambda: {state.ray_node for state in cluster.status().nodes} == before, 60)


def state_of(cluster: Cluster, node: NodeState) -> str:
    return {state.ray_node: state.state for state in cluster.status().nodes}.get(node.ray_node, "gone")


def saved(fleet: Fleet, cluster: Cluster, node: NodeState, tokens: list[int]) -> int:
    """Keys that the directory knows when these are saved on this node."""
    before = cluster.status().keys
    assert fleet.save(node, tokens) == len(tokens) // 4
    assert eventually(lambda: cluster.status().keys == before + len(tokens) // 4)
    return cluster.status().keys


def test_a_drained_node_hands_over_and_does_not_come_back(fleet: Fleet, cluster: Cluster) -> None:
    stays = cluster.status().nodes[0]
    tokens = prompt(11)
    with one_more(fleet, cluster) as goes:
        known = saved(fleet, cluster, goes, tokens)
        drained = cluster.drain(goes.node)
        assert (drained.moved, drained.lost) == (len(tokens) // 4, 0)
        assert eventually(lambda: state_of(cluster, goes) == "left")
        assert cluster.wait(20).keys == known
        assert fleet.load(stays, tokens) == len(tokens)
        assert state_of(cluster, goes) == "left", "its Ray node lives on without"
    with pytest.raises(Unavailable, match="has no node"):
        cluster.drain(goes.node)


def test_a_ray_node_that_ray_drains_has_handed_over_before_it_goes(fleet: Fleet, cluster: Cluster) -> None:
    stays = cluster.status().nodes[0]
    tokens = prompt(12)
    with one_more(fleet, cluster) as goes:
        saved(fleet, cluster, goes, tokens)
        notice = [
            str(Path(sys.executable).parent / "ray"), "drain-node", "--address", fleet.address, "--node-id", goes.ray_node,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds", "60",
        ]  # fmt: skip
        subprocess.run(notice, check=True, capture_output=True, timeout=60)
        # Ray takes a draining node down once nothing runs there: ours was the last.
        assert eventually(lambda: state_of(cluster, goes) in ("left", "gone"), 60)
        assert fleet.load(stays, tokens) == len(tokens)


def test_everything_stops_and_the_next_cluster_finds_it_in_the_object_store(fleet: Fleet, cluster: Cluster) -> None:
    cluster.stop()
    store = fleet.folder / "objects"
    store.mkdir()
    tokens = prompt(13)
    started = fleet.start(object_url=f"file://{store}")
    first = started.wait(60).nodes[0]
    fleet.save(first, tokens)
    started.stop()
    assert not ray.util.list_named_actors(all_namespaces=True)
    started = fleet.start(object_url=f"file://{store}")
    second = started.wait(60).nodes[1]
    assert fleet.load(second, tokens) == len(tokens)
    started.stop()
