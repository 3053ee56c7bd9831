"""A vLLM engine inside a Ray actor, attached to the kvshare node of its Ray node by the connector alone.

The only module of the demo that imports vLLM; it does so within the actor. Threads: the actor's one.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvshare.integrations.demo.report import Served
from kvshare.session import WarmState

TRANSFER = {"kv_connector": "KVShareConnector", "kv_role": "kv_both"}
HEARD_LINES = 200
WORDS = """the operator answers every question of a customer about an order with the number its date and one sentence of advice
never promise what the store cannot deliver prefer short words keep names as they were written tables have a header when unsure
ask once then hand over to a colleague who is on duty write dates as day month year and sums with currency""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Ready:
    """An engine that has started. pid: of the process that holds its scheduler and worker; tokens: per block."""

    pid: int
    block_size: int
    device: str
    versions: dict[str, str]


class Heard(logging.Handler):
    """Keeps what kvshare says in this engine's log: the demo quotes it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=HEARD_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Engine:
    """See the module's docstring. arguments: of ``vllm.LLM``; cores: to bind this process to, empty: none."""

    def __init__(self, arguments: dict[str, Any], cores: Sequence[int], output_tokens: int) -> None:
        if cores:
            os.sched_setaffinity(0, cores)  # vLLM binds nothing when its worker lives in our process
        self._heard = Heard()
        logger = logging.getLogger("kvshare")
        logger.addHandler(self._heard)
        logger.setLevel(logging.INFO)
        from vllm import LLM, SamplingParams

        self._llm: Any = LLM(**arguments, kv_transfer_config=TRANSFER)
        self._sampling = SamplingParams(
            max_tokens=output_tokens, temperature=0.0, logprobs=1, ignore_eos=True, detokenize=False
        )
        self._numbers = itertools.count()

    def ready(self) -> Ready:
        import torch
        import vllm

        config = self._llm.llm_engine.vllm_config
        return Ready(
            os.getpid(),
            config.cache_config.block_size,
            config.device_config.device_type,
            {"vllm": vllm.__version__, "torch": torch.__version__},
        )

    def sample(self, seed: int, count: int) -> list[int]:
        """``count`` token ids, the same for equal seeds: of an invented text if the model has a tokenizer, else random."""
        generator = random.Random(seed)
        config = self._llm.llm_engine.vllm_config.model_config
        if config.skip_tokenizer_init:
            return [generator.randrange(10, config.get_vocab_size() - 10) for _ in range(count)]
        tokenizer = self._llm.get_tokenizer()
        token_ids: list[int] = []
        while len(token_ids) < count:
            text = " ".join(generator.choice(WORDS) for _ in range(count)) + ". "
            token_ids += tokenizer.encode(text, add_special_tokens=False)
        return token_ids[:count]

    def serve(self, prompts: dict[str, list[int]]) -> dict[str, Served]:
        """One request after the other; prompts (token ids) and what became of them by name."""
        return dict(self._run(prompts, 1))

    def stream(self, prompts: dict[str, list[int]], at_once: int) -> Iterator[tuple[str, Served]]:
        """``at_once`` requests in flight; each is told as soon as it is finished."""
        yield from self._run(prompts, at_once)

    def wait_warm(self, timeout: float) -> WarmState:
        """The readiness gate: is what is hot in the cluster on this engine's node?"""
        from kvshare.integrations.vllm import wait_warm

        return wait_warm(timeout)

    def heard(self) -> list[str]:
        """What kvshare has said in this engine's log since the last call."""
        lines = list(self._heard.lines)
        self._heard.lines.clear()
        return lines

    def close(self) -> None:
        """End the engine in good order."""
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, prompts: dict[str, list[int]], at_once: int) -> Iterator[tuple[str, Served]]:
        waiting = deque(prompts.items())
        running: dict[str, _Running] = {}
        finished: list[tuple[str, Served]] = []
        while waiting or running:
            while waiting and len(running) < at_once:
                name, token_ids = waiting.popleft()
                request_id = f"demo-{next(self._numbers)}"
                running[request_id] = _Running(name, time.perf_counter())
                self._llm.llm_engine.add_request(request_id, {"prompt_token_ids": token_ids}, self._sampling)
            outputs = self._llm.llm_engine.step()
            # Only now, when the successor's step has run too: who listens may pull the plug under its blocks.
            for answer in finished:  # no "yield from": Ray sends values into a generator, and a list takes none
                yield answer
            finished = []
            for output in outputs:
                request = running[output.request_id]
                request.see(output)
                if output.finished:
                    del running[output.request_id]
                    finished.append((request.name, request.served(output)))
        for answer in finished:
            yield answer


@dataclass
class _Running:
    name: str
    began: float
    first: float = 0.0

    def see(self, output: Any) -> None:
        if not self.first and output.outputs[0].token_ids:
            self.first = time.perf_counter()

    def served(self, output: Any) -> Served:
        completion = output.outputs[0]
        token_ids = tuple(completion.token_ids)
        logprobs = tuple(at[token].logprob for at, token in zip(completion.logprobs, token_ids, strict=True))
        now = time.perf_counter()
        return Served(token_ids, logprobs, self.first - self.began, now - self.began, output.num_cached_tokens or 0)
