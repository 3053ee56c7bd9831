"""`DevicePages` on a real device, against a mover that is a dictionary, while the engine's stream goes on writing."""

from __future__ import annotations

import ctypes
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvshare.integrations.vllm.pages import DevicePages  # noqa: E402
from kvshare.loading import LoadPlan  # noqa: E402
from kvshare.transport.base import BlockStatus, Completion, Targets, Transfer  # noqa: E402

pytestmark = pytest.mark.gpu
ROUNDS = 60


class MemoryMover:
    """As `kvshare.mover.Mover`; ``bad`` keys arrive corrupt."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.bad: set[bytes] = set()

    def save(self, block_keys: list[bytes], sources: Targets) -> Any:
        for key, (address,) in zip(block_keys, sources.addresses.tolist(), strict=True):
            self.blocks[key] = ctypes.string_at(address, sources.block_bytes)
        return SimpleNamespace(done=True)

    def load(self, plan: LoadPlan, targets: Targets) -> Transfer:
        statuses = np.zeros(len(plan), np.uint8)
        for i, (key, (address,)) in enumerate(zip(plan.keys, targets.addresses.tolist(), strict=True)):
            bad = key in self.bad
            statuses[i] = BlockStatus.CORRUPT if bad else BlockStatus.OK
            ctypes.memmove(address, bytes(targets.block_bytes) if bad else self.blocks[key], targets.block_bytes)
        transfer = Transfer()
        transfer.complete(Completion(statuses, 0, 0.0))
        return transfer


def only(value: int, cache: Any) -> bytes:
    return bytes(np.full(cache.block_bytes // 2, value, np.int16))


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "|BHNC"])
def test_a_save_holds_exactly_what_was_there_although_blocks_are_overwritten_as_soon_as_it_is_done(
    order: str, make_cache: Any, accelerator: Any
) -> None:
    cache, mover, chance = make_cache(order), MemoryMover(), random.Random(order)
    pages = DevicePages(cache.layout, cache.tensors, mover, accelerator)
    for version in range(ROUNDS):
        blocks = chance.sample(range(cache.pages.blocks), chance.randint(1, cache.pages.blocks))
        cache.fill(blocks, version)
        saving = pages.save([b"%d-%d" % (version, block) for block in blocks], blocks)
        assert saving.wait(30.0) and saving.saved == len(blocks)
        cache.fill(blocks, -1 - version)  # the next owner's
        for block in blocks:
            assert mover.blocks.pop(b"%d-%d" % (version, block)) == only(version, cache)
    pages.close()


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "|BHNC"])
def test_loaded_blocks_survive_a_former_owners_writes_and_are_there_for_the_next_kernel(
    order: str, make_cache: Any, accelerator: Any
) -> None:
    cache, mover, chance = make_cache(order), MemoryMover(), random.Random(order)
    pages = DevicePages(cache.layout, cache.tensors, mover, accelerator)
    for version in range(ROUNDS):
        blocks = chance.sample(range(cache.pages.blocks), chance.randint(1, cache.pages.blocks // 2))
        bystander = next(block for block in range(cache.pages.blocks) if block not in blocks)
        cache.fill([*blocks, bystander], -5)  # still under way when the load begins
        hashes = [b"%d-%d" % (version, block) for block in blocks]
        mover.blocks = {b"p" + block_hash: only(version, cache) for block_hash in hashes}
        mover.bad = {b"p" + hashes[0]} if version % 2 else set()
        completion = pages.load(LoadPlan(b"p", hashes, []), blocks).wait(30.0)
        assert completion is not None
        found = torch.stack([tensor[[*blocks, bystander]] for tensor in cache.tensors.values()])
        lowest, highest = found.amin((0, 2, 3, 4)).tolist(), found.amax((0, 2, 3, 4)).tolist()
        expected = [version if status == BlockStatus.OK else -5 for status in completion.statuses.tolist()] + [-5]
        assert lowest == highest == expected
        assert completion.ok == (not mover.bad)
    pages.close()
