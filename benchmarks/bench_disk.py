"""What the disk region reaches of its file system's limit, what encryption costs, and how long a start takes.

A region of 512 MiB in a folder on a real disk (never a memory file system), in slots of 2 MiB (a block of 16 tokens of an
8B-class model), of 256 KiB and of 64 KiB (reported only), in turn. Batches of neighbouring slots, as large and as many in
flight as a node demotes and promotes: ours is the whole `DiskRegion.write`, with `begin` and `finish`, headers included, and
the whole `DiskRegion.read`, with the checksum of every block. The limit is a plain loop of ``pwritev`` or ``preadv`` of as many
bytes at a time on a file of the same size beside it, direct as ours is, in one thread and in four, whichever is faster. Plain,
ours and ours sealed take turns, round by round; figures are medians of the rounds' ratios, of the slot size that does worse.

A start: the table of 1,000,000 slots of 64 KiB, all complete, is read, checked and adopted by a `Store`, in a fresh process on
one core; what the page cache has of the table is dropped before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, progress, report, summary

from kvshare import disk_files, keys, native, promotion
from kvshare.config import Settings
from kvshare.disk import DiskFolder, DiskRegion
from kvshare.mapping import Mapping
from kvshare.region import HEADER
from kvshare.store import Store
from kvshare.tiers import DISK_BATCH_BYTES
from kvshare.vault import Vault

HERE = Path(__file__).resolve().parent
SIZE = 512 << 20
BATCH_BYTES = {"write": DISK_BATCH_BYTES, "read": promotion.BATCH_BYTES}
THREADS = Settings().disk_threads
SLOT_SIZES = {"2 MiB": 2 << 20, "256 KiB": 256 << 10, "64 KiB": 64 << 10}
REPORTED_ONLY = "64 KiB"
SCAN_SLOTS, SCAN_SLOT_BYTES = 1_000_000, 64 << 10
FAMILY = keys.prefix(b"benchmark-family", tenant=keys.tenant_tag("benchmark"))
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


def disk_folder() -> tuple[Path, str]:
    """A fresh folder on a disk, and its file system's type."""
    for base in (Path(tempfile.gettempdir()), HERE):
        kind = file_system(base.resolve())
        if kind not in MEMORY_FILE_SYSTEMS and shutil.disk_usage(base).free > 6 * SIZE:
            return Path(tempfile.mkdtemp(prefix="kvshare-bench-disk-", dir=base)), kind
    print(f"no disk with {6 * SIZE >> 20} MiB of room under {tempfile.gettempdir()} or {HERE}: set TMPDIR", file=sys.stderr)
    raise SystemExit(77)


def file_system(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    best = max((mount for mount in mounts if path.is_relative_to(mount[0])), key=lambda mount: len(mount[0]))
    return best[1]


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Plain:
    """The limit: a file of `SIZE`, moved batch by batch."""

    def __init__(self, path: Path, memory: Mapping) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, SIZE)
        self._memory = memory
        self._pool = ThreadPoolExecutor(THREADS)

    def run(self, write: bool, threads: int) -> None:
        # Each thread its own batches, as ours has them.
        list(self._pool.map(lambda first: self._part(write, first, threads), range(threads)))

    def _part(self, write: bool, first: int, threads: int) -> None:
        call, size = os.pwritev if write else os.preadv, BATCH_BYTES["write" if write else "read"]
        for at in range(first * size, SIZE, threads * size):
            view = native.view(self._memory.address + at, size, writable=True)
            if call(self._fd, [view], at) != size:
                raise SystemExit("the file system moved only a part of a batch")

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._fd)


class Ours:
    """A region of `SIZE`, all of whose slots are written and read, batch by batch."""

    def __init__(self, folder: Path, slot_bytes: int, memory: Mapping, vault: Vault) -> None:
        self._folder = DiskFolder.open(str(folder), "benchmark")
        self.region = DiskRegion.open(self._folder, slot_bytes, SIZE, vault)
        while self.region.grow():
            pass
        count = SIZE // slot_bytes
        self._slot_bytes = slot_bytes
        self._keys = [FAMILY + number.to_bytes(32, "big") for number in range(count)]
        self._addresses = [memory.address + number * slot_bytes for number in range(count)]
        addresses = np.array(self._addresses, np.uint64).reshape(-1, 1)
        seeds = np.array(keys.seeds_of(self._keys), np.uint64)
        self._checksums = native.checksums(addresses, np.full_like(addresses, slot_bytes), seeds).tolist()
        self._generations = [0] * count
        steps = {way: max(1, size // slot_bytes) for way, size in BATCH_BYTES.items()}
        self._batches = {way: [range(at, min(at + step, count)) for at in range(0, count, step)] for way, step in steps.items()}
        self._pool = ThreadPoolExecutor(THREADS)

    def write(self) -> None:
        under_way: deque[tuple[range, list[int], Future[list[bool]]]] = deque()
        for batch in self._batches["write"]:
            odd = [self.region.begin(slot) for slot in batch]
            under_way.append((batch, odd, self._pool.submit(self._write, batch)))
            if len(under_way) > THREADS:
                self._finish(*under_way.popleft())
        while under_way:
            self._finish(*under_way.popleft())

    def _finish(self, batch: range, odd: list[int], kept: Future[list[bool]]) -> None:
        if not all(kept.result()):
            raise SystemExit("a block was not written")
        for slot, generation in zip(batch, odd, strict=True):
            finished = (slot, generation, self._keys[slot], self._slot_bytes, self._checksums[slot])
            self._generations[slot] = self.region.finish(*finished)

    def _write(self, batch: range) -> list[bool]:
        part = slice(batch.start, batch.stop)
        lengths, never = [self._slot_bytes] * len(batch), [0] * len(batch)
        return self.region.write(batch, self._keys[part], lengths, self._checksums[part], self._addresses[part], never)

    def read(self) -> None:
        for statuses in self._pool.map(self._read, self._batches["read"]):
            if statuses.any():
                raise SystemExit(f"a block was not read: {statuses}")

    def _read(self, batch: range) -> native.U8:
        part = slice(batch.start, batch.stop)
        return self.region.read(batch, self._generations[part], self._keys[part], self._addresses[part], self._slot_bytes)

    def close(self) -> None:
        self._pool.shutdown()
        self.region.close(unlink=True)
        self._folder.close()


def measure(folder: Path, slot_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for `SIZE`, by what was done."""
    memory = Mapping.anonymous(SIZE)
    random = np.random.default_rng(slot_bytes).bytes(16 << 20)
    for at in range(0, SIZE, len(random)):
        memory.memory[at : at + len(random)] = random
    (folder / "keys").mkdir(exist_ok=True)
    plain = Plain(folder / "plain", memory)
    ours = Ours(folder / "ours", slot_bytes, memory, Vault.open(""))
    sealed = Ours(folder / "sealed", slot_bytes, memory, Vault.open(str(folder / "keys")))
    runs: list[tuple[str, Callable[[], None]]] = [
        ("plain 1 write", lambda: plain.run(True, 1)),
        ("write", ours.write),
        ("sealed write", sealed.write),
        (f"plain {THREADS} write", lambda: plain.run(True, THREADS)),
        ("plain 1 read", lambda: plain.run(False, 1)),
        ("read", ours.read),
        ("sealed read", sealed.read),
        (f"plain {THREADS} read", lambda: plain.run(False, THREADS)),
    ]
    try:
        for _, run in runs:  # the first write to a place takes longer: its extent is new
            run()
        samples: dict[str, list[float]] = {name: [] for name, _ in runs}
        for turn in range(rounds):
            for name, run in runs if turn % 2 == 0 else reversed(runs):
                samples[name].append(seconds(run))
    finally:
        plain.close()
        ours.close()
        sealed.close()
        (folder / "plain").unlink()
    return samples


def ratios(samples: dict[str, list[float]], way: str) -> tuple[float, float]:
    """Ours over the limit, and sealed over ours, of ``way`` (rates: more is better)."""
    limit = min(samples[f"plain 1 {way}"], samples[f"plain {THREADS} {way}"], key=lambda found: float(np.median(found)))
    ours, sealed = np.array(samples[way]), np.array(samples[f"sealed {way}"])
    return float(np.median(np.array(limit) / ours)), float(np.median(ours / sealed))


def transfers(folder: Path, rounds: int) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    over: dict[str, float] = {"write": 1e9, "read": 1e9}
    cost, detail = -1e9, {}
    for label, slot_bytes in SLOT_SIZES.items():
        samples = measure(folder, slot_bytes, rounds)
        for way in ("write", "read"):
            of_limit, of_ours = ratios(samples, way)
            if label != REPORTED_ONLY:
                over[way], cost = min(over[way], of_limit), max(cost, 1 - of_ours)
            detail[f"{label} {way}"] = {"over_plain": round(of_limit, 4), "encryption_cost": round(1 - of_ours, 4)}
            progress(f"{label} {way}: {detail[f'{label} {way}']}")
        for name, found in samples.items():
            detail[f"{label} {name}, GB/s"] = summary([SIZE / one / 1e9 for one in found])
    figures = {
        "disk_write_over_plain": (over["write"], "ratio"),
        "disk_read_over_plain": (over["read"], "ratio"),
        "disk_encryption_cost": (cost, "share"),
    }
    return figures, detail


# --- a start --------------------------------------------------------------------------------------------------------------


def make_table(folder: Path) -> None:
    """A region with `SCAN_SLOTS` complete blocks, but for their bytes: a start does not read them."""
    owned = DiskFolder.open(str(folder), "benchmark")
    region = DiskRegion.open(owned, SCAN_SLOT_BYTES, SCAN_SLOTS * SCAN_SLOT_BYTES, Vault.open(""))
    data_path, table_path = owned.paths(SCAN_SLOT_BYTES)
    headers = np.zeros(SCAN_SLOTS, HEADER)
    headers["generation"], headers["length"] = (region.epoch << 32) + 2, SCAN_SLOT_BYTES
    random = np.random.default_rng(1)
    names = random.integers(0, 256, (SCAN_SLOTS, keys.KEY_BYTES_MAX), np.uint8)
    names[:, : len(FAMILY)] = np.frombuffer(FAMILY, np.uint8)
    headers["key"], headers["key_bytes"] = names.view(f"V{keys.KEY_BYTES_MAX}").ravel(), keys.KEY_BYTES_MAX
    headers["checksum"] = random.integers(0, 1 << 63, SCAN_SLOTS)
    region.close()
    owned.close()
    head = np.fromfile(table_path, disk_files.DISK_SUPERBLOCK, 1)
    head["available_slots"] = SCAN_SLOTS
    with Path(table_path).open("r+b") as table:
        table.write(head.tobytes())
        table.seek(disk_files.SUPERBLOCK_BYTES)
        table.write(headers.tobytes())
    made = disk_files.BlockFile(table_path, direct=False)
    image = Mapping.anonymous(disk_files.SUPERBLOCK_BYTES)
    image.memory[: head.nbytes] = head.tobytes()
    disk_files.write_superblock(made, image)
    made.sync()
    made.close()
    os.truncate(data_path, SCAN_SLOTS * SCAN_SLOT_BYTES)


def scan(folder: Path) -> None:
    """In a process of its own: one start, its seconds to stdout."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    owned = DiskFolder.open(str(folder), "benchmark")
    with Path(owned.paths(SCAN_SLOT_BYTES)[1]).open("rb") as table:
        os.posix_fadvise(table.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    settings, vault = Settings.load({}, {}), Vault.open("")
    began = time.perf_counter()
    region = DiskRegion.open(owned, SCAN_SLOT_BYTES, SCAN_SLOTS * SCAN_SLOT_BYTES, vault)
    opened = time.perf_counter()
    store = Store(region, settings)
    store.adopt(region.recovered)
    ended = time.perf_counter()
    if len(store) != SCAN_SLOTS:
        raise SystemExit(f"{len(store)} blocks came back of {SCAN_SLOTS}")
    print(json.dumps({"open": opened - began, "adopt": ended - opened, "seconds": ended - began}))
    region.close()
    owned.close()


def starts(folder: Path, rounds: int) -> tuple[float, dict[str, Any]]:
    make_table(folder)
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, __file__, "--scan", str(folder)], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
        progress(f"a start: {found[-1]}")
    detail = {name: summary([one[name] for one in found]) for name in found[0]}
    return float(np.median([one["seconds"] for one in found])), detail


def main() -> None:
    if sys.argv[1:2] == ["--scan"]:
        scan(Path(sys.argv[2]))
        return
    options = arguments(__doc__ or "")
    folder, kind = disk_folder()
    try:
        figures, detail = transfers(folder, 3 if options.quick else 11)
        took, detail["start"] = starts(folder / "scan", 3 if options.quick else 7)
        figures["disk_scan_1m_seconds"] = (took, "s")
    finally:
        shutil.rmtree(folder)
    detail["file_system"] = kind
    report(figures, detail, options.json)


if __name__ == "__main__":
    main()
