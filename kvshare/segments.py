"""Segments: many blocks packed into one object, the manifest that says what lies in it, and the index of all that is known.

    segment    block 0 │ block 1 │ ...            back to back, each as it is or sealed (`kvshare.vault`)
    manifest   magic (8) │ version (4) │ xxh3 of the body (8) │ body: MessagePack of `Manifest`
                                                                └─ records: `RECORD`, 128 bytes a block

Both are immutable and named by one id: milliseconds since 1970 (8 bytes, big endian) and 8 random bytes, in hex; so names sort
by time. The manifest is written last: a segment without one holds nothing.

A block that is copied into another segment keeps its bytes. A sealed one is bound to the segment and number under which it was
sealed, its *origin*, so its record says these: copying needs no key.

The index holds no Python object for a block: records as they came, 128 bytes, and 16 bytes (seed of the key, position) in
sorted runs. Ten million blocks are 1.5 GB. Each run is at least twice as long as the next one, so there are few, and a key is
looked for in each by bisection.

Threads: an index is changed by one thread at a time (`kvshare.catalog` sees to it) and asked by any meanwhile, without waiting;
all else is pure.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvshare import keys
from kvshare.errors import ObjectStoreError

MAGIC = b"KVSHAREM"
VERSION = 1
ID_BYTES = 16
ID_NAME = re.compile(r"[0-9a-f]{32}")
SEGMENT_BYTES_MAX = 1 << 30
MANIFEST_BYTES_MAX = 256 << 20  # a larger object is none of ours
RECORD = np.dtype(
    {
        # origin: number in the manifest's list of the segment under whose id, and `index` the number under which, the block was
        # sealed. nonce, tag, key_id: as in a region's header, zeros for a block that is not encrypted. expires: second since
        # 2020 from which on nobody may read it (0: no end).
        "names": ["checksum", "offset", "length", "expires", "key_bytes", "origin", "key", "nonce", "tag", "key_id", "index"],
        "formats": ["<u8", "<u4", "<u4", "<u4", "<u2", "<u2", f"V{keys.KEY_BYTES_MAX}", "V12", "V16", "<u8", "<u4"],
        "offsets": [0, 8, 12, 16, 20, 22, 24, 88, 100, 116, 124],
        "itemsize": 128,
    }
)
_FORGOTTEN = 1 << 15  # in `key_bytes`, in memory only: the block is not to be found
_FRAME_BYTES = len(MAGIC) + 4 + 8
_ORIGINS_MAX = 1 << 16

U64 = npt.NDArray[np.uint64]
Records = npt.NDArray[np.void]


class Manifest(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The body of a manifest. ``origins``: ids of the segments under which blocks were sealed; ``records``: of `RECORD`."""

    segment: bytes
    segment_bytes: int
    origins: list[bytes]
    records: bytes


class UnknownVersion(ObjectStoreError):
    """A manifest that a newer kvshare wrote: to be left as it is."""


class DamagedManifest(ObjectStoreError):
    """An object in a manifest's place that is no manifest, or a damaged one."""


@dataclass(frozen=True)
class Segment:
    """What one segment object holds. ``records`` [blocks] of `RECORD`; ``origins`` as in `Manifest`."""

    id: bytes
    segment_bytes: int
    records: Records
    origins: list[bytes]

    @property
    def name(self) -> str:
        return self.id.hex()

    def key(self, number: int) -> bytes:
        record = self.records[number]
        return bytes(record["key"])[: int(record["key_bytes"]) & ~_FORGOTTEN]

    def keys(self) -> list[bytes]:
        """Of all its blocks."""
        raw, width = self.records["key"].tobytes(), keys.KEY_BYTES_MAX
        lengths = (self.records["key_bytes"] & ~np.uint16(_FORGOTTEN)).tolist()
        return [raw[i * width : i * width + length] for i, length in enumerate(lengths)]


class Found(NamedTuple):
    """Where a block lies: block ``number`` of ``segment``."""

    segment: Segment
    number: int

    @property
    def length(self) -> int:
        return int(self.segment.records["length"][self.number])


def new_id(milliseconds: int) -> bytes:
    """The id of a segment made now. milliseconds: since 1970."""
    return milliseconds.to_bytes(8, "big") + secrets.token_bytes(ID_BYTES - 8)


def first_name(milliseconds: int) -> str:
    """Sorts before the names of all segments made from then on."""
    return max(0, milliseconds).to_bytes(8, "big").hex()


def encode(segment: Segment) -> bytes:
    """The manifest object of a segment."""
    records = segment.records.copy()
    records["key_bytes"] &= ~np.uint16(_FORGOTTEN)
    body = msgspec.msgpack.encode(Manifest(segment.id, segment.segment_bytes, segment.origins, records.tobytes()))
    return MAGIC + VERSION.to_bytes(4, "little") + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body


def decode(name: str, data: bytes) -> Segment:
    """What the manifest object called ``name`` says.

    Raises:
        UnknownVersion, DamagedManifest: one sentence each.
    """
    if len(data) < _FRAME_BYTES or data[: len(MAGIC)] != MAGIC:
        raise DamagedManifest(f"manifest {name} is not ours or cut short")
    version = int.from_bytes(data[8:12], "little")
    if version != VERSION:
        raise UnknownVersion(f"manifest {name} has version {version}, ours is {VERSION}")
    body = memoryview(data)[_FRAME_BYTES:]
    if xxhash.xxh3_64_intdigest(body) != int.from_bytes(data[12:20], "little"):
        raise DamagedManifest(f"manifest {name} is damaged or cut short")
    try:
        manifest = msgspec.msgpack.decode(body, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedManifest(f"manifest {name}: {error}") from error
    whole = manifest.segment.hex() == name and 1 <= len(manifest.origins) <= _ORIGINS_MAX
    if not whole or len(manifest.records) % RECORD.itemsize or any(len(origin) != ID_BYTES for origin in manifest.origins):
        raise DamagedManifest(f"manifest {name} contradicts itself")
    records = np.frombuffer(bytearray(manifest.records), RECORD)  # a copy, so that `BlockIndex.forget` may write
    end = records["offset"].astype(np.uint64) + records["length"]
    possible = (records["length"] > 0) & (end <= manifest.segment_bytes) & (records["origin"] < len(manifest.origins))
    possible &= (records["key_bytes"] > 0) & (records["key_bytes"] <= keys.KEY_BYTES_MAX)
    if not possible.all():
        raise DamagedManifest(f"manifest {name} contradicts itself")
    return Segment(manifest.segment, manifest.segment_bytes, records, manifest.origins)


class BlockIndex:
    """Blocks of all known segments, by key. Of several under one key the one in the newest segment counts."""

    def __init__(self) -> None:
        self._segments: list[Segment | None] = []  # by number; None: gone
        self._numbers: dict[bytes, int] = {}  # of segments, by id
        # Seeds, sorted, and positions: segment's number << 32 | block's number. Replaced, never changed: `find` may be reading.
        self._runs: tuple[tuple[U64, U64], ...] = ()
        self._dead = 0  # of positions in runs: in segments that are gone
        self.blocks = 0
        self.bytes = 0

    def __contains__(self, segment_id: bytes) -> bool:
        return segment_id in self._numbers

    def segments(self) -> list[Segment]:
        return [segment for segment in self._segments if segment is not None]

    def add(self, segment: Segment) -> None:
        """Idempotent."""
        if segment.id in self._numbers:
            return
        number = len(self._segments)
        self._segments.append(segment)
        self._numbers[segment.id] = number
        seeds = np.array(keys.seeds_of(segment.keys()), np.uint64)
        order = np.argsort(seeds, kind="stable")
        positions = (np.uint64(number) << np.uint64(32)) | order.astype(np.uint64)
        self._runs = (*self._runs, (seeds[order], positions))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            self._merge(2)
        self.blocks += len(segment.records)
        self.bytes += int(segment.records["length"].sum(dtype=np.uint64))

    def remove(self, segment_id: bytes) -> bool:
        """The segment is gone. False when it was not known."""
        number = self._numbers.pop(segment_id, None)
        if number is None:
            return False
        segment = self._segments[number]
        assert segment is not None
        self._segments[number] = None
        self._dead += len(segment.records)
        self.blocks -= len(segment.records)
        self.bytes -= int(segment.records["length"].sum(dtype=np.uint64))
        if self._dead > self.blocks:
            self._merge(len(self._runs))
        return True

    def forget(self, found: Found) -> None:
        """The block can't be read here: it is not found any more."""
        found.segment.records["key_bytes"][found.number] |= np.uint16(_FORGOTTEN)

    def find(self, wanted: Sequence[bytes], now: int) -> list[Found | None]:
        """Where these are. now: seconds since 2020; who has expired is not found."""
        found: list[Found | None] = [None] * len(wanted)
        seeds = np.array(keys.seeds_of(wanted), np.uint64)
        for run_seeds, positions in self._runs:
            left = np.searchsorted(run_seeds, seeds, "left")
            right = np.searchsorted(run_seeds, seeds, "right")
            for i in np.flatnonzero(left < right).tolist():
                for position in positions[left[i] : right[i]].tolist():
                    candidate = self._at(position, wanted[i], now)
                    best = found[i]
                    if candidate is not None and (best is None or best.segment.id < candidate.segment.id):
                        found[i] = candidate
        return found

    def check(self) -> list[str]:
        """Problems, one sentence each; empty when all is well."""
        problems = []
        for seeds, positions in self._runs:
            if (seeds[1:] < seeds[:-1]).any():
                problems.append("a run is not sorted")
            if len(seeds) != len(positions):
                problems.append("a run's seeds and positions differ in number")
        if sum(len(seeds) for seeds, _ in self._runs) != self.blocks + self._dead:
            problems.append("the runs do not hold as many blocks as the segments")
        return problems

    def _at(self, position: int, key: bytes, now: int) -> Found | None:
        segment = self._segments[position >> 32]
        if segment is None:
            return None
        number = position & 0xFFFFFFFF
        record = segment.records[number]
        expires = int(record["expires"])
        readable = not int(record["key_bytes"]) & _FORGOTTEN and (not expires or now < expires)
        return Found(segment, number) if readable and segment.key(number) == key else None

    def _merge(self, last: int) -> None:
        """Make one run of the last ones, without what is gone."""
        merged = self._runs[len(self._runs) - last :]
        seeds = np.concatenate([seeds for seeds, _ in merged])
        positions = np.concatenate([positions for _, positions in merged])
        alive = np.array([segment is not None for segment in self._segments], bool)[
            (positions >> np.uint64(32)).astype(np.int64)
        ]
        self._dead -= int((~alive).sum())
        seeds, positions = seeds[alive], positions[alive]
        order = np.argsort(seeds, kind="stable")
        self._runs = (*self._runs[: len(self._runs) - last], *([(seeds[order], positions[order])] if len(order) else []))
