"""What only reads of another process's memory do: owners that rewrite, stop, die, or are not who they were."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare import native, processes
from kvshare.device import DeviceTable
from kvshare.places import DEVICE, ProcessMemory, RegionDescription
from kvshare.slots import Region
from kvshare.transport.base import BlockStatus, Completion, ReadRequest
from kvshare.transport.process import ProcessTransport, memory_of_region

from .conftest import HOST, SLOT_BYTES, Landing, request_for, write

OK, STALE, UNREACHABLE = BlockStatus.OK, BlockStatus.STALE, BlockStatus.UNREACHABLE
LAYERS, SLOTS, PAGE_BYTES = 4, 64, 8192
BLOCK_BYTES = LAYERS * PAGE_BYTES
CUTS = [[PAGE_BYTES] * LAYERS, [BLOCK_BYTES], [1000, 20_000, BLOCK_BYTES - 21_000]]  # of targets, by other layouts


def ask(slots: Any, generations: Any, landing: Landing) -> ReadRequest:
    """A device region's blocks have no checksums, hence no seeds."""
    seeds = np.zeros(len(slots), np.uint64)
    return ReadRequest(np.asarray(slots, np.int64), np.asarray(generations, np.uint64), seeds, landing.targets)


def accepted(completion: Completion | None, generations: Any, landing: Landing) -> dict[BlockStatus, int]:
    """How many blocks have each status; the accepted ones are whole, and of the version that was asked for."""
    assert completion is not None
    for i in np.flatnonzero(completion.statuses == OK).tolist():
        assert (landing.block(i).view(np.uint64) == generations[i]).all(), "a wrong block was accepted"
    return {status: int(np.count_nonzero(completion.statuses == status)) for status in BlockStatus}


class Engine:
    """A device region in this process. Every version of a block is one repeated number, its generation."""

    def __init__(self, table_path: str, slots: int = SLOTS) -> None:
        self.layers = [np.zeros((slots, PAGE_BYTES // 8), np.uint64) for _ in range(LAYERS)]
        self.table = DeviceTable.create(table_path, slots, BLOCK_BYTES)
        bases, pages = tuple(native.address_of(layer) for layer in self.layers), (PAGE_BYTES,) * LAYERS
        process = os.getpid(), processes.started(os.getpid()), processes.pid_space()
        self.memory = ProcessMemory(*process, "DRAM", 0, bases, pages, pages, self.table.table_address, 8)
        self.description = RegionDescription("a", 1, BLOCK_BYTES, slots, "", "", table_path, "", DEVICE, self.memory)

    def save(self, slots: list[int]) -> list[int]:
        """New versions of these slots; their generations."""
        self.table.begin(slots)
        begun = self.table.generations(slots)
        for slot, generation in zip(slots, begun.tolist(), strict=True):
            for layer in self.layers:
                layer[slot] = generation + 1
        self.table.finish(slots, begun)
        return self.table.generations(slots).tolist()

    def described(self, **changes: Any) -> RegionDescription:
        """Its description, with another ``table_path`` or other fields of its memory."""
        path = changes.pop("table_path", self.description.table_path)
        return msgspec.structs.replace(
            self.description, table_path=path, memory=msgspec.structs.replace(self.memory, **changes)
        )


class Child:
    """An owner that is another process (`process_child.py`)."""

    def __init__(self, table_path: Path, seed: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("process_child.py")), str(table_path), str(seed)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.description = msgspec.json.decode(self._process.stdout.readline(), type=RegionDescription)
        self.table = DeviceTable.open(str(table_path))

    def current(self, slots: Any) -> Any:
        """Generations of these slots at this moment; what a slot was that is being written is asked for nevertheless."""
        return self.table.generations(slots) & ~np.uint64(1)

    def stop(self) -> None:
        """When this returns it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(self._process.pid, os.WUNTRACED)[1])

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Kill it; when this returns, its pid is free."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def start_child(short_dir: Path) -> Iterator[Callable[[int], Child]]:
    children: list[Child] = []

    def start(seed: int) -> Child:
        children.append(Child(short_dir / f"table-{seed}", seed))
        return children[-1]

    yield start
    for child in children:
        child.close()


@pytest.fixture
def engine(short_dir: Path) -> Engine:
    return Engine(str(short_dir / "table"))


@pytest.fixture
def reader() -> Iterator[ProcessTransport]:
    with ProcessTransport() as made:
        yield made


def read(reader: ProcessTransport, description: RegionDescription, slots: Any, generations: Any) -> Completion:
    landing = Landing(len(slots), [BLOCK_BYTES])
    completion = reader.read(description, ask(slots, generations, landing)).wait()
    accepted(completion, generations, landing)
    assert completion is not None
    return completion


# --- an owner that goes on -------------------------------------------------------------------------------------------


def test_an_owner_that_rewrites_its_blocks_never_gets_a_wrong_one_accepted(
    start_child: Callable[[int], Child], reader: ProcessTransport
) -> None:
    child, random = start_child(11), np.random.default_rng(12)
    counts = dict.fromkeys(BlockStatus, 0)
    landings = [Landing(SLOTS, cut, seed=i) for i, cut in enumerate(CUTS)]
    for reads in range(20_000):
        landing, slots = landings[reads % len(landings)], random.permutation(SLOTS)
        generations = child.current(slots)
        completion = reader.read(child.description, ask(slots, generations, landing)).wait()
        for status, count in accepted(completion, generations, landing).items():
            counts[status] += count
        if reads >= 3_000 and counts[OK] >= 10_000 and counts[STALE] >= 1_000:
            break
    assert counts[OK] >= 10_000 and counts[STALE] >= 1_000, counts
    assert counts[OK] + counts[STALE] == sum(counts.values())


def test_a_stopped_owner_is_read(start_child: Callable[[int], Child], reader: ProcessTransport) -> None:
    child = start_child(1)
    child.stop()
    generations = child.table.generations(np.arange(SLOTS))
    complete = np.flatnonzero(generations % np.uint64(2) == 0)
    assert len(complete) >= SLOTS - 8, "it rewrites up to eight at a time"
    for _ in range(20):
        assert read(reader, child.description, complete, generations[complete]).ok


# --- an owner that ends ----------------------------------------------------------------------------------------------


def test_an_owner_killed_at_a_random_moment_ends_reads_and_no_wrong_block_is_accepted(
    start_child: Callable[[int], Child], reader: ProcessTransport
) -> None:
    """Twenty owners, killed at seeded moments while one thread reads: before, in and after its reads."""
    random = np.random.default_rng(5)
    landings = [Landing(SLOTS, cut) for cut in CUTS]
    slots = np.arange(SLOTS)
    for seed in range(20):
        child = start_child(seed)
        killer = threading.Timer(float(random.uniform(0, 0.05)), child.kill)
        killer.start()
        reads = 0
        while True:
            landing, generations = landings[reads % len(landings)], child.current(slots)
            completion = reader.read(child.description, ask(slots, generations, landing)).wait(10)
            counts = accepted(completion, generations, landing)
            assert counts[OK] + counts[STALE] + counts[UNREACHABLE] == SLOTS
            reads += 1
            if counts[UNREACHABLE]:
                break
        killer.join()
        completion = read(reader, child.description, slots, child.current(slots))
        assert set(completion.statuses.tolist()) == {UNREACHABLE}
        assert "ended" in completion.error or "No such process" in completion.error


def test_owners_that_ended_leave_no_descriptor_behind(
    start_child: Callable[[int], Child], reader: ProcessTransport, engine: Engine
) -> None:
    generations = engine.save([1])
    assert read(reader, engine.description, [1], generations).ok

    def visit(seed: int) -> int:
        child = start_child(seed)
        read(reader, child.description, [1], child.current([1]))
        child.close()
        del child.table  # a mapping holds a descriptor
        return len(os.listdir("/proc/self/fd"))

    first = visit(0)
    assert [visit(seed) for seed in range(1, 4)] == [first] * 3, "the one that ended makes room for the next"


def test_an_owner_whose_pid_has_passed_to_another_is_unreachable(engine: Engine, reader: ProcessTransport) -> None:
    generations = engine.save([3])
    completion = read(reader, engine.described(started=engine.memory.started - 1), [3], generations)
    assert completion.statuses.tolist() == [UNREACHABLE]
    assert "not the one" in completion.error
    assert read(reader, engine.description, [3], generations).ok


@pytest.mark.parametrize("when", ["before the copy", "during the copy"])
def test_bytes_of_whoever_has_the_pid_of_an_ended_owner_are_not_accepted(
    start_child: Callable[[int], Child], reader: ProcessTransport, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that succeeds although its owner ended is that of another process, which got the pid."""
    child = start_child(3)
    slots = np.arange(SLOTS)
    assert (read(reader, child.description, slots, child.current(slots)).statuses == OK).any()
    copy = native.read_process

    def copy_and_succeed(pid: int, targets: Any, sources: Any, lengths: Any) -> int:
        if when == "during the copy":
            copied = copy(pid, targets, sources, lengths)
            child.close()
            return copied
        return int(lengths.sum())

    if when == "before the copy":
        child.close()
    monkeypatch.setattr(native, "read_process", copy_and_succeed)
    completion = read(reader, child.description, slots, child.current(slots))
    assert set(completion.statuses.tolist()) == {UNREACHABLE}


def test_a_pid_that_nobody_has_is_unreachable(engine: Engine, reader: ProcessTransport) -> None:
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text())
    assert read(reader, engine.described(pid=nobody), [3], engine.save([3])).statuses.tolist() == [UNREACHABLE]


# --- descriptions that lead nowhere ----------------------------------------------------------------------------------


def test_only_memory_that_this_process_may_address_is_reached(engine: Engine, reader: ProcessTransport) -> None:
    assert reader.reaches(engine.description)
    assert not reader.reaches(engine.described(kind="VRAM"))
    assert not reader.reaches(engine.described(pid_space="another host"))
    assert not reader.reaches(engine.described(pid=0))
    assert not reader.reaches(msgspec.structs.replace(engine.description, memory=None))


@pytest.mark.parametrize("bases", [(4096,) * LAYERS, (1 << 63,) * LAYERS, (-1,) * LAYERS, (1 << 70,) * LAYERS, (), (0,)])
def test_memory_that_is_not_there_is_unreachable(engine: Engine, reader: ProcessTransport, bases: tuple[int, ...]) -> None:
    generations = engine.save([3])
    completion = read(reader, engine.described(bases=bases), [3], generations)
    assert completion.statuses.tolist() == [UNREACHABLE]
    assert completion.error != ""


def test_a_table_that_is_gone_makes_blocks_unreachable(engine: Engine, reader: ProcessTransport) -> None:
    generations = engine.save([3])
    assert read(reader, engine.description, [3], generations).ok
    engine.table.unlink()
    assert read(reader, engine.description, [3], generations).statuses.tolist() == [UNREACHABLE]


@pytest.mark.parametrize(
    "place", [{"table_path": "{}/junk"}, {"table_path": "{}/nothing"}, {"table_path": "", "table_address": 0}]
)
def test_a_region_without_a_table_is_unreachable(
    engine: Engine, reader: ProcessTransport, short_dir: Path, place: dict[str, Any]
) -> None:
    (short_dir / "junk").write_bytes(bytes(8192))
    described = engine.described(**{**place, "table_path": place["table_path"].format(short_dir)})
    assert read(reader, described, [3], engine.save([3])).statuses.tolist() == [UNREACHABLE]


def test_memory_that_the_system_keeps_from_us_is_left_to_other_transports(
    engine: Engine, reader: ProcessTransport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with the remedy; a node that was forgotten is tried anew."""

    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    generations = engine.save([3])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "kvshare"):
        patch.setattr(native, "read_process", refuse)
        for _ in range(2):
            completion = read(reader, engine.description, [3], generations)
            assert completion.statuses.tolist() == [UNREACHABLE]
            assert "ptrace_scope" in completion.error
    assert len(caplog.records) == 1
    assert not reader.reaches(engine.description)
    reader.forget("a")
    assert reader.reaches(engine.description)
    assert read(reader, engine.description, [3], generations).ok


# --- generations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False], ids=["table file", "table in memory"])
def test_blocks_of_other_generations_are_stale(engine: Engine, reader: ProcessTransport, mapped: bool) -> None:
    described = engine.description if mapped else engine.described(table_path="")
    old = engine.save([0, 1, 2, 3])
    new = engine.save([1])
    engine.table.begin([2])
    slots = [0, 1, 1, 2, 2, 2, 3, -1, SLOTS, 1 << 40, 63]
    asked = [old[0], old[1], new[0], old[2], old[2] + 1, old[2] + 2, old[3], old[3], old[3], old[3], 0]
    statuses = read(reader, described, slots, np.array(asked, np.uint64)).statuses.tolist()
    assert statuses == [OK, STALE, OK, STALE, STALE, STALE, OK, STALE, STALE, STALE, STALE]
    engine.table.retire_all()
    assert set(read(reader, described, [0, 1, 3], [old[0], new[0], old[3]]).statuses.tolist()) == {STALE}


@pytest.mark.parametrize("mapped", [True, False], ids=["table file", "table in memory"])
def test_a_block_that_is_handed_out_while_it_is_copied_is_stale(
    engine: Engine, reader: ProcessTransport, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = engine.description if mapped else engine.described(table_path="")
    generations = engine.save([3, 4])
    copy = native.read_process

    def copy_and_hand_out(pid: int, targets: Any, sources: Any, lengths: Any) -> int:
        copied = copy(pid, targets, sources, lengths)
        if lengths.sum() >= BLOCK_BYTES:
            engine.table.begin([4])
        return copied

    monkeypatch.setattr(native, "read_process", copy_and_hand_out)
    assert read(reader, described, [3, 4], generations).statuses.tolist() == [OK, STALE]


def test_a_table_that_was_made_anew_is_mapped_anew(engine: Engine, reader: ProcessTransport) -> None:
    old = engine.save([3])
    assert read(reader, engine.description, [3], old).ok
    again = Engine(engine.table.path)
    new = again.save([3])
    assert read(reader, again.description, [3, 3], [*old, *new]).statuses.tolist() == [STALE, OK]


@pytest.mark.parametrize("length", [8, BLOCK_BYTES - 8, BLOCK_BYTES + 8])
def test_a_part_of_a_block_is_no_block(engine: Engine, reader: ProcessTransport, length: int) -> None:
    generations = engine.save([3])
    completion = reader.read(engine.description, ask([3], generations, Landing(1, [length]))).wait()
    assert completion is not None
    assert completion.statuses.tolist() == [STALE]


@pytest.mark.parametrize("cut", CUTS)
def test_reads_of_many_portions_bring_every_block(short_dir: Path, reader: ProcessTransport, cut: list[int]) -> None:
    engine = Engine(str(short_dir / "large"), slots=1024)
    generations = engine.save(list(range(1024)))
    landing = Landing(1024, cut)
    slots = np.random.default_rng(2).permutation(1024)
    chosen = np.array(generations, np.uint64)[slots]
    completion = reader.read(engine.description, ask(slots, chosen, landing)).wait()
    assert accepted(completion, chosen, landing)[OK] == 1024


# --- a node's region -------------------------------------------------------------------------------------------------


def test_a_region_is_served_again_when_it_is_registered_again(reader: ProcessTransport) -> None:
    region = Region.anonymous(SLOT_BYTES, 4)
    blocks = [write(region, slot, np.full(SLOT_BYTES, slot, np.uint8), seed=slot) for slot in range(4)]
    described = msgspec.structs.replace(region.describe("a", HOST, ""), memory=memory_of_region(region))
    statuses = []
    for change in (reader.deregister, reader.register, reader.deregister, reader.register):
        change(region)
        completion = reader.read(described, request_for(blocks, Landing(4, [SLOT_BYTES]).targets)).wait()
        assert completion is not None
        statuses.append(set(completion.statuses.tolist()))
    assert statuses == [{UNREACHABLE}, {OK}] * 2


def test_a_description_of_another_slot_size_is_unreachable(reader: ProcessTransport) -> None:
    region = Region.anonymous(SLOT_BYTES, 4)
    block = write(region, 1, np.full(SLOT_BYTES, 1, np.uint8), seed=1)
    reader.register(region)
    described = msgspec.structs.replace(
        region.describe("a", HOST, ""), slot_bytes=SLOT_BYTES // 2, memory=memory_of_region(region)
    )
    completion = reader.read(described, request_for([block], Landing(1, [SLOT_BYTES]).targets)).wait()
    assert completion is not None
    assert completion.statuses.tolist() == [UNREACHABLE]


# --- life ------------------------------------------------------------------------------------------------------------


def test_a_closed_reader_leaves_no_thread_and_no_descriptor(engine: Engine, request: pytest.FixtureRequest) -> None:
    generations = engine.save(list(range(SLOTS)))
    request.getfixturevalue("nothing_left_behind")
    for _ in range(3):
        with ProcessTransport(threads=3) as reader:
            landings = [Landing(SLOTS, [BLOCK_BYTES]) for _ in range(10)]
            transfers = [
                reader.read(engine.description, ask(np.arange(SLOTS), np.array(generations, np.uint64), one))
                for one in landings
            ]
            assert all(completion is not None and completion.ok for completion in (t.wait(60) for t in transfers))
