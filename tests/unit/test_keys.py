"""Keys and namespaces: equal blocks have equal names on every machine, unequal ones never do."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare import keys
from kvshare.keys import Namespace

BASE: dict[str, Any] = {
    "weights": "sha256:aa",
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "block_size": 16,
    "page_bytes": 65536,
    "layers": 32,
    "kv_heads": 8,
    "head_size": 128,
    "hash_algorithm": "sha256_cbor",
    "hash_seed": "00",
    "packing": "LBHNC",
    "tensor_parallel": "1",
    "attention": "full",
}
# Written down once; a change of the fingerprint cuts every cluster in two and needs a new protocol version.
KNOWN_FAMILY = "69854516776c4ff338d388983879b301"
TOKENS = st.lists(st.integers(0, 2**40), max_size=40)


def other(value: object) -> object:
    return value + 1 if isinstance(value, int) else f"{value}x"


def test_the_table_of_this_test_knows_every_field_of_a_namespace() -> None:
    assert {field.name for field in msgspec.structs.fields(Namespace)} == {*BASE, "label"}


@pytest.mark.parametrize("name", sorted(BASE))
def test_a_namespace_that_differs_in_one_field_is_another_family_and_says_which(name: str) -> None:
    ours, theirs = Namespace(**BASE), Namespace(**{**BASE, name: other(BASE[name])})
    assert ours.family() != theirs.family()
    assert ours.differing(theirs) == {name: (BASE[name], other(BASE[name]))}


def test_a_label_is_for_people_and_changes_nothing() -> None:
    assert Namespace(**BASE, label="blue").family() == Namespace(**BASE).family()
    assert Namespace(**BASE, label="blue").differing(Namespace(**BASE)) == {}


def test_a_family_is_the_same_in_every_process_and_release() -> None:
    script = f"from kvshare.keys import Namespace; print(Namespace(**{BASE!r}).family().hex())"
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == Namespace(**BASE).family().hex() == KNOWN_FAMILY


def test_tenants_and_adapters_never_share_a_variant() -> None:
    pairs = itertools.product([b"", b"a", b"b", b"ab"], ["", "a", "b", "ab"])
    variants = [keys.variant(lora, salt) for lora, salt in pairs]
    assert len(set(variants)) == len(variants)
    assert keys.variant() == keys.NO_VARIANT


def test_an_adapter_named_like_a_salt_is_not_that_salt() -> None:
    assert keys.variant(lora=b"x") != keys.variant(salt="x")
    assert keys.variant(lora=b"ab", salt="c") != keys.variant(lora=b"a", salt="bc")


def test_a_key_comes_apart_into_what_it_was_made_of() -> None:
    family = Namespace(**BASE).family()
    prefix = keys.prefix(family, keys.variant(salt="t"), group=3)
    key = prefix + b"h" * 32
    assert len(prefix) == keys.PREFIX_BYTES and len(key) <= keys.KEY_BYTES_MAX
    assert (keys.family_of(key), keys.prefix_of(key), keys.hash_of(key)) == (family, prefix, b"h" * 32)


def test_groups_of_one_engine_have_prefixes_of_their_own() -> None:
    family = Namespace(**BASE).family()
    assert len({keys.prefix(family, group=group) for group in range(300)}) == 300


def test_seeds_differ_by_key_and_come_the_same_one_by_one_or_together() -> None:
    some = [bytes([i]) * 40 for i in range(50)]
    assert keys.seeds_of(some) == [keys.seed_of(key) for key in some]
    assert len(set(keys.seeds_of(some))) == 50
    assert all(0 <= seed < 2**64 for seed in keys.seeds_of(some))


@given(tokens=TOKENS, block_size=st.integers(1, 7))
def test_a_chain_hashes_full_blocks_only_and_each_for_all_tokens_before_it(tokens: list[int], block_size: int) -> None:
    hashes = keys.chain(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    for count in range(len(hashes) + 1):
        assert keys.chain(tokens[: count * block_size], block_size) == hashes[:count]


@given(tokens=st.lists(st.integers(0, 2**40), min_size=1, max_size=40), data=st.data())
def test_a_changed_token_changes_its_block_and_all_behind_it_and_none_before(tokens: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:position], tokens[position] + 1, *tokens[position + 1 :]]
    ours, theirs = keys.chain(tokens, 4), keys.chain(changed, 4)
    first = position // 4
    assert ours[:first] == theirs[:first]
    assert all(a != b for a, b in zip(ours[first:], theirs[first:], strict=True))


def test_a_namespace_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Namespace(**BASE).weights = "other"  # type: ignore[misc]
