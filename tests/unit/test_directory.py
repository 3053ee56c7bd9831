"""The directory's decisions. Goal: who is here, what they hold, what is answered; method: events in, commands out, no clock."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec
import pytest

from kvshare import keys, planning
from kvshare.cluster_messages import (
    AskDirectory,
    AskPlan,
    Beat,
    Declare,
    Declared,
    Find,
    Found,
    Host,
    Hosted,
    Join,
    Leave,
    Left,
    NodeJoined,
    NodeLost,
    Plan,
    Publish,
    Report,
    Resync,
    Take,
    Taken,
    Welcome,
)
from kvshare.config import Settings
from kvshare.directory import Directory
from kvshare.directory_events import Broadcast, Close, Command, Connected, Disconnected, Heard, Lost, Send, Tell, Tick
from kvshare.finding import FIND_KEYS_MAX
from kvshare.fingerprints import ALL_PARTS
from kvshare.keys import Namespace
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import DISK, GroupPlan, Location, NodeDescription, RegionDescription, Stored
from kvshare.planning import RATES_SECONDS
from kvshare.runs import Keys, Run, Seen, keys_of, runs_of

FAMILY = b"f" * keys.FAMILY_BYTES
LENGTH = 4096
EPOCH = 7  # of nodes, unless said otherwise


def key(name: str) -> bytes:
    return keys.prefix(FAMILY) + name.encode().ljust(16, b".")


def stored(*names: str, slot: int = 0) -> list[Stored]:
    return [Stored(key(name), LENGTH, slot + i, 2, LENGTH) for i, name in enumerate(names)]


def packed(*names: str) -> list[Keys]:
    return keys_of([key(name) for name in names])


def seen(*names: str) -> Seen:
    """A whole chain."""
    (chain,) = keys_of([key(name) for name in names])
    return Seen(chain)


def described(name: str, epoch: int = EPOCH, host: str = "", endpoint: str = "10.0.0.1:1") -> NodeDescription:
    return NodeDescription(name, epoch, host or f"host of {name}", endpoint, ())


def namespace(**changes: Any) -> Namespace:
    fields: dict[str, Any] = {
        "weights": "w", "dtype": "bfloat16", "kv_dtype": "bfloat16", "block_size": 16, "page_bytes": 1, "layers": 1,
        "kv_heads": 1, "head_size": 64, "hash_algorithm": "sha256", "hash_seed": "0", "packing": "x",
    }  # fmt: skip
    return Namespace(**{**fields, **changes})


def join(node: NodeDescription, capable: bool = False) -> Join:
    return Join(PROTOCOL_VERSION, node, capable, 0, 1)


def leave(*names: str, ask: int = 5, seconds: float = 30.0) -> Leave:
    return Leave(ask, seconds, packed(*names), False)


class Play:
    """A directory and the stage for its events: connections are numbered as they come, time passes when told."""

    def __init__(self, **settings: Any) -> None:
        shard = {name: settings.pop(name) for name in ("shard", "shards") if name in settings}
        self.directory = Directory(Settings.load({"heartbeat_seconds": 5.0, **settings}, {}), epoch=99, **shard)
        self.now = 100.0
        self.connection = 0

    def connect(self) -> int:
        self.connection += 1
        assert self.directory.handle(Connected(self.connection), self.now) == []
        return self.connection

    def hear(self, connection: int, message: Message) -> list[Command]:
        commands = self.directory.handle(Heard(connection, message), self.now)
        assert not self.directory.check()
        return commands

    def join(self, name: str, publish: list[Stored] | None = None, **description: Any) -> int:
        """A node joins and tells what it holds, which is nothing unless said."""
        connection = self.connect()
        self.hear(connection, join(described(name, **description)))
        self.publish(connection, name, 1, publish or [], anew=ALL_PARTS)
        return connection

    def publish(
        self,
        connection: int,
        name: str,
        sequence: int,
        stored: list[Stored],
        removed: tuple[str, ...] = (),
        anew: int = 0,
        epoch: int = EPOCH,
        free_bytes: int = 0,
        more: bool = False,
    ) -> list[Command]:
        gone = packed(*removed)
        return self.hear(connection, Publish(name, epoch, sequence, anew, more, runs_of(stored), gone, free_bytes))

    def answer(self, connection: int, question: Message) -> Any:
        (command,) = self.hear(connection, question)
        assert isinstance(command, Send) and command.connection == connection
        return command.message

    def find(self, connection: int, *names: str) -> list[list[str]]:
        return [[where.node for where in places] for places in self.places(connection, *names)]

    def places(self, connection: int, *names: str) -> list[list[Location]]:
        found = self.answer(connection, Find(1, packed(*names)))
        assert isinstance(found, Found) and found.ask == 1
        return found.places.locations()

    def plan(self, connection: int, bytes_max: int = 10**6) -> Plan:
        made = self.answer(connection, AskPlan(1, FAMILY, keys.NO_TENANT, bytes_max, 10.0, False, {}))
        assert isinstance(made, Plan)
        return made


@pytest.fixture
def play() -> Play:
    return Play()


# --- who is here ------------------------------------------------------------------------------------------------------


def test_a_node_that_joins_is_welcomed_and_told_to_the_others(play: Play) -> None:
    a = play.join("a")
    b = play.connect()
    assert play.hear(b, join(described("b"))) == [
        Send(b, Welcome(99, [described("a")], [])),
        Broadcast((a,), NodeJoined(described("b"))),
        Send(b, Resync(ALL_PARTS)),
    ]


def test_a_changed_description_is_told_and_an_equal_one_is_not(play: Play) -> None:
    a, b = play.join("a"), play.join("b")
    changed = described("a", endpoint="10.0.0.9:9")
    assert play.hear(a, join(changed)) == [Broadcast((b,), NodeJoined(changed))]
    assert play.hear(a, join(changed)) == []


def test_a_closed_connection_is_a_lost_node_and_its_blocks_are_forgotten(play: Play) -> None:
    a, b = play.join("a", stored("x")), play.join("b")
    assert play.directory.handle(Disconnected(a), play.now) == [Broadcast((b,), NodeLost("a"))]
    assert play.find(b, "x") == [[]]


def test_a_node_that_its_supervisor_knows_dead_is_closed_and_forgotten(play: Play) -> None:
    a, b = play.join("a", stored("x")), play.join("b")
    close, told = play.directory.handle(Lost("a"), play.now)
    assert isinstance(close, Close) and close.connection == a
    assert told == Broadcast((b,), NodeLost("a"))
    assert play.find(b, "x") == [[]]
    assert play.directory.handle(Lost("a"), play.now) == []


def test_a_node_unheard_of_for_three_heartbeats_is_forgotten(play: Play) -> None:
    a, b = play.join("a", stored("x")), play.join("b")
    play.now += 10.0
    play.hear(b, Beat(1, b""))
    assert play.directory.next_deadline() == 115.0
    assert play.directory.handle(Tick(), 114.9) == []
    close, told = play.directory.handle(Tick(), 115.0)
    assert isinstance(close, Close) and close.connection == a and "15.0 s" in close.reason
    assert told == Broadcast((b,), NodeLost("a"))
    deadline = play.directory.next_deadline()
    assert deadline is not None and deadline < 116.0, "what it held has left memory behind"
    while deadline is not None and deadline < 116.0:
        assert play.directory.handle(Tick(), deadline) == []
        deadline = play.directory.next_deadline()
    assert deadline == 125.0


def test_any_message_is_a_sign_of_life(play: Play) -> None:
    a = play.join("a")
    play.now += 14.0
    play.find(a, "x")
    assert play.directory.next_deadline() == 129.0


def test_ticking_at_the_deadline_always_brings_it_forward() -> None:
    """A deadline that rounds must not make its caller tick for ever."""
    play = Play(heartbeat_seconds=0.1)
    play.now = 1e6 / 3
    play.join("a")
    deadline = play.directory.next_deadline()
    assert deadline is not None
    assert play.directory.handle(Tick(), deadline)
    assert play.directory.next_deadline() is None


def test_after_a_sleep_of_its_own_nobody_is_taken_for_dead_before_he_could_be_heard() -> None:
    """It was suspended for hours, or its clock jumped: what the living said lies unread in its sockets."""
    play = Play()
    a, b = play.join("a", stored("x")), play.join("b")
    play.now += 3600.0
    (told,) = play.directory.handle(Tick(), play.now)
    assert isinstance(told, Tell) and "3585 s" in told.text
    deadline = play.directory.next_deadline()
    assert deadline == play.now + 7.5, "time for one more heartbeat"
    play.hear(b, Beat(1, b""))
    assert play.find(b, "x") == [["a"]]
    play.now = deadline
    close, _ = play.directory.handle(Tick(), deadline)
    assert isinstance(close, Close) and close.connection == a
    assert play.find(b, "x") == [[]]


def test_a_tick_that_is_a_little_late_is_no_sleep(play: Play) -> None:
    a = play.join("a")
    (close,) = play.directory.handle(Tick(), play.now + 15.0 + 5.0)
    assert isinstance(close, Close) and close.connection == a


@pytest.mark.parametrize("back", [0.1, 3600.0, 1e9 / 3])
def test_where_the_clock_goes_back_time_goes_on_from_where_it_was(play: Play, back: float) -> None:
    a, b = play.join("a"), play.join("b")
    play.now += 10.0
    play.hear(b, Beat(1, b""))
    play.now -= back
    (told,) = play.hear(b, Beat(1, b""))
    assert isinstance(told, Tell) and "went back" in told.text
    assert play.hear(b, Beat(1, b"")) == [], "once for each time"
    deadline = play.directory.next_deadline()
    assert deadline is not None and abs(deadline - play.now - 5.0) < 1e-6, "in the clock's own time"
    play.now = deadline
    close, _ = play.directory.handle(Tick(), deadline)
    assert isinstance(close, Close) and close.connection == a
    assert play.directory.check() == []


def test_without_connections_there_is_nothing_to_wait_for(play: Play) -> None:
    assert play.directory.next_deadline() is None
    play.directory.handle(Disconnected(play.join("a")), play.now)
    assert play.directory.next_deadline() is None


def test_a_connection_that_never_says_anything_is_closed_too(play: Play) -> None:
    silent = play.connect()
    (close,) = play.directory.handle(Tick(), play.now + 15.0)
    assert isinstance(close, Close) and close.connection == silent


def test_a_restarted_node_takes_over_from_its_lingering_connection(play: Play) -> None:
    old, b = play.join("a", stored("x")), play.join("b")
    new = play.connect()
    close, welcome, told, asked = play.hear(new, join(described("a", epoch=EPOCH + 1)))
    assert isinstance(close, Close) and close.connection == old
    assert welcome == Send(new, Welcome(99, [described("b")], []))
    assert told == Broadcast((b,), NodeJoined(described("a", epoch=EPOCH + 1)))
    assert asked == Send(new, Resync(ALL_PARTS))
    assert play.find(b, "x") == [[]]
    assert play.directory.handle(Disconnected(old), play.now) == []
    assert play.hear(old, Beat(1, b"")) == []


def test_a_node_that_reconnects_before_its_old_connection_broke_takes_over_as_well(play: Play) -> None:
    old = play.join("a", stored("x"))
    new = play.connect()
    close, *_ = play.hear(new, join(described("a")))
    assert isinstance(close, Close) and close.connection == old


def test_of_two_nodes_with_one_name_the_older_start_is_turned_away(play: Play) -> None:
    play.join("a", stored("x"))
    older, b = play.connect(), play.join("b")
    (close,) = play.hear(older, join(described("a", epoch=EPOCH - 1)))
    assert isinstance(close, Close) and close.connection == older and "node_name" in close.reason
    assert play.find(b, "x") == [["a"]]


# --- who breaks the protocol ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Join(PROTOCOL_VERSION + 1, described("a"), False, 0, 1), "run one version"),
        (Beat(1, b""), "before it joined"),
        (Find(1, []), "before it joined"),
        (Publish("a", EPOCH, 1, ALL_PARTS, False, [], [], 0), "before it joined"),
    ],
)
def test_a_stranger_that_breaks_the_protocol_is_closed(play: Play, message: Message, words: str) -> None:
    connection = play.connect()
    (close,) = play.hear(connection, message)
    assert isinstance(close, Close) and close.connection == connection and words in close.reason


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (join(described("z")), "joined again as z"),
        (
            Join(PROTOCOL_VERSION, described("a"), False, 1, 2),
            "shard 1 of 2, it is shard 0 of 1: name all shards in their order",
        ),
        (Publish("b", EPOCH, 2, 0, False, [], [], 0), "publishes for b"),
        (Publish("a", EPOCH, 2, 0, False, runs_of([Stored(bytes(65), 1, 0, 2, 1)]), [], 0), "length"),
        (Publish("a", EPOCH, 2, 0, False, [], [Keys(bytes(keys.PREFIX_BYTES), 8, bytes(9))], 0), "length"),
        (Publish("a", EPOCH, 2, 0, False, runs_of([Stored(key("y"), 1, 0, 3, 1)]), [], 0), "odd"),
        (Publish("a", EPOCH, 2, 0, False, [Run(*packed("y"), 1, 1, 0, bytes(8), bytes(8))], [], 0), "malformed"),
        (Publish("a", EPOCH, 2, 0, False, runs_of([Stored(key("y"), 1, 0, 2, 1, 1 << 32)]), [], 0), "malformed"),
        (Publish("a", EPOCH, 2, -1, False, [], [], 0), "parts"),
        (Beat(1, bytes(8)), "digests of 8 bytes"),
        (Find(1, [Keys(b"short", 8, bytes(8))]), "length"),
        (Leave(1, 1.0, [Keys(bytes(keys.PREFIX_BYTES), 33, bytes(33))], False), "length"),
        (Report([msgspec.structs.replace(seen("x"), depths=bytes(3))]), "malformed"),
        (Report([Seen(Keys(bytes(keys.PREFIX_BYTES), 0, b""))]), "malformed"),
        (Welcome(1, [], []), "no message to a directory"),
    ],
)
def test_a_node_that_breaks_the_protocol_is_closed_and_told_as_lost(play: Play, message: Message, words: str) -> None:
    a, b = play.join("a", stored("x")), play.join("b", stored("y"))
    close, told = play.hear(a, message)
    assert isinstance(close, Close) and close.connection == a and words in close.reason
    assert told == Broadcast((b,), NodeLost("a"))
    assert play.find(b, "x") == [[]]


def test_who_only_asks_for_the_status_need_not_join(play: Play) -> None:
    play.join("a", stored("x", "y"))
    status = play.answer(play.connect(), AskDirectory(5))
    assert (status.ask, status.epoch, status.keys) == (5, 99, 2)
    assert status.nodes == [described("a")]
    assert status.counters["publishes"] == 1


# --- what they hold ---------------------------------------------------------------------------------------------------


def test_published_blocks_are_found_where_they_lie_and_removed_ones_are_not(play: Play) -> None:
    a, b = play.join("a", stored("x", "y", slot=3)), play.join("b")
    assert play.places(b, "x", "z", "y") == [[Location("a", LENGTH, 3, 2, LENGTH)], [], [Location("a", LENGTH, 4, 2, LENGTH)]]
    play.publish(a, "a", 2, stored("z"), removed=("x",))
    assert play.find(b, "x", "y", "z") == [[], ["a"], ["a"]]


def test_a_block_that_moved_is_found_in_its_new_slot(play: Play) -> None:
    a, b = play.join("a", stored("x", slot=1)), play.join("b")
    play.publish(a, "a", 2, stored("x", slot=9))
    assert play.places(b, "x") == [[Location("a", LENGTH, 9, 2, LENGTH)]]


def test_the_asking_node_is_no_answer_the_same_host_comes_first_and_then_the_freshest(play: Play) -> None:
    for name in ("far", "near", "fresh"):
        play.join(name, stored("x"), host="here" if name == "near" else "")
    asking = play.join("asking", stored("x"), host="here")
    assert play.find(asking, "x") == [["near", "fresh", "far"]]


def test_what_lies_on_a_disk_is_named_last_and_planned_only_where_no_arena_has_it(play: Play) -> None:
    on_disk = [Stored(key(name), LENGTH + 1, i, 2, LENGTH) for i, name in enumerate(("x", "y"))]
    region = RegionDescription("disk", LENGTH + 1, LENGTH, 9, "here", "", "", "10.0.0.1:1", DISK)
    arena = play.join("arena", stored("x"))
    disk = play.connect()
    play.hear(disk, join(NodeDescription("disk", EPOCH, "here", "10.0.0.1:1", (region,))))
    play.publish(disk, "disk", 1, on_disk, anew=ALL_PARTS)
    asking = play.join("asking", host="here")
    assert play.find(asking, "x", "y") == [["arena", "disk"], ["disk"]]
    play.hear(arena, Report([seen("x", "y")]))
    assert {item.key: item.location.node for item in play.plan(asking).items} == {key("x"): "arena", key("y"): "disk"}


def test_a_question_longer_than_the_limit_is_answered_up_to_there(play: Play) -> None:
    a = play.join("a")
    found = play.answer(a, Find(1, [*packed("x"), *packed(*["y"] * FIND_KEYS_MAX), *packed("z")]))
    assert len(found.places) == FIND_KEYS_MAX


@pytest.mark.parametrize("sequence", [1, 3], ids=["duplicate", "gap"])
def test_a_break_in_the_sequence_asks_for_everything_once_and_ignores_the_rest(play: Play, sequence: int) -> None:
    a, b = play.join("a", stored("x")), play.join("b")
    told, asked = play.publish(a, "a", sequence, stored("y"))
    assert isinstance(told, Tell) and "node a" in told.text
    assert asked == Send(a, Resync(ALL_PARTS))
    assert play.publish(a, "a", sequence + 1, stored("z")) == []
    assert play.find(b, "x", "y", "z") == [["a"], [], []]
    assert play.publish(a, "a", 50, stored("w"), anew=ALL_PARTS) == []
    assert play.publish(a, "a", 51, stored("v")) == []
    assert play.find(b, "x", "w", "v") == [[], ["a"], ["a"]]


def test_a_publish_of_another_epoch_asks_for_everything(play: Play) -> None:
    a, b = play.join("a", stored("x")), play.join("b")
    assert play.publish(a, "a", 2, stored("y"), epoch=EPOCH + 1)[1:] == [Send(a, Resync(ALL_PARTS))]
    assert play.find(b, "y") == [[]]


def test_an_epoch_that_changes_on_its_connection_voids_the_inventory(play: Play) -> None:
    a, b = play.join("a", stored("x")), play.join("b")
    new = described("a", epoch=EPOCH + 1)
    assert play.hear(a, join(new)) == [Broadcast((b,), NodeJoined(new)), Send(a, Resync(ALL_PARTS))]
    assert play.find(b, "x") == [[]]
    play.publish(a, "a", 2, stored("y"), anew=ALL_PARTS, epoch=EPOCH + 1)
    assert play.find(b, "y") == [["a"]]


def test_a_node_is_free_to_lie_about_generations_that_its_readers_compare(play: Play) -> None:
    """Its newest word holds, older generation or not, even of one slot: a lie costs a failed validation."""
    a, b = play.join("a", [Stored(key("x"), LENGTH, 3, 8, LENGTH)]), play.join("b")
    play.publish(a, "a", 2, [Stored(key("x"), LENGTH, 3, 6, LENGTH), Stored(key("y"), LENGTH, 3, 6, LENGTH)])
    assert play.places(b, "x", "y") == [[Location("a", LENGTH, 3, 6, LENGTH)]] * 2
    play.publish(a, "a", 3, [Stored(key("x"), LENGTH, 4, 2, LENGTH)] * 2, removed=("y", "unknown"))
    assert play.places(b, "x", "y") == [[Location("a", LENGTH, 4, 2, LENGTH)], []]


def test_a_full_directory_refuses_new_keys_and_says_so_once() -> None:
    play = Play(index_keys_max=2)
    a, b = play.join("a"), play.join("b")
    (told,) = play.publish(a, "a", 1, stored("x", "y", "z"), anew=ALL_PARTS)
    assert isinstance(told, Tell) and "index_keys_max" in told.text
    assert play.publish(a, "a", 2, stored("w")) == []
    assert play.find(b, "x", "y", "z", "w") == [["a"], ["a"], [], []]
    play.publish(a, "a", 3, stored("w"), removed=("x", "z"))
    assert play.find(b, "x", "w") == [[], ["a"]]
    assert play.directory.status().counters["refused"] == 2


def test_what_has_no_number_in_the_index_is_refused_and_said_and_the_rest_goes_on(play: Play) -> None:
    """A node that tells of ever more regions and lengths."""
    a, b = play.join("a"), play.join("b")
    lots = [Stored(key(f"r{i}"), i, 0, 2, i + 1) for i in range(3000)]
    (told,) = play.publish(a, "a", 2, lots)
    assert isinstance(told, Tell) and "of node a lie in slots or places beyond what an index can number" in told.text
    assert play.publish(a, "a", 3, lots) == []
    assert 0 < play.directory.status().counters["locations"] < 3000
    play.publish(b, "b", 2, stored("x"))
    assert play.find(a, "x") == [["b"]]
    assert play.find(b, "r0") == [["a"]]


def test_a_block_of_a_slot_that_no_region_has_is_refused(play: Play) -> None:
    a, b = play.join("a"), play.join("b")
    (told,) = play.publish(a, "a", 2, [Stored(key("x"), LENGTH, (1 << 32) - 1, 2, LENGTH), *stored("y")])
    assert isinstance(told, Tell)
    assert play.find(b, "x", "y") == [[], ["a"]]


def test_what_ends_is_told_with_its_end(play: Play) -> None:
    play.join("a", [Stored(key("x"), LENGTH, 3, 2, LENGTH, 77), *stored("y")])
    b = play.join("b")
    assert [[where.expires for where in places] for places in play.places(b, "x", "y")] == [[77], [0]]


# --- what is hot ------------------------------------------------------------------------------------------------------


def test_a_plan_names_hot_blocks_that_the_asking_node_lacks(play: Play) -> None:
    a = play.join("a", stored("1", "12", "123", "x"))
    b = play.join("b", stored("1"))
    play.hear(a, Report([seen("1", "12", "123"), seen("1", "12")]))
    made = play.plan(b)
    assert [(item.key, item.location.node) for item in made.items] == [(key("12"), "a"), (key("123"), "a")]
    assert made.present == 1
    assert [item.key for item in play.plan(b, bytes_max=LENGTH).items] == [key("12")]
    assert play.plan(a).items == []


@pytest.mark.parametrize("blocks", [(1, 2, 100), (3, 100), (100,)])
def test_a_plan_is_the_same_however_many_blocks_are_looked_at_first(
    play: Play, blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PLAN_BLOCKS", blocks)
    names = [f"{number}" for number in range(9)]
    a, b = play.join("a", stored(*names)), play.join("b", stored("0", "1", "2"))
    play.hear(a, Report([seen(*names)]))
    for room in range(10):
        made = play.plan(b, room * LENGTH)
        assert [item.key for item in made.items] == [key(name) for name in names[3 : 3 + room]]


def test_hot_blocks_of_several_groups_are_planned_whatever_their_order(play: Play) -> None:
    """Their keys have prefixes of their own, and come in turns."""
    chains = [[keys.prefix(FAMILY, group=group) + bytes([depth] * 32) for depth in range(5)] for group in range(3)]
    blocks = [Stored(each, LENGTH, i, 2, LENGTH) for i, each in enumerate(each for chain in chains for each in chain)]
    a, b = play.join("a", blocks), play.join("b", blocks[2:3])
    for chain in chains:
        play.hear(a, Report([Seen(*keys_of(chain))]))
    made = play.plan(b)
    assert {(item.key, item.location.slot) for item in made.items} == {
        (block.key, block.slot) for block in blocks if block is not blocks[2]
    }
    assert made.present == 1


def test_plans_made_one_after_another_spread_over_the_donors(play: Play) -> None:
    """A fleet that scales up asks at once: the second plan spares the donor of the first."""
    a, _ = play.join("a", stored("x")), play.join("b", stored("x"))
    play.hear(a, Report([seen("x")]))
    joiners = [play.join("c"), play.join("d")]
    assert sorted(play.plan(joiner).items[0].location.node for joiner in joiners) == ["a", "b"]


def test_a_donor_gives_as_much_as_anybody_found_that_it_can(play: Play) -> None:
    """Who has just begun has measured nobody. What cannot be a rate is none."""
    names = ["12345678"[: end + 1] for end in range(8)]
    a, _ = play.join("a", stored(*names)), play.join("b", stored(*names))
    play.hear(a, Report([seen(*names)]))
    old, new = play.join("old"), play.join("new")
    rates = {"a": 3.0 * LENGTH, "b": float(LENGTH), "nobody": 1.0}
    play.answer(old, AskPlan(1, FAMILY, keys.NO_TENANT, 0, 10.0, False, rates))
    play.answer(old, AskPlan(1, FAMILY, keys.NO_TENANT, 0, 10.0, False, {"a": -1.0, "b": math.nan}))
    assert Counter(item.location.node for item in play.plan(new).items) == {"a": 6, "b": 2}
    play.now += RATES_SECONDS + 60.0
    play.hear(a, Report([seen(*names)]))
    assert Counter(item.location.node for item in play.plan(new).items) == {"a": 4, "b": 4}


def test_a_donor_that_is_lost_or_cannot_be_reached_is_not_planned(play: Play) -> None:
    a = play.join("a", stored("x"))
    play.join("deaf", stored("x", "y"), endpoint="")
    c = play.join("c")
    play.hear(c, Report([seen("x"), seen("y")]))
    assert [(item.key, item.location.node) for item in play.plan(c).items] == [(key("x"), "a")]
    play.directory.handle(Disconnected(a), play.now)
    assert play.plan(c).items == []


def test_a_node_of_the_same_host_is_reached_without_an_endpoint(play: Play) -> None:
    play.join("deaf", stored("x"), endpoint="", host="here")
    c = play.join("c", host="here")
    play.hear(c, Report([seen("x")]))
    assert [item.location.node for item in play.plan(c).items] == ["deaf"]


def test_the_nearest_other_namespaces_are_told_and_equal_ones_are_not(play: Play) -> None:
    a = play.join("a")
    ours, near = namespace(label="ours"), namespace(block_size=32)
    far = namespace(weights="v", layers=2, kv_heads=2)
    farther = [namespace(weights=str(i), layers=3, kv_heads=3, head_size=3) for i in range(3)]
    assert play.answer(a, Declare(1, ours)) == Declared(1, [])
    for other in (*farther, far, near):
        play.hear(a, Declare(2, other))
    assert play.answer(a, Declare(3, msgspec.structs.replace(ours, label="again"))) == Declared(3, [near, far, farther[0]])


def test_the_namespaces_remembered_are_bounded(play: Play) -> None:
    a = play.join("a")
    first = namespace(block_size=32)
    play.hear(a, Declare(1, first))
    for i in range(300):
        play.hear(a, Declare(1, namespace(weights=f"other {i}", layers=2)))
    assert first not in play.answer(a, Declare(2, namespace())).others


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def grouping() -> Play:
    """A directory that makes groups of two, and a capable donor "a" that has hot blocks."""
    play = Play(warm_group_ranks=2, warm_gather_seconds=1.0)
    donor = play.join("a", stored("1", "12"))
    assert play.hear(donor, join(described("a"), True)) == []
    play.hear(donor, Report([seen("1", "12")]))
    return play


ASK = AskPlan(5, FAMILY, keys.NO_TENANT, 10**6, 10.0, True, {})
HOT = [key("1"), key("12")]


def sent(commands: list[Command]) -> list[tuple[int, Any]]:
    assert all(isinstance(command, Send) for command in commands)
    return [(command.connection, command.message) for command in commands if isinstance(command, Send)]


def asked_to_host(play: Play) -> tuple[int, int, Host]:
    """Two joiners and the question to the donor, which is connection 1."""
    b, c = play.join("b", []), play.join("c", [])
    assert play.hear(b, ASK) == []
    ((donor, host),) = sent(play.hear(c, ASK))
    assert donor == 1 and isinstance(host, Host)
    return b, c, host


def hosted(host: Host) -> Hosted:
    return Hosted(host.ask, GroupPlan(bytes(16), "10.0.0.1:2", host.ranks))


def singly(commands: list[Command]) -> list[int]:
    """Connections that were sent plans of their own, which name all that is hot."""
    for _, plan in sent(commands):
        assert isinstance(plan, Plan) and plan.ask == ASK.ask and plan.group is None
        assert [item.key for item in plan.items] == HOT
    return [connection for connection, _ in sent(commands)]


def test_joiners_that_ask_together_are_given_the_same_blocks_by_one_donor(grouping: Play) -> None:
    b, c, host = asked_to_host(grouping)
    assert host.ranks == 3 and [(item.key, item.location.node) for item in host.items] == [(name, "a") for name in HOT]
    plans = sent(grouping.hear(1, hosted(host)))
    assert [(connection, plan.ask, plan.items) for connection, plan in plans] == [(b, 5, host.items), (c, 5, host.items)]
    assert [plan.group.rank for _, plan in plans] == [1, 2]
    assert grouping.directory.status().counters["groups"] == 1


def test_a_joiner_that_is_alone_is_answered_when_it_has_waited(grouping: Play) -> None:
    b = grouping.join("b", [])
    assert grouping.hear(b, ASK) == []
    assert grouping.directory.next_deadline() == 101.0
    grouping.now = 101.0
    assert singly(grouping.directory.handle(Tick(), 101.0)) == [b]
    assert grouping.directory.next_deadline() == 115.0


def test_who_takes_no_part_or_finds_nothing_hot_does_not_wait(grouping: Play) -> None:
    b = grouping.join("b", [])
    assert singly(grouping.hear(b, msgspec.structs.replace(ASK, group=False))) == [b]
    ((_, plan),) = sent(grouping.hear(b, msgspec.structs.replace(ASK, family=b"g" * keys.FAMILY_BYTES)))
    assert plan == Plan(5, [], 0, None)


def test_without_the_setting_there_are_no_groups(play: Play) -> None:
    a, b = play.join("a", stored("1", "12")), play.join("b", [])
    play.hear(a, Report([seen("1", "12")]))
    assert singly(play.hear(b, ASK)) == [b]


@pytest.mark.parametrize("why", ["incapable", "without endpoint", "not there"])
def test_joiners_without_a_possible_donor_get_plans_of_their_own(grouping: Play, why: str) -> None:
    b, c = grouping.join("b", []), grouping.join("c", [])
    described_anew = described("a", endpoint="" if why == "without endpoint" else "10.0.0.1:1")
    if why == "not there":
        grouping.directory.handle(Disconnected(1), grouping.now)
    else:
        grouping.hear(1, join(described_anew, why != "incapable"))
    assert grouping.hear(b, ASK) == []
    plans = sent(grouping.hear(c, ASK))
    assert [(connection, plan.group) for connection, plan in plans] == [(b, None), (c, None)]
    assert all(bool(plan.items) == (why == "incapable") for _, plan in plans)


def test_a_donor_that_refuses_leaves_the_joiners_to_plans_of_their_own(grouping: Play) -> None:
    b, c, host = asked_to_host(grouping)
    assert singly(grouping.hear(1, Hosted(host.ask, None))) == [b, c]


def test_a_silent_donor_leaves_the_joiners_to_plans_of_their_own(grouping: Play) -> None:
    b, c, host = asked_to_host(grouping)
    deadline = grouping.directory.next_deadline()
    assert deadline is not None and 100.0 < deadline < 115.0
    grouping.now = deadline
    assert singly(grouping.directory.handle(Tick(), deadline)) == [b, c]
    assert grouping.hear(1, hosted(host)) == []


def test_a_lost_donor_leaves_the_joiners_to_plans_of_their_own(grouping: Play) -> None:
    grouping.join("d", stored("1", "12"))
    b, c, _ = asked_to_host(grouping)
    grouping.directory.handle(Disconnected(1), grouping.now)
    assert not grouping.directory.check()
    deadline = grouping.directory.next_deadline()
    assert deadline is not None and deadline <= grouping.now
    plans = grouping.directory.handle(Tick(), grouping.now)
    assert singly(plans) == [b, c]
    assert {item.location.node for _, plan in sent(plans) for item in plan.items} == {"d"}


def test_a_joiner_lost_before_the_group_is_made_leaves_the_other_to_a_plan_of_its_own(grouping: Play) -> None:
    b, c, host = asked_to_host(grouping)
    grouping.directory.handle(Disconnected(b), grouping.now)
    assert not grouping.directory.check()
    assert singly(grouping.hear(1, hosted(host))) == [c]
    assert grouping.directory.handle(Tick(), grouping.now) == []


def test_a_group_of_a_donor_that_joiners_must_share_counts_as_its_work_once(grouping: Play) -> None:
    _, _, host = asked_to_host(grouping)
    grouping.join("d", stored("1", "12"))
    grouping.hear(1, hosted(host))
    e = grouping.join("e", [])
    assert {item.location.node for item in grouping.plan(e).items} == {"d"}  # "a" is at work


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_what_a_leaving_node_alone_has_is_given_to_a_peer_with_room_and_told_when_it_is_there() -> None:
    play = Play()
    leaver, peer = play.join("a", stored("x", "y", "z")), play.join("b", stored("z"))
    play.publish(peer, "b", 2, [], free_bytes=10 * LENGTH)
    play.hear(leaver, Report([seen("y")]))
    (given,) = play.hear(leaver, leave("x", "y", "z"))
    assert isinstance(given, Send) and given.connection == peer and isinstance(given.message, Take)
    assert [item.key for item in given.message.items] == [key("y"), key("x")], "the hottest first; z is there already"
    play.publish(peer, "b", 3, stored("y", "x", slot=7), free_bytes=8 * LENGTH)
    assert play.hear(peer, Taken(given.message.ask)) == [Send(leaver, Left(5, 2, []))]
    assert play.find(play.join("c"), "x", "y", "z") == [["b"], ["b"], ["b"]]
    assert play.find(leaver, "x") == [["b"]]


def test_a_peer_without_room_an_engine_and_one_that_cannot_read_take_nothing() -> None:
    play = Play()
    leaver = play.join("a", stored("x"), endpoint="")
    play.publish(play.join("b", []), "b", 2, [])
    play.publish(play.join("c", []), "c", 2, [], free_bytes=10 * LENGTH)  # on another host: a serves nobody there
    assert play.hear(leaver, leave("x")) == [Send(leaver, Left(5, 0, [key("x")]))]


def test_a_leaving_node_gets_no_plan_and_two_of_them_do_not_count_on_each_other() -> None:
    play = Play()
    first, second = play.join("a", stored("x")), play.join("b", stored("x"))
    assert play.find(first, "x") == [["b"]]
    assert play.answer(first, leave("x", ask=1)) == Left(1, 0, [key("x")]), "nobody has room: not looked at"
    assert play.find(first, "x") == [["b"]]
    assert play.answer(second, leave("x", ask=1)) == Left(1, 0, [key("x")])
    assert play.find(first, "x") == [[]]
    play.hear(second, Report([seen("x")]))
    assert play.answer(first, AskPlan(2, FAMILY, keys.NO_TENANT, 1 << 30, 30.0, False, {})) == Plan(2, [], 0, None)
    assert play.find(play.join("c"), "x") == [["b", "a"]], "others are sent there as long as nobody else has it"


def test_what_a_leaving_node_holds_may_come_in_several_messages() -> None:
    play = Play()
    leaver = play.join("a", stored("x", "y", "z"))
    assert play.hear(leaver, Leave(5, 30.0, packed("z", "y"), True)) == []
    assert play.find(play.join("c"), "x") == [["a"]]
    assert play.hear(leaver, Leave(5, 30.0, packed("x"), False)) == [Send(leaver, Left(5, 0, [key(each) for each in "zyx"]))]


def test_a_leaving_node_that_goes_or_joins_again_is_one_that_stays() -> None:
    play = Play()
    leaver, peer = play.join("a", stored("x")), play.join("b", [])
    play.publish(peer, "b", 2, [], free_bytes=10 * LENGTH)
    play.hear(leaver, leave("x"))
    play.directory.handle(Disconnected(leaver), play.now)
    again = play.join("a", stored("x"))
    assert play.find(peer, "x") == [["a"]]
    assert play.hear(again, Beat(1, b"")) == [] and play.hear(peer, Taken(1)) == []


def test_the_time_of_a_leaving_node_is_one_of_the_directorys_deadlines() -> None:
    play = Play()
    leaver, peer = play.join("a", stored("x")), play.join("b", [])
    play.publish(peer, "b", 2, [], free_bytes=10 * LENGTH)
    play.hear(leaver, leave("x", seconds=2.0))
    assert play.directory.next_deadline() == play.now + 2.0
    play.now += 2.0
    assert play.directory.handle(Tick(), play.now) == [Send(leaver, Left(5, 0, [key("x")]))]
