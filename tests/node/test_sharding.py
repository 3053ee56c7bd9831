"""Engines of unequal tensor parallelism on one node: what two ranks saved fills one rank's cache, and back, in the layouts that
vLLM uses on GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and torch's own making
    pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

import msgspec
import torch

from kvshare import keys
from kvshare.errors import NamespaceError
from kvshare.integrations.vllm.layout import Layout
from kvshare.integrations.vllm.lookup import ShardedLookup
from kvshare.integrations.vllm.pages import HostPages
from kvshare.integrations.vllm.sharding import ShardedPages, Shards, cut
from kvshare.mover import Mover
from kvshare.session import Session
from kvshare.transport.base import BlockStatus
from tests.node.conftest import SPACE, Cluster, Host, eventually

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 9, 4, 4, 32
ORDERS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
HASHES = [bytes([i]) * 8 for i in range(4)]


def caches(order: str, heads: int) -> dict[str, torch.Tensor]:
    """A KV cache of zeros in this memory order, as vLLM hands it over: a view [B, H, N, C] for each layer."""
    sizes = {"L": LAYERS, "B": BLOCKS, "H": heads, "N": TOKENS, "C": CONTENT}
    logical = torch.zeros([sizes[d] for d in order], dtype=torch.int16).permute([order.index(d) for d in "LBHNC"])
    return {f"layer.{i}": logical[i] for i in range(LAYERS)}


def truth(blocks: int) -> torch.Tensor:
    """What ``blocks`` blocks of the whole model hold: [blocks, L, H, N, C]."""
    generator = torch.Generator().manual_seed(blocks)
    return torch.randint(-(2**15), 2**15, (blocks, LAYERS, HEADS, TOKENS, CONTENT), dtype=torch.int16, generator=generator)


def layout(kv_caches: dict[str, torch.Tensor], heads: slice) -> Layout:
    rank_heads = kv_caches["layer.0"].shape[1]
    page_bytes = rank_heads * TOKENS * CONTENT * 2
    spec = SimpleNamespace(unpadded_page_size_bytes=page_bytes, block_size=TOKENS, head_size=64, num_kv_heads=rank_heads)
    group = SimpleNamespace(layer_names=list(kv_caches), kv_cache_spec=spec)
    backend = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "TEST"))
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(kv_caches, backend)),
        model_config=SimpleNamespace(dtype=torch.bfloat16), cache_config=SimpleNamespace(cache_dtype="auto"),
    )  # fmt: skip
    cache_config = SimpleNamespace(kv_cache_groups=[group], num_blocks=BLOCKS)
    return Layout.of(kv_caches, cache_config, vllm_config, heads)


class Rank:
    """A worker: its part of the KV cache, and what moves its shards."""

    def __init__(self, host: Host, order: str, ranks: int, rank: int, head_shards: int, stack: ExitStack) -> None:
        self.shards = cut(HEADS, ranks, rank, head_shards)
        self.heads = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
        self.caches = caches(order, HEADS // ranks)
        layouts = [layout(self.caches, self.shards.heads(shard, HEADS // ranks)) for shard in self.shards.own]
        self.block_bytes = layouts[0].block_bytes
        packing = layouts[0].packing
        self.spaces = [
            msgspec.structs.replace(SPACE, packing=packing, tensor_parallel=f"{shard}/{self.shards.count}")
            for shard in range(self.shards.count)
        ]
        session = Session.connect(
            host.settings, self.spaces[self.shards.own.start], engine="e", block_bytes=self.block_bytes, subscribe=False
        )
        mover = Mover(session)
        stack.callback(session.close)
        stack.callback(mover.close)
        families = [space.family() for space in self.spaces]
        self.pages = ShardedPages(self.shards, [HostPages(part, mover) for part in layouts], families)

    def write(self, blocks: torch.Tensor, block_ids: list[int]) -> None:
        for i, block_id in enumerate(block_ids):
            for layer in range(LAYERS):
                self.caches[f"layer.{layer}"][block_id] = blocks[i, layer, self.heads]

    def holds(self, blocks: torch.Tensor, block_ids: list[int]) -> bool:
        return all(
            torch.equal(self.caches[f"layer.{layer}"][block_id], blocks[i, layer, self.heads])
            for i, block_id in enumerate(block_ids)
            for layer in range(LAYERS)
        )


@contextmanager
def engine(host: Host, order: str, ranks: int, head_shards: int = 2) -> Iterator[tuple[list[Rank], ShardedLookup]]:
    """Workers of an engine and its scheduler's lookup."""
    with ExitStack() as stack:
        workers = [Rank(host, order, ranks, rank, head_shards, stack) for rank in range(ranks)]
        spaces, block_bytes = workers[0].spaces, workers[0].block_bytes
        sessions = [Session.connect(host.settings, space, engine="e", block_bytes=block_bytes) for space in spaces]
        lookup = ShardedLookup(sessions, [space.family() for space in spaces])
        stack.callback(lookup.close)
        yield workers, lookup


def prefix_of(worker: Rank) -> bytes:
    return keys.prefix(worker.spaces[0].family())


def save(workers: list[Rank], blocks: torch.Tensor, block_ids: list[int]) -> None:
    for worker in workers:
        worker.write(blocks, block_ids)
        saving = worker.pages.save([prefix_of(worker) + block_hash for block_hash in HASHES], block_ids)
        assert saving.wait(10) and saving.done and saving.saved == len(block_ids)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("donor", "joiner"), [(2, 1), (1, 2), (2, 2), (1, 1), (4, 1), (1, 4)])
def test_blocks_of_one_degree_fill_the_cache_of_another(cluster: Cluster, order: str, donor: int, joiner: int) -> None:
    host, blocks = cluster.host("a").start(), truth(len(HASHES))
    shards = max(2, donor, joiner)
    with engine(host, order, donor, shards) as (workers, _):
        save(workers, blocks, [7, 0, 3, 4])
    with engine(host, order, joiner, shards) as (workers, lookup):
        chain = lookup.ask(prefix_of(workers[0]), HASHES)
        assert eventually(lambda: chain.available(0) == len(HASHES))
        plan = chain.plan(1, 3)
        assert len(plan.others) == shards - 1
        for worker in workers:
            completion = worker.pages.load(plan, [5, 2, 8]).wait()
            assert completion is not None and completion.ok, completion
            assert completion.bytes == 3 * worker.block_bytes * len(worker.shards.own)
            assert worker.holds(blocks[1:], [5, 2, 8])


def test_a_block_one_of_whose_shards_is_gone_is_not_there(cluster: Cluster) -> None:
    host, blocks = cluster.host("a").start(), truth(len(HASHES))
    with engine(host, "LBHNC", 2) as (workers, lookup):
        save(workers[:1], blocks, [0, 1, 2, 3])  # the other rank was killed
        chain = lookup.ask(prefix_of(workers[0]), HASHES)
        assert eventually(lambda: chain.available(0) is not None)
        assert chain.available(0) == 0
        assert not lookup.still(lookup.local(prefix_of(workers[0]), HASHES)).any()


def test_a_shard_that_fails_fails_its_block_alone(cluster: Cluster) -> None:
    host, blocks = cluster.host("a").start(), truth(len(HASHES))
    with engine(host, "LBNHC", 1) as (workers, lookup):
        (worker,) = workers
        save(workers, blocks, [0, 1, 2, 3])
        chain = lookup.ask(prefix_of(worker), HASHES)
        assert eventually(lambda: chain.available(0) == len(HASHES))
        plan = chain.plan(0, 4)
        read = plan.others[0].reads[0]
        read.generations[2] += np.uint64(2)  # as if it were evicted between question and read
        completion = worker.pages.load(plan, [4, 5, 6, 7]).wait()
        assert completion is not None
        assert completion.statuses.tolist() == [BlockStatus.OK, BlockStatus.OK, BlockStatus.STALE, BlockStatus.OK]


def test_orders_of_dimensions_that_differ_do_not_share(cluster: Cluster) -> None:
    host, blocks = cluster.host("a").start(), truth(len(HASHES))
    with engine(host, "LBHNC", 2) as (workers, _):
        save(workers, blocks, [0, 1, 2, 3])
    with engine(host, "LBNHC", 1) as (workers, lookup):
        chain = lookup.ask(prefix_of(workers[0]), HASHES)
        assert eventually(lambda: chain.available(0) is not None) and chain.available(0) == 0


def test_ranks_that_hold_the_same_heads_share_a_shard_and_the_first_saves_it() -> None:
    assert [cut(2, 4, rank, 0) for rank in range(4)] == [
        Shards(2, range(1), True), Shards(2, range(1), False), Shards(2, range(1, 2), True), Shards(2, range(1, 2), False)
    ]  # fmt: skip
    assert cut(8, 2, 1, 0) == Shards(2, range(1, 2), True)
    assert cut(8, 2, 1, 4) == Shards(4, range(2, 4), True)
    assert cut(8, 2, 1, 4).heads(3, 4) == slice(2, 4)
    assert cut(8, 1, 0, 0) == Shards(1, range(1), True)


@pytest.mark.parametrize(("heads", "ranks", "head_shards"), [(8, 2, 3), (8, 4, 2), (2, 4, 4)])
def test_a_cut_that_cannot_be_is_told(heads: int, ranks: int, head_shards: int) -> None:
    with pytest.raises(NamespaceError, match=f"setting 'head_shards' cannot be {head_shards}.*use"):
        cut(heads, ranks, 0, head_shards)
