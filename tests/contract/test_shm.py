"""What only mapped files do: owners that die, and files that are replaced."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvshare import keys
from kvshare.slots import Arena
from kvshare.transport.base import BlockStatus, Completion
from kvshare.transport.shm import ShmTransport

from .conftest import HOST, SLOT_BYTES, Block, Landing, request_for, write

OK, STALE, UNREACHABLE = BlockStatus.OK, BlockStatus.STALE, BlockStatus.UNREACHABLE


def arena(folder: Path, slots: int = 4) -> Arena:
    made = Arena.open(str(folder / "arena"), SLOT_BYTES, slots * SLOT_BYTES, SLOT_BYTES)
    while made.available_slots < slots and made.grow():
        pass
    return made


def save(region: Arena, slot: int) -> Block:
    return write(region, slot, np.full(SLOT_BYTES, slot + 1, np.uint8), seed=slot)


def read(reader: ShmTransport, region: Arena, blocks: list[Block]) -> Completion:
    landing = Landing(len(blocks), [SLOT_BYTES])
    completion = reader.read(region.describe("a", HOST, ""), request_for(blocks, landing.targets)).wait()
    assert completion is not None
    for i in np.flatnonzero(completion.statuses == OK).tolist():
        assert np.array_equal(landing.block(i), blocks[i].data)
    return completion


def test_only_regions_of_the_same_host_are_reached(short_dir: Path) -> None:
    region = arena(short_dir)
    with ShmTransport(HOST) as reader:
        assert reader.reaches(region.describe("a", HOST, ""))
        assert not reader.reaches(region.describe("a", "another host", ""))
    region.close(unlink=True)


def test_files_that_are_gone_make_blocks_unreachable(short_dir: Path) -> None:
    region = arena(short_dir)
    block = save(region, 1)
    with ShmTransport(HOST) as reader:
        assert read(reader, region, [block]).ok
        region.close(unlink=True)
        assert read(reader, region, [block]).statuses.tolist() == [UNREACHABLE]


def test_files_that_are_no_region_make_blocks_unreachable(short_dir: Path) -> None:
    region = arena(short_dir)
    block = save(region, 1)
    os.truncate(region.table_path, 100)
    with ShmTransport(HOST) as reader:
        assert read(reader, region, [block]).statuses.tolist() == [UNREACHABLE]


def test_an_owner_that_restarts_with_its_files_leaves_old_locations_stale(short_dir: Path) -> None:
    before = arena(short_dir)
    old = write(before, 1, np.full(SLOT_BYTES, 9, np.uint8), seed=keys.seed_of(b"key-1"))
    with ShmTransport(HOST) as reader:
        assert read(reader, before, [old]).ok
        before.close(unlink=False)
        after = arena(short_dir)
        (recovered,) = after.recovered
        new = replace(old, generation=recovered.generation)
        assert read(reader, after, [old, new]).statuses.tolist() == [STALE, OK]
    after.close(unlink=True)


def test_files_that_were_replaced_are_mapped_anew(short_dir: Path) -> None:
    before = arena(short_dir)
    old = save(before, 1)
    with ShmTransport(HOST) as reader:
        assert read(reader, before, [old]).ok
        before.close(unlink=True)
        after = arena(short_dir, slots=8)
        new = save(after, 7)
        completion = read(reader, after, [old, new])
        assert completion.statuses.tolist() == [STALE, OK]
    after.close(unlink=True)


def test_slots_that_the_arena_grew_to_are_read_through_the_old_mapping(short_dir: Path) -> None:
    region = Arena.open(str(short_dir / "arena"), SLOT_BYTES, 4 * SLOT_BYTES, SLOT_BYTES)
    assert region.grow()
    with ShmTransport(HOST) as reader:
        first = save(region, 0)
        assert read(reader, region, [first]).ok
        beyond = Block(3, first.generation, 0, first.data)
        assert read(reader, region, [beyond]).statuses.tolist() == [STALE], "a slot without memory is never touched"
        while region.available_slots < 4:
            assert region.grow()
        assert read(reader, region, [first, save(region, 3)]).ok
    region.close(unlink=True)


def test_a_process_reads_its_own_arena_through_the_mapping_that_it_has(short_dir: Path) -> None:
    region = arena(short_dir)
    block = save(region, 1)
    with ShmTransport(HOST) as transport:
        transport.register(region)
        assert transport.region_of(region.describe("a", HOST, "")) is region
        assert read(transport, region, [block]).ok
        transport.deregister(region)
        assert transport.region_of(region.describe("a", HOST, "")) is not region
    region.close(unlink=True)
