"""What a joining worker finds of its first 200 requests, by what it was warmed with, on a trace of real conversations; and what
it costs to know what is hot.

    python benchmarks/bench_warm.py [--json OUT] [--plot docs/warm.svg]

The Mooncake conversation trace (FAST'25; blocks of 512 tokens) is spread over eight workers at random; one of them joins at
twenty moments in turn, five draws of its requests each, and is warmed by a plan (`joiner.py` says how). Compared are

    none      no warm-up: only what the joiner itself computes is found again
    newest    the blocks that were asked for last
    kvshare   what is hot, with the default half-life
    informed  knows no future but all statistics of this very trace: how likely a prompt returns at each age
    fleet     knows all that the fleet will be asked for meanwhile, but not which of it the joiner will get
    oracle    knows the joiner's requests: exactly the best that a plan within the budget can do

Budgets are shares of the distinct blocks; the least is the default `warm_bytes` in blocks of an 8B-class model (128 KiB a
token). The bar's budget is a tenth, as much as the arena of a peer.
The same with a router that sends each request to the worker that is done with it first: then the joiner gets what it holds.
The trace is looked for as by `bench_placement.py`; without it the exit code is 77.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_placement import BLOCK_TOKENS, load
from common import progress, report
from joiner import Fleet, Outcome, replay

from kvshare import keys
from kvshare.config import Settings
from kvshare.directory import HOT_KEYS_MAX
from kvshare.hotness import Hotness
from kvshare.places import Location
from kvshare.plan import plan_warm
from kvshare.planning import PLAN_BLOCKS_MAX
from kvshare.runs import Keys, Seen

WORKERS, FIRST, MOMENTS = 8, 200, 20
BEGIN = 0.25  # of the trace, until the first joiner
PERCENTS = (0.1, 0.3, 1, 2, 3, 5, 10)
BAR_PERCENT = 10
ARENA_PERCENTS = (5, 10)  # of a peer; the last is the bar's
TOKEN_BYTES = 128 << 10
HALF_LIVES = (60.0, 150.0, 300.0, 600.0, 1200.0)
FAMILY = b"measured-family."
HASH_BYTES = 32
PLANS, DONORS = 10, 3  # plans made, and donors of each of their blocks
HALF_LIFE = Settings().hot_half_life_seconds
assert HALF_LIFE in HALF_LIVES


def joiners(arena_percent: int, moments: int) -> dict[str, Any]:
    """Hits of joiners in a fleet of such arenas: by policy, in percent of the blocks asked for, at each budget."""
    prompts = load()
    distinct = len({key for prompt in prompts for key in prompt.chain})
    budgets = [Settings().warm_bytes // (BLOCK_TOKENS * TOKEN_BYTES), *(int(distinct * percent / 100) for percent in PERCENTS)]
    last = len(prompts) - int(1.3 * FIRST * WORKERS)  # each is the joiner's by chance
    at = np.linspace(BEGIN * len(prompts), last, moments).astype(int).tolist()
    ours = f"hot_{HALF_LIFE:g}"
    fleet = Fleet(WORKERS, distinct * arena_percent // 100, FIRST, routed=(ours, "newest", "informed"))
    outcomes: list[Outcome] = []
    for outcome in replay(prompts, fleet, budgets, at, HALF_LIVES, HOT_KEYS_MAX):
        outcomes.append(outcome)
        progress(f"arenas of {arena_percent} %: joiner {len(outcomes)} of {moments}")
    asked = sum(outcome.asked for outcome in outcomes)

    def percent(hits: list[list[int]]) -> list[float]:
        return [round(100 * value / asked, 2) for value in np.sum(hits, axis=0).tolist()]

    given = {}
    for name in ("none", "newest", ours, "informed"):
        sums = np.sum([outcome.given[name] for outcome in outcomes], axis=0)  # [budgets, 3]
        given["kvshare" if name == ours else name] = {
            "hit_percent": (100 * sums[:, 1] / sums[:, 0]).round(2).tolist(),
            "over_most": (sums[:, 1] / sums[:, 2]).round(4).tolist(),
        }
    hits = {name: percent([outcome.hits[name] for outcome in outcomes]) for name in outcomes[0].hits}
    return {
        "none": percent([[outcome.none] * len(budgets) for outcome in outcomes]),
        "newest": hits["newest"],
        "kvshare": hits[ours],
        "informed": hits["informed"],
        "fleet": hits["fleet"],
        "oracle": percent([outcome.most for outcome in outcomes]),
        "half_lives": {name: values for name, values in hits.items() if name.startswith("hot_")},
        "given_by_a_router": given,
        "budget_blocks": budgets,
        "budget_percent": [round(100 * budgets[0] / distinct, 3), *PERCENTS],
        "held_by_peers_percent": round(100 * float(np.mean([outcome.held for outcome in outcomes])) / distinct, 1),
        "seconds_of_first_requests": round(float(np.mean([outcome.seconds for outcome in outcomes])), 1),
        "blocks_asked": asked,
    }


def messages(requests: int) -> Iterator[tuple[float, Seen]]:
    """The trace in blocks of 16 tokens, as nodes would report it."""
    prefix, parts = keys.prefix(FAMILY), [part.to_bytes(HASH_BYTES - 8, "big") for part in range(BLOCK_TOKENS // 16)]
    for second, chain in load()[:requests]:
        yield second, Seen(Keys(prefix, HASH_BYTES, b"".join([key + part for key in chain for part in parts])))


def recording(requests: int) -> dict[str, float]:
    """What it costs the directory to record these requests, and to make a plan."""
    hotness = Hotness(HALF_LIFE, HOT_KEYS_MAX)
    samples, blocks = [], 0
    for second, message in messages(requests):
        began = time.perf_counter()
        hotness.touch(message, second)
        samples.append(time.perf_counter() - began)
        blocks += len(message.keys)
    assert not hotness.check()
    ranking, planning = [], []
    places = [Location(f"peer-{number}", 1, 0, 2, 1) for number in range(DONORS)]
    for _ in range(PLANS):
        began = time.perf_counter()
        ranked = hotness.hottest(FAMILY, PLAN_BLOCKS_MAX)
        middle = time.perf_counter()
        plan = plan_warm(ranked, lambda _: False, lambda _: places, lambda _: True, len(ranked), 1e9)
        ranking.append(middle - began)
        planning.append(time.perf_counter() - middle)
        assert len(plan.items) == len(ranked)
    return {
        "blocks_per_second": blocks / sum(samples),
        "request_us_median": 1e6 * float(np.median(samples)),
        "request_us_p99": 1e6 * float(np.quantile(samples, 0.99)),
        "request_us_max": 1e6 * max(samples),
        "keys": len(hotness),
        "ranking_ms": 1e3 * float(np.median(ranking)),
        "planning_ms": 1e3 * float(np.median(planning)),
        "planned_keys": len(ranked),
        "bytes_per_key": bytes_per_key(requests),
    }


def bytes_per_key(requests: int) -> float:
    """Of memory, with all that hotness keeps beside the hash of a block."""
    hotness = Hotness(HALF_LIFE, HOT_KEYS_MAX)
    tracemalloc.start()
    for second, message in messages(min(requests, 1000)):
        hotness.touch(message, second)
    del message
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return taken / len(hotness)


def figures(detail: dict[str, Any]) -> dict[str, tuple[float, str]]:
    fleet = detail["fleets"][str(ARENA_PERCENTS[-1])]
    at = fleet["budget_percent"].index(BAR_PERCENT)
    return {f"joiner_hit_over_{name}": (fleet["kvshare"][at] / fleet[name][at], "ratio") for name in ("oracle", "informed")}


STYLES = {
    "oracle": ("oracle: knows the joiner's requests", "--", 1.3),
    "fleet": ("knows the fleet's requests", "--", 1.3),
    "informed": ("knows this trace's statistics", "--", 1.3),
    "kvshare": ("kvshare", "-", 2.5),
    "newest": ("newest first", "-", 1.3),
    "none": ("no warm-up", "-", 1.3),
}


def plot(detail: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kvshare"  # equal figures, equal files
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    fleet = detail["fleets"][str(ARENA_PERCENTS[-1])]
    for name, (label, style, width) in STYLES.items():
        axes.plot(fleet["budget_percent"], fleet[name], style, marker="o", markersize=3, lw=width, label=label)
    axes.set_xscale("log")
    axes.set_xticks(fleet["budget_percent"], [f"{percent:g} %" for percent in fleet["budget_percent"]], minor=False)
    axes.minorticks_off()
    axes.set(
        xlabel="budget of the plan, of the distinct blocks", ylabel=f"found of the first {FIRST} requests, %", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay a trace for a joining worker, by what it is warmed with.")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the hit rates here, as SVG")
    parser.add_argument("--quick", action="store_true", help="few joiners of one fleet only")
    options = parser.parse_args()
    arenas = ARENA_PERCENTS[-1:] if options.quick else ARENA_PERCENTS
    detail = {
        "workers": WORKERS,
        "first_requests": FIRST,
        "half_life_seconds": HALF_LIFE,
        "fleets": {str(percent): joiners(percent, 3 if options.quick else MOMENTS) for percent in arenas},
        "recording": recording(1000 if options.quick else 1 << 20),
    }
    report(figures(detail), detail, options.json)
    if options.plot is not None:
        plot(detail, options.plot)


if __name__ == "__main__":
    main()
