"""A KV cache too small for its requests, small blocks, adapters: preempted requests and reused blocks stay right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvshare.integrations.testing import engine_arguments
from tests.vllm.conftest import EngineChild, House, prompt, real_model

pytestmark = pytest.mark.vllm

BLOCK = 32
# 32 blocks for 6 requests that come to need 8 each: some are preempted.
ARGUMENTS = {
    "load_format": "auto", "block_size": BLOCK, "num_gpu_blocks_override": 33, "max_model_len": 512, "max_num_seqs": 6,
    "max_num_batched_tokens": 256, "prefix_caching_hash_algo": "sha256_cbor", "enable_lora": True, "max_lora_rank": 8,
    "max_loras": 1,
}  # fmt: skip
CLOSE = 0.15  # in log probabilities: batches differ


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return real_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of one shape and different weights."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(4):
            name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
            tensors[f"{name}.lora_A.weight"] = torch.randn((8, 256), generator=generator) / 8
            tensors[f"{name}.lora_B.weight"] = torch.randn((128, 8), generator=generator) / 2
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        config = {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["v_proj"],
            "bias": "none",
            "use_dora": False,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    return folders


PROMPTS = [prompt(seed, 5 * BLOCK + 7) for seed in range(7)]
TOKENS = 2 * BLOCK  # generated: with them a request needs 8 blocks


@pytest.fixture(scope="module")
def reference(child: EngineChild, model: str, adapters: list[str]) -> dict[str, Any]:
    """vLLM alone, one request at a time: what each says when nothing is preempted."""
    child.start(engine_arguments(model, **ARGUMENTS), None)
    outputs = {
        "plain": [child.generate(tokens, tokens=TOKENS)[0] for tokens in PROMPTS[:6]],
        "adapters": [child.generate(PROMPTS[6], adapter=adapter)[0] for adapter in (*adapters, None)],
    }
    child.stop()
    return outputs


@pytest.fixture(scope="module")
def engine(house: House, child: EngineChild, model: str, reference: dict[str, Any]) -> Iterator[EngineChild]:
    house.start_node()
    child.start(engine_arguments(model, **ARGUMENTS), house.given)
    yield child
    child.stop()


def agree(output: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal up to where bfloat16 made another choice between tokens of nearly equal probability."""
    pairs = list(zip(output["tokens"], expected["tokens"], strict=False))
    alike = next((i for i, (one, two) in enumerate(pairs) if one != two), len(pairs) - 1)
    ours, theirs = output["logprobs"][: alike + 1], expected["logprobs"][: alike + 1]
    return alike >= 1 and bool(np.allclose(ours, theirs, rtol=0, atol=CLOSE))


def test_preempted_requests_and_reused_blocks_stay_right(house: House, engine: EngineChild, reference: dict[str, Any]) -> None:
    for _ in range(2):
        outputs = engine.generate(*PROMPTS[:6], tokens=TOKENS)
        assert all(agree(output, expected) for output, expected in zip(outputs, reference["plain"], strict=True))
        assert engine.ask("reset")
    assert engine.ask("metrics")["vllm:num_preemptions"] > 0, "the cache was small enough"
    assert sum(engine.ask("loaded")) > 0
    assert house.counter("corrupt") == 0


def test_what_was_saved_under_pressure_is_right_when_it_is_loaded(
    house: House, engine: EngineChild, reference: dict[str, Any]
) -> None:
    for tokens, expected in zip(PROMPTS[:6], reference["plain"], strict=True):
        engine.ask("reset")
        engine.ask("loaded")
        output = engine.generate(tokens, tokens=8)[0]
        assert agree(output, expected) and engine.ask("loaded") == [5]


def test_adapters_never_cross(house: House, engine: EngineChild, reference: dict[str, Any], adapters: list[str]) -> None:
    for adapter, expected in zip((*adapters, None), reference["adapters"], strict=True):
        before = house.counter("stored")
        engine.ask("loaded")
        output = engine.generate(PROMPTS[6], adapter=adapter)[0]
        assert engine.ask("loaded") == [] and agree(output, expected)
        assert house.saved(before + 5)
        engine.ask("reset")
        output = engine.generate(PROMPTS[6], adapter=adapter)[0]
        assert engine.ask("loaded") == [5] and agree(output, expected)
    one, two, none = reference["adapters"]
    assert not agree(one, two) and not agree(one, none), "the adapters matter"
