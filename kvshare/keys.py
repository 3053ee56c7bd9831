"""Keys: the opaque names of blocks, and the namespaces that keep unequal blocks apart.

A key is ``family (16 bytes) | tenant (6) | variant (8) | group (2, big endian) | block hash (1 to 32)``.

* *family* is the fingerprint of a `Namespace`: everything that makes two engines' blocks interchangeable.
* *tenant* is the tag of the tenant whose block it is: who pays for it, who may erase it, where it may lie. Zero for nobody's.
* *variant* separates requests within an engine: LoRA weights and tenant salt. Zero when a request has neither.
  It comes after the family so that "all that this engine could use" is one prefix.
* *group* is the KV cache group.
* *block hash* is the engine's own chained hash.

The first four form the *prefix*; an index keyed by prefix, then by the engine's hash objects, needs no concatenation
on the scheduler's path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import msgspec
import xxhash

FAMILY_BYTES = 16
TENANT_BYTES = 6
VARIANT_BYTES = 8
GROUP_BYTES = 2
PREFIX_BYTES = FAMILY_BYTES + TENANT_BYTES + VARIANT_BYTES + GROUP_BYTES
KEY_BYTES_MAX = 64  # a header of the slot table has room for this many
NO_VARIANT = bytes(VARIANT_BYTES)
NO_TENANT = bytes(TENANT_BYTES)


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that makes blocks interchangeable. Equal fields, equal family; anything else never shares.

    ``weights`` identifies the weights themselves, never a model's name or path. ``label`` is for people (logs, status)
    and takes no part in the fingerprint.
    """

    weights: str
    dtype: str
    kv_dtype: str
    block_size: int  # tokens
    page_bytes: int  # bytes of one layer's share of a block
    layers: int
    kv_heads: int
    head_size: int
    hash_algorithm: str
    hash_seed: str
    packing: str  # how tokens lie within a page, e.g. "cpu-vec" or "LBHNC"
    tensor_parallel: str = "1"  # "shard/count" where a block is cut by heads
    attention: str = "full"
    label: str = ""

    def family(self) -> bytes:
        """The fingerprint, 16 bytes, equal on every machine."""
        return hashlib.blake2b(msgspec.json.encode(self._identity()), digest_size=FAMILY_BYTES).digest()

    def differing(self, other: Namespace) -> dict[str, tuple[object, object]]:
        """The fields in which two namespaces differ, as ``name: (ours, theirs)``."""
        ours, theirs = self._identity(), other._identity()
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}

    def _identity(self) -> dict[str, object]:
        fields = msgspec.structs.asdict(self)
        del fields["label"]
        return dict(sorted(fields.items()))


def variant(lora: bytes = b"", salt: str = "") -> bytes:
    """The variant of a request: digest of its LoRA adapter's weights and its tenant salt; zeros when it has neither."""
    if not lora and not salt:
        return NO_VARIANT
    digest = hashlib.blake2b(digest_size=VARIANT_BYTES)
    for part in (lora, salt.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def tenant_tag(name: str) -> bytes:
    """The tag of a tenant in keys: a digest of its name; zeros for no name."""
    return hashlib.blake2b(name.encode(), digest_size=TENANT_BYTES).digest() if name else NO_TENANT


def prefix(family: bytes, variant: bytes = NO_VARIANT, group: int = 0, tenant: bytes = NO_TENANT) -> bytes:
    """The part of a key that all blocks of one family, tenant, variant and group share. ``tenant``: its `tenant_tag`."""
    assert len(family) == FAMILY_BYTES and len(variant) == VARIANT_BYTES and len(tenant) == TENANT_BYTES
    return family + tenant + variant + group.to_bytes(GROUP_BYTES, "big")


def family_of(key: bytes) -> bytes:
    return key[:FAMILY_BYTES]


def tenant_of(key: bytes) -> bytes:
    return key[FAMILY_BYTES : FAMILY_BYTES + TENANT_BYTES]


def prefix_of(key: bytes) -> bytes:
    return key[:PREFIX_BYTES]


def hash_of(key: bytes) -> bytes:
    return key[PREFIX_BYTES:]


def seed_of(key: bytes) -> int:
    """The 64-bit seed of a block's checksum. Seeding with the key means that a right block under a wrong key fails too."""
    return xxhash.xxh3_64_intdigest(key)


def seeds_of(keys: Iterable[bytes]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(key) for key in keys]


def chain(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Chained hashes of the full blocks of ``token_ids``, for stacks that have no hashes of their own.

    Block i's hash covers all tokens up to its end: sha256(previous hash + tokens as 8-byte little endian).
    """
    previous = hashlib.sha256(b"kvshare-chain").digest()
    hashes = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = b"".join(int(token).to_bytes(8, "little") for token in token_ids[start : start + block_size])
        previous = hashlib.sha256(previous + tokens).digest()
        hashes.append(previous)
    return hashes
