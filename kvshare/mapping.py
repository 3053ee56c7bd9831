"""Mapped memory: files of ours, and anonymous memory, with what the system must be told about them.

A `Mapping` is unmapped with its last reference, never before: an address taken from it stays good as long as somebody
holds it (or an array over it).

Threads: `populate` may run in any thread, the GIL is released.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator

from kvshare import native

_MADV_REMOVE, _MADV_HUGEPAGE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 9, 14, 22, 23
_POPULATE_STEP_BYTES = 32 << 20  # between two looks at the stop flag: some 20 ms

# Python's own mmap.madvise keeps the GIL for the seconds that populating may take.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """``length`` bytes at ``address``; ``memory`` is the buffer over them."""

    def __init__(self, memory: mmap.mmap, writable: bool) -> None:
        self.memory = memory
        self.writable = writable
        self.length = len(memory)
        self.address = native.address_of(memory)

    @classmethod
    def of_file(cls, fd: int, writable: bool) -> Mapping:
        """The whole file, shared. Raises OSError or ValueError (an empty file)."""
        return cls(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)), writable)

    @classmethod
    def anonymous(cls, length: int) -> Mapping:
        return cls(mmap.mmap(-1, length), True)

    def advise_huge_pages(self) -> None:
        """Best effort: the system may have them forbidden, and does then without."""
        self._advise(0, self.length, _MADV_HUGEPAGE)

    def populate(self, start: int, length: int, stop: threading.Event) -> None:
        """Map the pages of this range ahead of their use. Best effort: kernels before 5.14 cannot, first use is then slower.

        A range without memory behind it gets it, so ask only for what is allocated or shall be.
        """
        advice = _MADV_POPULATE_WRITE if self.writable else _MADV_POPULATE_READ
        end = min(start + length, self.length)
        for at in range(start, end, _POPULATE_STEP_BYTES):
            if stop.is_set() or not self._advise(at, min(_POPULATE_STEP_BYTES, end - at), advice):
                return

    def give_back(self, start: int, length: int) -> None:
        """Free the memory of all pages that lie wholly in this range. What they held is lost."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._advise(first, last - first, _MADV_REMOVE)

    def _advise(self, start: int, length: int, advice: int) -> bool:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        result: int = _libc.madvise(self.address + first, start + length - first, advice)
        return result == 0


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """The descriptor of a file that belongs to us.

    Raises:
        OSError: as `os.open`; PermissionError for another user's file, whatever its mode: names in a shared folder
            can be taken by anybody.
    """
    fd = open_ours(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def open_ours(path: str, flags: int) -> int:
    """As `opened`, for a descriptor that the caller closes. Created files are ours alone (0600)."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    owner = os.fstat(fd).st_uid
    if owner != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, f"the file belongs to user {owner}", path)
    return fd


def allocate(fd: int, start: int, length: int) -> None:
    """Give a range of a file memory or disk of its own, so that writing to its mapping cannot fail.

    Raises:
        OSError: ENOSPC when there is no room; then nothing was taken.
    """
    if length > 0:
        os.posix_fallocate(fd, start, length)


def has_room(fd: int, length: int) -> bool:
    """Has the file's system room for ``length`` more bytes? To be asked before `allocate`, which fills what is left before it
    fails, so that others' writes fail meanwhile."""
    system = os.fstatvfs(fd)
    return system.f_blocks == 0 or length <= system.f_bavail * system.f_frsize  # no blocks: a tmpfs without limit
