"""The directory's index beside NVIDIA Dynamo's `RadixTree`, on the same trace, in the same process, one after the other.

Both publish every prompt's new blocks and then look every prompt up, as `index_trace` and `bench_index.py` say. The tree gets
what its Python face takes: events as JSON in bytes, prepared before the clock, and lists of 64-bit hashes; it answers with how
many leading blocks each worker has, so ours is asked for the same (`CompactIndex.depths`). It works in a thread of its own: its
clock stops when a last question, behind everything, is answered.

Needs `ai-dynamo-runtime`, which nothing else here does: without it, or without the trace, the exit code is 77.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from common import SKIPPED, arguments, progress, report, summary
from index_trace import Prompt, keys_of_blocks, new_index, prompts, publishes, words

ROUNDS = 3


def ours(of: list[Prompt]) -> tuple[float, float]:
    """Seconds of all publishes, and of all lookups."""
    told, wanted = publishes(of), [[keys_of_blocks(prompt.blocks)] for prompt in of]
    index = new_index()
    began = time.perf_counter()
    for node, runs in told:
        index.add(node, runs)
    published = time.perf_counter()
    for keys in wanted:
        depths = index.depths(keys)
    ended = time.perf_counter()
    assert depths[f"worker-{of[-1].worker}"] == len(of[-1].blocks)
    return published - began, ended - published


def numbers(prompt: Prompt) -> list[int]:
    """Its blocks as the tree knows them: the first 64 bits of their hashes."""
    named: list[int] = words(prompt.blocks)[:, 0].tolist()
    return named


def events(of: list[Prompt]) -> list[tuple[int, bytes]]:
    """Worker and event of each publish."""
    told = []
    for number, prompt in enumerate(of):
        named, known = numbers(prompt), prompt.known
        new = named[known:]
        if new:
            parent = named[known - 1] if known else None
            blocks = [{"block_hash": block, "tokens_hash": block} for block in new]
            event = {"event_id": number, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}}
            told.append((prompt.worker, json.dumps(event).encode()))
    return told


def theirs(tree: Any, of: list[Prompt]) -> tuple[float, float]:
    told, wanted = events(of), [numbers(prompt) for prompt in of]
    began = time.perf_counter()
    for worker, event in told:
        tree.apply_event(worker, event)
    tree.find_matches(wanted[-1][:1])
    published = time.perf_counter()
    for blocks in wanted:
        found = tree.find_matches(blocks)
    ended = time.perf_counter()
    assert found.scores[(of[-1].worker, 0)] == len(of[-1].blocks)
    return published - began, ended - published


def main() -> None:
    options = arguments(__doc__ or "")
    try:
        from dynamo.llm import RadixTree
    except ImportError as reason:
        print(reason, file=sys.stderr)
        sys.exit(SKIPPED)
    of = prompts(1200 if options.quick else None)
    asked, published = sum(len(prompt.blocks) for prompt in of), sum(len(prompt.blocks) - prompt.known for prompt in of)
    mine, other = [], []
    for _ in range(ROUNDS):
        mine.append(ours(of))
        progress("ours")
        other.append(theirs(RadixTree(), of))
        progress("theirs")
    faster = np.array(other).min(axis=0) / np.array(mine).min(axis=0)
    figures = {"index_publish_over_radix": (float(faster[0]), "ratio"), "index_lookup_over_radix": (float(faster[1]), "ratio")}
    detail: dict[str, Any] = {"prompts": len(of), "published_blocks": published, "asked_blocks": asked}
    for name, taken in (("ours", mine), ("radix", other)):
        for place, what in enumerate(("publish", "lookup")):
            detail[f"{name}_{what}_seconds"] = summary([seconds[place] for seconds in taken])
            blocks = asked if place else published
            detail[f"{name}_{what}_mops"] = blocks / min(seconds[place] for seconds in taken) / 1e6
    report(figures, detail, options.json)


if __name__ == "__main__":
    main()
