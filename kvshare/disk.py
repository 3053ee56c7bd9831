"""The disk region: blocks that outlive their engine, their node and the machine's memory.

    arena slots ── write: (seal) ──pwritev, direct──> data file ──then──> headers ──> table file
    arena slots <─ read: verify <── (unseal) <──preadv, direct── data file       headers in memory: what holds

A `SlotTable` whose table lies in memory and whose data is only in a file (`kvshare.disk_files`), so a `Store` orders it like an
arena. Nothing of it is mapped (`kvshare.disk_io`).

Life of a block: 1. `begin` on the loop makes the slot's generation odd, in memory; 2. `write` in a thread brings that to the
table file, then the block to the data file, then the finished header to the table file: killed at any moment, the files hold
the block whole, or what fails its verification, or nothing; 3. `finish` on the loop makes it readable. `retire` reaches the
file with the next `write`, `punch` or `flush`; what comes back because it did not is a right block that had left.

Recovery is one scan of the table (`DiskRegion.open`); blocks are not read, since each is verified whenever it is read: its
generation, its tag where it is sealed, its checksum seeded with its key. Recovered blocks keep their generations; new ones are
above all that a former owner can have given.

Failures of the disk are said once, with the remedy, and are then blocks that are not kept (`write`) or misses (`read`).

Threads: `begin`, `finish`, `retire` and the other questions of a `SlotTable` by the owner's loop, as for an arena; `write`,
`read`, `punch`, `flush`, `grow` and `close` wait for the disk and run in any number of other threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvshare import disk_files, keys
from kvshare.disk_blocks import Block, BlockMover, Wanted
from kvshare.disk_files import DISK_SUPERBLOCK, DiskFolder
from kvshare.disk_io import BlockFile, runs
from kvshare.errors import RegionError
from kvshare.mapping import Mapping
from kvshare.native import U8, U64, BlockStatus
from kvshare.places import DISK, RegionDescription
from kvshare.region import HEADER, WRITING, SlotTable, complete_slots, second_now, table_bytes
from kvshare.slots import Recovered, RecoveredBlocks
from kvshare.vault import UNSEALED, Sealed, Vault

log = logging.getLogger("kvshare")

__all__ = ["DiskFolder", "DiskRegion"]

_HEADER = struct.Struct(f"<QQIHH{keys.KEY_BYTES_MAX}s12s16sQI")  # the fields of `HEADER`, in order

SayProgress = Callable[[str], None]
StillThere = Callable[[], Sequence[bool]]


class DiskRegion(SlotTable):
    """See the module's docstring. Made by `open`. recovered: what was found, in order of slots, for `Store.adopt`."""

    keeps_generations = True

    def __init__(self, data: BlockFile, table_file: BlockFile, table: Mapping, vault: Vault) -> None:
        super().__init__(table)
        self._data, self._table_file, self._vault = data, table_file, vault
        self.region = self.slot_bytes + 1  # an arena of the same slot size has the number itself
        self.chunk_slots = max(1, disk_files.CHUNK_BYTES // self.slot_bytes)
        head = np.frombuffer(table.memory, DISK_SUPERBLOCK, count=1)
        self._birth = int(head["birth"][0])
        self._mover = BlockMover(data, self.slot_bytes, head["place_id"][0].tobytes(), vault)
        self._dirty: set[int] = set()  # slots whose header in the file is older than that in memory
        self._marking = threading.Lock()  # of `_dirty`, held for moments
        self._flushing = threading.Lock()  # one writer of headers, so that an older one never overtakes; held during a call
        self._growing = threading.Lock()
        self._written: dict[int, bytes] = {}  # slot -> header as `write` left it in the file, for `finish`
        self._said: set[str] = set()
        self.recovered: Sequence[Recovered] = ()

    @staticmethod
    def open(
        folder: DiskFolder,
        slot_bytes: int,
        capacity_bytes: int,
        vault: Vault,
        *,
        say_progress: SayProgress = lambda sentence: log.info("kvshare: %s", sentence),
    ) -> DiskRegion:
        """The region of that slot size in ``folder``, with what it holds.

        capacity_bytes: ceiling of the data; another one than last time loses only what lies beyond it. vault: seals what is
        written if it is enabled. Reads the table, not the blocks; call it in a thread.

        Raises:
            RegionError: files of another format, damaged or of another user, no room for a table; the sentence says what to do.
        """
        slots = capacity_bytes // slot_bytes if slot_bytes > 0 else 0
        if slots < 1:
            raise RegionError(f"{capacity_bytes} bytes of disk hold no slot of {slot_bytes}: raise setting 'disk_bytes'")
        try:
            data, table_file, table = disk_files.open_files(folder, slot_bytes, slots)
            region = DiskRegion(data, table_file, table, vault)
            try:
                disk_files.read_headers(table_file, table, region.available_slots, say_progress)
                region._recover()
            except BaseException:
                region._close_files()
                raise
            return region
        except OSError as error:
            raise RegionError(
                f"cannot keep blocks in {folder.path}: {error}; make room there, or set 'disk_dir' to another folder of ours"
            ) from error

    def describe(self, node: str, host_id: str, endpoint: str) -> RegionDescription:
        """For peers. Without paths: nobody but its node reads it."""
        return RegionDescription(node, self.region, self.slot_bytes, self.slots, host_id, "", "", endpoint, DISK)

    # --- transitions --------------------------------------------------------------------------------------------------

    def begin(self, slot: int) -> int:
        self._written.pop(slot, None)
        generation = super().begin(slot)
        self._mark([slot])
        return generation

    def finish(self, slot: int, generation: int, key: bytes, length: int, checksum: int, expires: int = 0) -> int:
        """As `SlotTable.finish`. What `write` wrote of the slot (its seal, its expiry) is taken over."""
        complete = super().finish(slot, generation, key, length, checksum, expires)
        self._mark([slot])
        return complete

    def retire(self, slot: int) -> None:
        self._written.pop(slot, None)
        super().retire(slot)
        self._mark([slot])

    def _put_fields(self, slot: int, key: bytes, length: int, checksum: int, expires: int) -> None:
        written = self._written.pop(slot, None)
        if written is None:
            super()._put_fields(slot, key, length, checksum, expires)
        else:
            start = self._offset(slot)
            self._table.memory[start + 8 : start + HEADER.itemsize] = written[8:]

    # --- blocks -------------------------------------------------------------------------------------------------------

    def write(
        self,
        slots: Sequence[int],
        keys: Sequence[bytes],
        lengths: Sequence[int],
        checksums: Sequence[int],
        addresses: Sequence[int],
        expires: Sequence[int],
        still_there: StillThere | None = None,
    ) -> list[bool]:
        """Bring blocks from memory to slots that are reserved; which of them are on the disk, whole. All [n].

        checksums: xxh3 of each block, seeded with its key. addresses: of what stays mapped meanwhile; slots of an arena go
        without a copy, since they lie on whole pages. expires: seconds since 2020, 0: never. still_there: asked once the bytes
        are out: which sources still hold what they held. Keep the reservations until this returns, then commit what is True
        and abort the rest. Killed from then on, the blocks come back, committed or not.
        """
        blocks = [*map(Block, slots, keys, lengths, checksums, addresses, expires)]
        order = sorted(range(len(blocks)), key=lambda i: blocks[i].slot)
        ascending = [blocks[i] for i in order]
        own = [block.slot for block in ascending]
        generations = self.generations(own)
        assert bool((generations % 2 == 1).all())
        self._look_for_files()
        seals: list[Sealed | None] = [None] * len(blocks)
        if self.flush():  # what these slots held is gone from the table before it is gone from the data
            for start, end in runs(own, self.slot_bytes):
                try:
                    seals[start:end] = self._mover.write(ascending[start:end])
                except OSError as error:
                    self._say(error)
        there = still_there() if still_there is not None else [True] * len(blocks)
        done = [at for at, i in enumerate(order) if seals[at] is not None and there[i]]
        headers = [_header(ascending[at], int(generations[at]) + 1, seals[at] or UNSEALED) for at in done]
        kept = self._write_headers([own[at] for at in done], headers)
        result = [False] * len(blocks)
        for at, ok in zip(done, kept, strict=True):
            result[order[at]] = ok
        return result

    def read(
        self,
        slots: Sequence[int],
        generations: Sequence[int],
        keys: Sequence[bytes],
        addresses: Sequence[int],
        length: int,
    ) -> U8:
        """Bring blocks of ``length`` bytes to ``addresses``, verified; uint8 [n] of `BlockStatus`. All [n].

        STALE: the slot holds another block now, or its time is over. CORRUPT: it is damaged, or cannot be unsealed.
        UNREACHABLE: the disk failed. What the target of a block that is not OK holds is undefined. Never raises for what the
        disk does. Targets on whole pages are read without a copy.
        """
        chosen, expected = np.asarray(slots, np.int64), np.asarray(generations, np.uint64)
        statuses = np.full(len(chosen), BlockStatus.STALE, np.uint8)
        within = np.flatnonzero((chosen >= 0) & (chosen < self.available_slots))
        held = within[self._held(chosen[within], expected[within], [keys[i] for i in within.tolist()], length)]
        held = held[np.argsort(chosen[held], kind="stable")]
        headers = self.headers[chosen[held]]
        blocks = [Wanted(int(chosen[i]), keys[i], int(addresses[i]), header) for i, header in zip(held, headers, strict=True)]
        for start, end in runs([block.slot for block in blocks], self.slot_bytes):
            try:
                statuses[held[start:end]] = self._mover.read(blocks[start:end], length)
            except OSError as error:
                self._say(error)
                statuses[held[start:end]] = BlockStatus.UNREACHABLE
        # Rewritten while we read: what landed is either's, and the header that it was compared with too.
        statuses[held[self.generations(chosen[held]) != expected[held]]] = BlockStatus.STALE
        return statuses

    def punch(self, slots: Sequence[int]) -> None:
        """As `SlotTable.punch`: the headers first, durably, then the bytes, whose room goes back to the file system."""
        chosen = np.unique(self._checked(slots))
        self._clear_headers(chosen)
        erased = chosen.tolist()
        self._mark(erased)
        try:
            if not self.flush():
                raise RegionError(f"cannot erase blocks in {self._data.path}: its table cannot be written")
            self._table_file.sync()
            for start, end in runs(erased, self.slot_bytes):
                self._data.punch(erased[start] * self.slot_bytes, (end - start) * self.slot_bytes)
        except OSError as error:
            self._say(error)
            raise RegionError(f"cannot erase blocks in {self._data.path}: {error}") from error

    def _held(self, slots: npt.NDArray[np.int64], expected: U64, wanted: Sequence[bytes], length: int) -> npt.NDArray[np.bool_]:
        """Which of these slots hold the block that is wanted, by their headers in memory."""
        found = self.generations(slots)
        headers = self.headers[slots]
        now = second_now()
        alive = (headers["expires"] == 0) | (headers["expires"] > now)
        good = (found == expected) & (found % 2 == 0) & (found != 0) & (headers["length"] == length) & alive
        same = [header[:size] == key for header, size, key in zip(_keys(headers), headers["key_bytes"], wanted, strict=True)]
        return np.asarray(good & np.array(same, bool))

    # --- headers ------------------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Bring all headers that changed to the table file. False, and said, when the disk failed: they stay due."""
        with self._flushing:
            with self._marking:
                dirty, self._dirty = self._dirty, set()
            ascending = sorted(dirty)
            try:
                for start, end in runs(ascending, HEADER.itemsize):
                    # Copied at a stroke: the loop cannot change a header meanwhile, and marks it again when it does so later.
                    at = self._offset(ascending[start])
                    image = self._table.memory[at : at + (end - start) * HEADER.itemsize]
                    self._table_file.write([memoryview(image)], at)
            except OSError as error:
                self._mark(dirty)
                self._say(error)
                return False
        return True

    def _write_headers(self, slots: Sequence[int], headers: Sequence[bytes]) -> list[bool]:
        """Finished headers, to the file only: `finish` brings them to memory. Which of them are there."""
        kept = [False] * len(slots)
        with self._flushing:
            # Given up meanwhile (its generation went on): the file says so or will, and must not be told otherwise.
            now = self.generations(slots).tolist()
            current = [i for i, made in enumerate(headers) if int.from_bytes(made[:8], "little") == now[i] + 1]
            for start, end in runs([slots[i] for i in current], HEADER.itemsize):
                part = current[start:end]
                image = b"".join(headers[i] for i in part)
                try:
                    self._table_file.write([memoryview(image)], self._offset(slots[part[0]]))
                except OSError as error:
                    self._say(error)
                    continue
                for i in part:
                    self._written[slots[i]] = headers[i]
                    kept[i] = True
        return kept

    def _mark(self, slots: Iterator[int] | Sequence[int] | set[int]) -> None:
        with self._marking:
            self._dirty.update(slots)

    # --- life ---------------------------------------------------------------------------------------------------------

    def grow(self) -> bool:
        """Take room for the next chunk; False when all is taken, or when the disk has no more (said once). Call it in a
        thread."""
        with self._growing:
            first = self.available_slots
            last = min(first + self.chunk_slots, self.slots)
            if first == last:
                return False
            try:
                self._table_file.allocate(table_bytes(first), table_bytes(last) - table_bytes(first))
                self._data.allocate(first * self.slot_bytes, (last - first) * self.slot_bytes)
                self._superblock["available_slots"] = last
                disk_files.write_superblock(self._table_file, self._table)
            except OSError as error:
                self._superblock["available_slots"] = first
                self._say(error)
                return False
            return True

    def close(self, unlink: bool = False) -> None:
        """Bring everything to the disk and give the files up, or ``unlink`` them; idempotent. Calls under way end first, each
        with its own descriptor. Call it in a thread: a disk that does not answer keeps it waiting."""
        with contextlib.suppress(OSError):
            if unlink:
                for file in (self._table_file, self._data):
                    Path(file.path).unlink(missing_ok=True)
            else:
                # In this order even if the machine dies now.
                self._data.sync()
                if self.flush():
                    self._table_file.sync()
        self._close_files()

    def _close_files(self) -> None:
        self._data.close()
        self._table_file.close()

    def _recover(self) -> None:
        """The scan. Fills `recovered`; complete slots that cannot be right, or whose time is over, are free afterwards."""
        headers = self.headers[: self.available_slots]
        generations, size, key_bytes = headers["generation"], headers["length"], headers["key_bytes"]
        complete = complete_slots(headers) & ((headers["flags"] & WRITING) == 0)
        possible = (size > 0) & (size <= self.slot_bytes) & (key_bytes > 0) & (key_bytes <= keys.KEY_BYTES_MAX)
        alive = (headers["expires"] == 0) | (headers["expires"] > second_now())
        good = complete & possible & alive & (generations < self._birth)
        # What was kept as it is before there were keys must not stay so, nor can what is sealed be read without.
        readable = (headers["key_id"] != 0) == self._vault.enabled
        self.recovered = _recovered(headers, np.flatnonzero(good & readable))
        gone = np.flatnonzero((generations != 0) & ~(good & readable))
        generations[gone] = self._birth + 1
        headers["flags"][gone] = 0
        self._mark(gone.tolist())
        if self._vault.enabled:
            self.punch(np.flatnonzero(good & ~readable).tolist())

    def _look_for_files(self) -> None:
        """Say so, once, when somebody deleted the files: they are ours until we close them, and gone then."""
        with contextlib.suppress(OSError):
            if "deleted" not in self._said and (self._data.deleted or self._table_file.deleted):
                self._said.add("deleted")
                log.warning(
                    "kvshare: %s or its table was deleted: blocks are kept in it until this node ends, and lost then; "
                    "restart the node to start afresh",
                    self._data.path,
                )

    def _say(self, error: OSError) -> None:
        if error.errno == errno.EBADF:
            return  # closed: we end
        kind = "full" if disk_files.is_no_room(error) else "failed"
        if kind in self._said:
            return
        self._said.add(kind)
        if kind == "full":
            remedy = "make room there, or lower setting 'disk_bytes'; blocks that do not fit are not kept"
        else:
            remedy = "blocks on it are misses where it fails; look at the disk, or set 'disk_dir' to another one"
        log.warning("kvshare: the disk region %s: %s: %s", self._data.path, error.strerror or error, remedy)


def _header(block: Block, generation: int, seal: Sealed) -> bytes:
    """A finished header."""
    said = (generation, block.checksum, block.length, 0, len(block.key), block.key)
    return _HEADER.pack(*said, seal.nonce, seal.tag, seal.key_id, block.expires)


def _keys(headers: npt.NDArray[np.void]) -> list[bytes]:
    """The key fields, `KEY_BYTES_MAX` bytes each."""
    found: list[bytes] = np.ascontiguousarray(headers["key"]).tolist()
    return found


def _recovered(headers: npt.NDArray[np.void], slots: npt.NDArray[np.int64]) -> Sequence[Recovered]:
    """These slots' blocks. Whole arrays at a time: there may be millions."""
    wanted = "key", "key_bytes", "length", "generation", "expires"
    fields, sizes, *rest = (headers[field][slots].tolist() for field in wanted)
    columns = [slots.tolist(), [key[:size] for key, size in zip(fields, sizes, strict=True)], *rest]
    return RecoveredBlocks(columns)
