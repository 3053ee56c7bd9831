"""Engines of tensor-parallel degree 2 and 1 on one node, for real: two workers save and load their shares of each block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare.integrations.testing import engine_arguments, tiny_model
from tests.vllm.conftest import EngineChild, House, prompt

pytestmark = pytest.mark.vllm

BLOCK = 128
PROMPT = prompt(8, 5 * BLOCK + 20)
LONGER = [*PROMPT, *prompt(9, BLOCK)]


@pytest.fixture
def process(house: House) -> Iterator[EngineChild]:
    child = house.child("parallel", VLLM_CPU_OMP_THREADS_BIND="0|1")
    yield child
    child.stop()


def arguments(model: str, ranks: int) -> dict[str, Any]:
    return engine_arguments(model, max_model_len=1024, tensor_parallel_size=ranks, disable_custom_all_reduce=True)


def test_blocks_of_two_ranks_serve_two_ranks_and_one(house: House, process: EngineChild, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", layers=4, hidden=256, heads=4, kv_heads=2, weights=True, dtype="float32")
    house.start_node()
    given = {**house.given, "head_shards": 2}
    before = house.counter("stored")
    process.start(arguments(model, 2), given)
    first = process.generate(PROMPT)[0]
    assert first["cached"] == 0
    assert house.saved(before + 2 * 5)  # a shard of each block by each rank
    process.stop()
    process.start(arguments(model, 2), given)
    process.ask("loaded")
    again, longer = (process.generate(asked)[0] for asked in (PROMPT, LONGER))
    assert again["cached"] == 5 * BLOCK and again["tokens"] == first["tokens"]
    assert again["logprobs"] == first["logprobs"]
    process.stop()
    process.start(arguments(model, 1), given)
    one = process.generate(LONGER)[0]
    assert one["cached"] == 6 * BLOCK and one["tokens"] == longer["tokens"]
    assert one["logprobs"] == pytest.approx(longer["logprobs"], abs=1e-3)  # sums over ranks come in another order
