"""Time to first token after scale to zero: blocks come from the node's disk, or from the object store on another machine.

1. Engine A on a node with a disk region and an object store serves prompts and ends. Its node is told to end (SIGTERM): it
   hands its blocks over to the disk and to the store, and its arena is gone.
2. The same node starts again, on the same folder. Engine B, fresh: the first time it sees each prompt its blocks come from
   the disk; the second time they are in its own prefix cache; prompts that nobody has seen are recomputed.
3. A node of another name starts with empty folders, as on another machine. Engine C, fresh: the same from the object store,
   which is a folder here.

What the kernel keeps of the files in memory is dropped before 2 and 3, so that a disk is read, not memory. Otherwise as
`bench_ttft`, whose parts this uses: outputs must be those of engine A, or the run fails.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench_ttft import measure_joiner, serve_first
from common import BLOCKS, TOKENS, Child, Failed, Fleet, arguments, progress, report

from kvshare.config import Settings


def main() -> None:
    options = arguments(__doc__ or "")
    prompts = 3 if options.quick else 9
    with Fleet() as fleet:
        store = fleet.folder / "store"
        store.mkdir()
        url = store.as_uri()
        node = with_folder(fleet, "zero", object_url=url, warm_bytes=0)
        running = fleet.start_node(node)
        expected, donor = serve_first(fleet, node, prompts)
        leave(fleet, node, running)
        kept = forget(fleet.folder)
        fleet.start_node(node)
        disk = measure_joiner(fleet, "disk", node, expected)
        forget(fleet.folder)
        other = with_folder(fleet, "elsewhere", object_url=url, warm_bytes=0)
        fleet.start_node(other)
        remote = measure_joiner(fleet, "object", other, expected)
        detail = {"tokens": TOKENS, "blocks": BLOCKS, "bytes_in_files": kept, "donor": donor, "disk": disk, "object": remote}
    figures = {}
    for way, measured in (("disk", disk), ("object", remote)):
        first = measured["first_s"]["median"]
        figures[f"ttft_{way}_over_prefix_hit"] = (first / measured["prefix_hit_s"]["median"], "ratio")
        figures[f"ttft_{way}_over_recompute"] = (first / measured["recompute_s"]["median"], "ratio")
    report(figures, detail, options.json)


def with_folder(fleet: Fleet, name: str, **overrides: Any) -> Settings:
    """Settings of a node with a disk folder of its own."""
    folder = fleet.folder / f"disk-{name}"
    folder.mkdir()
    return fleet.settings(name, disk_dir=str(folder), **overrides)


def leave(fleet: Fleet, node: Settings, running: Child) -> None:
    """The node ends in good order. Raises Failed if its arena is still there: the disk would not be read."""
    fleet.stop(running)
    left = list(Path(node.shm_dir).glob(f"{Path(node.arena_stem).name}-*"))
    if left:
        raise Failed(f"the node that ended left {', '.join(map(str, left))}")
    progress("the node has ended")


def forget(folder: Path) -> int:
    """Have the kernel drop what it keeps in memory of all files in ``folder``. Returns their bytes on disk."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                total += os.fstat(file.fileno()).st_blocks * 512
    return total


if __name__ == "__main__":
    main()
