"""The directory's index: how fast, how large, how patient. One thread, in this process, on one core.

1. A trace (`index_trace`): every prompt's new blocks are published, then every prompt is looked up with all its locations.
   Operations are blocks. Nothing is deferred: when the clock stops, all is in the index.
2. 50 million memberships of 64 nodes, then 100 million: bytes that the index has allocated for each, all slack included; the
   longest that any call to add 512 blocks took, in processor time, and how long a prompt of 128k tokens (8,192 blocks that came
   together) takes to be looked up when nothing of it is in the processor's caches.
3. 10 million memberships from 32 nodes' inventories: frames as they came off the wire, decoded and applied by a directory.

`--quick`: a tenth of each.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import arguments, progress, report, summary, trace_path
from index_trace import BLOCK_BYTES, Prompt, keys_of_blocks, new_index, prompts, publishes, run_of_blocks

from kvshare.cluster_messages import Join, Publish, ToDirectory
from kvshare.config import Settings
from kvshare.directory import Directory
from kvshare.directory_events import Connected, Heard
from kvshare.fingerprints import ALL_PARTS
from kvshare.index import CompactIndex
from kvshare.messages import PROTOCOL_VERSION
from kvshare.places import NodeDescription
from kvshare.runs import Run

ROUNDS = 3
PROMPT_BLOCKS = 8192  # 128k tokens
ADD_BLOCKS = 512
LARGE_NODES, REBUILD_NODES = 64, 32
LOOKUPS = 1000
FRAME_BLOCKS = 8192

Figures = dict[str, tuple[float, str]]


def on_trace(of: list[Prompt]) -> tuple[Figures, dict[str, Any]]:
    told, wanted = publishes(of), [[keys_of_blocks(prompt.blocks)] for prompt in of]
    published, asked = sum(len(runs[0]) for _, runs in told), sum(len(prompt.blocks) for prompt in of)
    publish_seconds, lookup_seconds = [], []
    for _ in range(ROUNDS):
        index = new_index()
        began = time.perf_counter()
        for node, runs in told:
            index.add(node, runs)
        publish_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for keys in wanted:
            index.find(keys)
        lookup_seconds.append(time.perf_counter() - began)
    assert index.locations() == published and index.held(wanted[-1]) == len(of[-1].blocks)
    figures = {
        "index_publish_mops": (published / min(publish_seconds) / 1e6, "M/s"),
        "index_lookup_mops": (asked / min(lookup_seconds) / 1e6, "M/s"),
    }
    detail = {
        "prompts": len(of),
        "published_blocks": published,
        "asked_blocks": asked,
        "keys": len(index),
        "publish_seconds": summary(publish_seconds),
        "lookup_seconds": summary(lookup_seconds),
    }
    return figures, detail


def chain(number: int) -> Run:
    """A prompt's blocks, all its own."""
    first = (1 << 40) + number * PROMPT_BLOCKS
    return run_of_blocks(np.arange(first, first + PROMPT_BLOCKS, dtype=np.uint64), 0)


def pieces(run: Run) -> Iterator[Run]:
    size = run.keys.hash_bytes
    for start in range(0, len(run), ADD_BLOCKS):
        end = start + ADD_BLOCKS
        keys = msgspec.structs.replace(run.keys, hashes=run.keys.hashes[start * size : end * size])
        columns = run.slots[4 * start : 4 * end], run.generations[8 * start : 8 * end]
        yield msgspec.structs.replace(run, keys=keys, slots=columns[0], generations=columns[1])


def fill(index: CompactIndex, begin: int, end: int) -> list[float]:
    """Have it know the chains of these numbers. Returns the processor seconds of each call."""
    taken = []
    for number in range(begin, end):
        for piece in pieces(chain(number)):
            began = time.thread_time()
            index.add(f"n{number % LARGE_NODES}", [piece])
            taken.append(time.thread_time() - began)
    return taken


def lookups(index: CompactIndex, chains: int) -> list[float]:
    """Seconds of each lookup of a random chain that is held."""
    taken = []
    for number in np.random.default_rng(1).integers(0, chains, LOOKUPS).tolist():
        keys = [chain(number).keys]
        began = time.perf_counter()
        found = index.find(keys)
        taken.append(time.perf_counter() - began)
        assert found.counts == b"\1" * PROMPT_BLOCKS
    return taken


def large(memberships: int) -> tuple[Figures, dict[str, Any]]:
    index, before = new_index(2 * memberships), resident_bytes()
    half, whole = memberships // PROMPT_BLOCKS, 2 * memberships // PROMPT_BLOCKS
    taken = fill(index, 0, half)
    sizes = {index.locations(): index.memory_bytes() / index.locations()}
    progress(f"{index.locations()} memberships, {index.memory_bytes() / index.locations():.2f} bytes each")
    asked = np.array(lookups(index, half)) * 1e6
    taken += fill(index, half, whole)
    sizes[index.locations()] = index.memory_bytes() / index.locations()
    resident = (resident_bytes() - before) / index.locations()
    progress(f"{index.locations()} memberships, {index.memory_bytes() / index.locations():.2f} bytes each")
    began = time.perf_counter()
    index.drop("n0")
    dropped = time.perf_counter() - began
    sweeps = []
    more = True
    while more:
        began = time.thread_time()
        more = index.sweep()
        sweeps.append(time.thread_time() - began)
    figures = {
        "index_bytes_per_membership": (max(sizes.values()), "bytes"),
        "index_lookup_128k_p50_us": (float(np.percentile(asked, 50)), "us"),
        "index_lookup_128k_p99_us": (float(np.percentile(asked, 99)), "us"),
        "index_growth_pause_ms": (max(taken) * 1e3, "ms"),
    }
    detail = {
        "bytes_per_membership": {str(count): round(size, 3) for count, size in sizes.items()},
        "resident_bytes_per_membership": round(resident, 3),
        "add_us": {"blocks": ADD_BLOCKS, "median": float(np.median(taken)) * 1e6, "max": max(taken) * 1e6, "n": len(taken)},
        "lookup_us": {"blocks": PROMPT_BLOCKS, "median": float(np.median(asked)), "max": float(asked.max()), "n": LOOKUPS},
        "drop_a_node_us": dropped * 1e6,
        "sweep_steps": len(sweeps),
        "sweep_step_ms_max": max(sweeps) * 1e3,
    }
    return figures, detail


def inventories(memberships: int) -> Iterator[tuple[int, bytes]]:
    """Connection and frame: all nodes at once, each a message of its inventory after the other."""
    messages = memberships // FRAME_BLOCKS // REBUILD_NODES
    for message in range(messages):
        for node in range(REBUILD_NODES):
            run, anew = chain(node * messages + message), 0 if message else ALL_PARTS
            publish = Publish(f"n{node}", 1, message, anew, message + 1 < messages, [run], [], 0)
            yield node, msgspec.msgpack.encode(publish)


def rebuild(memberships: int) -> tuple[Figures, dict[str, Any]]:
    directory, decoder = Directory(Settings.load({"index_keys_max": memberships}, {})), msgspec.msgpack.Decoder(ToDirectory)
    for node in range(REBUILD_NODES):
        directory.handle(Connected(node), 0.0)
        description = NodeDescription(f"n{node}", 1, f"h{node}", "10.0.0.1:1", ())
        directory.handle(Heard(node, Join(PROTOCOL_VERSION, description, False, 0, 1)), 0.0)
    frames = list(inventories(memberships))
    began = time.perf_counter()
    for node, frame in frames:
        directory.handle(Heard(node, decoder.decode(frame)), 0.0)
    seconds = time.perf_counter() - began
    known = directory.status().keys
    assert known == len(frames) * FRAME_BLOCKS
    wire = sum(len(frame) for _, frame in frames)
    return {"index_rebuild_10m_seconds": (seconds, "s")}, {"rebuilt": known, "frames": len(frames), "wire_bytes": wire}


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    options = arguments(__doc__ or "")
    trace_path()  # before anything takes time
    scale = 10 if options.quick else 1
    figures: Figures = {}
    detail: dict[str, Any] = {"prompt_blocks": PROMPT_BLOCKS, "block_bytes": BLOCK_BYTES}
    progress("the trace")
    for found, more in (
        on_trace(prompts(12_031 // scale)),
        rebuild(10_000_000 // scale),
        large(50_000_000 // scale),
    ):
        figures |= found
        detail |= more
    report(figures, detail, options.json)


if __name__ == "__main__":
    main()
