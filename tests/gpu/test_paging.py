"""Gather, scatter and digests of paged blocks on a real device, in the memory orders that vLLM uses there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvshare.integrations.vllm.gather import Pinned, Stager, digests  # noqa: E402

pytestmark = pytest.mark.gpu
ORDERS = ["LBHNC", "LBNHC", "BLHNC", "LHBNC", "|BHNC", "|BNHC"]


def staged(pinned: Pinned, places: Any) -> list[bytes]:
    """What lies at each place."""
    return [bytes(row.numpy()) for memory, _ in pinned.runs(places) for row in memory]


def busy(device: Any) -> None:
    """Keep the engine's stream from getting to what comes next for a while."""
    if device.type == "cuda":
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_reach_pinned_memory_as_they_are_and_come_back_elsewhere(order: str, make_cache: Any, accelerator: Any) -> None:
    cache = make_cache(order)
    blocks = cache.pages.blocks
    before = [cache.content(block) for block in range(blocks)]
    pinned = Pinned(accelerator, cache.block_bytes)
    stager = Stager(cache.pages, pinned, accelerator, piece_bytes=3 * cache.block_bytes)
    random = np.random.default_rng(1)
    sources, targets = random.permutation(blocks)[: blocks // 2], random.permutation(blocks)[: blocks // 2]
    places = random.permutation(pinned.take(blocks // 2))
    accelerator.wait(stager.gather(sources, places, accelerator.mark()))
    assert [staged(pinned, places[i : i + 1])[0] for i in range(len(places))] == [before[block] for block in sources.tolist()]
    accelerator.wait(stager.scatter(places, targets, accelerator.mark()))
    for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
        assert cache.content(target) == before[source]
    for other in set(range(blocks)) - set(targets.tolist()):
        assert cache.content(other) == before[other], "nothing else is written"


def test_a_gather_waits_for_what_the_engine_was_given_before_it(make_cache: Any, accelerator: Any, device: Any) -> None:
    cache = make_cache("LBHNC")
    pinned = Pinned(accelerator, cache.block_bytes)
    stager, places = Stager(cache.pages, pinned, accelerator), pinned.take(4)
    busy(device)
    cache.fill([3, 1, 4, 5], 77)
    accelerator.wait(stager.gather([3, 1, 4, 5], places, accelerator.mark()))
    assert set(np.concatenate([np.frombuffer(block, np.int16) for block in staged(pinned, places)]).tolist()) == {77}


def test_a_scatter_waits_for_a_former_owners_step(make_cache: Any, accelerator: Any, device: Any) -> None:
    cache = make_cache("|BHNC")
    pinned = Pinned(accelerator, cache.block_bytes)
    stager, places = Stager(cache.pages, pinned, accelerator), pinned.take(4)
    before = [cache.content(block) for block in range(4)]
    accelerator.wait(stager.gather([0, 1, 2, 3], places, accelerator.mark()))
    busy(device)
    cache.fill([9, 8, 7, 6], -1)
    accelerator.wait(stager.scatter(places, [9, 8, 7, 6], accelerator.mark()))
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert [cache.content(block) for block in (9, 8, 7, 6)] == before


def test_equal_blocks_have_equal_digests_in_whatever_memory_order(make_cache: Any) -> None:
    inside, apart = make_cache("BLHNC"), make_cache("|BHNC")
    for name, tensor in inside.tensors.items():
        apart.tensors[name].copy_(tensor)
    blocks = list(range(inside.pages.blocks))
    found = digests(inside.pages, blocks)
    assert torch.equal(found, digests(apart.pages, blocks)) and len(set(found.tolist())) == len(blocks)


def test_a_digest_on_the_device_is_that_on_the_cpu(make_cache: Any) -> None:
    from kvshare.integrations.vllm.gather import PageRows
    from kvshare.integrations.vllm.layout import Layout

    cache = make_cache("LBNHC")
    blocks = [5, 0, 7]
    memory = torch.frombuffer(bytearray(b"".join(cache.content(block) for block in blocks)), dtype=torch.int64)
    column = np.array([cache.block_bytes], np.uint64)
    layout = Layout(np.array([memory.data_ptr()], np.uint64), column, column, "test", "cpu")
    assert digests(cache.pages, blocks).tolist() == digests(PageRows(layout, {"all": memory}), [0, 1, 2]).tolist()


def test_one_changed_element_changes_one_digest(make_cache: Any) -> None:
    cache = make_cache("LBHNC")
    blocks = list(range(cache.pages.blocks))
    before = digests(cache.pages, blocks)
    cache.tensors["layer.2"][6, 1, 2, 3] += 1
    changed = torch.nonzero(digests(cache.pages, blocks) != before)
    assert changed.flatten().tolist() == [6]
