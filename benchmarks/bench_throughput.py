"""What saving everything costs an engine at work: prefill and decode throughput with kvshare, over the same without.

One engine, whose connector is taken out and put back between rounds (`toggle` says why); rounds alternate which comes first. A
prefill round is a batch of fresh prompts for one token each; a decode round a batch of short prompts for many tokens, long
enough that blocks of output are completed and saved too. A ratio compares the two halves of a round, neighbours in time; the
figure is the median ratio. For comparison the detail has a few rounds of another engine that never had a connector.
"""

from __future__ import annotations

import time
from typing import Any

from common import BLOCK_TOKENS, Engine, Fleet, arguments, progress, prompt, report, saved_blocks, summary, wait_saved

# A prompt fills a step (4,096 tokens): whether the first two share one must not depend on the lookup's milliseconds.
PREFILL_PROMPTS, PREFILL_TOKENS = 2, 4000
DECODE_PROMPTS, DECODE_PROMPT_TOKENS, DECODE_TOKENS = 4, 32, 240  # two blocks of 128 tokens each
PAUSE_SECONDS = 0.3  # saves of a half's last step end in it, so that they do not burden the other half
PREFILL_BLOCKS = PREFILL_PROMPTS * (PREFILL_TOKENS // BLOCK_TOKENS)
DECODE_BLOCKS = DECODE_PROMPTS * ((DECODE_PROMPT_TOKENS + DECODE_TOKENS - 1) // BLOCK_TOKENS)
APART_ROUNDS = 5


def main() -> None:
    options = arguments(__doc__ or "")
    rounds = {"prefill": 3, "decode": 3} if options.quick else {"prefill": 12, "decode": 100}
    detail: dict[str, Any] = {"rounds": rounds}
    with Fleet() as fleet:
        fleet.start_directory()
        settings = fleet.settings("node", warm_bytes=0, arena_bytes=2 << 30)
        fleet.start_node(settings)
        engine = fleet.start_engine("engine-kvshare", settings, toggled=True)
        warm_up(engine)
        for kind, expected in (("prefill", PREFILL_BLOCKS), ("decode", DECODE_BLOCKS)):
            before = saved_blocks(settings)
            detail[kind] = measure(engine, kind, rounds[kind])
            detail[kind]["blocks_expected"] = rounds[kind] * expected
            detail[kind]["blocks_saved"] = wait_saved(settings, before + rounds[kind] * expected) - before
        fleet.stop(engine)
        if not options.quick:
            engine = fleet.start_engine("engine-alone", None)
            warm_up(engine)
            for kind in ("prefill", "decode"):
                apart = [half(engine, kind, batch(kind, 1000 + turn))["rate"] for turn in range(APART_ROUNDS)]
                detail[kind]["tokens_per_s"]["engine that never had a connector"] = summary(apart)
    figures = {f"{kind}_ratio": (detail[kind]["ratio"]["median"], "ratio") for kind in ("prefill", "decode")}
    report(figures, detail, options.json)


def warm_up(engine: Engine) -> None:
    engine.generate([prompt(10, PREFILL_TOKENS)])
    engine.generate([prompt(20, DECODE_PROMPT_TOKENS)], 16)


def measure(engine: Engine, kind: str, rounds: int) -> dict[str, Any]:
    """Both halves of each round; the engine has its connector before and after."""
    halves: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    attached = True
    for turn in range(rounds):
        prompts = batch(kind, turn)  # fresh in every round, the same for both halves
        for side in ("with", "without") if turn % 2 else ("without", "with"):
            if attached != (side == "with"):
                engine.ask(do="toggle")
                attached = not attached
            else:
                engine.ask(do="forget")
            halves[side].append(half(engine, kind, prompts))
        said = ", ".join(f"{side} {done[-1]['rate']:.1f} tokens/s" for side, done in halves.items())
        progress(f"{kind} round {turn}: {said}")
    if not attached:
        engine.ask(do="toggle")
    ratios = [ours["rate"] / theirs["rate"] for ours, theirs in zip(halves["with"], halves["without"], strict=True)]
    return {
        "ratio": summary(ratios),
        "tokens_per_s": {side: summary([one["rate"] for one in done]) for side, done in halves.items()},
        # Of decode: steadier than the rates on a machine with other work, but blind to steps that only saving makes slow.
        "median_step_s": {side: summary([one["step_s"] for one in done]) for side, done in halves.items()},
    }


def half(engine: Engine, kind: str, prompts: list[list[int]]) -> dict[str, float]:
    """One batch: tokens per second, and the median step."""
    time.sleep(PAUSE_SECONDS)
    answer = engine.generate(prompts, 1 if kind == "prefill" else DECODE_TOKENS)
    tokens = sum(map(len, prompts)) if kind == "prefill" else len(prompts) * DECODE_TOKENS
    return {"rate": tokens / answer["seconds"], "step_s": answer["step_s"]}


def batch(kind: str, turn: int) -> list[list[int]]:
    count, tokens = (PREFILL_PROMPTS, PREFILL_TOKENS) if kind == "prefill" else (DECODE_PROMPTS, DECODE_PROMPT_TOKENS)
    base = 100_000 if kind == "prefill" else 200_000
    return [prompt(base + turn * count + i, tokens) for i in range(count)]


if __name__ == "__main__":
    main()
