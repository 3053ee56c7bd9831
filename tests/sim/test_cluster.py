"""Whole clusters in virtual time, on the real directory, outbox, index and store.

Goal: whatever happens in whatever order (nodes, engines and shards that die and come back, connections that break for one side
or both, partitions, clocks that jump, strangers, publishes that are lost or come twice), no reader accepts a wrong block,
nobody waits for ever, and once it is quiet every shard knows exactly what the living hold. Method: seeded plays;
`tests.sim.cluster` says what is judged, `tests.sim.test_broken` shows that it can fail. A failure says its seed, and the same
seed plays the same play.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvshare.runs import keys_of
from tests.sim import faults
from tests.sim.cluster import TOLD_MAX, Cluster, Plot, small_messages
from tests.sim.world import Broken

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", range(6))
def test_a_cluster_that_lived_through_a_storm_is_in_order(seed: int) -> None:
    plot = Plot.drawn(seed, nodes=40)
    cluster = Cluster(dataclasses.replace(plot, seconds=30.0, slots=16, requests_per_second=0.5, faults_per_second=3.0))
    cluster.play()
    # The storm was one.
    for what in ("requests", "found", "read", "stale", "resyncs", "deaths"):
        assert cluster.world.counts[what] > 0, what


@pytest.mark.parametrize("shards", [1, 3])
def test_publishes_that_are_lost_or_come_twice_are_told_again(shards: int) -> None:
    cluster = Cluster(Plot(9, nodes=40, shards=shards, lossy=0.1, faults_per_second=0.0, strangers_per_second=0.0))
    cluster.play()
    # More inventories were told than nodes have started.
    assert sum(counter(cluster, "resyncs")) > shards * sum(node.alive for node in cluster.setting.nodes.values())


def test_what_is_right_needs_no_repair() -> None:
    """Gaps and sums that differ come from faults of our own code, and there are none."""
    cluster = Cluster(Plot(10, nodes=60, shards=2, seconds=60.0))
    cluster.play()
    assert counter(cluster, "drift") == [0, 0]
    assert not [line for shard in cluster.setting.shards for line in shard.told if "tells anew all" in line]


def test_three_hundred_nodes_arrive_at_once_and_lose_a_third() -> None:
    cluster = Cluster(Plot(11, nodes=300, shards=2, prompts=600, seconds=10.0, faults_per_second=0.0))
    with small_messages(cluster.plot):
        cluster.storm()
        for node in cluster.world.random.sample(list(cluster.setting.nodes.values()), 100):
            node.die(loud=cluster.world.chance(0.5))
        cluster.calm()
        cluster.judge()
    assert 150 < sum(node.alive for node in cluster.setting.nodes.values()) <= 200


def test_a_directory_that_forgot_something_finds_out_and_asks_for_it() -> None:
    """Within two heartbeats of each node, and one line for each."""
    cluster = Cluster(Plot(12, nodes=20, shards=2, seconds=10.0, faults_per_second=0.0, strangers_per_second=0.0))
    cluster.play()
    shard = cluster.setting.shards[1]
    damaged = [node for node in cluster.setting.nodes.values() if any(node.shard_of(block.key) == 1 for block in node.held())]
    assert len(damaged) > 10
    for node in damaged:
        mine = [block.key for block in node.held() if node.shard_of(block.key) == 1]
        shard.index.remove(node.name, keys_of(mine[:1]))
    with pytest.raises(Broken, match="has other sums"):
        cluster.judge()
    cluster.world.run(30.0)
    cluster.judge()
    assert counter(cluster, "drift") == [0, len(damaged)]


def test_nobody_is_taken_for_dead_because_a_clock_jumped() -> None:
    cluster = Cluster(Plot(13, nodes=20, shards=2, seconds=10.0, faults_per_second=0.0, strangers_per_second=0.0))
    with small_messages(cluster.plot):
        cluster.storm()
        for seconds in (3600.0, -7200.0, 1e6, 40.0, -0.5):
            for shard in cluster.setting.shards:
                shard.jump(seconds)
            cluster.world.run(40.0)
        cluster.calm()
        cluster.judge()
    assert counter(cluster, "losses") == [0, 0]


def test_a_directory_without_room_for_everything_knows_nothing_wrong() -> None:
    """What is refused is a miss; the rest is where the directory says, and questions are answered."""
    cluster = Cluster(Plot(14, nodes=30, shards=2, seconds=40.0, index_keys=40))
    with small_messages(cluster.plot):
        cluster.storm()
        cluster.calm()
    assert all(refused > 0 for refused in counter(cluster, "refused"))
    alive = {name: node for name, node in cluster.setting.nodes.items() if node.alive}
    held = {name: {block.key: block for block in node.held()} for name, node in alive.items()}
    keys = sorted({key for blocks in held.values() for key in blocks})
    known = 0
    for shard in cluster.setting.shards:
        shard.check()
        assert len(shard.index) <= 40
        for key, places in zip(keys, shard.index.locate(keys, "", TOLD_MAX), strict=True):
            known += len(places)
            assert all(held[where.node][key].generation == where.generation for where in places)
    assert known > 0


def test_a_purge_reaches_everybody_whatever_happens_meanwhile() -> None:
    """Who was away is told when it is back; the asker hears who was silent."""
    cluster = Cluster(dataclasses.replace(Plot.drawn(15, nodes=30), shards=2, seconds=30.0))
    with small_messages(cluster.plot):
        for second in (5.0, 15.0, 25.0):
            cluster.world.later(second, lambda: faults.purge(cluster.setting))
        cluster.storm()
        cluster.calm()
        cluster.judge()
    assert cluster.world.counts["purges"] > 0


def test_the_same_seed_plays_the_same_play_in_another_process_too() -> None:
    program = (
        "import sys; from tests.sim.cluster import *; plot = Plot(int(sys.argv[1]), nodes=15, seconds=20.0, lossy=0.05);"
        "cluster = Cluster(plot); cluster.play(); print(cluster.world.history)"
    )

    def played(seed: int, hash_seed: str) -> str:
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", program, str(seed)]
        return subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True, text=True).stdout

    assert played(7, "1") == played(7, "2") != played(8, "1")


def counter(cluster: Cluster, name: str) -> list[int]:
    return [shard.directory.status().counters.get(name, 0) for shard in cluster.setting.shards]
