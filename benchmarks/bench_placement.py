"""How often blocks are found again: the policy that kvshare uses, others, and the optimum, on a trace of real conversations.

    python benchmarks/bench_placement.py [--json OUT] [--plot docs/placement.svg]

The Mooncake conversation trace (FAST'25) names the blocks of 512 tokens of 12,031 prompts of one hour. Each prompt is asked
for, head first, up to the first block that is not held: hits. Then what is missing comes in as engines save it, in batches,
tail first. Only full blocks count, as engines save no others. The policies run as they are; there is no engine. Capacities are
shares of the distinct blocks.

`optimum`: evicts what is asked for again latest, of one prompt the end first (Belady). A block is never asked for without those
before it, so this order keeps chains whole, and nothing does better. It knows the future.

`informed`: knows no future but all statistics of this very trace: how likely a prompt returns, and when, by its turn and the
number of its new blocks; it evicts what is least likely to return per unit of time. About the most that a policy could learn
from what it sees.

The trace is looked for where the variable KVSHARE_TRACE says, else beside the repository; without it the exit code is 77.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from common import progress, report, trace_path

from kvshare.eviction import HITS_MAX, S3Fifo
from kvshare.placement import Admission

BLOCK_TOKENS = 512
BATCH_BLOCKS = 16  # of a save
PERCENTS = (1, 2, 5, 10, 20, 50)
BAR_PERCENT = 10
ARENA_PERCENT, DISK_PERCENT = 2, 20  # of the replay with a disk
FORESIGHT = ("informed", "optimum")  # know what no policy can know

Chain = list[bytes]


class Prompt(NamedTuple):
    second: float
    chain: Chain


class Cache(Protocol):
    """What a replay needs of a policy."""

    def insert(self, key: bytes) -> None: ...
    def touch(self, key: bytes) -> None: ...
    def follow(self, chain: Sequence[bytes]) -> None: ...
    def evict(self) -> bytes | None: ...
    def __len__(self) -> int: ...
    def __contains__(self, key: bytes) -> bool: ...


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:
        self._keys[key] = None

    def touch(self, key: bytes) -> None:
        self._keys.move_to_end(key)

    def follow(self, chain: Sequence[bytes]) -> None:
        """Knows nothing of chains."""

    def evict(self) -> bytes | None:
        return self._keys.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys


class PublishedS3Fifo:
    """As in the paper (SOSP'23): small a tenth, to main after two hits, the ghost as long as main."""

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:
        known = key in self._ghost
        if known:
            del self._ghost[key]
        (self._main if known else self._small)[key] = 0

    def touch(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, HITS_MAX)

    def follow(self, chain: Sequence[bytes]) -> None:
        """Knows nothing of chains."""

    def evict(self) -> bytes | None:
        while True:
            if self._small and (10 * len(self._small) >= len(self) or not self._main):
                key, hits = self._small.popitem(last=False)
                if hits > 1:
                    self._main[key] = 0
                    continue
                self._ghost[key] = None
                while len(self._ghost) > len(self._main):
                    self._ghost.popitem(last=False)
                return key
            key, hits = self._main.popitem(last=False)
            if not hits:
                return key
            self._main[key] = hits - 1

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main


class Untold(S3Fifo):
    """Ours, without being told how blocks follow each other."""

    def follow(self, chain: Sequence[bytes]) -> None:
        """Ignored."""


POLICIES: dict[str, Callable[[], Cache]] = {
    "lru": Lru,
    "s3fifo_published": PublishedS3Fifo,
    "kvshare_untold": Untold,
    "kvshare": S3Fifo,
}


def load() -> list[Prompt]:
    prompts = []
    for line in trace_path().read_text().splitlines():
        entry = json.loads(line)
        full = entry["hash_ids"][: entry["input_length"] // BLOCK_TOKENS]
        prompts.append(Prompt(entry["timestamp"] / 1000, [number.to_bytes(8, "big") for number in full]))
    return prompts


def leading(held: Callable[[bytes], bool], chain: Chain) -> int:
    return next((i for i, key in enumerate(chain) if not held(key)), len(chain))


def enter(policy: Cache, chain: Chain, capacity: int) -> list[bytes]:
    """What is missing comes in, as `kvshare.store.Store` does it: reserve a batch, commit it tail first. Returns it."""
    came = []
    for start in range(0, len(chain), BATCH_BLOCKS):
        missing = [key for key in chain[start : start + BATCH_BLOCKS] if key not in policy]
        while len(policy) + len(missing) > capacity:
            policy.evict()
        for key in reversed(missing):
            policy.insert(key)
        came += missing
    return came


def replay(policy: Cache, prompts: Sequence[Prompt], capacity: int) -> int:
    """Blocks that were found."""
    found = 0
    for _, chain in prompts:
        hits = leading(policy.__contains__, chain)
        found += hits
        policy.follow(chain)
        for key in chain[:hits]:
            policy.touch(key)
        enter(policy, chain[hits:], capacity)
    return found


def replay_with_disk(prompts: Sequence[Prompt], arena_blocks: int, disk_blocks: int, everything: bool) -> tuple[int, int]:
    """Blocks that were found in the arena or on the disk, and blocks written to the disk."""
    arena, disk, admission = S3Fifo(), S3Fifo(), Admission(everything)
    found = written = 0
    for _, chain in prompts:
        hits = leading(lambda key: key in arena or key in disk, chain)
        found += hits
        for place in (arena, disk):
            place.follow(chain)
            for key in chain[:hits]:
                place.touch(key)
        wanted = [*chain[:hits], *admission.saved(enter(arena, chain, arena_blocks))]
        written += len(enter(disk, [key for key in dict.fromkeys(wanted) if key not in disk], disk_blocks))
    return found, written


def replay_optimum(prompts: Sequence[Prompt], capacity: int) -> int:
    """Blocks that are found when what is asked for again latest leaves first, which may be what just came."""
    coming: list[list[int]] = []
    last: dict[bytes, int] = {}
    for number in range(len(prompts) - 1, -1, -1):
        coming.append([last.get(key, len(prompts)) for key in prompts[number].chain])
        last.update(dict.fromkeys(prompts[number].chain, number))
    coming.reverse()
    held: dict[bytes, tuple[int, int]] = {}
    latest: list[tuple[int, int, bytes]] = []  # a heap; only entries equal to what is held are valid
    found = 0
    for number, (_, chain) in enumerate(prompts):
        for depth, (key, next_use) in enumerate(zip(chain, coming[number], strict=True)):
            found += key in held
            held[key] = (-next_use, -depth)
            heapq.heappush(latest, (-next_use, -depth, key))
        while len(held) > capacity:
            next_use, depth, key = heapq.heappop(latest)
            if held.get(key) == (next_use, depth):
                del held[key]
    return found


class Returns:
    """What happened to every prompt of the whole trace: did another go on where it ended, and when. The statistics of that."""

    BIN_SECONDS = 15.0
    BINS = 240
    AHEAD_BINS = 40  # a return later than that counts for nothing
    SMOOTH_BINS = 7
    NEW_BLOCKS = (2, 4, 8, 16, 32, 64)
    TURNS_MAX = 5

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        latest: dict[bytes, int] = {}  # block -> the last prompt that had it
        turns, new = np.ones(len(prompts), int), np.zeros(len(prompts), int)
        gaps = np.full(len(prompts), np.inf)
        for number, (second, chain) in enumerate(prompts):
            hits = leading(latest.__contains__, chain)
            new[number] = len(chain) - hits
            if hits > 1:  # more than what all have in common
                before = latest[chain[hits - 1]]
                turns[number] = turns[before] + 1
                gaps[before] = min(gaps[before], second - prompts[before].second)
            latest.update(dict.fromkeys(chain, number))
        self.seconds = np.array([prompt.second for prompt in prompts])
        kinds = np.minimum(turns, self.TURNS_MAX) * (len(self.NEW_BLOCKS) + 1) + np.digitize(new, self.NEW_BLOCKS)
        self._kind = kinds
        weights = np.array([len(prompt.chain) for prompt in prompts], float)
        self._density = np.array([self._densities(kinds == kind, gaps, weights) for kind in range(kinds.max() + 1)])

    def rank(self, prompts: npt.NDArray[np.int64], second: float) -> npt.NDArray[np.float64]:
        """For each of these prompts: chance of a return per second, over the best span of time from now on."""
        ages = second - self.seconds[prompts]
        bins = np.minimum((ages / self.BIN_SECONDS).astype(int), self.BINS - 1)
        ranks: npt.NDArray[np.float64] = self._density[self._kind[prompts], bins] - 1e-9 * ages
        return ranks

    def _densities(
        self, chosen: npt.NDArray[np.bool_], gaps: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """For each age, in bins."""
        watched = np.minimum(gaps, self.seconds[-1] - self.seconds)[chosen]
        bins = np.minimum((watched / self.BIN_SECONDS).astype(int), self.BINS - 1)
        ended = np.bincount(bins, weights[chosen], self.BINS)
        returned = np.bincount(bins, weights[chosen] * np.isfinite(gaps[chosen]), self.BINS)
        hazard = returned / np.maximum(np.cumsum(ended[::-1])[::-1], 1)
        window = np.ones(self.SMOOTH_BINS) / self.SMOOTH_BINS
        hazard = np.convolve(np.pad(hazard, self.SMOOTH_BINS // 2, mode="edge"), window, "valid")
        best = np.zeros(self.BINS)
        for age in range(self.BINS):
            ahead = hazard[age : age + self.AHEAD_BINS]
            waiting = np.cumprod(np.concatenate([[1.0], 1 - ahead[:-1]]))
            best[age] = (np.cumsum(waiting * ahead) / np.cumsum(waiting)).max()
        return best


def replay_informed(prompts: Sequence[Prompt], returns: Returns, capacity: int) -> int:
    """Blocks that are found when the prompt that is least likely to return soon leaves first, its end first."""
    owner: dict[bytes, int] = {}  # block -> the last prompt that had it
    owned: dict[int, dict[bytes, None]] = {}
    found = 0
    for number, (second, chain) in enumerate(prompts):
        found += leading(owner.__contains__, chain)
        for key in chain:
            if key in owner:
                before = owner[key]
                del owned[before][key]
                if not owned[before]:
                    del owned[before]
            owner[key] = number
        if len(owner) > capacity:
            numbers = np.fromiter(owned, np.int64, len(owned))
            for victim in numbers[np.argsort(returns.rank(numbers, second), kind="stable")].tolist():
                blocks = owned[victim]
                while blocks and len(owner) > capacity:
                    del owner[blocks.popitem()[0]]
                if not blocks:
                    del owned[victim]
                if len(owner) <= capacity:
                    break
        if chain:
            owned[number] = dict.fromkeys(chain)
    return found


def measure(prompts: Sequence[Prompt], percents: Sequence[int]) -> dict[str, Any]:
    """The detail of the result: hits in percent of the blocks asked for, by policy and capacity, and what a disk adds."""
    asked = sum(len(prompt.chain) for prompt in prompts)
    uses = Counter(key for prompt in prompts for key in prompt.chain)
    distinct = len(uses)
    returns = Returns(prompts)
    hits: dict[str, list[float]] = {name: [] for name in (*POLICIES, *FORESIGHT)}
    decisions: dict[str, list[float]] = {name: [] for name in POLICIES}
    for percent in percents:
        capacity = distinct * percent // 100
        for name, policy in POLICIES.items():
            began = time.process_time()
            hits[name].append(100 * replay(policy(), prompts, capacity) / asked)
            decisions[name].append((time.process_time() - began) / asked * 1e6)
        hits["informed"].append(100 * replay_informed(prompts, returns, capacity) / asked)
        hits["optimum"].append(100 * replay_optimum(prompts, capacity) / asked)
        progress(f"{percent} %: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in hits.items()))
    disk = {}
    for admit in ("used", "all"):
        sizes = (distinct * ARENA_PERCENT // 100, distinct * DISK_PERCENT // 100)
        found, written = replay_with_disk(prompts, *sizes, admit == "all")
        disk[admit] = {"hit_percent": round(100 * found / asked, 2), "written_blocks": written}
    return {
        "prompts": len(prompts),
        "blocks_asked": asked,
        "blocks_distinct": distinct,
        "blocks_asked_again": sum(count > 1 for count in uses.values()),
        "capacity_percent": list(percents),
        "hit_percent": {name: [round(value, 2) for value in values] for name, values in hits.items()},
        "microseconds_per_block": {name: [round(value, 2) for value in values] for name, values in decisions.items()},
        "arena_percent": ARENA_PERCENT,
        "disk_percent": DISK_PERCENT,
        "disk": disk,
    }


def figures(detail: dict[str, Any]) -> dict[str, tuple[float, str]]:
    at = detail["capacity_percent"].index(BAR_PERCENT)
    hits = {name: values[at] for name, values in detail["hit_percent"].items()}
    ours = hits["kvshare"]
    return {
        "trace_hit_over_lru": (ours / hits["lru"], "ratio"),
        "trace_hit_over_best": (ours / max(hits.values()), "ratio"),
        "trace_hit_over_informed": (ours / max(value for name, value in hits.items() if name != "optimum"), "ratio"),
        "disk_written_used_over_all": (
            detail["disk"]["used"]["written_blocks"] / detail["disk"]["all"]["written_blocks"],
            "ratio",
        ),
    }


LABELS = {
    "lru": "LRU",
    "s3fifo_published": "S3-FIFO as published",
    "kvshare": "kvshare",
    "informed": "knows this trace's statistics",
    "optimum": "knows the future (Belady)",
}


def plot(detail: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kvshare"  # equal figures, equal files
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, label in LABELS.items():
        style = "--" if name in FORESIGHT else "-"
        width = 2.5 if name == "kvshare" else 1.3
        axes.plot(
            detail["capacity_percent"], detail["hit_percent"][name], style, marker="o", markersize=3, lw=width, label=label
        )
    axes.set_xscale("log")
    axes.set_xticks(detail["capacity_percent"], [f"{percent} %" for percent in detail["capacity_percent"]], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="capacity, of the distinct blocks", ylabel="blocks found, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay a trace of conversations through eviction policies.")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the hit rates here, as SVG")
    parser.add_argument("--quick", action="store_true", help="one capacity only")
    options = parser.parse_args()
    detail = measure(load(), (BAR_PERCENT,) if options.quick else PERCENTS)
    found = figures(detail)
    assert all(math.isfinite(value) for value, _ in found.values())
    report(found, detail, options.json)
    if options.plot is not None:
        plot(detail, options.plot)


if __name__ == "__main__":
    main()
