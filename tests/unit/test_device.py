"""The table of an engine's KV cache: transitions, and files that are not what they should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvshare.device import TAGS, DeviceTable, completed, is_of, remove_stale, table_path, tag_of
from kvshare.errors import RegionError
from kvshare.region import SUPERBLOCK

SLOTS, SLOT_BYTES = 10, 4096


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "table")


@pytest.fixture
def table(path: str) -> DeviceTable:
    return DeviceTable.create(path, SLOTS, SLOT_BYTES)


def generations(table: DeviceTable) -> list[int]:
    return table.generations(np.arange(SLOTS)).tolist()


def save(table: DeviceTable, slots: list[int]) -> list[int]:
    """Complete these slots; their generations."""
    table.begin(slots)
    begun = table.generations(slots)
    assert table.finish(slots, begun).all()
    return table.generations(slots).tolist()


def test_a_new_table_has_nothing_to_read(table: DeviceTable) -> None:
    assert (table.slots, table.slot_bytes) == (SLOTS, SLOT_BYTES)
    assert generations(table) == [0] * SLOTS


def test_a_block_is_odd_while_it_is_written_and_even_when_it_is_complete(table: DeviceTable) -> None:
    table.begin([3, 7])
    begun = table.generations([3, 7])
    assert (begun % 2 == 1).all()
    assert table.finish([3, 7], begun).tolist() == [True, True]
    assert table.generations([3, 7]).tolist() == (begun + 1).tolist()
    assert [g for slot, g in enumerate(generations(table)) if slot not in (3, 7)] == [0] * (SLOTS - 2)


def test_a_complete_block_carries_a_tag_of_its_key(table: DeviceTable) -> None:
    """An index may take one key for another: who reads a device block, which has no checksum, finds out by the tag."""
    keys = [bytes(33) + number.to_bytes(2, "little") for number in range(4 * TAGS)]
    assert len({tag_of(key) for key in keys}) == TAGS and tag_of(b"a" * 16 + keys[0][16:]) == tag_of(keys[0])
    for key in keys[::1000]:
        table.begin([1])
        assert not any(is_of(int(table.generations([1])[0]), other) for other in keys), "while it is written it is nobody's"
        begun, tags = table.generations([1]), np.array([tag_of(key)], np.uint64)
        assert table.finish([1], begun, tags).all()
        generation = int(table.generations([1])[0])
        assert generation == completed(begun, tags)[0]
        assert {other for other in keys if is_of(generation, other)} == {
            other for other in keys if tag_of(other) == tag_of(key)
        }


def test_generations_only_grow(table: DeviceTable) -> None:
    """A seeded walk: no slot ever has a generation that it had in another version."""
    random, seen = np.random.default_rng(4), [0] * SLOTS
    for _ in range(300):
        slots = np.flatnonzero(random.random(SLOTS) < 0.4)
        if random.random() < 0.05:
            table.retire_all()
        elif random.random() < 0.3:
            table.begin(slots)
        else:
            save(table, slots.tolist())
        now = generations(table)
        assert all(new >= old for new, old in zip(now, seen, strict=True))
        seen = now
    assert all(seen)


def test_a_block_that_was_handed_out_again_is_not_finished_by_the_step_before(table: DeviceTable) -> None:
    table.begin([1, 2])
    begun = table.generations([1, 2])
    table.begin([2])
    again = table.generations([2])
    assert again[0] > begun[1] and again[0] % 2 == 1
    assert table.finish([1, 2], begun).tolist() == [True, False]
    assert table.generations([2]).tolist() == again.tolist()
    assert table.finish([2], again).all()


def test_a_block_that_is_complete_is_not_finished_twice(table: DeviceTable) -> None:
    table.begin([1])
    begun = table.generations([1])
    assert table.finish([1], begun).all()
    assert not table.finish([1], begun).any()
    assert table.generations([1]).tolist() == (begun + 1).tolist()


def test_retiring_all_ends_complete_blocks_and_leaves_the_others(table: DeviceTable) -> None:
    (complete,) = save(table, [0])
    table.begin([1])
    (begun,) = table.generations([1])
    table.retire_all()
    assert generations(table)[:3] == [complete + 1, begun, 0]
    assert table.finish([1], np.array([begun])).all(), "its step goes on"


def test_no_slots_are_no_transition(table: DeviceTable) -> None:
    table.begin([])
    assert table.finish([], np.empty(0, np.uint64)).tolist() == []
    assert table.generations([]).tolist() == []


@pytest.mark.parametrize("slot", [-1, SLOTS, 1 << 40])
def test_a_slot_that_is_not_there_is_an_error(table: DeviceTable, slot: int) -> None:
    for call in (table.begin, table.generations, lambda slots: table.finish(slots, np.ones(2, np.uint64))):
        with pytest.raises(IndexError):
            call([0, slot])
    assert generations(table) == [0] * SLOTS


def test_a_table_that_is_mapped_elsewhere_shows_every_change(table: DeviceTable, path: str) -> None:
    writer, reader = DeviceTable.open(path, writable=True), DeviceTable.open(path)
    assert (reader.slots, reader.slot_bytes) == (SLOTS, SLOT_BYTES)
    save(writer, [5])
    assert generations(reader) == generations(table) == generations(writer)
    with pytest.raises(ValueError, match="read-only"):
        reader.begin([5])


def test_a_table_made_again_begins_above_all_that_the_one_before_had(table: DeviceTable, path: str) -> None:
    before = save(table, [5])[0]
    again = DeviceTable.create(path, SLOTS, SLOT_BYTES)
    assert generations(again) == [0] * SLOTS
    assert save(again, [5])[0] > before
    assert generations(table)[5] == before, "who has the old file mapped keeps it"


def test_a_table_that_was_removed_cannot_be_opened(table: DeviceTable, path: str) -> None:
    table.unlink()
    table.unlink()
    assert not Path(path).exists()
    with pytest.raises(RegionError, match="restart the engine"):
        DeviceTable.open(path)


def test_a_table_cannot_be_made_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="shm_dir"):
        DeviceTable.create(str(tmp_path / "nowhere" / "table"), SLOTS, SLOT_BYTES)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("magic", b"KVSHARE\n", "no table of generations"),
        ("version", 99, "version 99"),
        ("header_bytes", 128, "format"),
        ("slots", SLOTS + 1, "cut short"),
        ("slots", 0, "cut short"),
    ],
)
def test_a_file_that_is_not_such_a_table_is_refused(
    table: DeviceTable, path: str, field: str, value: object, said: str
) -> None:
    content = bytearray(Path(path).read_bytes())
    np.frombuffer(content, SUPERBLOCK, count=1)[field] = value
    Path(path).write_bytes(content)
    with pytest.raises(RegionError, match=said):
        DeviceTable.open(path)


@pytest.mark.parametrize("length", [0, 50, 4096, 4096 + 8 * SLOTS - 1])
def test_a_file_that_is_cut_short_is_refused(table: DeviceTable, path: str, length: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(length)
    with pytest.raises(RegionError):
        DeviceTable.open(path)


def test_a_link_in_place_of_a_table_is_refused(table: DeviceTable, path: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(RegionError):
        DeviceTable.open(str(tmp_path / "link"))


def test_tables_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    stem = str(tmp_path / "kvshare-0-cluster@node")
    living = DeviceTable.create(table_path(stem), 4, 4096)
    code = "import sys, kvshare.device as d; t = d.DeviceTable.create(d.table_path(sys.argv[1]), 4, 4096)"
    subprocess.run([sys.executable, "-c", code, stem], check=True)
    assert len(list(tmp_path.iterdir())) == 2
    (removed,) = remove_stale(stem)
    assert removed.name != Path(living.path).name
    assert [path.name for path in tmp_path.iterdir()] == [Path(living.path).name]
    assert remove_stale(stem) == [] and DeviceTable.open(living.path).slots == 4
