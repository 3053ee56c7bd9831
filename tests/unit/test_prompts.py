"""A router names a prompt's blocks as the engines will. Goal: the same keys for the same request, never those of another salt,
tenant or adapter; what cannot be read is no failure. Method: vLLM's own hashes beside ours, requests in all shapes.
"""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and torch's own making
    pytest.importorskip("vllm.v1.core.kv_cache_utils")
    pytest.importorskip("ray")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from kvshare import keys
from kvshare.integrations.ray.prompts import Prompt, Prompts
from kvshare.integrations.vllm.hashes import block_hashes
from kvshare.keys import Namespace
from kvshare.runs import Keys

SPACE = Namespace(
    weights="w", dtype="d", kv_dtype="k", block_size=16, page_bytes=1, layers=1, kv_heads=1, head_size=1,
    hash_algorithm="sha256_cbor", hash_seed=kv_cache_utils.DEFAULT_NONE_HASH_SEED, packing="p", label="model",
)  # fmt: skip
TOKENS = [random.Random(3).randrange(50_000) for _ in range(100)]
PROMPTS = Prompts("", {}, "")


def read(*arguments: Any, space: Namespace | None = SPACE, prompts: Prompts = PROMPTS, model: str = "", **named: Any) -> Prompt:
    return prompts.read(arguments, named, model, space)


def of_vllm(monkeypatch: pytest.MonkeyPatch, algorithm: str, **request: Any) -> list[bytes]:
    """The hashes that an engine computes."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    function = get_hash_fn_by_name(algorithm)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", function(kv_cache_utils.resolve_none_hash_seed(function)), raising=False)
    hasher = kv_cache_utils.get_request_block_hasher(16, function)
    params = SamplingParams(max_tokens=1)
    return list(Request("a", TOKENS, params, None, block_hasher=hasher, **request).block_hashes)


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("salt", ["", "salt"])
def test_hashes_are_those_of_vllm(monkeypatch: pytest.MonkeyPatch, algorithm: str, salt: str) -> None:
    wanted = of_vllm(monkeypatch, algorithm, cache_salt=salt or None)
    assert len(wanted) == 6
    assert block_hashes(TOKENS, msgspec.structs.replace(SPACE, hash_algorithm=algorithm), salt) == wanted


def test_hashes_with_an_adapter_are_those_of_vllm_where_engines_agree_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoRARequest("style", 1, "/loras/style")
    wanted = of_vllm(monkeypatch, "sha256_cbor", lora_request=lora, cache_salt="salt")
    assert block_hashes(TOKENS, SPACE, "salt", ("style", "/loras/style")) == wanted
    assert block_hashes(TOKENS, msgspec.structs.replace(SPACE, hash_algorithm="sha256"), "", ("style", "/loras/style")) == []


def test_a_request_is_read_in_every_shape_that_it_comes_in() -> None:
    wanted = [Keys(keys.prefix(SPACE.family()), 32, b"".join(block_hashes(TOKENS, SPACE)))]
    for prompt in (
        read({"prompt": TOKENS}),
        read(SimpleNamespace(prompt=TOKENS, messages=None)),
        read("ignored", {"token_ids": TOKENS}),
        read(prompt_token_ids=TOKENS),
    ):
        assert prompt == Prompt(100, wanted)
    assert read({"prompt": TOKENS[:15]}) == Prompt(15, [])


def test_salt_tenant_and_namespace_each_make_other_keys() -> None:
    other = msgspec.structs.replace(SPACE, weights="others")
    variants = [
        read({"prompt": TOKENS}),
        read({"prompt": TOKENS, "cache_salt": "one"}),
        read({"prompt": TOKENS, "cache_salt": "two"}),
        read({"prompt": TOKENS, "kv_transfer_params": {"tenant": "acme"}}),
        read({"prompt": TOKENS}, space=other),
    ]
    named = [frozenset(key for packed in prompt.keys or () for key in packed) for prompt in variants]
    assert all(len(each) == 6 for each in named)
    assert len(frozenset().union(*named)) == 30
    tenant = keys.prefix(SPACE.family(), tenant=keys.tenant_tag("acme"))
    assert all(key.startswith(tenant) for key in named[3])
    assert Prompts("", {}, "acme").read([{"prompt": TOKENS}], {}, "", SPACE).keys == variants[3].keys


def test_a_stack_of_its_own_is_hashed_as_its_api_hashes() -> None:
    space = msgspec.structs.replace(SPACE, hash_algorithm="kvshare-chain", block_size=4)
    prompt = read({"prompt": TOKENS}, space=space)
    assert prompt.keys == [Keys(keys.prefix(space.family()), 32, b"".join(keys.chain(TOKENS, 4)))]


class Words:
    """A tokenizer: a word is a token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages: list[Any], **_: Any) -> dict[str, list[int]]:
        return self(" ".join(f"{message['role']} {message['content']}" for message in messages))


def test_text_and_messages_go_through_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts("a model", {}, "")
    monkeypatch.setattr(prompts, "_tokenizer", Words())
    text = read({"prompt": "word " * 40}, prompts=prompts)
    assert text == read({"prompt": [4] * 40}) and text.keys
    said = read(SimpleNamespace(prompt=None, messages=[{"role": "user", "content": "hello " * 31}]), prompts=prompts)
    assert said.tokens == 32 and said.keys == read({"prompt": [4] + [5] * 31}).keys


def test_what_cannot_be_read_has_no_keys_and_about_a_length(caplog: pytest.LogCaptureFixture) -> None:
    assert read({"prompt": "four" * 25}) == Prompt(26, None), "no tokenizer"
    assert read({"prompt": TOKENS}, space=None) == Prompt(100, None), "no namespace"
    assert read() == read(None, 7, object()) == Prompt(1, None)
    assert read({"prompt": ["two", "prompts"]}).keys is None
    assert not caplog.records
    prompts = Prompts("", {}, "")
    for request in ({"prompt": [1, object()] * 20}, {"prompt": TOKENS, "kv_transfer_params": "none"}, {"prompt": TOKENS}):
        assert read(request, prompts=prompts, model="no such adapter" if request == {"prompt": TOKENS} else "").keys is None
    assert read({"prompt": TOKENS, "kv_transfer_params": {"tenant": "no name!"}}, prompts=prompts).keys is None
    assert len(caplog.records) == 1, "said once"
