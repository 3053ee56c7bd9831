"""What a purge is about, and what it found.

    PurgeScope ── matches(key) ── yes: goes, from every tier of every node
    NodePurge = (node, TierPurge for each tier: blocks, bytes)

A scope is one tenant, one family (all that engines of one namespace made), or all keys that begin alike. It is matched against
the bytes of keys alone, so that nobody needs to know more of a block than its key to obey it.

Pure; parts of messages. Threads: none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import msgspec

from kvshare.keys import FAMILY_BYTES, KEY_BYTES_MAX, tenant_tag

ARENA, ENGINES, DISK, OBJECT = "arena", "engines", "disk", "object"  # tiers, as they are reported

Matches = Callable[[bytes], bool]


class PurgeScope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Exactly one of: ``tenant`` (its name), ``family`` (16 bytes), ``prefix`` (how the keys begin, 1 to 64 bytes).

    Raises:
        ValueError: none or several are given, or one is impossible; when decoded, msgspec's ValidationError.
    """

    tenant: str = ""
    family: bytes = b""
    prefix: bytes = b""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.tenant, self.family, self.prefix))) != 1:
            raise ValueError("a purge is of one tenant, one family or one prefix: name exactly one")
        if self.tenant and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.tenant) is None:
            raise ValueError(f"{self.tenant!r} is no tenant's name: use 1 to 64 letters, digits, '_', '.', '-'")
        if self.family and len(self.family) != FAMILY_BYTES:
            raise ValueError(
                f"a family has {FAMILY_BYTES} bytes ({2 * FAMILY_BYTES} hexadecimal digits), not {len(self.family)}"
            )
        if len(self.prefix) > KEY_BYTES_MAX:
            raise ValueError(f"a key has at most {KEY_BYTES_MAX} bytes, the prefix {len(self.prefix)}")

    def matcher(self) -> Matches:
        """`matches`, prepared for many keys."""
        start, part = (FAMILY_BYTES, tenant_tag(self.tenant)) if self.tenant else (0, self.family or self.prefix)
        return lambda key: key.startswith(part, start)

    def matches(self, key: bytes) -> bool:
        """Does this key's block go?"""
        return self.matcher()(key)

    def __str__(self) -> str:
        if self.tenant:
            return f"tenant {self.tenant}"
        return f"family {self.family.hex()}" if self.family else f"prefix {self.prefix.hex()}"


class TierPurge(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that one tier gave up, and their lengths added up. Of ``ENGINES``: blocks that are no longer told of."""

    tier: str
    blocks: int
    bytes: int


class NodePurge(msgspec.Struct, frozen=True, array_like=True):
    """What one node gave up. ``faults``: sentences about what it could not do, with the remedy; empty when it is all done.
    ``key_destroyed``: there was a key of the tenant, and now there is not."""

    node: str
    tiers: list[TierPurge]
    faults: list[str] = []
    key_destroyed: bool = False


def added_up(tiers: Iterable[TierPurge]) -> list[TierPurge]:
    """One entry for each tier."""
    sums: dict[str, tuple[int, int]] = {}
    for each in tiers:
        blocks, bytes_ = sums.get(each.tier, (0, 0))
        sums[each.tier] = (blocks + each.blocks, bytes_ + each.bytes)
    return [TierPurge(tier, *amounts) for tier, amounts in sums.items()]


def purged_report(scope: PurgeScope, nodes: Sequence[NodePurge], silent: Iterable[str]) -> list[str]:
    """What a purge did, a line each: nodes and their tiers, what could not be done."""
    lines = []
    for node in nodes:
        told = ", ".join(f"{tier.tier} {tier.blocks} blocks, {tier.bytes} bytes" for tier in node.tiers) or "nothing was there"
        lines.append(f"{node.node}: {told}{'; the key is destroyed' if node.key_destroyed else ''}")
        lines += [f"{node.node}: {fault}" for fault in node.faults]
    lines += list(silent)
    total = sum(tier.blocks for node in nodes for tier in node.tiers)
    return [*lines, f"purged {scope}: {total} blocks"]
