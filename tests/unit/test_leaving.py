"""The directory's part of a hand-over. Goal: what only the leaving node has goes to peers with room, hottest first, whatever
they do; it ends in time and says what was not taken. Method: events in, commands out, no clock."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from kvshare import keys
from kvshare.cluster_messages import Leave, Left, Take
from kvshare.directory_events import Command, Send
from kvshare.index import CompactIndex
from kvshare.leaving import (
    ANSWER_SECONDS,
    LEAVE_KEYS_MAX,
    LOOKED_AT_MAX,
    SHARE_BLOCKS_MAX,
    SHARE_BYTES,
    SHARE_SECONDS,
    SHARES_MAX,
    TRIES_MAX,
    Leavings,
    Taker,
)
from kvshare.places import Stored
from kvshare.runs import keys_of, runs_of

LENGTH = 1 << 20
IN_A_SHARE = SHARE_BYTES // LENGTH
PREFIX = keys.prefix(b"l" * keys.FAMILY_BYTES)


def key(number: int) -> bytes:
    return PREFIX + number.to_bytes(8, "big")


class Play:
    """Leavings, an index, and peers whose answers the test gives. Connections are numbered 1 (a), 2 (b) ..."""

    def __init__(self, **rooms: int) -> None:
        self.rooms = rooms  # by name, in blocks
        self.barred: set[tuple[str, bytes]] = set()
        self.index = CompactIndex(1_000_000)
        self.held: dict[str, dict[int, None]] = {}  # by name, as they came
        self.leavings = Leavings(
            self.index, lambda name: name in self.rooms, self.takers, lambda name, key: (name, key) not in self.barred
        )
        self.now = 10.0
        self.generation = 0

    def takers(self, leaving: str) -> list[Taker]:
        return [Taker(name, ord(name) - 96, room * LENGTH) for name, room in self.rooms.items() if name != leaving]

    def hold(self, name: str, numbers: Sequence[int] | range) -> None:
        blocks = []
        for number in numbers:
            self.generation += 2
            blocks.append(Stored(key(number), LENGTH, number, self.generation, LENGTH))
        assert self.index.add(name, runs_of(blocks)) == 0
        self.held.setdefault(name, {}).update((number, None) for number in numbers)
        if name in self.rooms:
            self.rooms[name] -= len(blocks)

    def check(self, commands: list[Command]) -> list[Command]:
        assert self.leavings.check() == []
        return commands

    def leave(self, name: str, hottest: Iterable[int] = (), seconds: float = 100.0) -> list[Command]:
        """It tells what it holds, ``hottest`` first."""
        told = [key(number) for number in dict.fromkeys([*hottest, *self.held[name]])]
        return self.check(self.leavings.begin(name, ord(name) - 96, Leave(7, seconds, [], False), told, self.now))

    def where(self, number: int) -> set[str]:
        return {place.node for place in self.index.locate([key(number)], "", 9)[0]}

    def take(self, command: Command, only: Iterable[int] | None = None) -> list[Command]:
        """The taker of this command publishes (``only``) its blocks, and answers."""
        name, message = takes([command])[0]
        numbers = [int.from_bytes(keys.hash_of(item.key), "big") for item in message.items]
        self.hold(name, [number for number in numbers if only is None or number in only])
        return self.check(self.leavings.taken(name, message.ask, self.now))

    def tick(self, seconds: float = 0.0) -> list[Command]:
        self.now += seconds
        return self.check(self.leavings.tick(self.now))


def takes(commands: list[Command]) -> list[tuple[str, Take]]:
    return [
        (chr(96 + each.connection), each.message)
        for each in commands
        if isinstance(each, Send) and isinstance(each.message, Take)
    ]


def given(commands: list[Command]) -> dict[str, list[int]]:
    """Blocks by taker, in order."""
    found: dict[str, list[int]] = {}
    for name, message in takes(commands):
        found.setdefault(name, []).extend(int.from_bytes(keys.hash_of(item.key), "big") for item in message.items)
    return found


def left(commands: list[Command]) -> tuple[int, list[int]]:
    """The last word: how many moved, and what was not taken."""
    (command,) = commands
    assert isinstance(command, Send) and isinstance(command.message, Left) and command.message.ask == 7
    return command.message.moved, [int.from_bytes(keys.hash_of(each), "big") for each in command.message.hottest]


def test_the_hottest_go_first_then_the_others_as_they_came() -> None:
    play = Play(a=0, b=100)
    play.hold("a", range(10))
    commands = play.leave("a", hottest=[7, 3])
    assert given(commands) == {"b": [7, 3, 0, 1, 2, 4, 5, 6, 8, 9]}
    assert all(item.location.node == "a" for _, message in takes(commands) for item in message.items)
    assert left(play.take(commands[0])) == (10, [])


def test_what_a_node_that_stays_has_is_not_moved_but_what_only_an_engine_has_is() -> None:
    play = Play(a=0, b=100, c=100)
    play.hold("a", range(4))
    play.hold("c", [0])
    play.hold("c/engine", [1])  # no node: its cache may give the block up at any time
    play.hold("a/engine", [2])
    assert given(play.leave("a")) == {"c": [1, 2, 3]} or given(play.leave("a")) == {"b": [1, 2, 3]}


def test_nothing_is_left_to_do_where_all_is_elsewhere_or_nobody_has_room() -> None:
    play = Play(a=0, b=100)
    play.hold("a", range(3))
    play.hold("b", range(3))
    assert left(play.leave("a")) == (0, [])
    play = Play(a=0, b=0)
    play.hold("a", range(3))
    assert left(play.leave("a", hottest=[2])) == (0, [2, 0, 1])
    play = Play(a=0)
    play.hold("a", range(3))
    assert left(play.leave("a")) == (0, [0, 1, 2])


def test_no_taker_is_given_more_than_its_room() -> None:
    play = Play(a=0, b=5, c=3)
    play.hold("a", range(10))
    commands = play.leave("a")
    assert given(commands) == {"b": [0, 1, 2, 3, 4], "c": [5, 6, 7]}
    assert play.take(commands[0]) == []
    assert left(play.take(commands[1])) == (8, [8, 9])


def test_shares_are_bounded_and_so_are_those_under_way() -> None:
    play = Play(a=0, b=1000, c=1000)
    play.hold("a", range(10 * IN_A_SHARE))
    commands = play.leave("a")
    assert [(name, len(message.items)) for name, message in takes(commands)].count(("b", IN_A_SHARE)) == SHARES_MAX
    assert len(commands) == 2 * SHARES_MAX
    assert all(message.seconds == SHARE_SECONDS for _, message in takes(commands))
    following = play.take(commands[0])
    assert len(following) == 1 and given(following) != given(commands[:1])
    small = Play(a=0, b=10**6)
    small.index.add("a", runs_of(Stored(key(number), 1, number, 2, 1) for number in range(2 * SHARE_BLOCKS_MAX)))
    small.held["a"] = dict.fromkeys(range(2 * SHARE_BLOCKS_MAX))
    assert [len(message.items) for _, message in takes(small.leave("a"))] == [SHARE_BLOCKS_MAX, SHARE_BLOCKS_MAX]


def test_what_a_taker_did_not_take_goes_to_another_and_not_for_ever() -> None:
    play = Play(a=0, b=100, c=100)
    play.hold("a", range(4))
    commands = play.leave("a")
    (first,) = given(commands)
    for turn in range(TRIES_MAX):
        commands = play.take(commands[0], only=[turn])  # takers that took something are asked again
    assert left(commands) == (3, [3])
    assert first in "bc"


def test_a_taker_that_took_nothing_is_not_asked_again() -> None:
    play = Play(a=0, b=100, c=50)
    play.hold("a", range(3))
    commands = play.leave("a")
    assert given(commands) == {"b": [0, 1, 2]}
    again = play.take(commands[0], only=[])
    assert given(again) == {"c": [0, 1, 2]}
    assert left(play.take(again[0], only=[])) == (0, [0, 1, 2])


def test_a_silent_taker_loses_its_share_to_another_in_time() -> None:
    play = Play(a=0, b=100, c=50)
    play.hold("a", range(3))
    commands = play.leave("a")
    assert min(play.leavings.deadlines()) == play.now + SHARE_SECONDS + ANSWER_SECONDS
    assert play.tick(SHARE_SECONDS) == []
    again = play.tick(ANSWER_SECONDS)
    assert given(again) == {"c": [0, 1, 2]}
    assert play.take(commands[0]) == [], "it answers at last: what it has is there, nobody waits for it"
    assert left(play.take(again[0], only=[])) == (3, [])


def test_a_dead_taker_loses_its_share_to_another_at_once() -> None:
    play = Play(a=0, b=100, c=50)
    play.hold("a", range(3))
    play.leave("a")
    del play.rooms["b"]
    play.leavings.lose("b", play.now)
    assert min(play.leavings.deadlines()) <= play.now
    assert given(play.tick()) == {"c": [0, 1, 2]}


def test_the_deadline_ends_it_whatever_is_under_way() -> None:
    play = Play(a=0, b=100)
    play.hold("a", range(5))
    commands = play.leave("a", seconds=2.0)
    assert takes(commands)[0][1].seconds == 2.0
    play.hold("b", [1])  # published, while the rest of the share is on its way
    assert left(play.tick(2.0)) == (1, [0, 2, 3, 4])
    assert list(play.leavings.deadlines()) == []
    assert play.take(commands[0]) == []


def test_a_block_that_the_leaving_node_has_no_more_is_not_asked_for() -> None:
    play = Play(a=0, b=100)
    play.hold("a", range(SHARES_MAX * IN_A_SHARE + 2))
    commands = play.leave("a")
    gone, there = SHARES_MAX * IN_A_SHARE, SHARES_MAX * IN_A_SHARE + 1
    play.index.remove("a", keys_of([key(gone)]))
    following = play.take(commands[0])
    assert given(following) == {"b": [there]}
    assert play.take(commands[1]) == []
    assert left(play.take(following[0])) == (there, [gone]), "the directory does not know of it: its node knows better"


def test_who_may_not_hold_a_block_is_not_given_it() -> None:
    play = Play(a=0, b=100, c=50)
    play.hold("a", range(3))
    play.barred = {("b", key(1)), ("b", key(2)), ("c", key(2))}
    commands = play.leave("a")
    assert given(commands) == {"b": [0], "c": [1]}
    play.take(commands[0])
    assert left(play.take(commands[1])) == (2, [2])


def test_two_that_leave_do_not_count_on_each_other_and_move_a_block_once() -> None:
    play = Play(a=0, b=0, c=100)
    play.hold("a", range(3))
    play.hold("b", range(3))
    assert left(play.leave("a")) == (0, []), "b has it all, and stays as far as anybody knows"
    commands = play.leave("b")
    assert given(commands) == {"c": [0, 1, 2]}
    assert play.leave("a") == [], "asks again: the blocks are on their way"
    assert min(play.leavings.deadlines()) > play.now
    assert left(play.take(commands[0])) == (3, [])
    assert left(play.tick(1.0)) == (0, [])


def test_a_node_leaves_with_its_engines() -> None:
    play = Play(a=0, b=100)
    play.hold("a", [0, 1])
    play.hold("a/engine", [0, 1])
    play.hold("b", [0])
    assert not play.leavings.leaves_with("a")
    play.leave("a")
    assert [name for name in ("a", "a/engine", "b", "b/a") if play.leavings.leaves_with(name)] == ["a", "a/engine"]
    play.leavings.lose("a", play.now)
    assert "a" not in play.leavings and not play.leavings.leaves_with("a/engine")
    assert list(play.leavings.deadlines()) == []


def test_a_node_may_say_in_several_messages_what_it_holds() -> None:
    leavings = Play(a=0).leavings
    numbered = [key(number) for number in range(5)]
    assert leavings.told("a", Leave(1, 1.0, keys_of(numbered[:2]), True)) is None
    assert leavings.told("b", Leave(1, 1.0, keys_of(numbered[4:]), True)) is None
    assert leavings.told("a", Leave(1, 1.0, keys_of(numbered[1:4]), False)) == numbered[:4], "each once, in its order"
    assert leavings.told("b", Leave(2, 1.0, keys_of(numbered[:1]), False)) == numbered[:1], "a new question forgets the old one"
    assert leavings.told("b", Leave(1, 1.0, [], True)) is None
    leavings.lose("b", 0.0)
    assert leavings.told("b", Leave(1, 1.0, keys_of(numbered[:1]), False)) == numbered[:1]


def test_no_more_is_looked_at_than_can_be_moved() -> None:
    leavings = Play(a=0).leavings
    many = keys_of(key(number) for number in range(LEAVE_KEYS_MAX // 2))
    more = keys_of(key(number) for number in range(LEAVE_KEYS_MAX // 2, LEAVE_KEYS_MAX + 9))
    assert leavings.told("a", Leave(1, 1.0, many, True)) is None
    told = leavings.told("a", Leave(1, 1.0, more, False))
    assert told is not None and len(told) == LEAVE_KEYS_MAX and told[-1] == key(LEAVE_KEYS_MAX - 1)


def test_a_long_inventory_is_looked_at_piece_by_piece() -> None:
    play = Play(a=0, b=10**6)
    count = LOOKED_AT_MAX + 10
    play.hold("a", range(count))
    play.hold("b", range(LOOKED_AT_MAX + 5))
    assert play.leave("a") == []
    deadline = min(play.leavings.deadlines())
    assert play.now < deadline < play.now + 1.0
    assert given(play.tick(1.0)) == {"b": list(range(LOOKED_AT_MAX + 5, count))}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_takers_do_everything_is_taken_or_said_and_it_ends(seed: int) -> None:
    chance = random.Random(seed)
    play = Play(a=0, **{name: chance.randrange(200) for name in "bcdef"})
    play.hold("a", range(400))
    for name in "bcdef":
        play.hold(name, chance.sample(range(400), min(play.rooms[name], 40)))
    orphans: set[int] = set()  # what a node had that died: asked for again by a second `Leave`
    waiting = play.leave("a", hottest=chance.sample(range(400), 100), seconds=60.0)
    for _ in range(10_000):
        if any(isinstance(each, Send) and isinstance(each.message, Left) for each in waiting):
            break
        command = waiting.pop(chance.randrange(len(waiting))) if waiting else None
        fate = chance.random()
        if command is None or fate < 0.1:
            waiting += play.tick(chance.uniform(0.0, 8.0))  # it may be silent for ever
        elif fate < 0.15 and takes([command])[0][0] in play.rooms:
            name = takes([command])[0][0]
            orphans |= play.held[name].keys()
            play.index.drop(name)
            del play.rooms[name]
            play.leavings.lose(name, play.now)
            waiting = [each for each in waiting if takes([each])[0][0] != name] + play.tick()
        elif takes([command])[0][0] in play.rooms:
            share = {int.from_bytes(keys.hash_of(item.key), "big") for item in takes([command])[0][1].items}
            waiting += play.take(command, only=share if fate < 0.8 else chance.sample(sorted(share), len(share) // 2))
        assert all(room >= 0 for name, room in play.rooms.items() if name != "a")
    last = [each for each in waiting if isinstance(each, Send) and isinstance(each.message, Left)]
    assert len(last) == 1
    _, untaken = left(last)
    kept = {number for number in range(400) if play.where(number) & play.rooms.keys() - {"a"}}
    assert kept | set(untaken) | orphans == set(range(400))
