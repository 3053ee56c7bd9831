"""Blocks pulled straight out of a living engine's KV cache: what a joiner gains by it, and what the engine loses.

1. Donor engine A on node A serves prompts and stays, idle; its cache holds them all. Joiner engine C is fresh, on a node that
   holds nothing, warms nothing and can read nothing but other processes' memory: measured as `bench_ttft` measures a joiner.
   Its outputs must be engine A's, and its log must say that it read the device region by the process transport.
2. Engine A decodes, batch after batch; during every second batch another process pulls blocks out of its cache as fast as it
   can (`puller`), on the other core and with what is left of that: SCHED_IDLE. A ratio compares neighbours in time; which comes
   first alternates. The figure is the median ratio.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

import msgspec
from bench_throughput import DECODE_PROMPTS, DECODE_TOKENS, PAUSE_SECONDS, batch
from bench_ttft import FRESH_SEEDS, MODEL, SHARED_SEED, measure_joiner, request, warm_up
from common import (
    BLOCK_TOKENS,
    BLOCKS,
    HERE,
    STOP_SECONDS,
    TOKENS,
    Engine,
    Failed,
    Fleet,
    arguments,
    node_status,
    progress,
    prompt,
    report,
    summary,
)

from kvshare.config import Settings
from kvshare.places import RegionDescription

ENGINE_CORE = 0  # of every engine's worker, as `engine_environment` has it
SETTLE_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # of the puller, which gets what others leave it
NO_OTHER_CORE = 77  # what the runner takes for "cannot measure on this machine"
FRESH_SEEDS["live"] = 4_000


def main() -> None:
    options = arguments(__doc__ or "")
    prompts, rounds = (3, 3) if options.quick else (9, 20)
    if not os.sched_getaffinity(0) - {ENGINE_CORE}:
        print("needs a second core, for who pulls from a working engine", file=sys.stderr)
        sys.exit(NO_OTHER_CORE)
    with Fleet() as fleet:
        fleet.start_directory()
        node_a = fleet.settings("a", warm_bytes=0)
        fleet.start_node(node_a)
        donor = fleet.start_engine("engine-a", node_a, model=MODEL)
        expected, served = serve(donor, prompts)
        region = exposed(node_a, prompts * BLOCKS)
        node_c = fleet.settings("c", transports=("process",), warm_bytes=0)
        fleet.start_node(node_c)
        live = measure_joiner(fleet, "live", node_c, expected)
        live["path"] = path_taken(fleet, live, prompts)
        with Puller(region, fleet) as puller:
            decode = measure_decode(donor, puller, rounds)
    detail = {"tokens": TOKENS, "blocks": BLOCKS, "donor": served, "live": live, "decode": decode, "rounds": rounds}
    figures = {
        "live_ttft_over_prefix_hit": (live["first_s"]["median"] / live["prefix_hit_s"]["median"], "ratio"),
        "live_donor_decode_ratio": (decode["ratio"]["median"], "ratio"),
    }
    report(figures, detail, options.json)


def serve(donor: Engine, prompts: int) -> tuple[list[list[int]], dict[str, Any]]:
    """The donor computes the prompts. Returns the output of each prefix hit, and the times."""
    warm_up(donor)
    outputs, recompute, hits = [], [], []
    for i in range(prompts):
        recompute.append(request(donor, prompt(SHARED_SEED + i))["seconds"])
        answer = request(donor, prompt(SHARED_SEED + i))
        if answer["cached"][0] != BLOCKS * BLOCK_TOKENS:
            raise Failed(f"engine-a: prompt {i}: {answer['cached'][0]} tokens in its own cache")
        outputs.append(answer["outputs"][0])
        hits.append(answer["seconds"])
    return outputs, {"recompute_s": summary(recompute), "prefix_hit_s": summary(hits)}


def exposed(node: Settings, blocks: int) -> RegionDescription:
    """The device region of the node's only engine, once so many of its blocks are told of."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (status := node_status(node)).counters["exposed_blocks"] < blocks:
        if time.monotonic() > deadline:
            raise Failed(f"engine-a exposes {status.counters['exposed_blocks']} of {blocks} blocks")
        time.sleep(0.2)
    (engine,) = status.engines
    return engine.regions[0]


def path_taken(fleet: Fleet, live: dict[str, Any], prompts: int) -> str:
    """How the joiner says that it read the donor. Raises Failed: not by the process transport, or it loaded nothing."""
    log = (fleet.folder / "engine-live.log").read_text()
    said = re.findall(r"the device region of \S+ is read over \w+", log)
    if not said or not all(line.endswith("over process") for line in said):
        ours = "\n".join(line for line in log.splitlines() if "kvshare" in line)
        raise Failed(f"engine-live did not read a device region over process:\n{ours}")
    if live["prompts_not_loaded_whole"] == prompts:
        raise Failed("engine-live loaded no prompt whole")
    return str(said[0])


def measure_decode(donor: Engine, puller: Puller, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"pulled": [], "undisturbed": []}
    pulls: list[dict[str, Any]] = []
    donor.generate(batch("decode", 2 * rounds), 16)  # a batch of this shape is new to it
    for turn in range(rounds):
        for half, side in enumerate(("pulled", "undisturbed") if turn % 2 else ("undisturbed", "pulled")):
            time.sleep(PAUSE_SECONDS)
            prompts = batch("decode", 2 * turn + half)  # never seen: equal ones would find their output saved
            if side == "pulled":
                puller.start()
            seconds = donor.generate(prompts, DECODE_TOKENS)["seconds"]
            if side == "pulled":
                pulls.append(puller.stop())
            rates[side].append(DECODE_PROMPTS * DECODE_TOKENS / seconds)
        speed = pulls[-1]["bytes"] / pulls[-1]["seconds"] / 1e9
        said = ", ".join(f"{side} {done[-1]:.1f} tokens/s" for side, done in rates.items())
        progress(f"decode round {turn}: {said}, pulled at {speed:.2f} GB/s")
    blocks, errors = Counter[str](), Counter[str]()
    for pull in pulls:
        blocks.update(pull["blocks"])
        errors.update(pull["errors"])
    if not blocks["OK"]:
        raise Failed(f"nothing was pulled: {dict(blocks)} {dict(errors)}")
    return {
        "ratio": summary([ours / theirs for ours, theirs in zip(rates["pulled"], rates["undisturbed"], strict=True)]),
        "tokens_per_s": {side: summary(done) for side, done in rates.items()},
        "pulled_gb_per_second": summary([pull["bytes"] / pull["seconds"] / 1e9 for pull in pulls]),
        "pulled_blocks": dict(blocks),
        "pull_errors": dict(errors),
    }


class Puller:
    """`puller.py`, on the cores that are not the donor's worker's. A context manager."""

    def __init__(self, region: RegionDescription, fleet: Fleet) -> None:
        self._log = (fleet.folder / "puller.log").open("a+")
        command = [sys.executable, str(HERE / "puller.py"), msgspec.json.encode(region).decode()]
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, before - {ENGINE_CORE})  # it inherits this
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        finally:
            os.sched_setaffinity(0, before)

    def __enter__(self) -> Puller:
        self.start()
        self.stop()  # it has imported, and knows the region
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._log.close()

    def start(self) -> None:
        self._say()

    def stop(self) -> dict[str, Any]:
        """What it pulled since `start`."""
        self._say()
        answers = self._process.stdout
        assert answers is not None
        ready, _, _ = select.select([answers], [], [], ANSWER_SECONDS)
        line = answers.readline() if ready else ""
        if not line:
            self._log.seek(0)
            raise Failed(f"the puller has ended, or does not answer: {self._log.read()[-2000:]}")
        said: dict[str, Any] = json.loads(line)
        return said

    def _say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()


if __name__ == "__main__":
    main()
