"""The hashes that an engine will give a prompt's blocks, without the engine: for whoever must know them before it does.

As `vllm.v1.core.kv_cache_utils` chains them: hash(parent, token ids, extra keys), the extra keys being the LoRA adapter's name
and path in every block and the salt in the first. Prompts with images or embeddings are not served here.

Threads: none; some microseconds a block, with the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm.utils.hashing import get_hash_fn_by_name

from kvshare.integrations.vllm.identity import covers_extra_keys
from kvshare.keys import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable


@cache
def _hashing(algorithm: str, seed: str) -> tuple[Callable[[Any], bytes], bytes]:
    function = get_hash_fn_by_name(algorithm)
    return function, function(seed)


def block_hashes(
    token_ids: Sequence[int], namespace: Namespace, salt: str = "", lora: tuple[str, str] | None = None
) -> list[bytes]:
    """Of the full blocks of ``token_ids``, in an engine of ``namespace``. lora: name and path of the adapter.

    Empty where the hashes of such requests do not agree between processes. Raises ValueError: vLLM has no such algorithm.
    """
    function, previous = _hashing(namespace.hash_algorithm, namespace.hash_seed)
    if lora and not covers_extra_keys(namespace.hash_algorithm):
        return []
    adapter = () if lora is None else (("lora", *lora),)
    size, hashes = namespace.block_size, []
    for start in range(0, len(token_ids) - size + 1, size):
        extra = (*adapter, ("cache_salt", salt)) if salt and not start else adapter
        previous = function((previous, tuple(token_ids[start : start + size]), extra or None))
        hashes.append(previous)
    return hashes
