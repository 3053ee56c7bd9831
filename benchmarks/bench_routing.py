"""Time to first token by who sends requests where, replayed on real conversations; and how long a decision takes.

    python benchmarks/bench_routing.py [--json OUT] [--plot docs/routing.svg]

The replay: the Mooncake conversation trace (FAST'25; 12,031 prompts of one hour, 12,000 tokens on average) on eight engines in
simulated time (`routed_fleet.py`), its timestamps sped up so that the prompts, computed without a single hit, would take 0.6,
0.9 and 1.2 of what the engines can compute. Every policy runs on the same engines: once where engines pull blocks from each
other, as with kvshare, and once where each has only its own.

* `round_robin`, and `two_choices`: of two at random the one with fewer requests (Ray Serve's default).
* `session`: by a hash of the first two block ids, which tell conversations of this trace apart; the first is the same for all.
* `prefix_aware`: Ray Serve LLM's, by its own prefix tree, one character a block. Among the engines with the longest match the
  one with fewer requests; below a tenth those with the smallest share of the tree; and, where queue lengths differ by more than
  `imbalanced_threshold`, two choices. With Ray's default threshold (infinite), and with the best one of a few.
* `kvshare`: `kvshare.routing`, told of first tokens; `kvshare_ends` is told of ends only, as in Ray Serve.

`routing_ttft_over_best_other`: mean time to first token of the worse of ours over that of the best other, at the worst load.

The decision: a hundred replicas, the directory's real index filled with what the trace would leave on them in 16-token blocks,
prompts of the trace: from the keys to the choice, in process. Hashing tokens is not in it.

The trace is looked for where the variable KVSHARE_TRACE says, else beside the repository; without it the exit code is 77.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import progress, report, trace_path
from routed_fleet import BLOCK_TOKENS, Fleet, Machine, Request

from kvshare import index as directory_index
from kvshare.keys import prefix
from kvshare.onlooker import KEYS_MAX
from kvshare.overlap import Held, held_by, thin, widen
from kvshare.places import HOST
from kvshare.routing import Choice, Costs, Replica, Router
from kvshare.runs import Keys, Run

ENGINES = 8
LOADS = (0.6, 0.9, 1.2)
SEED = 5
THRESHOLDS = (2, 5, 10, 20)  # that are tried for Ray's policy
RAY_MATCH_RATE_MIN = 0.1

REPLICAS = 100
FINE_TOKENS = 16
FINE = BLOCK_TOKENS // FINE_TOKENS
DECISIONS = 3_000
HASH_BYTES = 32


# --- policies ---------------------------------------------------------------------------------------------------------


class Untold:
    """What most policies make of what happens."""

    def first_token(self, request: Request, now: float) -> None:
        """Nothing."""

    def finished(self, request: Request, now: float) -> None:
        """Nothing."""


class RoundRobin(Untold):
    def route(self, request: Request, fleet: Fleet, now: float) -> int:
        return request.number % len(fleet.engines)


class TwoChoices(Untold):
    def __init__(self) -> None:
        self._random = random.Random(SEED)

    def route(self, request: Request, fleet: Fleet, now: float) -> int:
        return min(self._random.sample(range(len(fleet.engines)), 2), key=lambda i: fleet.engines[i].running)


class Session(Untold):
    def route(self, request: Request, fleet: Fleet, now: float) -> int:
        return random.Random(repr(request.chain[:2])).randrange(len(fleet.engines))


class PrefixAware(Untold):
    """Ray's own tree, asked as its router asks it."""

    def __init__(self, imbalanced_threshold: float) -> None:
        from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

        self._threshold = imbalanced_threshold
        self._tree = PrefixTree()
        self._tree.add_tenants([str(i) for i in range(ENGINES)], 0.0)
        self._fallback = TwoChoices()

    def route(self, request: Request, fleet: Fleet, now: float) -> int:
        text = "".join(_character(block) for block in request.chain)
        queues = [engine.running for engine in fleet.engines]
        chosen = self._fallback.route(request, fleet, now)
        if max(queues) - min(queues) <= self._threshold and text:
            matched, tenants = self._tree.prefix_match(text, [str(i) for i in range(len(queues))])
            if len(matched) / len(text) < RAY_MATCH_RATE_MIN:
                tenants = self._tree.get_smallest_tenants()
            if tenants:
                chosen = min(map(int, tenants), key=lambda i: queues[i])
        self._tree.insert(text, str(chosen), now)
        return chosen


def _character(block: int) -> str:
    return chr(block + 1 if block + 1 < 0xD800 else block + 1 + 0x800)  # past the surrogates


class Ours:
    """``hears``: is it told of first tokens?"""

    def __init__(self, machine: Machine, hears: bool = True) -> None:
        peer_rate = machine.link_rate if machine.pulls else 1.0
        costs = Costs(BLOCK_TOKENS, machine.block_bytes, machine.prefill_rate, peer_rate=peer_rate)
        self._router = Router(costs, SEED)
        self._router.update(Replica(str(i), f"n{i}", (f"n{i}/engine",)) for i in range(ENGINES))
        self._hears = hears

    def route(self, request: Request, fleet: Fleet, now: float) -> int:
        depths = {f"n{i}/engine": engine.leading(request.chain) for i, engine in enumerate(fleet.engines)}
        overlap = {name: Held(depth) for name, depth in depths.items() if depth}
        choice = self._router.rank(request.tokens, overlap, now)[0]
        self._router.routed(str(request.number), choice, request.tokens, now)
        return int(choice.replica)

    def first_token(self, request: Request, now: float) -> None:
        if self._hears:
            self._router.first_token(str(request.number), now)

    def finished(self, request: Request, now: float) -> None:
        self._router.finished(str(request.number), now)


def policies(machine: Machine) -> dict[str, Callable[[], Any]]:
    return {
        "round_robin": RoundRobin,
        "two_choices": TwoChoices,
        "session": Session,
        "prefix_aware": lambda: PrefixAware(float("inf")),
        **{f"prefix_aware_{limit}": lambda limit=limit: PrefixAware(limit) for limit in THRESHOLDS},
        "kvshare": lambda: Ours(machine),
        "kvshare_ends": lambda: Ours(machine, hears=False),
    }


# --- the replay -------------------------------------------------------------------------------------------------------


def load() -> list[Request]:
    requests = []
    for number, line in enumerate(trace_path().read_text().splitlines()):
        entry = json.loads(line)
        tokens = entry["input_length"]
        full = tuple(entry["hash_ids"][: tokens // BLOCK_TOKENS])
        requests.append(Request(number, entry["timestamp"] / 1000, tokens, entry["output_length"], full))
    return requests


def at_load(requests: list[Request], load: float, machine: Machine) -> list[Request]:
    """Sped up until the prompts without hits would take this share of what the engines can compute."""
    hour = requests[-1].second - requests[0].second
    wanted = sum(request.tokens for request in requests) / (ENGINES * machine.prefill_rate * load)
    return [request._replace(second=request.second * wanted / hour) for request in requests]


def replay(requests: list[Request], machine: Machine) -> dict[str, dict[str, float]]:
    results = {}
    for name, make in policies(machine).items():
        outcome = Fleet(ENGINES, machine, make()).run(requests)
        seconds = np.array(outcome.first_seconds)
        results[name] = {
            "ttft_mean_s": round(float(seconds.mean()), 4),
            "ttft_p50_s": round(float(np.median(seconds)), 4),
            "ttft_p99_s": round(float(np.quantile(seconds, 0.99)), 4),
            "hit_rate": round(outcome.hits / outcome.blocks, 4),
            "pulled_share": round(outcome.pulled / outcome.blocks, 4),
        }
    tuned = min((results.pop(f"prefix_aware_{limit}") | {"threshold": limit} for limit in THRESHOLDS), key=_mean)
    return {**results, "prefix_aware_tuned": tuned}


def _mean(result: dict[str, float]) -> float:
    return result["ttft_mean_s"]


def replays(requests: list[Request], loads: tuple[float, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pulls in (True, False):
        machine = Machine(pulls=pulls)
        for load in loads:
            results = replay(at_load(requests, load, machine), machine)
            found.setdefault("pulling" if pulls else "alone", {})[str(load)] = results
            for name, result in results.items():
                progress(f"{'pulling' if pulls else 'alone'} {load} {name}: {result}")
    return found


def over_best_other(results: dict[str, dict[str, float]]) -> float:
    others = [_mean(result) for name, result in results.items() if not name.startswith("kvshare")]
    return max(_mean(results["kvshare"]), _mean(results["kvshare_ends"])) / min(others)


# --- the decision -----------------------------------------------------------------------------------------------------


def fine_keys(blocks: tuple[int, ...]) -> Keys:
    """Each of the trace's blocks as 32 of 16 tokens, with hashes that are as random as real ones."""
    hashes = b"".join(np.random.default_rng(block).bytes(FINE * HASH_BYTES) for block in blocks)
    return Keys(prefix(bytes(16)), HASH_BYTES, hashes)


def filled(requests: list[Request]) -> tuple[Any, int]:
    """The index, with every prompt on a replica that had most of it, or else on one at random; and its memberships."""
    held: list[set[int]] = [set() for _ in range(REPLICAS)]
    rng = random.Random(SEED)
    for request in requests:
        drawn = rng.sample(range(REPLICAS), 8)
        best = max(drawn, key=lambda i: sum(block in held[i] for block in request.chain[:8]))
        held[best].update(request.chain)
    total = sum(map(len, held)) * FINE
    index = directory_index.CompactIndex(total + 1)
    for number, blocks in enumerate(held):
        keys = fine_keys(tuple(blocks))
        slots, generations = np.arange(len(keys), dtype="<u4"), np.full(len(keys), 2, "<u8")
        index.add(f"n{number}", [Run(keys, 1, 4096, 0, slots.tobytes(), generations.tobytes())])
    return index, total


def decisions(requests: list[Request], count: int) -> dict[str, float]:
    index, memberships = filled(requests)
    progress(f"the index has {memberships} memberships")
    router = Router(Costs(FINE_TOKENS, FINE_TOKENS * 131_072), SEED)
    router.update(Replica(f"r{i}", f"n{i}", (f"n{i}/engine",)) for i in range(REPLICAS))
    asked = random.Random(SEED).sample(requests, min(count, len(requests)))
    prepared = [(request, [fine_keys(request.chain)]) for request in asked]
    gc.collect()
    seconds = []
    for step, (request, keys) in enumerate(prepared):
        now, start = step * 0.01, time.perf_counter()
        some, positions = thin(keys, KEYS_MAX)
        overlap = widen(held_by(index, some, _memory), positions)
        choice: Choice = router.rank(request.tokens, overlap, now)[0]
        router.routed(str(request.number), choice, request.tokens, now)
        seconds.append(time.perf_counter() - start)
    return {
        "memberships": memberships,
        "replicas": REPLICAS,
        "decisions": len(seconds),
        "p50_ms": round(float(np.median(seconds)) * 1e3, 4),
        "p99_ms": round(float(np.quantile(seconds, 0.99)) * 1e3, 4),
        "max_ms": round(max(seconds) * 1e3, 4),
    }


def _memory(node: str, region: int) -> str:
    return HOST


# --- what is shown ----------------------------------------------------------------------------------------------------

LABELS = {
    "round_robin": "round robin",
    "two_choices": "two choices",
    "session": "session affinity",
    "prefix_aware": "Ray prefix-aware",
    "prefix_aware_tuned": "Ray prefix-aware, tuned",
    "kvshare_ends": "kvshare, told of ends only",
    "kvshare": "kvshare",
}


def table(found: dict[str, Any]) -> str:
    lines = []
    for way, by_load in found.items():
        for load, results in by_load.items():
            lines += [f"\n{way}, load {load}", f"{'':28} {'mean':>8} {'p50':>8} {'p99':>8} {'hits':>7} {'pulled':>7}"]
            for name, label in LABELS.items():
                one = results[name]
                times = " ".join(f"{one[key]:8.3f}" for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s"))
                lines.append(f"{label:28} {times} {one['hit_rate']:7.1%} {one['pulled_share']:7.1%}")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kvshare"  # equal figures, equal files
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for axis, (way, title) in zip(axes, (("pulling", "engines pull"), ("alone", "engines do not pull")), strict=True):
        for name, label in LABELS.items():
            loads = list(found[way])
            values = [found[way][load][name]["ttft_mean_s"] for load in loads]
            width = 2.5 if name == "kvshare" else 1.3
            axis.plot([float(load) for load in loads], values, marker="o", markersize=3, lw=width, label=label)
        axis.set(title=title, xlabel="prompts without hits, of what the engines can compute", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean time to first token, s")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Who sends requests where, on a trace of conversations.")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the mean times here, as SVG")
    parser.add_argument("--quick", action="store_true", help="one load, a small index")
    options = parser.parse_args()
    requests = load()
    found = replays(requests, LOADS[1:2] if options.quick else LOADS)
    print(table(found), file=sys.stderr)
    ratios = {f"{way} {load}": over_best_other(results) for way, by_load in found.items() for load, results in by_load.items()}
    decided = decisions(requests[:1000] if options.quick else requests, 300 if options.quick else DECISIONS)
    figures = {
        "routing_p99_ms": (decided["p99_ms"], "ms"),
        "routing_ttft_over_best_other": (max(ratios.values()), "ratio"),
    }
    report(figures, {"replay": found, "ttft_over_best_other": ratios, "decision": decided}, options.json)
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
