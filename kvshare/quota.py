"""What tenants hold in one tier of a node, against what they may, and which blocks of a store end when.

    reserve ── over bytes_max? ──> the tenant's own coldest blocks leave, whichever store of the tier has them
       └─ end, and of what was written enter ──> held, in order of use ── leave
    until: the block ends ttl_seconds from now, or earlier if the copy that it was made from does

A `Quota` is shared by the stores of a tier (all arenas of a node; all its disk regions), so that a tenant with two models has
one limit. It orders the blocks of tenants that have one, by last use, and no others: for everybody else a block costs a look at
its tag. A tenant over its limit never costs another a block, and another never it.

`Expiries` belongs to one store. Time in headers and messages is in whole seconds since 2020 by the wall clock; here it follows
the monotonic clock from the start on, so that a clock that is set moves no block's end.

Threads: one caller, the node's loop. Time is an argument but of `Quota.second`, which lookups ask.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from kvshare.keys import FAMILY_BYTES, NO_TENANT, TENANT_BYTES
from kvshare.tenants import Tenants

SHOWN_MAX = 100  # tenants in a status, the largest
ENDS_MAX = 100_000
_TAG = slice(FAMILY_BYTES, FAMILY_BYTES + TENANT_BYTES)  # of a key
_HEAP_SLACK = 64


class Holder(Protocol):
    """A `kvshare.store.Store`."""

    def drop(self, keys: Sequence[bytes], counted: str) -> None:
        """Give these blocks up, and count them as what is said."""


class Usage:
    """One tenant's part of a tier. ``order``: its blocks and who holds each, coldest first; empty where it has no limit."""

    __slots__ = ("bytes_max", "held", "order", "reserved")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held = 0
        self.reserved = 0
        self.order: OrderedDict[bytes, Holder] = OrderedDict()

    @property
    def over(self) -> bool:
        return bool(self.bytes_max) and self.held + self.reserved > self.bytes_max


class Quota:
    """See the module's docstring. ``clock``: monotonic seconds. ``second``: seconds since 2020 at this moment."""

    def __init__(self, tenants: Tenants, second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._tenants = tenants
        self._clock = clock
        self._origin = second - clock()
        self._usages: dict[bytes, Usage] = {}  # of tenants that hold or reserve anything
        nobody = tenants.rules(NO_TENANT)
        # The tag of blocks that cost no more than a look at it.
        self._free = None if nobody.bytes_max or nobody.ttl_seconds else NO_TENANT

    # --- time ---------------------------------------------------------------------------------------------------------

    def second(self, now: float | None = None) -> int:
        """Seconds since 2020 at monotonic time ``now`` (default: this moment)."""
        return int((self._clock() if now is None else now) + self._origin)

    def moment(self, second: int) -> float:
        """The monotonic time at which a second begins."""
        return second - self._origin

    def until(self, key: bytes, now: float, latest: int = 0) -> int:
        """When a block that comes now must end, in seconds since 2020; 0: never. latest: it ends then in any case, unless 0."""
        if key[_TAG] == self._free:
            return latest
        ttl = self._tenants.rules(key[_TAG]).ttl_seconds
        if not ttl:
            return latest
        own = self.second(now) + ttl
        return min(own, latest) if latest else own

    def until_all(self, keys: Sequence[bytes], now: float, latest: Sequence[int]) -> Sequence[int]:
        """`until` of many."""
        if not any(self._tenants.rules(tag).ttl_seconds for tag in {key[_TAG] for key in keys}):
            return latest
        return [self.until(key, now, end) for key, end in zip(keys, latest, strict=True)]

    # --- bytes --------------------------------------------------------------------------------------------------------

    def reserve(self, key: bytes, size: int) -> bool:
        """Count ``size`` bytes for a block that is about to be written, and have the tenant's coldest leave for it. False, and
        nothing has changed, when even that is not enough."""
        if key[_TAG] == self._free:
            return True
        usage = self._usage(key)
        if usage.bytes_max and usage.reserved + size > usage.bytes_max:
            self._forget_idle(key, usage)
            return False
        usage.reserved += size
        self._settle(usage)
        return True

    def end(self, key: bytes, size: int) -> None:
        """A reservation is over, whatever became of it."""
        if key[_TAG] != self._free:
            usage = self._usage(key)
            usage.reserved -= size
            self._forget_idle(key, usage)

    def enter(self, key: bytes, size: int, holder: Holder) -> None:
        """A block is held: one that was reserved until now, or one found at the start (see `settle`)."""
        if key[_TAG] != self._free:
            usage = self._usage(key)
            usage.held += size
            if usage.bytes_max:
                usage.order[key] = holder

    def enter_all(self, keys: Collection[bytes], size: int, holder: Holder) -> None:
        """`enter` of many, in order."""
        for tag, count in Counter([key[_TAG] for key in keys]).items():
            if tag != self._free:
                usage = self._usage(bytes(FAMILY_BYTES) + tag)
                usage.held += count * size
                if usage.bytes_max:
                    usage.order.update((key, holder) for key in keys if key[_TAG] == tag)

    def leave(self, key: bytes, size: int) -> None:
        """A block is not held any more."""
        if key[_TAG] != self._free:
            usage = self._usage(key)
            usage.held -= size
            usage.order.pop(key, None)
            self._forget_idle(key, usage)

    def touch(self, chain: Sequence[bytes]) -> None:
        """These were used, in order of their chain: its tail counts as used first, so that it leaves first."""
        if not self._usages:
            return
        for key in reversed(chain):
            usage = self._usages.get(key[_TAG])
            if usage is not None and key in usage.order:
                usage.order.move_to_end(key)

    def settle(self) -> None:
        """Whoever holds more than it may (its limit was lowered since) gives its coldest up."""
        for usage in list(self._usages.values()):
            self._settle(usage)

    def counters(self, tier: str = "") -> dict[str, int]:
        """Bytes of the tenants that hold most, ``tenant_{tag}_{tier}bytes``."""
        largest = heapq.nlargest(SHOWN_MAX, ((usage.held, tag) for tag, usage in self._usages.items()))
        return {f"tenant_{tag.hex()}_{tier}bytes": held for held, tag in largest}

    def check(self, blocks: Iterable[tuple[bytes, int]]) -> list[str]:
        """Problems found, one sentence each. blocks: key and size of all that the tier's stores hold."""
        held: dict[bytes, int] = {}
        ordered: dict[bytes, set[bytes]] = {}
        for key, size in blocks:
            tag = key[_TAG]
            if tag != self._free:
                held[tag] = held.get(tag, 0) + size
                ordered.setdefault(tag, set()).add(key)
        problems = []
        problems += [f"tenant {tag.hex()} holds blocks that are not counted" for tag in held.keys() - self._usages.keys()]
        for tag, usage in self._usages.items():
            if usage.held != held.get(tag, 0) or usage.reserved < 0:
                problems.append(f"tenant {tag.hex()} holds {held.get(tag, 0)} bytes, counted are {usage.held}")
            if usage.bytes_max and usage.order.keys() != ordered.get(tag, set()):
                problems.append(f"tenant {tag.hex()} has {len(usage.order)} blocks in order, holds {len(ordered.get(tag, ()))}")
            if not usage.held and not usage.reserved:
                problems.append(f"tenant {tag.hex()} is kept without blocks")
        return problems

    def _usage(self, key: bytes) -> Usage:
        tag = key[_TAG]
        usage = self._usages.get(tag)
        if usage is None:
            usage = self._usages[tag] = Usage(self._tenants.rules(tag).bytes_max)
        return usage

    def _settle(self, usage: Usage) -> None:
        while usage.over and usage.order:
            key, holder = usage.order.popitem(last=False)
            holder.drop([key], "over_quota")  # which calls `leave`

    def _forget_idle(self, key: bytes, usage: Usage) -> None:
        if not usage.held and not usage.reserved:
            self._usages.pop(key[_TAG], None)


class Expiries:
    """Keys by the second at which they end. O(log n) for a new second, O(1) for all else."""

    def __init__(self) -> None:
        self._by_second: dict[int, set[bytes]] = {}
        self._seconds: list[int] = []  # a heap; some are of the past of `_by_second`

    def __len__(self) -> int:
        """Seconds in which something ends."""
        return len(self._by_second)

    def add(self, key: bytes, second: int) -> None:
        if second not in self._by_second:
            self._by_second[second] = set()
            if len(self._seconds) > 2 * len(self._by_second) + _HEAP_SLACK:
                self._seconds = sorted(self._by_second)
            else:
                heapq.heappush(self._seconds, second)
        self._by_second[second].add(key)

    def discard(self, key: bytes, second: int) -> None:
        keys = self._by_second.get(second, set())
        keys.discard(key)
        if not keys:
            self._by_second.pop(second, None)

    def next(self) -> int | None:
        """The first second in which something ends."""
        while self._seconds and self._seconds[0] not in self._by_second:
            heapq.heappop(self._seconds)
        return self._seconds[0] if self._seconds else None

    def due(self, second: int, most: int) -> list[bytes]:
        """Up to ``most`` keys that end by then; they stay until `discard`."""
        first = self.next()
        if first is None or first > second:
            return []
        keys = self._by_second[first]
        return [key for key, _ in zip(keys, range(most), strict=False)]

    def pairs(self) -> set[tuple[bytes, int]]:
        return {(key, second) for second, keys in self._by_second.items() for key in keys}


class Ends:
    """When blocks end that others hold, as far as we were told: a copy of ours ends then too. Remembers the latest
    `ENDS_MAX`, long enough for what was asked about to be fetched and saved. ``second``: see `Quota`."""

    def __init__(self, second: Callable[[], int]) -> None:
        self._second = second
        self._by_key: OrderedDict[bytes, int] = OrderedDict()

    def told(self, key: bytes, expires: int) -> None:
        """expires: second since 2020; 0, which is the usual case, is not remembered."""
        if expires:
            self._by_key[key] = expires
            self._by_key.move_to_end(key)
            if len(self._by_key) > ENDS_MAX:
                self._by_key.popitem(last=False)

    def over(self, expires: int) -> bool:
        """Is that time over?"""
        return 0 < expires <= self._second()

    def of(self, keys: Sequence[bytes]) -> list[int]:
        """For `kvshare.store.Store.reserve`: 0 for those that were not told, or end never."""
        known = self._by_key
        return [known.get(key, 0) for key in keys] if known else []
