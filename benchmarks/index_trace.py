"""The Mooncake conversation trace as an index meets it: prompts of 16-token blocks that workers publish, and then look up.

Each hash id of the trace stands for 512 tokens: 32 blocks here, with hashes made from the id and the place in it. Prompts go to
the workers in turn; a worker publishes what it hasn't published before, one run per prompt. Everything is columns of bytes, as
it comes off the wire, before any clock runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from common import trace_path

from kvshare.fingerprints import index_seed
from kvshare.index import CompactIndex
from kvshare.keys import PREFIX_BYTES
from kvshare.runs import Keys, Run

BLOCKS_PER_ID = 32
WORKERS = 8
PREFIX = bytes(range(PREFIX_BYTES))
BLOCK_BYTES = 1 << 20
HASH_BYTES = 32  # of an engine's block hash

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Prompt:
    """Blocks by number (uint64 [n]). ``known``: how many leading ones its worker has published before."""

    worker: int
    blocks: U64
    known: int


def prompts(count: int | None = None) -> list[Prompt]:
    """The first ``count`` prompts of the trace, or all."""
    found, published = [], [set[int]() for _ in range(WORKERS)]
    with trace_path().open() as lines:
        for number, line in enumerate(lines):
            if number == count:
                break
            ids: list[int] = json.loads(line)["hash_ids"]
            mine = published[number % WORKERS]
            known = next((place for place, block in enumerate(ids) if block not in mine), len(ids))
            mine.update(ids)
            wide = np.repeat(np.array(ids, np.uint64) * np.uint64(BLOCKS_PER_ID), BLOCKS_PER_ID)
            blocks = wide + np.tile(np.arange(BLOCKS_PER_ID, dtype=np.uint64), len(ids))
            found.append(Prompt(number % WORKERS, blocks, known * BLOCKS_PER_ID))
    return found


def words(blocks: U64) -> U64:
    """Block hashes, 32 bytes each, of blocks by number: uint64 [n, 4]. Like those of sha256, all bits look random."""
    found = np.empty((len(blocks), HASH_BYTES // 8), np.uint64)
    for place in range(HASH_BYTES // 8):
        mixed = blocks + np.uint64(0x9E3779B97F4A7C15 * (place + 1) & 0xFFFFFFFFFFFFFFFF)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        found[:, place] = mixed ^ (mixed >> np.uint64(31))
    return found


def keys_of_blocks(blocks: U64) -> Keys:
    return Keys(PREFIX, HASH_BYTES, words(blocks).tobytes())


def run_of_blocks(blocks: U64, first_slot: int) -> Run:
    """These blocks in slots from ``first_slot`` on."""
    slots = np.arange(first_slot, first_slot + len(blocks), dtype="<u4")
    generations = slots.astype("<u8") * np.uint64(2) + np.uint64(7 << 32)
    return Run(keys_of_blocks(blocks), BLOCK_BYTES, BLOCK_BYTES, 0, slots.tobytes(), generations.tobytes())


def publishes(of: list[Prompt]) -> list[tuple[str, list[Run]]]:
    """What each prompt has its worker publish."""
    slots, told = [0] * WORKERS, []
    for prompt in of:
        new = prompt.blocks[prompt.known :]
        if len(new):
            told.append((f"worker-{prompt.worker}", [run_of_blocks(new, slots[prompt.worker])]))
            slots[prompt.worker] += len(new)
    return told


def new_index(keys_max: int = 100_000_000) -> CompactIndex:
    return CompactIndex(keys_max, index_seed("a secret"))
