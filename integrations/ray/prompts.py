"""What a request of Ray Serve asks for, as the keys of its blocks: token ids are read here, hashed here, and go nowhere else.

    prompt, messages ──tokenizer──> token ids ──the engines' own hashes──> keys of the namespace, tenant, adapter and salt

Two requests have keys in common only where engines would share their blocks: another salt, tenant or adapter is another key
(`kvshare.keys`). What cannot be read, or whose adapter is not known yet, has no keys: it is sent by load.

Threads: `read` may be called from several; a tokenizer and hashes take milliseconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from kvshare import keys
from kvshare.keys import Namespace
from kvshare.runs import Keys
from kvshare.tenants import tag_of

log = logging.getLogger("kvshare")

VLLM_ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")
FIELDS = ("token_ids", "prompt_token_ids", "prompt", "messages")  # in which a prompt may come
CHARACTERS_PER_TOKEN = 4  # about, of a text that cannot be tokenized


class Prompt(NamedTuple):
    """tokens: how many, estimated where there are no ``keys``: None, its blocks cannot be named."""

    tokens: int
    keys: list[Keys] | None


class Prompts:
    """tokenizer: name or folder, for `transformers`; "" where prompts come as token ids. adapters: where the engines find each
    LoRA adapter, by its model id. tenant: of requests that name none."""

    def __init__(self, tokenizer: str, adapters: Mapping[str, str], tenant: str) -> None:
        self._name = tokenizer
        self._paths = dict(adapters)
        self._tenant = keys.tenant_tag(tenant)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._adapters: Any = None
        self._said = False

    def read(self, arguments: Sequence[Any], named: Mapping[str, Any], model: str, space: Namespace | None) -> Prompt:
        """Of the arguments of a call to a replica. model: id of a LoRA adapter, or "". space: the engines' namespace; None: not
        known."""
        request = _Fields(arguments, named)
        try:
            tokens = self._tokens(request)
            if tokens is None or space is None:
                return Prompt(_length(request) if tokens is None else len(tokens), None)
            return Prompt(len(tokens), self._keys(tokens, request, model, space))
        except Exception as error:  # a request of any shape, a tokenizer, a disk: it is sent by load
            if not self._said:
                self._said = True
                log.warning("kvshare: a request and others like it are routed by load: %s: %s", type(error).__name__, error)
            return Prompt(_length(request), None)

    def _tokens(self, request: _Fields) -> Sequence[int] | None:
        for name in FIELDS:
            value = request.get(name)
            if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], int):
                return value
            if isinstance(value, str) and value and self._name:
                return list(self._loaded()(value)["input_ids"])
            if name == "messages" and value and self._name:
                messages = [dict(message) for message in value]
                template = self._loaded().apply_chat_template
                return list(template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        return None

    def _loaded(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(self._name)
            return self._tokenizer

    def _keys(self, tokens: Sequence[int], request: _Fields, model: str, space: Namespace) -> list[Keys] | None:
        salt = request.get("cache_salt") or ""
        tenant = self._tenant
        named = (request.get("kv_transfer_params") or {}).get("tenant")
        if named is not None:
            tag = tag_of(named)
            if tag is None:
                return None
            tenant = tag
        adapter, lora = b"", None
        if model:
            lora = (model, self._paths[model])
            identity = self._identity(*lora)
            if not identity:
                return None
            adapter = identity
        hashes = self._hashes(tokens, space, salt, lora)
        prefix = keys.prefix(space.family(), keys.variant(adapter, salt), tenant=tenant)
        return [Keys(prefix, len(hashes[0]), b"".join(hashes))] if hashes else []

    @staticmethod
    def _hashes(tokens: Sequence[int], space: Namespace, salt: str, lora: tuple[str, str] | None) -> list[bytes]:
        if space.hash_algorithm not in VLLM_ALGORITHMS:
            return keys.chain(tokens, space.block_size)
        from kvshare.integrations.vllm.hashes import block_hashes

        return block_hashes(tokens, space, salt, lora)

    def _identity(self, name: str, path: str) -> bytes | None:
        """Of an adapter's weights: None while they are being read, b"" where they cannot be."""
        with self._lock:
            if self._adapters is None:
                from kvshare.integrations.vllm.adapters import Adapters

                self._adapters = Adapters()
            request = SimpleNamespace(
                lora_name=name, lora_int_id=1, lora_path=path, load_inplace=False, is_3d_lora_weight=False
            )
            identity: bytes | None = self._adapters.identity(request)
            return identity


class _Fields:
    """A request's fields, wherever they are: in named arguments, in a mapping, in an object."""

    def __init__(self, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        self._places = [named, *arguments]

    def get(self, name: str) -> Any:
        for place in self._places:
            value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
            if value is not None:
                return value
        return None


def _length(request: _Fields) -> int:
    """About how many tokens."""
    return 1 + max(len(str(request.get(name) or "")) for name in FIELDS) // CHARACTERS_PER_TOKEN
