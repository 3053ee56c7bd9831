"""One vLLM engine as a child process of a benchmark: JSON lines in on stdin, JSON lines out on stdout.

    {"do": "generate", "prompts": [[ids]], "tokens": 1} -> {"seconds": wall time of LLM.generate, "outputs": [[ids]],
                                                            "cached": tokens not computed, "step_s": median of its steps}
    {"do": "forget"}     its prefix cache is emptied    -> {"forgotten": true}
    {"do": "toggle"}     of an engine with ``toggled``  -> {"toggled": true}; see `toggle`
    {"do": "loaded"}     of an engine with ``count``    -> {"blocks": loaded by the connector so far}

It ends when its input does. vLLM's own output, and that of its processes, goes to stderr (the benchmark's log file).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

TRANSFER = {"kv_connector": "KVShareConnector", "kv_role": "kv_both"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # not inherited by vLLM's processes
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    from kvshare.integrations.testing import engine_arguments, engine_environment, tiny_model

    os.environ.update(engine_environment())
    import toggle
    from vllm import LLM

    model = tiny_model(asked["folder"], **asked["model"])
    transfer = {"kv_transfer_config": TRANSFER} if asked["kvshare"] else {}
    more = toggle.ARGUMENTS if asked["toggled"] else {}
    llm = LLM(**engine_arguments(model, disable_log_stats=not asked["count"]), **transfer, **more)
    counter = Counter()
    if asked["count"]:
        llm.llm_engine.logger_manager.stat_loggers.append(counter)
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        _answer(answers, serve(llm, counter, json.loads(line)))
    llm.llm_engine.engine_core.shutdown()


class Counter:
    """Adds up what the connector says it has loaded; vLLM hands each step's statistics to it."""

    def __init__(self) -> None:
        self.blocks = 0

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None and scheduler_stats.kv_connector_stats:
            self.blocks += scheduler_stats.kv_connector_stats["blocks_loaded"]

    def log(self) -> None:
        """vLLM calls this every ten seconds of work; there is nothing to say."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Engines of benchmarks do not sleep."""


def serve(llm: Any, counter: Counter, question: dict[str, Any]) -> dict[str, Any]:
    if question["do"] == "loaded":
        return {"blocks": counter.blocks}
    if question["do"] == "toggle":
        import toggle

        toggle.toggle(llm)
        return {"toggled": True}
    if question["do"] == "forget":
        return {"forgotten": llm.reset_prefix_cache()}
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": token_ids} for token_ids in question["prompts"]]
    sampling = SamplingParams(max_tokens=question["tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
    steps: list[float] = []
    step = llm.llm_engine.step
    llm.llm_engine.step = lambda: timed(step, steps)
    began = time.perf_counter()
    results = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    llm.llm_engine.step = step
    return {
        "seconds": seconds,
        "outputs": [list(result.outputs[0].token_ids) for result in results],
        "cached": [result.num_cached_tokens for result in results],
        "step_s": statistics.median(steps),
    }


def timed(step: Callable[[], Any], steps: list[float]) -> Any:
    """One step of the engine, as its user's loop makes it; notes how long it took."""
    began = time.perf_counter()
    outputs = step()
    steps.append(time.perf_counter() - began)
    return outputs


def _answer(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
