"""The object tier: blocks in an object store that a cluster shares, for whoever starts with nothing.

    put ─> packed into segments ─> segment object, then its manifest (the commit point) ─> catalog
    held, from the catalog, in memory                                 refresh ─> catalog
    get ─> ranges of segments, neighbours in one request, in parallel ─> verified ─> targets

What arrives is compared with the checksum in the manifest, seeded with the key, and unsealed where it was sealed; all else is a
miss. A store that is away, slow or denies is left alone for a while (`kvshare.bucket`): nothing here waits longer than
``seconds`` for one request, and while it is away nothing waits at all.

Who writes twice what another node has written meanwhile costs room, no more. What must go (`purge`, `expire`) is done by
`kvshare.upkeep`.

Threads: any, from pool threads, since all but `held` may wait for the store. Nothing is read from ``put``'s blocks, nor written
to ``get``'s targets, once they have returned.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare import keys, native
from kvshare.bucket import Bucket, ObjectGone, Requests
from kvshare.catalog import Catalog, commit, manifest_path, now_seconds, segment_path
from kvshare.errors import ObjectStoreError
from kvshare.native import BlockStatus
from kvshare.segments import RECORD, SEGMENT_BYTES_MAX, Found, Segment, new_id
from kvshare.upkeep import Upkeep
from kvshare.vault import Sealed, Vault, associated

log = logging.getLogger("kvshare")

GAP_BYTES = 64 << 10  # neighbours not farther apart are read in one request
REQUEST_BYTES_MAX = 8 << 20
READS_MAX = 16  # requests for blocks under way for one `get`
STORE_REQUESTS = 5  # to put one segment, and its removal when that failed
PUTS_MAX = 4  # segments under way for one `put`

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]


class PutBlock(NamedTuple):
    """A block to be put. checksum: of its bytes, seeded with the key; expires: seconds since 2020, 0: no end."""

    key: bytes
    checksum: int
    expires: int
    data: memoryview


class _Packed(NamedTuple):
    segment: Segment
    data: memoryview
    blocks: int


class _Range(NamedTuple):
    """Bytes of one segment to be read at once; ``wanted``: numbers of the question's blocks that lie within."""

    segment: Segment
    start: int
    end: int
    wanted: list[int]


class ObjectTier:
    """See the module's docstring. Made by `open`."""

    def __init__(self, bucket: Bucket, vault: Vault, segment_bytes: int) -> None:
        self._bucket = bucket
        self._vault = vault
        self._segment_bytes = segment_bytes
        self._catalog = Catalog(bucket)
        self._upkeep = Upkeep(bucket, self._catalog)
        self._corrupt_said = False

    @staticmethod
    def open(url: str, cluster: str, vault: Vault, segment_bytes: int, seconds: float) -> ObjectTier:
        """Nothing is asked of the store yet: `refresh` does.

        Raises:
            ObjectStoreError: the library is missing, or URL or folder can't be used.
        """
        if segment_bytes > SEGMENT_BYTES_MAX:
            raise ObjectStoreError(f"'object_segment_bytes' is {segment_bytes}: use at most {SEGMENT_BYTES_MAX}")
        return ObjectTier(Bucket.open(url, cluster, seconds), vault, segment_bytes)

    # --- questions, from memory ---------------------------------------------------------------------------------------

    @property
    def away(self) -> bool:
        """Is the store left alone for a while?"""
        return self._bucket.away()

    @property
    def held_blocks(self) -> int:
        """Blocks known to be there."""
        return self._catalog.index.blocks

    @property
    def held_bytes(self) -> int:
        return self._catalog.index.bytes

    def held(self, wanted: Sequence[bytes]) -> list[int | None]:
        """Length of each block; None where unknown, and for all while the store is away. Never waits."""
        if self.away:
            return [None] * len(wanted)
        return [None if found is None else found.length for found in self._catalog.find(wanted)]

    def ends(self, key: bytes) -> int:
        """Second since 2020 at which the block of this key ends; 0: never, or unknown."""
        found = self._catalog.find([key])[0]
        return 0 if found is None else int(found.segment.records["expires"][found.number])

    def check(self) -> list[str]:
        """Problems found, one sentence each."""
        return self._catalog.index.check()

    # --- the store ----------------------------------------------------------------------------------------------------

    def refresh(self) -> int:
        """Learn what others have written and removed; returns the blocks that are new to us. Lists manifests: never on the path
        of a lookup. Raises ObjectStoreError."""
        return self._catalog.refresh()

    def put(self, blocks: Sequence[PutBlock]) -> int:
        """Keep these; returns how many are safe there, in no particular order. Whoever is not can't be seen by anybody.

        A block whose bytes are not those of its checksum (its slot was given away meanwhile) is left out.
        """
        held = self._catalog.find([block.key for block in blocks])
        fresh: dict[bytes, PutBlock] = {}
        for block, found in zip(blocks, held, strict=True):
            if (found is None or found.length != len(block.data)) and 0 < len(block.data) <= SEGMENT_BYTES_MAX:
                fresh.setdefault(block.key, block)
        safe = sum(found is not None and found.length == len(block.data) for block, found in zip(blocks, held, strict=True))
        waiting: deque[tuple[_Packed, Future[bool]]] = deque()
        for batch in self._batches(list(fresh.values())):
            if self._bucket.away(writing=True):
                break
            packed = self._pack(batch)
            if packed is not None:
                waiting.append((packed, self._bucket.start(partial(_store, packed), writing=True)))
            if len(waiting) >= PUTS_MAX:
                safe += self._stored(*waiting.popleft())
        return safe + sum(self._stored(*under_way) for under_way in waiting)

    def get(self, wanted: Sequence[bytes], addresses: U64, length: int) -> U8:
        """Read blocks of ``length`` bytes to ``addresses`` (uint64 [n]); returns `BlockStatus` for each, uint8 [n].

        STALE: not there (any more); CORRUPT: not what was kept; UNREACHABLE: the store is away, slow or denies.
        """
        statuses = np.full(len(wanted), BlockStatus.STALE, np.uint8)
        found = self._catalog.find(wanted)
        targets = np.ascontiguousarray(addresses, np.uint64).reshape(len(wanted))
        usable = {i: block for i, block in enumerate(found) if block is not None and block.length == length}
        statuses[list(usable)] = BlockStatus.UNREACHABLE
        left = deque(_ranges(usable))
        waiting: deque[tuple[_Range, Future[memoryview]]] = deque()
        while (left or waiting) and not self.away:
            while left and len(waiting) < READS_MAX:
                part = left.popleft()
                waiting.append((part, self._bucket.start(_reading(part))))
            part, future = waiting.popleft()
            try:
                body = self._bucket.result(future)
            except ObjectGone:
                statuses[part.wanted] = BlockStatus.STALE
                self._catalog.remove(part.segment.id)
            except ObjectStoreError:
                pass  # said by the bucket
            else:
                self._land(part, body, usable, wanted, targets, statuses)
        for _, future in waiting:
            future.cancel()
        return statuses

    def purge(self, unwanted: Callable[[bytes], bool]) -> tuple[int, int]:
        """Remove every block whose key is ``unwanted``; returns blocks and bytes removed. When this returns, none of them is in
        any object of ours. Raises ObjectStoreError when that can't be said; then do it again."""
        return self._upkeep.purge(unwanted)

    def forget(self, unwanted: Callable[[bytes], bool]) -> int:
        """Another node purges these from the store: don't count on them any more. Returns blocks. Never waits for the store."""
        return self._catalog.forget(unwanted)

    def expire(self, now: int | None = None) -> int:
        """Upkeep, to be called now and then by somebody: give room back that expired blocks and dead writers' leavings take.
        now: seconds since 2020. Returns blocks removed. Raises ObjectStoreError."""
        return self._upkeep.expire(now_seconds() if now is None else now)

    def close(self) -> None:
        """Idempotent."""
        self._bucket.close()

    # --- packing ------------------------------------------------------------------------------------------------------

    def _batches(self, blocks: list[PutBlock]) -> Iterator[list[PutBlock]]:
        """Blocks of one segment each: as many as fit, one at least."""
        batch: list[PutBlock] = []
        size = 0
        for block in blocks:
            if batch and size + len(block.data) > self._segment_bytes:
                yield batch
                batch, size = [], 0
            batch.append(block)
            size += len(block.data)
        if batch:
            yield batch

    def _pack(self, batch: list[PutBlock]) -> _Packed | None:
        """A segment of these blocks, copied and verified; None when none is what it should be."""
        lengths = np.array([len(block.data) for block in batch], np.uint64)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint64)
        plain = np.empty(int(lengths.sum()), np.uint8)
        targets = offsets + np.uint64(native.address_of(plain))
        sources = np.array([native.address_of(block.data) for block in batch], np.uint64)
        seeds = np.array(keys.seeds_of(block.key for block in batch), np.uint64)
        column = (-1, 1)
        landed = native.copy_blocks(targets.reshape(column), sources.reshape(column), lengths.reshape(column), seeds)
        right = (landed == np.array([block.checksum for block in batch], np.uint64)).tolist()
        segment_id = new_id(time.time_ns() // 10**6)
        records = np.zeros(len(batch), RECORD)
        data = np.zeros(len(plain), np.uint8) if self._vault.enabled else plain
        good = []
        for i, block in enumerate(batch):
            start, end = int(offsets[i]), int(offsets[i]) + len(block.data)
            sealed = self._seal(segment_id, i, block, plain[start:end], data[start:end]) if right[i] else None
            if sealed is None:
                data[start:end] = 0  # whosever bytes these were
                continue
            good.append(i)
            record = records[i]
            record["checksum"], record["offset"], record["length"], record["expires"] = (
                block.checksum,
                start,
                len(block.data),
                block.expires,
            )
            record["key"], record["key_bytes"] = block.key.ljust(keys.KEY_BYTES_MAX, b"\0"), len(block.key)
            record["nonce"], record["tag"], record["key_id"], record["index"] = *sealed, i
        if not good:
            return None
        return _Packed(Segment(segment_id, len(data), records[good], [segment_id]), data.data, len(good))

    def _seal(self, segment_id: bytes, index: int, block: PutBlock, source: U8, target: U8) -> Sealed | None:
        if not self._vault.enabled:
            return Sealed(bytes(12), bytes(16), 0)
        aad = associated(segment_id, index, block.key, len(block.data))
        return self._vault.seal(keys.tenant_of(block.key), aad, source.data, target.data)

    def _stored(self, packed: _Packed, future: Future[bool]) -> int:
        try:
            if not self._bucket.result(future, writing=True, requests=STORE_REQUESTS):
                return 0
        except ObjectStoreError:
            return 0  # said by the bucket
        self._catalog.add(packed.segment)
        return packed.blocks

    # --- landing ------------------------------------------------------------------------------------------------------

    def _land(
        self, part: _Range, body: memoryview, found: dict[int, Found], wanted: Sequence[bytes], targets: U64, statuses: U8
    ) -> None:
        """Verify what came and bring it to its targets."""
        records, base = part.segment.records, native.address_of(body) if len(body) else 0
        plain = []
        for i in part.wanted:
            record = records[found[i].number]
            start, length = int(record["offset"]) - part.start, int(record["length"])
            if start + length > len(body):
                statuses[i] = BlockStatus.CORRUPT
            elif int(record["key_id"]) or self._vault.enabled:
                statuses[i] = self._unseal(found[i], wanted[i], body[start : start + length], int(targets[i]))
            else:
                plain.append((i, base + start, length, int(record["checksum"])))
        if plain:
            chosen = [i for i, _, _, _ in plain]
            sources, lengths = (np.array([row[j] for row in plain], np.uint64).reshape(-1, 1) for j in (1, 2))
            seeds = np.array(keys.seeds_of(wanted[i] for i in chosen), np.uint64)
            landed = native.copy_blocks(targets[chosen].reshape(-1, 1), sources, lengths, seeds)
            right = landed == np.array([row[3] for row in plain], np.uint64)
            statuses[chosen] = np.where(right, BlockStatus.OK, BlockStatus.CORRUPT)
        for i in part.wanted:
            if statuses[i] == BlockStatus.CORRUPT:
                self._quarantine(found[i])

    def _unseal(self, found: Found, key: bytes, source: memoryview, target: int) -> BlockStatus:
        segment = found.segment
        record = segment.records[found.number]
        sealed = Sealed(bytes(record["nonce"]), bytes(record["tag"]), int(record["key_id"]))
        aad = associated(segment.origins[int(record["origin"])], int(record["index"]), key, len(source))
        if not self._vault.unseal(keys.tenant_of(key), aad, sealed, source, native.view(target, len(source), writable=True)):
            return BlockStatus.CORRUPT
        lengths = np.array([[len(source)]], np.uint64)
        landed = native.checksums(np.array([[target]], np.uint64), lengths, np.array([keys.seed_of(key)], np.uint64))
        return BlockStatus.OK if int(landed[0]) == int(record["checksum"]) else BlockStatus.CORRUPT

    def _quarantine(self, found: Found) -> None:
        """Not to be asked for again."""
        self._catalog.index.forget(found)
        if not self._corrupt_said:
            self._corrupt_said = True
            log.warning(
                "kvshare: blocks of segment %s in the object store %s are not what was kept, or cannot be unsealed: they are "
                "misses; see whether something else writes there, and that setting 'keys_dir' is the same on every host",
                found.segment.name,
                self._bucket.name,
            )


def _store(packed: _Packed, requests: Requests) -> bool:
    """The segment, then its manifest. False when a purge has condemned the segment in between: it might be a dead writer's."""
    try:
        requests.put(segment_path(packed.segment.name), packed.data)
        return commit(packed.segment, requests)
    except Exception:
        # Which may fail as well: then `Upkeep` finds it.
        requests.delete([manifest_path(packed.segment.name), segment_path(packed.segment.name)])
        raise


def _ranges(found: dict[int, Found]) -> Iterator[_Range]:
    """How to read these blocks: in each segment by offset, neighbours together."""
    by_segment: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for i, (segment, number) in found.items():
        by_segment[segment.id].append((int(segment.records["offset"][number]), i))
    for blocks in by_segment.values():
        blocks.sort()
        segment, start, end, wanted = found[blocks[0][1]].segment, blocks[0][0], blocks[0][0], list[int]()
        for offset, i in blocks:
            block_end = offset + found[i].length
            if wanted and (offset - end > GAP_BYTES or block_end - start > REQUEST_BYTES_MAX):
                yield _Range(segment, start, end, wanted)
                start, wanted = offset, []
            wanted.append(i)
            end = max(end, block_end) if len(wanted) > 1 else block_end
        yield _Range(segment, start, end, wanted)


def _reading(part: _Range) -> Callable[[Requests], memoryview]:
    path, start, length = segment_path(part.segment.name), part.start, part.end - part.start
    return lambda requests: requests.get_range(path, start, length)
