"""A real Ray cluster of two raylets on this machine, and kvshare on it, shared by the tests of a module."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.util
from ray.cluster_utils import Cluster as RayCluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import kvshare
import kvshare.integrations.ray as kvshare_ray
from kvshare.integrations.ray import Cluster, NodeState
from kvshare.keys import Namespace

BLOCK_BYTES = 8192
BLOCK_SIZE = 4
SPACE = Namespace(
    weights="blake2b:1", dtype="bf16", kv_dtype="bf16", block_size=BLOCK_SIZE, page_bytes=4096, layers=2, kv_heads=1,
    head_size=64, hash_algorithm="kvshare-chain", hash_seed="", packing="test", label="test model",
)  # fmt: skip
OBJECT_STORE_BYTES = 80 << 20


def eventually(question: Callable[[], object], seconds: float = 30.0) -> bool:
    """True as soon as ``question()`` is; False when it is not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if question():
            return True
        time.sleep(0.05)
    return False


def prompt(number: int, count: int = 40) -> list[int]:
    """Token ids of a prompt that shares no prefix with others."""
    return [number * 1000 + token for token in range(count)]


def blocks_of(tokens: list[int]) -> np.ndarray:
    """One row of random bytes per block, seeded by the block's tokens."""
    rows = [tokens[start : start + BLOCK_SIZE] for start in range(0, len(tokens), BLOCK_SIZE)]
    return np.stack([np.random.default_rng(row).integers(0, 255, BLOCK_BYTES, np.uint8) for row in rows])


class Engine:
    """A Ray actor with a custom stack that sets nothing: it must find the node of its Ray node by itself."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._cache = kvshare.connect(SPACE, block_bytes=BLOCK_BYTES, warm_bytes=0, lookup_seconds=5.0, **settings)

    def save(self, tokens: list[int]) -> int:
        return self._cache.save(tokens, blocks_of(tokens))

    def load(self, tokens: list[int]) -> int:
        """Leading tokens whose blocks could be loaded and are those that were saved."""
        found = np.zeros((len(tokens) // BLOCK_SIZE, BLOCK_BYTES), np.uint8)
        loaded = self._cache.load(tokens, found)
        count = loaded // BLOCK_SIZE
        assert np.array_equal(found[:count], blocks_of(tokens)[:count]), "wrong bytes"
        return loaded

    def close(self) -> None:
        self._cache.close()


class Fleet:
    """The Ray cluster, kvshare on it, and engines for a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ray_cluster = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                # Ray notices a dead raylet in two seconds instead of fifteen.
                "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
            },
        )
        self.add_raylet()
        self.settings: dict[str, Any] = {
            "cluster": "tests", "runtime_dir": str(folder), "shm_dir": str(folder), "arena_bytes": "4MiB",
            "arena_chunk_bytes": "1MiB", "transports": "tcp", "transfer_seconds": 2.0,
        }  # fmt: skip

    @property
    def address(self) -> str:
        return str(self.ray_cluster.address)

    def add_raylet(self) -> Any:
        return self.ray_cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)

    def start(self, **changes: Any) -> Cluster:
        return kvshare_ray.start(**{**self.settings, **changes})

    @contextmanager
    def engine(self, node: NodeState, **settings: Any) -> Iterator[Any]:
        """Handle of an `Engine` on this Ray node."""
        here = NodeAffinitySchedulingStrategy(node.ray_node, soft=False)
        actor = ray.remote(Engine).options(num_cpus=0, scheduling_strategy=here).remote(settings)
        try:
            yield actor
            ray.get(actor.close.remote(), timeout=20)
        finally:
            ray.kill(actor)

    def save(self, node: NodeState, tokens: list[int]) -> int:
        with self.engine(node) as engine:
            return int(ray.get(engine.save.remote(tokens), timeout=60))

    def load(self, node: NodeState, tokens: list[int]) -> int:
        with self.engine(node) as engine:
            return int(ray.get(engine.load.remote(tokens), timeout=60))

    def files(self) -> list[str]:
        """Sockets, locks, arena files of this cluster, and cards, wherever they lie."""
        places = [*self.folder.rglob("*"), *Path(kvshare.Settings().runtime_dir).glob("raylet-*@tests*")]
        return sorted(str(path) for path in places if not path.is_dir())

    def stop(self) -> None:
        ray.shutdown()
        self.ray_cluster.shutdown()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Does this process run (a zombie does not)?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    # Ray's workers cannot import tests: what they run of this file travels by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder:
        made = Fleet(Path(folder))
        try:
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            made.stop()


@pytest.fixture
def cluster(fleet: Fleet) -> Cluster:
    """kvshare on every Ray node; the first test starts it, others attach."""
    started = fleet.start()
    started.wait(60)
    return started
