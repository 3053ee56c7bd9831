"""Regions and arenas on real files: what generations promise, what survives a killed owner, what a full system gets."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvshare import keys, native
from kvshare.errors import RegionError
from kvshare.slots import Arena, Region, remove_stale, stale_files

SLOT = 8192
CHUNK = 4 * SLOT
CAPACITY = 16 * SLOT


@pytest.fixture
def stem() -> Iterator[str]:
    """Where an arena's files go: in memory where the machine has a place for it, as in use."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvs-", dir=base) as folder:
        yield str(Path(folder) / f"kvshare-{os.getuid()}-test-node")


def opened(stem: str, chunks: int = 4, **changes: int) -> Arena:
    """An arena with all its chunks allocated."""
    arena = Arena.open(stem, **{"slot_bytes": SLOT, "capacity_bytes": CAPACITY, "chunk_bytes": CHUNK, **changes})
    for _ in range(chunks):
        arena.grow()
    return arena


def block_of(key: bytes, length: int = SLOT) -> bytes:
    return random.Random(key).randbytes(length)


def write(region: Region, slot: int, key: bytes, length: int = SLOT) -> int:
    """Save a block as a session and its node do together; returns its generation."""
    generation = region.begin(slot)
    block = block_of(key, length)
    native.view(region.slot_address(slot), length, writable=True)[:] = block
    return region.finish(slot, generation, key, length, xxhash.xxh3_64_intdigest(block, keys.seed_of(key)))


def read(region: Region, slot: int, length: int = SLOT) -> bytes:
    return bytes(native.view(region.slot_address(slot), length))


# --- generations ------------------------------------------------------------------------------------------------------


def test_a_generation_is_odd_while_written_and_even_when_complete() -> None:
    region = Region.anonymous(SLOT, 4)
    assert region.generations([2]).tolist() == [0]
    odd = region.begin(2)
    assert odd % 2 == 1
    assert region.generations([2]).tolist() == [odd]
    assert region.finish(2, odd, b"key", 100, 7) == odd + 1
    assert region.generations([2]).tolist() == [odd + 1]
    assert (region.checksums([2]).tolist(), region.lengths([2]).tolist(), region.key(2)) == ([7], [100], b"key")
    assert region.check() == []


def test_retiring_a_slot_is_one_increment() -> None:
    region = Region.anonymous(SLOT, 4)
    generation = write(region, 1, b"key")
    region.retire(1)
    assert region.generations([1]).tolist() == [generation + 1]


def test_no_transition_brings_a_generation_back() -> None:
    region, rng = Region.anonymous(SLOT, 1), random.Random(4)
    seen = [0]
    for _ in range(500):
        match rng.choice(["begin", "retire", "write"]):
            case "begin":
                region.begin(0)
            case "retire":
                region.retire(0)
            case "write":
                write(region, 0, b"key", 8)
        seen.append(int(region.generations([0])[0]))
    assert seen == sorted(set(seen))


def test_slots_that_do_not_exist_are_refused() -> None:
    region = Region.anonymous(SLOT, 4)
    for slots in ([4], [-1], [0, 99]):
        with pytest.raises(IndexError):
            region.generations(slots)
    with pytest.raises(IndexError):
        region.slot_address(4)
    assert region.generations([]).tolist() == []


def test_a_header_that_cannot_be_is_found_by_check() -> None:
    region = Region.anonymous(SLOT, 4)
    write(region, 1, b"key")
    region.headers["length"][1] = SLOT + 1
    assert region.check() == ["slot 1 is complete, but has no possible length"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_reader_sees_what_the_owner_finished(stem: str) -> None:
    with opened(stem) as arena:
        generation = write(arena, 3, b"key")
        reader = Region.open(arena.data_path, arena.table_path)
        assert (reader.slot_bytes, reader.slots, reader.available_slots) == (SLOT, 16, 16)
        assert reader.generations([3]).tolist() == [generation]
        assert read(reader, 3) == block_of(b"key")
        arena.retire(3)
        assert reader.generations([3]).tolist() == [generation + 1]


def test_a_session_writes_data_but_no_headers(stem: str) -> None:
    with opened(stem) as arena:
        session = Region.open(arena.data_path, arena.table_path, writable=True)
        native.view(session.slot_address(0), 4, writable=True)[:] = b"data"
        assert read(arena, 0, 4) == b"data"
        with pytest.raises(ValueError, match="read-only"):
            session.headers["length"][0] = 1


def test_a_readers_mapping_outlives_close_and_files(stem: str) -> None:
    arena = opened(stem)
    generation = write(arena, 3, b"key")
    reader = Region.open(arena.data_path, arena.table_path)
    arena.close(unlink=True)
    arena.close(unlink=True)
    reader.close()
    reader.close()
    assert list(Path(stem).parent.iterdir()) == []
    assert reader.generations([3]).tolist() == [generation]
    assert read(reader, 3) == block_of(b"key")


def test_files_are_for_their_owner_alone(stem: str) -> None:
    with opened(stem) as arena:
        assert [Path(path).stat().st_mode & 0o777 for path in (arena.data_path, arena.table_path)] == [0o600, 0o600]


def test_a_description_names_what_a_peer_needs(stem: str) -> None:
    with opened(stem) as arena:
        description = arena.describe("n1", "host", "127.0.0.1:1")
        assert (description.node, description.region, description.slot_bytes, description.slots) == ("n1", SLOT, SLOT, 16)
        assert Region.open(description.data_path, description.table_path).region == SLOT


def test_missing_and_damaged_files_are_region_errors_with_a_remedy(stem: str) -> None:
    with pytest.raises(RegionError, match="restart the node"):
        Region.open(f"{stem}-1.data", f"{stem}-1.table")
    arena = opened(stem)
    arena.close()
    table = Path(arena.table_path)
    whole = table.read_bytes()
    for damaged in (b"", whole[:100], b"x" + whole[1:], whole[:8] + b"\xff\xff" + whole[10:], whole[:-1]):
        table.write_bytes(damaged)
        with pytest.raises(RegionError, match="restart the node"):
            Region.open(arena.data_path, arena.table_path)


def test_populating_changes_nothing(stem: str) -> None:
    with opened(stem, chunks=2) as arena:
        write(arena, 3, b"key")
        reader = Region.open(arena.data_path, arena.table_path)
        before = os.stat(arena.data_path).st_blocks
        for region in (arena, reader):
            region.populate()
            region.populate(2, 100)
        assert read(reader, 3) == block_of(b"key")
        assert os.stat(arena.data_path).st_blocks == before


# --- growth -----------------------------------------------------------------------------------------------------------


def test_an_arena_grows_chunk_by_chunk_to_its_capacity(stem: str) -> None:
    with opened(stem, chunks=0) as arena:
        sizes = [arena.available_slots]
        while arena.grow():
            sizes.append(arena.available_slots)
            assert os.stat(arena.data_path).st_blocks * 512 >= arena.available_slots * SLOT
        assert sizes == [0, 4, 8, 12, 16]
        assert arena.check() == []


def test_slots_of_a_chunk_that_is_not_allocated_are_refused(stem: str) -> None:
    with opened(stem, chunks=1) as arena, pytest.raises(IndexError):
        arena.generations([4])


def test_a_full_system_ends_growth_and_is_said_once(
    stem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(stem, chunks=1) as arena:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            assert [arena.grow(), arena.grow()] == [False, False]
        assert arena.available_slots == 4
        assert [record.message for record in caplog.records if "arena_bytes" in record.message] == [caplog.records[0].message]
        write(arena, 3, b"key")
        assert arena.grow()
        assert arena.check() == []


def test_a_full_tmpfs_never_kills_a_writer(tmp_path: Path) -> None:
    """A real tmpfs of 1 MiB, an arena of 4 MiB: growth stops, every slot handed out can be written, none of it is lost."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "kvshare", tmp_path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        stem = str(tmp_path / f"kvshare-{os.getuid()}-test-node")
        with Arena.open(stem, SLOT, 4 << 20, 64 << 10) as arena:
            while arena.grow():
                pass
            assert 64 <= arena.available_slots < 128
            for slot in range(arena.available_slots):
                write(arena, slot, b"key%d" % slot)
            (tmp_path / "others").write_bytes(b"some room is left, or none: this file is small")
        del arena
        recovered = Arena.open(stem, SLOT, 4 << 20, 64 << 10)
        assert len(recovered.recovered) == recovered.available_slots
        recovered.close()
        del recovered
        with pytest.raises(RegionError, match="shm_dir"):
            Arena.open(f"{stem}2", 1, 1 << 40, 1 << 40)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# --- one owner --------------------------------------------------------------------------------------------------------


def test_a_second_owner_is_refused_with_the_first_ones_number(stem: str) -> None:
    with opened(stem), pytest.raises(RegionError, match=rf"process {os.getpid()} owns"):
        Arena.open(stem, SLOT, CAPACITY, CHUNK, lock_seconds=0.0)


def test_what_cannot_hold_a_slot_is_refused_with_the_setting(stem: str) -> None:
    with pytest.raises(RegionError, match="arena_bytes"):
        Arena.open(stem, SLOT, SLOT - 1, CHUNK)


def test_a_folder_that_is_not_there_is_a_region_error_with_the_setting(stem: str) -> None:
    with pytest.raises(RegionError, match="shm_dir"):
        Arena.open(f"{stem}/missing/arena", SLOT, CAPACITY, CHUNK)


def test_files_without_an_owner_are_found_and_removed(stem: str) -> None:
    folder = Path(stem).parent
    living, dead = opened(stem), opened(f"{stem}2")
    dead.close()
    Path(f"{stem}3-64.data.new").touch()
    (folder / "of-others").touch()
    stale = {Path(dead.data_path), Path(dead.table_path), Path(f"{stem}3-64.data.new")}
    assert set(stale_files(folder)) == stale
    assert stale_files(folder, uid=os.getuid() + 1) == []
    assert set(stale_files(folder, stem=f"{stem}2")) == {Path(dead.data_path), Path(dead.table_path)}
    assert remove_stale(folder, stem=stem) == []
    assert set(remove_stale(folder)) == stale
    assert set(folder.iterdir()) == {Path(living.data_path), Path(living.table_path), folder / "of-others"}
    living.close()


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_a_restart_finds_complete_blocks_under_new_generations(stem: str) -> None:
    first = opened(stem)
    old = {slot: write(first, slot, b"key%d" % slot, length=100 + slot) for slot in (0, 5, 15)}
    write(first, 7, b"evicted")
    first.retire(7)
    first.close()
    second = opened(stem, chunks=0)
    assert [(block.slot, block.key, block.length) for block in second.recovered] == [
        (slot, b"key%d" % slot, 100 + slot) for slot in old
    ]
    assert second.epoch >= first.epoch > 0
    for block in second.recovered:
        assert block.generation > old[block.slot]
        assert block.generation % 2 == 0
        assert second.generations([block.slot]).tolist() == [block.generation]
        assert read(second, block.slot, block.length) == block_of(block.key, block.length)
    assert second.available_slots == 16
    assert second.check() == []
    second.close()


def test_a_torn_block_and_a_wrong_key_fail_their_checksum(stem: str) -> None:
    first = opened(stem)
    for slot in range(4):
        write(first, slot, b"key%d" % slot)
    first.close()
    with open(first.data_path, "r+b") as data:
        data.seek(1 * SLOT + 4000)
        data.write(b"torn")
    first.headers["key"][2] = np.frombuffer(b"other".ljust(64, b"\0"), "V64")[0]
    second = opened(stem, chunks=0)
    assert [block.slot for block in second.recovered] == [0, 3]
    assert second.generations([1, 2]).tolist() == [int(generation) | 1 for generation in second.generations([1, 2])]
    assert second.check() == []
    second.close()


def test_a_slot_that_was_being_written_is_free_but_unsettled(stem: str) -> None:
    first = opened(stem)
    write(first, 0, b"key")
    first.begin(1)
    first.begin(2)
    first.retire(2)
    first.close()
    second = opened(stem, chunks=0)
    assert [block.slot for block in second.recovered] == [0]
    assert second.unsettled == [1]
    second.close()


def test_generations_never_repeat_over_restarts_and_recreation(stem: str) -> None:
    seen: set[int] = set()
    for start in range(12):
        arena = opened(stem, chunks=1)
        generations = [block.generation for block in arena.recovered]
        generations += [write(arena, slot, b"key%d" % slot) for slot in (0, 1)] + [arena.begin(2)]
        assert not seen.intersection(generations)
        seen.update(generations)
        arena.close(unlink=start % 3 == 2)


def test_a_clock_set_back_makes_no_generation_repeat(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(stem)
    old = write(first, 0, b"key")
    first.close()
    monkeypatch.setattr(time, "time_ns", lambda: 1_600_000_000 * 10**9)
    second = opened(stem, chunks=0)
    assert second.recovered[0].generation > old
    second.close()


def test_another_capacity_starts_afresh_and_leaves_readers_their_memory(stem: str) -> None:
    first = opened(stem)
    generation = write(first, 0, b"key")
    reader = Region.open(first.data_path, first.table_path)
    first.close()
    second = opened(stem, capacity_bytes=2 * CAPACITY)
    assert (second.recovered, second.slots) == ([], 32)
    write(second, 0, b"new")
    assert reader.generations([0]).tolist() == [generation]
    assert read(reader, 0) == block_of(b"key")
    second.close()


def test_another_chunk_size_keeps_the_blocks(stem: str) -> None:
    first = opened(stem, chunks=1)
    write(first, 0, b"key")
    first.close()
    with opened(stem, chunks=1, chunk_bytes=8 * SLOT) as second:
        assert len(second.recovered) == 1
        assert second.available_slots == 12


def test_damaged_files_start_afresh(stem: str) -> None:
    for damage in ("table", "data", "both"):
        first = opened(stem)
        write(first, 0, b"key")
        first.close()
        if damage in ("table", "both"):
            Path(first.table_path).write_bytes(b"garbage")
        if damage in ("data", "both"):
            Path(first.data_path).unlink()
            Path(first.data_path).write_bytes(b"garbage")
        second = opened(stem)
        assert (second.recovered, second.available_slots) == ([], 16)
        write(second, 0, b"key")
        second.close()


WRITER = """
import random, sys
import xxhash
from kvshare import keys, native
from kvshare.slots import Arena

stem, seed, slot_bytes, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
arena, rng = Arena.open(stem, slot_bytes, slots * slot_bytes, 4 * slot_bytes), random.Random(seed)
while arena.grow():
    pass
print("writing", flush=True)
number = 0
while True:
    number += 1
    slot, key = rng.randrange(slots), b"run%d-block%d" % (seed, number)
    generation = arena.begin(slot)
    block, half = random.Random(key).randbytes(slot_bytes), slot_bytes // 2
    target = native.view(arena.slot_address(slot), slot_bytes, writable=True)
    target[:half] = block[:half]
    checksum = xxhash.xxh3_64_intdigest(block, keys.seed_of(key))
    target[half:] = block[half:]
    arena.finish(slot, generation, key, slot_bytes, checksum)
    if rng.random() < 0.2:
        arena.retire(rng.randrange(slots))
"""


def test_a_killed_owner_leaves_only_whole_blocks(stem: str) -> None:
    """`kill -9` at seeded random moments, many blocks in flight; the next owner finds only what is whole."""
    rng, recovered, newest = random.Random(11), 0, 0
    for seed in range(6):
        command = [sys.executable, "-c", WRITER, stem, str(seed), str(SLOT), "16"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
            time.sleep(rng.uniform(0.01, 0.15))
            writer.send_signal(signal.SIGKILL)
        arena = opened(stem, chunks=0)
        for block in arena.recovered:
            assert block.generation > newest
            assert read(arena, block.slot) == block_of(block.key)
        recovered += len(arena.recovered)
        newest = int(arena.generations(range(arena.available_slots)).max())
        assert len(arena.unsettled) <= 1
        assert arena.check() == []
        arena.close()
    assert recovered > 0
