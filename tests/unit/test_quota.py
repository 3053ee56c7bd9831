"""What tenants hold and for how long: through `Store`s, as a node uses them; each test ends with both `check`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare.config import Settings
from kvshare.keys import NO_TENANT, prefix, tenant_tag
from kvshare.places import Stored
from kvshare.quota import Ends, Expiries, Quota
from kvshare.region import Region
from kvshare.slots import Recovered
from kvshare.store import NO_SLOT, Store
from kvshare.tenants import TenantRules, Tenants

SLOT = 64
ENGINE = 1
FAMILY = bytes(16)
START = 1_000_000  # seconds since 2020 at monotonic time 0
ACME, SHORT, FREE = (tenant_tag(name) for name in ("acme", "short", "free"))


class Tier:
    """Stores that share a quota, and a clock that stands still."""

    def __init__(self, default: TenantRules | None = None, stores: int = 1, slots: int = 16) -> None:
        self.now = 0.0
        rules = {"acme": TenantRules(bytes_max=4 * SLOT), "short": TenantRules(ttl_seconds=10)}
        tenants = Tenants(rules, default or TenantRules())
        self.quota = Quota(tenants, START, lambda: self.now)
        self.regions = [Region.anonymous(SLOT, slots) for _ in range(stores)]
        self.stores = [Store(region, Settings(quarantine_seconds=10.0), quota=self.quota) for region in self.regions]

    def reserve(self, keys: Sequence[bytes], store: int = 0, expires: Sequence[int] = ()) -> list[tuple[int, int]]:
        return self.stores[store].reserve(keys, SLOT, ENGINE, self.now, expires)

    def save(self, keys: Sequence[bytes], store: int = 0, expires: Sequence[int] = ()) -> list[Stored]:
        pairs = [pair for pair in self.reserve(keys, store, expires) if pair != NO_SLOT]
        slots, generations = [slot for slot, _ in pairs], [odd for _, odd in pairs]
        return self.stores[store].commit(slots, generations, [7] * len(pairs), ENGINE)

    def held(self, keys: Sequence[bytes], store: int = 0) -> list[bool]:
        return [block is not None for block in self.stores[store].lookup(keys)]

    def check(self) -> list[str]:
        held = [(block.key, SLOT) for store in self.stores for block in store.inventory()]
        return [problem for store in self.stores for problem in store.check()] + self.quota.check(held)


def names(tag: bytes, start: int, end: int) -> list[bytes]:
    return [prefix(FAMILY, tenant=tag) + b"%d" % i for i in range(start, end)]


@pytest.fixture
def make() -> Iterator[Callable[..., Tier]]:
    made: list[Tier] = []

    def make(**changes: object) -> Tier:
        made.append(Tier(**changes))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for tier in made:
        assert tier.check() == []


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_a_tenant_at_its_limit_loses_its_own_oldest_and_nobody_elses(make: Callable[..., Tier]) -> None:
    tier = make()
    others, own = names(FREE, 0, 5), names(ACME, 0, 6)
    tier.save(others)
    for key in own:
        tier.save([key])
    assert tier.held(others) == [True] * 5
    assert tier.held(own) == [False] * 2 + [True] * 4
    assert tier.stores[0].take_removed() == own[:2]
    assert tier.quota.counters() == {f"tenant_{ACME.hex()}_bytes": 4 * SLOT, f"tenant_{FREE.hex()}_bytes": 5 * SLOT}


def test_what_was_used_stays_and_of_a_chain_the_tail_leaves_first(make: Callable[..., Tier]) -> None:
    tier = make()
    chain, more = names(ACME, 0, 2), names(ACME, 2, 4)
    tier.save(chain)
    tier.save(more)
    tier.stores[0].touch(chain)
    for key in names(ACME, 10, 13):
        tier.save([key])
    assert tier.held(chain) == [True, False]


def test_a_chain_longer_than_the_limit_keeps_its_head(make: Callable[..., Tier]) -> None:
    tier = make()
    chain = names(ACME, 0, 9)
    tier.save(chain)
    assert tier.held(chain) == [True] * 4 + [False] * 5
    assert tier.stores[0].counters["over_quota"] == 5


def test_a_reservation_counts_until_it_ends(make: Callable[..., Tier]) -> None:
    tier = make()
    pairs = tier.reserve(names(ACME, 0, 5))
    assert [pair != NO_SLOT for pair in pairs] == [True] * 4 + [False]
    slots, generations = [slot for slot, _ in pairs[:2]], [odd for _, odd in pairs[:2]]
    tier.stores[0].abort(slots, generations, ENGINE)
    assert NO_SLOT not in tier.reserve(names(ACME, 5, 7))
    tier.stores[0].release(ENGINE, tier.now)
    assert tier.quota.counters() == {}
    assert NO_SLOT not in tier.reserve(names(ACME, 7, 11))


def test_a_store_without_room_gives_back_what_it_counted(make: Callable[..., Tier]) -> None:
    tier = make(slots=2)
    tier.stores[0].reserve(names(FREE, 0, 2), SLOT, ENGINE, tier.now)
    assert tier.reserve(names(ACME, 0, 1)) == [NO_SLOT]
    tier.stores[0].release(ENGINE, tier.now)
    tier.stores[0].expire(100.0)
    assert tier.quota.counters() == {}


def test_a_limit_is_of_the_tier_not_of_a_store(make: Callable[..., Tier]) -> None:
    tier = make(stores=2)
    first, second = names(ACME, 0, 4), names(ACME, 4, 7)
    tier.save(first, store=0)
    tier.save(second, store=1)
    assert tier.held(first, 0) == [True, False, False, False]
    assert tier.held(second, 1) == [True] * 3
    assert sorted(tier.stores[0].take_removed()) == first[1:]


@pytest.mark.parametrize("way", ["drop", "quarantine", "evict"])
def test_whatever_leaves_is_not_counted_any_more(make: Callable[..., Tier], way: str) -> None:
    tier = make(slots=4)
    blocks = tier.save(names(ACME, 0, 4))
    match way:
        case "drop":
            tier.stores[0].drop([block.key for block in blocks])
        case "quarantine":
            slots, generations = [block.slot for block in blocks], [block.generation for block in blocks]
            tier.stores[0].quarantine(slots, generations, tier.now)
        case "evict":
            tier.save(names(NO_TENANT, 0, 4))
    assert tier.quota.counters() == {}


def test_a_default_limit_holds_for_each_tenant_and_for_nobodys_blocks(make: Callable[..., Tier]) -> None:
    tier = make(default=TenantRules(bytes_max=2 * SLOT))
    for tag in (NO_TENANT, FREE, tenant_tag("x")):
        for key in names(tag, 0, 4):
            tier.save([key])
        assert tier.held(names(tag, 0, 4)) == [False, False, True, True]


def test_a_limit_that_was_lowered_holds_from_the_start(make: Callable[..., Tier]) -> None:
    tier = make()
    found, others = names(ACME, 0, 6), names(FREE, 6, 9)
    recovered = [Recovered(slot, key, SLOT, _finished(tier, slot, key)) for slot, key in enumerate(found + others)]
    adopted = tier.stores[0].adopt(recovered, now=tier.now)
    assert [block.key for block in adopted] == found[:4] + others
    assert tier.held(found) == [True] * 4 + [False] * 2


def test_a_block_larger_than_its_tenants_limit_pushes_nothing_out() -> None:
    quota = Quota(Tenants({"acme": TenantRules(bytes_max=SLOT - 1)}), START)
    assert not quota.reserve(names(ACME, 0, 1)[0], SLOT)
    assert quota.check([]) == []


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_block_is_found_until_its_time_is_over(make: Callable[..., Tier]) -> None:
    tier = make()
    keys, others = names(SHORT, 0, 2), names(FREE, 0, 2)
    blocks = tier.save(keys)
    tier.save(others)
    assert [block.expires for block in blocks] == [START + 10] * 2
    assert tier.regions[0].headers["expires"][blocks[0].slot] == START + 10
    assert tier.stores[0].next_expiry() == 10.0
    tier.now = 9.9
    tier.stores[0].expire(tier.now)
    assert tier.held(keys) == [True, True]
    tier.now = 10.0
    assert tier.held(keys) == [False, False]  # before anybody has cleaned up
    tier.stores[0].expire(tier.now)
    assert sorted(tier.stores[0].take_removed()) == keys
    assert tier.held(others) == [True, True]
    assert tier.regions[0].generations([blocks[0].slot])[0] > blocks[0].generation
    assert tier.stores[0].next_expiry() is None
    assert tier.stores[0].counters["expired"] == 2


def test_a_clock_that_is_set_moves_no_blocks_end(make: Callable[..., Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    tier.save(names(SHORT, 0, 1))
    monkeypatch.setattr("time.time_ns", lambda: 0)
    tier.now = 9.0
    assert tier.held(names(SHORT, 0, 1)) == [True]
    tier.now = 10.0
    assert tier.held(names(SHORT, 0, 1)) == [False]


def test_a_copy_ends_when_its_original_does_and_no_later_than_its_tenant_allows(make: Callable[..., Tier]) -> None:
    tier = make()
    short = tier.save(names(SHORT, 0, 3), expires=[START + 4, START + 400, 0])
    assert [block.expires for block in short] == [START + 4, START + 10, START + 10]
    (free,) = tier.save(names(FREE, 0, 1), expires=[START + 400])
    assert free.expires == START + 400


def test_a_copy_of_what_is_over_gets_no_slot(make: Callable[..., Tier]) -> None:
    tier = make()
    assert tier.reserve(names(FREE, 0, 2), expires=[START, START + 1])[0] == NO_SLOT
    assert tier.quota.counters() == {f"tenant_{FREE.hex()}_bytes": 0}
    tier.stores[0].release(ENGINE, tier.now)


def test_many_that_end_at_once_leave_in_turns(make: Callable[..., Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare.store.EXPIRED_AT_ONCE", 5)
    tier = make()
    keys = names(SHORT, 0, 12)
    tier.save(keys)
    tier.now = 11.0
    for left in (7, 2, 0):
        tier.stores[0].expire(tier.now)
        assert len(tier.stores[0]) == left
        assert tier.held(keys) == [False] * 12
        assert tier.stores[0].next_expiry() == (10.0 if left else None)


def test_a_block_that_ended_may_be_stored_again(make: Callable[..., Tier]) -> None:
    tier = make()
    tier.save(names(SHORT, 0, 1))
    tier.now = 10.0
    (block,) = tier.save(names(SHORT, 0, 1))
    assert block.expires == START + 20 and tier.held([block.key]) == [True]


def test_recovered_blocks_end_when_their_headers_say(make: Callable[..., Tier]) -> None:
    tier = make()
    keys = [*names(SHORT, 0, 2), *names(FREE, 0, 1)]
    ends = [START + 3, 0, START + 5]
    recovered = [
        Recovered(slot, key, SLOT, _finished(tier, slot, key), end)
        for slot, (key, end) in enumerate(zip(keys, ends, strict=True))
    ]
    adopted = tier.stores[0].adopt(recovered, now=tier.now)
    assert [block.expires for block in adopted] == [START + 3, START + 10, START + 5]
    tier.now = 5.0
    assert tier.held(keys) == [False, True, False]


def _finished(tier: Tier, slot: int, key: bytes) -> int:
    return tier.regions[0].finish(slot, tier.regions[0].begin(slot), key, SLOT, 7)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 30))))
def test_expiries_are_a_map_ordered_by_second(steps: list[tuple[bool, int, int]]) -> None:
    expiries, model = Expiries(), {}
    for adds, name, second in steps:
        key = b"%d" % name
        if key in model:
            expiries.discard(key, model.pop(key))
        if adds:
            expiries.add(key, second)
            model[key] = second
        assert expiries.pairs() == set(model.items())
        assert expiries.next() == min(model.values(), default=None)
        due = expiries.due(15, 100)
        first = expiries.next()
        assert set(due) == ({key for key, end in model.items() if end == first} if first is not None and first <= 15 else set())


def test_seconds_that_come_and_go_take_no_memory() -> None:
    expiries = Expiries()
    for second in range(10_000):
        expiries.add(b"key", second)
        expiries.discard(b"key", second)
    assert len(expiries) == 0 and len(expiries._seconds) <= 100


def test_ends_of_others_blocks_are_remembered_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare.quota.ENDS_MAX", 2)
    ends = Ends(lambda: 100)
    assert ends.of([b"a", b"b"]) == []
    for key, end in ((b"a", 105), (b"never", 0), (b"b", 106), (b"a", 107), (b"c", 108)):
        ends.told(key, end)
    assert ends.of([b"a", b"b", b"c", b"never"]) == [107, 0, 108, 0]
    assert [ends.over(second) for second in (0, 100, 101)] == [False, True, False]
