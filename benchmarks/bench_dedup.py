"""Three identical prompts submitted together to an engine whose node's peer has their blocks: how often are they pulled?

Engine A on node A serves prompts and leaves. Engine C, fresh, on a node that holds nothing, warms nothing and reaches node A
by tcp alone, gets each prompt three times at once. Counted is what really crossed the loopback device (the kernel's counter,
in whole blocks, so that headers and control messages do not count; what else the machine sends to itself meanwhile does) over
the blocks of the prompt: 1 when they were pulled once. The figure is the largest over all prompts. Outputs must equal engine
A's, and all full blocks must have come from the peer, or the run fails.
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
    wait_saved,
)

from kvshare.config import Settings

COPIES = 3
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
        engine = fleet.start_engine("engine-c", node_c)
        engine.generate([prompt(WARM_UP_SEED)])
        rounds = [pull(engine, i, output, block_bytes) for i, output in enumerate(expected)]
    pulls = max(turn["pulls"] for turn in rounds)
    detail = {"copies": COPIES, "tokens": TOKENS, "blocks": BLOCKS, "block_bytes": block_bytes, "prompts": rounds}
    report({"identical_prompts_pulls": (pulls, "pulls")}, detail, options.json)


def serve_first(fleet: Fleet, node: Settings, prompts: int) -> list[list[int]]:
    engine = fleet.start_engine("engine-a", node)
    outputs = [engine.generate([prompt(SHARED_SEED + i)])["outputs"][0] for i in range(prompts)]
    progress(f"engine-a: {wait_saved(node, prompts * BLOCKS)} blocks saved")
    fleet.stop(engine)
    return outputs


def pull(engine: Engine, number: int, expected: list[int], block_bytes: int) -> dict[str, Any]:
    """One prompt, all copies at once."""
    time.sleep(SETTLE_SECONDS)
    before = loopback_bytes()
    answer = engine.generate([prompt(SHARED_SEED + number)] * COPIES)
    time.sleep(SETTLE_SECONDS)  # a pull that outlives the answer counts too
    moved = loopback_bytes() - before
    if answer["outputs"] != [expected] * COPIES:
        raise Failed(f"prompt {number} gave {answer['outputs']}, engine A gave {expected}")
    if answer["cached"] != [BLOCKS * BLOCK_TOKENS] * COPIES:
        raise Failed(f"prompt {number}: {answer['cached']} of {BLOCKS * BLOCK_TOKENS} tokens were not recomputed")
    turn = {"pulls": moved // block_bytes / BLOCKS, "loopback_bytes": moved, "seconds": answer["seconds"]}
    progress(f"prompt {number}: {moved} bytes, {turn['pulls']:.3f} pulls, {turn['seconds']:.3f} s")
    return turn


def loopback_bytes() -> int:
    """Bytes that this machine (or network namespace) has sent to itself by sockets."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "lo":
            return int(counters.split()[8])
    raise Failed("there is no loopback device")


if __name__ == "__main__":
    main()
