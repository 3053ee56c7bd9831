"""What our contract costs on top of NIXL: verified reads against NIXL's own Python API moving the same ranges.

An owner in a process of its own holds 2,048 slots of 128 KiB, a block of 64 KiB in each: as a device region (generations in a
table that is mapped here) and as a host region (header table and checksums, read through NIXL as well). Payloads of 64 KiB,
2 MiB and 64 MiB, random slots to random places of a registered, pre-touched pool.

*Ours* is ``NixlTransport.read(...).wait()``: the request's arrays to an accepted `Completion`. *Bare* does the same ranges with
the same wheel and an agent of its own: from the same arrays of slots and places it makes the descriptors of both sides and the
transfer, posts it, polls it to its end and releases it. *Prepared* has the lists of both sides prepared for good and picks from
them by index, which is the least that NIXL can be asked to do; *memcpy* is one loop over as many ranges within this process.
All are taken in turn, sample by sample, never the same memory in succession.

The figure is bare over ours for the device region, by medians, at the worst payload: both end with bytes in place, ours with
generations compared before and after too. Detail has the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from common import arguments, progress, report

from kvshare import native, processes
from kvshare.device import DeviceTable
from kvshare.places import DEVICE, ProcessMemory, RegionDescription
from kvshare.slots import Region
from kvshare.transport.base import ReadRequest, Targets
from kvshare.transport.choose import host_id
from kvshare.transport.nixl import NixlTransport, available

SLOTS, SLOT_BYTES, BLOCK_BYTES = 2048, 128 << 10, 64 << 10
PLACES = 4096  # of BLOCK_BYTES, in the reader's pool
PAYLOADS = (64 << 10, 2 << 20, 64 << 20)
LAYOUTS = 24  # of each payload: no cache holds what they touch together
SAMPLES = {64 << 10: 4000, 2 << 20: 600, 64 << 20: 60}
I64 = npt.NDArray[np.int64]


# --- the owner's process --------------------------------------------------------------------------------------------------


def own(path: str) -> None:
    """Says where its regions are and how they can be read; ends with its input."""
    pool, random = np.ones(SLOTS * SLOT_BYTES, np.uint8), np.random.default_rng(1)
    pool.reshape(SLOTS, SLOT_BYTES)[:] = np.frombuffer(random.bytes(SLOT_BYTES), np.uint8)
    table = DeviceTable.create(path, SLOTS, BLOCK_BYTES)
    slots = np.arange(SLOTS)
    table.begin(slots)
    table.finish(slots, table.generations(slots))
    region = Region.anonymous(SLOT_BYTES, SLOTS)
    for slot in range(SLOTS):
        generation, address = region.begin(slot), region.slot_address(slot)
        native.view(address, BLOCK_BYTES, writable=True)[:] = random.bytes(BLOCK_BYTES)
        checksum = native.checksum(np.array([address], np.uint64), np.array([BLOCK_BYTES], np.uint64), slot)
        region.finish(slot, generation, b"slot-%d" % slot, BLOCK_BYTES, checksum)
    pid = os.getpid()
    who = (pid, processes.started(pid), processes.pid_space(), "DRAM", 0)
    memory = ProcessMemory(*who, (native.address_of(pool),), (SLOT_BYTES,), (BLOCK_BYTES,), 0, 0)
    with NixlTransport() as transport:
        transport.register(region)
        memory = transport.register_memory(memory, SLOTS, table)
        device = RegionDescription("engine", 1, BLOCK_BYTES, SLOTS, host_id(), "", path, "", DEVICE, memory)
        host = msgspec.structs.replace(region.describe("owner", "", ""), memory=transport.memory_of(region))
        told = {
            "device": (msgspec.json.encode(device).decode(), table.generations(slots).tolist()),
            "host": (msgspec.json.encode(host).decode(), region.generations(slots).tolist()),
        }
        print(json.dumps(told), flush=True)
        sys.stdin.read()
    table.unlink()


# --- the reader's process -------------------------------------------------------------------------------------------------


class Bare:
    """NIXL's own Python API, with an agent of its own that has no progress thread."""

    def __init__(self, pool: npt.NDArray[np.uint8], memory: ProcessMemory) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        from kvshare.transport.nixl_agent import unpacked

        self._agent = agent = nixl_agent(f"bare-{os.getpid()}", nixl_agent_config(enable_prog_thread=False))
        self._local, self._remote = native.address_of(pool), memory.bases[0]
        agent.register_memory([(self._local, pool.nbytes, 0, "")], "DRAM")
        pieces = unpacked(memory.metadata).pieces
        self._peer = next(iter({agent.add_remote_agent(piece) for piece in pieces}))
        local = np.array([[self._local, BLOCK_BYTES, 0, BLOCK_BYTES, PLACES]], np.uint64)
        remote = np.array([[self._remote, BLOCK_BYTES, 0, SLOT_BYTES, SLOTS]], np.uint64)
        self._local_list = agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM")
        self._remote_list = agent.prep_xfer_dlist(self._peer, remote, "DRAM")

    def fresh(self, slots: I64, places: I64) -> Callable[[], None]:
        agent = self._agent

        def rows(base: int, stride: int, indices: I64) -> npt.NDArray[np.uint64]:
            made = np.zeros((len(indices), 3), np.uint64)
            made[:, 0] = np.uint64(base) + indices.astype(np.uint64) * np.uint64(stride)
            made[:, 1] = BLOCK_BYTES
            return made

        def run() -> None:
            local = agent.get_xfer_descs(rows(self._local, BLOCK_BYTES, places), "DRAM")
            remote = agent.get_xfer_descs(rows(self._remote, SLOT_BYTES, slots), "DRAM")
            self._finish(agent.initialize_xfer("READ", local, remote, self._peer))

        return run

    def prepared(self, slots: I64, places: I64) -> Callable[[], None]:
        agent, local, remote = self._agent, places.astype(np.int32), slots.astype(np.int32)

        def run() -> None:
            self._finish(agent.make_prepped_xfer("READ", self._local_list, local, self._remote_list, remote))

        return run

    def _finish(self, handle: Any) -> None:
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        handle.release()
        if state != "DONE":
            raise SystemExit(f"the bare transfer ended with {state}")


class Reader:
    def __init__(self, told: dict[str, Any]) -> None:
        self.pool = np.ones(PLACES * BLOCK_BYTES, np.uint8)
        self._pool_address = native.address_of(self.pool)
        self._source = np.ones(SLOTS * SLOT_BYTES, np.uint8)
        self.transport = NixlTransport(host_id())
        self.transport.register_targets(self._pool_address, self.pool.nbytes)
        self.regions = {
            name: (msgspec.json.decode(text, type=RegionDescription), np.array(generations, np.uint64))
            for name, (text, generations) in told.items()
        }
        memory = self.regions["device"][0].memory
        assert memory is not None
        self._bare = Bare(self.pool, memory)

    def ways(self, slots: I64, places: I64) -> dict[str, Callable[[], None]]:
        return {
            "ours": self._ours("device", slots, places),
            "ours_host": self._ours("host", slots, places),
            "bare": self._bare.fresh(slots, places),
            "prepared": self._bare.prepared(slots, places),
            "memcpy": self._memcpy(slots, places),
        }

    def _ours(self, name: str, slots: I64, places: I64) -> Callable[[], None]:
        description, generations = self.regions[name]
        targets = Targets.strided(self._pool_address, BLOCK_BYTES, places, BLOCK_BYTES)
        request = ReadRequest(slots, generations[slots], slots.astype(np.uint64), targets, 10.0)

        def run() -> None:
            completion = self.transport.read(description, request).wait()
            if completion is None or completion.error:  # empty exactly when all blocks are OK
                raise SystemExit(f"a read failed: {completion}")

        return run

    def _memcpy(self, slots: I64, places: I64) -> Callable[[], None]:
        sources = np.uint64(native.address_of(self._source)) + slots.astype(np.uint64) * np.uint64(SLOT_BYTES)
        targets = np.uint64(self._pool_address) + places.astype(np.uint64) * np.uint64(BLOCK_BYTES)
        lengths = np.full(len(slots), BLOCK_BYTES, np.uint64)
        return lambda: native.copy_ranges(targets, sources, lengths)


def measure(reader: Reader, quick: bool) -> dict[int, dict[str, list[float]]]:
    """Seconds of every sample, by payload and way."""
    found: dict[int, dict[str, list[float]]] = {}
    random = np.random.default_rng(5)
    for payload in PAYLOADS:
        progress(f"{payload >> 10} KiB")
        count = payload // BLOCK_BYTES
        runs = [reader.ways(random.permutation(SLOTS)[:count], random.permutation(PLACES)[:count]) for _ in range(LAYOUTS)]
        names = list(runs[0])
        found[payload] = {name: [] for name in names}
        for ways in runs:
            for run in ways.values():  # warm: lanes, page tables, memory to land in
                run()
        for sample in range(SAMPLES[payload] // (10 if quick else 1)):
            for turn in range(len(names)):
                name = names[(sample + turn) % len(names)]
                run = runs[(sample + 5 * turn) % LAYOUTS][name]
                began = time.perf_counter()
                run()
                found[payload][name].append(time.perf_counter() - began)
    return found


def summarise(found: dict[int, dict[str, list[float]]]) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    detail: dict[str, Any] = {}
    worst = 1e9
    for payload, ways in found.items():
        medians = {name: float(np.median(samples)) for name, samples in ways.items()}
        worst = min(worst, medians["bare"] / medians["ours"])
        detail[f"{payload >> 10} KiB"] = {
            **{f"{name}_us": round(value * 1e6, 2) for name, value in medians.items()},
            **{f"{name}_gb_per_second": round(payload / value / 1e9, 3) for name, value in medians.items()},
            "bare_over_ours": round(medians["bare"] / medians["ours"], 4),
            "prepared_over_ours": round(medians["prepared"] / medians["ours"], 4),
            "bare_over_ours_host": round(medians["bare"] / medians["ours_host"], 4),
            "samples": len(ways["ours"]),
        }
    return {"nixl_over_bare_ratio": (worst, "ratio")}, detail


def main() -> None:
    if sys.argv[1:2] == ["--own"]:
        own(sys.argv[2])
        return
    options = arguments(__doc__)
    if reason := available():
        raise SystemExit(reason)
    path = f"/dev/shm/kvshare-bench-nixl-{os.getpid()}"
    owner = subprocess.Popen(
        [sys.executable, __file__, "--own", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None and owner.stdout is not None
    try:
        reader = Reader(json.loads(owner.stdout.readline()))
        try:
            figures, detail = summarise(measure(reader, options.quick))
            detail["lanes"] = {node: lane for node, (lane, _) in reader.transport.lanes().items()}
        finally:
            reader.transport.close()
    finally:
        owner.stdin.close()
        owner.wait(30)
        Path(path).unlink(missing_ok=True)
    for label, value in detail.items():
        progress(f"{label}: {value}")
    report(figures, detail, options.json)


if __name__ == "__main__":
    main()
