"""How much of a GPU's limits the device paths reach, on one GPU.

The KV cache is that of an 8B-class model (32 layers, 8 KV heads of 128, bfloat16): pages of 64 KiB, blocks of 16 tokens, 2 MiB.

*Paging*: 128 scattered blocks from the KV cache into pinned memory (gather) and back (scatter), in three memory orders. The
limit, in turn with it: one copy of as many bytes between contiguous device memory and pinned memory.

*VRAM to VRAM*: an owner in a process of its own has such a KV cache; 64 MiB and 256 MiB of its blocks are read through
`NixlTransport`, verified, into another KV cache. The limit: one device copy of as many bytes. Beside it, for comparison, the
owner's memory mapped with torch's own CUDA IPC, gathered by one kernel and scattered by another, unverified.

Figures are ours over limit, by medians, the worst of each. Without a GPU it says so and ends with exit code 77.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from common import progress, report, summary

from kvshare import processes
from kvshare.device import STRIDE, DeviceTable
from kvshare.errors import TransportError
from kvshare.integrations.vllm.gather import PageRows, Pinned, Stager, digests
from kvshare.integrations.vllm.layout import Layout, pages_of
from kvshare.integrations.vllm.pages import AtOnce, Cuda
from kvshare.places import DEVICE, ProcessMemory, RegionDescription
from kvshare.transport.base import ReadRequest

SKIPPED = 77  # exit code: cannot be measured here
ORDERS = ("LBHNC", "BLHNC", "|BHNC")  # of layers, blocks, heads, tokens, content; "|": each layer in an allocation of its own
REGION, SECONDS = 1, 10.0


@dataclass(frozen=True)
class Scale:
    """What is measured, and how often. Blocks of the cache, of a gather, and of the reads VRAM to VRAM."""

    device: torch.device
    sizes: dict[str, int]
    paged_blocks: int
    read_blocks: tuple[int, ...]
    samples: int

    @property
    def accelerator(self) -> Any:
        return AtOnce() if self.device.type == "cpu" else Cuda(self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def scale(rehearse: bool, quick: bool) -> Scale:
    if rehearse:
        return Scale(torch.device("cpu"), {"L": 4, "B": 64, "H": 2, "N": 16, "C": 64}, 16, (8, 32), 3)
    sizes = {"L": 32, "B": 512, "H": 8, "N": 16, "C": 256}
    return Scale(torch.device("cuda", 0), sizes, 128, (32, 128), 10 if quick else 50)


class Cache:
    """A KV cache in a memory order. ``tensors``: as vLLM hands them over."""

    def __init__(self, scale: Scale, order: str, shared: bool = False) -> None:
        def memory(dimensions: str) -> torch.Tensor:
            made = torch.randint(-9999, 9999, [scale.sizes[one] for one in dimensions], dtype=torch.int16, device=scale.device)
            if shared and scale.device.type == "cpu":
                made.share_memory_()  # now: torch moves it when it is sent
            return made.permute([dimensions.index(one) for one in "LBHNC" if one in dimensions])

        separate = order.startswith("|")
        layers = [memory(order[1:]) for _ in range(scale.sizes["L"])] if separate else list(memory(order))
        self.tensors = {f"layer.{i}": layer for i, layer in enumerate(layers)}
        self.blocks = scale.sizes["B"]
        found = [page for layer in layers for page in pages_of(layer, self.blocks)[0]]
        bases, strides, lengths = (np.array(column, np.uint64) for column in zip(*found, strict=True))
        self.layout = Layout(bases, strides, lengths, "benchmark", scale.device.type)
        self.pages = PageRows(self.layout, self.tensors)


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(limit: Callable[[], None], ours: Callable[[], None], samples: int) -> tuple[list[float], list[float]]:
    """Seconds of each, sample by sample; whichever comes first comes second next time."""
    limits, times = [], []
    for sample in range(-2, samples):  # two to warm up
        pair = [(limits, limit), (times, ours)]
        for kept, run in pair if sample % 2 else reversed(pair):
            kept.append(timed(run))
    return limits[2:], times[2:]


def cell(payload: int, limits: list[float], ours: list[float]) -> dict[str, Any]:
    return {
        "limit_gb_per_second": round(payload / float(np.median(limits)) / 1e9, 3),
        "ours_gb_per_second": round(payload / float(np.median(ours)) / 1e9, 3),
        "ratio": round(float(np.median(limits) / np.median(ours)), 4),
        "limit_seconds": summary(limits),
        "ours_seconds": summary(ours),
    }


# --- paging ---------------------------------------------------------------------------------------------------------------


def measure_paging(scale: Scale, order: str, detail: dict[str, Any]) -> None:
    progress(f"paging, {order}")
    accelerator, random, cache = scale.accelerator, np.random.default_rng(1), Cache(scale, order)
    pinned = Pinned(accelerator, cache.layout.block_bytes)
    stager, places = Stager(cache.pages, pinned, accelerator), pinned.take(scale.paged_blocks)
    payload = scale.paged_blocks * cache.layout.block_bytes
    whole = torch.empty(payload, dtype=torch.uint8, device=scale.device)
    host = accelerator.pinned(1, payload)[0]

    def gather() -> None:
        blocks = random.permutation(cache.blocks)[: scale.paged_blocks]
        accelerator.wait(stager.gather(blocks, places, accelerator.mark()))

    def scatter() -> None:
        blocks = random.permutation(cache.blocks)[: scale.paged_blocks]
        accelerator.wait(stager.scatter(places, blocks, accelerator.mark()))

    def out() -> None:
        host.copy_(whole, non_blocking=True)
        scale.synchronize()

    def back() -> None:
        whole.copy_(host, non_blocking=True)
        scale.synchronize()

    detail[f"gather {order}"] = cell(payload, *in_turn(out, gather, scale.samples))
    detail[f"scatter {order}"] = cell(payload, *in_turn(back, scatter, scale.samples))


# --- VRAM to VRAM ---------------------------------------------------------------------------------------------------------


def own(connection: Connection, table_path: str, scale: Scale) -> None:
    """The owner: a KV cache all of whose blocks are complete, and its agent, until the other side closes."""
    from kvshare.transport.nixl import NixlTransport

    cache = Cache(scale, "LBHNC", shared=True)
    slots = np.arange(cache.blocks)
    table = DeviceTable.create(table_path, cache.blocks, cache.layout.block_bytes)
    table.begin(slots)
    table.finish(slots, table.generations(slots))
    with NixlTransport() as transport:
        memory = transport.register_memory(described(cache, scale.device, table), cache.blocks)
        scale.synchronize()
        connection.send((memory, table.generations(slots), list(cache.tensors.values())))
        try:
            connection.recv()
        except EOFError:
            pass
    table.unlink()


def described(cache: Cache, device: torch.device, table: DeviceTable) -> ProcessMemory:
    layout, process = cache.layout, os.getpid()
    columns = [tuple(column.tolist()) for column in (layout.bases, layout.strides, layout.page_bytes)]
    kind = "DRAM" if device.type == "cpu" else "VRAM"
    started, space = processes.started(process), processes.pid_space()
    return ProcessMemory(process, started, space, kind, device.index or 0, *columns, table.table_address, STRIDE)


@contextmanager
def owner(scale: Scale) -> Iterator[tuple[RegionDescription, Any, list[torch.Tensor]]]:
    """Its region, the generations of its blocks, and its tensors mapped here."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="kvb-", dir="/dev/shm") as folder:
        path = str(Path(folder) / "table")
        process = context.Process(target=own, args=(theirs, path, scale), daemon=True)
        process.start()
        theirs.close()
        try:
            memory, generations, tensors = ours.recv()
            slot_bytes = int(sum(memory.page_bytes))
            yield (
                RegionDescription("owner", REGION, slot_bytes, len(generations), "", "", path, "", DEVICE, memory),
                generations,
                tensors,
            )
        finally:
            ours.close()
            process.join(20.0)
            if process.is_alive():
                process.kill()


def measure_reads(scale: Scale, detail: dict[str, Any]) -> None:
    from kvshare.transport.nixl import NixlTransport

    with owner(scale) as (description, generations, tensors), NixlTransport() as transport:
        mine = Cache(scale, "LBHNC")
        theirs = Cache.__new__(Cache)
        theirs.tensors, theirs.blocks = {str(i): tensor for i, tensor in enumerate(tensors)}, mine.blocks
        found = [page for tensor in tensors for page in pages_of(tensor, mine.blocks)[0]]
        theirs.layout = Layout(*(np.array(column, np.uint64) for column in zip(*found, strict=True)), "peer", "")
        theirs.pages = PageRows(theirs.layout, theirs.tensors)
        register(transport, mine, scale.device)
        for blocks in scale.read_blocks:
            for way in ("neighbours", "scattered"):
                measure_read(scale, transport, (description, generations), (theirs, mine), blocks, way, detail)


def register(transport: Any, cache: Cache, device: torch.device) -> None:
    """Tell the transport of the memory that blocks will land in."""
    kind = "DRAM" if device.type == "cpu" else "VRAM"
    for storage in {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in cache.tensors.values()
    }.values():
        transport.register_targets(storage.data_ptr(), storage.nbytes(), kind, device.index or 0)


def measure_read(
    scale: Scale, transport: Any, source: tuple[RegionDescription, Any], caches: tuple[Cache, Cache], blocks: int, way: str,
    detail: dict[str, Any],
) -> None:  # fmt: skip
    description, generations = source
    theirs, mine = caches
    payload, random = blocks * mine.layout.block_bytes, np.random.default_rng(blocks)
    one = torch.empty(payload, dtype=torch.uint8, device=scale.device)
    other = torch.empty_like(one)
    label = f"{payload >> 20} MiB, {way}"
    progress(f"VRAM to VRAM, {label}")

    def chosen() -> tuple[Any, Any]:
        if way == "scattered":
            return random.permutation(mine.blocks)[:blocks], random.permutation(mine.blocks)[:blocks]
        starts = random.integers(0, mine.blocks - blocks + 1, 2)
        return starts[0] + np.arange(blocks), starts[1] + np.arange(blocks)

    def copy() -> None:
        other.copy_(one)
        scale.synchronize()

    def read() -> None:
        slots, targets = chosen()
        request = ReadRequest(slots, generations[slots], np.zeros(blocks, np.uint64), mine.layout.targets(targets), SECONDS)
        completion = transport.read(description, request).wait()
        if completion is None or not completion.ok:
            raise SystemExit(f"a read failed: {completion}")

    def kernels() -> None:
        slots, targets = chosen()
        rows = [torch.from_numpy(cache.pages.rows(ids)).to(scale.device) for cache, ids in ((theirs, slots), (mine, targets))]
        mine.pages.view.index_copy_(0, rows[1], theirs.pages.view.index_select(0, rows[0]))
        scale.synchronize()

    detail[f"read {label}"] = cell(payload, *in_turn(copy, read, scale.samples))
    detail[f"CUDA IPC and two kernels {label}"] = cell(payload, *in_turn(copy, kernels, scale.samples))
    slots, targets = chosen()
    completion = transport.read(
        description, ReadRequest(slots, generations[slots], np.zeros(blocks, np.uint64), mine.layout.targets(targets), SECONDS)
    ).wait()
    if completion is None or not torch.equal(digests(theirs.pages, slots), digests(mine.pages, targets)):
        raise SystemExit("what was read is not what the owner has")


# --- figures --------------------------------------------------------------------------------------------------------------


def summarise(detail: dict[str, Any]) -> dict[str, tuple[float, str]]:
    figures = {}
    for name, kind in (
        ("gpu_gather_over_pcie", "gather "),
        ("gpu_scatter_over_pcie", "scatter "),
        ("vram_to_vram_over_copy", "read "),
    ):
        ratios = [value["ratio"] for label, value in detail.items() if label.startswith(kind)]
        if ratios:
            figures[name] = (min(ratios), "ratio")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few repetitions, for development: the figures are rough")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU: shows that this runs; its figures mean nothing")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("bench_gpu_transport needs a GPU, torch sees none here", file=sys.stderr)
        raise SystemExit(SKIPPED)
    chosen = scale(options.rehearse, options.quick)
    detail: dict[str, Any] = {}
    for order in ORDERS:
        measure_paging(chosen, order, detail)
    try:
        measure_reads(chosen, detail)
    except (ImportError, EOFError, TransportError) as error:  # EOFError: the owner has ended, and said why
        progress(f"no figure VRAM to VRAM: {error}")
    for label, value in detail.items():
        progress(f"{label}: {value['ours_gb_per_second']} of {value['limit_gb_per_second']} GB/s, {value['ratio']}")
    if options.rehearse:
        progress("a rehearsal: no figures")
        return
    detail["device"] = torch.cuda.get_device_name(0)
    report(summarise(detail), detail, options.json)


if __name__ == "__main__":
    main()
