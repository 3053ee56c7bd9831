"""What must go from the object store: purged and expired blocks, and what writers that died have left.

Objects are immutable, so a segment is written anew without the blocks that go, and then the old one is deleted:

    new segment ─> new manifest ─> is the old manifest still there? ─ yes ─> delete it, then the old segment
                                             └─ no ─> another node was quicker: delete the new ones again

Two nodes may do this to one segment at once. Nothing is lost: who withdraws has seen the old manifest gone, and whoever deleted
it had its own copy of the blocks that stay committed before. Nothing comes back: a copy that another node made of what we purge
was committed before the old manifest went, so the listing after it shows the copy, and a purge ends only when a listing shows
nothing that should go. The worst case is a block kept twice.

Segments without a manifest hold nothing for anybody, but their bytes can be read: they are condemned (`kvshare.catalog`) when
older than `ORPHAN_SECONDS`, and by a purge at any age. A writer that lives may lose a segment so, but knows it.

Threads: one upkeep at a time, in the caller's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare.bucket import Bucket, Listed, ObjectGone, Requests
from kvshare.catalog import Catalog, commit, condemn, manifest_path, segment_path
from kvshare.errors import ObjectStoreError
from kvshare.segments import ID_NAME, SEGMENT_BYTES_MAX, Segment, new_id

log = logging.getLogger("kvshare")

ORPHAN_SECONDS = 3600.0
ROUNDS_MAX = 8  # of a purge, when other nodes rewrite at the same time
REWRITES_MAX = 4  # segments under way
REQUESTS = 8  # of one rewrite

Kept = npt.NDArray[np.bool_]


class _Outcome(NamedTuple):
    """Of one rewrite. done: the old segment is gone by us; made: the new one, None when nothing stays."""

    done: bool
    made: Segment | None


class Upkeep:
    """See the module's docstring."""

    def __init__(self, bucket: Bucket, catalog: Catalog) -> None:
        self._bucket = bucket
        self._catalog = catalog
        self._one = threading.Lock()

    def purge(self, unwanted: Callable[[bytes], bool]) -> tuple[int, int]:
        """See `ObjectTier.purge`."""
        blocks = size = 0
        with self._one:
            for _ in range(ROUNDS_MAX):
                self._catalog.refresh(fully=True)
                work = []
                for segment in self._catalog.index.segments():
                    going = np.fromiter(map(unwanted, segment.keys()), bool, len(segment.records))
                    if going.any():
                        work.append((segment, ~going))
                # Where a manifest went since the listing, a copy of its blocks may have come that the listing has not.
                if not work and not self._catalog.vanished:
                    break
                gone = self._rewrite(work)
                blocks, size = blocks + gone[0], size + gone[1]
            else:
                raise ObjectStoreError("the object store is not purged: other nodes keep rewriting it; do it again")
            self._sweep(0.0)
            if newer := len(self._catalog.unreadable):
                raise ObjectStoreError(
                    f"{blocks} blocks are purged from the object store, but {newer} segments of a newer version may hold more: "
                    "purge from a node of that version"
                )
        return blocks, size

    def expire(self, now: int) -> int:
        """See `ObjectTier.expire`."""
        with self._one:
            self._catalog.refresh()
            work = []
            for segment in self._catalog.index.segments():
                expires, lengths = segment.records["expires"], segment.records["length"].astype(np.uint64)
                going = (expires != 0) & (expires <= now)
                if 2 * int(lengths[going].sum()) >= segment.segment_bytes or going.all():
                    work.append((segment, ~going))
            blocks, _ = self._rewrite(work)
            self._sweep(ORPHAN_SECONDS)
        return blocks

    def _rewrite(self, work: Sequence[tuple[Segment, Kept]]) -> tuple[int, int]:
        """Write these segments anew, each with the blocks that it keeps; returns blocks and bytes that are gone."""
        blocks = size = 0
        left = deque(work)
        waiting: deque[tuple[Segment, Kept, Future[_Outcome]]] = deque()
        try:
            while left or waiting:
                while left and len(waiting) < REWRITES_MAX:
                    segment, kept = left.popleft()
                    waiting.append((segment, kept, self._bucket.start(partial(_rewritten, segment, kept), writing=True)))
                segment, kept, future = waiting.popleft()
                try:
                    done, made = self._bucket.result(future, writing=True, requests=REQUESTS)
                except ObjectGone:
                    # Another node's work, or the segment's bytes were deleted by somebody: its manifest says nothing any more.
                    self._bucket.call(partial(_withdraw_dangling, segment), writing=True, requests=2)
                    self._catalog.remove(segment.id)
                    continue
                self._catalog.remove(segment.id)
                if made is not None:
                    self._catalog.add(made)
                if not done:
                    continue
                blocks += int((~kept).sum())
                size += int(segment.records["length"][~kept].sum(dtype=np.uint64))
        finally:
            for _, _, future in waiting:
                future.cancel()
        return blocks, size

    def _sweep(self, age_seconds: float) -> None:
        """Remove what nobody can find: segments without a manifest, manifests without a segment, parts of objects. Of age 0:
        also those whose manifest is damaged."""
        segments = {item.name: item for item in self._list("segments")}
        # Listed second: a manifest that is committed meanwhile counts.
        manifests = {item.name: item for item in self._list("manifests")}
        before, long_ago = time.time() - age_seconds, time.time() - ORPHAN_SECONDS
        condemned = [name for name, item in manifests.items() if not item.size]
        orphans = [name for name, item in segments.items() if name not in manifests and item.modified <= before]
        dangling = [
            name for name, item in manifests.items() if name not in segments and item.size and item.modified <= long_ago
        ]
        dangling = [name for name in dangling if name not in self._catalog.unreadable]
        damaged = sorted(self._catalog.damaged & manifests.keys()) if not age_seconds else []
        gone = [*condemned, *damaged]
        paths = [*map(manifest_path, dangling), *map(segment_path, gone), *map(manifest_path, gone)]
        self._bucket.call(lambda requests: requests.delete(paths), writing=True, requests=1 + len(paths))
        done = [self._bucket.call(partial(condemn, name), writing=True, requests=3) for name in orphans]
        for name in dangling:
            self._catalog.remove(bytes.fromhex(name))
        self._catalog.damaged -= set(damaged)
        parts = self._bucket.call(lambda requests: sum(requests.remove_partial(at, before) for at in ("segments", "manifests")))
        if removed := sum(done) + len(paths) + parts:
            log.info("kvshare: %d objects that nobody could find are removed from the object store", removed)

    def _list(self, folder: str) -> list[Listed]:
        """What is ours there."""
        return [item for item in self._bucket.call(lambda requests: requests.list(folder)) if ID_NAME.fullmatch(item.name)]


def _rewritten(segment: Segment, kept: Kept, requests: Requests) -> _Outcome:
    """One segment without some blocks. Raises FileNotFoundError when the segment is not there."""
    old_segment, old_manifest = segment_path(segment.name), manifest_path(segment.name)
    made = None
    if kept.any():
        made, body = _without(segment, kept, requests.get(old_segment, SEGMENT_BYTES_MAX))
        requests.put(segment_path(made.name), body)
        if not commit(made, requests):
            return _Outcome(False, None)
        if not requests.exists(old_manifest):
            requests.delete([manifest_path(made.name), segment_path(made.name)])
            return _Outcome(False, None)
    requests.delete([old_manifest, old_segment])
    return _Outcome(True, made)


def _without(segment: Segment, kept: Kept, data: memoryview) -> tuple[Segment, memoryview]:
    """A new segment of the blocks that are kept, and its bytes. Blocks that the object is too short for are lost already."""
    records = segment.records[kept]
    ends = records["offset"].astype(np.uint64) + records["length"]
    records = records[ends <= len(data)]
    body = bytearray(int(records["length"].sum(dtype=np.uint64)))
    at = 0
    for record in records:
        start, length = int(record["offset"]), int(record["length"])
        body[at : at + length] = data[start : start + length]
        record["offset"] = at
        at += length
    segment_id = new_id(time.time_ns() // 10**6)
    return Segment(segment_id, len(body), records, segment.origins), memoryview(body)


def _withdraw_dangling(segment: Segment, requests: Requests) -> None:
    if not requests.exists(segment_path(segment.name)):
        requests.delete([manifest_path(segment.name)])
