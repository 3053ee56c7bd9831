"""What is committed is there again after ``kill -9``, and nothing else ever is: a hundred seeded rounds of killing a node.

Each round starts a node (`python -m kvshare node`) with an arena smaller than what is saved, and a disk that in some rounds is
smaller too. `recoverer` saves and reads through a real session: saves, evictions, writes to the disk and promotions from it run
side by side. At a random moment the node is killed (-9), in a quarter of the rounds while it drains after a SIGTERM. In a third
of the rounds the arena's files are then removed, as a restart of the machine does; in some, bytes of the disk's files are
damaged. The node starts again on what is left, in some rounds is killed again while it starts, and everything is read back.

Wrong: an accepted block with any byte that its number does not tell, before or after the kill.

Back: of the committed blocks, those that can be read again. Committed is

* in the arena, where its files are kept: what the node had told its sessions that it holds (`Indexed`, without what it told as
  `Dropped`), unless the slot was handed out again before the kill, which the header table says: evicted, and the word of it was
  cut off by the kill;
* on the disk: what the headers of its table name at the moment of the kill, since a block is kept once its header is written.
  Where the disk has room for all, so that nothing leaves it, there must be as many as the node said it keeps when it was asked
  last: what is missing of them counts as committed and lost; and a drain that ended there in good order has kept all that the
  node had told of.

A damaged block is no longer committed: it may be a miss. Nothing is said of a crash of the machine itself, which may lose what
the system has not brought to the disk yet.

Choices follow from the seed, the moments at which processes meet do not: ``--seed N`` runs one round again, and again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
from common import Failed, Fleet, node_status, progress, report
from recoverer import BLOCKS_MAX, CHAIN_BLOCKS_MAX, Ledger, Traffic, number_of

from kvshare.config import MIB
from kvshare.disk_files import DiskFolder
from kvshare.region import HEADER, SUPERBLOCK_BYTES, complete_slots

ROUNDS, ROUNDS_QUICK = 100, 8
ROUND_SECONDS_MAX = 60.0  # a round that is not over then ends all of it
PAGE_BYTES = 4096
BLOCK_BYTES = (8192, 20_008, 64 << 10, 96 << 10)
ARENA_SLOTS = (40, 200)  # as far as an arena of a MiB is not more
KILL_SECONDS_MAX = 0.9
DRAIN_SECONDS = 5.0
DRAIN_KILL_SECONDS_MAX = 2.2  # from SIGTERM on: some drains have ended by then
START_KILL_SECONDS_MAX = 0.6
SCAN_SECONDS = 5.0  # for what lies on the disk to be known after a start
COMMITTED_MIN = 20  # blocks of a round, on average: fewer prove nothing


@dataclass(frozen=True)
class Choices:
    """What a seed says of its round. Sizes in bytes. roomy: the disk holds all that is saved; damaged: so many blocks of it."""

    seed: int
    block_bytes: int
    arena_bytes: int
    disk_bytes: int
    roomy: bool
    admit: str
    sealed: bool
    drain: bool
    kill_seconds: float
    drain_kill_seconds: float
    lose_arena: bool
    damaged: int
    kill_starting: bool
    threads: int

    @staticmethod
    def of(seed: int) -> Choices:
        chance = random.Random(seed)
        block_bytes = chance.choice(BLOCK_BYTES)
        slot_bytes = _slot_bytes(block_bytes)
        arena_bytes = max(MIB, chance.randint(*ARENA_SLOTS) * slot_bytes)
        roomy = chance.random() < 0.6
        disk_bytes = (BLOCKS_MAX + CHAIN_BLOCKS_MAX) * slot_bytes if roomy else int(arena_bytes * chance.uniform(0.5, 1.5))
        return Choices(
            seed,
            block_bytes,
            arena_bytes,
            max(MIB, disk_bytes),
            roomy,
            admit=chance.choice(("all", "all", "used")),
            sealed=chance.random() < 0.25,
            drain=seed % 4 == 1,
            kill_seconds=chance.uniform(0.02, KILL_SECONDS_MAX),
            drain_kill_seconds=chance.uniform(0.0, DRAIN_KILL_SECONDS_MAX),
            lose_arena=seed % 3 == 0,
            damaged=chance.randint(1, 6) if chance.random() < 0.3 else 0,
            kill_starting=chance.random() < 0.2,
            threads=chance.randint(1, 4),
        )

    @property
    def slot_bytes(self) -> int:
        return _slot_bytes(self.block_bytes)

    @property
    def kinds(self) -> list[str]:
        """What was tried in this round, for the sum over all."""
        tried = {
            "draining": self.drain,
            "saving": not self.drain,
            "arena lost": self.lose_arena,
            "disk too small": not self.roomy,
            "disk damaged": bool(self.damaged),
            "killed again while starting": self.kill_starting,
            "sealed": self.sealed,
            f"disk_admit {self.admit}": True,
        }
        return [kind for kind, was in tried.items() if was]


@dataclass
class Found:
    """What all rounds found."""

    rounds: Counter[str] = field(default_factory=Counter)
    committed: Counter[str] = field(default_factory=Counter)  # blocks, by where they were
    back: int = 0
    accepted: int = 0
    wrong: list[int] = field(default_factory=list)  # seeds, one for each wrong block
    lost: Counter[int] = field(default_factory=Counter)  # seed -> blocks that were not back
    said: int = 0  # to be on roomy disks, by nodes' own count when they were asked last
    cut_off: int = 0  # evicted, and the word of it did not come
    slowest: tuple[float, int] = (0.0, 0)  # seconds, seed

    @property
    def share(self) -> float:
        committed = self.committed["in all"]
        return self.back / committed if committed else 0.0


class Round:
    """One node's life, death and second life, in folders of its own."""

    def __init__(self, fleet: Fleet, choices: Choices, found: Found) -> None:
        self._fleet, self._choices, self._found = fleet, choices, found
        self._chance = random.Random(choices.seed + (1 << 32))
        self._disk = fleet.folder / "disk"
        keys_dir = fleet.folder / "keys"
        keys_dir.mkdir(mode=0o700)
        self._settings = fleet.settings(
            "node",
            directory="",
            arena_bytes=choices.arena_bytes,
            arena_chunk_bytes=MIB,
            disk_dir=str(self._disk),
            disk_bytes=choices.disk_bytes,
            disk_admit=choices.admit,
            disk_threads=choices.threads,
            keys_dir=str(keys_dir) if choices.sealed else "",
            lookup_seconds=5.0,
            quarantine_seconds=0.5,
            drain_seconds=DRAIN_SECONDS,
        )
        # Back again it writes nothing to its disk, where that could push out what has not been read yet.
        self._again = dataclasses.replace(self._settings, disk_admit="used")

    def run(self) -> None:
        choices, found = self._choices, self._found
        chains, ledger, in_good_order = self._live()
        on_disk = self._on_disk()
        in_arena = set() if choices.lose_arena else self._in_arena(ledger)
        said = ledger.counters.get("disk_blocks", 0) if choices.roomy else 0
        uncounted = max(0, said - len(on_disk))
        if choices.lose_arena:
            for path in self._arena_files():
                path.unlink(missing_ok=True)
        kept = set(on_disk.values())
        found.rounds["drain over before the kill"] += in_good_order
        if in_good_order and choices.roomy:
            kept |= ledger.held.keys()
        kept -= self._damage(on_disk)
        if choices.kill_starting:
            self._die_starting()
        self._fleet.start_node(self._again)
        self._wait_scanned(len(kept & set(on_disk.values())))
        with Traffic(self._again, choices.block_bytes, self._chance) as traffic:
            # The arena's first: what is promoted pushes out what lies only there.
            came = traffic.read_back(in_arena)
            came |= traffic.read_back(kept - came)
            tried = {number for chain in chains for number in chain}
            traffic.read_back(tried - came - in_arena - kept, once=True)
            self._judge(traffic)
        committed = in_arena | kept
        found.committed.update({"in all": len(committed) + uncounted, "in the arena": len(in_arena), "on the disk": len(kept)})
        found.said += said
        found.back += len(committed & came)
        lost = len(committed - came) + uncounted
        if lost:
            found.lost[choices.seed] += lost
            progress(f"seed {choices.seed}: {lost} of {len(committed) + uncounted} blocks are not back ({choices})")
            for path in self._fleet.folder.glob("*.log"):
                progress(f"what the nodes of this round printed: {path.read_text(errors='replace')}")

    def _live(self) -> tuple[list[range], Ledger, bool]:
        """The node's first life: what was saved or tried to, what it told, and whether it ended before it was killed."""
        choices = self._choices
        node = self._fleet.start_node(self._settings)
        ledger = Ledger(self._settings, choices.block_bytes)
        with Traffic(self._settings, choices.block_bytes, self._chance) as traffic:
            killer = threading.Thread(target=self._kill, args=(node.process,))
            killer.start()
            try:
                chains = traffic.run(ledger)
            finally:
                killer.join()
            self._judge(traffic)
        code = node.process.wait()
        ledger.wait_over()
        ledger.close()
        if code not in (0, -signal.SIGKILL) or (code == 0 and not choices.drain):
            raise node.failed(f"seed {choices.seed}: ended by itself with exit code {code}")
        return chains, ledger, code == 0

    def _kill(self, node: subprocess.Popen[bytes]) -> None:
        time.sleep(self._choices.kill_seconds)
        if self._choices.drain:
            node.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(self._choices.drain_kill_seconds)
        node.kill()

    def _die_starting(self) -> None:
        node = self._fleet.start_node(self._again, wait=False)
        time.sleep(self._chance.uniform(0.05, START_KILL_SECONDS_MAX))
        node.process.kill()
        node.process.wait()

    def _judge(self, traffic: Traffic) -> None:
        self._found.accepted += traffic.accepted
        self._found.wrong += [self._choices.seed] * len(traffic.wrong)
        if traffic.wrong:
            progress(f"seed {self._choices.seed}: wrong blocks {traffic.wrong} ({self._choices})")

    def _wait_scanned(self, blocks: int) -> None:
        deadline = time.monotonic() + SCAN_SECONDS
        while node_status(self._settings).counters.get("disk_blocks", 0) < blocks and time.monotonic() < deadline:
            time.sleep(0.02)

    # --- files --------------------------------------------------------------------------------------------------------

    def _arena_files(self) -> list[Path]:
        stem = Path(self._settings.arena_stem)
        return list(stem.parent.glob(f"{stem.name}-*"))

    def _in_arena(self, ledger: Ledger) -> set[int]:
        """Of what the node had told, what the header table still names."""
        table = Path(f"{self._settings.arena_stem}-{self._choices.slot_bytes}.table")
        if not table.exists() or not table.with_suffix(".data").exists():
            return set()  # it had begun to give them up
        headers = _headers(table)
        held = {number for number, block in ledger.held.items() if headers[block.slot]["generation"] == block.generation}
        self._found.cut_off += len(ledger.held) - len(held)
        return held

    def _disk_files(self) -> tuple[Path, Path]:
        folder = DiskFolder.open(str(self._disk), self._settings.cluster)
        try:
            data, table = folder.paths(self._choices.slot_bytes)
        finally:
            folder.close()
        return Path(data), Path(table)

    def _on_disk(self) -> dict[int, int]:
        """Number of the block in each slot that the disk's table names complete."""
        _, table = self._disk_files()
        if not table.exists():
            return {}
        headers = _headers(table)
        found = {}
        for slot in np.flatnonzero(complete_slots(headers)).tolist():
            header = headers[slot]
            number = number_of(bytes(header["key"])[: int(header["key_bytes"])])
            assert number is not None
            found[slot] = number
        return found

    def _damage(self, on_disk: dict[int, int]) -> set[int]:
        """Flip a byte of some blocks, tear the header of others; the numbers of these blocks."""
        slots = self._chance.sample(sorted(on_disk), min(self._choices.damaged, len(on_disk)))
        if not slots:
            return set()
        data, table = self._disk_files()
        for slot in slots:
            if self._chance.random() < 0.5:
                at = slot * self._choices.slot_bytes + self._chance.randrange(self._choices.block_bytes)
                with data.open("r+b") as file:
                    file.seek(at)
                    flipped = file.read(1)[0] ^ 1 << self._chance.randrange(8)
                    file.seek(at)
                    file.write(bytes([flipped]))
            else:
                torn = self._chance.randrange(HEADER.itemsize)
                rest = HEADER.itemsize - torn
                with table.open("r+b") as file:
                    file.seek(SUPERBLOCK_BYTES + slot * HEADER.itemsize + torn)
                    file.write(self._chance.choice((bytes(rest), self._chance.randbytes(rest))))
        return {on_disk[slot] for slot in slots}


def _slot_bytes(block_bytes: int) -> int:
    return -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


def _headers(table: Path) -> npt.NDArray[np.void]:
    content = table.read_bytes()[SUPERBLOCK_BYTES:]
    return np.frombuffer(content[: len(content) // HEADER.itemsize * HEADER.itemsize], HEADER)


@contextlib.contextmanager
def _bounded(seed: int) -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise Failed(f"seed {seed}: not over after {ROUND_SECONDS_MAX:.0f} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, ROUND_SECONDS_MAX)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def measure(seeds: list[int]) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    found = Found()
    for number, seed in enumerate(seeds):
        began = time.monotonic()
        choices = Choices.of(seed)
        with _bounded(seed), Fleet() as fleet:
            Round(fleet, choices, found).run()
        found.rounds.update(choices.kinds)
        found.slowest = max(found.slowest, (round(time.monotonic() - began, 2), seed))
        if number % 10 == 9:
            committed = found.committed["in all"]
            progress(f"{number + 1} rounds: {len(found.wrong)} wrong blocks, {found.share:.4f} of {committed} back")
    if len(seeds) > 1 and found.committed["in all"] < COMMITTED_MIN * len(seeds):
        raise Failed(f"only {found.committed['in all']} blocks were committed in {len(seeds)} rounds: this proves nothing")
    figures = {
        "recovery_wrong_blocks": (float(len(found.wrong)), "blocks"),
        "recovery_back_share": (found.share, "ratio"),
    }
    detail = {
        "rounds": len(seeds),
        "of_these": dict(found.rounds),
        "committed": dict(found.committed),
        "said_to_be_on_disk_where_it_has_room_for_all": found.said,
        "back": found.back,
        "accepted": found.accepted,
        "evicted_and_the_word_cut_off": found.cut_off,
        "seeds_wrong": sorted(set(found.wrong)),
        "seeds_lost": {str(seed): blocks for seed, blocks in sorted(found.lost.items())},
        "slowest_round": {"s": found.slowest[0], "seed": found.slowest[1]},
    }
    return figures, detail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few rounds, for development")
    parser.add_argument("--seed", type=int, help="run this round only")
    options = parser.parse_args()
    logging.getLogger("kvshare").setLevel(logging.ERROR)  # sessions say that they lost their node, as they should
    seeds = list(range(ROUNDS_QUICK if options.quick else ROUNDS)) if options.seed is None else [options.seed]
    figures, detail = measure(seeds)
    for label, value in detail.items():
        progress(f"{label}: {value}")
    report(figures, detail, options.json)


if __name__ == "__main__":
    main()
