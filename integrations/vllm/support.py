"""Which engines can share blocks. The others run as if kvshare were not there, and say why once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Exactly these: what derives from them keeps only a part of the tokens, or something else.
SERVED_SPECS = (FullAttentionSpec, MLAAttentionSpec)
# These propose tokens without layers of their own; a draft model's KV depends on the token after the block.
SERVED_SPECULATION = ("ngram", "ngram_gpu", "suffix")


def unserved_reason(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Why this engine's blocks cannot be shared, or an empty string."""
    return _parallel_reason(vllm_config) or _model_reason(vllm_config) or _cache_reason(vllm_config, kv_cache_config)


def _parallel_reason(vllm_config: VllmConfig) -> str:
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}: only 1 is served yet"
    return ""


def _model_reason(vllm_config: VllmConfig) -> str:
    if getattr(vllm_config.model_config, "is_diffusion", False):
        return "a diffusion model rewrites its blocks"
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in SERVED_SPECULATION:
        return f"speculative decoding by {speculative.method} keeps KV of a draft model"
    return ""


def _cache_reason(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        return f"its KV cache has {len(groups)} groups ({', '.join(kinds)}): only one group of full attention is served yet"
    spec = groups[0].kv_cache_spec
    if type(spec) not in SERVED_SPECS:
        return f"its KV cache is a {type(spec).__name__}: only full attention is served yet"
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        return "it has layers with a window: only full attention is served yet"
    if getattr(spec, "non_causal", False) or spec.tokens_per_state != 1:
        return "its attention is not causal, or compresses tokens"
    if spec.block_size != vllm_config.cache_config.block_size:
        return f"its blocks have {spec.block_size} tokens, but hashes cover {vllm_config.cache_config.block_size}"
    if kv_cache_config.needs_kv_cache_zeroing:
        return "its KV cache is zeroed block by block"
    return ""
