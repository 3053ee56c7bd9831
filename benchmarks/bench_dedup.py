"""Three identical prompts submitted together to an engine that could load their blocks: how often does it load them?

Engine A on node A serves prompts and leaves. Engine C is fresh, on a node that holds nothing, warms nothing and reaches node A
by tcp alone. It gets each prompt three times at once, twice over:

* from the peer: counted is what really crossed the loopback device (the kernel's counter, in whole blocks, so that headers
  and control messages do not count; what else the machine sends to itself meanwhile does);
* with its own prefix cache emptied, from its node's arena: counted is what its connector says it has loaded.

Both over the blocks of the prompt: 1 when they were loaded once. The figure is the largest of all. Every output must equal
engine A's and depends on the whole prompt (real weights, float32), and all full blocks must have been loaded, or the run fails.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import (
    BLOCK_TOKENS,
    BLOCKS,
    TOKENS,
    Engine,
    Failed,
    Fleet,
    arguments,
    node_status,
    progress,
    prompt,
    report,
    saved_blocks,
    wait_saved,
)

from kvshare.config import Settings

COPIES = 3
NEW_TOKENS = 4
MODEL = {"weights": True, "dtype": "float32"}
SHARED_SEED, WARM_UP_SEED = 5_000, 9_500
SETTLE_SECONDS = 1.0


def main() -> None:
    options = arguments(__doc__ or "")
    prompts = 2 if options.quick else 5
    with Fleet() as fleet:
        fleet.start_directory()
        node_a = fleet.settings("a", warm_bytes=0)
        fleet.start_node(node_a)
        expected = serve_first(fleet, node_a, prompts)
        block_bytes = node_status(node_a).node.regions[0].slot_bytes
        node_c = fleet.settings("c", transports=("tcp",), warm_bytes=0)
        fleet.start_node(node_c)
        engine = fleet.start_engine("engine-c", node_c, model=MODEL, count=True)
        engine.generate([prompt(WARM_UP_SEED)])
        rounds = [load_twice(engine, node_c, i, output, block_bytes) for i, output in enumerate(expected)]
    pulls = max(max(turn["pulls_tcp"], turn["loads_tcp"], turn["loads_arena"]) for turn in rounds)
    detail = {"copies": COPIES, "tokens": TOKENS, "blocks": BLOCKS, "block_bytes": block_bytes, "prompts": rounds}
    report({"identical_prompts_pulls": (pulls, "pulls")}, detail, options.json)


def serve_first(fleet: Fleet, node: Settings, prompts: int) -> list[list[int]]:
    engine = fleet.start_engine("engine-a", node, model=MODEL)
    outputs = [engine.generate([prompt(SHARED_SEED + i)], NEW_TOKENS)["outputs"][0] for i in range(prompts)]
    progress(f"engine-a: {wait_saved(node, prompts * BLOCKS)} blocks saved")
    fleet.stop(engine)
    return outputs


def load_twice(engine: Engine, node: Settings, number: int, expected: list[int], block_bytes: int) -> dict[str, Any]:
    """One prompt, all copies at once: from the peer, then from the own arena."""
    saved = saved_blocks(node)
    moved = loopback_bytes()
    loads_tcp = load(engine, number, expected)
    moved = loopback_bytes() - moved
    wait_saved(node, saved + BLOCKS)
    engine.ask(do="forget")
    turn = {
        "pulls_tcp": moved // block_bytes / BLOCKS,
        "loopback_bytes": moved,
        "loads_tcp": loads_tcp / BLOCKS,
        "loads_arena": load(engine, number, expected) / BLOCKS,
    }
    progress(f"prompt {number}: {turn}")
    return turn


def load(engine: Engine, number: int, expected: list[int]) -> int:
    """Blocks loaded for all copies of one prompt, by the connector's account."""
    before = engine.ask(do="loaded")["blocks"]
    answer = engine.generate([prompt(SHARED_SEED + number)] * COPIES, NEW_TOKENS)
    time.sleep(SETTLE_SECONDS)  # a load that outlives the answer counts too
    if answer["outputs"] != [expected] * COPIES:
        raise Failed(f"prompt {number} gave {answer['outputs']}, engine A gave {expected}")
    if answer["cached"] != [BLOCKS * BLOCK_TOKENS] * COPIES:
        raise Failed(f"prompt {number}: {answer['cached']} of {BLOCKS * BLOCK_TOKENS} tokens were not recomputed")
    loaded: int = engine.ask(do="loaded")["blocks"] - before
    return loaded


def loopback_bytes() -> int:
    """Bytes that this machine (or network namespace) has sent to itself by sockets."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "lo":
            return int(counters.split()[8])
    raise Failed("there is no loopback device")


if __name__ == "__main__":
    main()
