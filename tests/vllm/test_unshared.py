"""Engines that cannot share run on and say why, once; wrong settings are told; changed weights never hit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvshare
from kvshare.integrations.testing import engine_arguments, tiny_model
from kvshare.integrations.vllm import wait_warm
from tests.vllm.conftest import ChildFailed, EngineChild, House, eventually, prompt, real_model

pytestmark = pytest.mark.vllm

BLOCK = 128
PROMPT = prompt(5, 3 * BLOCK + 20)
ARGUMENTS = {"load_format": "auto", "max_model_len": 1024}
OTHER = kvshare.Namespace(
    weights="other", dtype="d", kv_dtype="k", block_size=4, page_bytes=4096, layers=1, kv_heads=1, head_size=64,
    hash_algorithm="kvshare-chain", hash_seed="", packing="other",
)  # fmt: skip


@pytest.fixture
def process(child: EngineChild) -> Iterator[EngineChild]:
    yield child
    child.stop()


@pytest.fixture(scope="module")
def node(house: House) -> House:
    house.start_node()
    return house


def hybrid_model(folder: Path) -> str:
    """A tiny Gemma 3: layers with a sliding window and layers of full attention."""
    path = Path(tiny_model(folder, layers=6, hidden=256, heads=4, kv_heads=2))
    config = json.loads((path / "config.json").read_text())
    config |= {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 128, "sliding_window_pattern": 3,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64, "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_a_model_that_is_not_served_runs_unshared_and_says_so_once(node: House, process: EngineChild, tmp_path: Path) -> None:
    arguments = engine_arguments(hybrid_model(tmp_path), max_model_len=1024)
    process.start(arguments, None)
    expected = process.generate(PROMPT)
    process.stop()
    process.start(arguments, node.given)
    assert process.generate(PROMPT) == expected
    said = process.said("kvshare:")
    assert len(said) == 1 and "runs unshared" in said[0] and "groups" in said[0]


def test_hashes_from_a_random_seed_are_told_with_the_remedy_and_the_engine_runs(
    node: House, process: EngineChild, tmp_path: Path
) -> None:
    before = node.counter("stored")
    process.start(engine_arguments(real_model(tmp_path), prefix_caching_hash_algo="xxhash", **ARGUMENTS), node.given)
    assert len(process.generate(PROMPT)[0]["tokens"]) == 4
    said = process.said("kvshare:")
    assert len(said) == 1 and "ERROR" in said[0] and "PYTHONHASHSEED" in said[0] and "sha256_cbor" in said[0]
    assert node.counter("stored") == before


def test_a_wrong_setting_ends_the_start_with_one_sentence_before_any_process_of_the_engine(
    node: House, process: EngineChild, tmp_path: Path
) -> None:
    arguments = engine_arguments(tiny_model(tmp_path, layers=2, hidden=256, heads=4, kv_heads=2))
    with pytest.raises(ChildFailed, match=r"ConfigError: unknown setting 'arena_byte' .*did you mean 'arena_bytes'"):
        process.start(arguments, {"arena_byte": "1GiB"})
    assert process.said("EngineCore pid") == []


def test_changed_weights_under_the_same_path_never_hit(node: House, process: EngineChild, tmp_path: Path) -> None:
    model = real_model(tmp_path / "model", seed=1)
    process.start(engine_arguments(model, **ARGUMENTS), node.given)
    before = node.counter("stored")
    first = process.generate(PROMPT)[0]
    assert node.saved(before + 3)
    process.stop()
    assert real_model(tmp_path / "model", seed=2) == model
    process.start(engine_arguments(model, **ARGUMENTS), node.given)
    process.ask("loaded")
    second = process.generate(PROMPT)[0]
    assert second["cached"] == 0 and process.ask("loaded") == []
    assert second["tokens"] != first["tokens"]
    # And the first weights, wherever they lie, find their blocks.
    process.stop()
    process.start(engine_arguments(real_model(tmp_path / "elsewhere", seed=1), **ARGUMENTS), node.given)
    again = process.generate(PROMPT)[0]
    assert again["cached"] == 3 * BLOCK and again["tokens"] == first["tokens"]


def test_weights_may_be_named(node: House, process: EngineChild, tmp_path: Path) -> None:
    named = {**node.given, "weights": "mine"}
    process.start(engine_arguments(real_model(tmp_path / "a", seed=1), **ARGUMENTS), named)
    process.ask("loaded")
    assert process.generate(PROMPT)[0]["cached"] == 0


def test_an_engine_without_a_node_runs_and_says_how_to_get_one(house: House, process: EngineChild, tmp_path: Path) -> None:
    nowhere = {**house.given, "node_name": "nobody", "attach_seconds": 0.5}
    process.start(engine_arguments(real_model(tmp_path), **ARGUMENTS), nowhere)
    assert len(process.generate(PROMPT)[0]["tokens"]) == 4
    said = process.said("runs unshared")
    assert len(said) == 1 and "kvshare node" in said[0]


def test_an_engine_starts_a_node_that_outlives_it_and_ends_by_itself(house: House, child: EngineChild, tmp_path: Path) -> None:
    own = {**house.given, "node_name": "started", "autostart": True, "idle_exit_seconds": 3.0}
    model = real_model(tmp_path)
    child.start(engine_arguments(model, **ARGUMENTS), own)
    assert child.generate(PROMPT)[0]["cached"] == 0
    # Someone else stays attached while one engine ends and the next one starts, however slowly.
    with kvshare.connect(OTHER, block_bytes=4096, **own):
        child.stop()
        child.start(engine_arguments(model, **ARGUMENTS), own)
        assert child.generate(PROMPT)[0]["cached"] == 3 * BLOCK
        child.stop()
    socket = Path(house.settings.socket_path).with_name("started.sock")
    assert eventually(lambda: not socket.exists())


def test_the_readiness_gate_answers_for_the_engines_of_the_host(node: House, process: EngineChild, tmp_path: Path) -> None:
    process.start(engine_arguments(real_model(tmp_path), **ARGUMENTS), node.given)
    assert wait_warm(30.0, node.settings).done


def test_registering_the_plugin_costs_no_import_of_an_engine() -> None:
    code = (
        "import sys; import kvshare.integrations.vllm.plugin, kvshare.integrations.vllm; "
        "sys.exit(any(name in sys.modules for name in ('vllm', 'torch', 'ray')))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSHARE_")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
