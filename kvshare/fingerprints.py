"""Fingerprints of keys: what an index knows a key by, the part and the shard that it is in, and sums to compare inventories by.

    key ── keyed hash ──> 64 bits:  | part (6) |          | shard, of 16 |

Two of a hundred million keys are alike once in 3,600 such indexes, and then a reader finds out: a block carries a checksum that
its whole key seeds, or in a device region a tag of its key. The seed comes from the cluster's secret, so nodes and directory
agree, and whoever chooses prompts cannot choose keys that are alike or fall together.

Pure. Threads: none; the compiled loops hold the GIL, for a few nanoseconds a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvshare import _index
from kvshare.runs import COLUMN_GENERATION, COLUMN_SLOT, Keys, Run

PARTS = 64
ALL_PARTS = (1 << PARTS) - 1
SHARDS_MAX = 256  # a shard's number is a byte

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
U8 = npt.NDArray[np.uint8]

_OF_SLOT, _OF_GENERATION, _OF_REGION, _MIX = 0x9FB21C651E98DF25, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93


def index_seed(secret: str) -> int:
    """The seed of a cluster's fingerprints: 64 bits, equal for all that know its secret."""
    return int.from_bytes(hashlib.blake2b(secret.encode(), digest_size=8, person=b"kvshare-index").digest(), "little")


def hashes_of(keys: Sequence[Keys], seed: int) -> U64:
    """The hashes of all these keys, in order: uint64 [n], XXH3_64 with ``seed``. What would end in 52 ones ends in a zero."""
    hashes = np.empty(sum(map(len, keys)), np.uint64)
    start = 0
    for packed in keys:
        _index.hash_keys(packed.prefix, packed.hash_bytes, packed.hashes, seed, hashes, start)
        start += len(packed)
    return hashes


def shard_of(keys: Sequence[Keys], seed: int, shards: int) -> U8:
    """Which of ``shards`` (at most `SHARDS_MAX`) each key belongs to: uint8 [n]. Says nothing of its part."""
    assert 1 <= shards <= SHARDS_MAX
    if shards == 1:
        return np.zeros(sum(map(len, keys)), np.uint8)
    return ((hashes_of(keys, seed) & np.uint64(0xFFFF)) * np.uint64(shards) >> np.uint64(16)).astype(np.uint8)


def part_of(hashes: U64) -> U8:
    """The part, below `PARTS`, of each hash: uint8 [n]."""
    return (hashes >> np.uint64(58)).astype(np.uint8)


def digest(hashes: U64, region: int, slots: U32 | U64, generations: U64) -> U64:
    """A number for each location (uint64 [n]) that hardly any other has. Sums of them (mod 2^64) tell inventories apart."""
    mixed = hashes + slots.astype(np.uint64) * np.uint64(_OF_SLOT) + generations.astype(np.uint64) * np.uint64(_OF_GENERATION)
    mixed += np.uint64((region * _OF_REGION) & 0xFFFFFFFFFFFFFFFF)
    for _ in range(2):
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(_MIX)
    result: U64 = mixed ^ (mixed >> np.uint64(32))
    return result


def digests_of(runs: Sequence[Run], seed: int) -> U64:
    """For each part the sum of `digest` over these runs: uint64 [PARTS], as `kvshare.index.Index.digests` has it. Sums of what
    comes are added, of what goes subtracted."""
    sums = np.zeros(PARTS, np.uint64)
    for run in runs:
        hashes = hashes_of([run.keys], seed)
        slots, generations = np.frombuffer(run.slots, COLUMN_SLOT), np.frombuffer(run.generations, COLUMN_GENERATION)
        np.add.at(sums, part_of(hashes), digest(hashes, run.region, slots, generations))
    return sums
