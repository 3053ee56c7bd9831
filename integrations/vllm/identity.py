"""The namespace of a vLLM engine: everything that makes its blocks interchangeable with those of another."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvshare.config import Settings
from kvshare.errors import ConfigError, NamespaceError
from kvshare.integrations.vllm.weights import digest_of
from kvshare.keys import Namespace

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvshare.integrations.vllm.layout import Layout

WEIGHTS = "weights"  # the one key of kv_connector_extra_config that is ours and not a setting of kvshare
# Formats whose weights lie in the model's folder as files that we can read.
FILE_FORMATS = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "mistral", "pt", "npcache", "gguf"}
)
# What a config says of itself, not of the model.
VOLATILE_FIELDS = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash"})
# With these, positions are encoded differently when an engine's longest sequence is another.
LENGTH_DEPENDENT_ROPE = frozenset({"longrope", "su", "dynamic"})


def settings_of(vllm_config: VllmConfig) -> tuple[Settings, str]:
    """Settings and the explicit identity of the weights (or "") from ``kv_connector_extra_config`` and environment.

    Raises:
        ConfigError: unknown setting or bad value.
    """
    return settings_from(vllm_config.kv_transfer_config.kv_connector_extra_config)


def settings_from(extra_config: dict[str, Any]) -> tuple[Settings, str]:
    """As `settings_of`, from the ``kv_connector_extra_config`` itself."""
    given = dict(extra_config)
    weights = given.pop(WEIGHTS, "")
    if not isinstance(weights, str):
        raise ConfigError(f"setting {WEIGHTS!r} cannot be {weights!r}: use a text that is equal for equal weights.")
    return Settings.load(given), weights


def namespaces_of(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, layout: Layout, weights: str, shards: int
) -> list[Namespace]:
    """The engine's namespaces, one for each shard of its blocks; ``layout`` is that of a shard. Reads parts of the weights'
    files: milliseconds, up to half a second for 1 GiB.

    Raises:
        NamespaceError: the blocks cannot be named so that other engines agree; says what to change.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    algorithm, seed = hashing_of(vllm_config)
    named = f"named:{weights}" if weights else weights_identity(vllm_config)
    whole = Namespace(
        weights=f"{named}/{config_digest(model)}",
        dtype=str(model.dtype),
        kv_dtype=f"{cache.cache_dtype}/{spec.dtype}",
        block_size=spec.block_size,
        page_bytes=layout.block_bytes // len(group.layer_names),
        layers=len(group.layer_names),
        kv_heads=model.get_total_num_kv_heads() if shards > 1 else spec.num_kv_heads,
        head_size=spec.head_size,
        hash_algorithm=algorithm,
        hash_seed=seed,
        packing=layout.packing,
        attention=type(spec).__name__,
        label=str(model.served_model_name or model.model),
    )
    if shards == 1:
        return [whole]
    return [msgspec.structs.replace(whole, tensor_parallel=f"{shard}/{shards}") for shard in range(shards)]


def hashing_of(vllm_config: VllmConfig) -> tuple[str, str]:
    """Algorithm and seed of the engine's block hashes. Raises NamespaceError when no other engine can have the same."""
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None:
        if algorithm.startswith("xxhash"):
            raise NamespaceError(
                f"block hashes by {algorithm} start from a random seed in every process: set PYTHONHASHSEED to the same value "
                "for all engines, or use --prefix-caching-hash-algo sha256_cbor"
            )
        from vllm.v1.core.kv_cache_utils import DEFAULT_NONE_HASH_SEED

        seed = DEFAULT_NONE_HASH_SEED
    return algorithm, seed


def covers_extra_keys(algorithm: str) -> bool:
    """Do hashes of requests with LoRA, images or embeddings agree between processes? Pickled ones depend on which of their
    equal strings are one object."""
    return algorithm.endswith("_cbor")


def weights_identity(vllm_config: VllmConfig) -> str:
    """From the files of the weights; of dummy weights, from what they are made of. Raises NamespaceError."""
    model, load = vllm_config.model_config, vllm_config.load_config
    load_format = str(getattr(load.load_format, "value", load.load_format))
    if load_format == "dummy":
        return f"dummy:{model.seed}"
    if load_format not in FILE_FORMATS:
        raise NamespaceError(
            f"weights loaded as {load_format!r} cannot be identified by their files: name them, equal for equal weights, "
            f'with "{WEIGHTS}" in kv_connector_extra_config'
        )
    return f"files:{digest_of(_weights_path(model, load.download_dir))}"


def _weights_path(model: ModelConfig, download_dir: str | None) -> Path:
    path = Path(model.model_weights or model.model)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Loaded by vLLM already, so it is in the cache: nothing is fetched here.
        return Path(snapshot_download(str(path), revision=model.revision, cache_dir=download_dir, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise NamespaceError(
            f'the files of model {path} are not found ({error}): name the weights with "{WEIGHTS}" in kv_connector_extra_config'
        ) from error


def config_digest(model: ModelConfig) -> str:
    """Digest of all that the model's configuration (overrides included) says about how weights become KV."""
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in VOLATILE_FIELDS}
    described = {
        "config": config,
        "quantization": model.quantization,
        "quantization_config": getattr(model, "quantization_config", None),
        "implementation": getattr(model, "model_impl", None),
        "longest": model.max_model_len if _rope_types(config) & LENGTH_DEPENDENT_ROPE else None,
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _rope_types(config: object) -> set[str]:
    """Every rope type named anywhere in the configuration: it may be nested per layer kind or per modality."""
    if isinstance(config, dict):
        named = {str(value) for name, value in config.items() if name in ("rope_type", "type")}
        return named.union(*(_rope_types(value) for value in config.values()))
    return set()
