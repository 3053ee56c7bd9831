"""Ray Serve sends requests where their blocks are. Goal: the holder's replica gets the prompt, another salt does not count, a
full replica is passed by, and without a directory requests go on. Method: a real Ray cluster of two nodes, kvshare and Serve on
it, a deployment that says where it ran, blocks saved by engines on one of the nodes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray

pytest.importorskip("ray.serve", exc_type=ImportError)
from ray import serve
from ray.serve.config import RequestRouterConfig

from kvshare.integrations.ray import Cluster, NodeState
from tests.ray.conftest import Fleet, eventually, kill, prompt

pytestmark = pytest.mark.ray
TOKENS = 400  # a hundred blocks
ONGOING_MAX = 2
SECONDS = 60.0
# Computing and links are slow: where a block lies decides by seconds.
ROUTER = RequestRouterConfig(
    request_router_class="kvshare.integrations.ray.serve.KVShareRouter",
    request_router_kwargs={"cluster": "tests", "prefill_rate": 100.0, "peer_rate": 1e5, "lookup_seconds": 1.0},
)


class Where:
    """Says on which Ray node it runs; stays as long as it is asked to."""

    async def __call__(self, request: dict[str, Any]) -> str:
        await asyncio.sleep(request.get("stay", 0.0))
        return str(ray.get_runtime_context().get_node_id())


@pytest.fixture(scope="module")
def where(fleet: Fleet) -> Iterator[Any]:
    """Handle of the deployment, one replica on each of the two Ray nodes."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(
        num_replicas=2,
        max_replicas_per_node=1,
        max_ongoing_requests=ONGOING_MAX,
        ray_actor_options={"num_cpus": 0},
        request_router_config=ROUTER,
    )(Where)
    yield serve.run(deployment.bind(), name="where", route_prefix=None)
    serve.shutdown()


def places(where: Any, count: int, tokens: list[int], **more: Any) -> list[str]:
    """Where so many requests for a prompt go, one after the other."""
    return [where.remote({"prompt": tokens, **more}).result(timeout_s=SECONDS) for _ in range(count)]


def all_go_to(where: Any, tokens: list[int], node: NodeState) -> bool:
    return set(places(where, 6, tokens)) == {node.ray_node}


def test_a_prompt_goes_where_its_blocks_are_and_another_salt_has_none(fleet: Fleet, cluster: Cluster, where: Any) -> None:
    nodes = cluster.status().nodes
    for number, node in enumerate(nodes):
        tokens = prompt(100 + number, TOKENS)
        assert fleet.save(node, tokens) == 100
        assert eventually(lambda tokens=tokens, node=node: all_go_to(where, tokens, node))
        assert all_go_to(where, [*tokens, 1, 2, 3], node), "a longer prompt with this beginning"
        assert set(places(where, 6, tokens, cache_salt="other")) == {state.ray_node for state in nodes}
    assert cluster.status().counters["depths"] > 0


def test_a_holder_that_is_full_is_passed_by(fleet: Fleet, cluster: Cluster, where: Any) -> None:
    nodes = cluster.status().nodes
    tokens = prompt(110, TOKENS)
    assert fleet.save(nodes[0], tokens) == 100
    assert eventually(lambda: all_go_to(where, tokens, nodes[0]))
    busy = [where.remote({"prompt": tokens, "stay": 5.0}) for _ in range(ONGOING_MAX + 1)]
    ended = [response.result(timeout_s=SECONDS) for response in busy]
    assert sorted(map(ended.count, {node.ray_node for node in nodes})) == [1, ONGOING_MAX]


def test_requests_without_a_prompt_and_short_ones_go_anywhere(cluster: Cluster, where: Any) -> None:
    both = {node.ray_node for node in cluster.status().nodes}
    assert eventually(lambda: set(places(where, 4, [])) == both)
    assert eventually(lambda: set(places(where, 4, [1, 2])) == both)


def test_a_killed_directory_delays_nobody_and_is_asked_again_when_it_is_back(
    fleet: Fleet, cluster: Cluster, where: Any
) -> None:
    nodes = cluster.status().nodes
    tokens = prompt(120, TOKENS)
    assert fleet.save(nodes[1], tokens) == 100
    assert eventually(lambda: all_go_to(where, tokens, nodes[1]))
    kill(cluster.status().shards[0].pid)
    assert set(places(where, 6, tokens)) <= {node.ray_node for node in nodes}
    assert eventually(lambda: all_go_to(where, tokens, nodes[1]))


def test_without_a_cluster_it_is_two_choices_and_a_new_one_is_found(fleet: Fleet, cluster: Cluster, where: Any) -> None:
    nodes = cluster.status().nodes
    tokens = prompt(130, TOKENS)
    assert fleet.save(nodes[0], tokens) == 100
    assert eventually(lambda: all_go_to(where, tokens, nodes[0]))
    cluster.stop()
    assert set(places(where, 20, tokens)) == {node.ray_node for node in nodes}
    anew = fleet.start()
    anew.wait(60)
    assert fleet.save(nodes[1], tokens) == 100
    assert eventually(lambda: all_go_to(where, tokens, nodes[1]))
