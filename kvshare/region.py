"""Regions: arrays of slots with their header tables.

    data file   slot 0 │ slot 1 │ ...                            slot_bytes each
    table file  superblock (4096 bytes) │ header 0 │ header 1 │ ...   128 bytes each

The header table is the truth; whatever else knows of blocks is an index built from it. A generation says all about a slot:

    0             never used
    odd           nobody may read it: free, or being written (then flagged `WRITING`)
    even, not 0   complete

    begin ──> odd ──write──> finish ──> even ──> retire (one increment) ──> odd ──> begin (the next odd one) ...

Generations of a slot only grow, over restarts too, and also when the files are deleted and made again: an owner takes the
time (32 bits of seconds since 2020, the epoch, and 32 of fraction) as its birth and starts above it, and no slot sees four
billion changes a second. So a reader that copies a slot and then finds the generation that it was told has read the bytes
that were written under it.

A mapping lives as long as its `Region` object, whatever `close` says and whoever dies: an address taken from a region stays
good while the region is referenced.

Threads: questions may be asked and `populate` called from any thread; transitions (`begin`, `finish`, `retire`) come from the
owner's one thread.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvshare import keys, mapping, native
from kvshare.errors import RegionError
from kvshare.mapping import Mapping
from kvshare.places import RegionDescription

MAGIC = b"KVSHARE\n"
FORMAT_VERSION = 2
SUPERBLOCK_BYTES = 4096
HEADER = np.dtype(
    {
        # The last four: of a block that is kept encrypted, its nonce, tag and the id of its key (`kvshare.vault`); second since
        # 2020 from which on nobody may read it (0: no end).
        "names": ["generation", "checksum", "length", "flags", "key_bytes", "key", "nonce", "tag", "key_id", "expires"],
        "formats": ["<u8", "<u8", "<u4", "<u2", "<u2", f"V{keys.KEY_BYTES_MAX}", "V12", "V16", "<u8", "<u4"],
        "offsets": [0, 8, 16, 20, 22, 24, 88, 100, 116, 124],
        "itemsize": 128,  # two cache lines
    }
)
SUPERBLOCK = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("slot_bytes", "<u8"),
        ("slots", "<u8"),
        ("chunk_bytes", "<u8"),
        ("birth", "<u8"),  # generation above which the present owner's are
        ("available_slots", "<u8"),  # slots of allocated chunks; only grows
        ("owner_pid", "<u8"),
        ("data_inode", "<u8"),  # of the data file that belongs to this table
    ]
)
WRITING = 1  # flag: reserved for a writer that may be writing

_YEAR_2020_NS = 1_577_836_800 * 10**9
_FIELDS = struct.Struct(f"<QIHH{keys.KEY_BYTES_MAX}s36xI")  # a header behind its generation; nonce, tag and key id zero
_FLAGS = struct.Struct("<H")
_FIELDS_OFFSET, _FLAGS_OFFSET = 8, 20

U64 = npt.NDArray[np.uint64]


def generation_now() -> int:
    """The generation, even, that a region born now starts above: seconds since 2020 in the high 32 bits, fraction below."""
    return (((time.time_ns() - _YEAR_2020_NS) << 32) // 10**9) & ~1


def second_now() -> int:
    """Whole seconds since 2020, by the wall clock: what ``expires`` in a header is compared with."""
    return (time.time_ns() - _YEAR_2020_NS) // 10**9


def table_bytes(slots: int) -> int:
    """Size of the table of so many slots."""
    return SUPERBLOCK_BYTES + slots * HEADER.itemsize


def superblock(slot_bytes: int, slots: int, chunk_bytes: int, birth: int, data_inode: int) -> npt.NDArray[np.void]:
    """The superblock of a new table."""
    made = np.zeros(1, SUPERBLOCK)
    made["magic"], made["version"], made["header_bytes"] = MAGIC, FORMAT_VERSION, HEADER.itemsize
    made["slot_bytes"], made["slots"], made["chunk_bytes"] = slot_bytes, slots, chunk_bytes
    made["birth"], made["owner_pid"], made["data_inode"] = birth, os.getpid(), data_inode
    return made


def read_superblock(table_fd: int, data_fd: int) -> npt.NDArray[np.void]:
    """The superblock of a pair of files, found to be whole and to belong together.

    Raises:
        RegionError: they are not.
    """
    head = os.pread(table_fd, SUPERBLOCK.itemsize, 0)
    if len(head) < SUPERBLOCK.itemsize:
        raise RegionError("the table is empty or cut short")
    found = np.frombuffer(head, SUPERBLOCK)
    if found["magic"][0] != MAGIC:
        raise RegionError("the file is no table of kvshare")
    if found["version"][0] != FORMAT_VERSION or found["header_bytes"][0] != HEADER.itemsize:
        raise RegionError(f"its format is version {found['version'][0]}, ours {FORMAT_VERSION}")
    data, table = os.fstat(data_fd), os.fstat(table_fd)
    slots, slot_bytes = int(found["slots"][0]), int(found["slot_bytes"][0])
    sizes = (table.st_size, data.st_size) == (table_bytes(slots), slots * slot_bytes)
    if not sizes or slots == 0 or found["available_slots"][0] > slots or found["data_inode"][0] != data.st_ino:
        raise RegionError("data and table do not fit together")
    return found


def complete_slots(headers: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Which of these headers say that their slot is complete."""
    generations = headers["generation"]
    return np.asarray((generations % 2 == 0) & (generations != 0))


class SlotTable(ABC):
    """The header table of an array of slots, wherever its data lies: its questions and its transitions.

    region: its id. slots: how many there are when all chunks are allocated. table_address: of header 0. headers: structured
    array [slots] of `HEADER`; those beyond `available_slots` must not be touched (the file may have no memory there).
    """

    keeps_generations: ClassVar[bool] = False  # may blocks have generations of a former owner?

    def __init__(self, table: Mapping, birth: int = 0) -> None:
        self._table = table
        self._superblock = np.frombuffer(table.memory, SUPERBLOCK, count=1)
        self.slot_bytes = self.region = int(self._superblock["slot_bytes"][0])
        self.slots = int(self._superblock["slots"][0])
        self.chunk_slots = max(1, int(self._superblock["chunk_bytes"][0]) // self.slot_bytes)
        self.table_address = table.address + SUPERBLOCK_BYTES
        self.headers = np.frombuffer(table.memory, HEADER, count=self.slots, offset=SUPERBLOCK_BYTES)
        self._generations: U64 = self.headers["generation"]
        self._birth = birth  # generations of this owner are above; 0: we own nothing

    # --- questions ----------------------------------------------------------------------------------------------------

    @property
    def available_slots(self) -> int:
        """Slots whose memory is allocated, the first ones of the region. Only grows."""
        return int(self._superblock["available_slots"][0])

    @property
    def epoch(self) -> int:
        """Start of the present owner in seconds since 2020, the high half of its first generations."""
        return int(self._superblock["birth"][0]) >> 32

    def generations(self, slots: npt.ArrayLike) -> U64:
        """Generations of ``slots`` (int64 [n]), uint64 [n], loaded after all that this thread read before.

        Raises:
            IndexError: there is no such slot (yet).
        """
        chosen = self._checked(slots)
        out = np.empty(len(chosen), np.uint64)
        native.load_generations(self.table_address, HEADER.itemsize, chosen, out)
        return out

    def checksums(self, slots: npt.ArrayLike) -> U64:
        """Checksums of ``slots``, uint64 [n]; of use when `generations`, asked after it, are those expected. IndexError."""
        return np.asarray(self.headers["checksum"][self._checked(slots)])

    def lengths(self, slots: npt.ArrayLike) -> U64:
        """Lengths of the blocks in ``slots`` in bytes, uint64 [n]; as `checksums`."""
        return self.headers["length"][self._checked(slots)].astype(np.uint64)

    def key(self, slot: int) -> bytes:
        """Key in a slot's header, as it was written last; empty when it never was."""
        header = self.headers[slot]
        return bytes(header["key"])[: int(header["key_bytes"])]

    def check(self) -> list[str]:
        """Problems found in headers, one sentence each; empty when all is well."""
        headers = self.headers[: self.available_slots]
        complete = complete_slots(headers)
        faults = {
            "has no possible length": (headers["length"] == 0) | (headers["length"] > self.slot_bytes),
            "has no possible key": (headers["key_bytes"] == 0) | (headers["key_bytes"] > keys.KEY_BYTES_MAX),
            "is being written": (headers["flags"] & WRITING) != 0,
            "has a generation of a former owner": (headers["generation"] < self._birth) & (not self.keeps_generations),
        }
        return [
            f"slot {slot} is complete, but {fault}"
            for fault, found in faults.items()
            for slot in np.flatnonzero(complete & found).tolist()
        ]

    # --- transitions, by the owner ------------------------------------------------------------------------------------

    def begin(self, slot: int) -> int:
        """Take a slot for writing, whatever it held; returns its generation, odd."""
        assert self._birth and 0 <= slot < self.available_slots
        generation = self._advance(slot)
        _FLAGS.pack_into(self._table.memory, self._offset(slot) + _FLAGS_OFFSET, WRITING)
        return generation

    def finish(self, slot: int, generation: int, key: bytes, length: int, checksum: int, expires: int = 0) -> int:
        """The block is written: ``generation`` is what `begin` gave; returns the next, even. checksum: 64 bits. expires: second
        since 2020 from which on nobody may read it, 0: no end."""
        assert generation % 2 == 1 and int(self._generations[slot]) == generation
        assert 0 < len(key) <= keys.KEY_BYTES_MAX and 0 < length <= self.slot_bytes
        # Fields first: who sees the even generation sees them, and a crash in between leaves an odd one.
        self._put_fields(slot, key, length, checksum, expires)
        native.store_generation(self._header_address(slot), generation + 1)
        return generation + 1

    def retire(self, slot: int) -> None:
        """The slot's content is no more, complete or being written: no old generation validates from now on."""
        assert self._birth and 0 <= slot < self.available_slots
        self._advance(slot)
        _FLAGS.pack_into(self._table.memory, self._offset(slot) + _FLAGS_OFFSET, 0)

    def _put_fields(self, slot: int, key: bytes, length: int, checksum: int, expires: int) -> None:
        _FIELDS.pack_into(self._table.memory, self._offset(slot) + _FIELDS_OFFSET, checksum, length, 0, len(key), key, expires)

    @abstractmethod
    def punch(self, slots: Sequence[int]) -> None:
        """Fill these slots with zeros, and their headers but for the generations. They are retired, nobody may be writing to
        them. Releases the GIL; to be called in a thread.

        Raises:
            RegionError: the disk failed.
        """

    def _clear_headers(self, slots: npt.NDArray[np.int64]) -> None:
        for field in HEADER.names or ():
            if field != "generation":
                self.headers[field][slots] = np.zeros(1, HEADER)[field]

    def _advance(self, slot: int) -> int:
        # Even to the odd above it; odd to the next odd; what is older than we are to our first.
        generation = (max(int(self._generations[slot]), self._birth) + 1) | 1
        native.store_generation(self._header_address(slot), generation)
        return generation

    def _checked(self, slots: npt.ArrayLike) -> npt.NDArray[np.int64]:
        chosen = np.ascontiguousarray(slots, np.int64)
        if len(chosen) and not (int(chosen.min()) >= 0 and int(chosen.max()) < self.available_slots):
            raise IndexError(f"slots {chosen.min()} to {chosen.max()} of {self.available_slots}")
        return chosen

    def _header_address(self, slot: int) -> int:
        return self.table_address + slot * HEADER.itemsize

    def _offset(self, slot: int) -> int:
        return SUPERBLOCK_BYTES + slot * HEADER.itemsize


class Region(SlotTable):
    """A mapped array of slots with its header table. Made by `open`, `anonymous` or `Arena.open`.

    region: its id, equal to slot_bytes. data_address: of slot 0.
    """

    def __init__(self, data: Mapping, table: Mapping, data_path: str = "", table_path: str = "", birth: int = 0) -> None:
        super().__init__(table, birth)
        self._data = data
        self.data_path, self.table_path = data_path, table_path
        self.data_address = data.address
        self._populated_slots = 0
        self._populating = threading.Lock()
        self._closed = threading.Event()

    @staticmethod
    def open(data_path: str, table_path: str, writable: bool = False) -> Region:
        """Map another's region: to read, or to write (the data only) what its owner reserved for us.

        Raises:
            RegionError: the files are missing, not ours, damaged or of another version.
        """
        flags = os.O_RDWR if writable else os.O_RDONLY
        try:
            with mapping.opened(table_path, os.O_RDONLY) as table_fd, mapping.opened(data_path, flags) as data_fd:
                read_superblock(table_fd, data_fd)
                table, data = Mapping.of_file(table_fd, writable=False), Mapping.of_file(data_fd, writable=writable)
        except (OSError, RegionError) as error:
            raise RegionError(f"cannot map region {data_path}: {error}; restart the node that owns it") from error
        return Region(data, table, data_path, table_path)

    @staticmethod
    def anonymous(slot_bytes: int, slots: int) -> Region:
        """A region in memory of this process alone, ready for writing: for tests and for uses without a node."""
        assert slot_bytes > 0 and slots > 0
        data, table = Mapping.anonymous(slots * slot_bytes), Mapping.anonymous(table_bytes(slots))
        birth = generation_now()
        head = superblock(slot_bytes, slots, slots * slot_bytes, birth, 0)
        head["available_slots"] = slots
        table.memory[: SUPERBLOCK.itemsize] = head.tobytes()
        return Region(data, table, birth=birth)

    # --- questions ----------------------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        return self._data.writable

    def describe(self, node: str, host_id: str, endpoint: str) -> RegionDescription:
        return RegionDescription(
            node, self.region, self.slot_bytes, self.slots, host_id, self.data_path, self.table_path, endpoint
        )

    def slot_address(self, slot: int) -> int:
        """Address of a slot's first byte. Raises IndexError when there is no such slot (yet)."""
        if not 0 <= slot < self.available_slots:
            raise IndexError(f"slot {slot} of {self.available_slots}")
        return self.data_address + slot * self.slot_bytes

    # --- transitions, by the owner ------------------------------------------------------------------------------------

    def _put_fields(self, slot: int, key: bytes, length: int, checksum: int, expires: int) -> None:
        if length < self.slot_bytes:
            # Of the block that was here before, nothing stays.
            ctypes.memset(self.data_address + slot * self.slot_bytes + length, 0, self.slot_bytes - length)
        super()._put_fields(slot, key, length, checksum, expires)

    def punch(self, slots: Sequence[int]) -> None:
        chosen = np.sort(self._checked(slots))
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
            if len(run):
                first, count = int(run[0]), len(run)
                ctypes.memset(self.data_address + first * self.slot_bytes, 0, count * self.slot_bytes)
        self._clear_headers(chosen)

    # --- life ---------------------------------------------------------------------------------------------------------

    def populate(self, start: int = 0, length: int | None = None) -> None:
        """Map slots ``start`` to ``start + length`` (default: all that are available and were not yet populated) before their
        first use, which is several times faster than faulting page by page. Best effort; may take seconds, so call it in a
        thread. Ends early after `close`."""
        if length is not None:
            end = min(start + length, self.available_slots)
            self._data.populate(start * self.slot_bytes, (end - start) * self.slot_bytes, self._closed)
            return
        with self._populating:
            end = self.available_slots
            start = max(start, self._populated_slots)
            self._data.populate(start * self.slot_bytes, (end - start) * self.slot_bytes, self._closed)
            self._table.populate(0, table_bytes(end), self._closed)
            self._populated_slots = end

    def close(self) -> None:
        """We are done with it; idempotent. Memory is unmapped with the last reference to the region."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
