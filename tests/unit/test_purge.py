"""Purges: what a scope names, what a store gives up, what the directory asks of whom. Method: pure parts, no clock."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare import keys, native, purge_rounds
from kvshare.cluster_messages import AskPurge, Declare, Erase, Erased, Find, Found, Join, Publish, PurgeDone, Welcome
from kvshare.config import Settings
from kvshare.directory import Directory
from kvshare.directory_events import Broadcast, Close, Command, Connected, Disconnected, Heard, Send, Tick
from kvshare.fingerprints import ALL_PARTS
from kvshare.gate import Gate
from kvshare.keys import Namespace
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import DEVICE, NodeDescription, RegionDescription, Stored
from kvshare.purge import NodePurge, PurgeScope, TierPurge, added_up, purged_report
from kvshare.region import Region
from kvshare.runs import keys_of, runs_of
from kvshare.store import Store
from kvshare.tenants import TenantRules, Tenants

FAMILY, OTHER = b"f" * keys.FAMILY_BYTES, b"g" * keys.FAMILY_BYTES
ACME = keys.tenant_tag("acme")
SLOT = 4096


def key(name: str, tenant: bytes = keys.NO_TENANT, family: bytes = FAMILY) -> bytes:
    return keys.prefix(family, tenant=tenant) + name.encode()


# --- scopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "going"),
    [
        (PurgeScope(tenant="acme"), {"a", "b"}),
        (PurgeScope(family=OTHER), {"b", "c"}),
        (PurgeScope(prefix=keys.prefix(FAMILY)), {"d"}),
        (PurgeScope(prefix=FAMILY[:5]), {"a", "d"}),
        (PurgeScope(tenant="acme-2"), set()),
    ],
)
def test_a_scope_names_keys(scope: PurgeScope, going: set[str]) -> None:
    held = {
        "a": key("1", ACME),
        "b": key("1", ACME, OTHER),
        "c": key("1", family=OTHER),
        "d": key("1"),
    }
    assert {name for name, each in held.items() if scope.matches(each)} == going


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tenant": "acme", "family": FAMILY},
        {"family": FAMILY, "prefix": b"x"},
        {"family": b"short"},
        {"tenant": "no name"},
        {"prefix": bytes(65)},
    ],
)
def test_a_scope_that_is_none_is_refused_here_and_on_the_wire(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PurgeScope(**fields)
    sent = [fields.get("tenant", ""), fields.get("family", b""), fields.get("prefix", b"")]
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=PurgeScope)


def test_a_report_names_nodes_tiers_faults_and_who_was_silent() -> None:
    nodes = [
        NodePurge("a", added_up([TierPurge("arena", 2, 10), TierPurge("arena", 1, 5)]), [], True),
        NodePurge("b", [], ["the disk failed: run it again"]),
    ]
    assert purged_report(PurgeScope("acme"), nodes, ["node c did not answer"]) == [
        "a: arena 3 blocks, 15 bytes; the key is destroyed",
        "b: nothing was there",
        "b: the disk failed: run it again",
        "node c did not answer",
        "purged tenant acme: 3 blocks",
    ]


# --- a store ----------------------------------------------------------------------------------------------------------


class Shelf:
    """A store over memory in which blocks are full of a byte of theirs."""

    def __init__(self, slots: int = 8) -> None:
        self.region = Region.anonymous(SLOT, slots)
        self.store = Store(self.region, Settings(quarantine_seconds=10.0))

    def write(self, slot: int, byte: int, length: int = SLOT) -> None:
        native.view(self.region.slot_address(slot), length, writable=True)[:] = bytes([byte]) * length

    def save(self, *names: bytes, byte: int = 1, length: int = SLOT) -> list[Stored]:
        pairs = self.store.reserve(names, length, 1, 0.0)
        for slot, _ in pairs:
            self.write(slot, byte, length)
        return self.store.commit([slot for slot, _ in pairs], [odd for _, odd in pairs], [7] * len(pairs), 1)

    def purge(self, now: float = 0.0) -> None:
        """Tenant acme, as `kvshare.purging` does it."""
        matches = PurgeScope("acme").matcher()
        self.store.begin_purge(matches, now)
        self.store.purge([block.key for block in self.store.inventory() if matches(block.key)])
        self.store.end_purge()
        self.clean()

    def clean(self) -> None:
        while slots := self.store.soiled.take(3):
            self.region.punch(slots)
            self.store.cleaned(slots)
            assert self.store.check() == []

    def bytes(self) -> set[int]:
        """All bytes that the region holds."""
        return set(np.unique(np.frombuffer(native.view(self.region.data_address, SLOT * self.region.slots), np.uint8)).tolist())


@pytest.fixture
def shelf() -> Any:
    made = Shelf()
    yield made
    assert made.store.check() == []


def test_purged_blocks_leave_zeros_and_do_not_validate(shelf: Shelf) -> None:
    told = shelf.save(key("1", ACME), key("2", ACME), byte=3)
    shelf.save(key("3"), byte=5)
    shelf.purge()
    assert shelf.bytes() == {0, 5}
    assert shelf.store.take_removed() == [block.key for block in told]
    assert not (shelf.region.generations([block.slot for block in told]) == [block.generation for block in told]).any()
    assert [shelf.region.key(block.slot) for block in told] == [b"", b""]
    assert shelf.store.free_slots == 7


def test_a_slot_is_nobodys_before_it_is_clean(shelf: Shelf) -> None:
    (block,) = shelf.save(key("1", ACME), byte=3)
    shelf.store.purge([block.key])
    slots = {slot for slot, _ in shelf.store.reserve([key(str(i)) for i in range(20)], SLOT, 1, 0.0)}
    assert block.slot not in slots and -1 in slots
    assert shelf.store.soiled.take(10) == [block.slot]
    assert shelf.store.soiled.take(10) == []
    shelf.store.soiled.again([block.slot])  # it could not be cleaned
    shelf.clean()
    assert shelf.store.reserve([key("y")], SLOT, 1, 0.0)[0][0] == block.slot


@pytest.mark.parametrize("how", ["drop", "abort", "quarantine"])
def test_free_slots_that_were_written_to_are_cleaned_as_well(shelf: Shelf, how: str) -> None:
    if how == "abort":
        ((slot, odd),) = shelf.store.reserve([key("1", ACME)], SLOT, 1, 0.0)
        shelf.write(slot, 3)
        shelf.store.abort([slot], [odd], 1)
    else:
        (block,) = shelf.save(key("1", ACME), byte=3)
        if how == "drop":
            shelf.store.drop([block.key])
        else:
            shelf.store.quarantine([block.slot], [block.generation], 0.0)
    assert shelf.bytes() == {0, 3}
    shelf.purge()
    shelf.store.expire(10.0)
    shelf.clean()
    assert shelf.bytes() == {0}
    assert shelf.store.free_slots == 8


def test_a_reservation_ends_and_its_slot_is_cleaned_when_it_has_rested(shelf: Shelf) -> None:
    ((slot, odd),) = shelf.store.reserve([key("1", ACME)], SLOT, 1, 0.0)
    shelf.purge(now=5.0)
    shelf.write(slot, 3)  # its writer is late
    assert shelf.store.commit([slot], [odd], [7], 1) == []
    assert shelf.store.check() == []
    shelf.store.expire(14.9)
    shelf.clean()
    assert shelf.bytes() == {0, 3}
    shelf.store.expire(15.0)
    shelf.clean()
    assert shelf.bytes() == {0}


def test_a_shorter_block_leaves_nothing_of_the_longer_one_that_was_there_before() -> None:
    shelf = Shelf(slots=1)
    shelf.save(key("1", ACME), byte=3)
    shelf.save(key("2"), byte=5, length=100)
    assert shelf.bytes() == {0, 5}
    assert shelf.store.check() == []


def test_a_recovered_block_that_may_not_be_here_is_not_adopted() -> None:
    from kvshare.slots import Recovered

    shelf = Shelf()
    kept, barred = shelf.save(key("1"), key("2", ACME))
    again = Store(shelf.region, Settings())
    again.gate = Gate(Tenants({"acme": TenantRules(regions=("eu",))}), "us")
    found = [Recovered(block.slot, block.key, SLOT, block.generation, 0) for block in (kept, barred)]
    assert [block.key for block in again.adopt(found)] == [kept.key]
    assert list(again.soiled) == [barred.slot]
    assert again.counters["barred"] == 1
    assert again.check() == []


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("region", "barred"), [("eu", False), ("us", True), ("", True)])
def test_the_gate_bars_bound_tenants_where_they_may_not_be(region: str, barred: bool) -> None:
    gate = Gate(Tenants({"acme": TenantRules(regions=("eu",))}), region)
    assert gate.bars(key("1", ACME)) == barred
    assert not gate.bars(key("1")) and not gate.bars(key("1", keys.tenant_tag("other")))
    assert gate.may_go_to(key("1", ACME), "eu") and not gate.may_go_to(key("1", ACME), "")
    assert gate.is_bound(key("1", ACME)) and not gate.is_bound(key("1"))


def test_the_gate_says_once_what_it_bars(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(Tenants({"acme": TenantRules(regions=("eu",))}), "")
    assert all(gate.bars(key(str(i), ACME)) for i in range(3))
    assert len(caplog.records) == 1 and "tenants_file" in caplog.text


def test_the_gate_bars_what_is_purged_until_that_is_over() -> None:
    gate = Gate(Tenants(), "")
    first, second = PurgeScope("acme").matcher(), PurgeScope("acme").matcher()
    gate.close(first)
    gate.close(second)
    assert gate.active and gate.bars(key("1", ACME)) and not gate.bars(key("1"))
    gate.open(first)
    assert gate.bars(key("1", ACME))
    gate.open(second)
    assert not gate.active and not gate.bars(key("1", ACME))


# --- the directory ----------------------------------------------------------------------------------------------------

SCOPE = PurgeScope("acme")
NAMESPACE = Namespace(
    weights="w",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    block_size=16,
    page_bytes=1,
    layers=1,
    kv_heads=1,
    head_size=64,
    hash_algorithm="sha256",
    hash_seed="0",
    packing="x",
)


def described(name: str, label: str = "", epoch: int = 7) -> NodeDescription:
    regions = ()
    if "/" in name:
        regions = (RegionDescription(name, 1, SLOT, 8, "host", "", "", "", DEVICE),)
    return NodeDescription(name, epoch, "host", "10.0.0.1:1", regions, label)


class Play:
    """A directory that hears events; connections have numbers from 1, in the order in which they come."""

    def __init__(self, **rules: TenantRules) -> None:
        self.directory = Directory(Settings(heartbeat_seconds=1000.0), epoch=50, tenants=Tenants(rules))
        self.now = 100.0
        self.connection = 0

    def hear(self, connection: int, message: Message) -> list[Command]:
        commands = self.directory.handle(Heard(connection, message), self.now)
        assert self.directory.check() == []
        return commands

    def join(self, name: str, **description: Any) -> tuple[int, Welcome]:
        self.connection += 1
        self.directory.handle(Connected(self.connection), self.now)
        node = described(name, **description)
        commands = self.hear(self.connection, Join(PROTOCOL_VERSION, node, False, 0, 1))
        (welcome,) = [each.message for each in commands if isinstance(each, Send) and isinstance(each.message, Welcome)]
        self.hear(self.connection, Publish(name, node.epoch, 1, ALL_PARTS, False, [], [], 0))
        return self.connection, welcome

    def lose(self, connection: int) -> list[Command]:
        commands = self.directory.handle(Disconnected(connection), self.now)
        assert self.directory.check() == []
        return commands

    def ask(self, connection: int, ask: int = 1) -> Erase:
        (told,) = self.hear(connection, AskPurge(ask, SCOPE, False))
        assert isinstance(told, Broadcast) and isinstance(told.message, Erase)
        self.asked = told.connections
        return told.message


def done(erase: Erase, name: str) -> Erased:
    return Erased(erase.number, NodePurge(name, [TierPurge("arena", 1, 10)]))


def answer_of(commands: list[Command]) -> tuple[int, list[str], list[str]]:
    """Who is answered, by what nodes, without which."""
    (sent,) = [each for each in commands if isinstance(each, Send)]
    assert isinstance(sent.message, PurgeDone)
    return sent.connection, [node.node for node in sent.message.nodes], sent.message.silent


def test_a_purge_is_asked_of_all_nodes_and_answered_when_all_have_done_it() -> None:
    play = Play()
    a, b, c = (play.join(name)[0] for name in "abc")
    play.join("a/engine")  # its node's business
    erase = play.ask(b)
    assert (erase.scope, play.asked) == (SCOPE, (a, b, c))
    assert play.hear(c, done(erase, "c")) == []
    assert play.hear(a, done(erase, "a")) == []
    assert play.hear(a, done(erase, "a")) == []
    assert answer_of(play.hear(b, done(erase, "b"))) == (b, ["a", "b", "c"], [])
    assert play.hear(c, done(erase, "c")) == []


def test_a_node_that_is_lost_or_late_is_named() -> None:
    play = Play()
    a, b, c = (play.join(name)[0] for name in "abc")
    erase = play.ask(a)
    play.lose(c)
    play.hear(a, done(erase, "a"))
    deadline = play.directory.next_deadline()
    assert deadline == play.now + purge_rounds.GATHER_SECONDS
    play.now = deadline
    assert answer_of(play.directory.handle(Tick(), play.now)) == (a, ["a"], ["b", "c"])
    assert play.directory.check() == []
    second = play.ask(a)
    play.hear(a, done(second, "a"))
    assert answer_of(play.lose(b)) == (a, ["a"], ["b"])


def test_who_missed_a_purge_is_told_of_it_with_his_welcome_and_who_did_not_is_not() -> None:
    play = Play()
    a, b = play.join("a")[0], play.join("b")[0]
    erase = play.ask(a)
    play.hear(a, done(erase, "a"))
    play.lose(a)
    play.lose(b)
    assert play.join("a")[1].purges == []
    b, welcome = play.join("b", epoch=9)
    assert welcome.purges == [erase]
    assert play.join("b/engine")[1].purges == []
    play.hear(b, done(erase, "b"))
    play.lose(b)
    assert play.join("b", epoch=10)[1].purges == []


def test_an_asker_that_is_gone_is_not_answered_and_the_purge_goes_on() -> None:
    play = Play()
    a, b = play.join("a")[0], play.join("b")[0]
    erase = play.ask(a)
    assert not [each for each in play.lose(a) if isinstance(each, Send)]
    assert play.hear(b, done(erase, "b")) == []
    assert play.join("a")[1].purges == [erase]


def test_a_node_that_joins_again_on_another_connection_in_the_middle_is_told_again() -> None:
    play = Play()
    a, b = play.join("a")[0], play.join("b")[0]
    erase = play.ask(a)
    play.hear(a, done(erase, "a"))
    play.connection += 1
    play.directory.handle(Connected(play.connection), play.now)
    commands = play.hear(play.connection, Join(PROTOCOL_VERSION, described("b"), False, 0, 1))
    assert any(isinstance(each, Close) and each.connection == b for each in commands)
    messages = [each.message for each in commands if isinstance(each, Send)]
    assert [each.silent for each in messages if isinstance(each, PurgeDone)] == [["b"]]
    assert [each.purges for each in messages if isinstance(each, Welcome)] == [[erase]]


def test_purges_and_namespaces_are_the_affair_of_the_first_shard() -> None:
    for message in (AskPurge(1, SCOPE, False), Declare(1, NAMESPACE)):
        directory = Directory(Settings(), shard=1, shards=2)
        directory.handle(Connected(1), 0.0)
        directory.handle(Heard(1, Join(PROTOCOL_VERSION, described("a"), False, 1, 2)), 0.0)
        (close,) = directory.handle(Heard(1, message), 0.0)
        assert isinstance(close, Close) and close.connection == 1 and "the affair of shard 0" in close.reason


def test_only_the_latest_purges_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge_rounds, "REMEMBERED_MAX", 3)
    play = Play()
    a, _ = play.join("a")
    erases = [play.ask(a, ask) for ask in range(5)]
    assert play.join("b")[1].purges == erases[2:]


def test_locations_are_not_told_to_who_may_not_have_the_blocks() -> None:
    play = Play(acme=TenantRules(regions=("eu",)))
    eu, _ = play.join("a", label="eu")
    blocks = [Stored(key("1", ACME), SLOT, 0, 2, SLOT), Stored(key("2"), SLOT, 1, 2, SLOT)]
    play.hear(eu, Publish("a", 7, 2, 0, False, runs_of(blocks), [], 0))
    for label, told in (("eu", [1, 1]), ("us", [0, 1]), ("", [0, 1])):
        asker, _ = play.join(f"asker-{label}", label=label)
        (sent,) = play.hear(asker, Find(1, keys_of(block.key for block in blocks)))
        assert isinstance(sent, Send) and isinstance(sent.message, Found)
        assert [len(places) for places in sent.message.places.locations()] == told
