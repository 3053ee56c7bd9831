"""The generations of a device region: an engine's own KV cache, served to peers while vLLM writes to it.

    table file   superblock (4096 bytes) │ generation of slot 0 │ generation of slot 1 │ ...   8 bytes each

A slot is a block of the engine, by vLLM's number. The file lies in a memory file system, one for all tensor-parallel ranks:
the worker process makes it, the scheduler process writes the generations, readers on the host map it, and a NIXL agent has it
registered for the others. Generations mean what they mean everywhere (`kvshare.region`):

    0 or odd      nobody may read the block: never complete, or handed out for writing
    even, not 0   complete

    begin ──> odd ──(step sent, step back)──> finish ──> even ──> begin (the next odd one) ...

They only grow, and begin above the time at which the table was made. No checksums: vLLM writes the blocks, and a reader finds
before and after its copy the generation that it was told, or has a miss. An index knows keys by 64 bits of them, so it may once
in a very long time take a block for another, and no checksum would say so. Hence an even generation carries a tag of its
block's key (`TAG_BITS`), and who was told of a location compares it (`is_of`).

    generation   51 bits: count │ 12 bits: tag + 1, 0 while odd │ 1 bit: odd while it is written

Threads: transitions come from one process, one at a time. Questions from any.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvshare import mapping, native
from kvshare.errors import RegionError
from kvshare.mapping import Mapping
from kvshare.region import SUPERBLOCK, SUPERBLOCK_BYTES, generation_now

SUFFIX = ".generations"
MAGIC = b"KVSHARED"
FORMAT_VERSION = 2
STRIDE = 8
TAG_BITS = 12
TAGS = (1 << TAG_BITS) - 1  # there are so many
_COUNT_SHIFT = TAG_BITS + 1

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


class DeviceTable:
    """See the module's docstring. Made by `create` or `open`.

    table_address: of slot 0's generation; the mapping lives as long as the object.
    """

    def __init__(self, path: str, table: Mapping) -> None:
        self.path = path
        self._table = table
        head = np.frombuffer(table.memory, SUPERBLOCK, count=1)
        self.slots, self.slot_bytes = int(head["slots"][0]), int(head["slot_bytes"][0])
        self._birth = int(head["birth"][0])
        self.table_address = table.address + SUPERBLOCK_BYTES
        self._generations: U64 = np.frombuffer(table.memory, np.uint64, count=self.slots, offset=SUPERBLOCK_BYTES)

    @classmethod
    def create(cls, path: str, slots: int, slot_bytes: int) -> DeviceTable:
        """A new table, all of whose slots are unreadable, in place of any of that name.

        Raises:
            RegionError: there is no room, or no right to write there.
        """
        assert slots > 0 and slot_bytes > 0
        head = np.zeros(1, SUPERBLOCK)
        head["magic"], head["version"], head["header_bytes"] = MAGIC, FORMAT_VERSION, STRIDE
        head["slot_bytes"], head["slots"], head["available_slots"] = slot_bytes, slots, slots
        head["birth"], head["owner_pid"] = generation_now(), os.getpid()
        try:
            Path(path).unlink(missing_ok=True)
            with mapping.opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                # Held by the mapping's duplicate of the descriptor, freed by the kernel when we die: see `remove_stale`.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mapping.allocate(fd, 0, SUPERBLOCK_BYTES + slots * STRIDE)
                os.pwrite(fd, head.tobytes(), 0)
                return cls(path, Mapping.of_file(fd, writable=True))
        except OSError as error:
            raise RegionError(
                f"cannot make the table {path}: {error}; make room there, or set 'shm_dir' to a folder of ours with room"
            ) from error

    @classmethod
    def open(cls, path: str, writable: bool = False) -> DeviceTable:
        """Map a table. Raises RegionError: it is missing, not ours, damaged or of another version."""
        try:
            with mapping.opened(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
                data = os.pread(fd, SUPERBLOCK.itemsize, 0)
                head = np.frombuffer(data, SUPERBLOCK) if len(data) == SUPERBLOCK.itemsize else None
                if head is None or head["magic"][0] != MAGIC:
                    raise RegionError("the file is no table of generations")
                if head["version"][0] != FORMAT_VERSION or head["header_bytes"][0] != STRIDE:
                    raise RegionError(f"its format is version {head['version'][0]}, ours {FORMAT_VERSION}")
                slots = int(head["slots"][0])
                if slots == 0 or os.fstat(fd).st_size != SUPERBLOCK_BYTES + slots * STRIDE:
                    raise RegionError("it is cut short")
                return cls(path, Mapping.of_file(fd, writable))
        except (OSError, RegionError) as error:
            raise RegionError(f"cannot map the table {path}: {error}; restart the engine that owns it") from error

    def generations(self, slots: npt.ArrayLike) -> U64:
        """Generations of ``slots`` (int64 [n]), loaded after all that this thread read before. IndexError: no such slot."""
        chosen = self._checked(slots)
        out = np.empty(len(chosen), np.uint64)
        native.load_generations(self.table_address, STRIDE, chosen, out)
        return out

    # --- transitions, by the one writer -------------------------------------------------------------------------------

    def begin(self, slots: npt.ArrayLike) -> None:
        """These slots (each once) are handed out for writing: to be called before anything may write to them."""
        chosen = self._checked(slots)
        counts = np.maximum(self._generations[chosen], np.uint64(self._birth)) >> np.uint64(_COUNT_SHIFT)
        self._generations[chosen] = counts + np.uint64(1) << np.uint64(_COUNT_SHIFT) | np.uint64(1)

    def finish(self, slots: npt.ArrayLike, begun: U64, tags: U64 | None = None) -> npt.NDArray[np.bool_]:
        """These slots are complete, unless they were handed out again since their generation was ``begun`` (uint64 [n], odd).
        Returns which are, bool [n]; their generations are `completed` (begun, tags). tags: of their keys, uint64 [n]; None:
        nobody is told of them by key."""
        chosen = self._checked(slots)
        held = np.asarray(self._generations[chosen] == begun)
        self._generations[chosen[held]] = completed(begun, tags)[held]
        return held

    def retire_all(self) -> None:
        """No block that was complete validates from now on."""
        complete = np.flatnonzero((self._generations % np.uint64(2) == 0) & (self._generations != 0))
        self._generations[complete] += np.uint64(1)

    def unlink(self) -> None:
        """Remove the file. Who has it mapped keeps what was there; blocks of it must not be read any more."""
        Path(self.path).unlink(missing_ok=True)

    def _checked(self, slots: npt.ArrayLike) -> I64:
        chosen = np.ascontiguousarray(slots, np.int64)
        if len(chosen) and not (int(chosen.min()) >= 0 and int(chosen.max()) < self.slots):
            raise IndexError(f"slots {chosen.min()} to {chosen.max()} of {self.slots}")
        return chosen


def completed(begun: U64, tags: U64 | None = None) -> U64:
    """Generations (uint64 [n]) under which blocks are complete that were begun under these, with these tags of their keys."""
    return begun + np.uint64(1) if tags is None else begun + np.uint64(1) + (tags << np.uint64(1))


def tag_of(key: bytes) -> int:
    """Below `TAGS`; equal in all shards of a block, whose keys differ in their family."""
    return int.from_bytes(key[-3:], "little") % TAGS


def is_of(generation: int, key: bytes) -> bool:
    """Can a complete device block of this generation be that key's?"""
    return generation & ((1 << _COUNT_SHIFT) - 1) == (tag_of(key) + 1) << 1


def table_path(stem: str) -> str:
    """Where this process's table lies, beside the arena of ``stem`` (`kvshare.config.Settings.arena_stem`)."""
    return f"{stem}-device-{os.getpid()}{SUFFIX}"


def remove_stale(stem: str) -> list[Path]:
    """Remove the tables beside the arena of ``stem`` whose makers have died; returns them."""
    removed = []
    for path in sorted(Path(stem).parent.glob(f"{Path(stem).name}-device-*{SUFFIX}")):
        try:
            with mapping.opened(str(path), os.O_RDWR) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed.append(path)
        except OSError:
            continue  # in use, gone meanwhile, or not ours
    return removed
