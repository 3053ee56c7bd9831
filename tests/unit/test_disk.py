"""The disk region: what is written comes back, after whatever ends the process; what is not right is never given out; and what
a disk does that is full, broken, cut short, deleted or somebody else's."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import xxhash

from kvshare import disk_files, keys, mapping, native
from kvshare.config import Settings
from kvshare.disk import DiskFolder, DiskRegion
from kvshare.errors import RegionError
from kvshare.mapping import Mapping
from kvshare.native import BlockStatus
from kvshare.region import HEADER, SUPERBLOCK_BYTES, second_now
from kvshare.slots import Recovered
from kvshare.store import Store
from kvshare.vault import Vault

OK, STALE, CORRUPT, UNREACHABLE = BlockStatus.OK, BlockStatus.STALE, BlockStatus.CORRUPT, BlockStatus.UNREACHABLE

SLOT = 8192
SLOTS = 16
FAMILY = bytes(range(16))


def key_of(number: int, tenant: str = "") -> bytes:
    return keys.prefix(FAMILY, tenant=keys.tenant_tag(tenant)) + number.to_bytes(32, "big")


def block_of(key: bytes, length: int = SLOT) -> bytes:
    return random.Random(key).randbytes(length)


def checksum_of(key: bytes, length: int = SLOT) -> int:
    return xxhash.xxh3_64_intdigest(block_of(key, length), keys.seed_of(key))


class Rig:
    """A disk region in ``folder`` and memory for ``SLOTS`` blocks. A context manager."""

    def __init__(
        self,
        folder: Path,
        vault: Vault | None = None,
        capacity_bytes: int = SLOTS * SLOT,
        slot_bytes: int = SLOT,
        grow: bool = True,
    ) -> None:
        self.folder = DiskFolder.open(str(folder), "test", lock_seconds=0.0)
        self.said: list[str] = []
        try:
            vault = vault if vault is not None else Vault.open("")
            self.region = DiskRegion.open(self.folder, slot_bytes, capacity_bytes, vault, say_progress=self.said.append)
        except BaseException:
            self.folder.close()
            raise
        self.paths = [Path(path) for path in self.folder.paths(slot_bytes)]
        self._memory = Mapping.anonymous((SLOTS + 1) * slot_bytes)
        self._slot_bytes = slot_bytes
        if grow and self.region.available_slots == 0:
            assert self.region.grow()

    def address(self, place: int, offset: int = 0) -> int:
        return self._memory.address + place * self._slot_bytes + offset

    def save(
        self, slots: Sequence[int], wanted: Sequence[bytes], length: int = SLOT, expires: int = 0, offset: int = 0
    ) -> list[int]:
        """Reserve, write and finish; the generation of each block, 0 where it was not kept."""
        odd = [self.region.begin(slot) for slot in slots]
        kept = self.write(slots, wanted, length, expires, offset)
        done = []
        for slot, key, generation, ok in zip(slots, wanted, odd, kept, strict=True):
            if ok:
                done.append(self.region.finish(slot, generation, key, length, checksum_of(key, length), expires))
            else:
                self.region.retire(slot)
                done.append(0)
        return done

    def write(
        self, slots: Sequence[int], wanted: Sequence[bytes], length: int = SLOT, expires: int = 0, offset: int = 0
    ) -> list[bool]:
        for place, key in enumerate(wanted):
            native.view(self.address(place, offset), length, writable=True)[:] = block_of(key, length)
        addresses = [self.address(place, offset) for place in range(len(slots))]
        checksums = [checksum_of(key, length) for key in wanted]
        return self.region.write(slots, wanted, [length] * len(slots), checksums, addresses, [expires] * len(slots))

    def read(
        self, slots: Sequence[int], generations: Sequence[int], wanted: Sequence[bytes], length: int = SLOT, offset: int = 0
    ) -> list[BlockStatus]:
        """Statuses; asserts that what is OK is the block of its key."""
        addresses = [self.address(place, offset) for place in range(len(slots))]
        for address in addresses:
            native.view(address, length, writable=True)[:] = bytes(length)
        statuses = self.region.read(slots, generations, wanted, addresses, length)
        for address, key, status in zip(addresses, wanted, statuses, strict=True):
            if status == BlockStatus.OK:
                assert bytes(native.view(address, length)) == block_of(key, length), "a wrong block"
        return [BlockStatus(status) for status in statuses]

    def read_back(self, blocks: Sequence[Recovered]) -> list[BlockStatus]:
        """As `read`, of what was recovered."""
        return [self.read([one.slot], [one.generation], [one.key], one.length)[0] for one in blocks]

    def close(self, unlink: bool = False) -> None:
        self.region.close(unlink=unlink)
        self.folder.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_comes_back_after_a_restart(tmp_path: Path) -> None:
    slots, wanted = [3, 0, 1, 9], [key_of(i) for i in range(4)]
    with Rig(tmp_path) as rig:
        generations = rig.save(slots, wanted)
        assert rig.read(slots, generations, wanted) == [OK] * 4
        assert rig.region.check() == []
    with Rig(tmp_path) as rig:
        assert [(one.slot, one.key, one.length) for one in rig.region.recovered] == [
            (slot, key, SLOT) for slot, key in sorted(zip(slots, wanted, strict=True))
        ]
        assert [rig.region.recovered[i].generation for i in range(4)] == [generations[i] for i in (1, 2, 0, 3)]
        assert rig.read_back(rig.region.recovered) == [OK] * 4
        assert rig.region.check() == []


@pytest.mark.parametrize(("length", "offset"), [(SLOT, 0), (SLOT, 24), (SLOT - 8, 0), (5000, 100), (100, 0), (1, 1)])
def test_blocks_may_have_any_length_and_lie_anywhere(tmp_path: Path, length: int, offset: int) -> None:
    slots, wanted = [4, 5, 7], [key_of(i) for i in range(3)]
    with Rig(tmp_path) as rig:
        generations = rig.save(slots, wanted, length, offset=offset)
        assert rig.read(slots, generations, wanted, length, offset) == [OK] * 3
    with Rig(tmp_path) as rig:
        assert rig.read_back(rig.region.recovered) == [OK] * 3


def test_what_lies_behind_a_shorter_block_is_no_former_block(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save([2], [key_of(1)])
        rig.region.retire(2)
        rig.save([2], [key_of(2)], 5000)
        assert rig.paths[0].read_bytes()[2 * SLOT : 3 * SLOT] == block_of(key_of(2), 5000) + bytes(SLOT - 5000)


def test_a_region_with_slots_of_broken_pages_works_too(tmp_path: Path) -> None:
    with Rig(tmp_path, slot_bytes=5000, capacity_bytes=SLOTS * 5000) as rig:
        generations = rig.save([1, 2], [key_of(1), key_of(2)], 5000)
        assert rig.read([1, 2], generations, [key_of(1), key_of(2)], 5000) == [OK, OK]


def test_another_generation_key_or_length_is_a_miss(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        (generation,) = rig.save([2], [key_of(1)])
        assert rig.read([2], [generation + 2], [key_of(1)]) == [STALE]
        assert rig.read([2], [generation - 1], [key_of(1)]) == [STALE]
        assert rig.read([2], [generation], [key_of(2)]) == [STALE]
        assert rig.read([2], [generation], [key_of(1)], SLOT - 1) == [STALE]
        assert rig.read([-1, SLOTS, 5], [0, 0, 0], [key_of(1)] * 3) == [STALE] * 3
        rig.region.retire(2)
        assert rig.read([2], [generation], [key_of(1)]) == [STALE]


def test_a_block_rewritten_while_it_is_read_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner retires the slot between the read's look at the header and its end."""
    with Rig(tmp_path) as rig:
        (generation,) = rig.save([2], [key_of(1)])
        preadv = os.preadv

        def retire_first(fd: int, buffers: list[memoryview], offset: int) -> int:
            rig.region.retire(2)
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", retire_first)
        assert rig.read([2], [generation], [key_of(1)]) == [STALE]


def test_a_flipped_byte_of_the_data_is_found(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0, 1], [key_of(0), key_of(1)])
        data = rig.paths[0]
    flipped = bytearray(data.read_bytes())
    flipped[SLOT + 17] ^= 1
    data.write_bytes(flipped)
    with Rig(tmp_path) as rig:
        assert rig.read_back(rig.region.recovered) == [OK, CORRUPT]


def test_a_source_that_changed_meanwhile_is_not_kept(tmp_path: Path) -> None:
    """A block of the arena was evicted while it was written: nothing of it is committed, now or by a restart."""
    with Rig(tmp_path) as rig:
        wanted = [key_of(0), key_of(1)]
        for slot in (0, 1):
            rig.region.begin(slot)
        for place, key in enumerate(wanted):
            native.view(rig.address(place), SLOT, writable=True)[:] = block_of(key)
        kept = rig.region.write(
            [0, 1],
            wanted,
            [SLOT, SLOT],
            [checksum_of(key) for key in wanted],
            [rig.address(0), rig.address(1)],
            [0, 0],
            lambda: [True, False],
        )
        assert kept == [True, False]
    with Rig(tmp_path) as rig:
        assert [one.key for one in rig.region.recovered] == [key_of(0)]


def test_a_slot_given_up_while_it_is_written_is_not_kept(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.region.begin(0)
        native.view(rig.address(0), SLOT, writable=True)[:] = block_of(key_of(0))

        def purged() -> list[bool]:
            rig.region.retire(0)
            return [True]

        arguments = ([0], [key_of(0)], [SLOT], [checksum_of(key_of(0))], [rig.address(0)], [0])
        assert rig.region.write(*arguments, purged) == [False]
    with Rig(tmp_path) as rig:
        assert len(rig.region.recovered) == 0


def test_a_block_whose_time_is_over_is_a_miss_and_does_not_come_back(tmp_path: Path) -> None:
    now = second_now()
    with Rig(tmp_path) as rig:
        old = rig.save([0], [key_of(0)], expires=now - 1)
        young = rig.save([1], [key_of(1)], expires=now + 1000)
        assert rig.read([0, 1], [*old, *young], [key_of(0), key_of(1)]) == [STALE, OK]
    with Rig(tmp_path) as rig:
        assert [(one.key, one.expires) for one in rig.region.recovered] == [(key_of(1), now + 1000)]


# --- as a store's region ----------------------------------------------------------------------------------------------


def store_of(region: DiskRegion) -> Store:
    return Store(region, Settings.load({}, {}))


def test_a_store_orders_a_disk_region_as_it_does_an_arena(tmp_path: Path) -> None:
    """Twice as many blocks as slots: the coldest leave, the rest is adopted by the next start, and all structures agree."""
    rounds = [[key_of(i) for i in range(start, start + 4)] for start in range(0, 2 * SLOTS, 4)]
    with Rig(tmp_path) as rig:
        store = store_of(rig.region)
        for wanted in rounds:
            slots, odd = zip(*store.reserve(wanted, SLOT, owner=1, now=0.0), strict=True)
            assert rig.write(slots, wanted) == [True] * 4
            store.commit(slots, odd, [checksum_of(key) for key in wanted], owner=1)
        assert (len(store), store.check()) == (SLOTS, [])
        held = {block.key for block in store.inventory()}
    with Rig(tmp_path) as rig:
        store = store_of(rig.region)
        adopted = store.adopt(rig.region.recovered)
        assert {block.key for block in adopted} == held
        assert {block.region for block in adopted} == {SLOT + 1}
        assert store.check() == []
        assert rig.read_back(rig.region.recovered) == [OK] * SLOTS


def test_a_second_copy_is_given_up_when_adopted(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0, 1, 5], [key_of(0), key_of(0), key_of(1)])
    with Rig(tmp_path) as rig:
        store = store_of(rig.region)
        assert {block.key for block in store.adopt(rig.region.recovered)} == {key_of(0), key_of(1)}
        assert store.check() == []


def test_generations_only_grow_over_restarts(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        with Rig(tmp_path) as rig:
            seen.append(rig.region.begin(0))
            seen += rig.save([0], [key_of(0)])
    assert seen == sorted(set(seen))


# --- files ------------------------------------------------------------------------------------------------------------


def test_another_capacity_loses_only_what_lies_beyond_it(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0, 9], [key_of(0), key_of(9)])
    with Rig(tmp_path, capacity_bytes=4 * SLOTS * SLOT) as rig:
        assert (rig.region.slots, rig.region.available_slots) == (4 * SLOTS, SLOTS)
        assert rig.region.grow() and rig.region.available_slots == 4 * SLOTS and not rig.region.grow()
        rig.save([50], [key_of(50)])
    with Rig(tmp_path, capacity_bytes=4 * SLOT) as rig:
        assert [one.slot for one in rig.region.recovered] == [0]
        assert rig.read_back(rig.region.recovered) == [OK]
        assert rig.paths[0].stat().st_size == 4 * SLOT
    with Rig(tmp_path, capacity_bytes=4 * SLOTS * SLOT) as rig:
        assert rig.region.grow()
        assert [one.slot for one in rig.region.recovered] == [0]
        assert rig.region.check() == []


def test_regions_of_several_slot_sizes_lie_side_by_side(tmp_path: Path) -> None:
    folder = DiskFolder.open(str(tmp_path), "test")
    vault = Vault.open("")
    regions = [DiskRegion.open(folder, size, 4 * size, vault) for size in (SLOT, 2 * SLOT)]
    assert folder.slot_sizes() == [SLOT, 2 * SLOT]
    for region in regions:
        region.close()
    folder.close()
    assert DiskFolder.open(str(tmp_path), "other").slot_sizes() == []


def test_erased_slots_hold_nothing_and_take_no_room(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save(list(range(8)), [key_of(i) for i in range(8)])
        data, table = rig.paths
        before = data.stat().st_blocks
        for slot in (1, 2, 6):
            rig.region.retire(slot)
        rig.region.punch([6, 2, 1])
        for slot in (1, 2, 6):
            assert data.read_bytes()[slot * SLOT : (slot + 1) * SLOT] == bytes(SLOT)
            assert key_of(slot) not in table.read_bytes()
        assert data.stat().st_blocks == before - 3 * SLOT // 512
        (generation,) = rig.save([2], [key_of(20)])
        assert rig.read([2], [generation], [key_of(20)]) == [OK]
    with Rig(tmp_path) as rig:
        assert [one.slot for one in rig.region.recovered] == [0, 2, 3, 4, 5, 7]


def test_unlink_leaves_nothing_but_the_lock(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.save([0], [key_of(0)])
    rig.close(unlink=True)
    rig.close(unlink=True)
    assert [path.name for path in tmp_path.iterdir()] == [disk_files.LOCK_NAME]


def test_a_scan_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0], [key_of(0)])
    monkeypatch.setattr(disk_files, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(disk_files, "SCAN_BYTES", 128 * 4)
    with Rig(tmp_path) as rig:
        assert len(rig.said) == SLOTS // 4
        assert "of 16 slots" in rig.said[0]


# --- encryption -------------------------------------------------------------------------------------------------------


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    folder = tmp_path / "keys"
    folder.mkdir()
    return Vault.open(str(folder))


def test_sealed_blocks_come_back_and_lie_there_unreadable(tmp_path: Path, vault: Vault) -> None:
    folder = tmp_path / "disk"
    wanted = [key_of(i, "acme") for i in range(3)]
    with Rig(folder, vault) as rig:
        generations = rig.save([0, 1, 5], wanted)
        assert rig.read([0, 1, 5], generations, wanted) == [OK] * 3
        assert block_of(wanted[0])[:64] not in rig.paths[0].read_bytes()
    with Rig(folder, vault) as rig:
        assert rig.read_back(rig.region.recovered) == [OK] * 3


def test_a_destroyed_key_is_the_end_of_its_tenants_blocks(tmp_path: Path, vault: Vault) -> None:
    acme, other = key_of(0, "acme"), key_of(1, "other")
    with Rig(tmp_path / "disk", vault) as rig:
        generations = rig.save([0, 1], [acme, other])
        assert vault.destroy(keys.tenant_tag("acme"))
        assert rig.read([0, 1], generations, [acme, other]) == [CORRUPT, OK]


def test_a_sealed_block_moved_to_another_slot_does_not_unseal(tmp_path: Path, vault: Vault) -> None:
    """Bytes and header of slot 0 put in slot 1's place, as a thief of blocks would."""
    folder = tmp_path / "disk"
    with Rig(folder, vault) as rig:
        rig.save([0, 1], [key_of(0, "acme"), key_of(1, "acme")])
        data, table = rig.paths
    for path, size, start in ((data, SLOT, 0), (table, 128, 4096)):
        image = bytearray(path.read_bytes())
        image[start + size : start + 2 * size] = image[start : start + size]
        path.write_bytes(image)
    with Rig(folder, vault) as rig:
        assert rig.read_back(rig.region.recovered) == [OK, CORRUPT]


def test_a_block_whose_tenant_has_no_key_is_not_written(tmp_path: Path, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig(tmp_path / "disk", vault) as rig:
        monkeypatch.setattr(Vault, "seal", lambda *_: None)
        assert rig.save([0], [key_of(0, "acme")]) == [0]
        assert block_of(key_of(0, "acme"))[:64] not in rig.paths[0].read_bytes()


def test_what_lies_there_unsealed_is_erased_once_there_are_keys(tmp_path: Path, vault: Vault) -> None:
    folder = tmp_path / "disk"
    with Rig(folder) as rig:
        rig.save([0, 1], [key_of(0), key_of(1)])
        data = rig.paths[0]
    with Rig(folder, vault) as rig:
        assert len(rig.region.recovered) == 0
        assert not any(data.read_bytes())
        rig.save([0], [key_of(2)])
    with Rig(folder) as rig:
        assert len(rig.region.recovered) == 0


# --- killed -----------------------------------------------------------------------------------------------------------

CHILD = """
import itertools, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_disk import SLOTS, Rig, key_of
rig = Rig(Path({folder!r}))
for turn in itertools.count():
    rig.save([(turn * 3 + i) % SLOTS for i in range(5)], [key_of(turn * 5 + i) for i in range(5)])
    print(turn, flush=True)
"""


@pytest.mark.parametrize("turns", [1, 4, 9, 23, 40])
def test_killed_at_any_moment_it_comes_back_with_all_that_was_committed(tmp_path: Path, turns: int) -> None:
    """A child overwrites slots round after round and is killed; what it said it had done must be there and right, but for the
    slots of the one round that it had begun; those hold either round's block or none."""
    text = CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(turns):
        last = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    last = max([last, *map(int, child.stdout.read().split())])
    child.wait()
    child.stdout.close()
    held = {(turn * 3 + i) % SLOTS: key_of(turn * 5 + i) for turn in range(last + 1) for i in range(5)}
    begun = {((last + 1) * 3 + i) % SLOTS: key_of((last + 1) * 5 + i) for i in range(5)}
    with Rig(tmp_path) as rig:
        whole = {one.slot: one.key for one in rig.region.recovered if rig.read_back([one]) == [OK]}
        assert {slot: key for slot, key in whole.items() if slot not in begun} == {
            slot: key for slot, key in held.items() if slot not in begun
        }
        for slot in whole.keys() & begun.keys():
            assert whole[slot] in (held.get(slot), begun[slot])
        assert rig.region.check() == []
        (generation,) = rig.save([0], [key_of(10**6)])
        assert rig.read([0], [generation], [key_of(10**6)]) == [OK]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_a_header_flipped_byte_by_byte_is_a_miss_or_the_right_block(tmp_path: Path, flip: int) -> None:
    """Each of the 128 bytes in turn: the neighbours stay, the slot can be used again, and nothing wrong is read."""
    wanted = [key_of(i) for i in range(3)]
    with Rig(tmp_path) as rig:
        rig.save([0, 1, 2], wanted)
        table = rig.paths[1]
    whole = table.read_bytes()
    survived = 0
    for at in range(HEADER.itemsize):
        flipped = bytearray(whole)
        flipped[SUPERBLOCK_BYTES + HEADER.itemsize + at] ^= flip
        table.write_bytes(flipped)
        with Rig(tmp_path) as rig:
            found = {one.slot: status for one in rig.region.recovered for status in rig.read_back([one])}
            assert (found[0], found[2]) == (OK, OK)
            assert found.get(1, CORRUPT) in (OK, CORRUPT)
            survived += found.get(1) == OK
            rig.region.retire(1)
            (generation,) = rig.save([1], [key_of(9)])
            assert rig.read([1], [generation], [key_of(9)]) == [OK]
            assert rig.region.check() == []
            rig.region.retire(1)
            rig.save([1], [wanted[1]])  # for the next turn
    assert 0 < survived < HEADER.itemsize // 2  # e.g. the nonce of a block that is not sealed


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_a_sealed_header_flipped_byte_by_byte_is_a_miss_or_the_right_block(tmp_path: Path, vault: Vault, flip: int) -> None:
    folder = tmp_path / "disk"
    with Rig(folder, vault) as rig:
        rig.save([0, 1], [key_of(0, "acme"), key_of(1, "acme")])
        table = rig.paths[1]
    whole = table.read_bytes()
    outcomes = []
    for at in range(88, 124):  # nonce, tag, key id
        flipped = bytearray(whole)
        flipped[SUPERBLOCK_BYTES + at] ^= flip
        table.write_bytes(flipped)
        with Rig(folder, vault) as rig:
            found = {one.slot: status for one in rig.region.recovered for status in rig.read_back([one])}
            assert found[1] == OK
            outcomes.append(found[0])
    assert outcomes == [CORRUPT] * 36


def test_a_superblock_flipped_byte_by_byte_is_refused_and_left_alone(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0], [key_of(0)])
        table = rig.paths[1]
    whole = table.read_bytes()
    for at in range(disk_files.DISK_SUPERBLOCK.itemsize):
        flipped = bytearray(whole)
        flipped[at] ^= 0x5A
        table.write_bytes(flipped)
        with pytest.raises(RegionError, match=r"remove .*table"):
            Rig(tmp_path)
        assert table.read_bytes() == flipped
    table.write_bytes(whole)
    with Rig(tmp_path) as rig:
        assert rig.read_back(rig.region.recovered) == [OK]


def test_a_format_of_another_version_is_refused_by_its_number_and_left_alone(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0], [key_of(0)])
        data, table = rig.paths
    image = bytearray(table.read_bytes())
    image[8] = 9
    table.write_bytes(image)
    before = (data.read_bytes(), table.read_bytes())
    with pytest.raises(RegionError, match="format version 9, ours is"):
        Rig(tmp_path)
    assert (data.read_bytes(), table.read_bytes()) == before


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"KVSHARE\n", os.urandom(8192)])
def test_a_file_that_is_no_table_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    table = tmp_path / f"kvshare-test-{SLOT}.table"
    table.write_bytes(content)
    with pytest.raises(RegionError, match="to start afresh"):
        Rig(tmp_path)
    assert table.read_bytes() == content


def test_a_table_under_another_slot_size_is_refused(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.paths[1].rename(tmp_path / f"kvshare-test-{2 * SLOT}.table")
    with pytest.raises(RegionError, match="was renamed"):
        Rig(tmp_path, slot_bytes=2 * SLOT, capacity_bytes=SLOTS * 2 * SLOT)


@pytest.mark.parametrize("left", [0, 1, SLOT, 3 * SLOT + 100])
def test_data_that_was_cut_short_is_a_miss(tmp_path: Path, left: int) -> None:
    wanted = [key_of(i) for i in range(6)]
    with Rig(tmp_path) as rig:
        generations = rig.save(list(range(6)), wanted)
        os.truncate(rig.paths[0], left)
        statuses = [rig.read([slot], [generations[slot]], [wanted[slot]])[0] for slot in range(6)]
        whole = left // SLOT
        assert statuses == [OK] * whole + [UNREACHABLE] * (6 - whole)
        generations = rig.save(list(range(6)), [key_of(i + 10) for i in range(6)])
        assert rig.read(list(range(6)), generations, [key_of(i + 10) for i in range(6)]) == [OK] * 6


@pytest.mark.parametrize("left", [SUPERBLOCK_BYTES, SUPERBLOCK_BYTES + 3 * 128 + 64])
def test_a_table_that_was_cut_short_keeps_what_is_left(tmp_path: Path, left: int) -> None:
    with Rig(tmp_path) as rig:
        rig.save(list(range(6)), [key_of(i) for i in range(6)])
        table = rig.paths[1]
    os.truncate(table, left)
    with Rig(tmp_path) as rig:
        whole = [one for one in rig.region.recovered if rig.read_back([one]) == [OK]]
        assert [one.slot for one in whole] == list(range((left - SUPERBLOCK_BYTES) // 128))
        rig.save([5], [key_of(5)])
        assert rig.region.check() == []


def test_data_that_was_deleted_while_nobody_looked_is_an_empty_region(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0, 1], [key_of(0), key_of(1)])
        rig.paths[0].unlink()
    with Rig(tmp_path) as rig:
        assert len(rig.region.recovered) == 0
        rig.save([1], [key_of(2)])
    with Rig(tmp_path) as rig:
        assert [one.key for one in rig.region.recovered] == [key_of(2)]


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_deleted_underneath_is_said_once_and_not_made_again(
    tmp_path: Path, which: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Rig(tmp_path) as rig:
        (first,) = rig.save([0], [key_of(0)])
        rig.paths[which].unlink()
        (second,) = rig.save([1], [key_of(1)])
        (third,) = rig.save([2], [key_of(2)])
        assert rig.read([0, 1, 2], [first, second, third], [key_of(0), key_of(1), key_of(2)]) == [OK] * 3
        assert not rig.paths[which].exists()
    assert len([record for record in caplog.records if "was deleted" in record.message]) == 1
    assert not rig.paths[which].exists()


# --- a disk that fails ------------------------------------------------------------------------------------------------


def failing(number: int, offsets: Callable[[int], bool] = lambda _: True) -> Callable[..., int]:
    """A system call on a file that fails where ``offsets`` says."""
    calls = {"preadv": os.preadv, "pwritev": os.pwritev}

    def call(name: str, fd: int, buffers: list[memoryview], offset: int) -> int:
        if offsets(offset):
            raise OSError(number, os.strerror(number))
        return calls[name](fd, buffers, offset)

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_write_that_fails_is_a_block_that_is_not_kept_and_said_once(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The data of slots 4 and up cannot be written: the others can, all can be read, and it is well again afterwards."""
    wanted = [key_of(i) for i in range(6)]
    call = failing(number, lambda offset: offset >= 4 * SLOT and offset % SLOT == 0)
    with Rig(tmp_path) as rig:
        before = rig.save([0, 8], [key_of(20), key_of(21)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *arguments: call("pwritev", *arguments))
            generations = rig.save([1, 2, 3, 5, 6, 7], wanted)
            assert rig.save([4], [key_of(30)]) == [0]
        assert [bool(generation) for generation in generations] == [True] * 3 + [False] * 3
        assert rig.read([0, 8], before, [key_of(20), key_of(21)]) == [OK, OK]
        assert rig.read([1, 2, 3], generations[:3], wanted[:3]) == [OK] * 3
        (again,) = rig.save([5], [wanted[3]])
        assert rig.read([5], [again], [wanted[3]]) == [OK]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert os.strerror(number) in record.message and ("disk_bytes" in record.message or "disk_dir" in record.message)
    with Rig(tmp_path) as rig:
        assert {one.slot for one in rig.region.recovered} == {0, 1, 2, 3, 5, 8}
        assert rig.read_back(rig.region.recovered) == [OK] * 6


def test_a_table_that_cannot_be_written_keeps_nothing_new_and_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = failing(errno.EIO)
    with Rig(tmp_path) as rig:
        rig.save([0, 1], [key_of(0), key_of(1)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *arguments: call("pwritev", *arguments))
            assert rig.save([0], [key_of(2)]) == [0]
            rig.region.retire(1)
            assert not rig.region.flush()
            with pytest.raises(RegionError, match="erase"):
                rig.region.punch([1])
        assert rig.region.flush()
    with Rig(tmp_path) as rig:
        assert len(rig.region.recovered) == 0


def test_a_read_that_fails_is_a_miss_and_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [key_of(0), key_of(5)]
    call = failing(errno.EIO, lambda offset: offset == 5 * SLOT)
    with Rig(tmp_path) as rig:
        generations = rig.save([0, 5], wanted)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *arguments: call("preadv", *arguments))
            assert rig.read([0, 5], generations, wanted) == [OK, UNREACHABLE]
        assert rig.read([0, 5], generations, wanted) == [OK, OK]


def test_calls_that_move_only_a_part_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def cut(buffers: list[memoryview]) -> list[memoryview]:
        first = buffers[0]
        return [first[: max(4096, len(first) // 8192 * 4096)]] if len(first) > 4096 else [first]

    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, cut(buffers), offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, cut(buffers), offset))
    wanted = [key_of(i) for i in range(5)]
    with Rig(tmp_path) as rig:
        generations = rig.save([1, 2, 3, 5, 6], wanted)
        assert rig.read([1, 2, 3, 5, 6], generations, wanted) == [OK] * 5


@pytest.mark.parametrize("when", ["open", "call"])
def test_a_file_system_without_direct_transfers_does_without(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ours, pwritev = mapping.open_ours, os.pwritev
    refused = []

    def refuse_at_open(path: str, flags: int) -> int:
        if flags & os.O_DIRECT and when == "open":
            refused.append(path)
            raise OSError(errno.EINVAL, "no O_DIRECT", path)
        return open_ours(path, flags)

    def refuse_at_call(fd: int, buffers: list[memoryview], offset: int) -> int:
        if when == "call" and Path(f"/proc/self/fd/{fd}").readlink().suffix == ".data" and not refused:
            refused.append(fd)
            raise OSError(errno.EINVAL, "no such border")
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(mapping, "open_ours", refuse_at_open)
    monkeypatch.setattr(os, "pwritev", refuse_at_call)
    wanted = [key_of(0), key_of(1)]
    with Rig(tmp_path) as rig:
        generations = rig.save([0, 1], wanted)
        assert rig.read([0, 1], generations, wanted) == [OK, OK]
    assert refused


def test_a_full_disk_stops_growth_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_files, "CHUNK_BYTES", 4 * SLOT)
    with Rig(tmp_path) as rig:
        (generation,) = rig.save([0], [key_of(0)])
        with monkeypatch.context() as patch:
            patch.setattr(mapping, "has_room", lambda *_: False)
            assert [rig.region.grow(), rig.region.grow()] == [False, False]
        assert rig.region.available_slots == 4
        assert rig.read([0], [generation], [key_of(0)]) == [OK]
        assert rig.region.grow() and rig.region.available_slots == 8
    assert len([record for record in caplog.records if "disk_bytes" in record.message]) == 1


def test_a_small_file_system_really_filled_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    """A tmpfs of 2 MiB, a region of 8 MiB, another's file that takes the rest: whatever was kept is right afterwards."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "kvshare", tmp_path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with Rig(tmp_path, capacity_bytes=8 << 20, grow=False) as rig:
            assert not rig.region.grow()  # a chunk of all of it
        with Rig(tmp_path, capacity_bytes=1 << 20) as rig:
            wanted = [key_of(i) for i in range(16)]
            generations = rig.save(list(range(16)), wanted)
            rig.region.punch(list(range(20, 128)))
            with (tmp_path / "others").open("wb", buffering=0) as others, pytest.raises(OSError):
                while True:
                    others.write(bytes(4096))
            more = [rig.save([slot], [key_of(slot)])[0] for slot in range(60, 64)]
            assert more == [0] * 4
            assert rig.read(list(range(16)), generations, wanted) == [OK] * 16
        with Rig(tmp_path, capacity_bytes=1 << 20) as rig:
            assert rig.read_back(rig.region.recovered) == [OK] * 16
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_after_close_nothing_touches_what_the_descriptors_mean_then(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (generation,) = rig.save([0], [key_of(0)])
    rig.region.begin(1)
    rig.close()
    others = [os.open(tmp_path / f"other{i}", os.O_RDWR | os.O_CREAT) for i in range(8)]  # take the numbers that are free
    assert rig.write([1], [key_of(1)]) == [False]
    assert rig.read([0], [generation], [key_of(0)]) == [UNREACHABLE]
    for fd in others:
        assert os.fstat(fd).st_size == 0
        os.close(fd)


# --- one owner --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", ["test", "another"])
def test_a_second_node_in_the_same_folder_is_refused_whatever_its_name(tmp_path: Path, cluster: str) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0], [key_of(0)])
        with pytest.raises(RegionError, match=rf"process {os.getpid()} keeps its blocks in .* 'disk_dir' of its own"):
            DiskFolder.open(str(tmp_path), cluster, lock_seconds=0.0)
        (generation,) = rig.save([0], [key_of(1)])
        assert rig.read([0], [generation], [key_of(1)]) == [OK]
    DiskFolder.open(str(tmp_path), cluster, lock_seconds=0.0).close()


def test_a_folder_of_an_owner_that_was_killed_is_free(tmp_path: Path) -> None:
    text = CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(RegionError, match=f"process {child.pid} keeps"):
        DiskFolder.open(str(tmp_path), "test", lock_seconds=0.0)
    child.kill()
    DiskFolder.open(str(tmp_path), "test", lock_seconds=30.0).close()
    child.wait()
    child.stdout.close()


def test_a_folder_that_cannot_be_is_refused_with_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "folder", tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(RegionError, match="set 'disk_dir'"):
            DiskFolder.open(str(path), "test")

    def read_only(path: str, flags: int) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(mapping, "open_ours", read_only)
    with pytest.raises(RegionError, match="Read-only file system; set 'disk_dir'"):
        DiskFolder.open(str(tmp_path), "test")


def test_a_folder_on_a_disk_that_became_read_only_is_refused_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(tmp_path) as rig:
        rig.save([0], [key_of(0)])
    call = failing(errno.EROFS)
    with monkeypatch.context() as patch, pytest.raises(RegionError, match=r"Read-only file system.*'disk_dir'"):
        patch.setattr(os, "pwritev", lambda *arguments: call("pwritev", *arguments))
        Rig(tmp_path)
    with Rig(tmp_path) as rig:
        assert rig.read_back(rig.region.recovered) == [OK]


def test_what_cannot_hold_a_slot_is_refused_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="disk_bytes"):
        Rig(tmp_path, capacity_bytes=SLOT - 1)
