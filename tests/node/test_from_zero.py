"""Goal: what a cluster held when it was scaled to zero is served again by whoever comes next. Method: nodes that hand over and
end, then another one, in folders that have never held anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvshare
from tests.node.conftest import BLOCK_SIZE, Cluster, Host, blocks_of, eventually

COUNT = 24
DRAIN_SECONDS = 20.0


def tokens_of(prompt: int) -> list[int]:
    return [prompt * 10_000 + i for i in range(COUNT * BLOCK_SIZE)]


def counter(host: Host, name: str) -> int:
    assert host.node is not None
    return host.node.status().counters[name]


def load(cache: kvshare.Cache, tokens: list[int]) -> int:
    """Leading blocks that could be loaded; their bytes are those that were saved."""
    expected = blocks_of(tokens)
    filled = np.zeros_like(expected)
    count = cache.load(tokens, filled) // BLOCK_SIZE
    assert np.array_equal(filled[:count], expected[:count])
    return count


def test_a_machine_with_empty_folders_serves_what_all_nodes_left_in_the_object_store(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    (tmp_path / "bucket").mkdir()
    shared = {"object_url": f"file://{tmp_path}/bucket", "disk_admit": "used", "lookup_seconds": 20.0, "warm_bytes": 0}
    cluster.start_directory()
    leaving = [cluster.host(name, disk_dir=str(tmp_path / f"disk-{name}"), **shared).start() for name in ("a", "b")]
    for prompt, host in enumerate(leaving):
        with host.connect() as cache:
            assert cache.save(tokens_of(prompt), blocks_of(tokens_of(prompt))) == COUNT
        assert counter(host, "object_blocks") == 0  # nobody has asked for them again
    for host in leaving:
        assert host.node is not None
        drained = host.node.drain(DRAIN_SECONDS, to_peers=False)
        assert drained is not None
        assert (drained.moved, drained.kept, drained.lost) == (0, COUNT, 0)
    for host in leaving:
        host.stop()
    assert cluster.directory is not None
    cluster.directory.stop()

    cluster.start_directory()
    other = cluster.host("c", disk_dir=str(tmp_path / "disk-c"), **shared).start()
    assert eventually(lambda: counter(other, "object_blocks") == 2 * COUNT)
    assert counter(other, "disk_blocks") == 0
    with other.connect() as cache:
        for prompt in range(len(leaving)):
            assert load(cache, tokens_of(prompt)) == COUNT
