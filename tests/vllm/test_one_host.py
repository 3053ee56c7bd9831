"""Engines on one host: what they save they load, and whatever happens to blocks and node, outputs are those of vLLM alone.

Outputs are compared in token ids and log probabilities with an engine without kvshare. Where the same tokens are computed in
the same chunks they must be equal to the last bit; where the chunks differ (a part of a prompt is recomputed) arithmetic in
bfloat16 differs a little.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvshare.integrations.testing import engine_arguments
from tests.vllm.conftest import EngineChild, House, eventually, prompt, real_model

pytestmark = pytest.mark.vllm

BLOCK = 128
# Prompts are prefilled in chunks of 512 tokens: all tests here cover chunked prefill.
ARGUMENTS = {"load_format": "auto", "max_num_batched_tokens": 512, "max_model_len": 2560}
BLOCKS = 7
TOKENS = BLOCKS * BLOCK + 60
CLOSE = 0.08  # in log probabilities, when chunks differ
NAMES = ["plain", "triple", "salted", "corrupt", "aborted", "second", "hung", "killed", "reset"]
PROMPTS = {name: prompt(seed, TOKENS) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return real_model(tmp_path_factory.mktemp("model"))


class Reference:
    """What vLLM alone says: computed from nothing (``cold``) and from its own prefix cache (``hit``)."""

    def __init__(self, engine: EngineChild) -> None:
        self.cold = {name: engine.generate(tokens)[0] for name, tokens in PROMPTS.items()}
        self.hit = {name: engine.generate(tokens)[0] for name, tokens in PROMPTS.items()}


@pytest.fixture(scope="module")
def reference(child: EngineChild, model: str) -> Reference:
    child.start(engine_arguments(model, **ARGUMENTS), None)
    made = Reference(child)
    child.stop()
    return made


@pytest.fixture(scope="module")
def engine(house: House, child: EngineChild, model: str, reference: Reference) -> Iterator[EngineChild]:
    house.start_node()
    child.start(engine_arguments(model, **ARGUMENTS), house.given)
    yield child
    child.stop()


def fill(house: House, engine: EngineChild, name: str, **options: Any) -> dict[str, Any]:
    """Have the engine compute and save a prompt, then forget it, so that it can only load it. Returns its output."""
    before = house.counter("stored")
    output = engine.generate(PROMPTS[name], **options)[0]
    assert house.saved(before + BLOCKS)
    assert engine.ask("reset")
    engine.ask("loaded")
    return output


def close(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one["tokens"] == two["tokens"] and bool(np.allclose(one["logprobs"], two["logprobs"], rtol=0, atol=CLOSE))


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one["tokens"] == two["tokens"] and one["logprobs"] == two["logprobs"]


def test_a_loaded_prompt_answers_as_one_from_the_engines_own_cache(
    house: House, engine: EngineChild, reference: Reference
) -> None:
    assert same(fill(house, engine, "plain"), reference.cold["plain"])
    loaded = engine.generate(PROMPTS["plain"])[0]
    assert loaded["cached"] == BLOCKS * BLOCK and engine.ask("loaded") == [BLOCKS]
    assert same(loaded, reference.hit["plain"])


def test_a_longer_prompt_loads_the_prefix_that_is_known(house: House, engine: EngineChild) -> None:
    longer = [*PROMPTS["plain"][: 4 * BLOCK], *prompt(99, 500)]
    assert engine.ask("reset")
    loaded = engine.generate(longer)[0]
    assert loaded["cached"] == 4 * BLOCK
    engine.ask("reset")
    assert engine.ask("loaded") == [4]


def test_three_identical_prompts_load_once(house: House, engine: EngineChild, reference: Reference) -> None:
    fill(house, engine, "triple")
    outputs = engine.generate(*[PROMPTS["triple"]] * 3)
    assert engine.ask("loaded") == [BLOCKS]
    assert all(close(output, reference.hit["triple"]) and output["cached"] == BLOCKS * BLOCK for output in outputs)


def test_a_salt_never_crosses(house: House, engine: EngineChild, reference: Reference) -> None:
    fill(house, engine, "salted", salt="tenant a")
    for salt in (None, "tenant b"):
        assert engine.generate(PROMPTS["salted"], salt=salt)[0]["cached"] == 0
    assert engine.ask("loaded") == []
    engine.ask("reset")
    loaded = engine.generate(PROMPTS["salted"], salt="tenant a")[0]
    assert engine.ask("loaded") == [BLOCKS] and same(loaded, reference.hit["salted"])


def test_a_corrupt_block_is_recomputed(house: House, engine: EngineChild, reference: Reference) -> None:
    fill(house, engine, "corrupt")
    corrupted = corrupt_every(house, 5)
    output = engine.generate(PROMPTS["corrupt"])[0]
    assert corrupted and engine.ask("loaded") == [BLOCKS]
    assert close(output, reference.hit["corrupt"])
    assert house.counter("corrupt") >= 1, "the bad blocks were taken out"
    assert engine.said("failed their checksum")
    # What was recomputed is saved again, and good.
    engine.ask("reset")
    assert close(engine.generate(PROMPTS["corrupt"])[0], reference.hit["corrupt"])


def corrupt_every(house: House, step: int) -> int:
    """Flip a byte in every ``step``-th slot of the arena, behind everyone's back."""
    (data,) = [path for path in house.arena_files() if path.suffix == ".data"]
    slot_bytes = int(data.stem.rsplit("-", 1)[1])
    memory = np.memmap(data, np.uint8, "r+")
    places = range(slot_bytes // 2, len(memory), slot_bytes * step)
    for place in places:
        memory[place] ^= 1
    return len(places)


def test_an_aborted_request_whose_blocks_are_on_their_way_harms_nobody(
    house: House, engine: EngineChild, reference: Reference
) -> None:
    fill(house, engine, "aborted")
    engine.ask("hold_loads", hold=True)
    engine.ask("begin", name="victim", prompt=PROMPTS["aborted"])
    assert engine.ask("steps", count=3) == []
    assert engine.ask("loaded") == [BLOCKS]
    engine.ask("abort", name="victim")
    # The engine goes on while the load of the aborted request still writes to its blocks.
    other = engine.generate(PROMPTS["plain"][:BLOCK])[0]
    engine.ask("hold_loads", hold=False)
    engine.ask("steps", count=50)
    assert len(other["tokens"]) == 4
    assert same(engine.generate(PROMPTS["aborted"])[0], reference.hit["aborted"])
    assert engine.ask("reset"), "no block is held any more"


def test_an_engine_in_another_process_loads_what_the_first_saved(
    house: House, engine: EngineChild, reference: Reference, model: str
) -> None:
    fill(house, engine, "second")
    second = house.child("second")
    second.start(engine_arguments(model, **ARGUMENTS), house.given)
    loaded = second.generate(PROMPTS["second"])[0]
    assert loaded["cached"] == BLOCKS * BLOCK and close(loaded, reference.hit["second"])
    metrics = second.ask("metrics")
    assert metrics["vllm:external_prefix_cache_hits"] == BLOCKS * BLOCK
    before = house.counter("stored")
    second.generate(prompt(77, TOKENS))
    assert house.saved(before + BLOCKS)
    second.close()
    assert second.process.returncode == 0, second.log[-3000:]


def test_a_node_that_hangs_holds_no_request(house: House, engine: EngineChild, reference: Reference) -> None:
    """What it held can still be loaded, nothing can be asked or saved; the engine waits for none of it."""
    fill(house, engine, "hung")
    assert house.node is not None
    house.node.send_signal(signal.SIGSTOP)
    try:
        assert same(engine.generate(PROMPTS["hung"])[0], reference.hit["hung"])
        unknown = prompt(55, TOKENS)
        first = engine.generate(unknown)[0]
        assert engine.ask("reset")
        assert same(engine.generate(unknown)[0], first)
    finally:
        house.node.send_signal(signal.SIGCONT)


def test_a_killed_node_costs_nothing_but_the_sharing(house: House, engine: EngineChild, reference: Reference) -> None:
    fill(house, engine, "killed")
    house.kill_node()
    output = engine.generate(PROMPTS["killed"])[0]
    assert same(output, reference.cold["killed"]) or close(output, reference.hit["killed"])
    assert engine.said("lost the node")
    engine.ask("reset")
    house.start_node()
    # The node found its blocks again, and the engine found its node again.
    assert eventually(lambda: engine.generate(PROMPTS["killed"])[0]["cached"] > 0 or not engine.ask("reset"))
    # Both its sessions did, each when it noticed: until the worker's has, nothing is saved.
    assert eventually(lambda: len(engine.said("attached to the node at")) == 2)


def test_after_a_reset_of_the_connector_the_engine_shares_only_with_itself(
    house: House, engine: EngineChild, reference: Reference
) -> None:
    fill(house, engine, "reset")
    assert engine.ask("reset", connector=True)
    assert len(engine.said("its weights may have changed")) == 1
    assert same(engine.generate(PROMPTS["reset"])[0], reference.cold["reset"])
    assert engine.ask("loaded") == []
    engine.ask("reset")
    assert eventually(lambda: engine.generate(PROMPTS["reset"])[0]["cached"] == BLOCKS * BLOCK)
    assert engine.ask("loaded") == [BLOCKS]


def test_one_log_line_says_what_is_shared(engine: EngineChild) -> None:
    assert len(engine.said("kvshare: shares blocks of")) == 1


def test_the_fixture_would_notice_a_wrong_block(reference: Reference) -> None:
    """The model's outputs depend on the whole prompt: another first token, other log probabilities."""
    assert not close(reference.cold["plain"], reference.cold["triple"])
