"""Bytes between memory and the files of a disk region: plain system calls, large and direct, which let other threads run.

    memory, page by page ── preadv, pwritev (O_DIRECT) ──> data file      past the page cache
    table in memory ─────── pwrite ──────────────────────> table file     through the page cache

Nothing is mapped: a file that was cut short, a full disk and a broken device are errors of a call here and never a SIGBUS.
Direct transfers start and end at whole pages, in the file and in memory. What does not lie so goes through a `Scratch` buffer,
never through the page that it shares with other bytes: those may be another tenant's.

A file is closed when its last user has left it, so that no call meets a descriptor that means another file by then.

Threads: any, all at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

from kvshare import mapping

PAGE_BYTES = 4096
RUN_BYTES_MAX = 8 << 20  # of one call: large enough for any device, small enough to be let go of soon
BUFFERS_MAX = 1024  # of one call: Linux's own limit (IOV_MAX)
SCRATCH_KEPT = 16  # buffers that are kept for the next use

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class BlockFile:
    """A file of ours, read and written at offsets. direct: its transfers go past the page cache."""

    def __init__(self, path: str, *, direct: bool, create: bool = False) -> None:
        """Raises OSError."""
        self.path = path
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        self.direct = direct
        try:
            self._fd = mapping.open_ours(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            self.direct = False  # a file system without it, such as tmpfs before Linux 6.6
            self._fd = mapping.open_ours(path, flags)
        self._users = 1  # the one who closes, and those in `using`
        self._lock = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Within, the descriptor stays ours. Raises OSError (EBADF) after `close`."""
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the region is closed")
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers`` from ``offset`` on. Raises OSError, also where the file ends before (EIO)."""
        with self.using():
            self._all(os.preadv, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write ``buffers`` one behind the other from ``offset`` on. Raises OSError; then any part may be written."""
        with self.using():
            self._all(os.pwritev, buffers, offset)

    def _all(self, call: object, buffers: Sequence[memoryview], offset: int) -> None:
        left = list(buffers)
        while left:
            try:
                moved = call(self._fd, left[:BUFFERS_MAX], offset)  # type: ignore[operator]
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                # A file system that asks for other borders than pages, or takes the flag and not the call.
                fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                self.direct = False
                continue
            if moved == 0:
                raise OSError(errno.EIO, "the file ends too early")
            offset += moved
            while left and moved >= len(left[0]):
                moved -= len(left.pop(0))
            if moved:
                left[0] = left[0][moved:]

    def size(self) -> int:
        with self.using():
            return os.fstat(self._fd).st_size

    def inode(self) -> int:
        with self.using():
            return os.fstat(self._fd).st_ino

    @property
    def deleted(self) -> bool:
        """Has the file no name any more? What is open goes on, but nobody will find it again."""
        with self.using():
            return os.fstat(self._fd).st_nlink == 0

    def allocate(self, start: int, length: int) -> None:
        """Give a range room of its own. Raises OSError (ENOSPC), mostly before anything is taken."""
        with self.using():
            if not mapping.has_room(self._fd, length):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            mapping.allocate(self._fd, start, length)

    def truncate(self, length: int) -> None:
        with self.using():
            os.ftruncate(self._fd, length)

    def punch(self, start: int, length: int) -> None:
        """Give a range's room back to the file system; it reads as zeros. Where there are no holes it is overwritten.
        Raises OSError."""
        with self.using():
            flags = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
            if _libc.fallocate(self._fd, flags, start, length) == 0:
                return
            number = ctypes.get_errno()
            if number not in _NO_HOLES:
                raise OSError(number, os.strerror(number))
            with mmap.mmap(-1, min(length, RUN_BYTES_MAX)) as zeros, memoryview(zeros) as view:
                for at in range(start, start + length, RUN_BYTES_MAX):
                    self._all(os.pwritev, [view[: start + length - at]], at)

    def sync(self) -> None:
        """What was written is on the device when this returns. Raises OSError."""
        with self.using():
            os.fdatasync(self._fd)

    def close(self) -> None:
        """No more calls; idempotent. The descriptor goes with the last call under way."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            os.close(self._fd)


class Scratch:
    """Page-aligned buffers of ``length`` bytes, kept for the next one: clearing fresh memory takes as long as the disk does."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._free: list[mmap.mmap] = []

    @contextlib.contextmanager
    def taken(self) -> Iterator[memoryview]:
        """A buffer that is ours within; what it holds is undefined."""
        try:
            memory = self._free.pop()  # atomic
        except IndexError:
            memory = mmap.mmap(-1, self.length)
        try:
            yield memoryview(memory)
        finally:
            if len(self._free) < SCRATCH_KEPT:
                self._free.append(memory)


def runs(slots: Sequence[int], slot_bytes: int) -> Iterator[tuple[int, int]]:
    """Which parts ``start, end`` of ``slots`` (ascending) lie side by side and may be moved by one call: `RUN_BYTES_MAX` bytes
    at most, or one slot."""
    most = max(1, RUN_BYTES_MAX // slot_bytes)
    start = 0
    for at in range(1, len(slots) + 1):
        if at == len(slots) or slots[at] != slots[at - 1] + 1 or at - start == most:
            yield start, at
            start = at
