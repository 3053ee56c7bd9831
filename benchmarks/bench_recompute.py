"""Pulling must not be slower than computing: time to first token over links of any rate, over that of recomputing.

For each rate of the link, from 1 MB/s to unlimited (a donor's setting ``tcp_bytes_per_second``):

1. Node A, of a name of its own, so that nobody has read from it before; an engine computes prompts there and leaves.
2. Engine B, the same one for all rates, on a node that holds nothing and warms nothing: prompts that nobody has seen and
   prompts that A holds take turns. Each is asked for once. The first of A's meets a link that has not been measured.

Then the last donor, so far unlimited, dies and comes back at 1 MB/s with what it holds: engine B believes it to be fast.

The bar is the largest of the medians, over rates, of TTFT of a prompt that A holds over TTFT of the recomputed one before it.
What was loaded whole must give the donor's output, or the run fails.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import (
    BLOCK_TOKENS,
    BLOCKS,
    TOKENS,
    Child,
    Engine,
    Failed,
    Fleet,
    arguments,
    progress,
    prompt,
    report,
    summary,
    wait_saved,
)

from kvshare.config import Settings

PAUSE_SECONDS = 0.3
MODEL = {"weights": True}
MB = 10**6
RATES = {"1MBps": MB, "10MBps": 10 * MB, "100MBps": 100 * MB, "unlimited": 0}
SLOWED = "slowed"
SETTLING_SECONDS = 2.0  # node B hears that A is back, and of what it holds


def main() -> None:
    options = arguments(__doc__ or "")
    prompts = 3 if options.quick else 7
    found: dict[str, dict[str, Any]] = {}
    with Fleet() as fleet:
        fleet.start_directory()
        node_b = fleet.settings("b", transports=("tcp",), warm_bytes=0)
        fleet.start_node(node_b)
        engine = fleet.start_engine("engine-b", node_b, model=MODEL)
        for i in range(3):
            request(engine, prompt(9_000 + i))  # it knows how fast it computes
        for number, (name, rate) in enumerate(RATES.items()):
            last = name == "unlimited"
            settings = fleet.settings(f"a-{name}", transports=("tcp",), warm_bytes=0, tcp_bytes_per_second=rate)
            node = fleet.start_node(settings)
            seeds = [100_000 * (number + 1) + i for i in range(prompts * (1 + last))]
            outputs = donate(fleet, name, settings, seeds)
            found[name] = measure(engine, name, seeds[:prompts], outputs[:prompts])
            if last:
                node = slow_down(fleet, node, fleet.settings(**same(settings), tcp_bytes_per_second=MB))
                found[SLOWED] = measure(engine, SLOWED, seeds[prompts:], outputs[prompts:])
            fleet.stop(node)
    medians = {name: measured["ratio"]["median"] for name, measured in found.items()}
    figures = {"ttft_pull_over_recompute_max": (max(medians.values()), "ratio")}
    detail = {"tokens": TOKENS, "blocks": BLOCKS, "pause_s": PAUSE_SECONDS, "medians": medians, "rates": found}
    report(figures, detail, options.json)


def donate(fleet: Fleet, name: str, node: Settings, seeds: list[int]) -> list[list[int]]:
    """An engine computes the prompts on ``node`` and leaves. Returns the output of each, of its prefix hit."""
    engine = fleet.start_engine(f"engine-a-{name}", node, model=MODEL)
    outputs = []
    for seed in seeds:
        engine.generate([prompt(seed)])
        outputs.append(engine.generate([prompt(seed)])["outputs"][0])
    saved = wait_saved(node, len(seeds) * BLOCKS)
    progress(f"engine-a-{name}: {saved} blocks saved")
    fleet.stop(engine)
    return outputs


def measure(engine: Engine, name: str, seeds: list[int], outputs: list[list[int]]) -> dict[str, Any]:
    pull, recompute, blocks = [], [], []
    for seed, output in zip(seeds, outputs, strict=True):
        recompute.append(request(engine, prompt(50_000 + seed))["seconds"])
        answer = request(engine, prompt(seed))
        pull.append(answer["seconds"])
        blocks.append(answer["cached"][0] // BLOCK_TOKENS)
        if blocks[-1] == BLOCKS and answer["outputs"][0] != output:
            raise Failed(f"{name}: prompt {seed} gave {answer['outputs'][0]}, the donor gave {output}")
        progress(f"{name}: {pull[-1]:.4f} s with {blocks[-1]} blocks pulled, recompute {recompute[-1]:.3f} s")
    ratio = np.array(pull) / np.array(recompute)
    return {
        "ratio": summary(ratio.tolist()),
        "first_ratio": float(ratio[0]),
        "pull_s": summary(pull),
        "recompute_s": summary(recompute),
        "blocks_pulled": blocks,
    }


def slow_down(fleet: Fleet, node: Child, settings: Settings) -> Child:
    """The node dies without a word and starts again with ``settings``: what it holds is still there."""
    node.process.kill()
    node.process.wait()
    fleet.stop(node)
    slow = fleet.start_node(settings)
    time.sleep(SETTLING_SECONDS)
    return slow


def same(settings: Settings) -> dict[str, Any]:
    return {"node_name": settings.node_name, "transports": settings.transports, "warm_bytes": settings.warm_bytes}


def request(engine: Engine, token_ids: list[int]) -> dict[str, Any]:
    time.sleep(PAUSE_SECONDS)
    return engine.generate([token_ids])


if __name__ == "__main__":
    main()
