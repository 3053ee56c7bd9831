"""Blocks of another process's GPU memory, read through NIXL into ours: whole, verified, never one that was being written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nixl")

from kvshare.device import DeviceTable  # noqa: E402
from kvshare.integrations.vllm.layout import Layout, pages_of  # noqa: E402
from kvshare.integrations.vllm.pages import DevicePages  # noqa: E402
from kvshare.loading import LoadPlan, SourceRead  # noqa: E402
from kvshare.places import RegionDescription  # noqa: E402
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets, Transfer  # noqa: E402

nixl = pytest.importorskip("kvshare.transport.nixl")

pytestmark = pytest.mark.gpu
ROUNDS = 500


class Owner:
    """`owner_child.py`, running."""

    def __init__(self, table_path: Path, device: Any, mode: str) -> None:
        script = str(Path(__file__).with_name("owner_child.py"))
        where = "cpu" if device.type == "cpu" else "cuda:0"
        self.process = subprocess.Popen([sys.executable, script, str(table_path), where, mode], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError("the owner has ended; its last words are above")
        self.description = msgspec.json.decode(line, type=RegionDescription)
        self.table = DeviceTable.open(str(table_path))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def owner(request: Any, tmp_path: Path, device: Any) -> Iterator[Owner]:
    made = Owner(tmp_path / "table", device, request.param)
    yield made
    made.close()


class Reader:
    """A transport of this process, and memory [slots, words] on the device for its blocks to land in."""

    def __init__(self, owner: Owner, device: Any) -> None:
        self._owner, self._device = owner, device
        self.transport = nixl.NixlTransport()
        description = owner.description
        self.landing = torch.zeros((description.slots, description.slot_bytes // 8), dtype=torch.int64, device=device)
        kind = "DRAM" if device.type == "cpu" else "VRAM"
        self.transport.register_targets(self.landing.data_ptr(), self.landing.nbytes, kind, device.index or 0)

    def read(self, slots: Any, generations: Any) -> Completion:
        """Blocks of these slots, one behind the other at the beginning of `landing`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # what we wrote there
        length = self._owner.description.slot_bytes
        targets = Targets.strided(self.landing.data_ptr(), length, np.arange(len(slots)), length)
        request = ReadRequest(np.asarray(slots, np.int64), generations, np.zeros(len(slots), np.uint64), targets, 10.0)
        completion = self.transport.read(self._owner.description, request).wait(30.0)
        assert completion is not None
        return completion

    def holds(self, blocks: Any, values: Any) -> bool:
        """Is every word of these blocks of `landing` the block's value?"""
        expected = torch.tensor(np.asarray(values, np.int64), device=self._device)[:, None]
        return bool((self.landing[torch.tensor(blocks, device=self._device)] == expected).all())


@pytest.fixture
def reader(owner: Owner, device: Any) -> Iterator[Reader]:
    made = Reader(owner, device)
    yield made
    made.transport.close()


@pytest.mark.parametrize("owner", ["still"], indirect=True)
def test_blocks_arrive_whole_from_another_process(owner: Owner, reader: Reader) -> None:
    slots = np.random.default_rng(1).permutation(owner.description.slots)
    generations = owner.table.generations(slots)
    completion = reader.read(slots, generations)
    assert completion.ok and completion.bytes == owner.description.slot_bytes * len(slots)
    assert reader.holds(np.arange(len(slots)), generations)


@pytest.mark.parametrize("owner", ["still"], indirect=True)
def test_what_is_no_more_is_stale(owner: Owner, reader: Reader) -> None:
    slots = np.arange(4)
    generations = owner.table.generations(slots)
    generations[2] += np.uint64(2)
    completion = reader.read(slots, generations)
    expected = [BlockStatus.OK, BlockStatus.OK, BlockStatus.STALE, BlockStatus.OK]
    assert completion.statuses.tolist() == expected and reader.holds([0, 1, 3], generations[[0, 1, 3]])


@pytest.mark.parametrize("owner", ["rewriting"], indirect=True)
def test_no_block_is_accepted_that_a_kernel_was_writing(owner: Owner, reader: Reader) -> None:
    random, found = np.random.default_rng(2), {status: 0 for status in BlockStatus}
    for _ in range(ROUNDS):
        slots = random.choice(owner.description.slots, 16, replace=False)
        generations = owner.table.generations(slots) & ~np.uint64(1)  # of what is being written its last version
        statuses = reader.read(slots, generations).statuses
        accepted = np.flatnonzero(statuses == BlockStatus.OK)
        assert not len(accepted) or reader.holds(accepted, generations[accepted]), "a wrong block was accepted"
        for status in statuses.tolist():
            found[BlockStatus(status)] += 1
    assert found[BlockStatus.OK] and found[BlockStatus.STALE]
    assert sum(found.values()) == found[BlockStatus.OK] + found[BlockStatus.STALE]


@pytest.mark.parametrize("owner", ["still"], indirect=True)
def test_a_dead_owner_is_a_miss(owner: Owner, reader: Reader) -> None:
    slots = np.arange(8)
    generations = owner.table.generations(slots)
    assert reader.read(slots, generations).ok
    owner.close()
    statuses = reader.read(slots, generations).statuses
    assert not np.isin(statuses, [BlockStatus.OK, BlockStatus.CORRUPT]).any()


class DirectMover:
    """As `kvshare.mover.Mover` and its `Transports`, for plans of one source, through NIXL into registered memory."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def load(self, plan: LoadPlan, targets: Targets) -> Transfer:
        (read,) = plan.reads
        assert np.array_equal(read.positions, np.arange(len(plan)))
        request = ReadRequest(read.slots, read.generations, np.zeros(len(plan), np.uint64), targets, 10.0)
        transfer: Transfer = self._transport.read(read.description, request)
        return transfer

    def lands_directly(self, description: RegionDescription) -> bool:
        return True

    def quarantined(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = self._transport.quarantined()
        return found


@pytest.mark.parametrize("owner", ["still"], indirect=True)
def test_an_engines_blocks_land_in_the_pages_of_another_after_a_former_owners_step(
    owner: Owner, reader: Reader, device: Any, accelerator: Any
) -> None:
    description, blocks = owner.description, 96
    assert description.memory is not None
    words = [length // 8 for length in description.memory.page_bytes]
    layers = [torch.zeros((blocks, 1, 1, count), dtype=torch.int64, device=device) for count in words]
    tensors = {f"layer.{i}": layer for i, layer in enumerate(layers)}
    pages = [page for tensor in tensors.values() for page in pages_of(tensor, blocks)[0]]
    layout = Layout(*(np.array(column, np.uint64) for column in zip(*pages, strict=True)), "test", device.type)
    for tensor in tensors.values():
        kind = "DRAM" if device.type == "cpu" else "VRAM"
        reader.transport.register_targets(tensor.data_ptr(), tensor.nbytes, kind, device.index or 0)
    mover, random = DirectMover(reader.transport), np.random.default_rng(3)
    engine = DevicePages(layout, tensors, mover, accelerator, mover)  # type: ignore[arg-type]
    for version in range(60):
        slots = random.choice(description.slots, int(random.integers(1, 33)), replace=False)
        chosen = random.choice(blocks, len(slots) + 1, replace=False)
        bystander, targets = chosen[0], chosen[1:]
        index = torch.from_numpy(chosen).to(device)  # now: it would wait for what comes next
        if device.type == "cuda":
            torch.cuda._sleep(10_000_000)  # the former owner's step has not come far when the load begins
        for tensor in tensors.values():
            tensor.index_fill_(0, index, -1 - version)
        generations = owner.table.generations(slots)
        read = SourceRead(description, np.arange(len(slots)), slots, generations)
        completion = engine.load(LoadPlan(b"p", [b"%d" % slot for slot in slots], [read]), targets.tolist()).wait(30.0)
        assert completion is not None and completion.ok, completion
        expected = torch.from_numpy(np.append(generations.astype(np.int64), -1 - version)).to(device)[:, None, None, None]
        rows = torch.from_numpy(np.append(targets, bystander)).to(device)
        for tensor in tensors.values():  # the engine's next kernels
            assert bool((tensor[rows] == expected).all())
    engine.close()
