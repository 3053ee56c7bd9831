"""Blocks of a paged KV cache, gathered into contiguous memory and scattered back, by few large operations on the device.

    KV cache        │ layer 0: block 0 │ block 1 │ ...  │ layer 1: block 0 │ block 1 │ ...     one allocation or several
        │  one index_select (gather), one index_copy_ (scatter)
    device piece    │ block 7: layer 0 │ layer 1 │ ... ││ block 3: layer 0 │ layer 1 │ ...
        │  one copy
    pinned memory   │ block 7 .......................  ││ block 3 .......................

`PageRows` is one tensor over the whole KV cache, whatever its memory order and however many allocations it lies in: its rows
overlap, one begins wherever a page may begin. `Stager` has two pieces and two lanes (streams): while one piece is copied to or
from pinned memory, the pages of the other are gathered or scattered. `Pinned` is that memory, block by block.

Threads: a `Stager` belongs to one, the rest may be used by any.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvshare.integrations.vllm.layout import Layout
from kvshare.transport.base import Targets

SLAB_BYTES = 32 << 20  # pinned at once
PIECE_BYTES = 16 << 20  # two of these are taken of the device's memory; a copy of this size is at the bus's full rate
DIGEST_BYTES = 64 << 20  # mixed at once by `digests`, which needs about three times that for itself
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

I64 = npt.NDArray[np.int64]


class Lane(Protocol):
    """What a CUDA stream is: work is done in order, later than it is given."""

    def run(self, work: Callable[[], object]) -> None:
        """The operations on tensors that ``work`` starts belong to this lane."""

    def mark(self) -> Any:
        """The point after all that was given so far."""

    def after(self, mark: Any) -> None:
        """What is given from now on waits for ``mark``, of any lane."""


class Device(Protocol):
    """What this needs of an accelerator."""

    def mark(self) -> Any:
        """A point in the engine's stream, after all that it was given so far. To be called in the engine's thread."""

    def lane(self) -> Lane: ...

    def wait(self, mark: Any) -> None:
        """The calling thread waits for ``mark``, asleep and without the GIL."""

    def pinned(self, rows: int, row_bytes: int) -> torch.Tensor:
        """uint8 [rows, row_bytes] in host memory that the device copies from and to. Takes milliseconds.

        Raises:
            RuntimeError: the system has no such memory to give.
        """


class PageRows:
    """All pages of a KV cache as rows of one tensor.

    view: [rows, words] of integers; row r begins ``r * step`` bytes above the lowest page, so rows overlap where pages are
    longer than a step. A block is ``rows_per_block`` rows of it, in the order of the block's bytes.
    blocks: how many the KV cache has.
    """

    def __init__(self, layout: Layout, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._memory = tuple(kv_caches.values())  # keeps alive what `view` only points to
        self.block_bytes = layout.block_bytes
        bases, strides, lengths = (column.astype(np.int64) for column in (layout.bases, layout.strides, layout.page_bytes))
        self.blocks = _blocks(bases, strides, lengths, self._memory)
        width = int(np.gcd.reduce(lengths))
        parts = lengths // width  # of each page: one row, unless pages are of unequal length
        inner = np.concatenate([np.arange(count) for count in parts.tolist()]) * width
        bases, strides = np.repeat(bases, parts) + inner, np.repeat(strides, parts)
        start = int(bases.min())
        step = int(np.gcd.reduce(np.concatenate([bases - start, strides])))
        # Wide words: moving bytes one by one is ten times slower.
        word = math.gcd(step, width, start, 8)
        self.rows_per_block = len(bases)
        self._bases, self._strides = (bases - start) // step, strides // step
        rows = 1 + int((self._bases + (self.blocks - 1) * self._strides).max())
        device = self._memory[0].device
        # Of torch's own use in CUDA graphs. Between the allocations there may be anything: only rows of pages are touched.
        storage = torch._C._construct_storage_from_data_pointer(start, device, (rows - 1) * step + width)
        self.view = torch.empty(0, dtype=WORDS[word], device=device)
        self.view.set_(storage, 0, (rows, width // word), (step // word, 1))

    def rows(self, block_ids: Sequence[int] | I64) -> I64:
        """The rows of these blocks, int64 [blocks * rows_per_block]."""
        ids = np.asarray(block_ids, np.int64)
        # On a device a row that is not there would not be an error but the end of its context.
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self.blocks)
        rows: I64 = self._bases[None, :] + ids[:, None] * self._strides[None, :]
        return rows.reshape(-1)


def _blocks(bases: I64, strides: I64, lengths: I64, tensors: Sequence[torch.Tensor]) -> int:
    """How many blocks there is room for in all of the allocations."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    starts = np.array(sorted(storages), np.int64)
    ends = starts + np.array([storages[start] for start in starts.tolist()], np.int64)
    room = ends[np.searchsorted(starts, bases, side="right") - 1] - bases - lengths
    return int((1 + room // strides).min())


class Pinned:
    """Room for blocks in pinned memory, which is used again and again: pinning takes milliseconds. It grows, slab by slab, to
    the most that was needed at once.

    A place is a block's number: ``slab * blocks_per_slab + row``. Threads: any.
    """

    def __init__(self, device: Device, block_bytes: int, slab_bytes: int = SLAB_BYTES) -> None:
        self._device = device
        self.block_bytes = block_bytes
        self.blocks_per_slab = max(1, slab_bytes // block_bytes)
        self._slabs: list[torch.Tensor] = []  # uint8 [blocks_per_slab, block_bytes] each
        self._free = np.empty(0, np.bool_)  # of every place
        self._lock = threading.Lock()

    @property
    def blocks(self) -> int:
        """How many blocks there is room for without pinning more."""
        return len(self._free)

    def take(self, blocks: int) -> I64:
        """Places for so many blocks, int64 [blocks], neighbours where possible.

        Raises:
            RuntimeError: the system has no more pinned memory to give.
        """
        with self._lock:
            while np.count_nonzero(self._free) < blocks:
                self._slabs.append(self._device.pinned(self.blocks_per_slab, self.block_bytes))
                self._free = np.concatenate([self._free, np.ones(self.blocks_per_slab, np.bool_)])
            places = np.flatnonzero(self._free)[:blocks]
            self._free[places] = False
            return places

    def give(self, places: I64) -> None:
        """These are free again: nothing uses them any more."""
        with self._lock:
            assert not self._free[places].any()
            self._free[places] = True

    def runs(self, places: I64) -> Iterator[tuple[torch.Tensor, slice]]:
        """Memory uint8 [n, block_bytes] for each run of neighbours, and which of ``places`` these are."""
        begins = np.ones(len(places), np.bool_)
        begins[1:] = (np.diff(places) != 1) | (places[1:] % self.blocks_per_slab == 0)
        starts = np.flatnonzero(begins).tolist()
        for begin, end in zip(starts, [*starts[1:], len(places)], strict=True):
            slab, row = divmod(int(places[begin]), self.blocks_per_slab)
            yield self._slabs[slab][row : row + end - begin], slice(begin, end)

    def targets(self, places: I64) -> Targets:
        """These places, for a load or a save."""
        slab, row = np.divmod(places, self.blocks_per_slab)
        bases = np.array([one.data_ptr() for one in self._slabs], np.uint64)
        addresses = bases[slab] + row.astype(np.uint64) * np.uint64(self.block_bytes)
        return Targets(addresses.reshape(-1, 1), np.array([self.block_bytes], np.uint64))


class Piece:
    """Device memory for some blocks, and which rows they are."""

    def __init__(self, pages: PageRows, device: Device, blocks: int) -> None:
        rows = blocks * pages.rows_per_block
        self.memory = torch.empty((rows, pages.view.shape[1]), dtype=pages.view.dtype, device=pages.view.device)
        self.blocks = self.memory.view(blocks, -1).view(torch.uint8)
        self.rows = torch.empty(rows, dtype=torch.int64, device=pages.view.device)
        self.pinned_rows = device.pinned(1, 8 * rows).view(torch.int64)[0]
        self.used: Any = None  # the mark after which nothing uses any of them


class Stager:
    """Moves blocks between pages and pinned memory. See the module's docstring.

    `gather` and `scatter` return a mark as soon as all is given to the device, which may be close to its end: they wait
    for a piece to be free. Until that mark is reached the places stay the caller's. After an exception, `settle` first.
    """

    def __init__(self, pages: PageRows, pinned: Pinned, device: Device, piece_bytes: int = PIECE_BYTES) -> None:
        self._pages = pages
        self._pinned = pinned
        self._device = device
        self._piece_blocks = max(1, piece_bytes // pages.block_bytes)
        self._pieces = [Piece(pages, device, self._piece_blocks) for _ in range(2)]
        self._turn = 0
        self._paging, self._copying = device.lane(), device.lane()

    def gather(self, block_ids: Sequence[int] | I64, places: I64, after: Any) -> Any:
        """Copy each block to its place. Pages are read after the mark ``after``."""
        done = after
        for start in range(0, len(places), self._piece_blocks):
            chosen = slice(start, start + self._piece_blocks)
            piece, rows = self._next(block_ids[chosen])
            self._paging.after(after)
            self._paging.run(partial(self._collect, piece, rows))
            self._copying.after(self._paging.mark())
            self._copying.run(partial(self._copy_out, piece, places[chosen]))
            done = piece.used = self._copying.mark()
        return done

    def scatter(self, places: I64, block_ids: Sequence[int] | I64, after: Any) -> Any:
        """Copy what is at each place to its block (each once). Pages are written to after the mark ``after``."""
        done = after
        for start in range(0, len(places), self._piece_blocks):
            chosen = slice(start, start + self._piece_blocks)
            piece, rows = self._next(block_ids[chosen])
            self._copying.run(partial(self._copy_in, piece, rows, places[chosen]))
            self._paging.after(self._copying.mark())
            self._paging.after(after)
            self._paging.run(partial(self._distribute, piece, rows))
            done = piece.used = self._paging.mark()
        return done

    def settle(self) -> None:
        """Wait until nothing that was begun is under way."""
        for lane in (self._copying, self._paging):
            self._device.wait(lane.mark())

    def _next(self, block_ids: Sequence[int] | I64) -> tuple[Piece, int]:
        """A piece that is free, told which rows these blocks are, and how many."""
        piece = self._pieces[self._turn]
        self._turn = 1 - self._turn
        if piece.used is not None:
            self._device.wait(piece.used)
        rows = self._pages.rows(block_ids)
        piece.pinned_rows[: len(rows)].numpy()[:] = rows
        return piece, len(rows)

    def _collect(self, piece: Piece, rows: int) -> None:
        piece.rows[:rows].copy_(piece.pinned_rows[:rows], non_blocking=True)
        torch.index_select(self._pages.view, 0, piece.rows[:rows], out=piece.memory[:rows])

    def _distribute(self, piece: Piece, rows: int) -> None:
        self._pages.view.index_copy_(0, piece.rows[:rows], piece.memory[:rows])

    def _copy_out(self, piece: Piece, places: I64) -> None:
        for memory, which in self._pinned.runs(places):
            memory.copy_(piece.blocks[which], non_blocking=True)

    def _copy_in(self, piece: Piece, rows: int, places: I64) -> None:
        # In this lane: in the other one it would come behind the next piece on the bus, and that piece would wait for it.
        piece.rows[:rows].copy_(piece.pinned_rows[:rows], non_blocking=True)
        for memory, which in self._pinned.runs(places):
            piece.blocks[which].copy_(memory, non_blocking=True)


# --- digests --------------------------------------------------------------------------------------------------------------

# Of SplitMix64 (Steele, Lea, Flood 2014): odd increment, and a mixing of 64 bits that loses none of them.
INCREMENT = 0x9E3779B97F4A7C15
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def digests(pages: PageRows, block_ids: Sequence[int] | I64) -> torch.Tensor:
    """A number for each block, int64 [blocks] on the device, computed there on the current stream: to compare copies of blocks
    without moving them.

    The sum, modulo 2**64, of the mixed words of a block, to each of which a constant of its position was added before. Words
    have 8 bytes, or the most that divide a block. Any change within one word changes the digest; other changes go
    unnoticed once in 2**64, unless somebody makes them so: it is no defence, and not the checksum of a slot's header.
    """
    device = pages.view.device
    word = math.gcd(pages.block_bytes, 8)
    positions = torch.arange(1, pages.block_bytes // word + 1, dtype=torch.int64, device=device)
    constants = _mixed(positions.mul_(_signed(INCREMENT)))
    out = torch.empty(len(block_ids), dtype=torch.int64, device=device)
    step = max(1, DIGEST_BYTES * word // 8 // pages.block_bytes)
    for start in range(0, len(block_ids), step):
        rows = pages.rows(block_ids[start : start + step])
        picked = pages.view.index_select(0, torch.from_numpy(rows).to(device))
        words = picked.view(-1, pages.view.shape[1] * pages.rows_per_block).view(WORDS[word]).to(torch.int64)
        torch.sum(_mixed(words.add_(constants)), dim=1, out=out[start : start + step])
    return out


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """In place: each int64 becomes another one, and no two the same."""
    for shift, factor in MIXING:
        # torch shifts the sign in: the mask makes it the shift of an unsigned number.
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return words


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
