"""One vLLM engine as a child process of a benchmark: JSON lines in on stdin, JSON lines out on stdout.

    {"do": "generate", "prompts": [[ids]], "tokens": 1} -> {"seconds": wall time of LLM.generate, "outputs": [[ids]]}
    {"do": "metrics"}                                   -> {"metrics": {name: value}}

It ends when its input does. vLLM's own output, and that of its processes, goes to stderr (the benchmark's log file).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

TRANSFER = {"kv_connector": "KVShareConnector", "kv_role": "kv_both"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # not inherited by vLLM's processes
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    from kvshare.integrations.testing import engine_arguments, engine_environment, tiny_model

    os.environ.update(engine_environment())
    from vllm import LLM

    transfer = {"kv_transfer_config": TRANSFER} if asked["kvshare"] else {}
    llm = LLM(**engine_arguments(tiny_model(asked["folder"])), **transfer, **asked["options"])
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        _answer(answers, serve(llm, json.loads(line)))
    llm.llm_engine.engine_core.shutdown()


def serve(llm: Any, question: dict[str, Any]) -> dict[str, Any]:
    if question["do"] == "metrics":
        return {"metrics": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}}
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": token_ids} for token_ids in question["prompts"]]
    sampling = SamplingParams(max_tokens=question["tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    results = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "outputs": [list(result.outputs[0].token_ids) for result in results],
        "cached": [result.num_cached_tokens for result in results],
    }


def _answer(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
