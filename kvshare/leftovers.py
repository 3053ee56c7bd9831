"""What nodes that were killed leave on a host, and its removal: sockets, locks, arena files, cards of Ray nodes.

A node that ends in good order leaves nothing. After ``kill -9`` its files stay on purpose, for the next node of its name to
recover; they are left-overs only when no such node will come. Whether one lives is asked of the kernel: every node holds a
lock on its ``.lock`` file, which is freed when it dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvshare import cards, device, slots
from kvshare.config import Settings


def remove_leftovers(settings: Settings, keep: Collection[str] = ()) -> list[str]:
    """Remove the files of nodes of ``settings.cluster`` on this host that do not live and are not named in ``keep``.

    Returns the paths removed. Raises OSError when a folder of ours cannot be written to.
    """
    removed = []
    for name in sorted(_names(settings) - set(keep)):
        own = replace(settings, node_name=name)
        socket, lock = Path(own.socket_path), Path(own.socket_path).with_suffix(".lock")
        with _taken(lock) as free:
            if not free:
                continue
            removed += [str(path) for path in slots.remove_stale(own.shm_dir, stem=own.arena_stem)]
            removed += [str(path) for path in device.remove_stale(own.arena_stem)]
            for path in (socket, lock):
                if path.exists():
                    path.unlink()
                    removed.append(str(path))
    removed += cards.remove_void(Settings().runtime_dir)
    _remove_if_empty(Path(settings.socket_path).parent)
    return removed


def _names(settings: Settings) -> set[str]:
    """Names of nodes of this cluster that have files here."""
    folder = Path(settings.socket_path).parent
    names = {path.stem for suffix in ("sock", "lock") for path in folder.glob(f"*.{suffix}")}
    stem = Path(replace(settings, node_name="").arena_stem).name
    arena = re.compile(rf"{re.escape(stem)}([A-Za-z0-9_.-]{{1,64}}?)-(?:\d+\.(?:data|table).*|device-\d+\.generations)")
    matches = [arena.fullmatch(path.name) for path in Path(settings.shm_dir).glob(f"{stem}*")]
    return names | {match[1] for match in matches if match is not None}


@contextmanager
def _taken(lock: Path) -> Iterator[bool]:
    """Hold a node's lock, so that none of its name starts meanwhile. False: one lives."""
    if not lock.parent.is_dir():
        yield True
        return
    existed = lock.exists()
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            if not existed:
                lock.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    try:
        os.rmdir(folder)
    except OSError:
        pass  # others live there, or it is gone
