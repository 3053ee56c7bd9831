"""One vLLM engine as a child of the tests: JSON lines in on stdin, one JSON line out for each on stdout.

``{"do": name, ...}`` calls the method `Engine.<name>`; what it returns is the answer's "result", what it raises its "error".
``start`` and ``stop`` may be asked in turn; the process ends when its input does. vLLM's own output goes to stderr, which the
tests read as its log.

In an engine within this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) loads can be counted and held back.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any


class Loads:
    """Stands before `Mover.load`: counts blocks, and holds loads back while ``gate`` is closed."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self._installed = False

    def install(self) -> None:
        from kvshare.mover import Mover
        from kvshare.transport.base import Transfer

        if self._installed:
            return
        self._installed = True
        loads, original = self, Mover.load

        def load(mover: Any, plan: Any, targets: Any) -> Any:
            loads.blocks.append(len(plan))
            transfer = Transfer()

            def run() -> None:
                loads.gate.wait(60)
                original(mover, plan, targets).then(transfer.complete)

            if loads.gate.is_set():
                return original(mover, plan, targets)
            threading.Thread(target=run, daemon=True).start()
            return transfer

        Mover.load = load  # type: ignore[method-assign]


class Engine:
    """The methods are the questions that a test may ask."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.loads = Loads()

    def start(self, arguments: dict[str, Any], connector: dict[str, Any] | None, role: str = "kv_both") -> None:
        """``connector``: its ``kv_connector_extra_config``; None for an engine without kvshare."""
        from vllm import LLM

        if connector is not None:
            self.loads.install()
            transfer = {"kv_connector": "KVShareConnector", "kv_role": role, "kv_connector_extra_config": connector}
            arguments = {**arguments, "kv_transfer_config": transfer}
        self.llm = LLM(**arguments, disable_log_stats=False)

    def stop(self) -> None:
        """End the engine, not the process: another one may be started."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
        cleanup_dist_env_and_memory()

    def generate(
        self, prompts: list[list[int]], tokens: int = 4, salt: str | None = None, adapter: str | None = None
    ) -> list[dict[str, Any]]:
        """Greedy ``tokens`` after each prompt: ids, their log probabilities, how many prompt tokens were not computed."""
        from vllm.lora.request import LoRARequest

        asked = [{"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})} for prompt in prompts]
        lora = LoRARequest(os.path.basename(adapter), _number(adapter), adapter) if adapter else None
        results = self.llm.generate(asked, self._sampling(tokens), use_tqdm=False, lora_request=lora)
        return [_described(result) for result in results]

    def begin(self, name: str, prompt: list[int], tokens: int = 4) -> None:
        """Add a request without running the engine."""
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, self._sampling(tokens))

    def steps(self, count: int) -> list[str]:
        """Run up to ``count`` steps; names of requests that ended."""
        ended = []
        for _ in range(count):
            if not self.llm.llm_engine.has_unfinished_requests():
                break
            ended += [output.request_id for output in self.llm.llm_engine.step() if output.finished]
        return ended

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    def reset(self, connector: bool = False) -> bool:
        """Empty vLLM's prefix cache, and the connector's if ``connector``."""
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def loaded(self) -> list[int]:
        """Blocks of each load since the last call."""
        blocks, self.loads.blocks = self.loads.blocks, []
        return blocks

    def hold_loads(self, hold: bool) -> None:
        if hold:
            self.loads.gate.clear()
        else:
            self.loads.gate.set()

    def metrics(self) -> dict[str, float]:
        return {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}

    def _sampling(self, tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0)


def _number(adapter: str) -> int:
    return 1 + sum(os.path.basename(adapter).encode())


def _described(result: Any) -> dict[str, Any]:
    output = result.outputs[0]
    ids = list(output.token_ids)
    return {
        "tokens": ids,
        "logprobs": [entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)],
        "cached": result.num_cached_tokens,
        "ended": output.finish_reason,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # not inherited by vLLM's processes
    os.dup2(2, 1)
    engine = Engine()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"result": getattr(engine, question.pop("do"))(**question)}
        except Exception as error:  # the test decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if engine.llm is not None:
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
