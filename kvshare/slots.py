"""The arena: a region that a node owns, in two files of a memory file system that outlive it.

Lifecycle: 1. `Arena.open` locks the table file (the kernel frees the lock when its holder dies, however it dies) and recovers
what is complete and whole, or starts afresh; 2. `grow` allocates chunk after chunk: only slots of allocated chunks may be
used, so a full file system is an answer there and never a SIGBUS at a write; 3. `close`, which unlinks the files or leaves
them for the next start.

Recovery is one scan of the table: a slot whose generation is even was finished; its block stays if its checksum, seeded with
its key, holds. It gets a generation of the new owner, so that locations told by the former owner fail.

Files are replaced (written under another name, then renamed, data first), never truncated: whoever has them mapped keeps
what was there. A crash between the two renames leaves a table that names another data file, which the next start notices.

Threads: `grow` and `populate` may run in one thread besides the owner's.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from kvshare import keys, mapping, native
from kvshare.errors import RegionError
from kvshare.mapping import Mapping
from kvshare.region import (
    HEADER,
    SUPERBLOCK,
    SUPERBLOCK_BYTES,
    WRITING,
    Region,
    complete_slots,
    generation_now,
    read_superblock,
    second_now,
    superblock,
    table_bytes,
)

__all__ = ["HEADER", "Arena", "Recovered", "Region", "remove_stale", "stale_files"]

log = logging.getLogger("kvshare")

LOCK_SECONDS = 2.0  # a killed owner keeps its lock while the kernel takes its memory apart
_LOCK_PAUSE_SECONDS = 0.05
_NEW = ".new"  # behind the name of a file that is being made
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)


class Recovered(NamedTuple):
    """A block that a former owner left behind, verified, under a generation of the new owner."""

    slot: int
    key: bytes
    length: int
    generation: int
    expires: int = 0  # as in its header


class RecoveredBlocks(Sequence[Recovered]):
    """Recovered blocks, column by column: with a million of them one by one, the garbage collector is busy for seconds.

    columns: as the fields of `Recovered`.
    """

    def __init__(self, columns: Sequence[Sequence[Any]]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, recovered: Sequence[Recovered]) -> RecoveredBlocks:
        if isinstance(recovered, cls):
            return recovered
        return cls(list(zip(*recovered, strict=True)) if recovered else [()] * len(Recovered._fields))

    def __len__(self) -> int:
        return len(self.columns[0])

    @overload
    def __getitem__(self, index: int) -> Recovered: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Recovered]: ...
    def __getitem__(self, index: int | slice) -> Recovered | Sequence[Recovered]:
        found = [column[index] for column in self.columns]
        return RecoveredBlocks(found) if isinstance(index, slice) else Recovered._make(found)


class Arena(Region):
    """A region in files that this process owns.

    recovered: what `open` found whole. unsettled: slots that a writer of the former owner may still be writing; they should
    rest before they are used. Both in order of slots.
    """

    def __init__(self, data_fd: int, table_fd: int, data_path: str, table_path: str, chunk_bytes: int) -> None:
        data, table = Mapping.of_file(data_fd, writable=True), Mapping.of_file(table_fd, writable=True)
        data.advise_huge_pages()
        super().__init__(data, table, data_path, table_path)
        self._data_fd, self._table_fd = data_fd, table_fd
        # By the time, which is above all that former owners gave, files or not; by the files where the clock was set back.
        newest = max(int(self._superblock["birth"][0]), int(self._generations[: self.available_slots].max(initial=0)))
        self._birth = max(generation_now(), (newest | 1) + 1)
        self.chunk_slots = max(1, chunk_bytes // self.slot_bytes)
        for field, value in (("birth", self._birth), ("owner_pid", os.getpid()), ("chunk_bytes", chunk_bytes)):
            self._superblock[field] = value
        self._growing = threading.Lock()
        self._full_said = False
        self.recovered: list[Recovered] = []
        self.unsettled: list[int] = []

    # Made from other things than a region of another process, hence other arguments.
    @staticmethod
    def open(  # type: ignore[override]
        stem: str, slot_bytes: int, capacity_bytes: int, chunk_bytes: int, lock_seconds: float = LOCK_SECONDS
    ) -> Arena:
        """Own ``{stem}-{slot_bytes}.data`` and ``.table``: recover what they hold or start afresh.

        capacity_bytes: ceiling of the data; what files of another capacity held is given up. chunk_bytes: what `grow`
        allocates at a time. lock_seconds: patience with an owner that is about to end. Takes as long as reading all blocks:
        call it in a thread.

        Raises:
            RegionError: another process owns the files, they belong to another user, or there is no room for a table.
        """
        if not 0 < slot_bytes <= capacity_bytes:
            raise RegionError(f"an arena of {capacity_bytes} bytes holds no slot of {slot_bytes}: raise setting 'arena_bytes'")
        data_path, table_path = f"{stem}-{slot_bytes}.data", f"{stem}-{slot_bytes}.table"
        try:
            table_fd = _lock(table_path, lock_seconds)
            arena = None
            try:
                arena = _recover(table_fd, data_path, table_path, slot_bytes, capacity_bytes // slot_bytes, chunk_bytes)
                return arena or _create(data_path, table_path, slot_bytes, capacity_bytes // slot_bytes, chunk_bytes)
            finally:
                if arena is None:
                    os.close(table_fd)  # of a table that was replaced, or of an attempt that failed
        except OSError as error:
            raise RegionError(
                f"cannot own the arena {data_path}: {error}; make room there, or set 'shm_dir' to a folder of ours with room"
            ) from error

    def grow(self) -> bool:
        """Allocate the next chunk; False when all are, or when the system has no room (said once). Takes as long as clearing a
        chunk: call it in a thread."""
        with self._growing:
            first = self.available_slots
            last = min(first + self.chunk_slots, self.slots)
            if first == last or self._closed.is_set():
                return False
            start, length = first * self.slot_bytes, (last - first) * self.slot_bytes
            try:
                if not mapping.has_room(self._data_fd, length):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                mapping.allocate(self._table_fd, table_bytes(first), table_bytes(last) - table_bytes(first))
                # By the mapping first, since only so a file gets huge pages where they are only given on advice.
                self._data.populate(start, length, self._closed)
                mapping.allocate(self._data_fd, start, length)
            except OSError as error:
                self._data.give_back(start, length)
                if error.errno not in _NO_ROOM:
                    raise
                self._say_full(error)
                return False
            self._superblock["available_slots"] = last
            return True

    def close(self, unlink: bool = False) -> None:
        """Give the files up; idempotent. ``unlink`` removes them, otherwise the next start recovers what they hold.
        Running reads of ours and of others see unchanged memory until they let go of it."""
        super().close()
        with self._growing:
            if self._table_fd < 0:
                return
            if unlink:
                Path(self.data_path).unlink(missing_ok=True)
                Path(self.table_path).unlink(missing_ok=True)
            # Said aloud: the mapping keeps a duplicate of the descriptor, and the lock with it, while it lives.
            fcntl.flock(self._table_fd, fcntl.LOCK_UN)
            os.close(self._table_fd)
            os.close(self._data_fd)
            self._table_fd = self._data_fd = -1

    def _say_full(self, error: OSError) -> None:
        if not self._full_said:
            self._full_said = True
            log.warning(
                "kvshare: the arena %s stays at %d MiB (%s): make room there, or lower setting 'arena_bytes'",
                self.data_path,
                self.available_slots * self.slot_bytes >> 20,
                error.strerror,
            )

    def recover_blocks(self) -> None:
        """The scan. Fills `recovered` and `unsettled`; complete slots that fail or whose time is over are free afterwards."""
        self.populate()
        headers = self.headers[: self.available_slots]
        self.unsettled = np.flatnonzero((headers["flags"] & WRITING) != 0).tolist()
        generation, now = self._birth + 2, second_now()
        for slot in np.flatnonzero(complete_slots(headers)).tolist():
            key, length, expires = self.key(slot), int(headers["length"][slot]), int(headers["expires"][slot])
            if not 0 < expires <= now and self._holds(slot, key, length):
                native.store_generation(self._header_address(slot), generation)
                self.recovered.append(Recovered(slot, key, length, generation, expires))
            else:
                self.retire(slot)

    def _holds(self, slot: int, key: bytes, length: int) -> bool:
        """Is this the block that its header says?"""
        if not 0 < length <= self.slot_bytes or not 0 < len(key) == int(self.headers["key_bytes"][slot]):
            return False
        address, lengths = np.array([self.slot_address(slot)], np.uint64), np.array([length], np.uint64)
        return native.checksum(address, lengths, keys.seed_of(key)) == int(self.headers["checksum"][slot])


def stale_files(directory: str | Path, uid: int | None = None, stem: str | None = None) -> list[Path]:
    """Arena files in ``directory`` that no living process owns: of user ``uid`` (default: ours), and of the arenas of
    one ``stem`` (`Settings.arena_stem`) if given."""
    return [path for table, paths in _arena_files(directory, uid, stem).items() if not _is_owned(table) for path in paths]


def remove_stale(directory: str | Path, uid: int | None = None, stem: str | None = None) -> list[Path]:
    """Remove what `stale_files` names; returns what was removed. Files that find an owner meanwhile stay."""
    removed = []
    for table, paths in _arena_files(directory, uid, stem).items():
        try:
            fd = _lock(str(table), 0.0)  # also where the table is missing: nobody may start an arena here meanwhile
        except (OSError, RegionError) as error:
            log.debug("kvshare: left %s alone: %s", table, error)
            continue
        for path in [*(path for path in paths if path != table), table]:
            path.unlink(missing_ok=True)
        removed += paths
        os.close(fd)
    return removed


def _arena_files(directory: str | Path, uid: int | None, stem: str | None) -> dict[Path, list[Path]]:
    """Table path -> files of that arena which exist, left-overs of interrupted starts among them."""
    start = re.escape(Path(stem).name) if stem is not None else f"kvshare-{os.getuid() if uid is None else uid}-.+"
    name = re.compile(rf"({start}-\d+)\.(?:data|table)(?:{re.escape(_NEW)})?")
    found: dict[Path, list[Path]] = {}
    for path in sorted(Path(directory).iterdir()):
        match = name.fullmatch(path.name)
        if match is not None:
            found.setdefault(path.with_name(f"{match[1]}.table"), []).append(path)
    return found


def _is_owned(table: Path) -> bool:
    try:
        with mapping.opened(str(table), os.O_RDONLY) as fd:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True  # in use, or not for us to judge
    except FileNotFoundError:
        return False
    return False


def _lock(table_path: str, seconds: float) -> int:
    """The descriptor of the table file, made if need be, locked by us. Raises RegionError when another holds it."""
    deadline = time.monotonic() + seconds
    while True:
        fd = mapping.open_ours(table_path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that was replaced or removed while we came is locked in vain.
            if _names(table_path, fd):
                return fd
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                owner = _owner_pid(fd)
                os.close(fd)
                raise RegionError(
                    f"process {owner} owns the arena {table_path}: stop it ('kvshare stop'), or choose another 'node_name'"
                ) from error
            time.sleep(_LOCK_PAUSE_SECONDS)
        os.close(fd)


def _names(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _owner_pid(fd: int) -> int | str:
    head = os.pread(fd, SUPERBLOCK.itemsize, 0)
    return int(np.frombuffer(head, SUPERBLOCK)["owner_pid"][0]) if len(head) == SUPERBLOCK.itemsize else "(starting)"


def _recover(table_fd: int, data_path: str, table_path: str, slot_bytes: int, slots: int, chunk_bytes: int) -> Arena | None:
    """The arena that the files hold; None, and why is said, when they hold none that can go on."""
    try:
        data_fd = mapping.open_ours(data_path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        head = read_superblock(table_fd, data_fd)
        if (int(head["slot_bytes"][0]), int(head["slots"][0])) != (slot_bytes, slots):
            raise RegionError(f"it was made for {head['slots'][0]} slots of {head['slot_bytes'][0]} bytes, now {slots}")
        available = int(head["available_slots"][0])
        # No change where the files are as we left them; but from here on no write can fail, whatever was done to them.
        mapping.allocate(table_fd, 0, table_bytes(available))
        mapping.allocate(data_fd, 0, available * slot_bytes)
        arena = Arena(data_fd, table_fd, data_path, table_path, chunk_bytes)
        arena.recover_blocks()
        return arena
    except (RegionError, OSError) as error:
        log.warning("kvshare: the arena %s starts afresh: %s", data_path, error)
        os.close(data_fd)
        return None


def _create(data_path: str, table_path: str, slot_bytes: int, slots: int, chunk_bytes: int) -> Arena:
    """New files in place of any that are there; the caller holds the lock of the table that is replaced."""
    fds = []
    try:
        for path, size in ((data_path, slots * slot_bytes), (table_path, table_bytes(slots))):
            Path(path + _NEW).unlink(missing_ok=True)
            fds.append(mapping.open_ours(path + _NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            os.ftruncate(fds[-1], size)
        data_fd, table_fd = fds
        # Before it gets its name: whoever finds the new table finds it locked.
        fcntl.flock(table_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mapping.allocate(table_fd, 0, SUPERBLOCK_BYTES)
        os.pwrite(table_fd, superblock(slot_bytes, slots, chunk_bytes, 0, os.fstat(data_fd).st_ino).tobytes(), 0)
        arena = Arena(data_fd, table_fd, data_path, table_path, chunk_bytes)
        os.rename(data_path + _NEW, data_path)
        os.rename(table_path + _NEW, table_path)
        return arena
    except BaseException:
        for fd, path in zip(fds, (data_path, table_path), strict=False):
            os.close(fd)
            Path(path + _NEW).unlink(missing_ok=True)
        raise
