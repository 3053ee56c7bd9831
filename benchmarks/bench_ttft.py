"""Time to first token of a worker that joins: blocks from its own node's arena, and straight from a peer over tcp.

1. Engine A on node A serves prompts; node A's arena holds their blocks. Engine A ends.
2. Engine B, fresh, on the same node: the first time it sees each prompt its blocks come from the arena; the second time
   they are in its own prefix cache; prompts of equal length that nobody has seen are recomputed.
3. Engine C, fresh, on a node of another name that holds nothing and warms nothing (``warm_bytes=0``): the same, but the
   blocks come from node A over tcp, the only transport that node and engine have.

Ratios compare the medians of one engine in one run; the three kinds of request take turns, with a pause in front of each, as
of a user who sends one request at a time. Saving is on throughout. The model's weights make every output depend on the whole
prompt; what was loaded must give engine A's output of its prefix hit (which computes the same last tokens), or the run fails.
A prompt whose blocks were not found in time is recomputed, as for any user: its time counts.
"""

from __future__ import annotations

import time
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
    summary,
    wait_saved,
)

from kvshare.config import Settings

PAUSE_SECONDS = 0.3
MODEL = {"weights": True}
WARM_UP_SEED, SHARED_SEED = 9_000, 1_000
FRESH_SEEDS = {"arena": 2_000, "tcp": 3_000, "disk": 4_000, "object": 5_000}


def main() -> None:
    options = arguments(__doc__ or "")
    prompts = 3 if options.quick else 9
    with Fleet() as fleet:
        fleet.start_directory()
        node_a = fleet.settings("a", warm_bytes=0)
        fleet.start_node(node_a)
        expected, donor = serve_first(fleet, node_a, prompts)
        arena = measure_joiner(fleet, "arena", node_a, expected)
        node_c = fleet.settings("c", transports=("tcp",), warm_bytes=0)
        fleet.start_node(node_c)
        tcp = measure_joiner(fleet, "tcp", node_c, expected)
        detail = {"tokens": TOKENS, "blocks": BLOCKS, "pause_s": PAUSE_SECONDS, "donor": donor, "arena": arena, "tcp": tcp}
        detail["bytes"] = sum(region.slot_bytes for region in node_status(node_a).node.regions[:1]) * BLOCKS
    figures = {}
    for way, measured in (("arena", arena), ("tcp", tcp)):
        first = measured["first_s"]["median"]
        figures[f"ttft_{way}_over_prefix_hit"] = (first / measured["prefix_hit_s"]["median"], "ratio")
        figures[f"ttft_{way}_over_recompute"] = (first / measured["recompute_s"]["median"], "ratio")
    report(figures, detail, options.json)


def serve_first(fleet: Fleet, node: Settings, prompts: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Engine A computes the prompts and leaves. Returns the output of each, and its own times."""
    engine = fleet.start_engine("engine-a", node, model=MODEL)
    warm_up(engine)
    outputs, recompute, hits = [], [], []
    for i in range(prompts):
        recompute.append(request(engine, prompt(SHARED_SEED + i))["seconds"])
        answer = request(engine, prompt(SHARED_SEED + i))
        outputs.append(answer["outputs"][0])
        hits.append(answer["seconds"])
    saved = wait_saved(node, (prompts + 2) * BLOCKS)
    progress(f"engine-a: {saved} blocks saved")
    fleet.stop(engine)
    return outputs, {"recompute_s": summary(recompute), "prefix_hit_s": summary(hits), "blocks_saved": saved}


def measure_joiner(fleet: Fleet, way: str, node: Settings, expected: list[list[int]]) -> dict[str, Any]:
    engine = fleet.start_engine(f"engine-{way}", node, model=MODEL)
    warm_up(engine, 10)
    first, hits, recompute = [], [], []
    missed = 0
    for i, output in enumerate(expected):
        recompute.append(request(engine, prompt(FRESH_SEEDS[way] + i))["seconds"])
        answer = request(engine, prompt(SHARED_SEED + i))
        first.append(answer["seconds"])
        missed += answer["cached"][0] != BLOCKS * BLOCK_TOKENS
        hits.append(request(engine, prompt(SHARED_SEED + i))["seconds"])
        if answer["cached"][0] and answer["outputs"][0] != output:
            raise Failed(f"{way}: prompt {i} gave {answer['outputs'][0]}, engine A gave {output}")
        progress(f"{way}: prompt {i}: {first[-1]:.4f} s, prefix hit {hits[-1]:.4f} s, recompute {recompute[-1]:.3f} s")
    fleet.stop(engine)
    return {
        "first_s": summary(first),
        "very_first_s": first[0],  # connections and mappings are new
        "prefix_hit_s": summary(hits),
        "recompute_s": summary(recompute),
        "paired_over_prefix_hit": summary([a / b for a, b in zip(first, hits, strict=True)]),
        "prompts_not_loaded_whole": missed,
    }


def request(engine: Engine, token_ids: list[int]) -> dict[str, Any]:
    time.sleep(PAUSE_SECONDS)
    return engine.generate([token_ids])


def warm_up(engine: Engine, offset: int = 0) -> None:
    """Two prompts that nothing else uses: the engine has then computed, and saved, but not loaded."""
    for i in range(2):
        request(engine, prompt(WARM_UP_SEED + offset + i))


if __name__ == "__main__":
    main()
