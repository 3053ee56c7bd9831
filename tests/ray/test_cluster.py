"""Goal: Ray places, supervises and restarts kvshare, and blocks survive whatever dies. Method: a real cluster of two and then
three raylets on this machine, with processes killed by -9. One cluster for all: each test leaves it whole."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import ray
import ray.util

import kvshare.integrations.ray as kvshare_ray
from kvshare import ConfigError, Unavailable, keys
from kvshare.integrations.ray import Cluster, ClusterStatus
from tests.ray.conftest import BLOCK_SIZE, SPACE, Fleet, eventually, kill, prompt, runs

pytestmark = pytest.mark.ray


def named_actors() -> list[str]:
    return [found["name"] for found in ray.util.list_named_actors(all_namespaces=True) if found["namespace"] == "kvshare"]


def pids(status: ClusterStatus) -> dict[str, int]:
    return {state.node: state.pid for state in status.nodes}


def test_every_ray_node_has_a_node_and_all_have_joined(fleet: Fleet, cluster: Cluster) -> None:
    status = cluster.status()
    assert status.joined and len(status.nodes) == 2
    assert {state.ray_node for state in status.nodes} == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert len({state.endpoint for state in status.nodes}) == 2
    for state in status.nodes:
        assert (fleet.folder / "tests" / f"{state.node}.sock").is_socket()
        assert state.node in str(status) and "joined" in str(status)


def test_an_engine_and_its_child_processes_find_the_node_of_their_ray_node(fleet: Fleet, cluster: Cluster) -> None:
    @ray.remote(num_cpus=0)
    def grandchild() -> str:
        ask = "from kvshare import Settings; print(Settings.load().socket_path)"
        outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
        return subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, check=True).stdout.strip()

    for state in cluster.status().nodes:
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(state.ray_node, soft=False)
        found = ray.get(grandchild.options(scheduling_strategy=here).remote(), timeout=60)
        assert found == str(fleet.folder / "tests" / f"{state.node}.sock")
        environment = kvshare_ray.engine_env("tests", state.ray_node)
        assert environment["KVSHARE_NODE_NAME"] == state.node and environment["KVSHARE_CLUSTER"] == "tests"


def test_a_purge_reaches_the_nodes_of_all_ray_nodes(fleet: Fleet, cluster: Cluster) -> None:
    first, second = cluster.status().nodes
    purged, other = prompt(21), prompt(22)
    assert fleet.save(first, purged) == fleet.save(second, other) == 10
    assert eventually(lambda: fleet.load(second, purged) == len(purged))
    head = keys.prefix(SPACE.family()) + keys.chain(purged, BLOCK_SIZE)[0]
    done = cluster.purge(prefix=head)
    assert {node.node for node in done.nodes} == {first.node, second.node}
    assert done.silent == [] and sum(tier.blocks for node in done.nodes for tier in node.tiers) >= 1
    assert fleet.load(first, purged) == fleet.load(second, purged) == 0
    assert fleet.load(second, other) == len(other)


def test_blocks_saved_on_one_ray_node_are_loaded_on_the_other(fleet: Fleet, cluster: Cluster) -> None:
    first, second = cluster.status().nodes
    tokens = prompt(1)
    assert fleet.save(first, tokens) == 10
    assert eventually(lambda: fleet.load(second, tokens) == len(tokens))


def test_a_second_driver_attaches_to_what_runs(fleet: Fleet, cluster: Cluster) -> None:
    before = cluster.status()
    driver = (
        "import sys, ray, kvshare.integrations.ray as kvshare_ray\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "status = kvshare_ray.start(cluster='tests', transports='tcp').wait(60)\n"
        "print(status.directory_pid, sorted(state.pid for state in status.nodes))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", driver, fleet.address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert answer.splitlines()[-1] == f"{before.directory_pid} {sorted(pids(before).values())}"
    assert cluster.status().joined


def test_a_killed_node_comes_back_with_its_blocks_and_publishes_them(fleet: Fleet, cluster: Cluster) -> None:
    before = cluster.status()
    first, second = before.nodes
    tokens = prompt(2)
    fleet.save(first, tokens)
    assert eventually(lambda: cluster.status().keys >= before.keys + 10)
    known = cluster.status().keys
    kill(first.pid)
    assert eventually(lambda: cluster.status().joined and pids(cluster.status())[first.node] not in (0, first.pid), 60)
    assert eventually(lambda: cluster.status().keys == known)
    assert fleet.load(second, tokens) == len(tokens)
    assert fleet.load(first, tokens) == len(tokens)


def test_a_killed_directory_comes_back_and_is_filled_again(fleet: Fleet, cluster: Cluster) -> None:
    before = cluster.status()
    first, second = before.nodes
    tokens = prompt(3)
    fleet.save(first, tokens)
    assert eventually(lambda: cluster.status().keys >= before.keys + 10)
    known = cluster.status().keys
    kill(before.directory_pid)
    assert eventually(lambda: cluster.status().directory_pid not in (0, before.directory_pid), 60)
    assert eventually(lambda: cluster.status().joined and cluster.status().keys == known, 60)
    assert cluster.status().directory != before.directory
    assert pids(cluster.status()) == pids(before), "nodes went on undisturbed"
    assert fleet.load(second, tokens) == len(tokens)


def test_a_node_answers_however_often_the_directory_is_killed(cluster: Cluster) -> None:
    """Each supervisor waits for the end of each node: those that were killed must not use the node up."""
    for _ in range(4):
        before = cluster.status().directory_pid
        kill(before)
        assert eventually(lambda before=before: cluster.status().directory_pid not in (0, before), 60)
    assert cluster.wait(60).joined


def test_a_new_raylet_gets_a_node_and_a_removed_one_is_forgotten(fleet: Fleet, cluster: Cluster) -> None:
    first, second = cluster.status().nodes
    tokens = prompt(4)
    fleet.save(first, tokens[:20])
    files = fleet.files()
    raylet = fleet.add_raylet()
    try:
        assert eventually(lambda: len(cluster.status().nodes) == 3 and cluster.status().joined, 60)
        (third,) = [state for state in cluster.status().nodes if state.node not in (first.node, second.node)]
        fleet.save(third, tokens)
        assert eventually(lambda: fleet.load(second, tokens) == len(tokens))
    finally:
        fleet.ray_cluster.remove_node(raylet, allow_graceful=False)
    assert eventually(lambda: cluster.status().known == (first.node, second.node)), "the directory forgets before Ray notices"
    assert eventually(lambda: not runs(third.pid))
    assert fleet.load(second, tokens) == 20, "the part that the first node holds, and no wait for the dead"
    assert eventually(lambda: len(cluster.status().nodes) == 2, 60)
    assert eventually(lambda: fleet.files() == files), "a neighbour on that host removes what the dead left"


def test_start_refuses_what_cannot_be_before_anything_starts(fleet: Fleet, cluster: Cluster) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"arena_byts": "1GiB"}, "did you mean 'arena_bytes'"),
        ({"node_name": "mine"}, "'node_name' cannot be 'mine': on Ray it follows"),
        ({"secret": "short"}, r"'secret' cannot be '\*\*\*\*\*'"),
        ({"arena_bytes": "8MiB"}, "'arena_bytes' cannot be '8MiB': kvshare cluster 'tests' runs with another"),
        ({"secret": "another secret of theirs"}, "'secret' cannot be this one"),
    ]
    before = sorted(named_actors())
    for changes, sentence in wrong:
        with pytest.raises(ConfigError, match=sentence):
            fleet.start(**changes)
    assert sorted(named_actors()) == before


def test_a_node_that_cannot_start_says_why(fleet: Fleet) -> None:
    with fleet.start(cluster="broken", runtime_dir="/proc/kvshare") as broken:
        with pytest.raises(Unavailable, match=r"not complete: .*'runtime_dir' cannot be '/proc/kvshare'"):
            broken.wait(60)
        # `wait` ends when one has failed; the others come to it in their own time.
        assert eventually(lambda: {state.state for state in broken.status().nodes} == {"failed"})
    assert not [name for name in named_actors() if name.startswith("broken/")]


def test_stop_leaves_nothing_even_of_a_node_killed_a_moment_ago(fleet: Fleet, cluster: Cluster) -> None:
    status = cluster.status()
    for state in status.nodes:
        fleet.save(state, prompt(5))
    assert len(fleet.files()) >= 2 * 5, "socket, lock, card, data, table"
    kill(status.nodes[0].pid)
    cluster.stop()
    assert named_actors() == []
    assert fleet.files() == []
    assert eventually(lambda: not [pid for pid in (status.directory_pid, *pids(status).values()) if runs(pid)])
    cluster.stop()
    with pytest.raises(Unavailable, match=r"call kvshare\.integrations\.ray\.start"):
        cluster.status()
    assert fleet.start().wait(60).keys == 0, "a start right behind begins afresh"


def test_stop_needs_no_living_directory(fleet: Fleet, cluster: Cluster) -> None:
    ray.kill(ray.get_actor("tests/directory", "kvshare"), no_restart=True)
    cluster.stop()
    assert named_actors() == [] and fleet.files() == []


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"call ray\.init\(\)"):
        kvshare_ray.start()


def test_ray_is_imported_by_nobody_who_does_not_use_it() -> None:
    ask = "import sys, kvshare, kvshare.cli, kvshare.session, kvshare.node; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout == "False\n"
