"""Blocks read out of memory that its owner overwrites at will, in a thousand seeded runs: no wrong byte is ever accepted, no
read hangs, nothing is left over.

Each run has a donor of its own (`overwriter`), a process that rewrites the blocks of a small device region in random pieces and
tells which are complete. This process reads blocks it was told of, now and long ago, into memory cut in its own ways, cancels
some reads, and verifies every accepted byte, which its key tells; once more before the next read, since nothing may be written
after a completion. In half of the runs the donor is killed (-9) at a random moment, in the others it is told to end; reads go
on past its death. One run in ten reads through NIXL, whose donors have an agent, the others by the process transport; one
transport of each lives through all runs, as a node's does.

A read that takes longer than two seconds hangs (the transports are allowed one without progress). Left over is what this
process has in the end, all closed, and did not have before: descriptors, threads, mappings of tables, NIXL registrations.

Choices follow from the seed, the moments at which processes meet do not: ``--seed N`` runs one seed again, and again.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import Failed, progress, report
from overwriter import TOLD, content, donate

from kvshare import native
from kvshare.config import Settings
from kvshare.places import RegionDescription
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets, Transport
from kvshare.transport.nixl import NixlTransport, available
from kvshare.transport.nixl_agent import Agent
from kvshare.transport.nixl_landing import FREE_SLABS_MAX
from kvshare.transport.process import ProcessTransport

RUNS, RUNS_QUICK = 1000, 40
NIXL_EVERY = 10
WARM_UP_SEEDS = (0, 1, 10, 11)  # both transports, with and without a kill
READS, READS_AFTER = 200, 10  # of a run whose donor is not killed; and after its death, or while it ends
BLOCKS_MAX = 8  # of a read
REQUEST_SECONDS = 1.0  # longest time without progress
HANG_SECONDS = 2.0
RUN_SECONDS_MAX = 60.0  # a run that is not over then ends all of it
KILL_SECONDS_MAX = 0.15  # after the donor has described itself: some 200 reads
SETTLE_SECONDS = 5.0  # for what ends by itself
SLAB_SIZES = 2  # of landing memory that reads as small as ours need; `FREE_SLABS_MAX` of each are kept
HOST = "the host of this benchmark"
NODES = 4  # names that donors share, one after the other


class Reader:
    """Both transports, and what was found by them."""

    def __init__(self, folder: Path, context: ForkServerContext, by_nixl: bool) -> None:
        self._folder, self._context = folder, context
        self.transports: dict[str, Transport] = {"process": ProcessTransport()}
        self.nixl = NixlTransport(HOST) if by_nixl else None
        if self.nixl is not None:
            self.transports["nixl"] = self.nixl
        self.statuses = {name: Counter[str]() for name in self.transports}
        self.runs, self.slowest = Counter[str](), dict.fromkeys(self.transports, (0.0, 0))  # seconds, seed
        self.wrong: list[int] = []  # seeds, one for each wrong block
        self.hangs: list[int] = []  # likewise, for each such read
        self.kept = 0  # registrations of targets that outlived their deregistration

    def run(self, seed: int) -> None:
        watch = threading.Timer(RUN_SECONDS_MAX, _give_up, (seed,))
        watch.start()
        name = "nixl" if self.nixl is not None and seed % NIXL_EVERY == 0 else "process"
        kill = seed // NIXL_EVERY % 2 == 1
        node = f"node-{seed % NODES}"
        wrong, hangs = len(self.wrong), len(self.hangs)
        try:
            with self._donor(seed, node, name == "nixl") as (donor, pipe):
                run = Run(self, seed, name, pipe)
                killer = threading.Timer(run.chance.uniform(0, KILL_SECONDS_MAX), os.kill, (donor.pid, signal.SIGKILL))
                with self._registered(run):
                    if kill:
                        killer.start()
                        while killer.is_alive():
                            run.read(1)
                        killer.join()
                    else:
                        run.read(READS)
                        pipe.close()  # it ends
                    run.read(READS_AFTER)
                    donor.join()
                    run.read(READS_AFTER)
                if donor.exitcode != (-signal.SIGKILL if kill else 0):
                    raise Failed(f"seed {seed}: its donor ended with exit code {donor.exitcode}, see above")
            if run.chance.random() < 0.5:
                self.transports[name].forget(node)
        finally:
            watch.cancel()
            watch.join()
        self.runs[f"{name}, {'killed' if kill else 'ended'}"] += 1
        if len(self.wrong) > wrong or len(self.hangs) > hangs:
            progress(f"seed {seed} ({name}): {len(self.wrong) - wrong} wrong blocks, {len(self.hangs) - hangs} hangs")

    def close(self) -> None:
        for transport in self.transports.values():
            transport.close()

    @contextlib.contextmanager
    def _donor(self, seed: int, node: str, by_nixl: bool) -> Iterator[tuple[BaseProcess, Connection]]:
        ours, theirs = self._context.Pipe()
        table = self._folder / f"{seed}"
        host = HOST if seed % 3 else ""  # else its table is not mapped where there is another way
        donor = self._context.Process(target=donate, args=(theirs, seed, node, host, str(table), by_nixl), daemon=True)
        donor.start()
        theirs.close()
        try:
            yield donor, ours
        finally:
            ours.close()
            donor.join()
            donor.close()
            table.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _registered(self, run: Run) -> Iterator[None]:
        """In half of the runs through NIXL, blocks land directly in their targets, as far as the lane allows."""
        if self.nixl is None or run.name != "nixl" or run.chance.random() < 0.5:
            yield
            return
        place = native.address_of(run.memory), run.memory.nbytes
        self.nixl.register_targets(*place)
        try:
            yield
        finally:
            registered = self.nixl.registrations
            self.nixl.deregister_targets(*place)
            self.kept += self.nixl.registrations - (registered - 1)


class Run:
    """Reads of one donor's blocks. ``memory`` [blocks, bytes] is where they go."""

    def __init__(self, reader: Reader, seed: int, name: str, pipe: Connection) -> None:
        self.name, self.seed, self.chance = name, seed, random.Random(seed)
        self._reader, self._transport, self._pipe = reader, reader.transports[name], pipe
        try:
            self._region = msgspec.msgpack.decode(pipe.recv_bytes(), type=RegionDescription)
        except EOFError as error:
            raise Failed(f"seed {seed}: its donor has died by itself, see above") from error
        assert self._region.memory is not None
        self._page_bytes = self._region.memory.page_bytes
        self.memory = np.empty((BLOCKS_MAX, self._region.slot_bytes), np.uint8)
        self._told: list[tuple[int, int, int]] = []  # key, slot, generation
        self._latest: dict[int, tuple[int, int, int]] = {}  # by slot
        self._accepted: dict[int, int] = {}  # by row of the memory: keys of the last read's blocks

    def read(self, count: int) -> None:
        for _ in range(count):
            self._hear()
            if not self._told:
                return  # killed before its first words
            self._verify()  # what was accepted last time is still what it was
            asked = [self._choose() for _ in range(self.chance.randint(1, BLOCKS_MAX))]
            rows = self.chance.sample(range(BLOCKS_MAX), len(asked))
            self.memory.fill(0xEE)
            completion = self._read_once(asked, rows)
            found = Counter(BlockStatus(status).name for status in completion.statuses.tolist())
            self._reader.statuses[self.name].update(found)
            pairs = zip(rows, asked, completion.statuses.tolist(), strict=True)
            self._accepted = {row: key for row, (key, _, _), status in pairs if status == BlockStatus.OK}
            self._verify()
        self._accepted.clear()

    def _read_once(self, asked: list[tuple[int, int, int]], rows: list[int]) -> Completion:
        """One read, waited for in one of the ways there are, now and then cancelled."""
        chance = self.chance
        seeds = np.zeros(len(asked), np.uint64)  # nobody asks for them
        slots, generations = np.array([one[1] for one in asked], np.int64), np.array([one[2] for one in asked], np.uint64)
        request = ReadRequest(slots, generations, seeds, self._targets(rows), REQUEST_SECONDS)
        began = time.monotonic()
        transfer = self._transport.read(self._region, request)
        if chance.random() < 0.03:
            transfer.cancel()
        completion = transfer.wait(None if chance.random() < 0.5 else RUN_SECONDS_MAX)
        seconds = time.monotonic() - began
        assert completion is not None  # the watch would have ended us
        self._reader.slowest[self.name] = max(self._reader.slowest[self.name], (seconds, self.seed))
        if seconds > HANG_SECONDS:
            self._reader.hangs.append(self.seed)
        return completion

    def _targets(self, rows: list[int]) -> Targets:
        """Cut as the donor's pages, not at all, or anywhere."""
        length = self._region.slot_bytes
        odd = self.chance.randrange(1, length)
        cuts = self.chance.choice([list(self._page_bytes), [length], [odd, length - odd]])
        page_bytes = np.array(cuts, np.uint64)
        blocks = np.uint64(native.address_of(self.memory)) + np.array(rows, np.uint64) * np.uint64(length)
        return Targets(blocks[:, None] + (np.cumsum(page_bytes) - page_bytes)[None, :], page_bytes)

    def _choose(self) -> tuple[int, int, int]:
        """A block that was told of, most often one that is still there as far as we know."""
        if self.chance.random() < 0.7:
            return self._latest[self.chance.choice(list(self._latest))]
        return self.chance.choice(self._told)

    def _hear(self) -> None:
        """Take in what the donor has told; wait for its first words, if it lives."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while not self._pipe.closed and (not self._told or self._pipe.poll()):
                told = np.frombuffer(self._pipe.recv_bytes(), TOLD).tolist()
                self._told += told
                self._latest |= {one[1]: one for one in told}

    def _verify(self) -> None:
        wrong = [row for row, key in self._accepted.items() if not np.array_equal(self.memory[row], content(key, self._length))]
        self._reader.wrong += [self.seed] * len(wrong)
        for row in wrong:
            del self._accepted[row]

    @property
    def _length(self) -> int:
        return self._region.slot_bytes


def _give_up(seed: int) -> None:
    progress(f"seed {seed}: not over after {RUN_SECONDS_MAX:.0f} s")
    faulthandler.dump_traceback()
    os._exit(1)


def resources(folder: Path) -> Counter[str]:
    """What this process has open."""
    gc.collect()
    tables = Path("/proc/self/maps").read_text().count(str(folder))
    return Counter(
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        mappings=tables,
        registrations=sum(one.registrations for one in gc.get_objects() if type(one) is Agent),
    )


def left_over(folder: Path, before: Counter[str]) -> Counter[str]:
    """What there is more than ``before``, once it no longer shrinks to nothing by itself."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (more := resources(folder) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return more


def fork_server() -> ForkServerContext:
    """Starts donors in milliseconds: it has imported all that they need, torch (by way of NIXL) included."""
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench_overwrite", "nixl._bindings"])
    return context


def measure(folder: Path, seeds: list[int]) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    reason = available()
    context = fork_server()
    warm_up = Reader(folder, context, not reason)
    for seed in WARM_UP_SEEDS:  # what the libraries and the fork server keep for ever is there afterwards
        warm_up.run(seed)
    warm_up.close()
    before = resources(folder)
    reader = Reader(folder, context, not reason)
    for number, seed in enumerate(seeds):
        reader.run(seed)
        if number % 50 == 49:
            progress(f"{number + 1} runs: {len(reader.wrong)} wrong blocks, {len(reader.hangs)} hangs")
    kept = 0 if reader.nixl is None else reader.nixl.registrations  # open, but nothing is registered by us
    reader.close()
    more = left_over(folder, before)
    more["registrations"] += max(reader.kept, kept - SLAB_SIZES * FREE_SLABS_MAX, 0)
    figures = {
        "overwrite_wrong_blocks": (float(len(reader.wrong)), "blocks"),
        "overwrite_hangs": (float(len(reader.hangs)), "reads"),
        "overwrite_leaked": (float(sum(more.values())), "things"),
    }
    detail = {
        "runs": dict(reader.runs),
        "blocks": {name: dict(found) for name, found in reader.statuses.items()},
        "slowest_read": {name: {"s": round(took, 4), "seed": seed} for name, (took, seed) in reader.slowest.items()},
        "request_s": REQUEST_SECONDS,
        "seeds_wrong": sorted(set(reader.wrong)),
        "seeds_hang": sorted(set(reader.hangs)),
        "before": dict(before),
        "leaked": dict(more),
        "nixl": reason or f"registrations of landing memory before the end: {kept}",
    }
    return figures, detail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few runs, for development")
    parser.add_argument("--seed", type=int, help="run this seed only")
    options = parser.parse_args()
    seeds = list(range(RUNS_QUICK if options.quick else RUNS)) if options.seed is None else [options.seed]
    folder = Path(tempfile.mkdtemp(prefix="kvshare-bench-", dir=Settings().shm_dir))
    try:
        figures, detail = measure(folder, seeds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for label, value in detail.items():
        progress(f"{label}: {value}")
    report(figures, detail, options.json)


if __name__ == "__main__":
    main()
