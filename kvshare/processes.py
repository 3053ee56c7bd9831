"""Which process: a pid that is known to be the one that was meant."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """This start of this host's kernel. Where the system hides it, a text equal to nobody else's."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:  # no such file in some sandboxes
        return f"unknown-{os.getpid()}"


def pid_space() -> str:
    """Equal in two processes when a pid of the one means the same process to the other, and it may read that one's memory:
    same boot of the same kernel, same pid namespace, same user."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{boot_id()}-{namespace}-{os.geteuid()}"


def started(pid: int) -> int:
    """When the process of this pid started, in clock ticks since boot: with the pid, a name that is never used again.

    Raises:
        OSError: there is no such process.
    """
    line = Path(f"/proc/{pid}/stat").read_bytes()
    return int(line[line.rindex(b")") + 2 :].split()[19])  # behind the command's name, which may hold anything


def allow_reading() -> None:
    """Let other processes of this user read this one's memory where the kernel would allow only a parent to (Yama, as many
    distributions have it). Without Yama there is nothing to allow."""
    pr_set_ptracer, anybody = 0x59616D61, ctypes.c_ulong(-1)
    ctypes.CDLL(None).prctl(pr_set_ptracer, anybody, 0, 0, 0)
