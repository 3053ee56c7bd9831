"""A small model and the engine settings that tests, benchmarks and the demo share. Needs no download and no GPU.

The weights are dummies drawn from a seed: equal on every host, so engines made from the same arguments agree on every token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 32000
TOKENS_MAX = 8192


def tiny_model(
    directory: str | Path,
    *,
    layers: int = 8,
    hidden: int = 512,
    heads: int = 8,
    kv_heads: int = 4,
    vocabulary: int = VOCABULARY,
) -> str:
    """Write a Llama config into ``directory`` (created if missing) and return its path. 8 layers of 512: 56 M parameters,
    1 MiB of KV cache per 128 tokens in bfloat16."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": TOKENS_MAX,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return str(folder)


def engine_arguments(model: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for `tiny_model`: dummy weights, token ids in and out, no compilation."""
    return {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "seed": 0,
        "enforce_eager": True,
        "max_model_len": TOKENS_MAX,
        **overrides,
    }


def engine_environment(core: int = 0, kv_cache_gib: int = 1) -> dict[str, str]:
    """Environment of an engine on a machine without GPU, to be set before vLLM is imported: threads pinned to ``core``
    (any connector changes vLLM's own choice, and times would not compare), ``kv_cache_gib`` GiB of KV cache."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
