"""What the object store holds, as far as we know: an index in memory, kept up by reading manifests.

    bucket   {prefix}/{cluster}/segments/{id}     blocks
             {prefix}/{cluster}/manifests/{id}    what lies in the segment of that id; `refresh` lists these and nothing else

A refresh asks for the names that sort after the newest known ones, less `OVERLAP_SECONDS` for the clocks of other writers; once
in `FULL_SECONDS` for all names, which also shows what others have removed. A manifest that cannot be read is said once and left
as it is.

The store lets only one object be created under a name. An empty one in a manifest's place condemns the segment: its writer
can't commit it any more, so who looks for garbage may delete it.

Threads: any. Changes are made one after the other; who asks never waits for them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial

from kvshare.bucket import Bucket, ObjectGone, Requests, TooLong
from kvshare.segments import (
    ID_NAME,
    MANIFEST_BYTES_MAX,
    BlockIndex,
    DamagedManifest,
    Found,
    Segment,
    UnknownVersion,
    decode,
    encode,
    first_name,
)

log = logging.getLogger("kvshare")

OVERLAP_SECONDS = 3600
FULL_SECONDS = 600.0
READS_MAX = 16  # manifests asked for at a time
_YEAR_2020 = 1_577_836_800


def segment_path(name: str) -> str:
    return f"segments/{name}"


def manifest_path(name: str) -> str:
    return f"manifests/{name}"


def now_seconds() -> int:
    """Seconds since 2020, as headers and records have them."""
    return int(time.time()) - _YEAR_2020


class Catalog:
    """See the module's docstring."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.index = BlockIndex()
        self._changing = threading.Lock()
        self._refreshing = threading.Lock()
        self._listed_fully = -math.inf
        self._newest = 0  # milliseconds since 1970, of the newest segment
        self.vanished = 0  # manifests that the last refresh has seen listed and found gone
        self.unreadable: set[str] = set()  # names of manifests of unknown versions
        self.damaged: set[str] = set()  # of objects that are no manifests, or damaged ones

    def find(self, wanted: Sequence[bytes]) -> list[Found | None]:
        return self.index.find(wanted, now_seconds())

    def add(self, segment: Segment) -> None:
        with self._changing:
            self.index.add(segment)
            self._newest = max(self._newest, int.from_bytes(segment.id[:8], "big"))

    def remove(self, segment_id: bytes) -> bool:
        with self._changing:
            return self.index.remove(segment_id)

    def forget(self, unwanted: Callable[[bytes], bool]) -> int:
        """Find these no more, and look at all names next time."""
        forgotten = 0
        with self._changing:
            self._listed_fully = -math.inf
            for segment in self.index.segments():
                for number, key in enumerate(segment.keys()):
                    if unwanted(key):
                        self.index.forget(Found(segment, number))
                        forgotten += 1
        return forgotten

    def refresh(self, fully: bool = False) -> int:
        """Learn of what others wrote and removed; returns the blocks that are new to us. Raises ObjectStoreError."""
        with self._refreshing:
            fully = fully or time.monotonic() - self._listed_fully >= FULL_SECONDS
            known = {segment.name for segment in self.index.segments()}
            after = "" if fully else first_name(self._newest - OVERLAP_SECONDS * 1000)
            listed = self._bucket.call(lambda requests: requests.list("manifests", after))
            names = {item.name for item in listed if ID_NAME.fullmatch(item.name) and item.size}
            if fully:
                self._listed_fully = time.monotonic()
                for name in known - names:
                    self.remove(bytes.fromhex(name))
                self.unreadable &= names
                self.damaged &= names
            # What looked damaged is looked at again now and then: it may have been the way here that garbled it.
            return self._read(sorted(names - known - self.unreadable - (set() if fully else self.damaged)))

    def _read(self, names: Iterable[str]) -> int:
        learned = self.vanished = 0
        waiting: deque[tuple[str, Future[memoryview]]] = deque()
        left = deque(names)
        try:
            while left or waiting:
                while left and len(waiting) < READS_MAX:
                    name = left.popleft()
                    waiting.append((name, self._bucket.start(partial(_get_manifest, name))))
                learned += self._learn(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()
        return learned

    def _learn(self, name: str, future: Future[memoryview]) -> int:
        try:
            segment = decode(name, bytes(self._bucket.result(future)))
        except ObjectGone:
            self.vanished += 1
            return 0
        except UnknownVersion as error:
            self.unreadable.add(name)
            log.warning("kvshare: %s in the object store: its blocks are misses here; upgrade kvshare", error)
            return 0
        except DamagedManifest as error:
            if name not in self.damaged:
                log.warning("kvshare: %s in the object store: its blocks are misses", error)
            self.damaged.add(name)
            return 0
        self.damaged.discard(name)
        if segment.id in self.index:
            return 0
        self.add(segment)
        return len(segment.records)


def commit(segment: Segment, requests: Requests) -> bool:
    """Put the manifest of a segment whose object is there. False when it was condemned; then nothing of it is left."""
    manifest, data = manifest_path(segment.name), segment_path(segment.name)
    if requests.create(manifest, encode(segment)):
        # The segment goes before what condemned it: if that was there and is gone again, so is the segment.
        if requests.exists(data):
            return True
        requests.delete([manifest])
    else:
        requests.delete([data])
    return False


def condemn(name: str, requests: Requests) -> bool:
    """Delete a segment, unless its writer commits it first: False then."""
    if not requests.create(manifest_path(name), b""):
        return False
    requests.delete([segment_path(name), manifest_path(name)])
    return True


def _get_manifest(name: str, requests: Requests) -> memoryview:
    try:
        return requests.get(manifest_path(name), MANIFEST_BYTES_MAX)
    except TooLong as error:
        raise DamagedManifest(str(error)) from error
