"""A directory of two shards as Ray actors. Goal: one that dies, or is removed, comes back and is filled again without any node
restarting, and `stop` leaves none. Method: a real Ray cluster of two raylets; a node's own address is asked of the engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from kvshare.errors import ConfigError
from kvshare.fingerprints import index_seed, shard_of
from kvshare.integrations.ray import Cluster, ClusterStatus
from kvshare.keys import chain, prefix
from kvshare.runs import keys_of
from tests.ray.conftest import BLOCK_SIZE, SPACE, Fleet, eventually, kill, prompt

SECRET = "a secret of the tests"


@pytest.fixture(scope="module")
def cluster(fleet: Fleet) -> Iterator[Cluster]:
    with fleet.start(cluster="divided", directory_shards=2, secret=SECRET) as started:
        started.wait(90)
        yield started
    names = [found["name"] for found in ray.util.list_named_actors(all_namespaces=True)]
    assert not [name for name in names if name.startswith("divided/")]


def pids(status: ClusterStatus) -> list[int]:
    return sorted(node.pid for node in status.nodes)


def owners(tokens: list[int]) -> list[int]:
    keys = [prefix(SPACE.family()) + block for block in chain(tokens, BLOCK_SIZE)]
    numbers: list[int] = shard_of(keys_of(keys), index_seed(SECRET), 2).tolist()
    return numbers


def test_both_shards_know_their_part_and_a_killed_one_is_filled_again(fleet: Fleet, cluster: Cluster) -> None:
    tokens = prompt(1, 80)
    before = cluster.status()
    assert len(before.shards) == 2 and before.directory.count(":") == 2, str(before)
    first, second = before.nodes
    fleet.save(first, tokens)
    counts = [owners(tokens).count(0), owners(tokens).count(1)]
    assert eventually(lambda: [shard.keys for shard in cluster.status().shards] == counts)
    for victim in (1, 0):
        gone = cluster.status().shards[victim].pid
        kill(gone)
        assert eventually(lambda victim=victim, gone=gone: cluster.status().shards[victim].pid not in (0, gone), 60)
        assert eventually(lambda: cluster.status().joined and [each.keys for each in cluster.status().shards] == counts, 60)
    assert pids(cluster.status()) == pids(before), "nodes went on undisturbed"
    assert fleet.load(second, tokens) == len(tokens)


def test_a_shard_that_is_removed_is_made_anew(cluster: Cluster) -> None:
    known = cluster.status()
    ray.kill(ray.get_actor("divided/directory/1", "kvshare"), no_restart=True)
    assert eventually(
        lambda: cluster.status().shards[1:] and cluster.status().shards[1].pid not in (0, known.shards[1].pid), 60
    )
    assert eventually(lambda: cluster.status().keys == known.keys, 60)


def test_a_running_cluster_is_not_divided_anew(fleet: Fleet, cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="'directory_shards' cannot be 3: kvshare cluster 'divided' runs with another"):
        fleet.start(cluster="divided", directory_shards=3, secret=SECRET)
