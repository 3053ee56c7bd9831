"""How much of the machine's limit the transports reach, verification included.

An owner in a process of its own holds two regions of 256 MiB (slots of 2 MiB and of 32 KiB). Payloads of 2, 16 and 64 MiB are
read from them into pre-touched memory, in three ways: *contiguous* (neighbouring 2 MiB slots to neighbouring places),
*32k* (32 KiB slots, scattered on both sides) and *pages* (2 MiB slots, scattered into pages of 32 KiB, as an engine's layers
are; reported only). Ours is the whole ``Transport.read(...).wait()``: request, copy, generations and checksum of every block.

The limits are measured in turn with it, sample by sample: for shm one ``memcpy`` loop over the same ranges of the same
mapping; for tcp a pair of blocking sockets (cubic, TCP_NODELAY), whose sides know all ranges beforehand and only say "go",
``sendmsg`` and ``recvmsg`` with MSG_WAITALL.

Figures are ours over limit, by medians, the worst payload of each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from common import progress, report

from kvshare import native
from kvshare.places import RegionDescription
from kvshare.slots import Arena
from kvshare.transport.base import ReadRequest, Targets, Transport
from kvshare.transport.choose import host_id
from kvshare.transport.shm import ShmTransport
from kvshare.transport.tcp import TcpTransport
from kvshare.transport.tcp_protocol import tune

SECRET = "only for this benchmark"
POOL_BYTES = 256 << 20
LARGE, SMALL = 2 << 20, 32 << 10
PAYLOADS = (2 << 20, 16 << 20, 64 << 20)
WAYS = ("contiguous", "32k", "pages")
LAYOUTS_BYTES = 192 << 20  # of a payload's layouts together: offsets move through the pools, and no cache holds them all
IOVECS_MAX = 1024
I64 = npt.NDArray[np.int64]


@dataclass
class Layout:
    """Which slots go where: ``slots`` [blocks] of the region of ``slot_bytes``, ``places`` [blocks, pages] in the target pool,
    in units of ``page_bytes``."""

    slot_bytes: int
    page_bytes: int
    slots: I64
    places: I64


@dataclass
class Cell:
    """Samples of one payload, one way, one transport, in seconds."""

    limit: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)


def layout(payload: int, way: str, number: int) -> Layout:
    """The same in both processes."""
    random = np.random.default_rng((payload, WAYS.index(way), number))
    slot_bytes = SMALL if way == "32k" else LARGE
    page_bytes = LARGE if way == "contiguous" else SMALL
    blocks, room = payload // slot_bytes, POOL_BYTES // slot_bytes
    if way == "contiguous":
        starts = random.integers(0, room - blocks + 1, 2)
        return Layout(slot_bytes, page_bytes, starts[0] + np.arange(blocks), (starts[1] + np.arange(blocks)).reshape(-1, 1))
    places = random.permutation(POOL_BYTES // page_bytes)[: payload // page_bytes]
    return Layout(slot_bytes, page_bytes, random.permutation(room)[:blocks], places.reshape(blocks, -1))


def layouts(payload: int) -> int:
    return max(4, LAYOUTS_BYTES // payload)


def all_layouts() -> Iterator[tuple[int, int, str, int]]:
    """Every layout with its number."""
    cells = [(payload, way, number) for payload in PAYLOADS for way in WAYS for number in range(layouts(payload))]
    for code, (payload, way, number) in enumerate(cells):
        yield code, payload, way, number


# --- the owner's process --------------------------------------------------------------------------------------------------


def fill(stem: str, slot_bytes: int) -> tuple[Arena, list[int]]:
    """An arena of `POOL_BYTES` full of random blocks, the checksum of slot i seeded with i; its generations."""
    arena = Arena.open(stem, slot_bytes, POOL_BYTES, 64 << 20)
    while arena.available_slots < arena.slots:
        if not arena.grow():
            raise SystemExit("no room in /dev/shm for 512 MiB")
    random, generations = np.random.default_rng(slot_bytes), []
    length = np.array([slot_bytes], np.uint64)
    for slot in range(arena.slots):
        generation, address = arena.begin(slot), arena.slot_address(slot)
        native.view(address, slot_bytes, writable=True)[:] = random.bytes(slot_bytes)
        checksum = native.checksum(np.array([address], np.uint64), length, slot)
        generations.append(arena.finish(slot, generation, b"slot-%d" % slot, slot_bytes, checksum))
    return arena, generations


def own(stem: str) -> None:
    """The owner: says where its regions are, serves both transports and the raw socket until its input closes."""
    transport = TcpTransport(SECRET, "127.0.0.1")
    arenas, told = {}, {}
    for slot_bytes in (LARGE, SMALL):
        arena, generations = fill(stem, slot_bytes)
        transport.register(arena)
        arenas[slot_bytes] = arena
        told[slot_bytes] = (arena.describe("owner", host_id(), transport.endpoint()), generations)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tune(listener)
        print(json.dumps({"raw": listener.getsockname()[1], "regions": msgspec.to_builtins(told)}), flush=True)
        sock, _ = listener.accept()
    threading.Thread(target=serve_raw, args=(sock, arenas), daemon=True).start()
    sys.stdin.read()
    transport.close()
    for arena in arenas.values():
        arena.close(unlink=True)


def serve_raw(sock: socket.socket, arenas: dict[int, Arena]) -> None:
    ready: dict[int, list[list[memoryview]]] = {}
    for code, payload, way, number in all_layouts():
        plan = layout(payload, way, number)
        arena = arenas[plan.slot_bytes]
        chunk = plan.page_bytes if way == "contiguous" else SMALL
        offsets = plan.slots.repeat(plan.slot_bytes // chunk) * plan.slot_bytes
        offsets = offsets + np.tile(np.arange(plan.slot_bytes // chunk) * chunk, len(plan.slots))
        ready[code] = batches([native.view(arena.data_address + at, chunk) for at in offsets.tolist()])
    while asked := sock.recv(4, socket.MSG_WAITALL):
        for batch in ready[struct.unpack("<I", asked)[0]]:
            total = sum(len(one) for one in batch)
            sent = sock.sendmsg(batch)
            if sent < total:  # a blocking socket sends all of it; anything else would need another loop
                raise SystemExit("the raw socket sent only a part")


def batches(views: list[memoryview]) -> list[list[memoryview]]:
    return [views[at : at + IOVECS_MAX] for at in range(0, len(views), IOVECS_MAX)]


# --- the reader's process -------------------------------------------------------------------------------------------------


class Reader:
    """All requests and raw plans, made beforehand, and the two ways to carry them out."""

    def __init__(self, raw_port: int, regions: dict[str, Any]) -> None:
        self.pool = np.ones(POOL_BYTES, np.uint8)
        self.descriptions, self.generations = {}, {}
        for slot_bytes, (description, generations) in regions.items():
            self.descriptions[int(slot_bytes)] = msgspec.convert(description, RegionDescription)
            self.generations[int(slot_bytes)] = np.array(generations, np.uint64)
        self.shm, self.tcp = ShmTransport(host_id()), TcpTransport(SECRET)
        self._sock = socket.create_connection(("127.0.0.1", raw_port))
        tune(self._sock)

    def ours(self, transport: Transport, payload: int, way: str, number: int) -> Callable[[], None]:
        plan = layout(payload, way, number)
        slots, generations = plan.slots.astype(np.int64), self.generations[plan.slot_bytes][plan.slots]
        page_bytes = np.full(plan.places.shape[1], plan.page_bytes, np.uint64)
        addresses = np.uint64(native.address_of(self.pool)) + plan.places.astype(np.uint64) * np.uint64(plan.page_bytes)
        request = ReadRequest(slots, generations, slots.astype(np.uint64), Targets(addresses, page_bytes), 10.0)
        description = self.descriptions[plan.slot_bytes]

        def run() -> None:
            completion = transport.read(description, request).wait()
            if completion is None or not completion.ok:
                raise SystemExit(f"a read failed: {completion}")

        return run

    def raw(self, code: int, payload: int, way: str, number: int) -> Callable[[], None]:
        plan = layout(payload, way, number)
        pool = self.pool.data
        places = (plan.places.reshape(-1) * plan.page_bytes).tolist()
        ready = batches([pool[at : at + plan.page_bytes] for at in places])
        asked, sock = struct.pack("<I", code), self._sock

        def run() -> None:
            sock.sendall(asked)
            for batch in ready:
                left = sum(len(one) for one in batch)
                if sock.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0] != left:
                    raise SystemExit("the raw socket received only a part")

        return run

    def memcpy(self, payload: int, way: str, number: int) -> Callable[[], None]:
        plan = layout(payload, way, number)
        region = self.shm.region_of(self.descriptions[plan.slot_bytes])
        pages = np.arange(plan.places.shape[1]) * plan.page_bytes
        offsets = plan.slots[:, None] * plan.slot_bytes + pages
        sources = np.uint64(region.data_address) + offsets.astype(np.uint64).reshape(-1)
        places = (plan.places * plan.page_bytes).astype(np.uint64).reshape(-1)
        targets = np.uint64(native.address_of(self.pool)) + places
        lengths = np.full(len(targets), plan.page_bytes, np.uint64)
        return lambda: native.copy_ranges(targets, sources, lengths)

    def close(self) -> None:
        self._sock.close()
        self.shm.close()
        self.tcp.close()


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(reader: Reader, quick: bool) -> dict[str, dict[str, Cell]]:
    """Cells by transport, then by way and payload."""
    cells: dict[str, dict[str, Cell]] = {"shm": {}, "tcp": {}}
    codes = {(payload, way, number): code for code, payload, way, number in all_layouts()}
    for payload in PAYLOADS:
        samples = (40 if quick else 400) * PAYLOADS[0] // payload + (8 if quick else 40)
        for way in WAYS:
            progress(f"{payload >> 20} MiB, {way}")
            numbers = range(layouts(payload))
            pairs = {
                "shm": [(reader.memcpy(payload, way, n), reader.ours(reader.shm, payload, way, n)) for n in numbers],
                "tcp": [
                    (reader.raw(codes[payload, way, n], payload, way, n), reader.ours(reader.tcp, payload, way, n))
                    for n in numbers
                ],
            }
            for name, runs in pairs.items():
                cell = cells[name][f"{way} {payload >> 20} MiB"] = Cell()
                for limit, ours in runs:  # warm: page tables, connections, socket buffers
                    limit(), ours()
                for sample in range(samples):
                    # Never the same memory in succession: what one has brought into the cache would serve the other.
                    limit, ours = runs[sample % len(runs)][0], runs[(sample + len(runs) // 2) % len(runs)][1]
                    if sample % 2:
                        cell.ours.append(timed(ours))
                    cell.limit.append(timed(limit))
                    if sample % 2 == 0:
                        cell.ours.append(timed(ours))
    return cells


def summarise(cells: dict[str, dict[str, Cell]]) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    figures: dict[str, tuple[float, str]] = {}
    detail: dict[str, Any] = {}
    for name, by_cell in cells.items():
        worst: dict[str, float] = {}
        for label, cell in by_cell.items():
            payload = int(label.split()[1]) << 20
            limit, ours = float(np.median(cell.limit)), float(np.median(cell.ours))
            way = label.split()[0]
            worst[way] = min(worst.get(way, 1e9), limit / ours)
            detail[f"{name} {label}"] = {
                "limit_gb_per_second": round(payload / limit / 1e9, 3),
                "ours_gb_per_second": round(payload / ours / 1e9, 3),
                "ratio": round(limit / ours, 4),
                "samples": len(cell.ours),
            }
        for way in WAYS:
            figures[f"{name}_{way}_ratio"] = (worst[way], "ratio")
    return figures, detail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few repetitions, for development: the figures are rough")
    parser.add_argument("--own", metavar="STEM", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.own:
        own(options.own)
        return
    stem = f"/dev/shm/kvshare-bench-{os.getpid()}"
    command = [sys.executable, __file__, "--own", stem]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    try:
        told = json.loads(owner.stdout.readline())
        reader = Reader(told["raw"], told["regions"])
        try:
            figures, detail = summarise(measure(reader, options.quick))
        finally:
            reader.close()
    finally:
        owner.stdin.close()
        owner.wait(30)
        for left in Path(stem).parent.glob(f"{Path(stem).name}-*"):
            left.unlink(missing_ok=True)
    detail["verification"] = "included: generations and xxh3 of every block"
    for label, value in detail.items():
        progress(f"{label}: {value}")
    report(figures, detail, options.json)


if __name__ == "__main__":
    main()
