"""What a load is made of: picklable, since an engine's scheduler makes it and its workers carry it out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvshare.places import RegionDescription

Source = tuple[str, str]  # a node, and the kind of its region: what has a rate


@dataclass(frozen=True)
class SourceRead:
    """Blocks of one region. ``positions`` int64 [n]: which blocks of the plan; slots int64 [n]; generations uint64 [n]."""

    description: RegionDescription
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint64]

    @property
    def source(self) -> Source:
        return self.description.node, self.description.kind


@dataclass(frozen=True)
class LoadPlan:
    """Where each of ``hashes`` is to be read from; every position is in exactly one of ``reads``.

    prefix: the keys' common part (`kvshare.keys.prefix`); hashes: the engine's block hashes, in order.
    seconds: what the engine would need to compute these blocks; 0 when nobody knows: the load then takes what it takes.
    grace_seconds: what the load may cost beyond the computing that its arrived blocks have saved.
    others: of blocks that are cut into shards, the same blocks' other shards (a plan each, with nothing in its ``others``).
    """

    prefix: bytes
    hashes: list[bytes]
    reads: list[SourceRead]
    seconds: float = 0.0
    grace_seconds: float = 0.0
    others: tuple[LoadPlan, ...] = ()

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def keys(self) -> list[bytes]:
        return [self.prefix + block_hash for block_hash in self.hashes]


@dataclass(frozen=True)
class Offer:
    """Where the leading blocks of a chain can be had.

    source: int64 [blocks], an index into ``sources``. rates: bytes/s of each, as our node has measured them, 0 where it has
    not. own: the first of ``sources`` is our own node.
    """

    source: npt.NDArray[np.int64]
    sources: list[Source]
    rates: list[float]
    own: bool


@dataclass(frozen=True)
class Measured:
    """A read of ``source`` moved ``bytes`` in ``seconds``; ``slow``: it was given up since computing is faster."""

    source: Source
    bytes: int
    seconds: float
    slow: bool = False
