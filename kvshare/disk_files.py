"""The files of a node's disk: a folder that one node owns, and in it two files for each slot size.

    kvshare.lock                          locked by the node that owns the folder, whatever its name
    kvshare-{cluster}-{slot bytes}.data   slot 0 │ slot 1 │ ...
    kvshare-{cluster}-{slot bytes}.table  superblock (4096 bytes) │ header 0 │ header 1 │ ...

Formats are those of `kvshare.region`; the superblock has two more fields and a checksum. The node's name is in no file name: a
host that comes back under another name (Ray gives a new one) finds what it has kept.

Tables of another format and damaged ones are refused with a sentence and left as they are; nothing here deletes what it does
not understand. A new table is complete before it gets its name.

Threads: whoever opens; system calls that may wait, so not the loop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from kvshare import mapping
from kvshare.disk_io import PAGE_BYTES, BlockFile
from kvshare.errors import RegionError
from kvshare.mapping import Mapping
from kvshare.region import FORMAT_VERSION, HEADER, MAGIC, SUPERBLOCK, SUPERBLOCK_BYTES, generation_now, superblock, table_bytes

LOCK_NAME = "kvshare.lock"
LOCK_SECONDS = 2.0  # a killed owner keeps its lock while the kernel takes it apart
CHUNK_BYTES = 256 << 20  # the step by which the files grow
SCAN_BYTES = 16 << 20  # of a table, read at a time
PROGRESS_SECONDS = 2.0  # between two words about a scan
PLACE_BYTES = 16
# An owner's generations lie less than this above its birth: no slot sees two billion changes.
GENERATIONS_MAX = 1 << 32
_LOCK_PAUSE_SECONDS = 0.05
_NEW = ".new"  # behind the name of a table that is being made

DISK_SUPERBLOCK = np.dtype(
    [
        *SUPERBLOCK.descr,
        ("place_id", f"V{PLACE_BYTES}"),  # random: what the region's sealed blocks are bound to
        ("checksum", "<u8"),  # of all before
    ]
)
_CHECKED_BYTES = DISK_SUPERBLOCK.itemsize - 8


class DiskFolder:
    """A folder that this node owns until `close`. Made by `open`."""

    def __init__(self, path: Path, cluster: str, lock_fd: int) -> None:
        self.path = path
        self._cluster = cluster
        self._lock_fd = lock_fd

    @staticmethod
    def open(path: str, cluster: str, lock_seconds: float = LOCK_SECONDS) -> DiskFolder:
        """Own the folder ``path`` (setting 'disk_dir'), which is made where only its last part is missing.

        lock_seconds: patience with an owner that is about to end.

        Raises:
            RegionError: another node owns it, it cannot be written, or there is no such place.
        """
        folder = Path(path)
        try:
            if not folder.is_dir():
                folder.mkdir(mode=0o700)
            return DiskFolder(folder, cluster, _lock(folder / LOCK_NAME, lock_seconds))
        except OSError as error:
            raise RegionError(
                f"cannot keep blocks in {path}: {error.strerror}; set 'disk_dir' to a folder on a disk that we may write to"
            ) from error

    def paths(self, slot_bytes: int) -> tuple[str, str]:
        """Of the data and the table of the region of that slot size."""
        stem = str(self.path / f"kvshare-{self._cluster}-{slot_bytes}")
        return f"{stem}.data", f"{stem}.table"

    def slot_sizes(self) -> list[int]:
        """Of the regions that lie here, in bytes, in order."""
        name = re.compile(rf"kvshare-{re.escape(self._cluster)}-(\d+)\.table")
        found = (name.fullmatch(path.name) for path in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match is not None)

    def close(self) -> None:
        """Others may have the folder from now on; idempotent. Close its regions before."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _lock(path: Path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    fd = mapping.open_ours(str(path), os.O_RDWR | os.O_CREAT)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "(starting)"
                    raise RegionError(
                        f"process {owner} keeps its blocks in {path.parent}: give each node a 'disk_dir' of its own"
                    ) from error
                time.sleep(_LOCK_PAUSE_SECONDS)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


# --- tables ---------------------------------------------------------------------------------------------------------------


def open_files(folder: DiskFolder, slot_bytes: int, slots: int) -> tuple[BlockFile, BlockFile, Mapping]:
    """Data, table, and the table's superblock in memory of its own, which has room for ``slots`` headers.

    Files that are there are kept, whatever number of slots they were made for: what lies beyond ``slots`` is given up. The
    birth in the superblock is new, above all generations that former owners gave.

    Raises:
        RegionError: the table is of another format, damaged, or not of this slot size. OSError: what the system says.
    """
    data_path, table_path = folder.paths(slot_bytes)
    if not Path(table_path).exists():
        _create_table(table_path, slot_bytes, slots)
    table_file = BlockFile(table_path, direct=False)
    data = None
    try:
        head = read_superblock(table_file, slot_bytes)
        # Direct transfers need slots of whole pages.
        data = BlockFile(data_path, direct=slot_bytes % PAGE_BYTES == 0, create=True)
        if data.size() == 0:
            head["available_slots"] = 0  # deleted while nobody looked, or never made
        available = min(int(head["available_slots"][0]), slots)
        former = int(head["birth"][0])
        head["slots"], head["available_slots"], head["owner_pid"] = slots, available, os.getpid()
        head["birth"] = max(generation_now(), (former + GENERATIONS_MAX) & ~1)
        head["data_inode"] = data.inode()
        table = Mapping.anonymous(table_bytes(slots))
        table.memory[: head.nbytes] = head.tobytes()
        write_superblock(table_file, table)
        if data.size() > available * slot_bytes:
            data.truncate(available * slot_bytes)
        if table_file.size() > table_bytes(available):
            table_file.truncate(table_bytes(available))
        return data, table_file, table
    except BaseException:
        table_file.close()
        if data is not None:
            data.close()
        raise


def read_superblock(table_file: BlockFile, slot_bytes: int) -> npt.NDArray[np.void]:
    """The superblock, found to be whole and ours. Raises RegionError, saying what to do, and OSError."""
    found = bytearray(DISK_SUPERBLOCK.itemsize)
    remedy = f"remove {table_file.path} and the .data file beside it to start afresh"
    if table_file.size() >= SUPERBLOCK_BYTES:
        table_file.read([memoryview(found)], 0)
    head = np.frombuffer(found, DISK_SUPERBLOCK)
    if not any(found):
        raise RegionError(f"{table_file.path} is empty or cut short: {remedy}")
    if head["magic"][0] != MAGIC:
        raise RegionError(f"{table_file.path} is no table of kvshare: {remedy}")
    if head["version"][0] != FORMAT_VERSION:
        raise RegionError(
            f"{table_file.path} has format version {head['version'][0]}, ours is {FORMAT_VERSION}: run the kvshare that wrote "
            f"it, or {remedy}"
        )
    if head["checksum"][0] != _digest(head) or head["header_bytes"][0] != HEADER.itemsize:
        raise RegionError(f"{table_file.path} is damaged: {remedy}")
    if head["slot_bytes"][0] != slot_bytes:
        raise RegionError(f"{table_file.path} was renamed, its slots have {head['slot_bytes'][0]} bytes: {remedy}")
    return head


def write_superblock(table_file: BlockFile, table: Mapping) -> None:
    """Bring the superblock in memory to the file. Raises OSError."""
    head = np.frombuffer(table.memory, DISK_SUPERBLOCK, count=1)
    head["checksum"] = _digest(head)
    table_file.write([memoryview(head.tobytes())], 0)


def read_headers(table_file: BlockFile, table: Mapping, slots: int, say_progress: Callable[[str], None]) -> None:
    """The first ``slots`` headers, from the file to memory. A file that is shorter leaves the rest unused. Raises OSError."""
    end = min(table_file.size(), table_bytes(slots))
    memory = memoryview(table.memory)
    said = time.monotonic()
    for at in range(SUPERBLOCK_BYTES, end, SCAN_BYTES):
        table_file.read([memory[at : min(at + SCAN_BYTES, end)]], at)
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            say_progress(f"{(at - SUPERBLOCK_BYTES) // HEADER.itemsize:,} of {slots:,} slots of {table_file.path} read")


def _create_table(path: str, slot_bytes: int, slots: int) -> None:
    """A table without blocks, complete before it has its name. Raises OSError."""
    new = path + _NEW
    Path(new).unlink(missing_ok=True)
    head = np.zeros(1, DISK_SUPERBLOCK)
    plain = superblock(slot_bytes, slots, CHUNK_BYTES, 0, 0)
    for field in SUPERBLOCK.names or ():
        head[field] = plain[field]
    head["place_id"] = np.frombuffer(secrets.token_bytes(PLACE_BYTES), f"V{PLACE_BYTES}")
    head["checksum"] = _digest(head)
    made = BlockFile(new, direct=False, create=True)
    try:
        made.write([memoryview(head.tobytes().ljust(SUPERBLOCK_BYTES, b"\0"))], 0)
        made.sync()
        os.rename(new, path)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise
    finally:
        made.close()


def _digest(head: npt.NDArray[np.void]) -> int:
    return xxhash.xxh3_64_intdigest(head.tobytes()[:_CHECKED_BYTES])


def is_no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
