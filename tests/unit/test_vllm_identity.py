"""Who may share: identity of weights and configurations, and the engines that are not served."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and torch's own making
    pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvshare.errors import ConfigError, NamespaceError
from kvshare.integrations.vllm import identity, weights
from kvshare.integrations.vllm.support import unserved_reason


def checkpoint(folder: Path, seed: int = 0, name: str = "model.safetensors") -> Path:
    """A safetensors file of two tensors: one of 400 KiB, one of 1 KiB."""
    folder.mkdir(exist_ok=True)
    big, small = np.random.default_rng(seed).bytes(400 << 10), b"n" * 1024
    header = json.dumps({
        "__metadata__": {"format": "pt"},
        "big": {"dtype": "U8", "shape": [400 << 10], "data_offsets": [0, 400 << 10]},
        "small": {"dtype": "U8", "shape": [1024], "data_offsets": [400 << 10, (400 << 10) + 1024]},
    }).encode()  # fmt: skip
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + big + small)
    return folder


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_equal_weights_have_one_identity_wherever_they_lie(tmp_path: Path) -> None:
    one, two = checkpoint(tmp_path / "a"), tmp_path / "b"
    shutil.copytree(one, two)
    assert weights.digest_of(one) == weights.digest_of(two)


def test_other_weights_under_the_same_path_have_another(tmp_path: Path) -> None:
    before = weights.digest_of(checkpoint(tmp_path / "a", seed=0))
    assert weights.digest_of(checkpoint(tmp_path / "a", seed=1)) != before


@pytest.mark.parametrize("offset", [-1, -700, -300_000, 300])
def test_one_changed_byte_changes_the_identity(tmp_path: Path, offset: int) -> None:
    folder = checkpoint(tmp_path / "a")
    before = weights.digest_of(folder)
    flip(folder / "model.safetensors", offset)
    assert weights.digest_of(folder) != before


def test_of_large_weights_every_tensor_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FULL_BYTES_MAX", 1000)
    folder = checkpoint(tmp_path / "a")
    before = weights.digest_of(folder)
    for offset in (-1, -1024 - 1, -1024 - (400 << 10)):
        flip(folder / "model.safetensors", offset)
        after = weights.digest_of(folder)
        assert after != before
        before = after


def test_large_files_of_unknown_structure_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FULL_BYTES_MAX", 1000)
    (tmp_path / "model.bin").write_bytes(bytes(200_000))
    before = weights.digest_of(tmp_path)
    flip(tmp_path / "model.bin", 199_999)
    assert weights.digest_of(tmp_path) != before


def test_a_damaged_checkpoint_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FULL_BYTES_MAX", 10)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(NamespaceError, match="no safetensors file"):
        weights.digest_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"{nope" + bytes(100))
    with pytest.raises(NamespaceError, match="damaged"):
        weights.digest_of(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(NamespaceError, match="no weights"):
        weights.digest_of(tmp_path)


def test_safetensors_are_read_where_other_formats_lie_beside_them(tmp_path: Path) -> None:
    before = weights.digest_of(checkpoint(tmp_path / "a"))
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"not loaded")
    assert weights.digest_of(tmp_path / "a") == before


def test_a_lone_files_name_is_no_part_of_its_weights(tmp_path: Path) -> None:
    one, two = checkpoint(tmp_path, name="a.safetensors"), checkpoint(tmp_path, name="b.safetensors")
    assert weights.digest_of(one / "a.safetensors") == weights.digest_of(two / "b.safetensors")


def model_config(**changes: Any) -> Any:
    config = {"hidden_size": 64, "rope_theta": 1e4, "_name_or_path": "/here", "transformers_version": "1"}
    config |= changes.pop("config", {})
    values = {
        "hf_config": SimpleNamespace(to_dict=lambda: config), "quantization": None, "max_model_len": 100, "seed": 0,
        "model": "m", "model_weights": "", "revision": None, "served_model_name": None, "dtype": torch.bfloat16,
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


def test_a_configuration_is_what_it_says_of_the_model_not_of_itself() -> None:
    ours = identity.config_digest(model_config())
    assert identity.config_digest(model_config(config={"_name_or_path": "/there", "transformers_version": "2"})) == ours
    assert identity.config_digest(model_config(max_model_len=200)) == ours
    assert identity.config_digest(model_config(config={"rope_theta": 5e5})) != ours
    assert identity.config_digest(model_config(quantization="fp8")) != ours


def test_where_positions_depend_on_the_longest_sequence_it_belongs_to_the_configuration() -> None:
    rope = {"config": {"text": {"rope_scaling": {"rope_type": "longrope"}}}}
    assert identity.config_digest(model_config(max_model_len=1, **rope)) != identity.config_digest(model_config(**rope))


def vllm_config(algorithm: str = "sha256", load_format: str = "dummy", **changes: Any) -> Any:
    parallel = dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"), 1
    )
    return SimpleNamespace(
        cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm, block_size=16, cache_dtype="auto"),
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
        model_config=model_config(**changes.pop("model", {})), speculative_config=changes.pop("speculative", None),
        parallel_config=SimpleNamespace(**parallel | changes),
    )  # fmt: skip


def test_a_random_seed_of_hashes_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(NamespaceError, match=r"set PYTHONHASHSEED .*sha256_cbor"):
        identity.hashing_of(vllm_config("xxhash"))
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert identity.hashing_of(vllm_config("xxhash")) == ("xxhash", "7")


def test_hashes_from_a_fixed_seed_agree_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert identity.hashing_of(vllm_config("sha256_cbor")) == ("sha256_cbor", "vllm-none-hash")


def test_dummy_weights_are_what_they_are_made_of() -> None:
    ours = identity.weights_identity(vllm_config())
    assert identity.weights_identity(vllm_config(model={"model": "/elsewhere"})) == ours
    assert identity.weights_identity(vllm_config(model={"seed": 1})) != ours


def test_weights_that_come_from_elsewhere_must_be_named() -> None:
    with pytest.raises(NamespaceError, match=r'"weights" in kv_connector_extra_config'):
        identity.weights_identity(vllm_config(load_format="tensorizer"))
    with pytest.raises(NamespaceError, match="not found"):
        identity.weights_identity(vllm_config(load_format="auto", model={"model": "nobody/has-this-model"}))


def test_settings_may_name_the_weights() -> None:
    settings, named = identity.settings_from({"arena_bytes": "1GiB", "weights": "mine-v2"})
    assert settings.arena_bytes == 1 << 30 and named == "mine-v2"
    assert identity.settings_from({})[1] == ""


@pytest.mark.parametrize("wrong", [{"weights": 3}, {"arena_byte": 1}, {"arena_bytes": "much"}])
def test_a_wrong_setting_is_one_sentence_with_the_remedy(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        identity.settings_from(wrong)


def full_attention(**changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(**{"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16} | changes)


def groups(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs], needs_kv_cache_zeroing=False)


def window() -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=64)


def test_one_group_of_full_attention_is_served() -> None:
    assert unserved_reason(vllm_config(), groups(full_attention())) == ""
    assert unserved_reason(vllm_config(speculative=SimpleNamespace(method="ngram")), groups(full_attention())) == ""


@pytest.mark.parametrize(
    ("config", "cache", "said"),
    [
        (vllm_config(), groups(full_attention(), window()), "2 groups"),
        (vllm_config(), groups(window()), "SlidingWindowSpec"),
        (vllm_config(), groups(full_attention(sliding_window=64)), "window"),
        (vllm_config(), groups(full_attention(block_size=32)), "32 tokens"),
        (vllm_config(), groups(), "0 groups"),
        (vllm_config(speculative=SimpleNamespace(method="eagle")), groups(full_attention()), "eagle"),
        (vllm_config(model={"is_diffusion": True}), groups(full_attention()), "diffusion"),
    ],
)
def test_what_is_not_served_is_told(config: Any, cache: Any, said: str) -> None:
    assert said in unserved_reason(config, cache)
