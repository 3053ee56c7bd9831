"""Byte ranges of blocks: what has to be copied where, when source and target are cut into pages differently.

source block   │  page 0  │  page 1  │          pages of an engine's KV cache, or one slot
target block   │ page 0 │ page 1 │ page 2 │     another engine's pages, or one slot
spans          │  0     │1 │ 2     │ 3     │
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare.places import ProcessMemory

U64 = npt.NDArray[np.uint64]


class Spans(NamedTuple):
    """Copy ``lengths[i]`` bytes from ``sources[i]`` to ``targets[i]``: uint64 [n] each, block by block, in order."""

    targets: U64
    sources: U64
    lengths: U64


def page_addresses(bases: npt.ArrayLike, strides: npt.ArrayLike, slots: npt.ArrayLike) -> U64:
    """Addresses uint64 [slots, pages] of pages that lie at ``bases[j] + slot * strides[j]``."""
    rows = np.asarray(slots, np.int64).astype(np.uint64)[:, None]
    return np.asarray(bases, np.uint64)[None, :] + rows * np.asarray(strides, np.uint64)[None, :]


def spans(targets: U64, target_bytes: U64, sources: U64, source_bytes: U64) -> Spans:
    """The ranges of whole blocks.

    targets: uint64 [blocks, p] page addresses, target_bytes: uint64 [p]; sources, source_bytes: likewise with q pages.
    A source block may be longer than a target block (a slot's padding): its end is left out.

    Raises:
        ValueError: a source block is shorter than a target block.
    """
    length = int(target_bytes.sum())
    if int(source_bytes.sum()) < length:
        raise ValueError(f"blocks of {int(source_bytes.sum())} bytes cannot fill blocks of {length}")
    if np.array_equal(target_bytes, source_bytes):  # the common case, told fast: a page is a page
        lengths = np.broadcast_to(target_bytes, targets.shape)
        return Spans(targets.reshape(-1), sources.reshape(-1), lengths.reshape(-1))
    target_ends, source_ends = np.cumsum(target_bytes), np.cumsum(source_bytes)
    ends = np.union1d(target_ends, source_ends)
    ends = ends[(ends > 0) & (ends <= np.uint64(length))]
    starts = np.concatenate([np.zeros(1, np.uint64), ends])[:-1]
    lengths = ends - starts
    # Of each span: the page that it lies in, and where in it.
    target_page = np.searchsorted(target_ends, starts, side="right")
    source_page = np.searchsorted(source_ends, starts, side="right")
    target_offset = starts - (target_ends - target_bytes)[target_page]
    source_offset = starts - (source_ends - source_bytes)[source_page]
    return Spans(
        (targets[:, target_page] + target_offset[None, :]).reshape(-1),
        (sources[:, source_page] + source_offset[None, :]).reshape(-1),
        np.broadcast_to(lengths, (len(targets), len(lengths))).reshape(-1),
    )


def coalesce(ranges: Spans) -> Spans:
    """The same copies in fewer ranges: neighbours that continue each other on both sides become one."""
    targets, sources, lengths = ranges
    if len(lengths) < 2:
        return ranges
    joined = (targets[:-1] + lengths[:-1] == targets[1:]) & (sources[:-1] + lengths[:-1] == sources[1:])
    if not joined.any():
        return ranges
    first = np.flatnonzero(np.concatenate([[True], ~joined]))
    return Spans(targets[first], sources[first], np.add.reduceat(lengths, first))


def united(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (start, end), some of which overlap or touch, as few (address, length), in order."""
    made: list[list[int]] = []
    for start, end in sorted(places):
        if made and start <= made[-1][1]:
            made[-1][1] = max(made[-1][1], end)
        else:
            made.append([start, end])
    return [(start, end - start) for start, end in made]


def extents(memory: ProcessMemory, slots: int) -> list[tuple[int, int]]:
    """The memory (address, length) that so many slots of a region take."""
    places = zip(memory.bases, memory.strides, memory.page_bytes, strict=True)
    return united((base, base + stride * (slots - 1) + length) for base, stride, length in places)
