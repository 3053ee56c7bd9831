"""What nodes hold, as they tell it. Goal: in sequence, a few at a time, repaired where it differs, and never in a loop. Method:
events in, commands out, no clock."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import pytest

from kvshare import keys
from kvshare.cluster_messages import Beat, Publish, Resync
from kvshare.directory_events import Command, Send, Tell
from kvshare.fingerprints import ALL_PARTS, PARTS, digests_of, hashes_of, part_of
from kvshare.index import CompactIndex
from kvshare.inventories import (
    GAP_SECONDS,
    INVENTORIES_MAX,
    INVENTORY_SECONDS,
    REPAIR_SECONDS,
    TURN_SECONDS_MAX,
    Inventories,
)
from kvshare.members import Misbehaved, Peer
from kvshare.places import NodeDescription, Stored
from kvshare.runs import keys_of, runs_of

PREFIX = keys.prefix(b"i" * keys.FAMILY_BYTES)
SEED = 5


def key(number: int) -> bytes:
    return PREFIX + number.to_bytes(8, "big")


def stored(numbers: Iterable[int]) -> list[Stored]:
    return [Stored(key(number), 1, number, 2, 1) for number in numbers]


def digests(numbers: Iterable[int]) -> bytes:
    return digests_of(runs_of(stored(numbers)), SEED).tobytes()


class Play:
    def __init__(self, keys_max: int = 10_000) -> None:
        self.index = CompactIndex(keys_max, SEED)
        self.counters: Counter[str] = Counter()
        self.inventories = Inventories(self.index, self.counters, keys_max)
        self.now = 50.0
        self.numbers = itertools.count(1)

    def join(self, count: int = 1) -> tuple[list[Peer], list[Command]]:
        """Nodes named by their connection."""
        peers, commands = [], list[Command]()
        for _ in range(count):
            peer = Peer(next(self.numbers), self.now)
            peer.description = NodeDescription(str(peer.connection), 1, "", "", ())
            peers.append(peer)
            commands += self.checked(self.inventories.want(peer, ALL_PARTS, self.now))
        return peers, commands

    def node(self, numbers: Iterable[int]) -> Peer:
        """One that has told what it holds, with sequence 1."""
        (peer,), _ = self.join()
        assert self.publish(peer, 1, numbers, anew=ALL_PARTS) == []
        return peer

    def publish(
        self,
        peer: Peer,
        sequence: int,
        numbers: Iterable[int] = (),
        removed: Iterable[int] = (),
        anew: int = 0,
        more: bool = False,
        epoch: int = 1,
    ) -> list[Command]:
        runs, gone = runs_of(stored(numbers)), keys_of(map(key, removed))
        message = Publish(str(peer.connection), epoch, sequence, anew, more, runs, gone, 0)
        return self.checked(self.inventories.publish(peer, message, self.now))

    def beat(self, peer: Peer, sequence: int, numbers: Iterable[int] | None = None) -> list[Command]:
        """It says that it holds these; None: it does not say."""
        return self.checked(self.inventories.beat(peer, Beat(sequence, b"" if numbers is None else digests(numbers)), self.now))

    def tick(self, seconds: float = 0.0) -> list[Command]:
        self.now += seconds
        return self.checked(self.inventories.tick(self.now))

    def checked(self, commands: list[Command]) -> list[Command]:
        assert self.inventories.check() == [] and self.index.check() == []
        return commands

    def holds(self, peer: Peer, *numbers: int) -> bool:
        return bool(self.index.holds(str(peer.connection), keys_of(map(key, numbers))).all())


def asked(commands: list[Command]) -> list[tuple[int, int]]:
    """Who is asked for which parts; lines for the log are passed over."""
    return [
        (each.connection, each.message.parts)
        for each in commands
        if isinstance(each, Send) and isinstance(each.message, Resync)
    ]


def said(commands: list[Command]) -> list[str]:
    return [each.text for each in commands if isinstance(each, Tell)]


def everything(*peers: Peer) -> list[tuple[int, int]]:
    return [(peer.connection, ALL_PARTS) for peer in peers]


# --- turns ------------------------------------------------------------------------------------------------------------


def test_a_hundred_that_come_at_once_are_heard_a_few_at_a_time_first_come_first_served() -> None:
    play = Play()
    peers, commands = play.join(100)
    assert asked(commands) == everything(*peers[:INVENTORIES_MAX])
    assert play.inventories.waiting == 100 - INVENTORIES_MAX
    heard = list(peers[:INVENTORIES_MAX])
    while len(heard) < 100:
        number = len(heard) - INVENTORIES_MAX
        peer = heard[number]
        assert play.publish(peer, 1, [number], anew=ALL_PARTS, more=True) == []
        assert play.publish(peer, 2, [number + 1000], more=True) == [], "there is more"
        commands = play.publish(peer, 3, [])
        assert asked(commands) == everything(peers[len(heard)]), "the next one's turn"
        heard.append(peers[len(heard)])
    assert play.inventories.waiting == 0 and play.counters["resyncs"] == 100


def test_a_clock_may_begin_anywhere() -> None:
    play = Play()
    play.now = -1e6
    peer = play.node([1])
    assert asked(play.publish(peer, 3)) == everything(peer)


def test_the_turn_of_one_that_is_gone_is_the_next_ones() -> None:
    play = Play()
    peers, _ = play.join(INVENTORIES_MAX + 3)
    assert play.inventories.leave(peers[-1], play.now) == [], "it was not its turn"
    assert asked(play.checked(play.inventories.leave(peers[0], play.now))) == everything(peers[INVENTORIES_MAX])
    play.publish(peers[1], 1, [5], anew=ALL_PARTS, more=True)
    assert asked(play.checked(play.inventories.leave(peers[1], play.now))) == everything(peers[INVENTORIES_MAX + 1])
    assert not play.holds(peers[1], 5)


def test_one_that_does_not_use_its_turn_gets_another_behind_all_others() -> None:
    play = Play()
    peers, _ = play.join(INVENTORIES_MAX + 1)
    assert min(play.inventories.deadlines()) == play.now + INVENTORY_SECONDS
    assert play.tick(INVENTORY_SECONDS / 2) == []
    for peer in peers[1:INVENTORIES_MAX]:
        play.publish(peer, 1, [], anew=ALL_PARTS, more=True)
    assert asked(play.tick(INVENTORY_SECONDS / 2)) == everything(peers[INVENTORIES_MAX])
    assert asked(play.publish(peers[1], 2)) == everything(peers[0])
    assert asked(play.tick(INVENTORY_SECONDS)) != [], "and so on, as long as it lives"


def test_one_whose_words_stop_in_between_may_go_on_later() -> None:
    play = Play()
    peers, _ = play.join(INVENTORIES_MAX + 1)
    play.publish(peers[0], 1, [1], anew=ALL_PARTS, more=True)
    play.now += INVENTORY_SECONDS / 2
    for peer in peers[1:INVENTORIES_MAX]:
        play.publish(peer, 1, [], anew=ALL_PARTS, more=True)
    assert asked(play.tick(INVENTORY_SECONDS / 2)) == everything(peers[INVENTORIES_MAX])
    assert play.publish(peers[0], 2, [2]) == [], "it takes nobody's turn"
    assert play.holds(peers[0], 1, 2)


def test_a_turn_does_not_last_for_ever_however_much_there_is() -> None:
    play = Play()
    peers, _ = play.join(INVENTORIES_MAX + 1)
    play.publish(peers[0], 1, [], anew=ALL_PARTS, more=True)
    end = play.now + TURN_SECONDS_MAX
    for peer in peers[1:INVENTORIES_MAX]:
        play.publish(peer, 1, [], anew=ALL_PARTS, more=True)
    for sequence in itertools.count(2):
        assert play.now < end
        play.now = min(play.now + INVENTORY_SECONDS / 2, end)
        commands = play.tick()
        if commands:
            break
        for peer in peers[:INVENTORIES_MAX]:
            play.publish(peer, sequence, more=True)
    assert asked(commands) == everything(peers[INVENTORIES_MAX]) and play.now == end


def test_before_its_turn_nothing_that_a_node_tells_is_taken_unless_it_is_everything() -> None:
    play = Play()
    peers, _ = play.join(INVENTORIES_MAX + 2)
    early, waiting = peers[-2:]
    assert play.publish(early, 1, [7]) == [] and not play.holds(early, 7)
    assert play.publish(early, 2, [8], anew=ALL_PARTS, more=True) == []
    assert play.publish(early, 3, [9]) == [] and play.holds(early, 8, 9)
    assert play.inventories.waiting == 1
    assert asked(play.publish(peers[0], 1, [], anew=ALL_PARTS)) == everything(waiting)


# --- sequence ---------------------------------------------------------------------------------------------------------


def test_what_was_known_stays_until_a_new_inventory_replaces_it() -> None:
    play = Play()
    peer = play.node([1, 2])
    commands = play.publish(peer, 3, [3])
    assert asked(commands) == everything(peer) and len(said(commands)) == 1
    assert play.publish(peer, 4, [4]) == [] and play.holds(peer, 1, 2)
    assert play.publish(peer, 9, [5], anew=ALL_PARTS, more=True) == []
    assert play.publish(peer, 10, [6]) == []
    assert play.holds(peer, 5, 6) and play.index.locations() == 2


def test_a_gap_within_an_inventory_begins_it_again() -> None:
    play = Play()
    (peer,), _ = play.join()
    play.publish(peer, 1, [1], anew=ALL_PARTS, more=True)
    assert asked(play.publish(peer, 3, [3], more=True)) == everything(peer)
    assert play.publish(peer, 4, [4], more=True) == [] and play.holds(peer, 1)
    play.publish(peer, 5, [1], anew=ALL_PARTS, more=True)
    assert play.publish(peer, 6, [2, 3]) == [] and play.holds(peer, 1, 2, 3)


def test_a_last_word_that_got_lost_shows_in_the_next_heartbeat() -> None:
    play = Play()
    peer = play.node([1])
    assert play.beat(peer, 1) == []
    commands = play.beat(peer, 2)
    assert asked(commands) == everything(peer) and len(said(commands)) == 1
    assert play.beat(peer, 2) == [], "it has been asked"


def test_what_is_removed_and_stored_in_one_message_is_there_afterwards() -> None:
    play = Play()
    peer = play.node([1, 2])
    play.publish(peer, 2, [1], removed=[1, 2, 3])
    assert play.holds(peer, 1) and play.index.locations() == 1


def test_one_whose_words_get_lost_again_and_again_is_asked_ever_more_seldom() -> None:
    play = Play()
    peer, other = play.node([1]), play.node([])
    moments, sequence = [], 1
    for _ in range(300):
        sequence += 2
        commands = play.publish(peer, sequence)
        while not asked(commands):
            deadline = min(play.inventories.deadlines())
            assert deadline > play.now
            commands = play.tick(deadline - play.now)
        moments.append(play.now)
        assert asked(commands) == everything(peer)
        sequence += 1
        play.publish(peer, sequence, [sequence], anew=ALL_PARTS)
        assert play.holds(peer, sequence), "what it tells in its turn is taken all the same"
    pauses = [after - before for before, after in itertools.pairwise(moments)]
    first, longest = GAP_SECONDS
    assert pauses[:3] == [first, 2 * first, 4 * first] and set(pauses[6:]) == {longest}
    assert asked(play.publish(other, 3)) == everything(other), "others are not concerned"
    play.now += 2 * longest + 1
    assert asked(play.publish(peer, sequence + 2)) == everything(peer)


@pytest.mark.parametrize("count", [8, 8 * PARTS - 8, 8 * PARTS + 1])
def test_digests_of_another_length_are_no_digests(count: int) -> None:
    play = Play()
    with pytest.raises(Misbehaved, match="digests"):
        play.inventories.beat(play.node([]), Beat(1, bytes(count)), play.now)


# --- differences ------------------------------------------------------------------------------------------------------


def parts_of(*numbers: int) -> int:
    hashes = hashes_of(keys_of(map(key, numbers)), SEED)
    return sum(1 << part for part in set(part_of(hashes).tolist()))


def test_equal_inventories_are_left_alone_and_of_others_only_what_differs_is_told_anew() -> None:
    play = Play()
    peer = play.node(range(500))
    assert play.beat(peer, 1, range(500)) == []
    lost, unknown = 7, 1000
    play.index.remove(str(peer.connection), keys_of([key(lost)]))
    play.index.add(str(peer.connection), runs_of(stored([unknown])))
    commands = play.beat(peer, 1, range(500))
    parts = parts_of(lost, unknown)
    assert asked(commands) == [(peer.connection, parts)] and parts != ALL_PARTS
    assert len(said(commands)) == 1 and play.counters["drift"] == 1
    assert play.beat(peer, 1, range(500)) == [], "it has been asked"
    wanted = [number for number in range(500) if parts_of(number) & parts]
    assert play.publish(peer, 2, [501]) == [], "something else that was on its way"
    assert play.publish(peer, 3, wanted[:3], anew=parts, more=True) == []
    assert play.publish(peer, 4, wanted[3:]) == []
    assert play.holds(peer, *range(500), 501) and play.index.locations() == 501
    play.now += REPAIR_SECONDS[1]
    assert play.beat(peer, 4, [*range(500), 501]) == []


def test_one_that_always_differs_is_asked_ever_more_seldom() -> None:
    play = Play()
    peer = play.node([1])
    moments = []
    for sequence in range(1, 4000):
        commands = play.beat(peer, sequence, [1, 2])
        if commands:
            moments.append(play.now)
        play.publish(peer, sequence + 1, anew=asked(commands)[0][1] if commands else 0)
        play.now += 1.0
    pauses = [after - before for before, after in itertools.pairwise(moments)]
    first, longest = REPAIR_SECONDS
    assert pauses[:3] == [first, 2 * first, 4 * first] and pauses[-1] == longest
    play.index.add(str(peer.connection), runs_of(stored([1])))
    play.now += longest
    assert play.beat(peer, 4000, [1]) == []
    assert asked(play.beat(peer, 4000, [2])) != [], "it was right in between"
    play.publish(peer, 4001, [1], anew=ALL_PARTS)
    assert play.beat(peer, 4001, [2]) == []
    play.now += first
    assert asked(play.beat(peer, 4001, [2])) != []


def test_many_that_differ_take_their_turns_as_well() -> None:
    play = Play()
    peers = [play.node([number]) for number in range(INVENTORIES_MAX + 2)]
    commands = [command for peer in peers for command in play.beat(peer, 1, [77])]
    assert [connection for connection, _ in asked(commands)] == [peer.connection for peer in peers[:INVENTORIES_MAX]]
    assert play.inventories.waiting == 2
    assert [connection for connection, _ in asked(play.tick(INVENTORY_SECONDS))] == [peer.connection for peer in peers[-2:]]


def test_whose_blocks_found_no_room_is_not_compared() -> None:
    play = Play(keys_max=2)
    (peer,), _ = play.join()
    (told,) = said(play.publish(peer, 1, range(3), anew=ALL_PARTS))
    assert "index_keys_max" in told and "node 1" in told
    assert play.beat(peer, 1, range(3)) == []
    assert play.publish(peer, 2, [4]) == [], "said once"
    assert play.counters["refused"] == 2
    play.publish(peer, 3, [], removed=range(4))
    play.publish(peer, 4, [1], anew=ALL_PARTS)
    assert asked(play.beat(peer, 4, [2])) != [], "a new inventory that found room is compared"


# --- the dead ---------------------------------------------------------------------------------------------------------


def test_what_the_dead_held_is_gone_at_once_and_its_memory_comes_back_with_ticks() -> None:
    play = Play()
    peer = play.node(range(5000))
    play.inventories.leave(peer, play.now)
    assert play.index.locations() == 0 and not play.holds(peer, 1)
    for _ in range(10_000):
        deadline = min(play.inventories.deadlines(), default=None)
        if deadline is None:
            break
        assert deadline > play.now, "others are heard between two steps"
        play.tick(deadline - play.now)
    assert list(play.inventories.deadlines()) == []
    assert play.index.sweep() is False and len(play.index) == 0
