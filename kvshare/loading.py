"""What a load is made of: picklable, since an engine's scheduler makes it and its workers carry it out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvshare.messages import RegionDescription


@dataclass(frozen=True)
class SourceRead:
    """Blocks of one region. ``positions`` int64 [n]: which blocks of the plan; slots int64 [n]; generations uint64 [n]."""

    description: RegionDescription
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class LoadPlan:
    """Where each of ``hashes`` is to be read from; every position is in exactly one of ``reads``.

    prefix: the keys' common part (`kvshare.keys.prefix`); hashes: the engine's block hashes, in order.
    """

    prefix: bytes
    hashes: list[bytes]
    reads: list[SourceRead]

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def keys(self) -> list[bytes]:
        return [self.prefix + block_hash for block_hash in self.hashes]
