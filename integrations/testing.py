"""A small real model and the engine settings that tests, benchmarks and the demo share. Needs no download and no GPU.

The model is a Llama, in two variants. Equal seeds make equal models on every host of a kind.

* Dummy weights (the default): quick, and good for measuring time. Whoever compares *outputs* must know that vLLM draws them
  so small (0.001) that attention vanishes in rounding: the last token alone decides the output, and wrong KV blocks would go
  unnoticed.
* ``weights=True``: a safetensors file of weights scaled so that each output token depends on all of the prompt. With
  ``dtype="float32"`` a prompt's output is the same however its computation is cut into steps; in bfloat16 recomputing a
  prompt and continuing vLLM's own prefix cache round differently, and now and then the second-best token wins.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = 32000
TOKENS_MAX = 8192
HEAD_SIZE = 64
WEIGHTS_NAME = "model.safetensors"
# Attention logits get a standard deviation of this squared: sharp enough that single tokens far back matter.
QUERY_GAIN = 1.8


def tiny_model(
    directory: str | Path,
    *,
    layers: int = 8,
    hidden: int = 512,
    heads: int = 8,
    kv_heads: int = 4,
    vocabulary: int = VOCABULARY,
    dtype: str = "bfloat16",
    weights: bool = False,
    seed: int = 0,
) -> str:
    """Write a Llama into ``directory`` (created if missing) unless it is there already; return the folder's path.

    hidden: width; heads: query heads of 64; dtype: a name of torch's; weights: write real ones (see the module), drawn from
    ``seed``. 8 layers of 512: 56 M parameters, 1 MiB of KV cache per 128 tokens in bfloat16, twice that in float32. Token ids
    in and out: it has no tokenizer. Several processes may call this for one folder at once.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_SIZE,
        "vocab_size": vocabulary,
        "max_position_embeddings": TOKENS_MAX,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    if weights:
        config["kvshare_seed"] = seed
    text = json.dumps(config, indent=1) + "\n"
    folder = Path(directory)
    written = folder / "config.json"
    if written.is_file() and written.read_text() == text:
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if weights:
            _write_weights(fresh / WEIGHTS_NAME, config)
            os.replace(fresh / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        else:
            (folder / WEIGHTS_NAME).unlink(missing_ok=True)
        (fresh / "config.json").write_text(text)
        os.replace(fresh / "config.json", written)  # last: it says that the folder is complete
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return str(folder)


def engine_arguments(model: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for `tiny_model`: its weights, token ids in and out, no compilation. ``overrides`` win."""
    config = json.loads((Path(model) / "config.json").read_text())
    return {
        "model": model,
        "load_format": "auto" if (Path(model) / WEIGHTS_NAME).is_file() else "dummy",
        "skip_tokenizer_init": True,
        "dtype": config["torch_dtype"],  # vLLM's "auto" would make bfloat16 of float32
        "seed": 0,
        "enforce_eager": True,
        "max_model_len": TOKENS_MAX,
        **overrides,
    }


def engine_environment(core: int = 0, kv_cache_gib: int = 1, *, in_process: bool = False) -> dict[str, str]:
    """Environment of an engine on a machine without GPU, to be set before vLLM is imported: threads pinned to ``core``
    (any connector changes vLLM's own choice, and times would not compare), ``kv_cache_gib`` GiB of KV cache.

    in_process: scheduler and worker run in the caller's process; vLLM pins nothing then, so the caller pins the process.
    """
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if in_process else str(core),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if in_process:
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    return environment


def _write_weights(path: Path, config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, key_value = config["num_attention_heads"] * HEAD_SIZE, config["num_key_value_heads"] * HEAD_SIZE
    generator = torch.Generator().manual_seed(config["kvshare_seed"])
    kind = getattr(torch, config["torch_dtype"])

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Any:
        """Its product has the variance of what it is multiplied with, times gain squared."""
        return (torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))).to(kind)

    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator).to(kind),
        "model.norm.weight": torch.ones(hidden, dtype=kind),
        "lm_head.weight": matrix(vocabulary, hidden, 4.0),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors[f"{name}.input_layernorm.weight"] = torch.ones(hidden, dtype=kind)
        tensors[f"{name}.post_attention_layernorm.weight"] = torch.ones(hidden, dtype=kind)
        tensors[f"{name}.self_attn.q_proj.weight"] = matrix(query, hidden, QUERY_GAIN)
        tensors[f"{name}.self_attn.k_proj.weight"] = matrix(key_value, hidden, QUERY_GAIN)
        tensors[f"{name}.self_attn.v_proj.weight"] = matrix(key_value, hidden)
        tensors[f"{name}.self_attn.o_proj.weight"] = matrix(hidden, query, 2.0)
        tensors[f"{name}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[f"{name}.mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(hidden, inner)
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)
