"""What saving everything costs an engine at work: prefill and decode throughput with kvshare, over the same without.

Two engines live at the same time, one at work, the other asleep; rounds alternate which of them begins. A prefill round is a
batch of fresh prompts for one token each; a decode round a batch of short prompts for many tokens, long enough that blocks of
output are completed and saved too. A round's ratio compares its two neighbours in time; the figure is the median ratio.
"""

from __future__ import annotations

import time
from typing import Any

from common import BLOCK_TOKENS, Engine, Fleet, arguments, progress, prompt, report, saved_blocks, summary, wait_saved

PREFILL_PROMPTS, PREFILL_TOKENS = 2, 2000
DECODE_PROMPTS, DECODE_PROMPT_TOKENS, DECODE_TOKENS = 4, 32, 240  # two blocks of 128 tokens each
PAUSE_SECONDS = 0.5  # saves of a round's last step end in it, so that they do not burden the other engine's round


def main() -> None:
    options = arguments(__doc__ or "")
    rounds = {"prefill": 3, "decode": 3} if options.quick else {"prefill": 15, "decode": 25}
    with Fleet() as fleet:
        fleet.start_directory()
        settings = fleet.settings("node", warm_bytes=0, arena_bytes=2 << 30)
        fleet.start_node(settings)
        engines = {"kvshare": fleet.start_engine("engine-kvshare", settings), "alone": fleet.start_engine("engine-alone", None)}
        for i, engine in enumerate(engines.values()):
            engine.generate([prompt(10 + i, PREFILL_TOKENS)])
            engine.generate([prompt(20 + i, DECODE_PROMPT_TOKENS)], 16)
        before = saved_blocks(settings)
        prefill = measure(engines, "prefill", rounds["prefill"])
        prefill["blocks_expected"] = rounds["prefill"] * PREFILL_PROMPTS * (PREFILL_TOKENS // BLOCK_TOKENS)
        prefill["blocks_saved"] = wait_saved(settings, before + prefill["blocks_expected"]) - before
        before = saved_blocks(settings)
        decode = measure(engines, "decode", rounds["decode"])
        decode["blocks_expected"] = (
            rounds["decode"] * DECODE_PROMPTS * ((DECODE_PROMPT_TOKENS + DECODE_TOKENS - 1) // BLOCK_TOKENS)
        )
        decode["blocks_saved"] = wait_saved(settings, before + decode["blocks_expected"]) - before
    figures = {
        "prefill_ratio": (prefill["ratio"]["median"], "ratio"),
        "decode_ratio": (decode["ratio"]["median"], "ratio"),
    }
    report(figures, {"rounds": rounds, "prefill": prefill, "decode": decode}, options.json)


def measure(engines: dict[str, Engine], kind: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of both engines in every round, and the ratio of each round."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        # Fresh prompts in every round, the same for both.
        prompts = batch(kind, turn)
        tokens = sum(map(len, prompts)) if kind == "prefill" else len(prompts) * DECODE_TOKENS
        order = list(engines) if turn % 2 else list(reversed(engines))
        for name in order:
            time.sleep(PAUSE_SECONDS)
            answer = engines[name].generate(prompts, 1 if kind == "prefill" else DECODE_TOKENS)
            rates[name].append(tokens / answer["seconds"])
            steps[name].append(answer["step_s"])
        progress(f"{kind} round {turn}: " + ", ".join(f"{name} {values[-1]:.1f} tokens/s" for name, values in rates.items()))
    ratios = [ours / theirs for ours, theirs in zip(rates["kvshare"], rates["alone"], strict=True)]
    return {
        "ratio": summary(ratios),
        "tokens_per_s": {name: summary(values) for name, values in rates.items()},
        # Steadier than the rates on a machine with other work, but blind to steps that only saving makes slow.
        "median_step_s": {name: summary(values) for name, values in steps.items()},
    }


def batch(kind: str, turn: int) -> list[list[int]]:
    count, tokens = (PREFILL_PROMPTS, PREFILL_TOKENS) if kind == "prefill" else (DECODE_PROMPTS, DECODE_PROMPT_TOKENS)
    base = 100_000 if kind == "prefill" else 200_000
    return [prompt(base + turn * count + i, tokens) for i in range(count)]


if __name__ == "__main__":
    main()
